//! The element type and shape of every value, and the elements of small integer ones (shape arithmetic).

mod rules;

use std::collections::BTreeMap;

use self::rules::Rule;
use crate::{
    ir::{DType, Graph, Kind, NodeId, Outlet, Tensor},
    proto::{TypeProto, ValueInfoProto, tensor_shape_proto::dimension, type_proto},
};

/// Integer tensors of at most this many elements are followed element by element; shapes have no more axes.
const MAX_FOLLOWED: usize = 64;

/// An extent; `None` where it is not known.
pub type Dim = Option<usize>;

/// What is known of a value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fact {
    /// The element type.
    pub dtype: Option<DType>,
    /// The shape, if the rank is known.
    pub dims: Option<Vec<Dim>>,
    /// The elements of a small integer tensor.
    pub ints: Option<Vec<Option<i64>>>,
}

/// The facts of one graph; those of bodies are inferred on their own.
#[derive(Clone, Debug, Default)]
pub struct Shapes {
    facts: BTreeMap<Outlet, Fact>,
}

impl Shapes {
    /// Infers the facts of `graph`, whose inputs have the shapes of `bound` where it names them, else those declared.
    #[must_use]
    pub fn infer(graph: &Graph, bound: &BTreeMap<String, Vec<usize>>) -> Self {
        Self::with(graph, bound, &BTreeMap::new())
    }

    /// Infers the facts of a body that captures values of the facts `captured`, by number.
    #[must_use]
    pub fn infer_body(graph: &Graph, captured: &BTreeMap<u32, Fact>) -> Self {
        Self::with(graph, &BTreeMap::new(), captured)
    }

    /// Infers the facts of `body`, which `node` of `graph` holds, from these facts of `graph`.
    #[must_use]
    pub fn inside(&self, graph: &Graph, node: NodeId, body: &Graph) -> Self {
        let fact = |(i, value)| (i, self.fact(value).cloned().unwrap_or_default());
        Self::infer_body(body, &graph.captures(node).into_iter().map(fact).collect())
    }

    fn with(graph: &Graph, bound: &BTreeMap<String, Vec<usize>>, captured: &BTreeMap<u32, Fact>) -> Self {
        let mut shapes = Self::default();
        for id in graph.order() {
            for (slot, fact) in (0..).zip(shapes.node(graph, id, bound, captured)) {
                shapes.facts.insert(id.at(slot), fact);
            }
        }
        shapes
    }

    /// What is known of `value`.
    #[must_use]
    pub fn fact(&self, value: Outlet) -> Option<&Fact> {
        self.facts.get(&value)
    }

    /// The shape of `value`, as far as it is known.
    #[must_use]
    pub fn dims(&self, value: Outlet) -> Option<&[Dim]> {
        self.fact(value)?.dims.as_deref()
    }

    /// The shape of `value`, if all of it is known.
    #[must_use]
    pub fn known(&self, value: Outlet) -> Option<Vec<usize>> {
        self.dims(value)?.iter().copied().collect()
    }

    /// How many values are of a shape that is known.
    #[must_use]
    pub fn known_count(&self) -> usize {
        self.facts.keys().filter(|&&value| self.known(value).is_some()).count()
    }

    /// The rank of `value`.
    #[must_use]
    pub fn rank(&self, value: Outlet) -> Option<usize> {
        self.dims(value).map(<[Dim]>::len)
    }

    fn node(
        &self,
        graph: &Graph,
        id: NodeId,
        bound: &BTreeMap<String, Vec<usize>>,
        captured: &BTreeMap<u32, Fact>,
    ) -> Vec<Fact> {
        let declared = |value: Outlet| graph.info(graph.name(value)).map(Fact::declared).unwrap_or_default();
        match graph.kind(id) {
            Kind::Input => {
                let mut fact = declared(id.out());
                if let Some(dims) = bound.get(graph.name(id.out())) {
                    fact.dims = Some(dims.iter().map(|&d| Some(d)).collect());
                }
                vec![fact]
            }
            // A caller may feed something else.
            Kind::Const(constant) if constant.overridable => vec![declared(id.out())],
            Kind::Const(constant) => vec![Fact::of(constant.weight.value())],
            Kind::Capture(i) => vec![captured.get(i).cloned().unwrap_or_else(|| declared(id.out()))],
            Kind::Sparse(_) => vec![declared(id.out())],
            Kind::Op(op) => {
                let operands = graph.operands(id);
                let inputs: Vec<_> = operands
                    .iter()
                    .map(|value| value.map(|v| self.facts.get(&v).cloned().unwrap_or_default()))
                    .collect();
                let constants: Vec<_> = operands.iter().map(|value| value.and_then(|v| graph.constant(v))).collect();
                let rule = Rule { op, opset: graph.opset(), inputs: &inputs, constants: &constants };
                let mut facts = rule.facts(graph.output_count(id) as usize).unwrap_or_default();
                facts.resize(graph.output_count(id) as usize, Fact::default());
                // Of declarations inside the graph only the types are believed: shapes there are often stale.
                for (slot, fact) in (0..).zip(&mut facts) {
                    fact.dtype = fact.dtype.or(declared(id.at(slot)).dtype);
                }
                facts
            }
        }
    }
}

impl Fact {
    fn new(dtype: Option<DType>, dims: Vec<Dim>) -> Self {
        Self { dtype, dims: Some(dims), ints: None }
    }

    fn of(tensor: &Tensor) -> Self {
        let ints = if tensor.len() <= MAX_FOLLOWED && tensor.dims().len() <= 1 { tensor.i64s() } else { None };
        Self {
            dtype: Some(tensor.dtype()),
            dims: Some(tensor.dims().iter().map(|&d| Some(d)).collect()),
            ints: ints.map(|ints| ints.into_iter().map(Some).collect()),
        }
    }

    /// What a declaration says.
    #[must_use]
    pub fn declared(info: &ValueInfoProto) -> Self {
        let Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), .. }) = &info.r#type else {
            return Self::default();
        };
        let dims = tensor.shape.as_ref().map(|shape| {
            let dim = |d: &crate::proto::tensor_shape_proto::Dimension| match d.value {
                Some(dimension::Value::DimValue(v)) => usize::try_from(v).ok(),
                _ => None,
            };
            shape.dim.iter().map(dim).collect()
        });
        let dtype = tensor.elem_type.and_then(|t| DType::try_from(t).ok()).filter(|t| *t != DType::Undefined);
        Self { dtype, dims, ints: None }
    }
}
