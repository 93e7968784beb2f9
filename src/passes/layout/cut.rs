//! Which operators to turn so that the fewest `Transpose`s are left: a minimum cut between what is turned and what is not.

use std::collections::{BTreeMap, BTreeSet};

use petgraph::{
    algo::dinics,
    graph::{DiGraph, NodeIndex},
    visit::EdgeRef,
};

use super::{
    inverse, permutation,
    turn::{Turn, absorbs},
};
use crate::{
    analysis::shapes::Shapes,
    ir::{Graph, Inlet, NodeId, Outlet},
};

/// Bytes of a constant that two orders of it may take.
const SMALL: usize = 1024;

/// More than all `Transpose`s together.
const NEVER: u32 = u32::MAX / 4;

/// The network: what is on the side of the source is turned, and each edge from there to the side of the sink costs as many
/// `Transpose`s as its weight.
struct Network {
    flow: DiGraph<(), u32>,
    source: NodeIndex,
    sink: NodeIndex,
}

impl Network {
    fn new() -> Self {
        let mut flow = DiGraph::new();
        let (source, sink) = (flow.add_node(()), flow.add_node(()));
        Self { flow, source, sink }
    }

    fn cost(&mut self, from: NodeIndex, to: NodeIndex, weight: u32) {
        self.flow.add_edge(from, to, weight);
    }

    /// Adds that a `Transpose` is needed if `of` is turned and one of `readers` is not.
    fn unless_all(&mut self, of: NodeIndex, readers: &[NodeIndex]) {
        let all = self.flow.add_node(());
        self.cost(of, all, 1);
        for &reader in readers {
            self.cost(all, reader, NEVER);
        }
    }

    /// Adds that a `Transpose` is needed if `of` is not turned and one of `readers` is.
    fn if_any(&mut self, of: NodeIndex, readers: &[NodeIndex]) {
        let any = self.flow.add_node(());
        self.cost(any, of, 1);
        for &reader in readers {
            self.cost(reader, any, NEVER);
        }
    }

    /// The least cost, and the fewest nodes that are turned at that cost.
    fn cut(&self) -> (u32, BTreeSet<NodeIndex>) {
        let (cost, flows) = dinics(&self.flow, self.source, self.sink);
        let (mut turned, mut stack) = (BTreeSet::from([self.source]), vec![self.source]);
        while let Some(node) = stack.pop() {
            let ahead = self.flow.edges(node).filter(|edge| flows[edge.id().index()] < *edge.weight());
            let back = self.flow.edges_directed(node, petgraph::Direction::Incoming);
            let back = back.filter(|edge| flows[edge.id().index()] > 0);
            for next in ahead.map(|edge| edge.target()).chain(back.map(|edge| edge.source())) {
                if turned.insert(next) {
                    stack.push(next);
                }
            }
        }
        (cost, turned)
    }
}

/// The operators among those of `turns` that leave the fewest `Transpose`s where they are turned by `perm`; none where that
/// is no fewer than there are.
pub(super) fn cheapest(
    graph: &Graph,
    shapes: &Shapes,
    perm: &[usize],
    turns: &BTreeMap<NodeId, Turn>,
) -> BTreeSet<NodeId> {
    let mut network = Network::new();
    let nodes: BTreeMap<NodeId, NodeIndex> = turns.keys().map(|&id| (id, network.flow.add_node(()))).collect();
    let mut before = 0;
    for id in graph.node_ids() {
        for value in (0..graph.output_count(id)).map(|slot| id.at(slot)) {
            if shapes.rank(value) != Some(perm.len()) {
                continue;
            }
            match graph.constant(value) {
                None => before += price(&mut network, graph, perm, turns, &nodes, value),
                // A small constant may be kept in both orders.
                Some(tensor) if tensor.byte_len() > SMALL => keep(&mut network, graph, turns, &nodes, value),
                Some(_) => {}
            }
        }
    }
    let (cost, turned) = network.cut();
    if cost >= before {
        return BTreeSet::new();
    }
    nodes.into_iter().filter(|(_, node)| turned.contains(node)).map(|(id, _)| id).collect()
}

/// Adds to the network that the constant `value` is better kept in one order: all that read it are turned, or none.
fn keep(
    network: &mut Network,
    graph: &Graph,
    turns: &BTreeMap<NodeId, Turn>,
    nodes: &BTreeMap<NodeId, NodeIndex>,
    value: Outlet,
) {
    let (any, all) = (network.flow.add_node(()), network.flow.add_node(()));
    network.cost(any, all, NEVER);
    for (reader, inlet) in graph.uses(value) {
        let turns = |slot: &u32| turns.get(&reader).is_some_and(|turn| turn.turned.contains(slot));
        let reader = match (nodes.get(&reader), inlet) {
            (Some(&node), Inlet::Slot(slot)) if turns(&slot) => node,
            _ => network.sink,
        };
        network.cost(reader, any, NEVER);
        network.cost(all, reader, NEVER);
    }
}

/// Adds what `value` costs to the network; answers what it costs as things are.
fn price(
    network: &mut Network,
    graph: &Graph,
    perm: &[usize],
    turns: &BTreeMap<NodeId, Turn>,
    nodes: &BTreeMap<NodeId, NodeIndex>,
    value: Outlet,
) -> u32 {
    let back = inverse(perm);
    let (mut flexible, mut fixed, mut turned_back) = (Vec::new(), graph.is_output(value), false);
    for (reader, inlet) in graph.uses(value) {
        match (nodes.get(&reader), inlet) {
            (Some(node), Inlet::Slot(slot)) if turns[&reader].turned.contains(&slot) => flexible.push(*node),
            (None, Inlet::Slot(0)) => match permutation(graph, reader) {
                Some(after) => turned_back |= after == back,
                None => fixed |= absorbs(graph, reader, perm).is_none(),
            },
            _ => fixed = true,
        }
    }
    let sink = network.sink;
    let mut readers = flexible.clone();
    readers.extend(fixed.then_some(sink));
    if permutation(graph, value.node).as_deref() == Some(perm) {
        // The `Transpose` stays as long as anything reads it.
        network.unless_all(network.source, &readers);
        return u32::from(!readers.is_empty());
    }
    if let Some(&node) = nodes.get(&value.node) {
        network.unless_all(node, &readers);
        let mut wanted = flexible;
        wanted.extend(turned_back.then_some(network.source));
        network.if_any(node, &wanted);
    } else if !turned_back {
        network.if_any(sink, &flexible);
    }
    u32::from(turned_back && nodes.contains_key(&value.node))
}
