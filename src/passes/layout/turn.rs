//! What operators become in another order of axes.

use std::collections::BTreeMap;

use super::inverse;
use crate::{
    analysis::{is_broadcasting, is_elementwise, shapes::Shapes},
    eval::axis,
    ir::{Graph, NodeId, Op, Outlet, Tensor, Weight},
};

/// An operator in another order of axes.
#[derive(Clone, Debug)]
pub(super) struct Turn {
    /// The operator.
    pub(super) op: Op,
    /// The operands that it reads in the other order.
    pub(super) turned: Vec<u32>,
    /// The operands that are other constants.
    pub(super) given: BTreeMap<u32, Weight>,
}

impl Turn {
    fn of(op: &Op, turned: Vec<u32>) -> Self {
        Self { op: op.clone(), turned, given: BTreeMap::new() }
    }

    /// The same with `values` in the place of an attribute or of a constant operand, whichever `node` has.
    fn with_ints(mut self, graph: &Graph, node: NodeId, attribute: &str, slot: u32, values: &[i64]) -> Self {
        if self.op.ints(attribute).is_some() {
            self.op = self.op.with_ints(attribute, values);
        } else if let Some(old) = graph.operand(node, slot).and_then(|value| graph.constant(value)) {
            let dtype = old.dtype();
            self.given.extend(Tensor::integers(dtype, &[values.len()], values).map(|t| (slot, Weight::dense(t))));
        }
        self
    }
}

/// Integers that are an attribute of `node` or a constant operand.
fn integers(graph: &Graph, node: NodeId, attribute: &str, slot: u32) -> Option<Vec<i64>> {
    match graph.operand(node, slot) {
        Some(value) => graph.constant(value)?.i64s(),
        None => graph.op(node)?.ints(attribute).map(<[i64]>::to_vec),
    }
}

fn is_absent(graph: &Graph, node: NodeId, attribute: &str, slot: u32) -> bool {
    graph.operand(node, slot).is_none() && graph.op(node).is_none_or(|op| op.ints(attribute).is_none())
}

/// What the operator at `node` becomes where it makes, in place of each result, what a `Transpose` by `perm` turns into
/// that result. `None` where it cares for the order of axes.
pub(super) fn turn(graph: &Graph, shapes: &Shapes, node: NodeId, perm: &[usize]) -> Option<Turn> {
    let op = graph.op(node).filter(|op| graph.opset() >= 7 && op.bodies.is_empty())?;
    let rank = perm.len();
    let of_rank = |value: Outlet| shapes.rank(value) == Some(rank);
    if (0..graph.output_count(node)).any(|slot| graph.is_pinned(node.at(slot)) || graph.name(node.at(slot)).is_empty())
    {
        return None;
    }
    let kind = op.standard()?;
    if is_broadcasting(kind) {
        return of_rank(node.out()).then(|| broadcasting(graph, shapes, node, perm))?;
    }
    graph.operand(node, 0).filter(|&x| of_rank(x))?;
    let along = |default: i64| Some(moved(&[op.int("axis").unwrap_or(default)], perm)?[0]);
    match kind {
        _ if is_elementwise(kind) || kind == "Cast" => Some(Turn::of(op, vec![0])),
        "Concat" => {
            let operands: Vec<_> = graph.operands(node).into_iter().collect::<Option<_>>()?;
            let turn = Turn::of(op, (0..operands.len() as u32).collect());
            let at = moved(&[op.int("axis")?], perm)?[0];
            operands.into_iter().all(of_rank).then(|| Turn { op: turn.op.with_int("axis", at), ..turn })
        }
        "Split" => {
            let turn = Turn::of(op, vec![0]);
            Some(Turn { op: turn.op.with_int("axis", along(0)?), ..turn })
        }
        // Before opset 13 the axes from one on were taken as one.
        "Softmax" | "LogSoftmax" | "Hardmax" if graph.opset() >= 13 => {
            let turn = Turn::of(op, vec![0]);
            Some(Turn { op: turn.op.with_int("axis", along(-1)?), ..turn })
        }
        "Pad" => pad(graph, node, perm),
        "Slice" => slice(graph, shapes, node, perm),
        "ArgMax" | "ArgMin" if op.int("keepdims").unwrap_or(1) == 1 => {
            let turn = Turn::of(op, vec![0]);
            Some(Turn { op: turn.op.with_int("axis", along(0)?), ..turn })
        }
        _ if kind.starts_with("Reduce") && op.int("keepdims").unwrap_or(1) == 1 => {
            let turn = Turn::of(op, vec![0]);
            if is_absent(graph, node, "axes", 1) {
                return Some(turn);
            }
            let axes = integers(graph, node, "axes", 1)?;
            Some(turn.with_ints(graph, node, "axes", 1, &moved(&axes, perm)?))
        }
        _ => None,
    }
}

/// As [`turn`], for a `Pad`.
fn pad(graph: &Graph, node: NodeId, perm: &[usize]) -> Option<Turn> {
    let rank = perm.len();
    let turn = Turn::of(graph.op(node)?, vec![0]);
    if !is_absent(graph, node, "axes", 3) {
        let axes = moved(&integers(graph, node, "axes", 3)?, perm)?;
        return Some(turn.with_ints(graph, node, "axes", 3, &axes));
    }
    let pads = integers(graph, node, "pads", 1).filter(|pads| pads.len() == 2 * rank)?;
    let mut turned = vec![0; 2 * rank];
    for (k, &axis) in perm.iter().enumerate() {
        (turned[axis], turned[axis + rank]) = (pads[k], pads[k + rank]);
    }
    Some(turn.with_ints(graph, node, "pads", 1, &turned))
}

/// As [`turn`], for a `Slice`.
fn slice(graph: &Graph, shapes: &Shapes, node: NodeId, perm: &[usize]) -> Option<Turn> {
    let op = graph.op(node)?;
    let axes = if is_absent(graph, node, "axes", 3) {
        (0..integers(graph, node, "starts", 1)?.len() as i64).collect()
    } else {
        integers(graph, node, "axes", 3)?
    };
    let axes = moved(&axes, perm)?;
    let mut turn = Turn::of(op, vec![0]);
    if op.ints("starts").is_some() {
        turn.op = turn.op.with_ints("axes", &axes);
    } else {
        // Indices are of one type.
        let starts = graph.operand(node, 1).and_then(|value| shapes.fact(value)?.dtype)?;
        turn.given.insert(3, Weight::dense(Tensor::integers(starts, &[axes.len()], &axes)?));
    }
    Some(turn)
}

/// The axes of what `perm` turns that become `axes` of the result.
fn moved(axes: &[i64], perm: &[usize]) -> Option<Vec<i64>> {
    axes.iter().map(|&a| axis(a, perm.len()).map(|a| perm[a] as i64)).collect()
}

/// As [`turn`], for an operator on operands that are broadcast.
fn broadcasting(graph: &Graph, shapes: &Shapes, node: NodeId, perm: &[usize]) -> Option<Turn> {
    let rank = perm.len();
    let mut turn = Turn::of(graph.op(node)?, Vec::new());
    for (slot, operand) in (0..).zip(graph.operands(node)) {
        let operand = operand?;
        if shapes.rank(operand)? == rank && graph.constant(operand).is_none_or(|tensor| tensor.len() != 1) {
            turn.turned.push(slot);
            continue;
        }
        match graph.weight(operand) {
            Some(weight) if weight.value().len() == 1 => {}
            Some(weight) => {
                let mut dims = vec![1; rank.checked_sub(weight.value().dims().len())?];
                dims.extend(weight.value().dims());
                turn.given.insert(slot, weight.reshape(&dims)?.permute(&inverse(perm))?);
            }
            None if shapes.known(operand).is_some_and(|dims| dims.is_empty()) => {}
            None => return None,
        }
    }
    Some(turn)
}

/// What the operator at `node` becomes where it reads its first operand in the other order, if its result stays the same
/// then: it drops axes, and those that it keeps follow each other in either order.
pub(super) fn absorbs(graph: &Graph, node: NodeId, perm: &[usize]) -> Option<Turn> {
    let op = graph.op(node)?;
    let kind = op.standard()?;
    if !kind.starts_with("Reduce") || op.int("keepdims") != Some(0) {
        return None;
    }
    let axes = integers(graph, node, "axes", 1)?;
    let axes: Vec<usize> = axes.iter().map(|&a| axis(a, perm.len())).collect::<Option<_>>()?;
    let kept: Vec<_> = (0..perm.len()).filter(|axis| !axes.contains(axis)).map(|axis| perm[axis]).collect();
    let moved: Vec<_> = axes.iter().map(|&axis| perm[axis] as i64).collect();
    (kept.is_sorted() && !axes.is_empty()).then(|| Turn::of(op, vec![0]).with_ints(graph, node, "axes", 1, &moved))
}
