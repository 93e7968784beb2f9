//! From a model to text.

use std::{collections::BTreeMap, fmt::Write as _};

use crate::{
    codec::Model,
    ir::{Body, DType, Graph, Kind, Outlet, Storage, Tensor, Weight},
    proto::{
        AttributeProto, FunctionProto, GraphProto, NodeProto, OperatorSetIdProto, TensorProto, TensorShapeProto,
        TypeProto,
        attribute_proto::AttributeType,
        tensor_shape_proto::{Dimension, dimension},
        type_proto,
    },
};

/// Constants of more elements than this are written as a mark.
const MAX_INLINE: usize = 8;

/// `model` as text, each constant, declared value and node on a line of its own. A weight that is stored in fewer bytes has its form for its
/// mark: `affine4[1,64]` are integers of four bits, of which 1 by 64 have a scale.
#[must_use]
pub fn print(model: &Model) -> String {
    let proto = model.twin_proto();
    let mut out = Printer { text: String::new(), depth: 0 };
    out.line("<");
    out.depth += 1;
    out.line(&format!("ir_version: {},", proto.ir_version()));
    for (key, value) in [
        ("producer_name", &proto.producer_name),
        ("producer_version", &proto.producer_version),
        ("domain", &proto.domain),
    ] {
        if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
            out.line(&format!("{key}: {},", quoted(value)));
        }
    }
    if !proto.metadata_props.is_empty() {
        let entry = |entry: &crate::proto::StringStringEntryProto| {
            format!("{}: {}", quoted(entry.key()), quoted(entry.value()))
        };
        let entries: Vec<_> = proto.metadata_props.iter().map(entry).collect();
        out.line(&format!("metadata_props: [{}],", entries.join(", ")));
    }
    out.line(&format!("opset_import: [{}]", opsets(&proto.opset_import)));
    out.depth -= 1;
    out.line(">");
    if let Some(graph) = &proto.graph {
        out.graph(graph, Some(&model.graph), "");
    }
    for function in &proto.functions {
        out.function(function);
    }
    out.text
}

fn opsets(sets: &[OperatorSetIdProto]) -> String {
    let each = |set: &OperatorSetIdProto| format!("{}: {}", quoted(set.domain()), set.version());
    sets.iter().map(each).collect::<Vec<_>>().join(", ")
}

struct Printer {
    text: String,
    depth: usize,
}

impl Printer {
    fn line(&mut self, line: &str) {
        let _ = writeln!(self.text, "{:indent$}{line}", "", indent = 2 * self.depth);
    }

    /// Writes a graph; its first line begins with `prefix`.
    fn graph(&mut self, proto: &GraphProto, graph: Option<&Graph>, prefix: &str) {
        let held = graph.map(Held::new);
        let held = held.as_ref();
        let infos = |infos: &[crate::proto::ValueInfoProto]| {
            let each = infos.iter().map(|info| format!("{} {}", kind(info.r#type.as_ref()), id(info.name())));
            each.collect::<Vec<_>>().join(", ")
        };
        let (inputs, outputs) = (infos(&proto.input), infos(&proto.output));
        self.line(&format!("{prefix}{} ({inputs}) => ({outputs})", id(proto.name())));
        let mut listed = Vec::new();
        for tensor in &proto.initializer {
            let made = held.and_then(|held| held.constant(tensor.name()));
            listed.push(format!("{} {} = {}", tensor_kind(tensor), id(tensor.name()), data(tensor, made)));
        }
        for sparse in &proto.sparse_initializer {
            let values = sparse.values.clone().unwrap_or_default();
            let dims: Vec<_> = sparse.dims.iter().map(ToString::to_string).collect();
            let name = dtype(values.data_type());
            listed.push(format!(
                "sparse_tensor({name}[{}]) {} = {}",
                dims.join(","),
                id(values.name()),
                data(&values, None)
            ));
        }
        for info in &proto.value_info {
            listed.push(format!("{} {}", kind(info.r#type.as_ref()), id(info.name())));
        }
        if let Some(last) = listed.pop() {
            self.line("<");
            self.depth += 1;
            for entry in &listed {
                self.line(&format!("{entry},"));
            }
            self.line(&last);
            self.depth -= 1;
            self.line(">");
        }
        self.line("{");
        self.depth += 1;
        for node in &proto.node {
            self.node(node, held);
        }
        self.depth -= 1;
        self.line("}");
    }

    fn node(&mut self, node: &NodeProto, held: Option<&Held<'_>>) {
        let list = |names: &[String]| names.iter().map(|name| id(name)).collect::<Vec<_>>().join(", ");
        let label = if node.name().is_empty() { String::new() } else { format!("[{}] ", quoted(node.name())) };
        let op = match node.domain() {
            "" | "ai.onnx" => node.op_type().to_owned(),
            domain => format!("{domain}.{}", node.op_type()),
        };
        let made = node.output.first().and_then(|name| held?.constant(name));
        let is_body = |a: &&AttributeProto| matches!(a.r#type(), AttributeType::Graph | AttributeType::Graphs);
        let plain: Vec<_> = node.attribute.iter().filter(|a| !is_body(a)).map(|a| attribute(a, made)).collect();
        let attributes = if plain.is_empty() { String::new() } else { format!("<{}> ", plain.join(", ")) };
        let outputs = list(&node.output);
        self.line(&format!("{label}{outputs} = {op} {attributes}({})", list(&node.input)));
        let bodies = bodies(node, held);
        if bodies.is_empty() {
            return;
        }
        self.depth += 1;
        let last = bodies.len() - 1;
        for (i, (name, proto, body)) in bodies.into_iter().enumerate() {
            let open = if i == 0 { "<" } else { "" };
            self.graph(proto, body.map(|body| &body.graph), &format!("{open}{name} = "));
            let end = self.text.trim_end().len();
            self.text.truncate(end);
            self.text.push_str(if i == last { ">\n" } else { ",\n" });
        }
        self.depth -= 1;
    }

    fn function(&mut self, function: &FunctionProto) {
        let domain = quoted(function.domain());
        self.line(&format!("<domain: {domain}, opset_import: [{}]>", opsets(&function.opset_import)));
        let list = |names: &[String]| names.iter().map(|name| id(name)).collect::<Vec<_>>().join(", ");
        let attributes =
            if function.attribute.is_empty() { String::new() } else { format!("<{}> ", function.attribute.join(", ")) };
        let (inputs, outputs) = (list(&function.input), list(&function.output));
        self.line(&format!("{} {attributes}({inputs}) => ({outputs})", id(function.name())));
        self.line("{");
        self.depth += 1;
        for node in &function.node {
            self.node(node, None);
        }
        self.depth -= 1;
        self.line("}");
    }
}

/// What a graph holds, by name.
struct Held<'a> {
    graph: &'a Graph,
    values: BTreeMap<&'a str, Outlet>,
}

impl<'a> Held<'a> {
    fn new(graph: &'a Graph) -> Self {
        Self { graph, values: graph.values() }
    }

    fn constant(&self, name: &str) -> Option<&'a Weight> {
        match self.graph.kind(self.values.get(name)?.node) {
            Kind::Const(constant) => Some(&constant.weight),
            _ => None,
        }
    }

    fn bodies(&self, node: &NodeProto) -> Option<&'a [Body]> {
        let name = node.output.iter().find(|name| !name.is_empty())?;
        Some(&self.graph.op(self.values.get(name.as_str())?.node)?.bodies)
    }
}

/// The bodies of `node`: attribute, message, and what the graph holds of it.
fn bodies<'a>(node: &'a NodeProto, held: Option<&Held<'a>>) -> Vec<(&'a str, &'a GraphProto, Option<&'a Body>)> {
    let held = held.and_then(|held| held.bodies(node)).unwrap_or_default();
    let mut bodies = Vec::new();
    for attribute in &node.attribute {
        let single = attribute.g.iter().map(|graph| (None, graph));
        for (index, proto) in single.chain((0..).map(Some).zip(&attribute.graphs)) {
            let body = held.iter().find(|b| b.attribute == attribute.name() && b.index == index);
            bodies.push((attribute.name(), proto, body));
        }
    }
    bodies
}

/// A name as the syntax has it: bare where it is an identifier, else quoted, as the empty name of an omitted value is.
fn id(name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let number = matches!(name, "inf" | "NaN");
    let bare = name.chars().all(plain) && name.starts_with(|c: char| !c.is_ascii_digit()) && !number;
    if bare { name.to_owned() } else { quoted(name) }
}

pub(super) fn quoted(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn dtype(number: i32) -> String {
    DType::try_from(number).map_or_else(|_| format!("type{number}"), |dtype| dtype.as_str_name().to_lowercase())
}

/// The type of a value.
fn kind(of: Option<&TypeProto>) -> String {
    use type_proto::Value;
    let inner = |of: &Option<Box<TypeProto>>| kind(of.as_deref());
    let Some(of) = of else { return "undefined[]".to_owned() };
    match &of.value {
        Some(Value::TensorType(tensor)) => return tensor_type(tensor.elem_type(), tensor.shape.as_ref()),
        Some(Value::SequenceType(sequence)) => return format!("seq({})", inner(&sequence.elem_type)),
        Some(Value::MapType(map)) => return format!("map({}, {})", dtype(map.key_type()), inner(&map.value_type)),
        None => {}
    }
    if let Some(optional) = &of.optional_type {
        return format!("optional({})", inner(&optional.elem_type));
    }
    if let Some(sparse) = &of.sparse_tensor_type {
        return format!("sparse_tensor({})", tensor_type(sparse.elem_type(), sparse.shape.as_ref()));
    }
    match &of.opaque_type {
        Some(opaque) => format!("opaque({}, {})", id(opaque.domain()), id(opaque.name())),
        None => "undefined[]".to_owned(),
    }
}

fn tensor_type(elem_type: i32, shape: Option<&TensorShapeProto>) -> String {
    let name = dtype(elem_type);
    match shape {
        None => format!("{name}[]"),
        Some(shape) if shape.dim.is_empty() => name,
        Some(shape) => format!("{name}[{}]", shape.dim.iter().map(dim).collect::<Vec<_>>().join(",")),
    }
}

fn dim(dim: &Dimension) -> String {
    match &dim.value {
        Some(dimension::Value::DimValue(value)) => value.to_string(),
        Some(dimension::Value::DimParam(name)) if !name.is_empty() => id(name),
        _ => "?".to_owned(),
    }
}

fn tensor_kind(tensor: &TensorProto) -> String {
    let dims: Vec<_> = tensor.dims.iter().map(ToString::to_string).collect();
    let name = dtype(tensor.data_type());
    if dims.is_empty() { name } else { format!("{name}[{}]", dims.join(",")) }
}

/// The elements of a constant, or its mark; `weight` is what the graph holds in its place, if it does.
fn data(proto: &TensorProto, weight: Option<&Weight>) -> String {
    if let Some(form) = weight.and_then(|weight| form(weight.storage())) {
        return form;
    }
    let tensor = weight.map(|weight| weight.value().clone());
    let Some(tensor) = tensor.or_else(|| Tensor::carried(proto.clone(), None).ok()) else { return "?".to_owned() };
    if tensor.len() <= MAX_INLINE
        && let Some(elements) = elements(&tensor)
    {
        return format!("{{{}}}", elements.join(", "));
    }
    if tensor.is_made() && crate::ir::tensor::is_float(tensor.dtype()) {
        return "*".to_owned();
    }
    format!("#{:08x}", tensor.hash() as u32)
}

/// The mark of a form other than element by element.
fn form(storage: &Storage) -> Option<String> {
    let kind = match storage {
        Storage::Dense => return None,
        Storage::Half => return Some("half".to_owned()),
        Storage::Vectors(vectors) => {
            return Some(format!("codebook{}[{} at once]", vectors.codes().bits(), vectors.width()));
        }
        Storage::Affine(_) => "affine",
        Storage::Codebook(_) => "codebook",
    };
    let codes = storage.codes()?;
    let tile: Vec<_> = codes.tile().iter().map(ToString::to_string).collect();
    Some(format!("{kind}{}[{}]", codes.bits(), tile.join(",")))
}

fn elements(tensor: &Tensor) -> Option<Vec<String>> {
    if let Some(strings) = tensor.strings() {
        return Some(strings.iter().map(|s| quoted(&String::from_utf8_lossy(s))).collect());
    }
    if let Some(integers) = tensor.i64s() {
        return Some(integers.iter().map(ToString::to_string).collect());
    }
    match tensor.dtype() {
        DType::Double => Some(tensor.f64s()?.iter().map(|v| format!("{v:?}")).collect()),
        _ => Some(tensor.f32s()?.iter().map(|v| format!("{v:?}")).collect()),
    }
}

fn attribute(attribute: &AttributeProto, made: Option<&Weight>) -> String {
    let name = attribute.name();
    if let Some(reference) = attribute.ref_attr_name.as_ref().filter(|r| !r.is_empty()) {
        return format!("{name}: {} = @{reference}", attribute.r#type().as_str_name().to_lowercase());
    }
    let text = |s: &[u8]| quoted(&String::from_utf8_lossy(s));
    let list = |items: Vec<String>| {
        if items.is_empty() {
            format!("{name}: {} = []", attribute.r#type().as_str_name().to_lowercase())
        } else {
            format!("{name} = [{}]", items.join(", "))
        }
    };
    let tensor = |t: &TensorProto| format!("{} {}", tensor_kind(t), data(t, made));
    match attribute.r#type() {
        AttributeType::Int => format!("{name} = {}", attribute.i()),
        AttributeType::Float => format!("{name} = {:?}", attribute.f()),
        AttributeType::String => format!("{name} = {}", text(attribute.s())),
        AttributeType::Ints => list(attribute.ints.iter().map(ToString::to_string).collect()),
        AttributeType::Floats => list(attribute.floats.iter().map(|v| format!("{v:?}")).collect()),
        AttributeType::Strings => list(attribute.strings.iter().map(|s| text(s)).collect()),
        AttributeType::Tensor => format!("{name} = {}", attribute.t.as_ref().map(tensor).unwrap_or_default()),
        AttributeType::Tensors => list(attribute.tensors.iter().map(tensor).collect()),
        AttributeType::TypeProto => format!("{name}: type_proto = {}", kind(attribute.tp.as_ref())),
        other => format!("{name}: {} = ?", other.as_str_name().to_lowercase()),
    }
}
