//! Products and ridge systems over statistics of vectors.

use faer::{
    Accum, Mat, MatMut, MatRef, Par, Side,
    linalg::{
        matmul::{
            matmul,
            triangular::{self, BlockStructure},
        },
        solvers::{Llt, Solve},
        triangular_solve,
    },
};
use nalgebra::DMatrix;
use rayon::prelude::*;

use super::{owned, view};

/// A ridge is raised tenfold until the system can be solved, up to this share of the mean of the diagonal.
const MAX_RIDGE: f64 = 1.0;

/// A·B.
#[must_use]
pub fn product(a: &DMatrix<f64>, b: &DMatrix<f64>) -> DMatrix<f64> {
    let mut result = DMatrix::zeros(a.nrows(), b.ncols());
    add_product(&mut result, a, view(b), 1.0);
    result
}

/// Subtracts A·B from `from`.
pub fn subtract_product(from: &mut DMatrix<f64>, a: &DMatrix<f64>, b: &DMatrix<f64>) {
    add_product(from, a, view(b), -1.0);
}

/// Adds A·B times `factor` to `sum`, block by block.
fn add_product(sum: &mut DMatrix<f64>, a: &DMatrix<f64>, b: MatRef<'_, f64>, factor: f64) {
    let rows = sum.nrows();
    sum.as_mut_slice().par_chunks_mut((rows * BLOCK).max(1)).enumerate().for_each(|(i, block)| {
        let width = block.len() / rows;
        let block = MatMut::from_column_major_slice_mut(block, rows, width);
        matmul(block, Accum::Add, view(a), b.subcols(i * BLOCK, width), factor, Par::Seq);
    });
}

/// Adds A·B to `sum`, on one thread, where of A the columns of `inner` (first, count) are taken and of B those rows, and its columns of
/// `outer`.
pub fn add_product_of(
    sum: &mut DMatrix<f64>,
    (a, b): (&DMatrix<f64>, &DMatrix<f64>),
    inner: (usize, usize),
    outer: (usize, usize),
) {
    let (rows, columns) = sum.shape();
    let whole = MatMut::from_column_major_slice_mut(sum.as_mut_slice(), rows, columns);
    let (a, b) = (view(a).subcols(inner.0, inner.1), view(b).submatrix(inner.0, outer.0, inner.1, outer.1));
    matmul(whole, Accum::Add, a, b, 1.0, Par::Seq);
}

/// Columns of a product that one task computes: the same blocks, whatever the number of threads.
const BLOCK: usize = 128;

/// Adds X·Xᵀ to the lower triangle of `sum` (d×d), for X (d×n) of the columns `vectors`.
pub fn add_gram(sum: &mut DMatrix<f64>, vectors: &DMatrix<f64>) {
    let size = sum.nrows();
    let (lower, full, x) = (BlockStructure::TriangularLower, BlockStructure::Rectangular, view(vectors));
    sum.as_mut_slice().par_chunks_mut(size * BLOCK).enumerate().for_each(|(i, columns)| {
        let (begin, width) = (i * BLOCK, columns.len() / size);
        let block = MatMut::from_column_major_slice_mut(columns, size, width);
        let (_, below) = block.split_at_row_mut(begin);
        let (square, rest) = below.split_at_row_mut(width);
        let (own, after) = (x.subrows(begin, width), x.subrows(begin + width, size - begin - width));
        triangular::matmul(square, lower, Accum::Add, own, full, own.transpose(), full, 1.0, Par::Seq);
        matmul(rest, Accum::Add, after, own.transpose(), 1.0, Par::Seq);
    });
}

/// Adds Y·Xᵀ to `sum` (o×d), for Y (o×n) and X (d×n).
pub fn add_cross(sum: &mut DMatrix<f64>, y: &DMatrix<f64>, x: &DMatrix<f64>) {
    add_product(sum, y, view(x).transpose(), 1.0);
}

/// tr(W·C·Wᵀ) for W (o×d) and a symmetric C (d×d): the energy of what the rows of W make of vectors of covariance C.
#[must_use]
pub fn energy(weight: &DMatrix<f64>, covariance: &DMatrix<f64>) -> f64 {
    product(weight, covariance).dot(weight)
}

/// A factorized symmetric positive definite matrix.
#[derive(Debug)]
pub struct Cholesky(Llt<f64>);

impl Cholesky {
    /// Factorizes C + λI, of which the lower triangle is read, with λ a share `ridge` of the mean of the diagonal, raised
    /// until that works; also λ. `None` where nothing works: C is not finite, or zero.
    #[must_use]
    pub fn ridged(covariance: &DMatrix<f64>, ridge: f64) -> Option<(Self, f64)> {
        let mean = covariance.diagonal().mean();
        if !mean.is_finite() || mean <= 0.0 {
            return None;
        }
        let mut share = ridge;
        while share <= MAX_RIDGE * 1.5 {
            let lambda = share * mean;
            let mut raised = covariance.clone();
            for i in 0..raised.nrows() {
                raised[(i, i)] += lambda;
            }
            if let Ok(factor) = Llt::new(view(&raised), Side::Lower) {
                return Some((Self(factor), lambda));
            }
            share *= 10.0;
        }
        None
    }

    /// X with X·(C + λI) = B, for B (o×d).
    #[must_use]
    pub fn solve_right(&self, b: &DMatrix<f64>) -> DMatrix<f64> {
        let blocks: Vec<_> = (0..b.nrows()).step_by(BLOCK).collect();
        let solve = |&first: &usize| {
            let rows = view(b).subrows(first, BLOCK.min(b.nrows() - first));
            owned(self.0.solve(rows.transpose()).transpose())
        };
        let solved: Vec<DMatrix<f64>> = blocks.par_iter().map(solve).collect();
        let mut whole = DMatrix::zeros(b.nrows(), b.ncols());
        for (first, part) in blocks.into_iter().zip(&solved) {
            whole.rows_mut(first, part.nrows()).copy_from(part);
        }
        whole
    }

    /// L with L·Lᵀ = C + λI.
    #[must_use]
    pub fn root(&self) -> DMatrix<f64> {
        owned(self.0.L())
    }

    /// (C + λI)⁻¹, for methods that update the inverse itself.
    #[must_use]
    pub fn inverse(&self, size: usize) -> DMatrix<f64> {
        let solved = self.0.solve(Mat::<f64>::identity(size, size));
        owned(solved.as_ref())
    }
}

/// An upper triangular R with R·Rᵀ = C + λI for a symmetric C, λ as [`Cholesky::ridged`] has it; `None` where that has none.
#[must_use]
pub fn upper_root(covariance: &DMatrix<f64>, ridge: f64) -> Option<DMatrix<f64>> {
    let size = covariance.nrows();
    let reversed =
        |of: &dyn Fn(usize, usize) -> f64| DMatrix::from_fn(size, size, |i, j| of(size - 1 - i, size - 1 - j));
    let (factor, _) = Cholesky::ridged(&reversed(&|i, j| covariance[(i, j)]), ridge)?;
    let lower = factor.0.L();
    Some(reversed(&|i, j| lower[(i, j)]))
}

/// X with L·X = B for a lower triangular L.
#[must_use]
pub fn solve_lower(lower: &DMatrix<f64>, mut b: DMatrix<f64>) -> DMatrix<f64> {
    let (rows, columns) = b.shape();
    let rhs = MatMut::from_column_major_slice_mut(b.as_mut_slice(), rows, columns);
    triangular_solve::solve_lower_triangular_in_place(view(lower), rhs, Par::Seq);
    b
}

/// X with Lᵀ·X = B for a lower triangular L.
#[must_use]
pub fn solve_lower_transposed(lower: &DMatrix<f64>, mut b: DMatrix<f64>) -> DMatrix<f64> {
    let (rows, columns) = b.shape();
    let rhs = MatMut::from_column_major_slice_mut(b.as_mut_slice(), rows, columns);
    triangular_solve::solve_upper_triangular_in_place(view(lower).transpose(), rhs, Par::Seq);
    b
}
