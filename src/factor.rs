//! What a linear layer may be replaced by: a chain of layers that cost less together, closest to what it makes of what it
//! reads. All errors are in the metric of E‖Δy‖² = tr(ΔW·C·ΔWᵀ), C the covariance of what is read.

mod blocks;
mod evbmf;
mod family;
mod features;
mod fit;
mod form;
mod kronecker;

use nalgebra::DMatrix;

pub use self::{
    blocks::{Components, Orders},
    evbmf::evbmf_rank,
    family::{Family, Prepared},
    form::{Form, Layout},
};
use crate::linalg::product;

/// A layer y = W·x that is to be replaced.
#[derive(Clone, Debug)]
pub struct Target {
    /// W of each group, o×d.
    pub matrices: Vec<DMatrix<f64>>,
    /// How what each group reads varies.
    pub metrics: Vec<Metric>,
    /// What W looks like as the weight of a layer.
    pub shape: Shape,
}

/// The axes of a layer's weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// How many independent matrices there are.
    pub groups: usize,
    /// Channels that each makes.
    pub makes: usize,
    /// Channels that each reads.
    pub reads: usize,
    /// The extents of the kernel, none for a plain matrix.
    pub kernel: Vec<usize>,
    /// Whether the kernel is one of rows, as in a `ConvTranspose`: x is a pixel, and what it adds to the results around it is
    /// in the order (channel, kernel). Else columns are in the order (channel, kernel).
    pub spreads: bool,
}

impl Shape {
    /// Places of the kernel.
    #[must_use]
    pub fn taps(&self) -> usize {
        self.kernel.iter().product()
    }

    /// Rows of W for each channel that is made, and columns for each that is read.
    #[must_use]
    pub fn extents(&self) -> (usize, usize) {
        if self.spreads { (self.taps(), 1) } else { (1, self.taps()) }
    }

    /// Elements of W of all groups.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.groups * self.makes * self.reads * self.taps()
    }
}

/// How what a layer reads varies, d elements.
#[derive(Clone, Debug)]
pub enum Metric {
    /// Nothing is known: C = I.
    Identity,
    /// So do its channels, at each place of the kernel alike, and places apart: C = H⊗I.
    Channels(DMatrix<f64>),
    /// C itself.
    Full(DMatrix<f64>),
}

impl Metric {
    /// X·C for X (n×d).
    #[must_use]
    pub fn times(&self, x: &DMatrix<f64>) -> DMatrix<f64> {
        match self {
            Self::Identity => x.clone(),
            Self::Full(covariance) => product(x, covariance),
            Self::Channels(_) => self.times_block(x, &(0..x.ncols()).collect::<Vec<_>>(), x.ncols()),
        }
    }

    /// X·C of d = `size` columns, for X whose only columns that are not zero are those of `support`, in that order.
    fn times_block(&self, x: &DMatrix<f64>, support: &[usize], size: usize) -> DMatrix<f64> {
        match self {
            Self::Identity => {
                let mut whole = DMatrix::zeros(x.nrows(), size);
                support.iter().enumerate().for_each(|(i, &place)| whole.set_column(place, &x.column(i)));
                whole
            }
            Self::Full(covariance) => product(x, &covariance.select_rows(support)),
            Self::Channels(channels) => {
                let taps = size / channels.nrows();
                let mut whole = DMatrix::zeros(x.nrows(), size);
                for tap in 0..taps {
                    let own: Vec<_> = (0..support.len()).filter(|&i| support[i] % taps == tap).collect();
                    let rows: Vec<_> = own.iter().map(|&i| support[i] / taps).collect();
                    let part = product(&x.select_columns(&own), &channels.select_rows(&rows));
                    part.column_iter()
                        .enumerate()
                        .for_each(|(channel, values)| whole.set_column(channel * taps + tap, &values));
                }
                whole
            }
        }
    }

    /// The mean of the blocks of C that stand at each of `supports`, of one length; `None` for I.
    fn mean_block(&self, supports: &[Vec<usize>], size: usize) -> Option<DMatrix<f64>> {
        let block = |support: &Vec<usize>| match self {
            Self::Identity => None,
            Self::Full(covariance) => {
                Some(DMatrix::from_fn(support.len(), support.len(), |i, j| covariance[(support[i], support[j])]))
            }
            Self::Channels(channels) => {
                let taps = size / channels.nrows();
                let entry = |a: usize, b: usize| {
                    if a % taps == b % taps { channels[(a / taps, b / taps)] } else { 0.0 }
                };
                Some(DMatrix::from_fn(support.len(), support.len(), |i, j| entry(support[i], support[j])))
            }
        };
        let sum = supports.iter().map(block).reduce(|sum, block| Some(sum? + block?))??;
        Some(sum / supports.len() as f64)
    }

    /// tr(X·C·Xᵀ).
    #[must_use]
    pub fn energy(&self, x: &DMatrix<f64>) -> f64 {
        self.times(x).dot(x)
    }
}

/// A chain of layers in place of one.
#[derive(Clone, Debug)]
pub struct Fitted {
    /// The weight of each layer of the chain, laid out as its [`Layout`] says.
    pub stages: Vec<Vec<f64>>,
    /// What they make together, W̃ of each group, with channels in the order of W.
    pub whole: Vec<DMatrix<f64>>,
    /// Of a layer in groups, the order in which the channels of all groups stand in it.
    pub orders: Option<Orders>,
}

impl Target {
    /// tr(W·C·Wᵀ), over all groups.
    #[must_use]
    pub fn energy(&self) -> f64 {
        self.matrices.iter().zip(&self.metrics).map(|(matrix, metric)| metric.energy(matrix)).sum()
    }

    /// The relative squared error of `whole` in place of W: tr(ΔW·C·ΔWᵀ) / tr(W·C·Wᵀ).
    #[must_use]
    pub fn error(&self, whole: &[DMatrix<f64>]) -> f64 {
        let groups = self.matrices.iter().zip(whole).zip(&self.metrics);
        let lost: f64 = groups.map(|((matrix, whole), metric)| metric.energy(&(matrix - whole))).sum();
        lost / self.energy().max(f64::MIN_POSITIVE)
    }
}
