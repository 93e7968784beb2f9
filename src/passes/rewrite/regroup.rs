//! Writing layers in groups, and products with sums of Kronecker products, in the place of layers.

use super::{
    super::reorder::inverse,
    emit::{names, part},
};
use crate::{
    analysis::linear::Linear,
    factor::{Form, Layout, Orders, Shape},
    ir::{DType, Graph, NodeId, Op, Outlet, Tensor, Weight},
    refit::Bias,
};

/// What stands in the place of a layer.
pub(in crate::passes) struct Regrouped {
    /// The node whose result the layer's bias, if it has none inside, is added to.
    pub(super) node: NodeId,
    /// What only puts channels in another order.
    pub(in crate::passes) gathers: Vec<NodeId>,
}

/// Nodes in the place of a layer, each of which reads what the one before makes.
struct Writer<'a> {
    graph: &'a mut Graph,
    node: NodeId,
    whole: Op,
    name: String,
    label: String,
    /// The last one so far, which may be the one to stand in the layer's place.
    next: Option<(Op, Vec<Outlet>)>,
    read: Outlet,
}

impl<'a> Writer<'a> {
    fn new(graph: &'a mut Graph, linear: &Linear, pass: &str) -> Option<Self> {
        let (name, label) = names(graph, linear, pass);
        let (whole, read) = (graph.op(linear.node)?.clone(), graph.operand(linear.node, 0)?);
        Some(Self { graph, node: linear.node, whole, name, label, next: None, read })
    }

    /// Adds an operator on what was made so far and `constants`.
    fn then(&mut self, op: Op, constants: &[Outlet]) {
        let read = self.made();
        self.next = Some((op, [&[read], constants].concat()));
    }

    /// Adds a product of a constant by what was made so far.
    fn multiply_from_left(&mut self, constant: Outlet) {
        let read = self.made();
        self.next = Some((Op::new("MatMul"), vec![constant, read]));
    }

    /// What was made so far, as a value beside that of the layer.
    fn made(&mut self) -> Outlet {
        if let Some((op, operands)) = self.next.take() {
            let operands: Vec<_> = operands.into_iter().map(Some).collect();
            self.read = self.graph.add_op(op.named(&self.label), &operands, &[&self.name], self.node).out();
        }
        self.read
    }

    fn reshape(&mut self, dims: &[i64]) -> Option<()> {
        let dims = self.integers(dims)?;
        self.then(Op::new("Reshape"), &[dims]);
        Some(())
    }

    fn transpose(&mut self) {
        self.then(Op::new("Transpose").with_ints("perm", &[0, 2, 1]), &[]);
    }

    fn integers(&mut self, values: &[i64]) -> Option<Outlet> {
        let weight = Weight::dense(Tensor::integers(DType::Int64, &[values.len()], values)?);
        Some(self.graph.add_const(weight, &self.name))
    }

    /// Puts channels in another order.
    fn gather(&mut self, order: &[usize]) -> Option<()> {
        let indices = self.integers(&order.iter().map(|&channel| channel as i64).collect::<Vec<_>>())?;
        self.then(Op::new("Gather").with_int("axis", 1), &[indices]);
        Some(())
    }

    /// Writes a chain of layers that reads what was made so far, and goes on from there beside it; answers what the chain makes.
    fn chain(&mut self, layouts: &[Layout], weights: &[Outlet]) -> Option<Outlet> {
        let read = self.made();
        for (layout, &weight) in layouts.iter().zip(weights) {
            let op = if layout.along.is_empty() { Op::new("MatMul") } else { part(&self.whole, layout)? };
            self.then(op, &[weight]);
        }
        let made = self.made();
        self.read = read;
        Some(made)
    }

    /// Has the last one stand in the place of the layer.
    fn finish(&mut self) -> Option<()> {
        let (op, operands) = self.next.take()?;
        self.graph.replace_op(self.node, op.in_place_of(&self.whole), &operands);
        Some(())
    }
}

/// What a layer itself adds, and `lost` of what it makes, of which a share reaches each result; none where that is nothing.
fn bias(graph: &Graph, linear: &Linear, (lost, share): (Option<&[f64]>, f64)) -> Option<Vec<f64>> {
    let is_own = graph.op_of(linear.node, "MatMul").is_none();
    let mut values =
        if is_own { Bias::of(graph, linear).values(graph, linear)? } else { vec![0.0; linear.output_channels()] };
    for (value, lost) in values.iter_mut().zip(lost.unwrap_or_default().chunks(linear.spread)) {
        *value += lost.iter().sum::<f64>() * share;
    }
    Some(values)
}

fn is_moved(order: &[usize]) -> bool {
    order.iter().enumerate().any(|(place, &channel)| place != channel)
}

fn is_added(values: &[f64]) -> bool {
    values.iter().any(|&value| value != 0.0)
}

/// Has a layer in groups, with channels in `orders`, stand in the place of `linear`: of a product of rows, of which there are
/// `rank` axes, a convolution along the rows.
pub(super) fn group(
    graph: &mut Graph,
    linear: &Linear,
    (layouts, orders, weights): (&[Layout], &Orders, &[Outlet]),
    (rank, lost, share): (Option<usize>, Option<&[f64]>, f64),
    pass: &str,
) -> Option<Regrouped> {
    let values = bias(graph, linear, (lost, share))?;
    let values: Vec<_> = orders.makes.iter().map(|&channel| values[channel]).collect();
    let (layout, weight) = (layouts.first()?, *weights.first()?);
    let is_dense = layout.along.is_empty();
    let bias = format!("{}.{pass}.bias", graph.name(linear.weight));
    let mut writer = Writer::new(graph, linear, pass)?;
    let beside = Some(writer.chain(&layouts[1..], &weights[1..])?).filter(|_| layouts.len() > 1);
    let op = if is_dense {
        Op::new("Conv").with_ints("kernel_shape", &[1]).with_int("group", layout.groups as i64)
    } else {
        part(&writer.whole, layout)?
    };
    let mut constants = vec![weight];
    if is_added(&values) {
        let stored = writer.graph.weight(weight)?.plain(&[values.len()], &values);
        constants.push(writer.graph.add_const(stored.filter(|bias| bias.value().is_finite())?, &bias));
    }
    let mut gathers = Vec::new();
    if is_dense && rank == Some(2) {
        writer.reshape(&[1, -1, orders.reads.len() as i64])?;
    }
    // Channels are gathered where those of one place lie apart: where they lie side by side, that takes longer than the layer.
    if is_dense {
        writer.transpose();
    }
    if is_moved(&orders.reads) {
        writer.gather(&orders.reads)?;
        gathers.push(writer.made().node);
    }
    writer.then(op, &constants);
    let is_last = !is_dense && !is_moved(&orders.makes) && beside.is_none();
    let node = if is_last { linear.node } else { writer.made().node };
    if is_moved(&orders.makes) {
        writer.gather(&inverse(&orders.makes))?;
        gathers.push(if is_dense || beside.is_some() { writer.made().node } else { linear.node });
    }
    if is_dense {
        writer.transpose();
    }
    if is_dense && rank == Some(2) {
        writer.reshape(&[-1, orders.makes.len() as i64])?;
    }
    if let Some(beside) = beside {
        writer.then(Op::new("Add"), &[beside]);
    }
    writer.finish()?;
    Some(Regrouped { node, gathers })
}

/// Has products with the terms of a sum of Kronecker products stand in the place of a product of rows, of which there are `rank` axes.
pub(super) fn multiply(
    graph: &mut Graph,
    linear: &Linear,
    (form, shape, weights): (Form, &Shape, &[Outlet]),
    (rank, lost): (usize, Option<&[f64]>),
    pass: &str,
) -> Option<Regrouped> {
    let Form::Kronecker { columns, .. } = form else { return None };
    let values = bias(graph, linear, (lost, 1.0))?;
    let stored = graph.weight(linear.weight)?.clone();
    let mut writer = Writer::new(graph, linear, pass)?;
    let rows = vec![0; rank.checked_sub(1)?];
    writer.reshape(&[&rows[..], &[columns as i64, (shape.reads / columns) as i64]].concat())?;
    let arranged = writer.made();
    let mut sum = None;
    for term in weights.chunks_exact(2) {
        writer.read = arranged;
        writer.then(Op::new("MatMul"), &[term[0]]);
        writer.multiply_from_left(term[1]);
        let product = writer.made();
        if let Some(sum) = sum {
            writer.read = sum;
            writer.then(Op::new("Add"), &[product]);
        }
        sum = Some(writer.made());
    }
    writer.reshape(&[&rows[..], &[shape.makes as i64]].concat())?;
    let mut node = linear.node;
    if is_added(&values) {
        let bias = stored.plain(&[values.len()], &values).filter(|bias| bias.value().is_finite())?;
        let bias = writer.graph.add_const(bias, &format!("{}.bias", writer.name));
        node = writer.made().node;
        writer.then(Op::new("Add"), &[bias]);
    }
    writer.finish()?;
    Some(Regrouped { node, gathers: Vec::new() })
}
