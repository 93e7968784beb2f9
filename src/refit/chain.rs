//! Fitting a chain of layers that stands in the place of one, as that one would be fitted.

use nalgebra::{DMatrix, DVector};
use rayon::prelude::*;

use super::{Kept, NAME, Rows, System, eased, set_matrices};
use crate::{
    analysis::linear::Linear,
    factor::{Form, Layout, Shape, Target},
    ir::{Graph, NodeId, Outlet},
    linalg::{by_rows, product, transposed},
};

/// Rounds of fitting a chain before a rectifier to what the rectifier lets through: each factors the layer anew.
const ROUNDS: usize = 2;

/// The layers that stand in the place of one.
pub(super) struct Chain {
    /// The node that reads what the layer did.
    pub(super) first: NodeId,
    /// The layer as it was, which reads what the first one does and makes what the last one does.
    pub(super) whole: Linear,
    /// The weights of the layers, with the node and the slot that reads each.
    weights: Vec<(Outlet, NodeId, u32)>,
    form: Form,
    shape: Shape,
}

/// The weights of the layers of a chain, what they make together of each group, and the bias of each.
type Chained = (Vec<Vec<f64>>, Vec<DMatrix<f64>>, Vec<DVector<f64>>);

impl Chain {
    /// The chain that ends in `last`, if it is still what it was made.
    pub(super) fn of(graph: &Graph, last: NodeId, kept: &Kept) -> Option<Self> {
        let factored = kept.factored.get(graph.name(last.out()))?;
        let (form, shape) = (factored.form, factored.shape.clone());
        let weights = match form {
            Form::Kronecker { terms, .. } => products(graph, last, terms)?,
            _ => layers(graph, last, &form.layouts(&shape), &shape)?,
        };
        let first = match form {
            Form::Kronecker { .. } => graph.operand(weights[0].1, 0)?.node,
            _ => weights[0].1,
        };
        let is_alone = |&(weight, node, slot): &(Outlet, NodeId, u32)| graph.sole_use(weight) == Some((node, slot));
        let mut whole = factored.linear.clone();
        (whole.node, whole.weight, whole.input) = (last, weights.last()?.0, graph.operand(first, 0)?);
        // What was made codes since is fitted layer by layer.
        let is_plain = |(weight, ..): &(Outlet, NodeId, u32)| graph.weight(*weight).is_some_and(|w| !w.is_stored());
        (weights.iter().all(is_alone) && weights.iter().all(is_plain)).then_some(Self {
            first,
            whole,
            weights,
            form,
            shape,
        })
    }

    /// Whether the weight of stage `i` is stored with its columns as rows.
    fn is_turned(&self, i: usize) -> bool {
        matches!(self.form, Form::Kronecker { .. }) && i.is_multiple_of(2)
    }

    /// W of each group as the chain makes it.
    pub(super) fn matrices(&self, graph: &Graph) -> Option<Vec<DMatrix<f64>>> {
        let values = |(i, &(weight, node, _)): (usize, &(Outlet, NodeId, u32))| {
            let tensor = graph.constant(weight)?;
            let values = tensor.f64s()?;
            if let Form::Kronecker { .. } = self.form {
                let width = *tensor.dims().last()?;
                return Some(if self.is_turned(i) { transposed(&values, width) } else { values });
            }
            let matrices = Linear::of(graph, node)?.matrices(&values);
            Some(matrices.iter().map(by_rows).collect::<Vec<_>>().concat())
        };
        let stages: Vec<Vec<f64>> = self.weights.iter().enumerate().map(values).collect::<Option<_>>()?;
        Some(self.form.compose(&self.shape, &stages))
    }

    /// The chain closest to what is wanted of what it reads: the layer is fitted whole, and then factored in the metric of what
    /// it reads now.
    pub(super) fn fit(&self, rows: &Rows, old: &[DMatrix<f64>], rectified: Option<f64>) -> Option<Chained> {
        let count = self.whole.rows;
        let systems: Vec<_> = rows.x.par_iter().zip(old).map(|(x, old)| System::new(x, old)).collect::<Option<_>>()?;
        let metrics: Vec<_> = systems.iter().map(System::metric).collect();
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
        for (i, (&(weight, node, slot), values)) in self.weights.iter().zip(stages).enumerate() {
            let linear = Linear::of(graph, node);
            let Some(part) = linear.filter(|_| !matches!(self.form, Form::Kronecker { .. })) else {
                let stored = graph.weight(weight)?;
                let dims = stored.value().dims().to_vec();
                let values = if self.is_turned(i) { transposed(values, dims[0]) } else { values.clone() };
                let new = stored.fit(&dims, &values).filter(|weight| weight.value().is_finite())?;
                let new = graph.add_const(new, &format!("{}.{NAME}", graph.name(weight)));
                graph.exchange_operand(node, slot, Some(new));
                continue;
            };
            let matrix = |values: &[f64]| DMatrix::from_row_slice(part.rows, part.columns, values);
            let matrices: Vec<_> = values.chunks_exact(part.rows * part.columns).map(matrix).collect();
            set_matrices(graph, &part, &matrices, NAME)?;
        }
        Some(())
    }
}

/// The weights of layers of which each reads what the one before makes, up to `last`.
fn layers(graph: &Graph, last: NodeId, layouts: &[Layout], shape: &Shape) -> Option<Vec<(Outlet, NodeId, u32)>> {
    let mut nodes = vec![last];
    while nodes.len() < layouts.len() {
        let read = graph.operand(nodes[0], 0)?;
        graph.sole_use(read)?;
        Linear::of(graph, read.node)?;
        graph.operand(read.node, 2).is_none().then_some(())?;
        nodes.insert(0, read.node);
    }
    let of_layer = |(&node, layout): (&NodeId, &Layout)| {
        let part = Linear::of(graph, node)?;
        let rows = if shape.spreads { 0 } else { layout.dims[0] };
        let is_alike = part.rows * part.groups == rows && part.columns == layout.dims[1..].iter().product::<usize>();
        is_alike.then_some((part.weight, node, part.slot()))
    };
    nodes.iter().zip(layouts).map(of_layer).collect()
}

/// B and A of each term of a sum of so many Kronecker products that `last` makes rows of.
fn products(graph: &Graph, last: NodeId, terms: usize) -> Option<Vec<(Outlet, NodeId, u32)>> {
    let alone = |node: NodeId, slot: u32, kind: &str| {
        let value = graph.operand(node, slot)?;
        graph.sole_use(value)?;
        graph.op_of(value.node, kind).map(|_| value.node)
    };
    let (mut weights, mut sum) = (Vec::new(), (last, 0));
    graph.op_of(last, "Reshape")?;
    for term in (0..terms).rev() {
        let left = if term > 0 {
            let add = alone(sum.0, sum.1, "Add")?;
            sum = (add, 0);
            alone(add, 1, "MatMul")?
        } else {
            alone(sum.0, sum.1, "MatMul")?
        };
        let right = alone(left, 1, "MatMul")?;
        weights.extend([(graph.operand(left, 0)?, left, 0), (graph.operand(right, 1)?, right, 1)]);
    }
    weights.reverse();
    graph.op_of(graph.operand(weights[0].1, 0)?.node, "Reshape")?;
    weights.iter().all(|(weight, ..)| graph.constant(*weight).is_some()).then_some(weights)
}
