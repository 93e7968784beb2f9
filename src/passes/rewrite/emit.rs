//! Writing the nodes of a chain in the place of a layer.

use super::{
    dense,
    regroup::{self, Regrouped},
    site::{Readers, Site},
};
use crate::{
    analysis::linear::Linear,
    factor::{Form, Layout, Orders},
    ir::{Graph, Op, Outlet, Weight},
    linalg::transposed,
    refit::Bias,
};

/// A chain that stands in place of each layer of a site.
#[derive(Debug)]
pub(in crate::passes) struct Replacement {
    /// The weight of each of its layers, laid out as the form says.
    pub(in crate::passes) stages: Vec<Vec<f64>>,
    /// What it lacks of the mean of what is made, for each row of W of all groups, where that is known.
    pub(in crate::passes) lost: Option<Vec<f64>>,
    /// In which order the channels of a layer in groups stand.
    pub(in crate::passes) orders: Option<Orders>,
    /// The error that it makes of the layer, relative and squared.
    pub(in crate::passes) error: f64,
}

impl Site {
    /// Puts a chain in the place of each layer; `None`, and nothing done, where a value is beyond what its type holds. Answers what
    /// stands in the place of each layer where that is no chain.
    pub(in crate::passes) fn replace(
        &self,
        graph: &mut Graph,
        form: Form,
        chain: &Replacement,
        pass: &str,
    ) -> Option<Vec<Regrouped>> {
        let mut next = graph.clone();
        let written = match form {
            Form::Grouped { .. } | Form::Kronecker { .. } => self.regroup(&mut next, form, chain, pass)?,
            _ => {
                self.split(&mut next, form, chain, pass)?;
                Vec::new()
            }
        };
        *graph = next;
        Some(written)
    }

    /// Writes layers of which each reads what the one before makes.
    fn split(&self, graph: &mut Graph, form: Form, chain: &Replacement, pass: &str) -> Option<()> {
        let stored = self.stored(graph)?.clone();
        let layouts = form.layouts(&self.shape);
        let shares: Vec<_> = self.linear().iter().map(|linear| self.share(graph, linear)).collect();
        match &self.readers {
            Readers::Dense(layers) => {
                let [inner, outer] = &chain.stages[..] else { return None };
                let (left, right) = self.matrices(form, &stored, (inner, outer))?;
                let left = graph.add_const(left, &format!("{}.{pass}.left", self.name));
                let right = graph.add_const(right, &format!("{}.{pass}.right", self.name));
                for layer in layers {
                    dense::split(graph, layer, (left, right), pass)?;
                }
                // Where every reader wants them transposed, nobody reads the factors themselves.
                graph.sweep(left.node);
                graph.sweep(right.node);
            }
            Readers::Linear(layers) => {
                let mut weights = Vec::new();
                for (i, (layout, values)) in layouts.iter().zip(&chain.stages).enumerate() {
                    let (dims, values) = written(graph, &layers[0], i, layout, values);
                    let weight = stored.fit(&dims, &values).filter(|weight| weight.value().is_finite())?;
                    weights.push(graph.add_const(weight, &format!("{}.{pass}.{}", self.name, i + 1)));
                }
                for linear in layers {
                    if linear.is_recurrent() {
                        mix_before(graph, linear, &weights, pass)?;
                    } else {
                        convolve(graph, linear, (&layouts, &weights), pass)?;
                    }
                }
            }
        }
        if let Some(lost) = &chain.lost {
            for (linear, share) in self.linear().iter().zip(shares) {
                add_to_bias(graph, linear, (lost, share), pass)?;
            }
        }
        Some(())
    }

    /// Writes layers that do not read what the layer did.
    fn regroup(&self, graph: &mut Graph, form: Form, chain: &Replacement, pass: &str) -> Option<Vec<Regrouped>> {
        let (stored, layouts, lost) = (self.stored(graph)?.clone(), form.layouts(&self.shape), chain.lost.as_deref());
        let mut weights = Vec::new();
        for (i, (layout, values)) in layouts.iter().zip(&chain.stages).enumerate() {
            // A product of rows by Bᵀ, and one of A by what that makes; of a chain beside a product of rows, both are of rows.
            let is_turned = match form {
                Form::Kronecker { .. } => i.is_multiple_of(2),
                _ => i > 0 && self.shape.kernel.is_empty(),
            };
            let values = if is_turned { transposed(values, layout.dims[1]) } else { values.clone() };
            let dims = if is_turned { vec![layout.dims[1], layout.dims[0]] } else { layout.dims.clone() };
            weights.push(stored.fit(&dims, &values).filter(|weight| weight.value().is_finite())?);
        }
        if let (Form::Kronecker { .. }, Some(rank)) = (form, self.rank) {
            let name = |i: usize| format!("{}.{pass}.{}", self.name, i + 1);
            let weights: Vec<_> =
                weights.into_iter().enumerate().map(|(i, weight)| graph.add_const(weight, &name(i))).collect();
            let mut one =
                |linear: &Linear| regroup::multiply(graph, linear, (form, &self.shape, &weights), (rank, lost), pass);
            return self.linear().iter().map(&mut one).collect();
        }
        // A matrix becomes a kernel of one place.
        let dims =
            if self.shape.kernel.is_empty() { [&layouts[0].dims[..], &[1]].concat() } else { layouts[0].dims.clone() };
        weights[0] = weights[0].reshape(&dims)?;
        let orders = chain.orders.as_ref()?;
        let weights: Vec<_> =
            weights.into_iter().map(|weight| graph.add_const(weight, &format!("{}.{pass}", self.name))).collect();
        let mut one = |linear: &Linear| {
            let share = self.share(graph, linear);
            regroup::group(graph, linear, (&layouts, orders, &weights), (self.rank, lost, share), pass)
        };
        self.linear().iter().map(&mut one).collect()
    }

    /// How much of what rows of W make reaches each result, on average: less than all where they spread over places.
    fn share(&self, graph: &Graph, linear: &Linear) -> f64 {
        let strides = graph.op(linear.node).and_then(|op| op.ints("strides"));
        let places = strides.map_or(1, |strides| strides.iter().product::<i64>().max(1));
        if self.shape.spreads { (places as f64).recip() } else { 1.0 }
    }

    /// The constants left and right whose product stands in place of a constant, in its own order.
    fn matrices(&self, form: Form, stored: &Weight, (inner, outer): (&[f64], &[f64])) -> Option<(Weight, Weight)> {
        let Form::Ranks { after: Some(rank), before: None } = form else { return None };
        let [stack @ .., rows, columns] = stored.value().dims() else { return None };
        let dims = |rows: usize, columns: usize| [stack, &[rows, columns]].concat();
        let (rows, columns, flipped) = (*rows, *columns, self.is_flipped());
        // Stored as it is, W = outer·inner; stored as Wᵀ, that is innerᵀ·outerᵀ.
        let (left, right) =
            if flipped { (transposed(inner, rows), transposed(outer, rank)) } else { (outer.to_vec(), inner.to_vec()) };
        let left = stored.fit(&dims(rows, rank), &left)?;
        let right = stored.fit(&dims(rank, columns), &right)?;
        (left.value().is_finite() && right.value().is_finite()).then_some((left, right))
    }
}

/// Adds `lost`, a value for each row of W of which a share reaches each result, to the bias of a layer.
fn add_to_bias(graph: &mut Graph, linear: &Linear, (lost, share): (&[f64], f64), pass: &str) -> Option<()> {
    let bias = Bias::of(graph, linear);
    let mut values = bias.values(graph, linear)?;
    for (value, lost) in values.iter_mut().zip(lost.chunks(linear.spread)) {
        *value += lost.iter().sum::<f64>() * share;
    }
    bias.set(graph, linear, &values, pass)
}

/// The extents and elements of a weight as the operator that reads it wants them.
fn written(graph: &Graph, linear: &Linear, stage: usize, layout: &Layout, values: &[f64]) -> (Vec<usize>, Vec<f64>) {
    if !linear.is_recurrent() {
        return (layout.dims.clone(), values.to_vec());
    }
    let [rows, columns] = layout.dims[..] else { return (layout.dims.clone(), values.to_vec()) };
    if stage == 0 {
        // A product of rows by Aᵀ.
        return (vec![columns, rows], transposed(values, columns));
    }
    let directions = graph.constant(linear.weight).map_or(1, |weight| weight.dims()[0]);
    (vec![directions, rows / directions, columns], values.to_vec())
}

/// Has a recurrence read `x·Aᵀ` of `weights` instead of x.
fn mix_before(graph: &mut Graph, linear: &Linear, weights: &[Outlet], pass: &str) -> Option<()> {
    let [mixing, weight] = *weights else { return None };
    let (name, node_name) = names(graph, linear, pass);
    let op = Op::new("MatMul").named(&node_name);
    let mixed = graph.add_op(op, &[graph.operand(linear.node, 0), Some(mixing)], &[&name], linear.node).out();
    graph.set_operand(linear.node, 0, Some(mixed));
    graph.exchange_operand(linear.node, linear.slot(), Some(weight));
    Some(())
}

/// Names for a value and a node before the layer.
pub(super) fn names(graph: &Graph, linear: &Linear, pass: &str) -> (String, String) {
    let node = graph.op(linear.node).map_or("", Op::name);
    let node = if node.is_empty() { String::new() } else { format!("{node}.{pass}") };
    (format!("{}.{pass}", graph.name(linear.node.out())), node)
}

/// Has convolutions with such weights stand in the place of one; the last one is its node.
fn convolve(graph: &mut Graph, linear: &Linear, (layouts, weights): (&[Layout], &[Outlet]), pass: &str) -> Option<()> {
    let whole = graph.op(linear.node)?.clone();
    let mut read = graph.operand(linear.node, 0)?;
    let (name, node_name) = names(graph, linear, pass);
    let last = layouts.len().checked_sub(1)?;
    for (layout, &weight) in layouts[..last].iter().zip(weights) {
        let op = part(&whole, layout)?.named(&node_name);
        read = graph.add_op(op, &[Some(read), Some(weight)], &[&name], linear.node).out();
    }
    let op = part(&whole, &layouts[last])?.in_place_of(&whole);
    graph.edit_op(linear.node, |own| *own = op);
    graph.set_operand(linear.node, 0, Some(read));
    graph.exchange_operand(linear.node, 1, Some(weights[last]));
    Some(())
}

/// The part of a convolution that reaches along some axes of its kernel.
pub(super) fn part(whole: &Op, layout: &Layout) -> Option<Op> {
    let axes = layout.along.len();
    let kind = if layout.reaches() { whole.standard()? } else { "Conv" };
    let kernel: Vec<_> = layout.dims[2..].iter().map(|&extent| extent as i64).collect();
    let mut op = Op::new(kind).with_ints("kernel_shape", &kernel);
    if layout.groups > 1 {
        op = op.with_int("group", layout.groups as i64);
    }
    if !layout.reaches() {
        return Some(op);
    }
    let along = |axis: usize| layout.along[axis % axes];
    for (name, neutral) in [("strides", 1), ("dilations", 1), ("pads", 0), ("output_padding", 0)] {
        let Some(values) = whole.ints(name) else { continue };
        let kept = |(axis, &value): (usize, &i64)| if along(axis) { value } else { neutral };
        let kept: Vec<_> = values.iter().enumerate().map(kept).collect();
        if kept.iter().any(|&value| value != neutral) {
            op = op.with_ints(name, &kept);
        }
    }
    if let Some(shape) = whole.ints("output_shape") {
        op = op.with_ints("output_shape", shape);
    }
    if let Some(pads) = whole.string("auto_pad") {
        op = op.with_string("auto_pad", pads);
    }
    Some(op)
}
