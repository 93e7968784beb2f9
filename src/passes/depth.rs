//! See [`Depth`].

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use xxhash_rust::xxh3::Xxh3;

use crate::{
    analysis::{linear::Linear, shapes::Shapes},
    ir::{Graph, NodeId, Outlet, Weight},
    pass::{Context, Declare, Fidelity, Pass},
};

/// Remove whole residual blocks: of x + f(x), x alone is left.
///
/// What a block adds is small where many are in a row, and the layers after it are fitted again to what they computed in the
/// original. Each block is measured by itself: what error the whole model makes without it.
///
/// Applies when: there are samples (`--data`), and the sum has the shape of x. A block in whose place a shortcut has weights
/// of its own stays.
///
/// Fidelity: lossy; the error budget or a target decides which blocks go.
#[derive(Debug, clap::Parser)]
#[command(name = "depth")]
pub(super) struct Depth {}

impl Declare for Depth {
    const NAME: &'static str = "depth";
    const FIDELITY: Fidelity = Fidelity::Lossy;
}

/// A sum that may be replaced by one of its terms, from which the other is computed.
struct Block {
    sum: Outlet,
    shortcut: Outlet,
    /// What nothing reads once it is gone.
    gone: BTreeSet<NodeId>,
    /// What that costs of what is to be saved.
    saved: f64,
}

impl Pass for Depth {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        let found = blocks(graph, &cx.shapes(graph), &cx.telling_shapes(graph), cx);
        if cx.yardstick.is_none() {
            for block in &found {
                cx.decline(graph.name(block.sum), "without samples, nothing tells what a block is for");
            }
            return Ok(());
        }
        let key = |block: &Block| key(graph, block);
        let yardstick = cx.yardstick_for(graph, found.iter().map(key));
        let error = |block: &Block| {
            let error = yardstick.as_ref()?.error(&without(graph, block))?;
            error.is_finite().then_some(error * error)
        };
        let errors: Vec<Arc<Option<f64>>> = cx.remember_all(&found, key, error);
        let mut offers: Vec<_> =
            found.iter().zip(errors).filter_map(|(block, error)| Some(((*error)?, block))).collect();
        offers.sort_by(|a, b| (a.0 / a.1.saved).total_cmp(&(b.0 / b.1.saved)));
        let (price, mut gone) = (cx.price, BTreeMap::new());
        for (error, block) in offers {
            let pays = error / block.saved < price.per_byte && error <= price.ceiling && gone.len() < price.steps;
            if !pays || !graph.contains(block.sum.node) {
                continue;
            }
            // What is left of a block that is gone is its own shortcut.
            let mut shortcut = block.shortcut;
            while let Some(&before) = gone.get(&shortcut) {
                shortcut = before;
            }
            replace(graph, block.sum, shortcut);
            gone.insert(block.sum, shortcut);
            cx.predicted += error;
            cx.refit = true;
            cx.count("residual blocks removed");
        }
        Ok(())
    }

    fn is_fixed(&self) -> bool {
        false
    }
}

/// A hash of a block and of what is left of it: its error is taken to be the same after other passes did more or less.
fn key(graph: &Graph, block: &Block) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(Depth::NAME.as_bytes());
    hasher.update(graph.name(block.sum).as_bytes());
    for &id in &block.gone {
        hasher.update(graph.name(id.out()).as_bytes());
        let bytes = graph.weight(id.out()).map_or(0, Weight::stored_bytes);
        hasher.update(&bytes.to_le_bytes());
    }
    hasher.digest()
}

/// The blocks of `graph` that may go; those that are kept are reported.
fn blocks(graph: &Graph, shapes: &Shapes, telling: &Shapes, cx: &mut Context) -> Vec<Block> {
    let place: BTreeMap<NodeId, usize> = graph.order().into_iter().enumerate().map(|(place, id)| (id, place)).collect();
    let mut found = Vec::new();
    for id in graph.ops().into_iter().filter(|&id| graph.op_of(id, "Add").is_some()) {
        let sum = id.out();
        let (Some(a), Some(b)) = (graph.operand(id, 0), graph.operand(id, 1)) else { continue };
        let shortcut = [(a, b), (b, a)].into_iter().find_map(|(shortcut, branch)| {
            let same = |shapes: &Shapes| shapes.known(sum).is_some_and(|dims| shapes.known(shortcut) == Some(dims));
            let is_same = same(shapes) && same(telling) && telling.other().is_none_or(same);
            let is_value = graph.weight(shortcut).is_none() && shortcut != branch;
            (is_same && is_value && depends(graph, branch, shortcut, &place)).then_some(shortcut)
        });
        let Some(shortcut) = shortcut.filter(|_| !graph.is_output(sum) && !graph.is_pinned(sum)) else { continue };
        let mut block = Block { sum, shortcut, gone: BTreeSet::new(), saved: 0.0 };
        let left = without(graph, &block);
        block.gone = graph.node_ids().filter(|&id| !left.contains(id)).collect();
        if !block.gone.iter().any(|&id| Linear::of(graph, id).is_some()) {
            continue;
        }
        let names: Vec<_> = block.gone.iter().flat_map(|&id| [graph.label(id), graph.name(id.out())]).collect();
        if cx.is_kept(&names) {
            cx.decline(graph.name(sum), "kept by --keep");
            continue;
        }
        let saves = |&id: &NodeId| cx.minimize.of_node(graph, shapes, id);
        block.saved = block.gone.iter().filter_map(saves).sum();
        if block.saved > 0.0 {
            found.push(block);
        }
    }
    found
}

/// Whether `value` is computed from `source`.
fn depends(graph: &Graph, value: Outlet, source: Outlet, place: &BTreeMap<NodeId, usize>) -> bool {
    let (mut seen, mut open) = (BTreeSet::new(), vec![value]);
    while let Some(value) = open.pop() {
        if value == source {
            return true;
        }
        if place[&value.node] > place[&source.node] && seen.insert(value.node) {
            let read = graph.operands(value.node).into_iter().flatten().chain(graph.captures(value.node).into_values());
            open.extend(read);
        }
    }
    false
}

fn without(graph: &Graph, block: &Block) -> Graph {
    let mut left = graph.clone();
    replace(&mut left, block.sum, block.shortcut);
    left
}

fn replace(graph: &mut Graph, sum: Outlet, shortcut: Outlet) {
    graph.replace_uses(sum, shortcut);
    graph.sweep(sum.node);
}
