//! From a [`Graph`] to a message.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::Model;
use crate::{
    ir::{Graph, Kind, NodeId, Op, Origin, Outlet, fresh},
    proto::{AttributeProto, GraphProto, ModelProto, NodeProto, ValueInfoProto},
};

/// The first IR version in which an initializer need not be listed as an input.
const UNLISTED_INITIALIZERS: i64 = 4;

pub(super) fn model(model: &Model) -> ModelProto {
    let graph = graph(&model.graph, &BTreeMap::new(), &HashSet::new());
    let mut proto = ModelProto { graph: Some(graph), ..model.rest.clone() };
    if model.graph.edits() > 0 && proto.ir_version() < UNLISTED_INITIALIZERS {
        proto.ir_version = Some(UNLISTED_INITIALIZERS);
    }
    proto
}

/// The message of `graph`; `outer` are the names of the values it captures, by number, and `around` those of all values
/// around it, which none in it may have.
fn graph(graph: &Graph, outer: &BTreeMap<u32, String>, around: &HashSet<String>) -> GraphProto {
    let names = Names::new(graph, outer, around);
    let mut inside = HashSet::new();
    if graph.bodies().next().is_some() {
        inside.extend(around.iter().cloned());
        inside.extend(graph.values().into_values().map(|value| names.of(value)));
    }
    let mut proto = graph.rest.clone();
    // A file that nobody edited is written in its own order, sorted or not.
    let is_as_read = graph.edits() == 0;
    let order = if is_as_read { graph.file_order() } else { graph.order() };
    for id in order {
        match graph.kind(id) {
            Kind::Input | Kind::Capture(_) => {}
            Kind::Sparse(sparse) => proto.sparse_initializer.push(sparse.as_ref().clone()),
            Kind::Const(constant) => {
                let mut tensor = constant.weight.value().to_proto();
                match &constant.origin {
                    Origin::Initializer => {
                        tensor.name = Some(names.of(id.out()));
                        proto.initializer.push(tensor);
                    }
                    Origin::Node { proto: node, payload } => {
                        let mut payload = AttributeProto::clone(payload);
                        if payload.name() == "value" {
                            payload.t = Some(tensor);
                        }
                        let output = vec![names.of(id.out())];
                        proto.node.push(NodeProto { output, attribute: vec![payload], ..node.as_ref().clone() });
                    }
                }
            }
            Kind::Op(op) => proto.node.push(node(graph, id, op, &names, &inside)),
        }
    }
    proto.input = graph.inputs().iter().map(|input| called(&input.info, names.of(input.node.out()))).collect();
    proto.output = graph.outputs().iter().map(|output| called(&output.info, names.of(output.value))).collect();
    let known = graph.values();
    let declared = |name: &str| {
        let renamed = known.get(name).is_some_and(|value| names.changed.contains_key(value));
        is_as_read || known.contains_key(name) && !renamed
    };
    proto.value_info = graph.value_info.iter().filter(|info| declared(info.name())).cloned().collect();
    proto
}

/// `info` of a value called `name`.
fn called(info: &ValueInfoProto, name: String) -> ValueInfoProto {
    let mut info = info.clone();
    if info.name() != name {
        info.name = Some(name);
    }
    info
}

fn node(graph: &Graph, id: NodeId, op: &Op, names: &Names<'_>, around: &HashSet<String>) -> NodeProto {
    let mut proto = op.proto.clone();
    proto.input = graph.operands(id).into_iter().map(|value| value.map_or_else(String::new, |v| names.of(v))).collect();
    proto.output = (0..graph.output_count(id)).map(|slot| names.of(id.at(slot))).collect();
    let captured = graph.captures(id).into_iter().map(|(i, value)| (i, names.of(value))).collect();
    for body in &op.bodies {
        let message = self::graph(&body.graph, &captured, around);
        let Some(attribute) = proto.attribute.iter_mut().find(|a| a.name() == body.attribute) else { continue };
        match body.index {
            None => attribute.g = Some(message),
            Some(_) => attribute.graphs.push(message),
        }
    }
    proto
}

/// What the values of a graph are called in the file: their own names, but captured values have those of the outer
/// graph, and a value that would hide one around it gets another.
struct Names<'a> {
    graph: &'a Graph,
    changed: HashMap<Outlet, String>,
}

impl<'a> Names<'a> {
    fn new(graph: &'a Graph, outer: &BTreeMap<u32, String>, around: &HashSet<String>) -> Self {
        let mut changed = HashMap::new();
        for id in graph.node_ids() {
            if let Kind::Capture(i) = graph.kind(id) {
                changed.extend(outer.get(i).map(|name| (id.out(), name.clone())));
                continue;
            }
            for value in (0..graph.output_count(id)).map(|slot| id.at(slot)) {
                let name = graph.name(value);
                if around.contains(name) {
                    let taken = |n: &str| graph.names().contains(n) || around.contains(n);
                    changed.insert(value, fresh(name, taken));
                }
            }
        }
        Self { graph, changed }
    }

    fn of(&self, value: Outlet) -> String {
        self.changed.get(&value).map_or_else(|| self.graph.name(value).to_owned(), Clone::clone)
    }
}
