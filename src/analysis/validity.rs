//! What runtimes refuse files for: operators that an operator set does not have so, and element types that do not fit together.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::RangeInclusive,
    sync::LazyLock,
};

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

/// What runtimes refuse a graph for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    /// Where it is: a name, which passes may change.
    pub place: String,
    /// What is wrong.
    pub kind: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.place, self.kind)
    }
}

/// What of `graph` and of the bodies in it runtimes refuse.
#[must_use]
pub fn faults(graph: &Graph) -> BTreeSet<Fault> {
    let mut faults = BTreeSet::new();
    collect(graph, &Shapes::infer(graph, &BTreeMap::new()), &mut faults);
    faults
}

fn collect(graph: &Graph, shapes: &Shapes, faults: &mut BTreeSet<Fault>) {
    let dtype = |value: Outlet| shapes.fact(value)?.dtype;
    let interface =
        graph.inputs().iter().map(|input| &input.info).chain(graph.outputs().iter().map(|output| &output.info));
    let known = graph.values();
    for info in interface.chain(&graph.value_info) {
        let own = known.get(info.name()).copied().and_then(dtype);
        if let Some((own, declared)) = own.zip(Fact::declared(info).dtype).filter(|(own, declared)| own != declared) {
            let kind = format!("is of {own:?}, and declared to be of {declared:?}");
            faults.insert(Fault { place: format!("value `{}`", info.name()), kind });
        }
    }
    for id in graph.ops() {
        let Some(op) = graph.op(id) else { continue };
        if let Some(what) = misused(graph, id, op).or_else(|| mixed(graph, id, op, &dtype)) {
            let kind = format!("({}) {what}", op.op_type());
            faults.insert(Fault { place: format!("node `{}`", graph.label(id)), kind });
        }
    }
    for (id, body) in graph.bodies() {
        collect(&body.graph, &shapes.inside(graph, id, &body.graph), faults);
    }
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
