//! What makes a channel matter.

use std::collections::BTreeMap;

use nalgebra::{DMatrix, DVectorView};
use rand_core::{Rng, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;
use xxhash_rust::xxh3::Xxh3;

use super::{
    Group,
    compensate::{Statistic, readers_of},
    curve::{Curve, Reader, lasso},
    pair::{Elimination, Pair},
    place,
};
use crate::{
    analysis::{
        channels::{Channels, Role, Side},
        moments::{MAX_CHOSEN_BY, Table},
        shapes::Shapes,
    },
    ir::{Graph, tensor::strides},
    linalg::product,
};

/// What makes a channel matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Score {
    /// The sum of the absolute weights that make it (Li 2017).
    L1,
    /// The Euclidean norm of the weights that make it (Li 2017).
    L2,
    /// The mean absolute weight that reads it (T. He 2014).
    Onorm,
    /// How often it is not zero (Hu 2016); needs samples.
    Apoz,
    /// Its variance times the squared norm of the weights that read it; needs samples.
    Variance,
    /// How much what is made of it correlates with it (Sun 2016); needs samples.
    Corr,
    /// How far the weights that make it are from those of the others (Yang He 2019).
    Fpgm,
    /// How long the LASSO over what is read keeps it (Yihui He 2017); needs samples.
    Lasso,
    /// The error that removing it makes when what is left makes up for it (Hassibi & Stork 1993; Kurtic 2023); needs samples.
    Obs,
    /// A seeded draw: what any other score has to beat.
    Random,
}

impl Score {
    /// What the curve of `group` depends on, as a hash.
    pub(super) fn key(self, graph: &Graph, channels: &Channels, group: &Group, table: &Table) -> u64 {
        let mut hasher = Xxh3::new();
        hasher.update(format!("{self:?} {}", table.len()).as_bytes());
        let places = group.places();
        for side in &group.sides {
            let weight = graph.constant(side.weight).map_or(0, crate::ir::Tensor::hash);
            hasher.update(format!("{weight} {} {:?}", side.axis, side.role).as_bytes());
            for index in 0..channels.extent(side.weight, side.axis).unwrap_or(0) {
                let unit = place(&places, channels, side, index);
                hasher.update(&unit.map_or(u64::MAX, |unit| unit as u64).to_le_bytes());
            }
            for reader in readers_of(graph, side.weight) {
                hasher.update(reader.source(graph).as_bytes());
            }
        }
        hasher.digest()
    }

    /// The order in which the units of `group` go by this score, and the error that this makes.
    pub(super) fn curve(
        self,
        place @ (graph, channels, _): (&Graph, &Channels, &Shapes),
        group: &Group,
        tables: (&Table, &Table),
    ) -> Curve {
        let statistics = statistics(graph, channels, group, tables);
        let reader = |(statistic, columns): &(Statistic, Vec<Vec<usize>>)| {
            Reader::new(
                statistic.weight.clone(),
                &statistic.covariance,
                statistic.ridge,
                columns.clone(),
                statistic.check.clone(),
            )
            .map(|reader| reader.of_share(statistic.share))
        };
        let readers: Vec<_> = statistics.iter().filter_map(reader).collect();
        let scores = || self.scores(graph, channels, group, &statistics);
        let products = Pair::of(place, group, tables.0).as_ref().and_then(Elimination::of);
        match self {
            _ if readers.is_empty() && products.is_none() => Curve::blind(&scores()),
            Self::Obs => Curve::greedy(readers, products, group.units.len()),
            _ => Curve::scored(readers, products, &scores()),
        }
    }

    /// The score of each unit; that of OBS where nothing is known of what is read, so that norms are all there is.
    fn scores(
        self,
        graph: &Graph,
        channels: &Channels,
        group: &Group,
        statistics: &[(Statistic, Vec<Vec<usize>>)],
    ) -> Vec<f64> {
        let count = group.units.len();
        // The sum over all columns of a unit of what each weight gives its columns.
        let over_readers = |of_columns: &dyn Fn(&Statistic) -> Vec<f64>| {
            let mut scores = vec![0.0; count];
            for (statistic, columns) in statistics {
                let each = of_columns(statistic);
                for (score, columns) in scores.iter_mut().zip(columns) {
                    *score += columns.iter().map(|&j| each[j]).sum::<f64>();
                }
            }
            scores
        };
        match self {
            Self::L1 => norms(graph, channels, group, Role::Makes, |sum, _| sum, f64::abs),
            Self::L2 | Self::Obs => norms(graph, channels, group, Role::Makes, |sum, _| sum.sqrt(), |v| v * v),
            Self::Onorm => norms(graph, channels, group, Role::Reads, |sum, each| sum / each, f64::abs),
            Self::Fpgm => distances(graph, channels, group),
            Self::Random => {
                let mut random = Xoshiro256PlusPlus::seed_from_u64(
                    group.units.iter().fold(1, |s: u64, &u| s.wrapping_mul(31).wrapping_add(u as u64)),
                );
                (0..count).map(|_| random.next_u64() as f64).collect()
            }
            Self::Apoz => over_readers(&|statistic| statistic.zeros.iter().map(|zeros| 1.0 - zeros).collect()),
            Self::Variance => over_readers(&|statistic| {
                let of_column = |(j, column): (usize, DVectorView<'_, f64>)| {
                    statistic.covariance[(j, j)] * column.norm_squared() / statistic.energy.max(f64::MIN_POSITIVE)
                };
                statistic.weight.column_iter().enumerate().map(of_column).collect()
            }),
            Self::Corr => over_readers(&Statistic::correlations),
            Self::Lasso => {
                let mut gram = DMatrix::zeros(count, count);
                for (statistic, columns) in statistics {
                    let made = statistic.weight.transpose() * &statistic.weight;
                    for i in 0..count {
                        for k in 0..count {
                            let pairs = columns[i].iter().flat_map(|&a| columns[k].iter().map(move |&b| (a, b)));
                            gram[(i, k)] +=
                                pairs.map(|(a, b)| made[(a, b)] * statistic.covariance[(a, b)]).sum::<f64>()
                                    / statistic.energy.max(f64::MIN_POSITIVE);
                        }
                    }
                }
                lasso(&gram)
            }
        }
    }
}

/// What is known of the weights that read `group`, and the columns by which each reads each unit.
fn statistics(
    graph: &Graph,
    channels: &Channels,
    group: &Group,
    tables: (&Table, &Table),
) -> Vec<(Statistic, Vec<Vec<usize>>)> {
    let places = group.places();
    let of_side = |side: &Side| {
        let columns = |statistic: Statistic| {
            let mut columns = vec![Vec::new(); group.units.len()];
            for index in 0..channels.extent(side.weight, side.axis).unwrap_or(0) {
                if let Some(unit) = place(&places, channels, side, index) {
                    columns[unit].extend(statistic.columns_of(index));
                }
            }
            (statistic, columns)
        };
        Statistic::of(graph, side.weight, side.axis, MAX_CHOSEN_BY, tables).into_iter().map(columns).collect::<Vec<_>>()
    };
    group.of_role(Role::Reads).flat_map(of_side).collect()
}

/// For each unit, what `whole` makes of the sum of `part` over the weights of a role, added up over these weights.
fn norms(
    graph: &Graph,
    channels: &Channels,
    group: &Group,
    role: Role,
    whole: impl Fn(f64, f64) -> f64,
    part: impl Fn(f64) -> f64,
) -> Vec<f64> {
    let places = group.places();
    let mut scores = vec![0.0; group.units.len()];
    for side in group.of_role(role) {
        let Some(weight) = graph.constant(side.weight) else { continue };
        let Some(values) = weight.f64s() else { continue };
        let (step, extent) = (strides(weight.dims())[side.axis], weight.dims()[side.axis]);
        let mut sums = vec![0.0; extent];
        for (i, value) in values.iter().enumerate() {
            sums[i / step % extent] += part(*value);
        }
        let each = (values.len() / extent.max(1)).max(1) as f64;
        for (i, sum) in sums.into_iter().enumerate() {
            if let Some(unit) = place(&places, channels, side, i) {
                scores[unit] += whole(sum, each);
            }
        }
    }
    scores
}

/// For each unit, the sum of its distances to all others, in the space of the weights that make them (Yang He 2019).
fn distances(graph: &Graph, channels: &Channels, group: &Group) -> Vec<f64> {
    let places: BTreeMap<usize, usize> = group.places();
    let count = group.units.len();
    let mut squares = DMatrix::zeros(count, count);
    for side in group.of_role(Role::Makes) {
        let Some(weight) = graph.constant(side.weight) else { continue };
        let Some(values) = weight.f64s() else { continue };
        let (step, extent) = (strides(weight.dims())[side.axis], weight.dims()[side.axis]);
        // A unit may be made by several slices, as by those of all gates of a recurrent layer.
        let units: Vec<_> = (0..extent).map(|index| place(&places, channels, side, index)).collect();
        let most = (0..count).map(|unit| units.iter().filter(|&&other| other == Some(unit)).count()).max().unwrap_or(0);
        let mut rows = DMatrix::zeros(count, most * (values.len() / extent.max(1)));
        let mut filled = vec![0; count];
        for (i, value) in values.iter().enumerate() {
            if let Some(unit) = units[i / step % extent] {
                rows[(unit, filled[unit])] = *value;
                filled[unit] += 1;
            }
        }
        let gram = product(&rows, &rows.transpose());
        for i in 0..count {
            for j in 0..count {
                squares[(i, j)] += gram[(i, i)] + gram[(j, j)] - 2.0 * gram[(i, j)];
            }
        }
    }
    squares.row_iter().map(|row| row.iter().map(|square: &f64| square.max(0.0).sqrt()).sum()).collect()
}
