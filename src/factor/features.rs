//! Features t = T·x of what a layer reads, of which each tells less than those before it, and what can be made of them.

use nalgebra::DMatrix;

use super::Metric;
use crate::linalg::{Cholesky, Spectrum, product, solve_lower, solve_lower_transposed};

/// Features that tell the same up to this share of their variance are taken for one.
pub(super) const COLLINEAR: f64 = 1e-9;
/// Directions of less energy than this share of the first are noise (algorithms.md §0.5).
const NOISE: f64 = 1e-15;

/// Features in rows: each row has one of every block, so that the first rows by themselves are features of the same kind.
#[derive(Debug)]
pub(super) struct Features {
    pub(super) blocks: Vec<Block>,
}

/// Features that read the same elements, one for each row.
#[derive(Clone, Debug)]
pub(super) struct Block {
    /// The elements of x that they read.
    pub(super) support: Vec<usize>,
    /// Rows × elements.
    pub(super) weights: DMatrix<f64>,
}

/// Elements of the features of a layer times what it reads, and of what they have in common: 256 MB each.
const MAX_ELEMENTS: usize = 1 << 25;

impl Features {
    /// The first rows of these, of vectors of `size` elements: as many as can be held.
    pub(super) fn of_blocks(blocks: Vec<Block>, size: usize) -> Self {
        let features = Self { blocks };
        let most = (MAX_ELEMENTS / (features.blocks.len() * size).max(1)).max(1);
        if features.rows() > most { features.first(most) } else { features }
    }

    /// The first rows of them.
    pub(super) fn first(&self, rows: usize) -> Self {
        let of_block = |block: &Block| {
            let rows = rows.min(block.weights.nrows());
            Block { support: block.support.clone(), weights: block.weights.rows(0, rows).into_owned() }
        };
        Self { blocks: self.blocks.iter().map(of_block).collect() }
    }

    /// How many rows there are.
    pub(super) fn rows(&self) -> usize {
        self.blocks.first().map_or(0, |block| block.weights.nrows())
    }

    /// T·C.
    fn times(&self, metric: &Metric, size: usize) -> DMatrix<f64> {
        let mut whole = DMatrix::zeros(self.rows() * self.blocks.len(), size);
        for (i, block) in self.blocks.iter().enumerate() {
            let part = metric.times_block(&block.weights, &block.support, size);
            for (row, values) in part.row_iter().enumerate() {
                whole.set_row(row * self.blocks.len() + i, &values);
            }
        }
        whole
    }

    /// X·Tᵀ for X (n×d).
    fn of(&self, x: &DMatrix<f64>) -> DMatrix<f64> {
        let mut whole = DMatrix::zeros(x.nrows(), self.rows() * self.blocks.len());
        for (i, block) in self.blocks.iter().enumerate() {
            let part = product(&x.select_columns(&block.support), &block.weights.transpose());
            for (row, values) in part.column_iter().enumerate() {
                whole.set_column(row * self.blocks.len() + i, &values);
            }
        }
        whole
    }

    /// P·T for weights P (o×n) of the first rows, d columns.
    pub(super) fn expand(&self, weights: &DMatrix<f64>, size: usize) -> DMatrix<f64> {
        let mut whole = DMatrix::zeros(weights.nrows(), size);
        let count = self.blocks.len();
        let rows = weights.ncols() / count;
        for (i, block) in self.blocks.iter().enumerate() {
            let own = weights.select_columns(&(0..rows).map(|row| row * count + i).collect::<Vec<_>>());
            let part = product(&own, &block.weights.rows(0, rows).into_owned());
            for (column, &place) in part.column_iter().zip(&block.support) {
                let mut sum = whole.column_mut(place);
                sum += column;
            }
        }
        whole
    }
}

/// What features tell of what a matrix W makes of x.
#[derive(Debug)]
pub(super) struct Told {
    /// L with L·Lᵀ the covariance of the features.
    lower: DMatrix<f64>,
    /// L⁻¹·T·C·Wᵀ: what each feature tells of each result beyond those before it.
    pub(super) crossed: DMatrix<f64>,
    blocks: usize,
}

impl Told {
    /// `None` where the features do not vary.
    pub(super) fn of(features: &Features, matrix: &DMatrix<f64>, metric: &Metric) -> Option<Self> {
        let spread = features.times(metric, matrix.ncols());
        let (factor, _) = Cholesky::ridged(&features.of(&spread), COLLINEAR)?;
        let lower = factor.root();
        let crossed = solve_lower(&lower, product(&spread, &matrix.transpose()));
        Some(Self { lower, crossed, blocks: features.blocks.len() })
    }

    /// The energy of W·x that the first 1, 2, … rows of features tell.
    pub(super) fn energies(&self) -> Vec<f64> {
        let mut sum = 0.0;
        let rows = self.crossed.nrows() / self.blocks;
        let mut of_row = |row: usize| {
            sum += self.crossed.rows(row * self.blocks, self.blocks).norm_squared();
            sum
        };
        (0..rows).map(&mut of_row).collect()
    }

    /// P (o×n) for which P·t, of the first `rows` of features, is closest to W·x: W·C·Tᵀ·(T·C·Tᵀ)⁻¹.
    pub(super) fn solve(&self, rows: usize) -> DMatrix<f64> {
        let count = rows * self.blocks;
        let lower = self.lower.view((0, 0), (count, count)).into_owned();
        solve_lower_transposed(&lower, self.crossed.rows(0, count).into_owned()).transpose()
    }
}

/// The directions of x (p elements) that tell most of Nᵀ·x, N p×q, the most telling first: rows A = Vᵀ·Nᵀ for the right
/// singular vectors V of Lᵀ·N, where L·Lᵀ is how x varies, each of variance 1. Nothing is divided by what L lacks.
pub(super) fn encoders(reads: &DMatrix<f64>, spread: Option<&DMatrix<f64>>) -> Option<DMatrix<f64>> {
    let root = match spread {
        Some(spread) => Some(Cholesky::ridged(spread, COLLINEAR)?.0.root()),
        None => None,
    };
    let whitened = root.as_ref().map_or_else(|| reads.clone(), |root| product(&root.transpose(), reads));
    let spectrum = Spectrum::of(&whitened, None)?;
    let mut rows = product(&product(&spectrum.basis.transpose(), &whitened), &reads.transpose());
    let deviations = root.as_ref().map_or_else(|| rows.clone(), |root| product(&rows, root));
    let floor = spectrum.energies.first().copied().unwrap_or(0.0) * NOISE;
    for (i, mut row) in rows.row_iter_mut().enumerate() {
        let deviation = deviations.row(i).norm();
        let is_signal = spectrum.energies[i] > floor && deviation > 0.0;
        row.scale_mut(if is_signal { deviation.recip() } else { 0.0 });
    }
    Some(rows)
}
