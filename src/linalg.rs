//! Factorizations of weight matrices. nalgebra's `DMatrix` is the matrix type; the large products and decompositions
//! run in faer on the same column-major memory, one after the other on one thread, so that they give the same bits each time.

mod solve;

use faer::{MatRef, Side};
use nalgebra::DMatrix;
use rand_core::{Rng, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;
use rayon::prelude::*;

pub use self::solve::{
    Cholesky, add_cross, add_gram, add_product_of, energy, product, solve_lower, solve_lower_transposed,
    subtract_product, upper_root,
};

/// Directions beyond the wanted rank that subspace iteration carries along (Halko, Martinsson & Tropp 2011 advise 5 to 10).
const OVERSAMPLING: usize = 10;
/// Rounds of subspace iteration; two suffice for spectra that decay slowly (same source).
const ROUNDS: usize = 2;
/// Below this share of the smaller side, a wanted rank is found by subspace iteration, which costs O(rows·columns·rank).
const RANDOMIZED_SHARE: f64 = 0.25;

/// The leading left singular vectors of a matrix, and the energy of every direction that was looked at.
#[derive(Clone, Debug)]
pub struct Spectrum {
    /// rows × k, orthonormal columns, the strongest first.
    pub basis: DMatrix<f64>,
    /// Squared singular values, descending.
    pub energies: Vec<f64>,
    /// The squared Frobenius norm of the matrix: the energy of all directions together.
    pub total: f64,
}

impl Spectrum {
    /// The spectrum of `matrix` (rows × columns, rows ≤ columns is cheapest): all of it, or only the first `rank`
    /// directions where that is much less work.
    #[must_use]
    pub fn of(matrix: &DMatrix<f64>, rank: Option<usize>) -> Option<Self> {
        let small = matrix.nrows().min(matrix.ncols());
        match rank {
            Some(rank) if (rank.saturating_add(OVERSAMPLING) as f64) < RANDOMIZED_SHARE * small as f64 => {
                Self::leading(matrix, rank)
            }
            _ if matrix.nrows() <= matrix.ncols() => Self::full(matrix),
            _ => Self::tall(matrix),
        }
    }

    /// Eigenvectors of M·Mᵀ.
    fn full(matrix: &DMatrix<f64>) -> Option<Self> {
        let m = view(matrix);
        let (basis, energies) = eigen(&(m * m.transpose()))?;
        Some(Self { basis, energies, total: matrix.norm_squared() })
    }

    /// The spectrum of a matrix M of which M·Mᵀ is known: a covariance.
    #[must_use]
    pub fn of_square(square: &DMatrix<f64>) -> Option<Self> {
        let (basis, energies) = eigen(&view(square).to_owned())?;
        Some(Self { basis, energies, total: square.trace() })
    }

    /// Eigenvectors V of Mᵀ·M, mapped back: U = M·V, orthonormalized.
    fn tall(matrix: &DMatrix<f64>) -> Option<Self> {
        let m = view(matrix);
        let (right, energies) = eigen(&(m.transpose() * m))?;
        let basis = orthonormal(&(m * view(&right)));
        Some(Self { basis, energies, total: matrix.norm_squared() })
    }

    /// Subspace iteration from a fixed seed (Halko, Martinsson & Tropp 2011).
    fn leading(matrix: &DMatrix<f64>, rank: usize) -> Option<Self> {
        let m = view(matrix);
        let mut random = Xoshiro256PlusPlus::seed_from_u64(0);
        let start = DMatrix::from_fn(matrix.ncols(), rank + OVERSAMPLING, |_, _| normal(&mut random));
        let mut q = orthonormal(&(m * view(&start)));
        for _ in 0..ROUNDS {
            let back = orthonormal(&(m.transpose() * view(&q)));
            q = orthonormal(&(m * view(&back)));
        }
        let inner = view(&q).transpose() * m;
        let (turn, energies) = eigen(&(&inner * inner.transpose()))?;
        let basis = owned((view(&q) * view(&turn)).as_ref()).columns(0, rank).into_owned();
        Some(Self { basis, energies: energies[..rank].to_vec(), total: matrix.norm_squared() })
    }

    /// The energy outside the first `rank` directions: the least squared error of any matrix of that rank (Eckart &
    /// Young 1936).
    #[must_use]
    pub fn tail(&self, rank: usize) -> f64 {
        (self.total - self.energies.iter().take(rank).sum::<f64>()).max(0.0)
    }

    /// The factors of the best approximation of `matrix` of rank `rank`: rows × rank and rank × columns. Each direction has
    /// the same norm in both, the square root of its singular value, so that either factor by itself says how much it
    /// matters; a direction without energy is zero in both.
    #[must_use]
    pub fn factors(&self, matrix: &DMatrix<f64>, rank: usize) -> (DMatrix<f64>, DMatrix<f64>) {
        let mut left = self.basis.columns(0, rank).into_owned();
        let mut right = owned((view(&left).transpose() * view(matrix)).as_ref());
        let floor = self.total.sqrt() * f64::EPSILON;
        for k in 0..rank {
            let singular_value = right.row(k).norm();
            let share = if singular_value > floor { singular_value.sqrt() } else { 0.0 };
            left.column_mut(k).scale_mut(share);
            right.row_mut(k).scale_mut(if share > 0.0 { share.recip() } else { 0.0 });
        }
        (left, right)
    }
}

/// A number that the rank of a matrix is at least: pivots of its elimination that are not near zero, its rows scaled alike.
#[must_use]
pub fn least_rank(mut matrix: DMatrix<f64>) -> usize {
    /// Below this share of the largest, a pivot may be rounding.
    const TINY: f64 = 1e-6;
    for mut row in matrix.row_iter_mut() {
        let largest = row.amax();
        if largest > 0.0 {
            row /= largest;
        }
    }
    let size = matrix.nrows().min(matrix.ncols());
    let factors = view(&matrix).partial_piv_lu();
    let pivots = factors.U().diagonal().column_vector();
    let sizes = || (0..size).map(|i| pivots[i].abs());
    let largest = sizes().fold(0.0, f64::max);
    sizes().filter(|pivot| *pivot > TINY * largest).count()
}

/// The elements of a matrix of rows of this width, column by column; copied by squares that stay in the cache.
#[must_use]
pub fn transposed(values: &[f64], width: usize) -> Vec<f64> {
    const SIDE: usize = 32;
    let rows = values.len() / width.max(1);
    let mut turned = vec![0.0; rows * width];
    turned.par_chunks_mut((rows * SIDE).max(1)).enumerate().for_each(|(block, part)| {
        for begin in (0..rows).step_by(SIDE) {
            for (i, column) in part.chunks_mut(rows).enumerate() {
                for (row, element) in column.iter_mut().enumerate().skip(begin).take(SIDE) {
                    *element = values[row * width + block * SIDE + i];
                }
            }
        }
    });
    turned
}

/// The elements of a matrix row by row.
#[must_use]
pub fn by_rows(matrix: &DMatrix<f64>) -> Vec<f64> {
    transposed(matrix.as_slice(), matrix.nrows())
}

/// A draw from the standard normal distribution (Box & Muller 1958), the same on every machine.
pub fn normal(random: &mut impl Rng) -> f64 {
    let unit = |bits: u64| ((bits >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    let (a, b) = (unit(random.next_u64()), unit(random.next_u64()));
    libm::sqrt(-2.0 * libm::log(a)) * libm::cos(std::f64::consts::TAU * b)
}

fn view(matrix: &DMatrix<f64>) -> MatRef<'_, f64> {
    MatRef::from_column_major_slice(matrix.as_slice(), matrix.nrows(), matrix.ncols())
}

fn owned(matrix: MatRef<'_, f64>) -> DMatrix<f64> {
    DMatrix::from_fn(matrix.nrows(), matrix.ncols(), |i, j| matrix[(i, j)])
}

/// An orthonormal basis of the columns of `matrix`, which has at least as many rows.
fn orthonormal(matrix: &faer::Mat<f64>) -> DMatrix<f64> {
    owned(matrix.qr().compute_thin_Q().as_ref())
}

/// Eigenvectors and eigenvalues of a symmetric matrix, the largest first; `None` if the iteration fails.
fn eigen(matrix: &faer::Mat<f64>) -> Option<(DMatrix<f64>, Vec<f64>)> {
    let eigen = matrix.self_adjoint_eigen(Side::Lower).ok()?;
    let (vectors, values) = (eigen.U(), eigen.S().column_vector());
    let n = matrix.nrows();
    let basis = DMatrix::from_fn(n, n, |i, j| vectors[(i, n - 1 - j)]);
    Some((basis, (0..n).rev().map(|i| values[i].max(0.0)).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(rows: usize, columns: usize, rank: usize) -> DMatrix<f64> {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(7);
        let a = DMatrix::from_fn(rows, rank, |_, _| normal(&mut random));
        let b = DMatrix::from_fn(rank, columns, |_, _| normal(&mut random));
        a * b
    }

    #[test]
    fn spectra_agree_with_the_reference_svd() {
        for (rows, columns) in [(7, 12), (12, 7), (9, 9)] {
            let matrix = sample(rows, columns, 20);
            let spectrum = Spectrum::of(&matrix, None).unwrap();
            let reference = matrix.clone().svd(false, false).singular_values;
            for (energy, sigma) in spectrum.energies.iter().zip(reference.iter()) {
                assert!((energy - sigma * sigma).abs() < 1e-9 * spectrum.total, "{energy} {sigma}");
            }
            for rank in 1..=7 {
                let (left, right) = spectrum.factors(&matrix, rank);
                let error = (&matrix - left * right).norm_squared();
                assert!((error - spectrum.tail(rank)).abs() < 1e-9 * spectrum.total, "rank {rank}");
            }
        }
    }

    #[test]
    fn subspace_iteration_finds_an_exact_low_rank() {
        let matrix = sample(120, 90, 5);
        let spectrum = Spectrum::of(&matrix, Some(5)).unwrap();
        assert_eq!(spectrum.basis.ncols(), 5);
        let (left, right) = spectrum.factors(&matrix, 5);
        assert!((&matrix - left * right).norm() < 1e-9 * matrix.norm());
        assert!(spectrum.tail(5) < 1e-12 * spectrum.total && spectrum.tail(4) > 1e-3 * spectrum.total);
    }
}
