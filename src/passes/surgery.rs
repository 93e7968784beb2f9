//! Taking whole classes of channels out of a graph.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    analysis::channels::{Axis, Channels, Count},
    ir::{Graph, NodeId, Op, Outlet, Tensor, Weight},
    refit::Left,
};

/// Spares the best of the doomed classes of each axis that would be left without any. An index of a product goes with any of
/// its factors', so where all do, the one whose worst factor is best stays.
pub(super) fn spare(channels: &Channels, doomed: &mut BTreeMap<usize, f64>) {
    for (value, axis, extent) in channels.axes() {
        let going = |i: usize| {
            let classes = channels.classes(value, axis, i).iter();
            let going: Vec<_> = classes.filter_map(|class| Some((*doomed.get(class)?, *class))).collect();
            (!going.is_empty()).then_some(going)
        };
        let all = (0..extent).map(going).collect::<Option<Vec<_>>>().unwrap_or_default();
        let worst = |going: &[(f64, usize)]| going.iter().map(|going| going.0).fold(f64::INFINITY, f64::min);
        let best = all.iter().max_by(|a, b| worst(a).total_cmp(&worst(b)).then(b[0].1.cmp(&a[0].1)));
        for (_, class) in best.into_iter().flatten() {
            doomed.remove(class);
        }
    }
}

/// Removes the classes `doomed` from every constant, and what spells their count; new constants are named after `pass`.
/// Answers which channels are left of each value that lost some.
pub(super) fn remove(graph: &mut Graph, channels: &Channels, doomed: &BTreeSet<usize>, pass: &str) -> Left {
    let stays =
        |value: Outlet, axis: usize, i: usize| !channels.classes(value, axis, i).iter().any(|c| doomed.contains(c));
    let kept =
        |value: Outlet, axis: usize, extent: usize| (0..extent).filter(|&i| stays(value, axis, i)).collect::<Vec<_>>();
    // Counts first: they are read off the values as they were.
    let axes: Vec<_> =
        channels.axes().map(|(value, axis, extent)| (value, axis, kept(value, axis, extent), extent)).collect();
    let mut extents: BTreeMap<String, Vec<(usize, usize)>> = BTreeMap::new();
    for (value, axis, kept, extent) in &axes {
        if kept.len() < *extent && !channels.is_inner(*value, *axis) {
            extents.entry(graph.name(*value).to_owned()).or_default().push((*axis, kept.len()));
        }
    }
    let places = |value: Outlet, axis: usize| kept(value, axis, channels.extent(value, axis).unwrap_or(0));
    for count in &channels.counts {
        // Where nothing went, what is written stays: open extents are not those at which channels were followed.
        let is_touched = |(value, axis)| Some(places(value, axis).len()) != channels.extent(value, axis);
        if count.axis(graph).is_some_and(is_touched) {
            respell(graph, count, &places, pass);
        }
    }
    let narrowed = axes
        .into_iter()
        .filter(|(value, axis, kept, extent)| kept.len() < *extent && !channels.is_inner(*value, *axis));
    let left = select(graph, narrowed.map(|(value, axis, kept, _)| ((value, axis), kept)), pass);
    graph.edit_extents(&extents);
    left
}

/// Has the constants among these values hold such channels in such an order along an axis; new ones are named after `pass`. Answers
/// which channels of the others stand where.
pub(super) fn select(graph: &mut Graph, axes: impl Iterator<Item = (Axis, Vec<usize>)>, pass: &str) -> Left {
    let mut selected: BTreeMap<Outlet, Weight> = BTreeMap::new();
    let mut left = Left::new();
    for ((value, axis), kept) in axes {
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
        let name = graph.name_after(value, pass);
        let new = graph.add_const(weight, &name);
        graph.replace_uses(value, new);
        graph.sweep(value.node);
    }
    left
}

/// Rewrites an attribute or constant that spells a count or places of channels; `kept` are the places along an axis that stay.
fn respell(graph: &mut Graph, count: &Count, kept: &dyn Fn(Outlet, usize) -> Vec<usize>, pass: &str) -> Option<()> {
    let size = |value: Outlet, axis: usize| kept(value, axis).len() as i64;
    match *count {
        Count::Attribute(node, name, (value, axis)) => {
            let size = size(value, axis);
            graph.edit_op(node, |op| *op = std::mem::take(op).with_int(name, size));
        }
        Count::Entry { reader, slot, at, of: (value, axis) } => {
            let mut entries = graph.constant(graph.operand(reader, slot)?)?.i64s()?;
            entries[at] = size(value, axis);
            set_ints(graph, reader, slot, &entries, pass)?;
        }
        Count::Split(node, axis) => {
            let parts: Vec<_> = (0..graph.output_count(node)).map(|slot| size(node.at(slot), axis)).collect();
            match graph.operand(node, 1) {
                Some(_) => set_ints(graph, node, 1, &parts, pass)?,
                None => graph.edit_op(node, |op: &mut Op| *op = std::mem::take(op).with_ints("split", &parts)),
            }
        }
        Count::Gather(node, axis, ref taken) => {
            let left = kept(graph.operand(node, 0)?, axis);
            let place = |&at: &usize| left.iter().position(|&place| place == taken[at]).map(|i| i as i64);
            let taken: Vec<_> = kept(node.out(), axis).iter().map(place).collect::<Option<_>>()?;
            set_ints(graph, node, 1, &taken, pass)?;
        }
        Count::Slice(node, entry, axis, ref range) => {
            let left = kept(graph.operand(node, 0)?, axis);
            let before = |limit: usize| left.iter().filter(|&&place| place < limit).count() as i64;
            let bounds = [("starts", 1, before(range.start)), ("ends", 2, before(range.end))];
            for (name, slot, bound) in bounds {
                let listed = graph.operand(node, slot);
                let mut entries = match listed {
                    Some(list) => graph.constant(list)?.i64s()?,
                    None => graph.op(node)?.ints(name)?.to_vec(),
                };
                entries[entry] = bound;
                if listed.is_some() {
                    set_ints(graph, node, slot, &entries, pass)?;
                } else {
                    graph.edit_op(node, |op: &mut Op| *op = std::mem::take(op).with_ints(name, &entries));
                }
            }
        }
    }
    Some(())
}

/// Has `node` read `entries` in `slot`, where it read another constant of the same type and rank.
pub(super) fn set_ints(graph: &mut Graph, node: NodeId, slot: u32, entries: &[i64], pass: &str) -> Option<()> {
    let old = graph.operand(node, slot)?;
    let constant = graph.constant(old)?;
    if constant.i64s()? == entries {
        return Some(());
    }
    let dims = if constant.dims().is_empty() { vec![] } else { vec![entries.len()] };
    let new = Weight::dense(Tensor::integers(constant.dtype(), &dims, entries)?);
    let name = graph.name_after(old, pass);
    let new = graph.add_const(new, &name);
    graph.exchange_operand(node, slot, Some(new));
    Some(())
}
