//! What chains of each kind make of a layer at every strength, and fitting one of them.

use nalgebra::DMatrix;
use rayon::prelude::*;

use super::{
    Fitted, Form, Metric, Shape, Target,
    features::{Block, COLLINEAR, Features, Told, encoders},
};
use crate::linalg::{Cholesky, Spectrum, product};

/// A kind of chain, of any strength.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// [`Form::Ranks`] with what comes after the kernel.
    After,
    /// [`Form::Ranks`] with what comes before the kernel.
    Before,
    /// [`Form::Ranks`] with both.
    Both,
    /// [`Form::Spatial`].
    Spatial {
        /// The axis that comes first.
        first: usize,
    },
    /// [`Form::Separate`].
    Separate,
    /// [`Form::Mixed`].
    Mixed,
}

/// What is found out about a layer once for all members of a family.
#[derive(Debug)]
pub struct Prepared {
    family: Family,
    groups: Vec<Group>,
    /// tr(W·C·Wᵀ) of all groups.
    total: f64,
}

/// The same of a group of the layer.
#[derive(Debug)]
enum Group {
    Spectrum(Spectrum),
    Told(Features, Told),
    /// With the directions of what is made, the strongest first.
    Turned(Features, Told, DMatrix<f64>),
    /// For each channel that is made.
    Each(Vec<(Features, Told)>),
}

impl Family {
    /// Whether a layer of this `shape` can be replaced so.
    #[must_use]
    pub fn fits(self, shape: &Shape) -> bool {
        let taps = shape.taps();
        match self {
            Self::After => true,
            Self::Before => taps > 1,
            Self::Both => taps > 1 && !shape.spreads,
            Self::Spatial { first } => {
                let along = shape.kernel.get(first).copied().unwrap_or(1);
                !shape.spreads && along > 1 && taps > along
            }
            Self::Separate => !shape.spreads && taps > 1 && shape.reads > 1,
            // What is mixed first pays where fewer channels are made than read (algorithms.md §4.1).
            Self::Mixed => !shape.spreads && taps > 1 && shape.makes < shape.reads,
        }
    }

    /// Its member of this rank; of those with two, where both are that.
    #[must_use]
    pub fn member(self, rank: usize) -> Form {
        match self {
            Self::After => Form::Ranks { before: None, after: Some(rank) },
            Self::Before => Form::Ranks { before: Some(rank), after: None },
            Self::Both => Form::Ranks { before: Some(rank), after: Some(rank) },
            Self::Spatial { first } => Form::Spatial { rank, first },
            Self::Separate => Form::Separate { multiplier: rank },
            Self::Mixed => Form::Mixed { multiplier: rank },
        }
    }

    /// Finds out what there is to know about `target`; of matrices alone, up to `rank` where that is given and less work.
    #[must_use]
    pub fn prepare(self, target: &Target, rank: Option<usize>) -> Option<Prepared> {
        let shape = &target.shape;
        let of_group = |(matrix, metric): (&DMatrix<f64>, &Metric)| {
            let told = |features: Features| {
                let told = Told::of(&features, matrix, metric)?;
                Some(Group::Told(features, told))
            };
            Some(match self {
                Self::After if shape.spreads => {
                    Group::Spectrum(Spectrum::of_square(&of_channels(matrix, metric, shape))?)
                }
                Self::Before if shape.spreads => Group::Spectrum(spectrum(matrix, metric, rank)?),
                Self::After => Group::Spectrum(spectrum(matrix, metric, rank)?),
                Self::Before => told(before(matrix, metric, shape)?)?,
                Self::Both => {
                    let features = before(matrix, metric, shape)?;
                    let told = Told::of(&features, matrix, metric)?;
                    let turn = spectrum(matrix, metric, None)?.basis;
                    Group::Turned(features, told, turn)
                }
                Self::Spatial { first } => told(spatial(matrix, metric, shape, first)?)?,
                Self::Separate => told(separate(matrix, metric, shape)?)?,
                Self::Mixed => {
                    let rows: Vec<_> = (0..matrix.nrows()).collect();
                    let each = |&row: &usize| {
                        let row = matrix.rows(row, 1).into_owned();
                        let features = before(&row, metric, shape)?;
                        let told = Told::of(&features, &row, metric)?;
                        Some((features, told))
                    };
                    Group::Each(rows.par_iter().map(each).collect::<Option<_>>()?)
                }
            })
        };
        let groups = target.matrices.iter().zip(&target.metrics).map(of_group).collect::<Option<_>>()?;
        Some(Prepared { family: self, groups, total: target.energy() })
    }
}

impl Prepared {
    /// The members of the family with their relative squared errors, weakest saving last; of those with two ranks, the ones
    /// where both are multiples of `step`.
    #[must_use]
    pub fn curve(&self, step: usize) -> Vec<(Form, f64)> {
        if self.family == Family::Both {
            return self.surface(step);
        }
        let energies = |group: &Group| match group {
            Group::Spectrum(spectrum) => cumulated(spectrum.energies.iter().copied()),
            Group::Told(_, told) | Group::Turned(_, told, _) => told.energies(),
            Group::Each(rows) => {
                let all: Vec<_> = rows.iter().map(|(_, told)| told.energies()).collect();
                let count = all.iter().map(Vec::len).min().unwrap_or(0);
                (0..count).map(|i| all.iter().map(|energies| energies[i]).sum()).collect()
            }
        };
        let all: Vec<Vec<f64>> = self.groups.iter().map(energies).collect();
        let count = all.iter().map(Vec::len).min().unwrap_or(0);
        let error = |i: usize| self.lost(all.iter().map(|energies| energies[i]).sum());
        (0..count).map(|i| (self.family.member(i + 1), error(i))).collect()
    }

    /// The relative squared error of one member.
    #[must_use]
    pub fn error(&self, form: Form) -> f64 {
        let errors = self.curve(1);
        errors.into_iter().find(|(member, _)| *member == form).map_or(f64::INFINITY, |(_, error)| error)
    }

    /// What is lost where so much energy is told.
    fn lost(&self, told: f64) -> f64 {
        if self.total > 0.0 { (1.0 - told / self.total).max(0.0) } else { 0.0 }
    }

    fn surface(&self, step: usize) -> Vec<(Form, f64)> {
        let mut sum: Option<DMatrix<f64>> = None;
        for group in &self.groups {
            let Group::Turned(features, told, turn) = group else { return Vec::new() };
            let (turned, blocks) = (product(&told.crossed, turn), features.blocks.len());
            let mut table = DMatrix::zeros(features.rows(), turned.ncols());
            for (i, row) in turned.row_iter().enumerate() {
                for (j, value) in row.iter().enumerate() {
                    table[(i / blocks, j)] += value * value;
                }
            }
            for i in 0..table.nrows() {
                for j in 0..table.ncols() {
                    let above = if i > 0 { table[(i - 1, j)] } else { 0.0 };
                    let left = if j > 0 { table[(i, j - 1)] } else { 0.0 };
                    let corner = if i > 0 && j > 0 { table[(i - 1, j - 1)] } else { 0.0 };
                    table[(i, j)] += above + left - corner;
                }
            }
            sum = Some(match sum {
                Some(sum) => sum + table,
                None => table,
            });
        }
        let Some(table) = sum else { return Vec::new() };
        let ranks = |count: usize| (step..=count).step_by(step);
        let member = |(before, after): (usize, usize)| {
            let form = Form::Ranks { before: Some(before), after: Some(after) };
            (form, self.lost(table[(before - 1, after - 1)]))
        };
        // Of so many features, no more directions are told.
        let blocks = self.groups.iter().map(Group::blocks).min().unwrap_or(1);
        let pairs = ranks(table.nrows()).flat_map(|i| ranks(table.ncols()).map(move |j| (i, j)));
        pairs.filter(|(before, after)| *after <= before * blocks).map(member).collect()
    }

    /// The chain of this form that is closest to `target`, which all this was found out about; `None` where there is none.
    #[must_use]
    pub fn fit(&self, target: &Target, form: Form) -> Option<Fitted> {
        let layouts = form.layouts(&target.shape);
        let mut stages: Vec<Vec<f64>> = vec![Vec::new(); layouts.len()];
        let mut whole = Vec::new();
        for (group, matrix) in self.groups.iter().zip(&target.matrices) {
            let (weights, made) = group.fit(matrix, &target.shape, form)?;
            stages.iter_mut().zip(weights).for_each(|(stage, own)| stage.extend(own));
            whole.push(made);
        }
        let fits = stages.iter().zip(&layouts).all(|(stage, layout)| stage.len() == layout.elements());
        let is_finite = stages.iter().flatten().all(|value| value.is_finite());
        (fits && is_finite).then_some(Fitted { stages, whole })
    }
}

impl Group {
    /// Features in a row.
    fn blocks(&self) -> usize {
        match self {
            Self::Told(features, _) | Self::Turned(features, ..) => features.blocks.len(),
            Self::Spectrum(_) | Self::Each(_) => 1,
        }
    }

    /// The weights of the layers of a chain, and what they make together.
    fn fit(&self, matrix: &DMatrix<f64>, shape: &Shape, form: Form) -> Option<(Vec<Vec<f64>>, DMatrix<f64>)> {
        let (size, taps) = (matrix.ncols(), shape.taps());
        match (self, form) {
            (Self::Spectrum(spectrum), Form::Ranks { after: Some(rank), before: None }) if shape.spreads => {
                let basis = spectrum.basis.columns(0, rank.min(spectrum.basis.ncols())).into_owned();
                // Rows are (channel, kernel): the channels of each tap are turned alike.
                let of_tap = |matrix: &DMatrix<f64>, tap: usize| {
                    matrix.select_rows(&(0..matrix.nrows() / taps).map(|row| row * taps + tap).collect::<Vec<_>>())
                };
                let mut core = DMatrix::zeros(rank * taps, size);
                let mut whole = DMatrix::zeros(matrix.nrows(), size);
                for tap in 0..taps {
                    let inner = product(&basis.transpose(), &of_tap(matrix, tap));
                    let outer = product(&basis, &inner);
                    inner.row_iter().enumerate().for_each(|(i, row)| core.set_row(i * taps + tap, &row));
                    outer.row_iter().enumerate().for_each(|(i, row)| whole.set_row(i * taps + tap, &row));
                }
                // The weight of a ConvTranspose begins with the channels that are read.
                Some((vec![core.as_slice().to_vec(), flat(&basis)], whole))
            }
            (Self::Spectrum(spectrum), Form::Ranks { before: Some(rank), after: None }) => {
                let (left, right) = spectrum.factors(matrix, rank.min(spectrum.basis.ncols()));
                Some((vec![flat(&right), left.as_slice().to_vec()], product(&left, &right)))
            }
            (Self::Spectrum(spectrum), Form::Ranks { after: Some(rank), before: None }) => {
                let (left, right) = spectrum.factors(matrix, rank.min(spectrum.basis.ncols()));
                Some((vec![flat(&right), flat(&left)], product(&left, &right)))
            }
            (
                Self::Told(features, told),
                Form::Ranks { before: Some(rank), after: None } | Form::Spatial { rank, .. },
            ) => {
                let weights = told.solve(rank);
                let first = features.blocks.first()?.weights.rows(0, rank).into_owned();
                Some((vec![flat(&first), flat(&weights)], features.expand(&weights, size)))
            }
            (Self::Turned(features, told, _), Form::Ranks { before: Some(before), after: Some(after) }) => {
                // Of all that these features tell, the strongest directions (reduced-rank regression).
                let own = told.crossed.rows(0, before * features.blocks.len()).into_owned();
                let turn = Spectrum::of(&own.transpose(), None)?.basis;
                let turn = turn.columns(0, after.min(turn.ncols())).into_owned();
                let core = product(&turn.transpose(), &told.solve(before));
                let first = features.blocks.first()?.weights.rows(0, before).into_owned();
                let whole = features.expand(&product(&turn, &core), size);
                Some((vec![flat(&first), flat(&core), flat(&turn)], whole))
            }
            (Self::Told(features, told), Form::Separate { multiplier }) => {
                let weights = told.solve(multiplier);
                let kernels =
                    features.blocks.iter().flat_map(|block| flat(&block.weights.rows(0, multiplier).into_owned()));
                // Features come kernel by kernel, the channels of a depthwise convolution channel by channel.
                let channels = features.blocks.len();
                let order: Vec<_> =
                    (0..channels).flat_map(|channel| (0..multiplier).map(move |t| t * channels + channel)).collect();
                let mixing = flat(&weights.select_columns(&order));
                Some((vec![kernels.collect(), mixing], features.expand(&weights, size)))
            }
            (Self::Each(rows), Form::Mixed { multiplier }) => {
                let (mut mixing, mut kernels) = (Vec::new(), Vec::new());
                let mut whole = DMatrix::zeros(matrix.nrows(), size);
                for (row, (features, told)) in rows.iter().enumerate() {
                    let weights = told.solve(multiplier);
                    mixing.extend(flat(&features.blocks.first()?.weights.rows(0, multiplier).into_owned()));
                    kernels.extend(flat(&weights));
                    whole.set_row(row, &features.expand(&weights, size).row(0));
                }
                Some((vec![mixing, kernels], whole))
            }
            _ => None,
        }
    }
}

/// The elements row by row.
fn flat(matrix: &DMatrix<f64>) -> Vec<f64> {
    matrix.transpose().as_slice().to_vec()
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
fn spectrum(matrix: &DMatrix<f64>, metric: &Metric, rank: Option<usize>) -> Option<Spectrum> {
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
    Some(Features { blocks: supports.into_iter().map(|support| Block { support, weights: weights.clone() }).collect() })
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
    Some(Features { blocks: (0..shape.reads).map(block).collect::<Option<_>>()? })
}
