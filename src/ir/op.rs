//! Operators: what a node does, without its wiring, which the graph owns.

use prost::Message;

use crate::{
    ir::{Graph, Tensor},
    proto::{AttributeProto, NodeProto, attribute_proto::AttributeType},
};

/// An operator: type, domain, attributes, bodies, and whatever else its message says.
#[derive(Clone, Debug, Default)]
pub struct Op {
    /// The message, its inputs, outputs and subgraph bodies taken out.
    pub(crate) proto: NodeProto,
    /// How many inputs the file lists, omitted ones included.
    pub(crate) arity: usize,
    /// The bodies of `If`, `Loop` and `Scan`.
    pub bodies: Vec<Body>,
}

/// A subgraph, and the attribute that holds it.
#[derive(Clone, Debug)]
pub struct Body {
    /// For instance `then_branch`.
    pub attribute: String,
    /// Which one, where the attribute is a list of graphs.
    pub index: Option<usize>,
    /// The subgraph. Its [`Kind::Capture`](crate::ir::Kind::Capture) nodes stand for the captured values of the node.
    pub graph: Graph,
}

impl Op {
    /// An operator of the standard domain, without attributes or a name.
    #[must_use]
    pub fn new(op_type: &str) -> Self {
        Self { proto: NodeProto { op_type: Some(op_type.to_owned()), ..NodeProto::default() }, ..Self::default() }
    }

    /// The same with an integer attribute.
    #[must_use]
    pub fn with_int(mut self, name: &str, value: i64) -> Self {
        self.set(AttributeProto { i: Some(value), ..attribute(name, AttributeType::Int) });
        self
    }

    /// The same with an attribute of several integers.
    #[must_use]
    pub fn with_ints(mut self, name: &str, values: &[i64]) -> Self {
        self.set(AttributeProto { ints: values.to_vec(), ..attribute(name, AttributeType::Ints) });
        self
    }

    /// The same with a floating-point attribute.
    #[must_use]
    pub fn with_float(mut self, name: &str, value: f32) -> Self {
        self.set(AttributeProto { f: Some(value), ..attribute(name, AttributeType::Float) });
        self
    }

    /// The same with an attribute that is text.
    #[must_use]
    pub fn with_string(mut self, name: &str, value: &str) -> Self {
        self.set(AttributeProto { s: Some(value.to_owned().into()), ..attribute(name, AttributeType::String) });
        self
    }

    /// The same without the attribute `name`.
    #[must_use]
    pub fn without(mut self, name: &str) -> Self {
        self.proto.attribute.retain(|attribute| attribute.name() != name);
        self
    }

    /// The same called `name`.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.proto.name = Some(name.to_owned()).filter(|name| !name.is_empty());
        self
    }

    /// The same with the name, doc string and metadata of `old`, whose node it becomes.
    #[must_use]
    pub fn in_place_of(mut self, old: &Self) -> Self {
        self.proto.name.clone_from(&old.proto.name);
        self.proto.doc_string.clone_from(&old.proto.doc_string);
        self.proto.metadata_props.clone_from(&old.proto.metadata_props);
        self
    }

    /// For instance `Conv`.
    #[must_use]
    pub fn op_type(&self) -> &str {
        self.proto.op_type()
    }

    /// The domain of the operator set; empty for the standard one.
    #[must_use]
    pub fn domain(&self) -> &str {
        match self.proto.domain() {
            "ai.onnx" => "",
            domain => domain,
        }
    }

    /// The name of the node, which may be empty.
    #[must_use]
    pub fn name(&self) -> &str {
        self.proto.name()
    }

    /// Whether this is the standard operator `op_type`.
    #[must_use]
    pub fn is(&self, op_type: &str) -> bool {
        self.op_type() == op_type && self.domain().is_empty()
    }

    /// The standard operator's type; `None` for one of another domain.
    #[must_use]
    pub fn standard(&self) -> Option<&str> {
        self.domain().is_empty().then(|| self.op_type())
    }

    /// The type of the standard operator that computes the same: the operator itself, or the one that onnxruntime's own
    /// `QuantizeLinear` and
    /// `DequantizeLinear` extend to more types.
    #[must_use]
    pub fn meaning(&self) -> Option<&str> {
        let is_extended =
            self.domain() == "com.microsoft" && matches!(self.op_type(), "QuantizeLinear" | "DequantizeLinear");
        if is_extended { Some(self.op_type()) } else { self.standard() }
    }

    /// What makes two operators on equal operands compute the same: type, domain and attributes. `None` where nothing
    /// does: for random draws, for operators with bodies, and for those of other domains, which may keep a state.
    #[must_use]
    pub(crate) fn signature(&self) -> Option<Vec<u8>> {
        if !self.bodies.is_empty() || self.standard().is_none_or(|op| RANDOM.contains(&op)) {
            return None;
        }
        let mut proto = self.proto.clone();
        (proto.name, proto.doc_string) = (None, None);
        proto.metadata_props.clear();
        Some(proto.encode_to_vec())
    }

    /// All attributes, in file order, subgraphs taken out.
    #[must_use]
    pub fn attributes(&self) -> &[AttributeProto] {
        &self.proto.attribute
    }

    /// The attribute called `name`.
    #[must_use]
    pub fn attribute(&self, name: &str) -> Option<&AttributeProto> {
        self.proto.attribute.iter().find(|a| a.name() == name)
    }

    /// An integer attribute; zero where the file leaves its value out, as some writers do.
    #[must_use]
    pub fn int(&self, name: &str) -> Option<i64> {
        self.attribute(name).filter(|a| a.i.is_some() || a.r#type() == AttributeType::Int).map(AttributeProto::i)
    }

    /// An attribute of several integers.
    #[must_use]
    pub fn ints(&self, name: &str) -> Option<&[i64]> {
        self.attribute(name).map(|a| a.ints.as_slice())
    }

    /// A floating-point attribute; zero where the file leaves its value out.
    #[must_use]
    pub fn float(&self, name: &str) -> Option<f32> {
        self.attribute(name).filter(|a| a.f.is_some() || a.r#type() == AttributeType::Float).map(AttributeProto::f)
    }

    /// A string attribute.
    #[must_use]
    pub fn string(&self, name: &str) -> Option<&str> {
        self.attribute(name).and_then(|a| std::str::from_utf8(a.s()).ok())
    }

    /// A tensor attribute.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<Tensor> {
        self.attribute(name).and_then(|a| Tensor::carried(a.t.clone()?, None).ok())
    }

    /// Sets an attribute that is a tensor.
    pub(crate) fn set_tensor(&mut self, name: &str, value: &Tensor) {
        self.set(AttributeProto { t: Some(value.to_proto()), ..attribute(name, AttributeType::Tensor) });
    }

    /// Puts `attribute` in the place of the one of its name, or last.
    pub(crate) fn set(&mut self, attribute: AttributeProto) {
        match self.proto.attribute.iter_mut().find(|a| a.name() == attribute.name()) {
            Some(old) => *old = attribute,
            None => self.proto.attribute.push(attribute),
        }
    }
}

/// Equal inputs do not make these equal.
const RANDOM: &[&str] =
    &["RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"];

fn attribute(name: &str, kind: AttributeType) -> AttributeProto {
    AttributeProto { name: Some(name.to_owned()), r#type: Some(kind as i32), ..AttributeProto::default() }
}
