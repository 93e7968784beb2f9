//! See [`ControlFlow`].

use crate::{
    analysis::{numbering::Numbering, shapes::Shapes},
    ir::{Graph, Kind, NodeId},
    pass::{Context, Declare, Fidelity, Pass, rewrite, rewrite_shaped},
};

/// Put the branch that an `If` always takes in its place, and constants into the one body that reads them.
///
/// A branch is always taken when the condition is constant or settled by shapes, when both branches compute the same, and
/// when the model is sure to fail with the other: a recurrent layer after a branch of the wrong rank.
///
/// Fidelity: exact.
#[derive(Debug, clap::Parser)]
#[command(name = "control-flow")]
pub(super) struct ControlFlow {}

impl Declare for ControlFlow {
    const NAME: &'static str = "control-flow";
    const FIDELITY: Fidelity = Fidelity::Exact;
}

impl Pass for ControlFlow {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        cx.add("branches put in place", rewrite_shaped(graph, &inline));
        cx.add("constants moved into bodies", rewrite(graph, sink));
        Ok(())
    }
}

/// Puts the branch that the `If` at `node` always takes in its place.
fn inline(graph: &mut Graph, shapes: &Shapes, node: NodeId) -> Option<()> {
    let op = graph.op_of(node, "If")?;
    let always = shapes.taken(node).or_else(|| match &op.bodies[..] {
        [a, b] if are_equal(&a.graph, &b.graph) => Some(0),
        _ => None,
    });
    graph.inline(node, always?)
}

/// Whether two bodies of one node make the same results.
fn are_equal(a: &Graph, b: &Graph) -> bool {
    let mut numbering = Numbering::default();
    let [a, b] = [a, b].map(|graph| {
        let numbers = numbering.number(graph);
        graph.outputs().iter().map(|output| numbers.get(&output.value).copied()).collect::<Vec<_>>()
    });
    a == b && a.iter().all(Option::is_some)
}

/// Moves each constant that only one body of `node` reads into that body.
fn sink(graph: &mut Graph, node: NodeId) -> Option<()> {
    let mut moved = None;
    for (i, value) in graph.captures(node) {
        let alone = graph.uses(value).len() == 1 && !graph.is_output(value) && !graph.is_pinned(value);
        let Some(weight) = graph.weight(value).filter(|_| alone).cloned() else { continue };
        let place = |body: &Graph| body.node_ids().find(|&id| matches!(body.kind(id), Kind::Capture(j) if *j == i));
        let places: Vec<_> = graph.op(node)?.bodies.iter().map(|body| place(&body.graph)).collect();
        let mut readers = places.iter().enumerate().filter_map(|(body, place)| Some((body, (*place)?)));
        let (Some((body, place)), None) = (readers.next(), readers.next()) else { continue };
        if graph.op(node)?.bodies[body].graph.is_output(place.out()) {
            continue;
        }
        graph.bodies_mut(node)[body].graph.settle(place, weight);
        graph.drop_capture(node, i);
        graph.sweep(value.node);
        moved = Some(());
    }
    moved
}
