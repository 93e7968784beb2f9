//! Fitting a chain of layers that stands in the place of one, as that one would be fitted.

use nalgebra::{DMatrix, DVector};
use rayon::prelude::*;

use super::{Kept, NAME, Rows, System, eased, set_matrices};
use crate::{
    analysis::linear::Linear,
    factor::{Form, Metric, Shape, Target},
    ir::{Graph, NodeId},
    linalg::product,
};

/// Rounds of fitting a chain before a rectifier to what the rectifier lets through: each factors the layer anew.
const ROUNDS: usize = 2;

/// The layers that stand in the place of one.
pub(super) struct Chain {
    /// Their nodes, the first one first.
    pub(super) nodes: Vec<NodeId>,
    /// The layer as it was, which reads what the first one does and makes what the last one does.
    pub(super) whole: Linear,
    form: Form,
    shape: Shape,
}

/// The weights of the layers of a chain, what they make together of each group, and the bias of each.
type Chained = (Vec<Vec<f64>>, Vec<DMatrix<f64>>, Vec<DVector<f64>>);

impl Chain {
    /// The chain that ends in `last`, if it is still what it was made.
    pub(super) fn of(graph: &Graph, last: &Linear, kept: &Kept) -> Option<Self> {
        let factored = kept.factored.get(graph.name(last.node.out()))?;
        let (form, shape) = (factored.form, factored.shape.clone());
        let layouts = form.layouts(&shape);
        let mut nodes = vec![last.node];
        while nodes.len() < layouts.len() {
            let read = graph.operand(nodes[0], 0)?;
            graph.sole_use(read)?;
            Linear::of(graph, read.node)?;
            graph.operand(read.node, 2).is_none().then_some(())?;
            nodes.insert(0, read.node);
        }
        let is_alike = nodes.iter().zip(&layouts).all(|(&node, layout)| {
            let part = Linear::of(graph, node);
            let rows = if shape.spreads { 0 } else { layout.dims[0] };
            part.is_some_and(|part| {
                part.rows * part.groups == rows && part.columns == layout.dims[1..].iter().product::<usize>()
            })
        });
        let mut whole = factored.linear.clone();
        (whole.node, whole.weight, whole.input) = (last.node, last.weight, graph.operand(nodes[0], 0)?);
        is_alike.then_some(Self { nodes, whole, form, shape })
    }

    fn parts(&self, graph: &Graph) -> Option<Vec<Linear>> {
        self.nodes.iter().map(|&node| Linear::of(graph, node)).collect()
    }

    /// W of each group as the chain makes it.
    pub(super) fn matrices(&self, graph: &Graph) -> Option<Vec<DMatrix<f64>>> {
        let values = |part: Linear| {
            let matrices = part.matrices(&graph.constant(part.weight)?.f64s()?);
            Some(matrices.iter().flat_map(|matrix| matrix.transpose().as_slice().to_vec()).collect())
        };
        let stages: Vec<Vec<f64>> = self.parts(graph)?.into_iter().map(values).collect::<Option<_>>()?;
        Some(self.form.compose(&self.shape, &stages))
    }

    /// The chain closest to what is wanted of what it reads: the layer is fitted whole, and then factored in the metric of what
    /// it reads now.
    pub(super) fn fit(&self, rows: &Rows, old: &[DMatrix<f64>], rectified: Option<f64>) -> Option<Chained> {
        let count = self.whole.rows;
        let systems: Vec<_> = rows.x.par_iter().zip(old).map(|(x, old)| System::new(x, old)).collect::<Option<_>>()?;
        let metric = |system: &System| {
            let mut spread = system.covariance.clone();
            let Some((_, ridge)) = &system.factor else { return Metric::Identity };
            (0..spread.nrows()).for_each(|i| spread[(i, i)] += ridge);
            Metric::Full(spread)
        };
        let metrics: Vec<_> = systems.iter().map(metric).collect();
        let wanted: Vec<_> = (0..old.len()).map(|group| rows.of_group(group, count)).collect();
        let mut aims: Vec<DMatrix<f64>> = wanted.iter().map(|(wanted, _)| wanted.clone()).collect();
        let mut chained = None;
        for _ in 0..=if rectified.is_some() { ROUNDS } else { 0 } {
            let of_layer = |group: usize| match &wanted[group].1 {
                Some(partner) => &aims[group] - partner,
                None => aims[group].clone(),
            };
            let solved: Vec<_> = (0..old.len())
                .into_par_iter()
                .map(|group| systems[group].solve(&rows.x[group], &of_layer(group), &old[group]).0)
                .collect();
            let target = Target { matrices: solved, metrics: metrics.clone(), shape: self.shape.clone() };
            let fitted = self.form.family().prepare(&target, self.form.rank())?.fit(&target, self.form)?;
            let bias = |group: usize| {
                let mean = of_layer(group).column_sum() / rows.x[group].ncols() as f64;
                mean - &fitted.whole[group] * &systems[group].mean
            };
            let biases: Vec<DVector<f64>> = (0..old.len()).map(bias).collect();
            if let Some(limit) = rectified {
                let ease = |(group, aim): (usize, &mut DMatrix<f64>)| {
                    let mut made = product(&fitted.whole[group], &rows.x[group]);
                    made.column_iter_mut().for_each(|mut column| column += &biases[group]);
                    if let Some(partner) = &wanted[group].1 {
                        made += partner;
                    }
                    *aim = wanted[group].0.zip_map(&made, |wanted, made| eased(wanted, made, limit));
                };
                aims.par_iter_mut().enumerate().for_each(ease);
            }
            chained = Some((fitted.stages, fitted.whole, biases));
        }
        chained
    }

    /// Gives the layers of the chain other weights.
    pub(super) fn set(&self, graph: &mut Graph, stages: &[Vec<f64>]) -> Option<()> {
        for (part, values) in self.parts(graph)?.iter().zip(stages) {
            let size = part.rows * part.columns;
            let matrix = |values: &[f64]| DMatrix::from_row_slice(part.rows, part.columns, values);
            let matrices: Vec<_> = values.chunks_exact(size).map(matrix).collect();
            set_matrices(graph, part, &matrices, NAME)?;
        }
        Some(())
    }
}
