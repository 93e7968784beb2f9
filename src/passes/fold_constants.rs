//! See [`FoldConstants`].

use prost::Message;

use crate::{
    analysis::shapes::Shapes,
    eval,
    ir::{DType, Graph, Inlet, NodeId, Tensor, Weight},
    pass::{Context, Declare, Fidelity, Pass, declared_shapes, rewrite},
};

/// Compute what depends on constants alone, and what is known of shapes, once and for all.
///
/// Operators are evaluated the same to the bit on every machine. Shape arithmetic is folded where the declared input
/// shapes settle it; where one extent of a `Reshape` is open and the others are known, the open one becomes -1.
///
/// Applies when: the file does not grow. An `Expand` of one number to a million stays.
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
        cx.add("operators folded", rewrite(graph, declared_shapes, rule));
        Ok(())
    }
}

/// Makes `node` the constant that it always is.
fn fold(graph: &mut Graph, shapes: &Shapes, node: NodeId) -> Option<()> {
    let op = graph.op(node)?;
    if graph.output_count(node) != 1 || graph.is_output(node.out()) || !op.bodies.is_empty() {
        return None;
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
    let freed = operands.iter().flatten().filter(|&&v| graph.sole_use(v).is_some()).filter_map(|&v| graph.constant(v));
    let freed: usize = freed.map(Tensor::byte_len).sum::<usize>() + op.proto.encoded_len();
    if value.byte_len() > freed {
        return None;
    }
    graph.settle(node, Weight::dense(value));
    Some(())
}

/// Has every `Reshape` that reads the computed shape at `node` infer its one extent that is not known from how many
/// elements there are.
fn infer(graph: &mut Graph, shapes: &Shapes, node: NodeId) -> Option<()> {
    let computed = node.out();
    let entries = shapes.fact(computed)?.ints.as_ref()?;
    let one_open = entries.iter().filter(|entry| entry.is_none()).count() == 1;
    // A zero would stand for the extent of the input; and only where none is zero is the open one settled by the others.
    if !one_open || entries.iter().flatten().any(|&entry| entry <= 0) || graph.is_output(computed) {
        return None;
    }
    let uses = graph.uses(computed);
    let infers = |&(reader, inlet): &(NodeId, Inlet)| {
        inlet == Inlet::Slot(1) && graph.op_of(reader, "Reshape").is_some_and(|op| op.int("allowzero") != Some(1))
    };
    if uses.is_empty() || !uses.iter().all(infers) {
        return None;
    }
    let entries: Vec<i64> = entries.iter().map(|entry| entry.unwrap_or(-1)).collect();
    let name = format!("{}.fold-constants", graph.name(computed));
    let target = graph.add_const(Weight::dense(Tensor::i64(&[entries.len()], &entries)), &name);
    graph.replace_uses(computed, target);
    graph.sweep(node);
    Some(())
}

/// The small integer tensor that `node` makes, if shapes settle it.
fn known(shapes: &Shapes, node: NodeId) -> Option<Tensor> {
    let fact = shapes.fact(node.out())?;
    let ints: Vec<i64> = fact.ints.as_ref()?.iter().copied().collect::<Option<_>>()?;
    let dims: Vec<usize> = fact.dims.as_ref()?.iter().copied().collect::<Option<_>>()?;
    (fact.dtype == Some(DType::Int64) && dims.iter().product::<usize>() == ints.len())
        .then(|| Tensor::i64(&dims, &ints))
}
