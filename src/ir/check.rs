//! The invariants listed at the top of [`ir`](crate::ir).

use std::collections::{BTreeMap, BTreeSet};

use petgraph::{Direction, visit::EdgeRef};

use super::{Graph, Inlet, Kind, NodeId};

/// The invariant a graph breaks.
#[derive(Debug, thiserror::Error)]
pub enum InvalidGraph {
    /// There is a cycle.
    #[error("node `{0}` reads a value that depends on its own output: the graph has a cycle")]
    Cyclic(String),
    /// A wire leaves an output that the node does not have.
    #[error("node `{0}` reads an output that `{1}` does not have")]
    NoSuchOutput(String, String),
    /// A slot is wired twice.
    #[error("an input of node `{0}` is wired twice")]
    WiredTwice(String),
    /// Two values have one name.
    #[error("two values are called `{0}`")]
    SameName(String),
    /// A value without a name is read.
    #[error("node `{0}` reads a value without a name")]
    Nameless(String),
    /// An output's value has another name.
    #[error("graph output `{0}` is made by a value called `{1}`")]
    Misnamed(String, String),
    /// Inputs and `Input` nodes do not match.
    #[error("graph input `{0}` is not listed once")]
    Unlisted(String),
    /// A body captures what its node does not bind.
    #[error("a body of node `{0}` captures value {1}, which is not bound")]
    Unbound(String, u32),
    /// A body breaks one of these.
    #[error("in `{body}` of node `{node}`")]
    Body {
        /// The node.
        node: String,
        /// The attribute.
        body: String,
        /// What the body breaks.
        source: Box<InvalidGraph>,
    },
}

impl Graph {
    /// Checks the invariants of the graph and of every body.
    ///
    /// # Errors
    ///
    /// The first one that does not hold.
    pub fn check(&self) -> Result<(), InvalidGraph> {
        let label = |id: NodeId| self.label(id).to_owned();
        let order: BTreeSet<_> = self.order().into_iter().collect();
        if let Some(stuck) = self.node_ids().find(|id| !order.contains(id)) {
            return Err(InvalidGraph::Cyclic(label(stuck)));
        }
        let mut names = BTreeMap::new();
        for id in self.node_ids() {
            let mut inlets = BTreeSet::new();
            for edge in self.dag.edges_directed(id.0, Direction::Incoming) {
                let source = NodeId(edge.source());
                if edge.weight().from >= self.output_count(source) {
                    return Err(InvalidGraph::NoSuchOutput(label(id), label(source)));
                }
                if self.name(source.at(edge.weight().from)).is_empty() {
                    return Err(InvalidGraph::Nameless(label(id)));
                }
                let key = match edge.weight().to {
                    Inlet::Slot(slot) => (0, slot),
                    Inlet::Captured(i) => (1, i),
                };
                if !inlets.insert(key) {
                    return Err(InvalidGraph::WiredTwice(label(id)));
                }
            }
            for name in self.dag[id.0].outputs.iter().filter(|name| !name.is_empty()) {
                if names.insert(name.as_str(), id).is_some() {
                    return Err(InvalidGraph::SameName(name.clone()));
                }
            }
        }
        self.check_interface()?;
        self.check_bodies()
    }

    fn check_interface(&self) -> Result<(), InvalidGraph> {
        for output in &self.outputs {
            let (wanted, found) = (output.info.name(), self.name(output.value));
            if wanted != found {
                return Err(InvalidGraph::Misnamed(wanted.to_owned(), found.to_owned()));
            }
        }
        let listed: BTreeSet<_> = self.inputs.iter().map(|input| input.node).collect();
        for input in &self.inputs {
            let fits = self.contains(input.node) && matches!(self.kind(input.node), Kind::Input | Kind::Const(_));
            if !fits || listed.len() != self.inputs.len() {
                return Err(InvalidGraph::Unlisted(input.info.name().to_owned()));
            }
        }
        match self.node_ids().find(|id| matches!(self.kind(*id), Kind::Input) && !listed.contains(id)) {
            Some(id) => Err(InvalidGraph::Unlisted(self.name(id.out()).to_owned())),
            None => Ok(()),
        }
    }

    fn check_bodies(&self) -> Result<(), InvalidGraph> {
        for (id, body) in self.bodies() {
            let bound = self.captures(id);
            for inner in body.graph.node_ids() {
                match body.graph.kind(inner) {
                    Kind::Capture(i) if !bound.contains_key(i) => {
                        return Err(InvalidGraph::Unbound(self.label(id).to_owned(), *i));
                    }
                    _ => {}
                }
            }
            body.graph.check().map_err(|source| InvalidGraph::Body {
                node: self.label(id).to_owned(),
                body: body.attribute.clone(),
                source: Box::new(source),
            })?;
        }
        Ok(())
    }
}
