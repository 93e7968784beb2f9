//! Having the weights that read removed channels make up for them.

use std::collections::{BTreeMap, BTreeSet};

use nalgebra::{DMatrix, DVector};

use super::{Group, pair::Pair};
use crate::{
    analysis::{
        channels::{Channels, Role},
        linear::Linear,
        moments::{Table, together},
        shapes::Shapes,
    },
    ir::{Graph, NodeId, Outlet},
    linalg::{Cholesky, energy, product},
    refit::{Bias, set_matrices},
};

/// The layers that multiply by `weight`.
pub(super) fn readers_of(graph: &Graph, weight: Outlet) -> Vec<Linear> {
    let layers = graph.uses(weight).into_iter().flat_map(|(node, _)| Linear::within(graph, node));
    layers.filter(|linear| linear.weight == weight).collect()
}

/// The matrix of one group of a weight, and what is known of what it reads.
pub(super) struct Statistic {
    /// W, o×d.
    pub(super) weight: DMatrix<f64>,
    /// C of what is read, d×d; not centered where the layers can't have a bias for it.
    pub(super) covariance: DMatrix<f64>,
    pub(super) mean: DVector<f64>,
    /// The share of vectors in which each element is zero.
    pub(super) zeros: DVector<f64>,
    /// tr(W·C·Wᵀ).
    pub(super) energy: f64,
    /// That of this group among all groups of the weight.
    pub(super) share: f64,
    pub(super) ridge: f64,
    /// E[(x − μ)(x − μ)ᵀ] over other samples, where there are some.
    pub(super) check: Option<DMatrix<f64>>,
    linear: Linear,
    group: usize,
}

impl Statistic {
    /// Of each group of `weight`, whose `axis` reads channels, by the moments of `table` and those of other samples: of vectors
    /// of at most `size` elements, if there are such, else of those that are known; none where nothing is.
    pub(super) fn of(graph: &Graph, weight: Outlet, axis: usize, size: usize, tables: (&Table, &Table)) -> Vec<Self> {
        Self::find(graph, weight, axis, size, tables).unwrap_or_default()
    }

    fn find(
        graph: &Graph,
        weight: Outlet,
        axis: usize,
        size: usize,
        (table, others): (&Table, &Table),
    ) -> Option<Vec<Self>> {
        let readers = readers_of(graph, weight);
        if readers.len() != graph.uses(weight).len() || axis == readers.first()?.output_axis() {
            return None;
        }
        let by_pixels: Option<Vec<_>> = readers.iter().map(Linear::by_pixels).collect();
        let mut views = [readers, by_pixels.unwrap_or_default()];
        if views[0][0].columns > size {
            views.reverse();
        }
        let known = |readers: Vec<Linear>| Some((together(table, graph, &readers)?, readers));
        let (moments, readers) = views.into_iter().find_map(known)?;
        let first = &readers[0];
        let others = together(others, graph, &readers);
        let matrices = first.matrices(&graph.constant(weight)?.f64s()?);
        let of_group = |(group, weight): (usize, DMatrix<f64>)| {
            let (moments, others) = (&moments[group], others.as_ref().map(|others| &others[group]));
            let covariance = if first.is_direct() { moments.covariance() } else { moments.second() };
            Self {
                mean: if first.is_direct() { moments.mean() } else { DVector::zeros(first.columns) },
                zeros: &moments.zeros / moments.count as f64,
                energy: energy(&weight, &covariance),
                share: 1.0,
                ridge: moments.ridge(),
                check: others.map(|others| {
                    let drift = others.mean() - moments.mean();
                    if first.is_direct() { others.covariance() + &drift * drift.transpose() } else { others.second() }
                }),
                linear: first.clone(),
                group,
                covariance,
                weight,
            }
        };
        let mut groups: Vec<_> = matrices.into_iter().enumerate().map(of_group).collect();
        let whole: f64 = groups.iter().map(|group| group.energy).sum();
        for group in &mut groups {
            group.share = if whole > 0.0 { group.energy / whole } else { 0.0 };
        }
        Some(groups)
    }

    /// For each column, the sum of the absolute correlations of what is read and what is made.
    pub(super) fn correlations(&self) -> Vec<f64> {
        let crossed = product(&self.weight, &self.covariance);
        let made: Vec<f64> = (0..crossed.nrows()).map(|o| crossed.row(o).dot(&self.weight.row(o))).collect();
        let of_column = |j: usize| {
            let scale = |o: usize| (self.covariance[(j, j)] * made[o]).sqrt();
            let each = (0..made.len()).filter(|&o| scale(o) > 0.0).map(|o| (crossed[(o, j)] / scale(o)).abs());
            each.sum()
        };
        (0..crossed.ncols()).map(of_column).collect()
    }

    /// The columns of index `index` along the axis that reads.
    pub(super) fn columns_of(&self, index: usize) -> std::ops::Range<usize> {
        self.linear.columns_of(index, self.group)
    }
}

/// What a layer is to compute once the channels are gone: for each group that is left, its matrix and what is added to its
/// bias.
struct Change {
    node: NodeId,
    slot: u32,
    by_pixels: bool,
    groups: Vec<(DMatrix<f64>, DVector<f64>)>,
}

/// What makes up for removed channels.
pub(super) struct Compensation {
    changes: Vec<Change>,
    mixtures: Vec<Mixture>,
}

/// That a layer makes `matrix`·y where it made y.
struct Mixture {
    node: NodeId,
    slot: u32,
    /// What the layer makes, the axis of it along which channels stand, and the name of it.
    name: String,
    axis: usize,
    matrix: DMatrix<f64>,
}

impl Compensation {
    /// For the classes `doomed` of `groups`, found before they go; by the biases alone where `bias_only` is set.
    pub(super) fn of(
        place @ (graph, channels, _): (&Graph, &Channels, &Shapes),
        groups: &[Group],
        doomed: &BTreeSet<usize>,
        table: &Table,
        bias_only: bool,
    ) -> Self {
        let kept = |value: Outlet, axis: usize| -> (Vec<usize>, Vec<usize>) {
            let extent = channels.extent(value, axis).unwrap_or(0);
            let is_doomed = |&i: &usize| channels.classes(value, axis, i).iter().any(|class| doomed.contains(class));
            (0..extent).partition(|i| !is_doomed(i))
        };
        let mixture = |group: &Group| {
            let units: Vec<_> = (0..group.units.len()).filter(|&unit| !doomed.contains(&group.units[unit])).collect();
            if bias_only || units.len() == group.units.len() {
                return None;
            }
            let pair = Pair::of(place, group, table)?;
            let made = kept(pair.second.weight, pair.second.output_axis()).0;
            Mixture::of(graph, channels, &pair, &units, &made)
        };
        let mixtures = groups.iter().filter_map(mixture).collect();
        let mut changes = BTreeMap::new();
        for side in channels.sides.iter().filter(|side| side.role == Role::Reads) {
            let (stay, go) = kept(side.weight, side.axis);
            if go.is_empty() || stay.is_empty() {
                continue;
            }
            let statistics = Statistic::of(graph, side.weight, side.axis, usize::MAX, (table, &Table::new()));
            let Some(linear) = statistics.first().map(|statistic| &statistic.linear) else { continue };
            let made = kept(side.weight, linear.output_axis()).0;
            let part = |statistic: &Statistic| {
                let columns =
                    |indices: &[usize]| indices.iter().flat_map(|&i| statistic.columns_of(i)).collect::<Vec<_>>();
                let rows: Vec<_> = made.iter().flat_map(|&i| linear.rows_of(i, statistic.group)).collect();
                let (stay, go) = (columns(&stay), columns(&go));
                let is_left = !stay.is_empty() && !rows.is_empty();
                is_left.then(|| {
                    let (matrix, shift) = statistic.without(&stay, &go, bias_only)?;
                    Some((matrix.select_rows(&rows), shift.select_rows(&rows)))
                })
            };
            let Some(groups) = statistics.iter().filter_map(part).collect::<Option<Vec<_>>>() else { continue };
            for reader in readers_of(graph, side.weight) {
                let (node, slot) = (reader.node, reader.slot());
                let by_pixels = reader.columns != linear.columns;
                changes.insert((node, slot), Change { node, slot, by_pixels, groups: groups.clone() });
            }
        }
        Self { changes: changes.into_values().collect(), mixtures }
    }

    /// The values of whose channels the layers make mixtures, by name, the axis of the channels, and the matrix.
    pub(super) fn mixed(&self) -> impl Iterator<Item = (&str, usize, &DMatrix<f64>)> {
        self.mixtures.iter().map(|mixture| (mixture.name.as_str(), mixture.axis, &mixture.matrix))
    }

    /// Makes the changes, once the channels are gone; says to how many layers.
    pub(super) fn apply(self, graph: &mut Graph, pass: &str) -> usize {
        let apply = |change: Change| {
            let linear = Linear::within(graph, change.node).into_iter().find(|linear| linear.slot() == change.slot)?;
            let linear = if change.by_pixels { linear.by_pixels()? } else { linear };
            let (matrices, shifts): (Vec<_>, Vec<_>) = change.groups.into_iter().unzip();
            let shape = (linear.rows, linear.columns);
            if matrices.len() != linear.groups || matrices.iter().any(|matrix| matrix.shape() != shape) {
                return None;
            }
            if linear.is_direct() {
                let bias = Bias::of(graph, &linear);
                let mut values = bias.values(graph, &linear)?;
                for (value, shift) in values.iter_mut().zip(shifts.iter().flat_map(|shift| shift.iter())) {
                    *value += shift;
                }
                set_matrices(graph, &linear, &matrices, pass)?;
                bias.set(graph, &linear, &values, pass)
            } else {
                set_matrices(graph, &linear, &matrices, pass)
            }
        };
        let fitted = self.changes.into_iter().filter_map(apply).count();
        fitted + self.mixtures.into_iter().filter_map(|mixture| mixture.apply(graph, pass)).count()
    }
}

impl Mixture {
    /// For the `units` that are kept of each head, where the layer keeps the output channels `made`.
    fn of(graph: &Graph, channels: &Channels, pair: &Pair, units: &[usize], made: &[usize]) -> Option<Self> {
        let mut matrix = DMatrix::identity(made.len(), made.len());
        for head in &pair.heads {
            let places: Option<Vec<_>> = units.iter().map(|&u| made.binary_search(&head.places[u]).ok()).collect();
            // A head may go as a whole.
            let Some(places) = places else { continue };
            let mix = head.mix(units)?;
            for (i, &row) in places.iter().enumerate() {
                for (j, &column) in places.iter().enumerate() {
                    matrix[(row, column)] = mix[(i, j)];
                }
            }
        }
        let linear = &pair.second;
        let result = Bias::of(graph, linear).result(linear);
        let classes = |value: Outlet, axis: usize| channels.classes(value, axis, pair.heads[0].places[0]);
        let is_same = |&axis: &usize| classes(result, axis) == classes(linear.weight, linear.output_axis());
        let axis = channels.axes_of(result).find(is_same)?;
        let name = graph.name(result).to_owned();
        Some(Self { node: linear.node, slot: linear.slot(), name, axis, matrix })
    }

    fn apply(self, graph: &mut Graph, pass: &str) -> Option<()> {
        let linear = Linear::within(graph, self.node).into_iter().find(|linear| linear.slot() == self.slot)?;
        let matrix = linear.matrices(&graph.constant(linear.weight)?.f64s()?).pop()?;
        let bias = Bias::of(graph, &linear);
        let values = DVector::from_vec(bias.values(graph, &linear)?);
        (matrix.nrows() == self.matrix.ncols()).then_some(())?;
        set_matrices(graph, &linear, &[product(&self.matrix, &matrix)], pass)?;
        bias.set(graph, &linear, (&self.matrix * values).as_slice(), pass)
    }
}

impl Statistic {
    /// The weight on the columns `stay`, with what those predict of the columns `go`, and what is added to the bias: for
    /// `A = C_RK·(C_KK + λI)⁻¹`, `W'_K = W_K + W_R·A` and `Δb = W_R·(μ_R − A·μ_K)` (algorithms.md §2.5).
    fn without(&self, stay: &[usize], go: &[usize], bias_only: bool) -> Option<(DMatrix<f64>, DVector<f64>)> {
        let (kept, gone) = (self.weight.select_columns(stay), self.weight.select_columns(go));
        if go.is_empty() {
            return Some((kept, DVector::zeros(self.weight.nrows())));
        }
        let lost = &gone * self.mean.select_rows(go);
        if bias_only {
            return Some((kept, lost));
        }
        let part = |rows: &[usize]| self.covariance.select_rows(rows).select_columns(stay);
        let (factor, _) = Cholesky::ridged(&part(stay), self.ridge)?;
        let added = factor.solve_right(&product(&gone, &part(go)));
        let shift = lost - &added * self.mean.select_rows(stay);
        Some((kept + added, shift))
    }
}
