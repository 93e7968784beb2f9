//! Tables of short vectors: k-means in the metric of what the columns of each vector read (Gong 2014; Wu 2016), then vector by vector,
//! each making up for what the ones before it lost (GPTVQ, van Baalen 2024).

use nalgebra::{DMatrix, DVector};
use rand_core::{Rng, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;
use rayon::prelude::*;

use super::{DAMPING, Plane, ROWS};
use crate::{
    factor::Metric,
    ir::{Codes, DType, Storage, Tensor, Vectors},
    linalg::{add_product_of, upper_root},
};

/// Vectors that k-means looks at; of more, equally spaced ones.
const MOST: usize = 1 << 14;
/// Rounds of k-means.
const ROUNDS: usize = 12;

/// A table, each vector a column.
struct Table(DMatrix<f64>);

/// One matrix to be coded, and the metric of each group of columns that a vector stands for.
struct Problem {
    weight: DMatrix<f64>,
    metrics: Vec<DMatrix<f64>>,
    /// What of the loss of each column each vector after it takes over.
    carried: Option<DMatrix<f64>>,
}

/// `values`, of a weight that `plane` lays out, as codes of so many bits, each for `width` elements that multiply neighbours; C of each
/// group by `metrics`. `None` where vectors do not fit its rows.
#[must_use]
pub fn fit_vectors(
    (plane, (bits, width)): (&Plane, (u32, usize)),
    (dtype, dims): (DType, &[usize]),
    values: &[f64],
    metrics: &[Metric],
) -> Option<Storage> {
    values.iter().all(|value| value.is_finite()).then_some(())?;
    let turned = plane.is_turned()?;
    let matrices = plane.matrices(values);
    let columns = matrices.first()?.ncols();
    (width > 1 && columns.is_multiple_of(width)).then_some(())?;
    let metric = |group: usize| metrics.get(group.min(metrics.len().saturating_sub(1))).unwrap_or(&Metric::Identity);
    let problem = |(group, matrix): (usize, DMatrix<f64>)| Problem::new(matrix, metric(group), width);
    let problems: Vec<_> = matrices.into_iter().enumerate().map(problem).collect();
    let entries = 1_usize << bits;
    let table = Table::of(&problems, entries, width).rounded(dtype)?;
    let codes: Vec<DMatrix<u8>> = problems.iter().map(|problem| problem.code(&table)).collect();
    let rows: usize = codes.iter().map(DMatrix::nrows).sum();
    let shape = if turned { [columns / width, rows] } else { [rows, columns / width] };
    // In a matrix whose columns are rows of the weight, codes stand column by column.
    let bytes: Vec<u8> = if turned {
        codes.first()?.as_slice().to_vec()
    } else {
        codes.iter().flat_map(|codes| codes.transpose().as_slice().to_vec()).collect()
    };
    let codes = Codes::new(&shape, bits, &shape, bytes.into())?;
    let table = Tensor::floats(dtype, &[entries, width], table.0.as_slice())?;
    Some(Storage::Vectors(Vectors::new(codes, table, dims, turned)?))
}

impl Problem {
    fn new(weight: DMatrix<f64>, metric: &Metric, width: usize) -> Self {
        let blocks = weight.ncols() / width;
        let square = |block: usize, of: &dyn Fn(usize, usize) -> f64| {
            DMatrix::from_fn(width, width, |i, j| of(block * width + i, block * width + j))
        };
        match metric {
            Metric::Identity => Self { weight, metrics: vec![DMatrix::identity(width, width); blocks], carried: None },
            Metric::Channels(channels) => {
                let taps = (weight.ncols() / channels.nrows()).max(1);
                let of = |i: usize, j: usize| if i % taps == j % taps { channels[(i / taps, j / taps)] } else { 0.0 };
                let metrics = (0..blocks).map(|block| square(block, &of)).collect();
                Self { weight, metrics, carried: None }
            }
            Metric::Full(covariance) => {
                // With C = R·Rᵀ, R upper triangular, a vector that comes after others has R_bb·R_bbᵀ for its metric.
                let Some(mut carried) = upper_root(covariance, DAMPING) else {
                    return Self::new(weight, &Metric::Identity, width);
                };
                let mut metrics = Vec::with_capacity(blocks);
                for block in 0..blocks {
                    let own = carried.view((block * width, block * width), (width, width)).into_owned();
                    let inverse = own.clone().try_inverse().unwrap_or_else(|| DMatrix::identity(width, width));
                    let before = carried.view((0, block * width), (block * width, width)) * inverse;
                    carried.view_mut((0, block * width), (block * width, width)).copy_from(&before);
                    metrics.push(&own * own.transpose());
                }
                Self { weight, metrics, carried: Some(carried) }
            }
        }
    }

    /// The code of each vector of each row.
    fn code(&self, table: &Table) -> DMatrix<u8> {
        let (width, blocks) = (table.0.nrows(), self.metrics.len());
        let sizes: Vec<Vec<f64>> = self.metrics.iter().map(|metric| table.sizes(metric)).collect();
        let of_rows = |first: usize| {
            let weight = self.weight.rows(first, ROWS.min(self.weight.nrows() - first)).into_owned();
            let mut lost = DMatrix::<f64>::zeros(weight.nrows(), weight.ncols());
            let mut codes = DMatrix::<u8>::zeros(weight.nrows(), blocks);
            for block in 0..blocks {
                let begin = block * width;
                let mut aim = weight.columns(begin, width).into_owned();
                if let Some(carried) = &self.carried {
                    add_product_of(&mut aim, (&lost, carried), (0, begin), (begin, width));
                }
                let bent = &aim * &self.metrics[block];
                for row in 0..weight.nrows() {
                    let code = table.nearest(&bent.row(row).transpose(), &sizes[block]);
                    codes[(row, block)] = code as u8;
                    for i in 0..width {
                        lost[(row, begin + i)] = weight[(row, begin + i)] - table.0[(i, code)];
                    }
                }
            }
            codes
        };
        let starts: Vec<_> = (0..self.weight.nrows()).step_by(ROWS).collect();
        let parts: Vec<_> = starts.into_par_iter().map(of_rows).collect();
        let mut codes = DMatrix::zeros(self.weight.nrows(), blocks);
        for (i, part) in parts.iter().enumerate() {
            codes.rows_mut(i * ROWS, part.nrows()).copy_from(part);
        }
        codes
    }
}

/// (a−b)·M·(a−b).
fn energy_between(metric: &DMatrix<f64>, a: &[f64], b: &[f64]) -> f64 {
    let off = |i: usize| a[i] - b[i];
    let row = |(j, column): (usize, &[f64])| off(j) * column.iter().enumerate().map(|(i, m)| m * off(i)).sum::<f64>();
    metric.as_slice().chunks_exact(a.len()).enumerate().map(row).sum()
}

impl Table {
    /// The table of so many vectors by k-means, begun by drawing vectors that are far from those drawn before (Arthur & Vassilvitskii
    /// 2007) from a fixed seed.
    fn of(problems: &[Problem], entries: usize, width: usize) -> Self {
        let count: usize = problems.iter().map(|problem| problem.weight.nrows() * problem.metrics.len()).sum();
        let step = count.div_ceil(MOST).max(1);
        let metrics: Vec<&DMatrix<f64>> = problems.iter().flat_map(|problem| &problem.metrics).collect();
        let firsts = problems.iter().scan(0, |first, problem| {
            *first += problem.metrics.len();
            Some(*first - problem.metrics.len())
        });
        let places = problems.iter().zip(firsts).flat_map(|(problem, first)| {
            let rows = problem.weight.nrows();
            (0..rows * problem.metrics.len()).map(move |i| (problem, i % rows, i / rows, first + i / rows))
        });
        let vectors: Vec<(Vec<f64>, usize)> = places
            .step_by(step)
            .map(|(problem, row, block, metric)| {
                ((0..width).map(|i| problem.weight[(row, block * width + i)]).collect(), metric)
            })
            .collect();
        let mut table = Self(DMatrix::zeros(width, entries));
        let mut random = Xoshiro256PlusPlus::seed_from_u64(0);
        let mut far = vec![f64::INFINITY; vectors.len()];
        for entry in 0..entries {
            let whole: f64 = far.iter().sum();
            let mut left = (random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64 * whole;
            let drawn = far.iter().position(|far| {
                left -= far;
                left < 0.0
            });
            let Some((chosen, _)) = vectors.get(if entry == 0 { 0 } else { drawn.unwrap_or(0) }) else { break };
            table.0.column_mut(entry).copy_from_slice(chosen);
            far.par_iter_mut().zip(&vectors).for_each(|(far, (vector, metric))| {
                *far = far.min(energy_between(metrics[*metric], vector, chosen).max(0.0));
            });
        }
        for _ in 0..ROUNDS {
            table.improve(&vectors, &metrics);
        }
        table
    }

    /// Each vector of the table becomes the one that is best for those that it is nearest to, each in one of `metrics`.
    fn improve(&mut self, vectors: &[(Vec<f64>, usize)], metrics: &[&DMatrix<f64>]) {
        let width = self.0.nrows();
        let sizes: Vec<Vec<f64>> = metrics.par_iter().map(|metric| self.sizes(metric)).collect();
        let of = |(vector, metric): &(Vec<f64>, usize)| {
            let bent = metrics[*metric] * DVector::from_column_slice(vector);
            let nearest = self.nearest(&bent, &sizes[*metric]);
            (nearest, bent)
        };
        let nearest: Vec<(usize, DVector<f64>)> = vectors.par_iter().map(of).collect();
        let mut sums = vec![(DMatrix::<f64>::zeros(width, width), DVector::<f64>::zeros(width)); self.0.ncols()];
        for ((_, metric), (entry, bent)) in vectors.iter().zip(nearest) {
            sums[entry].0 += metrics[*metric];
            sums[entry].1 += bent;
        }
        for (entry, (square, side)) in sums.into_iter().enumerate() {
            if let Some(solved) = square.cholesky().map(|factor| factor.solve(&side))
                && solved.iter().all(|value| value.is_finite())
            {
                self.0.set_column(entry, &solved);
            }
        }
    }

    /// The same as elements of type `dtype`.
    fn rounded(&self, dtype: DType) -> Option<Self> {
        let (width, entries) = self.0.shape();
        let rounded = Tensor::floats(dtype, &[entries, width], self.0.as_slice())?.f64s()?;
        Some(Self(DMatrix::from_column_slice(width, entries, &rounded)))
    }

    /// c·M·c of each vector.
    fn sizes(&self, metric: &DMatrix<f64>) -> Vec<f64> {
        let zero = vec![0.0; self.0.nrows()];
        self.0.as_slice().chunks_exact(zero.len()).map(|column| energy_between(metric, column, &zero)).collect()
    }

    /// The vector c for which c·M·c − 2·c·M·w is least, of M·w and the first of these for all.
    fn nearest(&self, bent: &DVector<f64>, sizes: &[f64]) -> usize {
        let mut best = (f64::INFINITY, 0);
        for (entry, (column, size)) in self.0.as_slice().chunks_exact(bent.len()).zip(sizes).enumerate() {
            let along: f64 = column.iter().zip(bent.iter()).map(|(c, w)| c * w).sum();
            if size - 2.0 * along < best.0 {
                best = (size - 2.0 * along, entry);
            }
        }
        best.1
    }
}
