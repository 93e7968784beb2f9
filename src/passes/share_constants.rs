//! See [`ShareConstants`].

use std::collections::HashMap;

use crate::{
    ir::{Graph, Kind, NodeId, Outlet, Weight},
    pass::{Context, Declare, Fidelity, Pass, everywhere},
};

/// Keep a constant that several bodies of an operator hold, or a body and the graph around it, once, outside.
///
/// Applies when: it is larger than the names that it takes to share it.
///
/// Fidelity: exact.
#[derive(Debug, clap::Parser)]
#[command(name = "share-constants")]
pub(super) struct ShareConstants {}

impl Declare for ShareConstants {
    const NAME: &'static str = "share-constants";
    const FIDELITY: Fidelity = Fidelity::Exact;
}

impl Pass for ShareConstants {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        let mut shared = 0;
        everywhere(graph, &mut |graph| {
            for holder in graph.holders() {
                shared += share(graph, holder);
            }
        });
        cx.add("constants shared", shared);
        Ok(())
    }
}

/// Constants of fewer bytes are shared for more than they take.
const MIN_BYTES: usize = 256;

/// The large constants of `graph` that can be named elsewhere.
fn large(graph: &Graph) -> Vec<(NodeId, u64)> {
    let constants = graph.order().into_iter().filter(|id| matches!(graph.kind(*id), Kind::Const(_)));
    let free = constants.filter(|id| !graph.is_output(id.out()) && !graph.is_pinned(id.out()));
    let tensor =
        |id: NodeId| Some((id, graph.constant(id.out()).filter(|tensor| tensor.byte_len() >= MIN_BYTES)?.hash()));
    free.filter_map(tensor).collect()
}

/// Moves what the bodies of `holder` share out of them; says how many constants went.
fn share(graph: &mut Graph, holder: NodeId) -> usize {
    let mut places: Vec<(Option<usize>, NodeId, u64)> =
        large(graph).into_iter().map(|(id, hash)| (None, id, hash)).collect();
    for (body, inside) in graph.op(holder).iter().flat_map(|op| op.bodies.iter().enumerate()) {
        places.extend(large(&inside.graph).into_iter().map(|(id, hash)| (Some(body), id, hash)));
    }
    let mut alike: HashMap<u64, Vec<(Option<usize>, NodeId)>> = HashMap::new();
    for &(body, id, hash) in &places {
        alike.entry(hash).or_default().push((body, id));
    }
    let mut shared = 0;
    for (body, id, hash) in places {
        let Some(group) = alike.remove(&hash).filter(|group| group.len() > 1) else { continue };
        let Some(weight) = weight(graph, holder, body, id) else { continue };
        let same = |&(body, id): &(Option<usize>, NodeId)| {
            self::weight(graph, holder, body, id).is_some_and(|other| other.value().same(weight.value()))
        };
        let inside: Vec<_> =
            group.iter().filter(|place| same(place)).filter_map(|&(body, id)| Some((body?, id))).collect();
        let outer = match body {
            None if !inside.is_empty() => id.out(),
            Some(body) if inside.len() > 1 => hoist(graph, holder, body, id, weight),
            _ => continue,
        };
        for (body, id) in inside {
            graph.capture(holder, body, id, outer);
            shared += 1;
        }
    }
    shared
}

/// The constant at `id` of `graph`, or of a body of `holder`.
fn weight(graph: &Graph, holder: NodeId, body: Option<usize>, id: NodeId) -> Option<Weight> {
    let graph = match body {
        Some(body) => &graph.op(holder)?.bodies.get(body)?.graph,
        None => graph,
    };
    graph.weight(id.out()).cloned()
}

/// Adds the constant at `id` of a body of `holder` to the graph around it.
fn hoist(graph: &mut Graph, holder: NodeId, body: usize, id: NodeId, weight: Weight) -> Outlet {
    let name = graph.op(holder).and_then(|op| op.bodies.get(body)).map_or("", |body| body.graph.name(id.out()));
    let name = name.to_owned();
    graph.add_const(weight, &name)
}
