//! The element type and shape of every value, and the elements of small integer ones (shape arithmetic).

mod rules;
mod term;

use std::collections::BTreeMap;

use xxhash_rust::xxh3::xxh3_64;

use self::rules::Rule;
pub use self::term::Term;
use crate::{
    ir::{DType, Graph, Kind, NodeId, Op, Outlet, Output, Tensor},
    proto::{
        TypeProto, ValueInfoProto,
        tensor_shape_proto::{Dimension, dimension},
        type_proto,
    },
};

/// Integer tensors of at most this many elements are followed element by element; shapes have no more axes.
const MAX_FOLLOWED: usize = 64;

/// An extent or an element. `None` where not even a name for it is known: the facts of a graph have a name for all.
pub type Dim = Option<Term>;

/// What is known of a value.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Fact {
    /// The element type.
    pub dtype: Option<DType>,
    /// The shape, if the rank is known.
    pub dims: Option<Vec<Dim>>,
    /// The elements of a small integer tensor.
    pub ints: Option<Vec<Dim>>,
}

/// The facts of one graph; those of bodies are inferred on their own.
#[derive(Clone, Debug, Default)]
pub struct Shapes {
    facts: BTreeMap<Outlet, Fact>,
    /// The body that each `If` takes, where that is settled.
    taken: BTreeMap<NodeId, usize>,
    /// Whether an operator is sure to fail, so that what was assumed can't be.
    impossible: bool,
    /// The facts where open axes have other lengths, if the graph was looked at twice.
    other: Option<Box<Self>>,
}

/// What an inference starts from.
#[derive(Clone, Copy)]
struct Start<'a> {
    bound: &'a BTreeMap<String, Vec<usize>>,
    captured: &'a BTreeMap<u32, Fact>,
    /// Tells values of one name in different bodies apart.
    scope: u64,
}

/// Branches of different ranks are told apart by what follows for this many `If`s of a graph at a time.
const MAX_ASSUMED: usize = 8;

impl Shapes {
    /// Infers the facts of `graph`, whose inputs have the shapes of `bound` where it names them, else those declared.
    #[must_use]
    pub fn infer(graph: &Graph, bound: &BTreeMap<String, Vec<usize>>) -> Self {
        Self::with(graph, Start { bound, captured: &BTreeMap::new(), scope: 0 })
    }

    /// Infers the facts of a body that captures values of the facts `captured`, by number.
    #[must_use]
    pub fn infer_body(graph: &Graph, captured: &BTreeMap<u32, Fact>) -> Self {
        Self::with(graph, Start { bound: &BTreeMap::new(), captured, scope: 1 })
    }

    /// Infers the facts of `body`, which `node` of `graph` holds, from these facts of `graph`.
    #[must_use]
    pub fn inside(&self, graph: &Graph, node: NodeId, body: &Graph) -> Self {
        self.within(graph, node)(body)
    }

    /// What infers the facts of a body that `node` of `graph` holds, from these facts of `graph`.
    pub fn within(&self, graph: &Graph, node: NodeId) -> impl Fn(&Graph) -> Self + use<> {
        let captured = self.captured(graph, node);
        let other = self.other().map(|other| other.captured(graph, node));
        move |body| {
            let other = other.as_ref().map(|captured| Self::infer_body(body, captured));
            Self::infer_body(body, &captured).beside(other)
        }
    }

    /// These facts, together with those at other lengths of the open axes.
    #[must_use]
    pub fn beside(self, other: Option<Self>) -> Self {
        Self { other: other.map(Box::new), ..self }
    }

    /// The facts at other lengths of the open axes, if the graph was looked at twice.
    #[must_use]
    pub fn other(&self) -> Option<&Self> {
        self.other.as_deref()
    }

    /// Whether the length of an axis was another where open axes had other lengths.
    #[must_use]
    pub fn is_open(&self, value: Outlet, axis: usize) -> bool {
        let length = |shapes: &Self| shapes.dims(value)?.get(axis).copied().flatten();
        self.other().is_some_and(|other| length(other) != length(self))
    }

    /// What is known of the values that the bodies of `node` of `graph` capture, by number.
    #[must_use]
    pub fn captured(&self, graph: &Graph, node: NodeId) -> BTreeMap<u32, Fact> {
        let fact = |(i, value)| (i, self.fact(value).cloned().unwrap_or_default());
        graph.captures(node).into_iter().map(fact).collect()
    }

    /// Infers what follows, and where an `If` makes values of different ranks, what follows from each of its branches: one
    /// from which the graph is sure to fail is not taken.
    fn with(graph: &Graph, start: Start<'_>) -> Self {
        let mut shapes = Self::assuming(graph, start, &BTreeMap::new());
        let open = |shapes: &Self, id| !shapes.taken.contains_key(&id) && shapes.is_ambiguous(graph, id);
        let ambiguous: Vec<_> = graph.holders().into_iter().filter(|&id| open(&shapes, id)).collect();
        for id in ambiguous.into_iter().take(MAX_ASSUMED) {
            if !open(&shapes, id) {
                continue;
            }
            let mut assumed = shapes.taken.clone();
            let mut possible = Vec::new();
            for branch in 0..2 {
                assumed.insert(id, branch);
                let assuming = Self::assuming(graph, start, &assumed);
                possible.extend((!assuming.impossible).then_some(assuming));
            }
            if let [_] = possible[..] {
                shapes = possible.remove(0);
            }
        }
        shapes
    }

    /// Whether `node` is an `If` whose branches make values of different ranks.
    fn is_ambiguous(&self, graph: &Graph, node: NodeId) -> bool {
        let unknown = |slot: u32| self.rank(node.at(slot)).is_none();
        graph.op_of(node, "If").is_some_and(|op| op.bodies.len() == 2) && (0..graph.output_count(node)).any(unknown)
    }

    /// What follows if the `If`s that `assumed` names take these bodies.
    fn assuming(graph: &Graph, start: Start<'_>, assumed: &BTreeMap<NodeId, usize>) -> Self {
        let mut shapes = Self { taken: assumed.clone(), ..Self::default() };
        for id in graph.order() {
            for (slot, mut fact) in (0..).zip(shapes.node(graph, id, start)) {
                fact.name(start.scope, graph.name(id.at(slot)));
                shapes.facts.insert(id.at(slot), fact);
            }
        }
        shapes
    }

    /// The body that the `If` at `node` takes on every input on which the graph does not fail, where that is settled.
    #[must_use]
    pub fn taken(&self, node: NodeId) -> Option<usize> {
        self.taken.get(&node).copied()
    }

    /// Whether the graph can be run on inputs of these shapes, as far as that is known.
    #[must_use]
    pub fn is_possible(&self) -> bool {
        !self.impossible
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
        self.dims(value)?.iter().map(|d| d.and_then(Term::extent)).collect()
    }

    /// The elements of `value`, if it is a small tensor of integers or booleans and all of them are known.
    #[must_use]
    pub fn integers(&self, value: Outlet) -> Option<Vec<i64>> {
        self.fact(value)?.ints.as_ref()?.iter().map(|i| i.and_then(Term::known)).collect()
    }

    /// Integers that `node` has as an attribute in old operator sets and as an operand in new ones, if all are known.
    #[must_use]
    pub fn argument(&self, graph: &Graph, node: NodeId, attribute: &str, slot: u32) -> Option<Vec<i64>> {
        match graph.operand(node, slot) {
            Some(value) => graph.constant(value).and_then(Tensor::i64s).or_else(|| self.integers(value)),
            None => graph.op(node)?.ints(attribute).map(<[i64]>::to_vec),
        }
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

    fn node(&mut self, graph: &Graph, id: NodeId, start: Start<'_>) -> Vec<Fact> {
        let declared = |value: Outlet| graph.info(graph.name(value)).map(Fact::declared).unwrap_or_default();
        match graph.kind(id) {
            Kind::Input => {
                let mut fact = declared(id.out());
                if let Some(dims) = start.bound.get(graph.name(id.out())) {
                    fact.dims = Some(dims.iter().map(|&d| Some(d.into())).collect());
                }
                vec![fact]
            }
            // A caller may feed something else.
            Kind::Const(constant) if constant.overridable => vec![declared(id.out())],
            Kind::Const(constant) => vec![Fact::of(constant.weight.value())],
            Kind::Capture(i) => vec![start.captured.get(i).cloned().unwrap_or_else(|| declared(id.out()))],
            Kind::Sparse(_) => vec![declared(id.out())],
            Kind::Op(op) => {
                let operands = graph.operands(id);
                let inputs: Vec<_> = operands
                    .iter()
                    .map(|value| value.map(|v| self.facts.get(&v).cloned().unwrap_or_default()))
                    .collect();
                let constants: Vec<_> = operands.iter().map(|value| value.and_then(|v| graph.constant(v))).collect();
                let rule = Rule { op, opset: graph.opset(), inputs: &inputs, constants: &constants };
                self.impossible |= rule.fails();
                let facts = if op.is("If") { self.branches(graph, id, op, start.scope) } else { None };
                let facts = facts.or_else(|| rule.facts(graph.output_count(id) as usize));
                let mut facts = facts.unwrap_or_default();
                facts.resize(graph.output_count(id) as usize, Fact::default());
                // Of declarations inside the graph only the types are believed: shapes there are often stale.
                for (slot, fact) in (0..).zip(&mut facts) {
                    fact.dtype = fact.dtype.or_else(|| declared(id.at(slot)).dtype);
                }
                facts
            }
        }
    }

    /// What is known of the results of the `If` at `id`: what holds for the branch that it takes, or for both.
    fn branches(&mut self, graph: &Graph, id: NodeId, op: &Op, scope: u64) -> Option<Vec<Fact>> {
        let place = |attribute: &str| op.bodies.iter().position(|body| body.attribute == attribute);
        let (then, otherwise) = (place("then_branch")?, place("else_branch")?);
        let condition =
            self.fact(graph.operand(id, 0)?).and_then(|fact| fact.ints.as_ref()?.first()?.and_then(Term::known));
        let settled = condition.map(|condition| if condition != 0 { then } else { otherwise });
        let captured = self.captured(graph, id);
        let mut results = [then, otherwise].map(|body| {
            let scope = scope_of(scope, graph.name(id.out()), body);
            let start = Start { bound: &BTreeMap::new(), captured: &captured, scope };
            let inside = &op.bodies[body].graph;
            let shapes = Self::assuming(inside, start, &BTreeMap::new());
            let fact = |output: &Output| shapes.fact(output.value).cloned().unwrap_or_default();
            (body, shapes.impossible, inside.outputs().iter().map(fact).collect::<Vec<_>>())
        });
        let assumed = self.taken.get(&id).copied();
        if assumed.is_some() && settled.is_some() && assumed != settled {
            self.impossible = true;
        }
        let possible = match (results[0].1, results[1].1) {
            (true, false) => Some(otherwise),
            (false, true) => Some(then),
            _ => None,
        };
        let taken = settled.or(assumed).or(possible);
        if let Some(taken) = taken {
            self.taken.insert(id, taken);
            results.sort_by_key(|(body, ..)| *body != taken);
            self.impossible |= results[0].1;
            return Some(std::mem::take(&mut results[0].2));
        }
        self.impossible |= results[0].1 && results[1].1;
        let [(_, _, a), (_, _, b)] = results;
        Some(a.into_iter().zip(b).map(|(a, b)| a.or(&b)).collect())
    }
}

/// The scope of a body of the operator whose first result is called `name`.
fn scope_of(outer: u64, name: &str, body: usize) -> u64 {
    xxh3_64(&[&outer.to_le_bytes()[..], &body.to_le_bytes(), name.as_bytes()].concat())
}

impl Fact {
    /// What holds whether this is true of a value or `other` is.
    fn or(self, other: &Self) -> Self {
        let both = |a: Option<Vec<Dim>>, b: &Option<Vec<Dim>>| {
            let (a, b) = a.zip(b.as_ref()).filter(|(a, b)| a.len() == b.len())?;
            Some(a.into_iter().zip(b).map(|(a, b)| a.filter(|_| a == *b)).collect())
        };
        let (dims, ints) = (both(self.dims, &other.dims), both(self.ints, &other.ints));
        Self { dtype: self.dtype.filter(|_| self.dtype == other.dtype), dims, ints }
    }

    fn new(dtype: Option<DType>, dims: Vec<Dim>) -> Self {
        Self { dtype, dims: Some(dims), ints: None }
    }

    fn of(tensor: &Tensor) -> Self {
        let ints = if tensor.len() <= MAX_FOLLOWED && tensor.dims().len() <= 1 { tensor.i64s() } else { None };
        Self {
            dtype: Some(tensor.dtype()),
            dims: Some(tensor.dims().iter().map(|&d| Some(d.into())).collect()),
            ints: ints.map(|ints| ints.into_iter().map(|i| Some(Term::number(i))).collect()),
        }
    }

    /// The shape, as far as it is known in numbers.
    #[must_use]
    pub fn extents(&self) -> Option<Vec<Option<usize>>> {
        Some(self.dims.as_ref()?.iter().map(|d| d.and_then(Term::extent)).collect())
    }

    /// Names every extent and element that has no name yet, by the name of the value.
    fn name(&mut self, scope: u64, value: &str) {
        let name = |kind: &str, terms: &mut Option<Vec<Dim>>| {
            for (place, term) in terms.iter_mut().flatten().enumerate() {
                let what =
                    || [&scope.to_le_bytes()[..], &place.to_le_bytes(), kind.as_bytes(), value.as_bytes()].concat();
                *term = term.or_else(|| Some(Term::unknown(&what(), kind == "extent")));
            }
        };
        name("extent", &mut self.dims);
        name("element", &mut self.ints);
    }

    /// What a declaration says.
    #[must_use]
    pub fn declared(info: &ValueInfoProto) -> Self {
        let Some(tensor) = declared_tensor(info) else { return Self::default() };
        let dims = declared_dims(info).map(|dims| {
            let dim = |d: &Dimension| match d.value {
                Some(dimension::Value::DimValue(v)) => usize::try_from(v).ok().map(Term::from),
                _ => None,
            };
            dims.iter().map(dim).collect()
        });
        let dtype = tensor.elem_type.and_then(|t| DType::try_from(t).ok()).filter(|t| *t != DType::Undefined);
        Self { dtype, dims, ints: None }
    }
}

fn declared_tensor(info: &ValueInfoProto) -> Option<&type_proto::Tensor> {
    match &info.r#type {
        Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), .. }) => Some(tensor),
        _ => None,
    }
}

/// The axes that a declaration tells of, with their lengths or names; `None` where it does not say how many there are.
#[must_use]
pub fn declared_dims(info: &ValueInfoProto) -> Option<&[Dimension]> {
    Some(&declared_tensor(info)?.shape.as_ref()?.dim)
}
