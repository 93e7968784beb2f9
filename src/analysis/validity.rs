//! What runtimes refuse a file for, even where they would not mind: operators that an operator set does not have so, and element types
//! that do not fit together.

use std::{collections::BTreeMap, ops::RangeInclusive, sync::LazyLock};

use super::{
    is_broadcasting,
    shapes::{Fact, Shapes},
};
use crate::ir::{DType, Graph, NodeId, Op, Outlet};

/// How an operator is used from some operator set on.
struct Signature {
    since: i64,
    inputs: RangeInclusive<usize>,
    outputs: RangeInclusive<usize>,
    attributes: Vec<&'static str>,
}

/// The signatures of each standard operator, the oldest first, as the `onnx` package (1.23) tells them: `cargo xtask fixtures`.
static OPERATORS: LazyLock<BTreeMap<&str, Vec<Signature>>> = LazyLock::new(|| {
    let mut operators: BTreeMap<&str, Vec<Signature>> = BTreeMap::new();
    for line in include_str!("operators.txt").lines() {
        let mut words = line.split(' ');
        let name = words.next().unwrap_or_default();
        operators.entry(name).or_default().extend(signature(&mut words));
    }
    operators
});

fn signature(words: &mut dyn Iterator<Item = &'static str>) -> Option<Signature> {
    let range = |word: &str| {
        let (least, most) = word.split_once('-')?;
        Some(least.parse().ok()?..=if most.is_empty() { usize::MAX } else { most.parse().ok()? })
    };
    let since = words.next()?.parse().ok()?;
    let (inputs, outputs) = (range(words.next()?)?, range(words.next()?)?);
    Some(Signature { since, inputs, outputs, attributes: words.collect() })
}

/// Operators other than broadcasting ones whose operands are all of one type.
const ALIKE: &[&str] = &["Concat", "Conv", "ConvTranspose", "Einsum", "Gemm", "LayerNormalization", "MatMul"];

/// What of `graph`, or of a body in it, runtimes refuse: where it is, and what. `None` where nothing is known to be wrong.
#[must_use]
pub fn fault(graph: &Graph) -> Option<String> {
    fault_in(graph, &Shapes::infer(graph, &BTreeMap::new()))
}

fn fault_in(graph: &Graph, shapes: &Shapes) -> Option<String> {
    let dtype = |value: Outlet| shapes.fact(value)?.dtype;
    let declared = |(name, value): (&str, Outlet)| {
        let declared = graph.info(name).and_then(|info| Fact::declared(info).dtype)?;
        let own = dtype(value).filter(|own| *own != declared)?;
        Some(format!("value `{name}` is of {own:?}, and declared to be of {declared:?}"))
    };
    let node = |id: NodeId| {
        let op = graph.op(id)?;
        let what = misused(graph, id, op).or_else(|| mixed(graph, id, op, &dtype))?;
        Some(format!("node `{}` ({}) {what}", graph.label(id), op.op_type()))
    };
    let body = |(id, body): (NodeId, _)| fault_in(body, &shapes.inside(graph, id, body));
    let bodies = || graph.bodies().map(|(id, body)| (id, &body.graph));
    let values = graph.values().into_iter().collect::<BTreeMap<_, _>>();
    values
        .into_iter()
        .find_map(declared)
        .or_else(|| graph.ops().into_iter().find_map(node))
        .or_else(|| bodies().find_map(body))
}

/// What of a node its operator set does not have.
fn misused(graph: &Graph, id: NodeId, op: &Op) -> Option<String> {
    let (opset, signatures) = (graph.opset(), OPERATORS.get(op.standard()?)?);
    let Some(signature) = signatures.iter().rev().find(|signature| signature.since <= opset) else {
        return Some(format!("is none of operator set {opset}"));
    };
    let (inputs, outputs) = (graph.operands(id).len(), graph.output_count(id) as usize);
    if !signature.inputs.contains(&inputs) {
        return Some(format!("reads {inputs} values, and {:?} in operator set {opset}", signature.inputs));
    }
    if !signature.outputs.contains(&outputs) {
        return Some(format!("makes {outputs} values, and {:?} in operator set {opset}", signature.outputs));
    }
    let unknown = op.proto.attribute.iter().find(|attribute| !signature.attributes.contains(&attribute.name()))?;
    Some(format!("has an attribute `{}`, and none in operator set {opset}", unknown.name()))
}

/// Which operands of a node that are to be of one type are not.
fn mixed(graph: &Graph, id: NodeId, op: &Op, dtype: &dyn Fn(Outlet) -> Option<DType>) -> Option<String> {
    let operands = graph.operands(id);
    let mut types = alike(op, operands.len()).filter_map(|slot| dtype((*operands.get(slot)?)?));
    let first = types.next()?;
    let other = types.find(|other| *other != first)?;
    Some(format!("reads {first:?} and {other:?}, where it wants one type"))
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
