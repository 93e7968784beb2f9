//! See [`FoldConstants`].

use std::collections::BTreeMap;

use petgraph::unionfind::UnionFind;
use prost::Message;

use crate::{
    analysis::shapes::{Shapes, Term},
    codec::{moved, raise},
    eval,
    ir::{Graph, NodeId, Op, Outlet, Tensor, Weight},
    pass::{Context, Declare, Fidelity, Pass, everywhere, rewrite_shaped},
};

/// Compute what depends on constants alone, and what is known of shapes, once and for all.
///
/// Operators are evaluated the same to the bit on every machine. Shape arithmetic is folded where the declared input
/// shapes settle it, and followed by name where they don't: an extent of a `Reshape` that is that of the same axis of its
/// operand becomes 0, and the only one that is not known becomes -1. `Constant` nodes become initializers.
///
/// Applies when: the file does not grow, or by a few bytes only. An `Expand` of one number to a million stays.
///
/// Fidelity: exact.
#[derive(Debug, clap::Parser)]
#[command(name = "fold-constants")]
pub(super) struct FoldConstants {}

impl Declare for FoldConstants {
    const NAME: &'static str = "fold-constants";
    const FIDELITY: Fidelity = Fidelity::Exact;
}

impl Pass for FoldConstants {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        let rule =
            |graph: &mut Graph, shapes: &Shapes, node| fold(graph, shapes, node).or_else(|| infer(graph, shapes, node));
        let (mut folded, mut listed) = (0, 0);
        everywhere(graph, &mut |graph| {
            folded += fold_together(graph);
            listed += graph.list_constants();
        });
        if folded > 0 {
            // Of what was quantized when it was run, there are codes now.
            let before = graph.clone();
            raise(graph, &before);
        }
        cx.add("constants made initializers", listed);
        cx.add("operators folded", folded + rewrite_shaped(graph, &rule));
        Ok(())
    }
}

/// Constants of at most this many bytes, axes and extents, tie nothing together.
const MAX_UNTIED: usize = 64;

/// Operators that depend on constants alone and are tied by constants or values that they share.
#[derive(Default)]
struct Tied {
    operators: Vec<NodeId>,
    /// Values that something else reads.
    results: Vec<NodeId>,
    /// Bytes of the file that go and that come where all are folded.
    freed: usize,
    made: usize,
}

/// Makes constants of operators on constants, where all that are tied together take no more bytes as constants: each part
/// of a weight that is cut and put together in another order may be as large as the weight.
fn fold_together(graph: &mut Graph) -> usize {
    let mut values: BTreeMap<NodeId, Tensor> = BTreeMap::new();
    let order = graph.order();
    let place: BTreeMap<NodeId, usize> = order.iter().copied().zip(0..).collect();
    let mut ties = UnionFind::<usize>::new(order.len());
    for id in order {
        let is_plain = |op: &&Op| op.bodies.is_empty() && graph.output_count(id) == 1 && !op.is(KEPT);
        let Some(op) = graph.op(id).filter(is_plain) else { continue };
        let operands = graph.operands(id);
        let read = |value: &Option<Outlet>| value.map(|v| graph.constant(v).or_else(|| values.get(&v.node)));
        let inputs: Vec<_> = operands.iter().map(read).collect();
        if inputs.is_empty() || inputs.iter().any(|input| matches!(input, Some(None))) {
            continue;
        }
        let inputs: Vec<_> = inputs.into_iter().map(Option::flatten).collect();
        let Some(value) = eval::evaluate(op, graph.opset(), &inputs).and_then(|mut values| values.pop()) else {
            continue;
        };
        for (operand, input) in operands.iter().zip(&inputs) {
            if let (Some(operand), Some(_)) = (operand, input.filter(|input| input.byte_len() > MAX_UNTIED)) {
                ties.union(place[&id], place[&operand.node]);
            }
        }
        values.insert(id, value);
    }
    let mut tied: BTreeMap<usize, Tied> = BTreeMap::new();
    for (&id, value) in &values {
        let tied = tied.entry(ties.find(place[&id])).or_default();
        tied.operators.push(id);
        tied.freed += graph.op(id).map_or(0, |op| op.proto.encoded_len());
        if graph.is_output(id.out()) || graph.uses(id.out()).iter().any(|(reader, _)| !values.contains_key(reader)) {
            tied.made += value.byte_len();
            tied.results.push(id);
        }
    }
    for constant in graph.node_ids().filter(|id| !values.contains_key(id) && graph.constant(id.out()).is_some()) {
        let stays = graph.is_output(constant.out()) || graph.is_pinned(constant.out());
        let folds_away = !stays && graph.uses(constant.out()).iter().all(|(reader, _)| values.contains_key(reader));
        if let Some(tied) = tied.get_mut(&ties.find(place[&constant])).filter(|_| folds_away) {
            tied.freed += graph.weight(constant.out()).map_or(0, Weight::stored_bytes);
        }
    }
    let mut folded = 0;
    for tied in tied.into_values().filter(|tied| tied.made <= tied.freed.max(MAX_UNTIED)) {
        folded += tied.operators.len();
        for id in tied.results {
            graph.settle(id, Weight::dense(values[&id].clone()));
        }
    }
    folded
}

/// Kernels of integers look for it before what they read.
const KEPT: &str = "DequantizeLinear";

/// Makes `node` the constant that it always is.
fn fold(graph: &mut Graph, shapes: &Shapes, node: NodeId) -> Option<()> {
    let op = graph.op(node)?;
    if graph.output_count(node) != 1 || !op.bodies.is_empty() || op.is(KEPT) {
        return None;
    }
    let is_alone = graph.operand(node, 0).is_some_and(|read| graph.sole_use(read).is_some());
    if let Some(weight) = moved(graph, node).filter(|_| is_alone) {
        graph.settle(node, weight);
        return Some(());
    }
    let operands = graph.operands(node);
    let value = known(shapes, node).or_else(|| {
        let inputs: Vec<_> = operands.iter().map(|value| value.and_then(|v| graph.constant(v))).collect();
        let all_constant = operands.iter().zip(&inputs).all(|(operand, input)| operand.is_some() == input.is_some());
        if !all_constant || inputs.is_empty() {
            return None;
        }
        eval::evaluate(op, graph.opset(), &inputs)?.pop()
    })?;
    // Freed: the node, and constants that nothing else reads.
    let freed = operands.iter().flatten().filter(|&&v| graph.sole_use(v).is_some()).filter_map(|&v| graph.weight(v));
    let freed: usize = freed.map(Weight::stored_bytes).sum::<usize>() + op.proto.encoded_len();
    // A name for a small value takes fewer bytes than the operators that it saves take time.
    if value.byte_len() > freed.max(MAX_UNTIED) {
        return None;
    }
    graph.settle(node, Weight::dense(value));
    Some(())
}

/// Gives the `Reshape` at `node` a constant shape, where each extent is known, is that of the same axis of the operand, or is
/// the only one to infer from how many elements there are.
fn infer(graph: &mut Graph, shapes: &Shapes, node: NodeId) -> Option<()> {
    graph.op_of(node, "Reshape").filter(|op| op.int("allowzero") != Some(1))?;
    let (x, computed) = (graph.operand(node, 0)?, graph.operand(node, 1)?);
    let entries = shapes.fact(computed)?.ints.as_ref().filter(|_| graph.constant(computed).is_none())?;
    let known: Vec<Option<i64>> = entries.iter().map(|entry| entry.and_then(Term::known)).collect();
    // Only where no extent is zero is the open one settled by the others.
    let one_open = known.iter().filter(|entry| entry.is_none()).count() == 1;
    let target = if one_open && known.iter().flatten().all(|&entry| entry > 0) {
        Some(known.iter().map(|entry| entry.unwrap_or(-1)).collect())
    } else {
        let copied = |i: usize| shapes.dims(x)?.get(i).filter(|&&extent| extent == entries[i]).map(|_| 0);
        known.iter().enumerate().map(|(i, &entry)| entry.or_else(|| copied(i))).collect::<Option<Vec<i64>>>()
    };
    let target = target?;
    let name = format!("{}.{}", graph.name(computed), FoldConstants::NAME);
    let target = graph.add_const(Weight::dense(Tensor::i64(&[target.len()], &target)), &name);
    graph.exchange_operand(node, 1, Some(target));
    Some(())
}

/// The small integer tensor that `node` makes, if shapes settle it.
fn known(shapes: &Shapes, node: NodeId) -> Option<Tensor> {
    let (ints, dims) = (shapes.integers(node.out())?, shapes.known(node.out())?);
    let dtype = shapes.fact(node.out())?.dtype.filter(|_| dims.iter().product::<usize>() == ints.len())?;
    Tensor::integers(dtype, &dims, &ints)
}
