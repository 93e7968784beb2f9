//! How channels pass through each operator. Axes that a rule does not mention are pinned.

mod layers;
mod movement;

use std::collections::BTreeSet;

use super::{
    Axis, Channels, Count, Role, Side,
    entries::{Entry, length, shape_slot, source},
};
use crate::{
    analysis::{ELEMENTWISE, shapes::Shapes},
    eval::axis,
    ir::{Graph, NodeId, Op, Outlet},
};

/// Element-wise operators of several operands, which broadcast.
const BROADCAST: &[&str] = &[
    "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "PRelu", "Where", "Sum", "Mean", "Equal", "Less", "Greater",
    "And", "Or",
];

/// Applies the rule of `node`.
pub(super) fn apply(channels: &mut Channels, graph: &Graph, shapes: &Shapes, node: NodeId) {
    let Some(op) = graph.op(node) else { return };
    let mut rule = Rule { channels, graph, shapes, node, op, seen: BTreeSet::new() };
    // Of results beyond the first, only the parts of a Split and the states of a recurrence are followed.
    let more = !["Split", "LSTM", "GRU", "RNN"].iter().any(|several| op.is(several))
        && (1..graph.output_count(node)).any(|s| graph.is_output(node.at(s)) || !graph.uses(node.at(s)).is_empty());
    // Before opset 7, operands were aligned by an attribute.
    let aligned = graph.opset() < 7 && op.standard().is_some_and(|op| BROADCAST.contains(&op));
    let done = if more || aligned { None } else { rule.dispatch() };
    let why = format!("{} `{}` can't be seen through", op.op_type(), graph.label(node));
    if done.is_none() {
        rule.seen.clear();
        rule.pin_what_is_spelled(&why);
    }
    let seen = rule.seen;
    let operands = graph.operands(node).into_iter().flatten().chain(graph.captures(node).into_values());
    let values: Vec<_> = operands.chain((0..graph.output_count(node)).map(|slot| node.at(slot))).collect();
    for value in values {
        for axis in 0..shapes.rank(value).unwrap_or(0) {
            if !seen.contains(&(value, axis)) {
                channels.pin_axis(value, axis, &why);
            }
        }
    }
}

struct Rule<'a> {
    channels: &'a mut Channels,
    graph: &'a Graph,
    shapes: &'a Shapes,
    node: NodeId,
    op: &'a Op,
    /// The axes that the rule accounts for.
    seen: BTreeSet<Axis>,
}

impl Rule<'_> {
    fn dispatch(&mut self) -> Option<()> {
        let y = self.node.out();
        let x = self.operand(0)?;
        match self.op.standard()? {
            "Cast" | "Dropout" | "Identity" => self.same(x, y, &[]),
            op if ELEMENTWISE.contains(&op) => self.same(x, y, &[]),
            op if BROADCAST.contains(&op) => (0..self.graph.operands(self.node).len() as u32)
                .try_for_each(|slot| self.broadcast(self.operand(slot)?, y)),
            "Softmax" | "LogSoftmax" | "Hardmax" => {
                let new = self.graph.opset() >= 13;
                self.normalized_from(x, y, if new { -1 } else { 1 }, new)
            }
            "LayerNormalization" | "RMSNormalization" => self.normalized_from(x, y, -1, false),
            // Before opset 9, each element could have statistics of its own.
            "BatchNormalization" if self.op.int("spatial") == Some(0) => None,
            "BatchNormalization" => self.normalized(x, y, &[]),
            "InstanceNormalization" => self.normalized(x, y, &(2..self.rank(x)?).collect::<Vec<_>>()),
            "Conv" => self.conv(x, y),
            "ConvTranspose" => self.conv_transpose(x, y),
            "MaxPool" | "AveragePool" | "GlobalAveragePool" | "GlobalMaxPool" | "LpPool" | "GlobalLpPool" => {
                self.tie((x, 0), (y, 0))?;
                self.tie((x, 1), (y, 1))
            }
            "Resize" | "Upsample" => self.resize(x, y),
            "DepthToSpace" | "SpaceToDepth" => self.blocks_of_space(x, y),
            "LSTM" | "GRU" | "RNN" => self.recurrent(x),
            "Gemm" => self.gemm(y),
            "MatMul" => self.matmul(y),
            "Concat" => self.concat(y),
            "Split" => self.split(x),
            "Transpose" => self.transpose(x, y),
            "Reshape" => self.reshape(x, y),
            "Shape" => self.shape(x, y),
            "ConstantOfShape" => (0..self.rank(y)?).try_for_each(|a| {
                self.seen.insert((y, a));
                self.spelled(0, a, (y, a))
            }),
            "Expand" => self.expand(x, y),
            "Gather" => self.gather(x, y),
            "Flatten" | "Squeeze" | "Unsqueeze" => self.regroup(x, y),
            "Pad" => self.pad(x, y),
            "Slice" => self.slice(x, y),
            op if op.starts_with("Reduce") => self.reduce(x, y),
            _ => None,
        }
    }

    /// Pins the extents that a shape is computed of which the rule could not follow.
    fn pin_what_is_spelled(&mut self, why: &str) {
        let Some(slot) = shape_slot(self.graph, self.node) else { return };
        let entries = self.operand(slot).and_then(|shape| length(self.shapes, shape)).unwrap_or(0);
        for at in 0..entries {
            match source(self.graph, self.shapes, self.node, slot, at) {
                Some(Entry::Extent((value, axis))) => self.channels.pin_axis(value, axis, why),
                Some(Entry::Constant { reader, slot, at, .. }) => _ = self.channels.fixed.insert((reader, slot, at)),
                None => {}
            }
        }
    }

    fn operand(&self, slot: u32) -> Option<Outlet> {
        self.graph.operand(self.node, slot)
    }

    fn rank(&self, value: Outlet) -> Option<usize> {
        self.shapes.known(value).map(|dims| dims.len())
    }

    fn tie(&mut self, a: Axis, b: Axis) -> Option<()> {
        self.channels.tie(a, b)?;
        self.seen.extend([a, b]);
        Some(())
    }

    /// Makes an axis the product of others, of which those of an extent of 1 don't count.
    fn multiply(&mut self, whole: Axis, factors: &[Axis]) -> Option<()> {
        let wide = factors.iter().copied().filter(|&(value, axis)| self.channels.extent(value, axis) != Some(1));
        self.channels.multiply(whole, &wide.collect::<Vec<_>>())?;
        self.seen.extend(factors.iter().copied().chain([whole]));
        Some(())
    }

    /// An axis inside the operator, after those that it has.
    fn inner(&mut self, extent: usize) -> Option<Axis> {
        let y = self.node.out();
        let axis = (y, (self.rank(y)?..).find(|&axis| self.channels.extent(y, axis).is_none())?);
        self.channels.add_axis(axis, extent);
        self.seen.insert(axis);
        Some(axis)
    }

    /// Ties each axis of `x` to that of `y`, but for those that the operator mixes.
    fn same(&mut self, x: Outlet, y: Outlet, mixed: &[usize]) -> Option<()> {
        (0..self.rank(x)?).filter(|a| !mixed.contains(a)).try_for_each(|a| self.tie((x, a), (y, a)))
    }

    /// Ties the axes of an operand to those of the result, aligned at the end; an extent of 1 stands for any.
    fn broadcast(&mut self, x: Outlet, y: Outlet) -> Option<()> {
        let shift = self.rank(y)?.checked_sub(self.rank(x)?)?;
        for a in 0..self.rank(x)? {
            if self.channels.extent(x, a)? == 1 {
                self.seen.insert((x, a));
            } else {
                self.tie((x, a), (y, a + shift))?;
            }
        }
        self.seen.extend((0..self.rank(y)?).map(|a| (y, a)));
        Some(())
    }

    /// Ties all axes but those over which a normalization by statistics of the operand itself takes them; its scales and the like
    /// stand along axis 1.
    fn normalized(&mut self, x: Outlet, y: Outlet, mixed: &[usize]) -> Option<()> {
        for slot in 1..self.graph.operands(self.node).len() as u32 {
            self.tie((self.operand(slot)?, 0), (y, 1))?;
        }
        self.same(x, y, mixed)
    }

    /// Ties all axes but the one that an attribute names, and where it is not `alone`, those after it.
    fn normalized_from(&mut self, x: Outlet, y: Outlet, default: i64, alone: bool) -> Option<()> {
        let rank = self.rank(x)?;
        let at = axis(self.op.int("axis").unwrap_or(default), rank)?;
        self.same(x, y, &(at..if alone { at + 1 } else { rank }).collect::<Vec<_>>())
    }

    fn reduce(&mut self, x: Outlet, y: Outlet) -> Option<()> {
        let rank = self.rank(x)?;
        let axes = match self.operand(1) {
            Some(axes) => self.graph.constant(axes)?.i64s()?,
            None => self.op.ints("axes")?.to_vec(),
        };
        let axes: Vec<_> = axes.into_iter().map(|a| axis(a, rank)).collect::<Option<_>>()?;
        let keep = self.op.int("keepdims").unwrap_or(1) != 0;
        let mut at = 0;
        for a in 0..rank {
            if !axes.contains(&a) {
                self.tie((x, a), (y, at))?;
            }
            at += usize::from(keep || !axes.contains(&a));
        }
        Some(())
    }
}
