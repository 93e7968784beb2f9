//! Whether the element types in a graph fit together: runtimes ask before they load a file, even where they would not mind.

use std::collections::BTreeMap;

use super::{
    is_broadcasting,
    shapes::{Fact, Shapes},
};
use crate::ir::{DType, Graph, Op, Outlet};

/// Operators other than broadcasting ones whose operands are all of one type.
const ALIKE: &[&str] = &["Concat", "Conv", "ConvTranspose", "Einsum", "Gemm", "LayerNormalization", "MatMul"];

/// Whether each value of `graph`, and of the bodies in it, is of the type that the file declares of it, and the operands of each operator
/// that takes them of one type are so, as far as they are known.
#[must_use]
pub fn agree(graph: &Graph) -> bool {
    agree_in(graph, &Shapes::infer(graph, &BTreeMap::new()))
}

fn agree_in(graph: &Graph, shapes: &Shapes) -> bool {
    let dtype = |value: Outlet| shapes.fact(value)?.dtype;
    let is_as_declared = |(name, value): (&str, Outlet)| {
        let declared = graph.info(name).and_then(|info| Fact::declared(info).dtype);
        declared.zip(dtype(value)).is_none_or(|(declared, own)| declared == own)
    };
    let are_alike = |id| {
        let Some(op) = graph.op(id) else { return true };
        let operands = graph.operands(id);
        let mut types = alike(op, operands.len()).filter_map(|slot| dtype((*operands.get(slot)?)?));
        types.next().is_none_or(|first: DType| types.all(|other| other == first))
    };
    graph.values().into_iter().all(is_as_declared)
        && graph.ops().into_iter().all(are_alike)
        && graph.bodies().all(|(id, body)| agree_in(&body.graph, &shapes.inside(graph, id, &body.graph)))
}

/// Which of `count` operands are of one type.
fn alike(op: &Op, count: usize) -> Box<dyn Iterator<Item = usize>> {
    match op.standard() {
        // The exponent and the condition are of their own types.
        Some("Pow") => Box::new(0..0),
        Some("Where") => Box::new(1..count),
        // Codes and their zero points.
        Some("DequantizeLinear") => Box::new([0, 2].into_iter()),
        Some(op) if is_broadcasting(op) || ALIKE.contains(&op) => Box::new(0..count),
        _ => Box::new(0..0),
    }
}
