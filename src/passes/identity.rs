//! See [`Identity`].

use crate::{
    analysis::shapes::Shapes,
    ir::{DType, Graph, NodeId, Outlet},
    pass::{Context, Declare, Fidelity, Pass, rewrite_shaped},
};

/// Remove operators that pass their input on unchanged.
///
/// `Identity`, `Dropout` at inference, `Cast` to the type it has, `Transpose` that keeps the order, `Concat` of one
/// tensor, and `Reshape`, `Flatten`, `Squeeze`, `Unsqueeze`, `Expand`, `Slice` and `Pad` whose result has the known
/// shape of their input.
///
/// Applies when: the result is no output, or the input can take the output's name. An `Identity` from an input, a
/// constant or another output to an output stays: the interface needs it.
///
/// Fidelity: exact.
#[derive(Debug, clap::Parser)]
#[command(name = "identity")]
pub(super) struct Identity {}

impl Declare for Identity {
    const NAME: &'static str = "identity";
    const FIDELITY: Fidelity = Fidelity::Exact;
}

impl Pass for Identity {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        cx.add("operators removed", rewrite_shaped(graph, &bypass));
        Ok(())
    }
}

/// Has the readers of `node` read its input, if that is the same, and removes it.
fn bypass(graph: &mut Graph, shapes: &Shapes, node: NodeId) -> Option<()> {
    let input = graph.operand(node, 0)?;
    let output = node.out();
    if !is_identity(graph, shapes, node, input)? || graph.is_pinned(output) {
        return None;
    }
    if graph.is_output(output) && !graph.can_take_name(input) {
        return None;
    }
    graph.replace_uses(output, input);
    graph.sweep(node);
    Some(())
}

/// Whether the slice at `node` runs from the first element to one that no extent reaches.
fn takes_all(graph: &Graph, shapes: &Shapes, node: NodeId) -> Option<bool> {
    let op = graph.op(node)?;
    let given = |attribute: &str, slot: u32| match graph.operand(node, slot) {
        Some(value) => shapes.integers(value),
        None => op.ints(attribute).map(<[i64]>::to_vec),
    };
    let ends = given("ends", 2)?;
    let steps = graph.operand(node, 4).map_or_else(|| Some(vec![1]), |steps| shapes.integers(steps))?;
    let all = |values: &[i64], wanted: fn(i64) -> bool| values.iter().all(|&value| wanted(value));
    Some(
        all(&given("starts", 1)?, |start| start == 0)
            && all(&ends, |end| end >= i64::from(i32::MAX))
            && all(&steps, |step| step == 1),
    )
}

fn is_identity(graph: &Graph, shapes: &Shapes, node: NodeId, input: Outlet) -> Option<bool> {
    let op = graph.op(node)?;
    let same_shape = || {
        let dims = shapes.dims(input)?;
        // One unknown extent is settled by the count of elements, if there are any; two are not.
        let unknown = dims.iter().filter(|d| d.is_none()).count();
        let settled = unknown == 0 || unknown == 1 && dims.iter().flatten().all(|&d| d > 0);
        Some(settled && shapes.dims(node.out())? == dims)
    };
    let fully_known = || Some(shapes.known(input)? == shapes.known(node.out())?);
    Some(match op.standard()? {
        "Identity" => true,
        "Dropout" => {
            let trains = match graph.operand(node, 2) {
                Some(flag) => graph.constant(flag)?.i64s()?.first() != Some(&0),
                None => graph.opset() < 7 && op.int("is_test") != Some(1),
            };
            let mask_is_read =
                graph.output_count(node) > 1 && !graph.uses(node.at(1)).is_empty() || graph.is_output(node.at(1));
            !trains && !mask_is_read
        }
        "Cast" => {
            let from = shapes.fact(input)?.dtype?;
            DType::try_from(i32::try_from(op.int("to")?).ok()?).ok()? == from
        }
        "Transpose" => op.ints("perm")?.iter().copied().eq(0..op.ints("perm")?.len() as i64),
        "Concat" => graph.operands(node).len() == 1,
        "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" => same_shape()?,
        "Expand" => fully_known()?,
        // A slice or pad that keeps every extent keeps every element, unless it runs backwards or moves them.
        "Slice" => takes_all(graph, shapes, node)? || fully_known()? && graph.operand(node, 4).is_none(),
        "Pad" => {
            let pads = match graph.operand(node, 1) {
                Some(pads) => graph.constant(pads)?.i64s()?,
                None => op.ints("pads")?.to_vec(),
            };
            pads.iter().all(|&p| p == 0)
        }
        _ => false,
    })
}
