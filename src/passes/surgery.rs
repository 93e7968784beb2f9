//! Taking whole classes of channels out of a graph.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    analysis::channels::{Channels, Count},
    ir::{Graph, NodeId, Op, Outlet, Tensor, Weight},
    refit::Kept,
};

/// Spares the best of the doomed classes of each axis that would be left without any.
pub(super) fn spare(channels: &Channels, doomed: &mut BTreeMap<usize, f64>) {
    for (value, axis, extent) in channels.axes() {
        let classes = (0..extent).map(|i| channels.class(value, axis, i));
        let scores = classes.map(|class| Some((*doomed.get(&class?)?, class?))).collect::<Option<Vec<_>>>();
        let best = scores.and_then(|scores| scores.into_iter().max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1))));
        if let Some((_, class)) = best {
            doomed.remove(&class);
        }
    }
}

/// Removes the classes `doomed` from every constant, and what spells their count; new constants are named after `pass`.
/// Answers which channels are left of each value that lost some.
pub(super) fn remove(graph: &mut Graph, channels: &Channels, doomed: &BTreeSet<usize>, pass: &str) -> Kept {
    let stays =
        |value: Outlet, axis: usize, i: usize| channels.class(value, axis, i).is_none_or(|c| !doomed.contains(&c));
    let kept =
        |value: Outlet, axis: usize, extent: usize| (0..extent).filter(|&i| stays(value, axis, i)).collect::<Vec<_>>();
    // Counts first: they are read off the values as they were.
    let axes: Vec<_> =
        channels.axes().map(|(value, axis, extent)| (value, axis, kept(value, axis, extent), extent)).collect();
    let size = |value: Outlet, axis: usize| channels.extent(value, axis).map(|extent| kept(value, axis, extent).len());
    let mut extents: BTreeMap<String, Vec<(usize, usize)>> = BTreeMap::new();
    for (value, axis, kept, extent) in &axes {
        if kept.len() < *extent {
            extents.entry(graph.name(*value).to_owned()).or_default().push((*axis, kept.len()));
        }
    }
    for count in &channels.counts {
        respell(graph, count, &size, pass);
    }
    let mut selected: BTreeMap<Outlet, Weight> = BTreeMap::new();
    let mut left = Kept::new();
    for (value, axis, kept, extent) in axes {
        if kept.len() == extent {
            continue;
        }
        if graph.op(value.node).is_some() {
            left.entry(graph.name(value).to_owned()).or_default().insert(axis, kept);
            continue;
        }
        let Some(weight) = selected.get(&value).or_else(|| graph.weight(value)) else { continue };
        if let Some(weight) = weight.select(axis, &kept) {
            selected.insert(value, weight);
        }
    }
    for (value, weight) in selected {
        let name = format!("{}.{pass}", graph.name(value));
        let new = graph.add_const(weight, &name);
        graph.replace_uses(value, new);
        graph.sweep(value.node);
    }
    graph.edit_extents(&extents);
    left
}

/// Rewrites an attribute or constant that spells a count of channels.
fn respell(graph: &mut Graph, count: &Count, size: &dyn Fn(Outlet, usize) -> Option<usize>, pass: &str) -> Option<()> {
    match *count {
        Count::Group(node) => {
            let channels = size(graph.operand(node, 0)?, 1)? as i64;
            if graph.op(node)?.int("group") != Some(channels) {
                graph.edit_op(node, |op| *op = std::mem::take(op).with_int("group", channels));
            }
        }
        Count::Shape(node, axis) => {
            let shape = graph.operand(node, 1)?;
            let mut entries = graph.constant(shape)?.i64s()?;
            entries[axis] = size(node.out(), axis)? as i64;
            set_ints(graph, node, &entries, pass)?;
        }
        Count::Split(node, axis) => {
            let parts = (0..graph.output_count(node)).map(|slot| Some(size(node.at(slot), axis)? as i64));
            let parts: Vec<_> = parts.collect::<Option<_>>()?;
            match graph.operand(node, 1) {
                Some(_) => set_ints(graph, node, &parts, pass)?,
                None => graph.edit_op(node, |op: &mut Op| *op = std::mem::take(op).with_ints("split", &parts)),
            }
        }
    }
    Some(())
}

/// Has `node` read `entries` in slot 1, where it read another constant.
fn set_ints(graph: &mut Graph, node: NodeId, entries: &[i64], pass: &str) -> Option<()> {
    let old = graph.operand(node, 1)?;
    if graph.constant(old)?.i64s()? == entries {
        return Some(());
    }
    let name = format!("{}.{pass}", graph.name(old));
    let new = graph.add_const(Weight::dense(Tensor::i64(&[entries.len()], entries)), &name);
    graph.exchange_operand(node, 1, Some(new));
    Some(())
}
