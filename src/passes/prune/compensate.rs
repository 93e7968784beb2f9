//! Having the weights that read removed channels make up for them.

use std::collections::{BTreeMap, BTreeSet};

use nalgebra::{DMatrix, DVector};

use crate::{
    analysis::{
        channels::{Channels, Role},
        linear::Linear,
        moments::{Table, together},
    },
    ir::{Graph, Inlet, NodeId, Outlet},
    linalg::{Cholesky, energy, product},
    refit::{Bias, set_matrices},
};

/// The layers that multiply by `weight`.
pub(super) fn readers_of(graph: &Graph, weight: Outlet) -> Vec<Linear> {
    let uses = graph.uses(weight).into_iter().filter(|(_, inlet)| *inlet == Inlet::Slot(1));
    uses.filter_map(|(node, _)| Linear::of(graph, node)).filter(|linear| linear.groups == 1).collect()
}

/// A weight, and what is known of what it reads.
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
    pub(super) ridge: f64,
    /// E[(x − μ)(x − μ)ᵀ] over other samples, where there are some.
    pub(super) check: Option<DMatrix<f64>>,
    /// Columns for each index along the axis that reads.
    taps: usize,
}

impl Statistic {
    /// Of `weight`, whose `axis` reads channels, by the moments of `table` and those of other samples; `None` where nothing is
    /// known.
    pub(super) fn of(graph: &Graph, weight: Outlet, axis: usize, (table, others): (&Table, &Table)) -> Option<Self> {
        let readers = readers_of(graph, weight);
        let first = readers.first()?;
        if readers.len() != graph.uses(weight).len() || axis == first.output_axis() {
            return None;
        }
        let moments = together(table, graph, &readers)?;
        let others = together(others, graph, &readers);
        let weight = first.matrices(&graph.constant(weight)?.f64s()?).into_iter().next()?;
        let covariance = if first.is_direct() { moments.covariance() } else { moments.second() };
        Some(Self {
            mean: if first.is_direct() { moments.mean() } else { DVector::zeros(first.columns) },
            zeros: &moments.zeros / moments.count as f64,
            energy: energy(&weight, &covariance),
            ridge: moments.ridge(),
            check: others.map(|others| {
                let drift = others.mean() - moments.mean();
                if first.is_direct() { others.covariance() + &drift * drift.transpose() } else { others.second() }
            }),
            taps: first.taps,
            covariance,
            weight,
        })
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
    pub(super) fn columns_of(&self, index: usize) -> impl Iterator<Item = usize> + use<> {
        index * self.taps..(index + 1) * self.taps
    }
}

/// What a layer is to compute once the channels are gone: its matrix, and what is added to its bias.
struct Change {
    node: NodeId,
    matrix: DMatrix<f64>,
    shift: DVector<f64>,
    /// The output channels that are left.
    rows: Vec<usize>,
}

/// What makes up for removed channels.
pub(super) struct Compensation(Vec<Change>);

impl Compensation {
    /// For the classes `doomed`, found before they go; by the biases alone where `bias_only` is set.
    pub(super) fn of(
        graph: &Graph,
        channels: &Channels,
        doomed: &BTreeSet<usize>,
        table: &Table,
        bias_only: bool,
    ) -> Self {
        let kept = |value: Outlet, axis: usize| -> (Vec<usize>, Vec<usize>) {
            let extent = channels.extent(value, axis).unwrap_or(0);
            let is_doomed = |&i: &usize| channels.class(value, axis, i).is_some_and(|class| doomed.contains(&class));
            (0..extent).partition(|i| !is_doomed(i))
        };
        let mut changes = BTreeMap::new();
        for side in channels.sides.iter().filter(|side| side.role == Role::Reads) {
            let (stay, go) = kept(side.weight, side.axis);
            if go.is_empty() || stay.is_empty() {
                continue;
            }
            let Some(statistic) = Statistic::of(graph, side.weight, side.axis, (table, &Table::new())) else {
                continue;
            };
            let columns = |indices: &[usize]| indices.iter().flat_map(|&i| statistic.columns_of(i)).collect::<Vec<_>>();
            let Some((matrix, shift)) = statistic.without(&columns(&stay), &columns(&go), bias_only) else { continue };
            for reader in readers_of(graph, side.weight) {
                let rows = if reader.is_direct() {
                    kept(side.weight, reader.output_axis()).0
                } else {
                    let taps = reader.rows / channels.extent(side.weight, 1).unwrap_or(1).max(1);
                    kept(side.weight, 1).0.into_iter().flat_map(|o| o * taps..(o + 1) * taps).collect()
                };
                let change = Change { node: reader.node, matrix: matrix.clone(), shift: shift.clone(), rows };
                changes.insert(reader.node, change);
            }
        }
        Self(changes.into_values().collect())
    }

    /// Makes the changes, once the channels are gone; says to how many layers.
    pub(super) fn apply(self, graph: &mut Graph, pass: &str) -> usize {
        let apply = |change: &Change| {
            let linear = Linear::of(graph, change.node)?;
            let bias = Bias::of(graph, &linear);
            let matrix = change.matrix.select_rows(&change.rows);
            if matrix.shape() != (linear.rows, linear.columns) {
                return None;
            }
            if linear.is_direct() {
                let mut values = bias.values(graph, &linear)?;
                for (value, &row) in values.iter_mut().zip(&change.rows) {
                    *value += change.shift[row];
                }
                set_matrices(graph, &linear, &[matrix], pass)?;
                bias.set(graph, &linear, &values, pass)
            } else {
                set_matrices(graph, &linear, &[matrix], pass)
            }
        };
        self.0.iter().filter_map(apply).count()
    }
}

impl Statistic {
    /// The weight on the columns `stay`, with what those predict of the columns `go`, and what is added to the bias: for
    /// `A = C_RK·(C_KK + λI)⁻¹`, `W'_K = W_K + W_R·A` and `Δb = W_R·(μ_R − A·μ_K)` (algorithms.md §2.5).
    fn without(&self, stay: &[usize], go: &[usize], bias_only: bool) -> Option<(DMatrix<f64>, DVector<f64>)> {
        let (kept, gone) = (self.weight.select_columns(stay), self.weight.select_columns(go));
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
