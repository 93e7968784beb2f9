//! The graph a model is rewritten as.
//!
//! # Invariants
//!
//! Checked by [`Graph::check`] after every pass, and assumed everywhere else:
//!
//! - the graph is acyclic;
//! - every wire leaves an existing output, and at most one wire enters an input slot;
//! - no two values have the same name, and every value that is read has one;
//! - a graph output's value carries the output's name;
//! - the inputs are `Input` nodes or constants, each listed once, and every `Input` node is listed;
//! - each `Capture(i)` of a body has an `i`-th captured wire into the node that holds the body;
//! - every body keeps all of these.

mod check;
mod codes;
mod edit;
mod element;
mod extract;
mod graft;
mod inline;
mod op;
mod storage;
pub mod tensor;
mod vectors;
mod weight;

use std::collections::{BTreeMap, BinaryHeap, HashSet};

use petgraph::{
    Direction,
    stable_graph::{NodeIndex, StableDiGraph},
    visit::EdgeRef,
};

pub use self::{
    check::InvalidGraph,
    codes::Codes,
    op::{Body, Op},
    storage::{Affine, Codebook, Storage},
    tensor::{DType, Tensor, TensorError},
    vectors::Vectors,
    weight::{Const, Weight},
};
pub(crate) use self::{
    edit::fresh,
    weight::{Origin, Spelling},
};
use crate::proto::{GraphProto, SparseTensorProto, ValueInfoProto};

/// The graph of a model, or of a subgraph body.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    dag: StableDiGraph<Node, Wire>,
    inputs: Vec<Input>,
    outputs: Vec<Output>,
    edits: u64,
    /// Every name that a value has or had.
    names: HashSet<String>,
    /// The version of the standard operator set that the model imports.
    opset: i64,
    /// Names that training information mentions.
    pub(crate) trained: HashSet<String>,
    /// Declared types of values, in file order; one of a value that is gone is not written.
    pub(crate) value_info: Vec<ValueInfoProto>,
    /// The rest of the message: name, doc string, annotations, metadata.
    pub(crate) rest: GraphProto,
}

/// A node. While a pass runs, no other gets the id of one that is removed, so that what was found out about a graph does not
/// become true of something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(NodeIndex);

/// A value: the `slot`-th output of `node`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Outlet {
    /// The node that makes the value.
    pub node: NodeId,
    /// Which of its outputs it is.
    pub slot: u32,
}

/// Where a wire enters its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Inlet {
    /// An ordinary input.
    Slot(u32),
    /// The value is read by a body of the target, where it is [`Kind::Capture`] of this number.
    Captured(u32),
}

/// What a node is.
#[derive(Clone, Debug)]
pub enum Kind {
    /// A graph input.
    Input,
    /// Inside a body: the value that the node with the body captures under this number.
    Capture(u32),
    /// A constant: an initializer or a `Constant` node.
    Const(Const),
    /// A sparse initializer, which is carried and not interpreted.
    Sparse(Box<SparseTensorProto>),
    /// An operator.
    Op(Box<Op>),
}

/// A declared graph input: its node and its type. A constant listed as an input is a default value.
#[derive(Clone, Debug)]
pub struct Input {
    /// An [`Kind::Input`] or a [`Kind::Const`].
    pub node: NodeId,
    /// Name and type as declared.
    pub info: ValueInfoProto,
}

/// A declared graph output: its value, and the name and type that are the model's contract.
#[derive(Clone, Debug)]
pub struct Output {
    /// What it is.
    pub value: Outlet,
    /// Name and type as declared.
    pub info: ValueInfoProto,
}

#[derive(Clone, Debug)]
struct Node {
    kind: Kind,
    outputs: Vec<String>,
    /// Place in the file, of a new node that of its neighbour.
    position: u64,
    /// Whether it is removed: its id is given to no other until [`Graph::purge`].
    gone: bool,
}

#[derive(Clone, Copy, Debug)]
struct Wire {
    from: u32,
    to: Inlet,
}

impl NodeId {
    /// The first value the node makes.
    #[must_use]
    pub fn out(self) -> Outlet {
        self.at(0)
    }

    /// The value in `slot`.
    #[must_use]
    pub fn at(self, slot: u32) -> Outlet {
        Outlet { node: self, slot }
    }
}

impl Graph {
    /// How many times the graph or a body in it has been edited.
    ///
    /// Two equal counts mean nothing changed: it is how a pipeline finds its fixpoint and how an analysis is known to
    /// be stale, so no pass reports either.
    #[must_use]
    pub fn edits(&self) -> u64 {
        self.edits + self.bodies().map(|(_, body)| body.graph.edits()).sum::<u64>()
    }

    /// The version of the standard operator set.
    #[must_use]
    pub fn opset(&self) -> i64 {
        self.opset
    }

    /// The declared inputs, constants with a default value included.
    #[must_use]
    pub fn inputs(&self) -> &[Input] {
        &self.inputs
    }

    /// The inputs that a caller must feed.
    pub fn fed_inputs(&self) -> impl Iterator<Item = &Input> {
        self.inputs.iter().filter(|input| matches!(self.kind(input.node), Kind::Input))
    }

    /// The declared outputs.
    #[must_use]
    pub fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    /// Whether `value` is a graph output.
    #[must_use]
    pub fn is_output(&self, value: Outlet) -> bool {
        self.outputs.iter().any(|output| output.value == value)
    }

    /// How many nodes there are, inputs and constants included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.node_ids().count()
    }

    /// Whether there are no nodes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether `node` still exists.
    #[must_use]
    pub fn contains(&self, node: NodeId) -> bool {
        self.dag.node_weight(node.0).is_some_and(|node| !node.gone)
    }

    /// What `node` is.
    #[must_use]
    pub fn kind(&self, node: NodeId) -> &Kind {
        &self.dag[node.0].kind
    }

    /// The operator of `node`, if it is one.
    #[must_use]
    pub fn op(&self, node: NodeId) -> Option<&Op> {
        match &self.dag.node_weight(node.0)?.kind {
            Kind::Op(op) => Some(op),
            _ => None,
        }
    }

    /// The operator of `node`, if it is the standard `op_type`.
    #[must_use]
    pub fn op_of(&self, node: NodeId, op_type: &str) -> Option<&Op> {
        self.op(node).filter(|op| op.is(op_type))
    }

    /// The constant that `value` is, if it is one and no caller can override it; see [`Graph::constant`] for its value.
    #[must_use]
    pub fn weight(&self, value: Outlet) -> Option<&Weight> {
        match &self.dag.node_weight(value.node.0)?.kind {
            Kind::Const(constant) if !constant.overridable => Some(&constant.weight),
            _ => None,
        }
    }

    /// The value of the constant that `value` is, if it is one.
    #[must_use]
    pub fn constant(&self, value: Outlet) -> Option<&Tensor> {
        self.weight(value).map(Weight::value)
    }

    /// The values `node` reads, by slot; `None` where an optional one is left out.
    #[must_use]
    pub fn operands(&self, node: NodeId) -> Vec<Option<Outlet>> {
        let mut operands = vec![None; self.op(node).map_or(0, |op| op.arity)];
        for edge in self.dag.edges_directed(node.0, Direction::Incoming) {
            let Inlet::Slot(slot) = edge.weight().to else { continue };
            let slot = slot as usize;
            if operands.len() <= slot {
                operands.resize(slot + 1, None);
            }
            operands[slot] = Some(NodeId(edge.source()).at(edge.weight().from));
        }
        operands
    }

    /// The value `node` reads in `slot`.
    #[must_use]
    pub fn operand(&self, node: NodeId, slot: u32) -> Option<Outlet> {
        self.dag
            .edges_directed(node.0, Direction::Incoming)
            .find(|edge| edge.weight().to == Inlet::Slot(slot))
            .map(|edge| NodeId(edge.source()).at(edge.weight().from))
    }

    /// The values that the bodies of `node` capture, by number.
    #[must_use]
    pub fn captures(&self, node: NodeId) -> BTreeMap<u32, Outlet> {
        self.dag
            .edges_directed(node.0, Direction::Incoming)
            .filter_map(|edge| match edge.weight().to {
                Inlet::Captured(i) => Some((i, NodeId(edge.source()).at(edge.weight().from))),
                Inlet::Slot(_) => None,
            })
            .collect()
    }

    /// The nodes that read `value`, and where, in order of age.
    #[must_use]
    pub fn uses(&self, value: Outlet) -> Vec<(NodeId, Inlet)> {
        let mut uses: Vec<_> = self
            .dag
            .edges_directed(value.node.0, Direction::Outgoing)
            .filter(|edge| edge.weight().from == value.slot)
            .map(|edge| (NodeId(edge.target()), edge.weight().to))
            .collect();
        uses.sort_unstable();
        uses
    }

    /// The one node that reads `value`, if there is exactly one, it reads it as an operand, and `value` is no output.
    #[must_use]
    pub fn sole_use(&self, value: Outlet) -> Option<(NodeId, u32)> {
        match self.uses(value)[..] {
            [(node, Inlet::Slot(slot))] if !self.is_output(value) => Some((node, slot)),
            _ => None,
        }
    }

    /// How many values `node` makes, omitted ones included.
    #[must_use]
    pub fn output_count(&self, node: NodeId) -> u32 {
        self.dag[node.0].outputs.len() as u32
    }

    /// The name of `value`; empty for an omitted output.
    #[must_use]
    pub fn name(&self, value: Outlet) -> &str {
        self.dag[value.node.0].outputs.get(value.slot as usize).map_or("", String::as_str)
    }

    /// The name that a person would know `node` by: its own, else that of its first value.
    #[must_use]
    pub fn label(&self, node: NodeId) -> &str {
        match self.op(node).map(Op::name) {
            Some(name) if !name.is_empty() => name,
            _ => self.name(node.out()),
        }
    }

    /// Every value by its name.
    #[must_use]
    pub fn values(&self) -> BTreeMap<&str, Outlet> {
        let outlets = self.node_ids().flat_map(|id| (0..self.output_count(id)).map(move |slot| id.at(slot)));
        outlets.map(|value| (self.name(value), value)).filter(|(name, _)| !name.is_empty()).collect()
    }

    /// Whether annotations or training information mention `value` by name, so that it must stay what it is.
    #[must_use]
    pub fn is_pinned(&self, value: Outlet) -> bool {
        let name = self.name(value);
        if self.trained.contains(name) {
            return true;
        }
        self.rest.quantization_annotation.iter().any(|annotation| {
            annotation.tensor_name() == name
                || annotation.quant_parameter_tensor_names.iter().any(|entry| entry.value() == name)
        })
    }

    /// The declared type of the value called `name`.
    #[must_use]
    pub fn info(&self, name: &str) -> Option<&ValueInfoProto> {
        let inputs = self.inputs.iter().map(|input| &input.info);
        let outputs = self.outputs.iter().map(|output| &output.info);
        inputs.chain(outputs).chain(&self.value_info).find(|info| info.name() == name)
    }

    /// Every node, in no useful order.
    pub fn node_ids(&self) -> impl Iterator<Item = NodeId> {
        self.dag.node_indices().filter(|&id| !self.dag[id].gone).map(NodeId)
    }

    /// Every body, with the node that holds it.
    pub fn bodies(&self) -> impl Iterator<Item = (NodeId, &Body)> {
        self.node_ids()
            .filter_map(|id| Some((id, self.op(id)?)))
            .flat_map(|(id, op)| op.bodies.iter().map(move |b| (id, b)))
    }

    /// Every node, inputs before their readers, otherwise in file order: first the inputs, captures and initializers,
    /// then the rest. Nodes on a cycle are left out.
    #[must_use]
    pub fn order(&self) -> Vec<NodeId> {
        let mut waiting: BTreeMap<NodeId, usize> = BTreeMap::new();
        let mut order = Vec::with_capacity(self.len());
        let mut ready = BinaryHeap::new();
        let key = |id: NodeId| std::cmp::Reverse((self.dag[id.0].position, id));
        for id in self.node_ids() {
            match self.dag.edges_directed(id.0, Direction::Incoming).count() {
                0 if self.is_listed_apart(id) => order.push(id),
                0 => ready.push(key(id)),
                degree => _ = waiting.insert(id, degree),
            }
        }
        order.sort_by_key(|&id| (self.dag[id.0].position, id));
        let release = |id: NodeId, waiting: &mut BTreeMap<NodeId, usize>, ready: &mut BinaryHeap<_>| {
            for edge in self.dag.edges_directed(id.0, Direction::Outgoing) {
                let reader = NodeId(edge.target());
                let Some(degree) = waiting.get_mut(&reader) else { continue };
                *degree -= 1;
                if *degree == 0 {
                    waiting.remove(&reader);
                    ready.push(key(reader));
                }
            }
        };
        for &id in &order {
            release(id, &mut waiting, &mut ready);
        }
        while let Some(std::cmp::Reverse((_, id))) = ready.pop() {
            order.push(id);
            release(id, &mut waiting, &mut ready);
        }
        order
    }

    /// Every node by its place in the file.
    pub(crate) fn file_order(&self) -> Vec<NodeId> {
        let mut order: Vec<_> = self.node_ids().collect();
        order.sort_by_key(|&id| (self.dag[id.0].position, id));
        order
    }

    /// Every operator in [`order`](Self::order).
    #[must_use]
    pub fn ops(&self) -> Vec<NodeId> {
        self.order().into_iter().filter(|&id| self.op(id).is_some()).collect()
    }

    /// Every operator that holds bodies, in [`order`](Self::order).
    #[must_use]
    pub fn holders(&self) -> Vec<NodeId> {
        self.order().into_iter().filter(|&id| self.op(id).is_some_and(|op| !op.bodies.is_empty())).collect()
    }

    /// Whether the file lists `node` outside its list of nodes.
    fn is_listed_apart(&self, node: NodeId) -> bool {
        match self.kind(node) {
            Kind::Input | Kind::Capture(_) | Kind::Sparse(_) => true,
            Kind::Const(constant) => matches!(constant.origin, Origin::Initializer),
            Kind::Op(_) => false,
        }
    }
}
