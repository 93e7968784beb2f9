//! How channels pass through each operator. Axes that a rule does not mention are pinned.

use std::collections::BTreeSet;

use super::{Channels, Count, Role, Side};
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
    // Of results beyond the first, only the parts of a Split are followed.
    let more = !op.is("Split")
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
    seen: BTreeSet<(Outlet, usize)>,
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
                // Sizes would have to be rewritten with the channels; scales need not.
                self.tie((x, 0), (y, 0))?;
                if self.operand(3).is_none() { self.tie((x, 1), (y, 1)) } else { Some(()) }
            }
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
            "Reshape" => {
                let shape = self.graph.constant(self.operand(1)?)?.i64s()?;
                self.regroup(x, y)?;
                self.seen.insert((self.operand(1)?, 0));
                let entries = shape.iter().enumerate().filter(|(_, entry)| **entry > 0);
                self.channels.counts.extend(entries.map(|(axis, _)| Count::Shape(self.node, axis)));
                Some(())
            }
            "Flatten" | "Squeeze" | "Unsqueeze" => self.regroup(x, y),
            "Pad" => self.pad(x, y),
            "Slice" => self.slice(x, y),
            op if op.starts_with("Reduce") => self.reduce(x, y),
            _ => None,
        }
    }

    /// Ties the axes that are not padded.
    fn pad(&mut self, x: Outlet, y: Outlet) -> Option<()> {
        let pads = match self.operand(1) {
            Some(pads) => self.graph.constant(pads)?.i64s()?,
            None => self.op.ints("pads")?.to_vec(),
        };
        let rank = self.rank(x)?;
        if pads.len() != 2 * rank || self.operand(3).is_some() {
            return None;
        }
        (0..rank).filter(|&a| pads[a] == 0 && pads[a + rank] == 0).try_for_each(|a| self.tie((x, a), (y, a)))
    }

    /// Ties the axes that are taken whole.
    fn slice(&mut self, x: Outlet, y: Outlet) -> Option<()> {
        for a in 0..self.rank(x)? {
            if self.channels.extent(x, a)? == self.channels.extent(y, a)? {
                self.tie((x, a), (y, a))?;
            }
        }
        // An end beyond every extent means the same after channels went; a smaller one does not.
        let whole =
            |tensor: Outlet| Some(self.graph.constant(tensor)?.i64s()?.iter().all(|&e| e > i64::from(i32::MAX / 2)));
        let axes = self.operand(3).and_then(|axes| self.graph.constant(axes)?.i64s())?;
        // A step of more or less than one takes channels by their places.
        let whole = self.operand(4).is_none() && self.operand(2).and_then(whole).unwrap_or(false);
        for a in axes {
            let a = axis(a, self.rank(x)?)?;
            if !whole {
                self.channels.pin_axis(x, a, "a Slice names positions along it");
            }
        }
        Some(())
    }

    fn operand(&self, slot: u32) -> Option<Outlet> {
        self.graph.operand(self.node, slot)
    }

    fn rank(&self, value: Outlet) -> Option<usize> {
        self.shapes.known(value).map(|dims| dims.len())
    }

    fn tie(&mut self, a: (Outlet, usize), b: (Outlet, usize)) -> Option<()> {
        self.channels.tie(a, b)?;
        self.seen.extend([a, b]);
        Some(())
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

    /// Declares what the axis of a weight does; one that no constant holds is tied all the same.
    fn side(&mut self, weight: Outlet, axis: usize, role: Role) {
        if self.graph.weight(weight).is_some() {
            self.channels.sides.push(Side { weight, axis, role });
        }
    }

    fn conv(&mut self, x: Outlet, y: Outlet) -> Option<()> {
        let weight = self.operand(1)?;
        let dims = self.shapes.known(weight)?;
        let group = usize::try_from(self.op.int("group").unwrap_or(1)).ok()?;
        self.tie((x, 0), (y, 0))?;
        if let Some(bias) = self.operand(2) {
            self.tie((bias, 0), (weight, 0))?;
        }
        if group == 1 {
            self.tie((x, 1), (weight, 1))?;
            self.side(weight, 1, Role::Reads);
            self.side(weight, 0, Role::Makes);
            return self.tie((weight, 0), (y, 1));
        }
        if dims[1] != 1 || !dims[0].is_multiple_of(group) {
            return None;
        }
        let multiplier = dims[0] / group;
        self.tie((weight, 0), (y, 1))?;
        self.channels.tie_by((weight, 0), (x, 1), |i| i / multiplier)?;
        self.seen.insert((x, 1));
        self.channels.counts.push(Count::Group(self.node));
        Some(())
    }

    fn conv_transpose(&mut self, x: Outlet, y: Outlet) -> Option<()> {
        let weight = self.operand(1)?;
        let dims = self.shapes.known(weight)?;
        let group = usize::try_from(self.op.int("group").unwrap_or(1)).ok()?;
        self.tie((x, 0), (y, 0))?;
        self.tie((x, 1), (weight, 0))?;
        if let Some(bias) = self.operand(2) {
            self.tie((bias, 0), (y, 1))?;
        }
        if group == 1 {
            self.side(weight, 0, Role::Reads);
            self.side(weight, 1, Role::Makes);
            return self.tie((weight, 1), (y, 1));
        }
        if dims[1] != 1 || group != dims[0] {
            return None;
        }
        self.tie((weight, 0), (y, 1))?;
        self.channels.counts.push(Count::Group(self.node));
        Some(())
    }

    fn gemm(&mut self, y: Outlet) -> Option<()> {
        let (a, b) = (self.operand(0)?, self.operand(1)?);
        let flag = |name: &str| usize::from(self.op.int(name) == Some(1));
        let (m, k) = (flag("transA"), 1 - flag("transA"));
        let (inner, n) = (flag("transB"), 1 - flag("transB"));
        self.product((a, m, k), (b, inner, n), (y, 0, 1))?;
        match self.operand(2) {
            Some(c) => self.broadcast(c, y),
            None => Some(()),
        }
    }

    fn matmul(&mut self, y: Outlet) -> Option<()> {
        let (a, b) = (self.operand(0)?, self.operand(1)?);
        let (ra, rb, ry) = (self.rank(a)?, self.rank(b)?, self.rank(y)?);
        if ra < 2 || rb < 2 {
            return None;
        }
        for (x, rank) in [(a, ra), (b, rb)] {
            for axis in 0..rank - 2 {
                if self.channels.extent(x, axis)? == 1 {
                    self.seen.insert((x, axis));
                } else {
                    self.tie((x, axis), (y, axis + ry - rank))?;
                }
            }
        }
        self.seen.extend((0..ry - 2).map(|axis| (y, axis)));
        self.product((a, ra - 2, ra - 1), (b, rb - 2, rb - 1), (y, ry - 2, ry - 1))
    }

    /// Ties the axes of a matrix product: (A, m, k) times (B, k, n) is (Y, m, n).
    fn product(
        &mut self,
        (a, m, k): (Outlet, usize, usize),
        (b, inner, n): (Outlet, usize, usize),
        (y, rows, columns): (Outlet, usize, usize),
    ) -> Option<()> {
        self.tie((a, k), (b, inner))?;
        self.tie((a, m), (y, rows))?;
        self.tie((b, n), (y, columns))?;
        self.side(b, inner, Role::Reads);
        self.side(b, n, Role::Makes);
        self.side(a, k, Role::Reads);
        self.side(a, m, Role::Makes);
        Some(())
    }

    fn concat(&mut self, y: Outlet) -> Option<()> {
        let at = axis(self.op.int("axis")?, self.rank(y)?)?;
        let mut offset = 0;
        for part in self.graph.operands(self.node) {
            let part = part?;
            self.same(part, y, &[at])?;
            self.channels.tie_by((part, at), (y, at), |i| offset + i)?;
            self.seen.extend([(part, at), (y, at)]);
            offset += self.channels.extent(part, at)?;
        }
        Some(())
    }

    fn split(&mut self, x: Outlet) -> Option<()> {
        let at = axis(self.op.int("axis").unwrap_or(0), self.rank(x)?)?;
        let spelled =
            self.op.ints("split").is_some() || self.operand(1).is_some_and(|s| self.graph.constant(s).is_some());
        let mut offset = 0;
        for slot in 0..self.graph.output_count(self.node) {
            let part = self.node.at(slot);
            self.same(part, x, &[at])?;
            if spelled {
                self.channels.tie_by((part, at), (x, at), |i| offset + i)?;
                self.seen.extend([(part, at), (x, at)]);
            }
            offset += self.channels.extent(part, at)?;
        }
        if spelled {
            self.channels.counts.push(Count::Split(self.node, at));
            self.seen.extend(self.operand(1).map(|split| (split, 0)));
        }
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

    /// Ties the axes of two shapes of the same elements: where one axis meets several, the first of these that is wider
    /// than 1 is followed, in blocks of the others.
    fn regroup(&mut self, x: Outlet, y: Outlet) -> Option<()> {
        let (from, to) = (self.shapes.known(x)?, self.shapes.known(y)?);
        let wide = |dims: &[usize]| (0..dims.len()).filter(|&a| dims[a] != 1).collect::<Vec<_>>();
        let (mut left, mut right) = (wide(&from).into_iter().peekable(), wide(&to).into_iter().peekable());
        self.seen.extend((0..from.len()).filter(|&a| from[a] == 1).map(|a| (x, a)));
        self.seen.extend((0..to.len()).filter(|&a| to[a] == 1).map(|a| (y, a)));
        while let (Some(a), Some(b)) = (left.next(), right.next()) {
            let (mut group, mut other) = (vec![a], vec![b]);
            let (mut p, mut q) = (from[a], to[b]);
            while p != q {
                if p < q {
                    let next = left.next()?;
                    p *= from[next];
                    group.push(next);
                } else {
                    let next = right.next()?;
                    q *= to[next];
                    other.push(next);
                }
            }
            match (&group[..], &other[..]) {
                ([a], [b]) => self.tie((x, *a), (y, *b))?,
                ([first, ..], [whole]) => self.blocks((y, *whole), (x, *first))?,
                ([whole], [first, ..]) => self.blocks((x, *whole), (y, *first))?,
                _ => {}
            }
        }
        Some(())
    }

    /// Ties the units of `whole` in equal blocks to those of `first`.
    fn blocks(&mut self, whole: (Outlet, usize), first: (Outlet, usize)) -> Option<()> {
        let block = self.channels.extent(whole.0, whole.1)? / self.channels.extent(first.0, first.1)?;
        self.channels.tie_by(whole, first, |i| i / block)?;
        self.seen.extend([whole, first]);
        Some(())
    }
}
