//! What is found out about one group of a layer, and the weights of a chain in its place.

use nalgebra::DMatrix;
use rayon::prelude::*;

use super::{
    Family, Form, Metric, Shape,
    blocks::{self, Blocked, Orders},
    features::{Block, COLLINEAR, Features, Told, encoders},
    kronecker::Products,
};
use crate::linalg::{Cholesky, Spectrum, by_rows, product};

/// What is found out about one group of a layer.
#[derive(Debug)]
pub(super) enum Group {
    Spectrum(Spectrum),
    Told(Features, Told),
    /// With the directions of what is made, the strongest first.
    Turned(Features, Told, DMatrix<f64>),
    /// For each channel that is made.
    Each(Vec<(Features, Told)>),
    /// In more and more parts.
    Blocks(Vec<Blocked>),
    /// Of more and more terms.
    Products(Vec<Products>),
}

/// More groups than this are not looked at unless they are asked for: on `fmnist_vgg`, 4 cost 3 points of 92.6 and 8 were never chosen.
const MAX_PARTS: usize = 8;

/// The weights of the layers of a chain, and what they make together.
pub(super) type Weights = (Vec<Vec<f64>>, DMatrix<f64>);

impl Group {
    /// For chains of a family, up to `rank` where that is given and less work.
    pub(super) fn of(
        family: Family,
        (matrix, metric): (&DMatrix<f64>, &Metric),
        shape: &Shape,
        rank: Option<usize>,
    ) -> Option<Self> {
        let told = |features: Features| {
            let told = Told::of(&features, matrix, metric)?;
            Some(Self::Told(features, told))
        };
        Some(match family {
            Family::After if shape.spreads => Self::Spectrum(Spectrum::of_square(&of_channels(matrix, metric, shape))?),
            Family::Before if shape.spreads => Self::Spectrum(spectrum(matrix, metric, rank)?),
            Family::After => Self::Spectrum(spectrum(matrix, metric, rank)?),
            Family::Before => told(before(matrix, metric, shape)?)?,
            Family::Both => {
                let features = before(matrix, metric, shape)?;
                let told = Told::of(&features, matrix, metric)?;
                let turn = spectrum(matrix, metric, None)?.basis;
                Self::Turned(features, told, turn)
            }
            Family::Spatial { first } => told(spatial(matrix, metric, shape, first)?)?,
            Family::Separate => told(separate(matrix, metric, shape)?)?,
            Family::Mixed => {
                let rows: Vec<_> = (0..matrix.nrows()).collect();
                let each = |&row: &usize| {
                    let row = matrix.rows(row, 1).into_owned();
                    let features = before(&row, metric, shape)?;
                    let told = Told::of(&features, &row, metric)?;
                    Some((features, told))
                };
                Self::Each(rows.par_iter().map(each).collect::<Option<_>>()?)
            }
            Family::Grouped { bypass } => {
                let is_wanted = |&parts: &usize| rank.map_or(parts <= MAX_PARTS, |rank| parts == rank);
                let counts: Vec<_> = blocks::counts(shape).filter(is_wanted).collect();
                let of_count = |&parts: &usize| blocks::split((matrix, metric), shape, parts, bypass);
                Self::Blocks(counts.par_iter().map(of_count).collect::<Option<_>>()?)
            }
            Family::Kronecker => Self::Products(Products::all(matrix, metric, shape, rank)?),
        })
    }

    /// Features in a row.
    pub(super) fn blocks(&self) -> usize {
        match self {
            Self::Told(features, _) | Self::Turned(features, ..) => features.blocks.len(),
            _ => 1,
        }
    }

    /// The members of a family, each with the energy of W·x that it tells, weakest saving last.
    pub(super) fn members(&self, family: Family, shape: &Shape) -> Vec<(Form, f64)> {
        let of_ranks = |energies: Vec<f64>| {
            let member = |(i, energy)| (family.member(shape, i + 1), energy);
            energies.into_iter().enumerate().map(member).collect()
        };
        match self {
            Self::Spectrum(spectrum) => of_ranks(cumulated(spectrum.energies.iter().copied())),
            Self::Told(_, told) | Self::Turned(_, told, _) => of_ranks(told.energies()),
            Self::Each(rows) => {
                let all: Vec<_> = rows.iter().map(|(_, told)| told.energies()).collect();
                let count = all.iter().map(Vec::len).min().unwrap_or(0);
                of_ranks((0..count).map(|i| all.iter().map(|energies| energies[i]).sum()).collect())
            }
            Self::Blocks(all) => all.iter().rev().map(|split| (split.form(), split.energy)).collect(),
            Self::Products(all) => all.iter().map(|products| (products.form(), products.energy)).collect(),
        }
    }

    /// The orders in which the channels of a layer in groups stand.
    pub(super) fn orders(&self, form: Form) -> Option<&Orders> {
        let Self::Blocks(all) = self else { return None };
        all.iter().find(|split| split.form() == form).map(|split| &split.orders)
    }

    /// The weights of the layers of a chain, and what they make together.
    pub(super) fn fit(&self, (matrix, metric): (&DMatrix<f64>, &Metric), shape: &Shape, form: Form) -> Option<Weights> {
        let size = matrix.ncols();
        match (self, form) {
            (Self::Spectrum(spectrum), Form::Ranks { after: Some(rank), before: None }) if shape.spreads => {
                Some(turned_at_each_place(spectrum, matrix, shape, rank))
            }
            (Self::Spectrum(spectrum), Form::Ranks { before: Some(rank), after: None }) => {
                let (left, right) = spectrum.factors(matrix, rank.min(spectrum.basis.ncols()));
                Some((vec![by_rows(&right), left.as_slice().to_vec()], product(&left, &right)))
            }
            (Self::Spectrum(spectrum), Form::Ranks { after: Some(rank), before: None }) => {
                let (left, right) = spectrum.factors(matrix, rank.min(spectrum.basis.ncols()));
                Some((vec![by_rows(&right), by_rows(&left)], product(&left, &right)))
            }
            (
                Self::Told(features, told),
                Form::Ranks { before: Some(rank), after: None } | Form::Spatial { rank, .. },
            ) => {
                let weights = told.solve(rank);
                let first = features.blocks.first()?.weights.rows(0, rank).into_owned();
                Some((vec![by_rows(&first), by_rows(&weights)], features.expand(&weights, size)))
            }
            (Self::Turned(features, told, _), Form::Ranks { before: Some(before), after: Some(after) }) => {
                both((features, told), (before, after), (matrix, metric), shape)
            }
            (Self::Told(features, told), Form::Separate { multiplier }) => {
                Some(depthwise_first(features, told, multiplier, size))
            }
            (Self::Each(rows), Form::Mixed { multiplier }) => mixed_first(rows, multiplier, size),
            (Self::Blocks(all), form) => Some(all.iter().find(|split| split.form() == form)?.fit(matrix, shape)),
            (Self::Products(all), form) => {
                let products = all.iter().find(|products| products.form() == form)?;
                Some((products.stages(), products.whole()))
            }
            _ => None,
        }
    }
}

/// A kernel that spreads, with the channels that it makes at each of its places turned alike.
fn turned_at_each_place(spectrum: &Spectrum, matrix: &DMatrix<f64>, shape: &Shape, rank: usize) -> Weights {
    let (size, taps) = (matrix.ncols(), shape.taps());
    let basis = spectrum.basis.columns(0, rank.min(spectrum.basis.ncols())).into_owned();
    let mut core = DMatrix::zeros(rank * taps, size);
    let mut whole = DMatrix::zeros(matrix.nrows(), size);
    for tap in 0..taps {
        let rows: Vec<_> = (0..matrix.nrows() / taps).map(|row| row * taps + tap).collect();
        let inner = product(&basis.transpose(), &matrix.select_rows(&rows));
        let outer = product(&basis, &inner);
        inner.row_iter().enumerate().for_each(|(i, row)| core.set_row(i * taps + tap, &row));
        outer.row_iter().enumerate().for_each(|(i, row)| whole.set_row(i * taps + tap, &row));
    }
    // The weight of a ConvTranspose begins with the channels that are read.
    (vec![core.as_slice().to_vec(), by_rows(&basis)], whole)
}

/// Rounds of choosing what is mixed before the kernel for what is kept after it, and the other way around.
const SWEEPS: usize = 3;

/// Mixed before and after the kernel: of all that the features tell, the strongest directions (reduced-rank regression); then features
/// that tell most of these, and so on while that comes closer (alternating least squares).
fn both(
    (features, told): (&Features, &Told),
    (before, after): (usize, usize),
    (matrix, metric): (&DMatrix<f64>, &Metric),
    shape: &Shape,
) -> Option<Weights> {
    let fit = |features: &Features, told: &Told| {
        let own = told.crossed.rows(0, before * features.blocks.len()).into_owned();
        let turn = Spectrum::of(&own.transpose(), None)?.basis;
        let turn = turn.columns(0, after.min(turn.ncols())).into_owned();
        let energy = product(&own, &turn).norm_squared();
        let core = product(&turn.transpose(), &told.solve(before));
        let first = features.blocks.first()?.weights.rows(0, before).into_owned();
        let whole = features.expand(&product(&turn, &core), matrix.ncols());
        Some((energy, turn.clone(), (vec![by_rows(&first), by_rows(&core), by_rows(&turn)], whole)))
    };
    let (mut energy, mut turn, mut best) = fit(features, told)?;
    for _ in 0..SWEEPS {
        let kept = product(&turn, &product(&turn.transpose(), matrix));
        let Some(features) = self::before(&kept, metric, shape) else { break };
        let features = features.first(before);
        let Some(told) = Told::of(&features, matrix, metric) else { break };
        let Some((found, next, weights)) = fit(&features, &told).filter(|(found, ..)| *found > energy) else { break };
        (energy, turn, best) = (found, next, weights);
    }
    Some(best)
}

fn depthwise_first(features: &Features, told: &Told, multiplier: usize, size: usize) -> Weights {
    let weights = told.solve(multiplier);
    let kernels = features.blocks.iter().flat_map(|block| by_rows(&block.weights.rows(0, multiplier).into_owned()));
    // Features come kernel by kernel, the channels of a depthwise convolution channel by channel.
    let channels = features.blocks.len();
    let order: Vec<_> =
        (0..channels).flat_map(|channel| (0..multiplier).map(move |t| t * channels + channel)).collect();
    let mixing = by_rows(&weights.select_columns(&order));
    (vec![kernels.collect(), mixing], features.expand(&weights, size))
}

fn mixed_first(rows: &[(Features, Told)], multiplier: usize, size: usize) -> Option<Weights> {
    let (mut mixing, mut kernels) = (Vec::new(), Vec::new());
    let mut whole = DMatrix::zeros(rows.len(), size);
    for (row, (features, told)) in rows.iter().enumerate() {
        let weights = told.solve(multiplier);
        mixing.extend(by_rows(&features.blocks.first()?.weights.rows(0, multiplier).into_owned()));
        kernels.extend(by_rows(&weights));
        whole.set_row(row, &features.expand(&weights, size).row(0));
    }
    Some((vec![mixing, kernels], whole))
}

fn cumulated(values: impl Iterator<Item = f64>) -> Vec<f64> {
    values
        .scan(0.0, |sum, value| {
            *sum += value;
            Some(*sum)
        })
        .collect()
}

/// Up to so many rows, all eigenvectors of W·C·Wᵀ are less work than a root of C.
const SMALL: usize = 1024;

/// The spectrum of W·C·Wᵀ, up to `rank` where that is given and less work.
pub(super) fn spectrum(matrix: &DMatrix<f64>, metric: &Metric, rank: Option<usize>) -> Option<Spectrum> {
    let is_square_cheaper = matrix.nrows() <= matrix.ncols() && (rank.is_none() || matrix.nrows() <= SMALL);
    match metric {
        Metric::Identity => Spectrum::of(matrix, rank),
        Metric::Full(covariance) if !is_square_cheaper => {
            Spectrum::of(&product(matrix, &Cholesky::ridged(covariance, COLLINEAR)?.0.root()), rank)
        }
        _ => Spectrum::of_square(&product(&metric.times(matrix), &matrix.transpose())),
    }
}

/// What each pair of channels that a `ConvTranspose` makes has in common, summed over the places of its kernel.
fn of_channels(matrix: &DMatrix<f64>, metric: &Metric, shape: &Shape) -> DMatrix<f64> {
    let taps = shape.taps();
    let spread = metric.times(matrix);
    let mut sum = DMatrix::zeros(shape.makes, shape.makes);
    for tap in 0..taps {
        let rows: Vec<_> = (0..shape.makes).map(|channel| channel * taps + tap).collect();
        sum += product(&spread.select_rows(&rows), &matrix.select_rows(&rows).transpose());
    }
    sum
}

/// Features that mix channels alike at each place of the kernel.
fn before(matrix: &DMatrix<f64>, metric: &Metric, shape: &Shape) -> Option<Features> {
    let taps = shape.taps();
    let supports = (0..taps).map(|tap| (0..shape.reads).map(|channel| channel * taps + tap).collect());
    alike(matrix, metric, supports.collect())
}

/// Features that reach along the axis `first` of the kernel, alike at each place along the others.
fn spatial(matrix: &DMatrix<f64>, metric: &Metric, shape: &Shape, first: usize) -> Option<Features> {
    let (taps, extent) = (shape.taps(), shape.kernel[first]);
    let step: usize = shape.kernel[first + 1..].iter().product();
    let others = (0..taps).filter(|tap| (tap / step).is_multiple_of(extent));
    let support = |tap: usize| {
        (0..shape.reads).flat_map(|channel| (0..extent).map(move |i| channel * taps + tap + i * step)).collect()
    };
    alike(matrix, metric, others.map(support).collect())
}

/// Features that read each of `supports` alike.
fn alike(matrix: &DMatrix<f64>, metric: &Metric, supports: Vec<Vec<usize>>) -> Option<Features> {
    let parts: Vec<_> = supports.iter().map(|support| matrix.select_columns(support).transpose()).collect();
    let reads = crate::analysis::moments::side_by_side(parts.iter());
    let weights = encoders(&reads, metric.mean_block(&supports, matrix.ncols()).as_ref())?;
    let of_block = |support| Block { support, weights: weights.clone() };
    Some(Features::of_blocks(supports.into_iter().map(of_block).collect(), matrix.ncols()))
}

/// Kernels for each channel by itself.
fn separate(matrix: &DMatrix<f64>, metric: &Metric, shape: &Shape) -> Option<Features> {
    let taps = shape.taps();
    let block = |channel: usize| {
        let support: Vec<_> = (channel * taps..(channel + 1) * taps).collect();
        let reads = matrix.select_columns(&support).transpose();
        let spread = metric.mean_block(std::slice::from_ref(&support), matrix.ncols());
        // A channel that never varies has no kernel that tells more than another.
        let weights = encoders(&reads, spread.as_ref()).or_else(|| encoders(&reads, None))?;
        Some(Block { support, weights })
    };
    Some(Features::of_blocks((0..shape.reads).map(block).collect::<Option<_>>()?, matrix.ncols()))
}
