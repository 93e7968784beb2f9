//! How channels pass through each operator. Axes that a rule does not mention are pinned.

mod layers;
mod movement;

use std::collections::BTreeSet;

use super::{Axis, Channels, Count, Role, Side};
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
    let seen = if done.is_some() { rule.seen } else { BTreeSet::new() };
    let why = format!("{} `{}` can't be seen through", op.op_type(), graph.label(node));
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
                let rank = self.rank(x)?;
                let new = self.graph.opset() >= 13;
                let at = axis(self.op.int("axis").unwrap_or(if new { -1 } else { 1 }), rank)?;
                self.same(x, y, &if new { vec![at] } else { (at..rank).collect() })
            }
            "BatchNormalization" | "InstanceNormalization" => {
                for slot in 1..self.graph.operands(self.node).len() as u32 {
                    self.tie((self.operand(slot)?, 0), (y, 1))?;
                }
                let mixed: Vec<_> =
                    if self.op.is("InstanceNormalization") { (2..self.rank(x)?).collect() } else { vec![] };
                self.same(x, y, &mixed)
            }
            "Conv" => self.conv(x, y),
            "ConvTranspose" => self.conv_transpose(x, y),
            "MaxPool" | "AveragePool" | "GlobalAveragePool" | "GlobalMaxPool" | "LpPool" | "GlobalLpPool" => {
                self.tie((x, 0), (y, 0))?;
                self.tie((x, 1), (y, 1))
            }
            "Resize" | "Upsample" => {
                self.tie((x, 0), (y, 0))?;
                self.tie((x, 1), (y, 1))?;
                match self.operand(3).filter(|_| self.op.attribute("axes").is_none()) {
                    Some(_) => (0..self.rank(y)?).try_for_each(|a| self.spelled(3, a, (y, a))),
                    None => self.operand(3).is_none().then_some(()),
                }
            }
            "DepthToSpace" | "SpaceToDepth" => self.blocks_of_space(x, y),
            "LayerNormalization" => {
                let rank = self.rank(x)?;
                let at = axis(self.op.int("axis").unwrap_or(-1), rank)?;
                self.same(x, y, &(at..rank).collect::<Vec<_>>())
            }
            "LSTM" | "GRU" | "RNN" => self.recurrent(x),
            "Gemm" => self.gemm(y),
            "MatMul" => self.matmul(y),
            "Concat" => self.concat(y),
            "Split" => self.split(x),
            "Transpose" => {
                let rank = self.rank(x)?;
                let perm: Vec<_> = match self.op.ints("perm") {
                    Some(perm) => perm.iter().map(|&p| axis(p, rank)).collect::<Option<_>>()?,
                    None => (0..rank).rev().collect(),
                };
                perm.iter().enumerate().try_for_each(|(k, &p)| self.tie((x, p), (y, k)))
            }
            "Reshape" => self.reshape(x, y),
            "Shape" => self.shape(x, y),
            "ConstantOfShape" => (0..self.rank(y)?).try_for_each(|a| {
                self.seen.insert((y, a));
                self.spelled(0, a, (y, a))
            }),
            "Expand" => {
                self.broadcast(x, y)?;
                let spelled = self.shapes.known(self.operand(1)?)?.iter().product::<usize>();
                let rank = self.rank(y)?;
                (0..spelled).try_for_each(|a| self.spelled(1, a, (y, a + rank - spelled)))
            }
            "Gather" => self.gather(x, y),
            "Flatten" | "Squeeze" | "Unsqueeze" => self.regroup(x, y),
            "Pad" => self.pad(x, y),
            "Slice" => self.slice(x, y),
            op if op.starts_with("Reduce") => self.reduce(x, y),
            _ => None,
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
