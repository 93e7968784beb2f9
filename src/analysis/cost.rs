//! What a model costs: parameters, bytes, multiply-adds.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use serde::Serialize;

use super::shapes::Shapes;
use crate::{
    codec::Model,
    ir::{Graph, Kind, NodeId, Outlet, tensor::bits},
};

/// The cost of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cost {
    /// Nodes by operator, those of bodies included, `Constant` left out.
    pub nodes: BTreeMap<String, usize>,
    /// Elements of all constants.
    pub parameters: usize,
    /// Bytes as written, external data included.
    pub bytes: usize,
    /// Multiply-adds of `Conv`, `ConvTranspose`, `Gemm` and `MatMul`, bodies included, where shapes are known.
    pub macs: u64,
    /// Nanoseconds that running it takes by the [model of latency](Latency), bodies included, where shapes are known.
    pub latency: u64,
}

impl Cost {
    /// The cost of `model` at the input shapes of `bound`.
    #[must_use]
    pub fn of(model: &Model, bound: &BTreeMap<String, Vec<usize>>) -> Self {
        let mut cost = Self { bytes: Self::bytes(model), parameters: parameters(&model.graph), ..Self::default() };
        cost.count(&model.lowered().graph);
        let (macs, latency) = total(&model.graph, &Shapes::infer(&model.graph, bound));
        (cost.macs, cost.latency) = (macs.round() as u64, latency.round() as u64);
        cost
    }

    /// Bytes of the message and of the data kept beside it.
    #[must_use]
    pub fn bytes(model: &Model) -> usize {
        let written = model.lowered();
        prost::Message::encoded_len(&written.to_proto()) + external_bytes(&written.graph)
    }

    /// Nodes in all.
    #[must_use]
    pub fn node_count(&self) -> usize {
        self.nodes.values().sum()
    }

    /// A table of this cost and `after`: operators whose count changed, then parameters, bytes and multiply-adds.
    #[must_use]
    pub fn compared_to(&self, after: &Self) -> String {
        let mut text = String::new();
        // Without a shape, there are no multiply-adds.
        let other_macs = after.macs;
        let mut row = |what: &str, before: u64, after: u64| {
            let is_known = self.macs > 0 || other_macs == 0 || !["MACs", "modelled latency in ns"].contains(&what);
            let change = match before {
                _ if !is_known => "not known".to_owned(),
                0 if after > 0 => "new".to_owned(),
                0 => "+0.0 %".to_owned(),
                _ => format!("{:+.1} %", (after as f64 / before as f64 - 1.0) * 100.0),
            };
            let _ = writeln!(text, "{what:<26} {before:>14} {after:>14} {change:>9}");
        };
        row("nodes", self.node_count() as u64, after.node_count() as u64);
        let ops: BTreeSet<_> = self.nodes.keys().chain(after.nodes.keys()).collect();
        for op in ops {
            let count = |cost: &Self| cost.nodes.get(op).copied().unwrap_or_default() as u64;
            if count(self) != count(after) {
                row(&format!("  {op}"), count(self), count(after));
            }
        }
        row("parameters", self.parameters as u64, after.parameters as u64);
        row("bytes", self.bytes as u64, after.bytes as u64);
        row("MACs", self.macs, after.macs);
        row("modelled latency in ns", self.latency, after.latency);
        text
    }

    fn count(&mut self, graph: &Graph) {
        for id in graph.node_ids() {
            match graph.kind(id) {
                Kind::Op(op) => *self.nodes.entry(op.op_type().to_owned()).or_default() += 1,
                Kind::Input | Kind::Const(_) | Kind::Capture(_) | Kind::Sparse(_) => {}
            }
        }
        for (_, body) in graph.bodies() {
            self.count(&body.graph);
        }
    }
}

/// Elements of all constants, those of bodies included.
fn parameters(graph: &Graph) -> usize {
    let own = graph.node_ids().map(|id| match graph.kind(id) {
        Kind::Const(constant) => constant.weight.value().len(),
        _ => 0,
    });
    own.sum::<usize>() + graph.bodies().map(|(_, body)| parameters(&body.graph)).sum::<usize>()
}

fn external_bytes(graph: &Graph) -> usize {
    let own = graph.node_ids().map(|id| match graph.kind(id) {
        Kind::Const(constant) if constant.weight.value().is_external() => constant.weight.value().byte_len(),
        _ => 0,
    });
    own.sum::<usize>() + graph.bodies().map(|(_, body)| external_bytes(&body.graph)).sum::<usize>()
}

/// Multiply-adds and modelled latency of a graph and of the bodies in it, each counted once.
fn total(graph: &Graph, shapes: &Shapes) -> (f64, f64) {
    let own = graph.node_ids().map(|id| {
        let latency = latency(graph, shapes, id).map_or(0.0, |latency| latency.total());
        (macs(graph, shapes, id).unwrap_or(0.0), latency)
    });
    let inside = graph.bodies().map(|(id, body)| total(&body.graph, &shapes.inside(graph, id, &body.graph)));
    own.chain(inside).fold((0.0, 0.0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
}

/// About how long running `graph` takes: its multiply-adds and the elements of its values, where shapes are known.
#[must_use]
pub fn work(graph: &Graph, shapes: &Shapes) -> u64 {
    let made = graph.node_ids().filter(|&id| graph.constant(id.out()).is_none());
    let values = made.flat_map(|id| (0..graph.output_count(id)).map(move |slot| id.at(slot)));
    let elements = |value| shapes.known(value).map_or(0.0, |dims| dims.iter().map(|&d| d as f64).product());
    (total(graph, shapes).0 + WORK_OF_ELEMENT * values.map(elements).sum::<f64>()) as u64
}

/// Multiply-adds that take as long as writing an element.
const WORK_OF_ELEMENT: f64 = 16.0;

/// Nanoseconds that running one node takes by a model of three parts, a table of primitives (algorithms.md §13.3) in its simplest
/// form: fitted to what onnxruntime takes for chains of one layer on one core with AVX-512, so it tells which of two models is
/// faster better than how long either takes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Latency {
    /// For multiply-adds.
    pub products: f64,
    /// For reading the constant that is the weights of a matrix product, each of which is used a few times only.
    pub weights: Option<(Outlet, f64)>,
    /// For reading and writing values.
    pub results: f64,
}

impl Latency {
    /// A multiply-add of a convolution or of a product of large matrices.
    pub const PRODUCT: f64 = 0.009;
    /// A weight that comes from memory.
    pub const WEIGHT: f64 = 0.13;
    /// An element of a result.
    pub const RESULT: f64 = 0.1;

    /// An element that a `Gather` takes by itself.
    pub const GATHERED: f64 = 7.5;

    /// All parts.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.products + self.weights.map_or(0.0, |(_, time)| time) + self.results
    }
}

/// What running one node takes; `None` where it computes nothing or its shape is not known.
#[must_use]
pub fn latency(graph: &Graph, shapes: &Shapes, node: NodeId) -> Option<Latency> {
    const VIEWS: &[&str] = &["Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape", "Constant", "Dropout"];
    let op = graph.op(node)?;
    let kind = op.standard().filter(|kind| !VIEWS.contains(kind))?;
    let size = |value: Outlet| Some(shapes.known(value)?.iter().map(|&d| d as f64).product::<f64>());
    let read = |slot: u32| {
        let value = graph.operand(node, slot).filter(|&value| graph.constant(value).is_some())?;
        Some((value, size(value)? * Latency::WEIGHT))
    };
    Some(Latency {
        products: macs(graph, shapes, node).unwrap_or(0.0) * Latency::PRODUCT,
        weights: match kind {
            "Gemm" | "MatMul" => read(0).or_else(|| read(1)),
            // Along rows, that is a product of matrices.
            "Conv" if shapes.known(graph.operand(node, 1)?)?.get(2..) == Some(&[1]) => read(1),
            _ => None,
        },
        results: size(node.out())?
            * if is_scattered(graph, shapes, node) { Latency::GATHERED } else { Latency::RESULT },
    })
}

/// Whether a node is a `Gather` along the last axis, which takes element by element.
fn is_scattered(graph: &Graph, shapes: &Shapes, node: NodeId) -> bool {
    let rank = graph.op_of(node, "Gather").and_then(|_| shapes.rank(graph.operand(node, 0)?));
    let axis = graph.op(node).and_then(|op| op.int("axis")).unwrap_or(0);
    rank.is_some_and(|rank| rank > 1 && (axis == -1 || axis == rank as i64 - 1))
}

/// Multiply-adds of one node, where it has any and its shapes are known.
#[must_use]
pub fn macs(graph: &Graph, shapes: &Shapes, node: NodeId) -> Option<f64> {
    let product = |dims: &[usize]| dims.iter().map(|&d| d as f64).product::<f64>();
    let op = graph.op(node)?;
    let dims = |slot: u32| shapes.known(graph.operand(node, slot)?);
    let out = || shapes.known(node.out());
    Some(match op.standard()? {
        "Conv" | "ConvInteger" => product(&out()?) * product(dims(1)?.get(1..)?),
        "ConvTranspose" => product(&dims(0)?) * product(dims(1)?.get(1..)?),
        "Gemm" => product(&out()?) * *dims(0)?.get(usize::from(op.int("transA") != Some(1)))? as f64,
        "QLinearConv" => product(&out()?) * product(dims(3)?.get(1..)?),
        "MatMul" | "MatMulInteger" | "QLinearMatMul" => product(&out()?) * *dims(0)?.last()? as f64,
        _ => return None,
    })
}

/// Bytes that running `graph` takes at the shapes of `shapes`: its constants, and the most that its values take at once
/// when each is dropped after its last reader. Values of unknown shape count nothing.
#[must_use]
pub fn peak_memory(graph: &Graph, shapes: &Shapes) -> u64 {
    let order = graph.order();
    let size = |value: Outlet| {
        let fact = shapes.fact(value)?;
        let count = shapes.known(value)?.iter().try_fold(1_u64, |n, &d| n.checked_mul(d as u64));
        Some(count.unwrap_or(u64::MAX / 64).saturating_mul(bits(fact.dtype?) as u64) / 8)
    };
    let mut last_read: BTreeMap<Outlet, NodeId> = BTreeMap::new();
    for &id in &order {
        last_read.extend(graph.operands(id).into_iter().flatten().map(|value| (value, id)));
        last_read.extend(graph.captures(id).into_values().map(|value| (value, id)));
    }
    let (mut constants, mut live, mut peak) = (0_u64, 0_u64, 0_u64);
    for &id in &order {
        if let Kind::Const(constant) = graph.kind(id) {
            constants = constants.saturating_add(constant.weight.value().byte_len() as u64);
            continue;
        }
        let made = (0..graph.output_count(id)).filter_map(|slot| size(id.at(slot)));
        live = made.fold(live, u64::saturating_add);
        peak = peak.max(live);
        let mut read: Vec<_> =
            graph.operands(id).into_iter().flatten().chain(graph.captures(id).into_values()).collect();
        read.sort_unstable();
        read.dedup();
        for value in read {
            let is_last = last_read.get(&value) == Some(&id) && !graph.is_output(value);
            if is_last && graph.weight(value).is_none() {
                live = live.saturating_sub(size(value).unwrap_or(0));
            }
        }
    }
    constants.saturating_add(peak)
}
