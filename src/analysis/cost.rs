//! What a model costs: parameters, bytes, multiply-adds.

use std::collections::BTreeMap;

use serde::Serialize;

use super::shapes::Shapes;
use crate::{
    codec::Model,
    ir::{Graph, Kind, NodeId},
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
    /// Multiply-adds of `Conv`, `ConvTranspose`, `Gemm` and `MatMul` in the main graph, where shapes are known.
    pub macs: u64,
}

impl Cost {
    /// The cost of `model` at the input shapes of `bound`.
    #[must_use]
    pub fn of(model: &Model, bound: &BTreeMap<String, Vec<usize>>) -> Self {
        let mut cost = Self { bytes: Self::bytes(model), ..Self::default() };
        cost.count(&model.graph);
        let shapes = Shapes::infer(&model.graph, bound);
        cost.macs = model.graph.node_ids().filter_map(|id| macs(&model.graph, &shapes, id)).sum();
        cost
    }

    /// Bytes of the message and of the data kept beside it.
    #[must_use]
    pub fn bytes(model: &Model) -> usize {
        prost::Message::encoded_len(&model.to_proto()) + external_bytes(&model.graph)
    }

    /// Nodes in all.
    #[must_use]
    pub fn node_count(&self) -> usize {
        self.nodes.values().sum()
    }

    fn count(&mut self, graph: &Graph) {
        for id in graph.node_ids() {
            match graph.kind(id) {
                Kind::Op(op) => *self.nodes.entry(op.op_type().to_owned()).or_default() += 1,
                Kind::Const(constant) => self.parameters += constant.weight.value().len(),
                Kind::Input | Kind::Capture(_) | Kind::Sparse(_) => {}
            }
        }
        for (_, body) in graph.bodies() {
            self.count(&body.graph);
        }
    }
}

fn external_bytes(graph: &Graph) -> usize {
    let own = graph.node_ids().map(|id| match graph.kind(id) {
        Kind::Const(constant) if constant.weight.value().is_external() => constant.weight.value().byte_len(),
        _ => 0,
    });
    own.sum::<usize>() + graph.bodies().map(|(_, body)| external_bytes(&body.graph)).sum::<usize>()
}

/// Multiply-adds of one node, where it has any and its shapes are known.
#[must_use]
pub fn macs(graph: &Graph, shapes: &Shapes, node: NodeId) -> Option<u64> {
    let product = |dims: &[usize]| dims.iter().map(|&d| d as u64).product::<u64>();
    let op = graph.op(node)?;
    let dims = |slot: u32| shapes.known(graph.operand(node, slot)?);
    let out = || shapes.known(node.out());
    Some(match op.standard()? {
        "Conv" => product(&out()?) * product(dims(1)?.get(1..)?),
        "ConvTranspose" => product(&dims(0)?) * product(dims(1)?.get(1..)?),
        "Gemm" => product(&out()?) * dims(0)?[usize::from(op.int("transA") != Some(1))] as u64,
        "MatMul" => product(&out()?) * *dims(0)?.last()? as u64,
        _ => return None,
    })
}
