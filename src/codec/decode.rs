//! From a message to a [`Graph`].

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use bytes::Bytes;
use prost::Message;

use super::{CodecError, Model, Runtime, Source, external::Files};
use crate::{
    ir::{Body, Const, Graph, Inlet, Kind, NodeId, Op, Origin, Outlet, Tensor, Weight},
    proto::{
        GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, TrainingInfoProto,
        attribute_proto::AttributeType,
    },
};

/// Space between the positions of neighbours in the file.
const STEP: u64 = 1 << 16;
/// Deeper nesting of bodies than this is refused; real models have a handful of levels.
const MAX_DEPTH: usize = 64;

pub(super) fn model(bytes: Bytes, folder: Option<&Path>) -> Result<Model, CodecError> {
    if bytes.is_empty() {
        return Err(CodecError::Empty);
    }
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(CodecError::LfsPointer);
    }
    let mut rest = ModelProto::decode(bytes.clone()).map_err(CodecError::NotOnnx)?;
    let unknown = bytes.len().saturating_sub(rest.encoded_len());
    let proto = rest.graph.take().ok_or(CodecError::NoGraph)?;
    let standard = rest.opset_import.iter().find(|set| matches!(set.domain(), "" | "ai.onnx"));
    let mut decoder = Decoder {
        opset: standard.map_or(1, super::super::proto::OperatorSetIdProto::version),
        files: Files::new(folder),
    };
    let mut scope = decoder.graph(proto, 0)?;
    scope.graph.trained = mentioned(&rest.training_info);
    if let Some((value, node)) = scope.captured.first() {
        return Err(CodecError::Dangling { node: node.clone(), value: value.clone() });
    }
    scope.graph.check()?;
    let Files { paths, bytes: external_bytes, .. } = decoder.files;
    let source = Source { path: None, bytes, external: paths, external_bytes, unknown };
    Ok(Model { graph: scope.graph, runtime: Runtime::default(), rest, source })
}

/// The names that training information reads, binds or makes.
fn mentioned(training: &[TrainingInfoProto]) -> HashSet<String> {
    let bindings = training.iter().flat_map(|info| info.initialization_binding.iter().chain(&info.update_binding));
    let bound = bindings.flat_map(|binding| [binding.key(), binding.value()]);
    let graphs = training.iter().flat_map(|info| info.initialization.iter().chain(&info.algorithm));
    let nodes = graphs.flat_map(|graph| &graph.node);
    let read = nodes.flat_map(|node| &node.input).map(String::as_str);
    bound.chain(read).filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

struct Decoder<'a> {
    opset: i64,
    files: Files<'a>,
}

/// A graph under construction.
struct Scope {
    graph: Graph,
    made: HashMap<String, Outlet>,
    /// Values of outer graphs that are read here, by number, with a node that reads each.
    captured: Vec<(String, String)>,
}

impl Scope {
    fn declare(&mut self, kind: Kind, names: Vec<String>, position: u64) -> Result<NodeId, CodecError> {
        let id = self.graph.add_node(kind, names, position);
        for slot in 0..self.graph.output_count(id) {
            let name = self.graph.name(id.at(slot)).to_owned();
            if !name.is_empty() && self.made.insert(name.clone(), id.at(slot)).is_some() {
                return Err(CodecError::SameName(name));
            }
        }
        Ok(id)
    }

    /// The value called `name`, which `reader` reads: one of this graph, or a captured one.
    fn resolve(&mut self, name: &str, reader: &str) -> Outlet {
        if let Some(&value) = self.made.get(name) {
            return value;
        }
        let number = self.captured.len() as u32;
        self.captured.push((name.to_owned(), reader.to_owned()));
        let value = self.graph.add_node(Kind::Capture(number), vec![name.to_owned()], u64::from(number)).out();
        self.made.insert(name.to_owned(), value);
        value
    }
}

impl Decoder<'_> {
    fn graph(&mut self, proto: GraphProto, depth: usize) -> Result<Scope, CodecError> {
        if depth > MAX_DEPTH {
            return Err(CodecError::TooDeep(MAX_DEPTH));
        }
        // Exhaustive, so that a field added to onnx.proto can't be forgotten here.
        let GraphProto {
            node,
            name,
            initializer,
            doc_string,
            input,
            output,
            value_info,
            quantization_annotation,
            sparse_initializer,
            metadata_props,
        } = proto;
        let mut graph = Graph::new(self.opset);
        graph.declare(value_info);
        graph.rest = GraphProto { name, doc_string, quantization_annotation, metadata_props, ..GraphProto::default() };
        let mut scope = Scope { graph, made: HashMap::new(), captured: Vec::new() };
        self.constants(&mut scope, initializer, sparse_initializer)?;
        for (position, info) in (0..).zip(input) {
            let default = scope.made.get(info.name()).map(|value| value.node);
            let node = match default {
                Some(node) if matches!(scope.graph.kind(node), Kind::Const(_)) => node,
                _ => scope.declare(Kind::Input, vec![info.name().to_owned()], position)?,
            };
            scope.graph.push_input(node, info);
        }
        self.nodes(&mut scope, node, depth)?;
        for info in output {
            let value = scope.resolve(info.name(), "the list of outputs");
            scope.graph.push_output(value, info);
        }
        Ok(scope)
    }

    fn constants(
        &mut self,
        scope: &mut Scope,
        dense: Vec<TensorProto>,
        sparse: Vec<SparseTensorProto>,
    ) -> Result<(), CodecError> {
        for (position, proto) in (0..).zip(dense) {
            let name = proto.name().to_owned();
            let weight = Weight::dense(self.tensor(&name, proto)?);
            let constant = Const { weight, origin: Origin::Initializer, overridable: false };
            scope.declare(Kind::Const(constant), vec![name], position * STEP)?;
        }
        for (position, proto) in (0..).zip(sparse) {
            let name = proto.values.as_ref().map_or("", TensorProto::name).to_owned();
            scope.declare(Kind::Sparse(Box::new(proto)), vec![name], position * STEP)?;
        }
        Ok(())
    }

    /// Declares what every node makes, then wires what it reads: a file need not be sorted.
    fn nodes(&mut self, scope: &mut Scope, nodes: Vec<NodeProto>, depth: usize) -> Result<(), CodecError> {
        let mut unwired = Vec::with_capacity(nodes.len());
        for (position, mut proto) in (0..).zip(nodes) {
            let inputs = std::mem::take(&mut proto.input);
            let outputs = std::mem::take(&mut proto.output);
            let (kind, captured) = self.node(proto, &inputs, &outputs, depth)?;
            let id = scope.declare(kind, outputs, position * STEP)?;
            unwired.push((id, inputs, captured));
        }
        for (id, inputs, captured) in unwired {
            let label = scope.graph.label(id).to_owned();
            for (slot, name) in (0..).zip(&inputs).filter(|(_, name)| !name.is_empty()) {
                let value = scope.resolve(name, &label);
                scope.graph.wire(value, id, Inlet::Slot(slot));
            }
            for (i, name) in (0..).zip(&captured) {
                let value = scope.resolve(name, &label);
                scope.graph.wire(value, id, Inlet::Captured(i));
            }
        }
        Ok(())
    }

    /// What a node is, and the names that its bodies capture.
    fn node(
        &mut self,
        mut proto: NodeProto,
        inputs: &[String],
        outputs: &[String],
        depth: usize,
    ) -> Result<(Kind, Vec<String>), CodecError> {
        if inputs.is_empty()
            && outputs.len() == 1
            && let Some(constant) = self.constant(&mut proto, &outputs[0])?
        {
            return Ok((Kind::Const(constant), Vec::new()));
        }
        let mut op = Op { proto, arity: inputs.len(), bodies: Vec::new() };
        let mut captured: Vec<String> = Vec::new();
        for attribute in &mut op.proto.attribute {
            let single = attribute.g.take().map(|graph| (None, graph));
            let listed = (0..).map(Some).zip(std::mem::take(&mut attribute.graphs));
            for (index, graph) in single.into_iter().chain(listed) {
                let mut scope = self.graph(graph, depth + 1)?;
                let numbers = scope.captured.iter().map(|(name, _)| {
                    let known = captured.iter().position(|c| c == name);
                    known.unwrap_or_else(|| {
                        captured.push(name.clone());
                        captured.len() - 1
                    }) as u32
                });
                let numbers: Vec<_> = numbers.collect();
                scope.graph.renumber_captures(|i| numbers[i as usize]);
                let attribute = attribute.name().to_owned();
                op.bodies.push(Body { attribute, index, graph: scope.graph });
            }
        }
        Ok((Kind::Op(Box::new(op)), captured))
    }

    /// The constant that a `Constant` node holds, if its value is a tensor or numbers.
    fn constant(&mut self, proto: &mut NodeProto, name: &str) -> Result<Option<Const>, CodecError> {
        if proto.op_type() != "Constant" || !matches!(proto.domain(), "" | "ai.onnx") {
            return Ok(None);
        }
        let [attribute] = &mut proto.attribute[..] else { return Ok(None) };
        let value = match (attribute.name(), attribute.r#type()) {
            ("value", AttributeType::Tensor | AttributeType::Undefined) => match attribute.t.take() {
                Some(tensor) => self.tensor(name, tensor)?,
                None => return Ok(None),
            },
            ("value_float", AttributeType::Float) => Tensor::f32(&[], &[attribute.f()]),
            ("value_floats", AttributeType::Floats) => Tensor::f32(&[attribute.floats.len()], &attribute.floats),
            ("value_int", AttributeType::Int) => Tensor::i64(&[], &[attribute.i()]),
            ("value_ints", AttributeType::Ints) => Tensor::i64(&[attribute.ints.len()], &attribute.ints),
            _ => return Ok(None),
        };
        let payload = Box::new(proto.attribute.pop().unwrap_or_default());
        let origin = Origin::Node { proto: Box::new(std::mem::take(proto)), payload };
        Ok(Some(Const { weight: Weight::dense(value), origin, overridable: false }))
    }

    fn tensor(&mut self, name: &str, proto: TensorProto) -> Result<Tensor, CodecError> {
        let external =
            self.files.fetch(&proto).map_err(|source| CodecError::External { name: name.to_owned(), source })?;
        Tensor::carried(proto, external).map_err(|source| CodecError::Tensor { name: name.to_owned(), source })
    }
}
