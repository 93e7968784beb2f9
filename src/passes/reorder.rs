//! Putting channels in another order, in all weights that hold them, so that nothing has to be moved when the model runs.

use std::collections::{BTreeMap, BTreeSet};

use super::surgery::{select, set_ints};
use crate::{
    analysis::channels::{Axis, Channels},
    ir::{Graph, NodeId},
    pass::Context,
    refit::Left,
};

/// The axes whose channels change places, each with what stands where.
type Moved = BTreeMap<Axis, Vec<usize>>;

/// Takes out those of `gathers`, each of which puts the channels of a value in another order, that are of no use where the weights
/// before or after them hold channels in that order; where others stand in the way, they take channels from where they now are.
/// Says how many were taken out.
pub(super) fn settle(graph: &mut Graph, gathers: &BTreeSet<NodeId>, cx: &mut Context, pass: &str) -> usize {
    let (mut open, mut settled) = (gathers.clone(), 0);
    while !open.is_empty() {
        let channels = Channels::apart(graph, &cx.telling_shapes(graph), &open);
        let mut found = None;
        for &gather in &open {
            let Some(moved) = moved(graph, &channels, gather, cx) else { continue };
            let mut next = graph.clone();
            let left = put(&mut next, &channels, &moved, &open, pass);
            if take_out(&mut next, gather, &moved).is_some() {
                *graph = next;
                cx.kept.narrow(left);
                found = Some(gather);
                break;
            }
        }
        let Some(gather) = found else { break };
        open.remove(&gather);
        settled += 1;
    }
    settled
}

/// The orders in which `gather` changes nothing: those of the channels after it, or of those before it.
fn moved(graph: &Graph, channels: &Channels, gather: NodeId, cx: &Context) -> Option<Moved> {
    let (read, made, taken) = ends(graph, channels, gather)?;
    let mut inverse = vec![0; taken.len()];
    taken.iter().enumerate().for_each(|(place, &from)| inverse[from] = place);
    let wanted = [(made, &inverse), (read, &taken)];
    wanted.into_iter().find_map(|(axis, order)| {
        let moved = spread(graph, channels, axis, order, cx)?;
        let taken = retaken(&moved, (read, made), &taken);
        taken.iter().enumerate().all(|(place, &from)| place == from).then_some(moved)
    })
}

/// The axes that a `Gather` with constant indices reads and makes, and what it takes; `None` where that is no permutation.
fn ends(graph: &Graph, channels: &Channels, gather: NodeId) -> Option<(Axis, Axis, Vec<usize>)> {
    let (read, made) = (graph.operand(gather, 0)?, gather.out());
    let axis = usize::try_from(graph.op_of(gather, "Gather")?.int("axis")?).ok()?;
    let taken = graph.constant(graph.operand(gather, 1)?)?.i64s()?;
    let taken = taken.into_iter().map(usize::try_from).collect::<Result<Vec<_>, _>>().ok()?;
    let is_permutation = taken.iter().collect::<BTreeSet<_>>().len() == taken.len()
        && channels.extent(read, axis) == Some(taken.len())
        && taken.iter().all(|&from| from < taken.len());
    is_permutation.then_some(((read, axis), (made, axis), taken))
}

/// What a `Gather` takes once channels have moved.
fn retaken(moved: &Moved, (read, made): (Axis, Axis), taken: &[usize]) -> Vec<usize> {
    let stood = |place: usize| moved.get(&made).map_or(place, |order| order[place]);
    let stands = |from: usize| match moved.get(&read) {
        Some(order) => order.iter().position(|&place| place == from).unwrap_or(from),
        None => from,
    };
    (0..taken.len()).map(|place| stands(taken[stood(place)])).collect()
}

/// The order of every axis where the one of `axis` is such that `order[i]` comes to stand at place `i`: the channels that stand or
/// fall with one another change places with one another. `None` where some of them can't, or are not told apart.
fn spread(graph: &Graph, channels: &Channels, axis: Axis, order: &[usize], cx: &Context) -> Option<Moved> {
    let class = |index: usize| match channels.classes(axis.0, axis.1, index) {
        [class] if channels.pinned(*class).is_none() => Some(*class),
        _ => None,
    };
    let classes = (0..order.len()).map(class).collect::<Option<Vec<_>>>()?;
    let into: BTreeMap<usize, usize> = classes.iter().copied().zip(order.iter().map(|&from| classes[from])).collect();
    (into.len() == order.len()).then_some(())?;
    let mut moved = Moved::new();
    for (value, axis, extent) in channels.axes() {
        let key = |index: usize| channels.classes(value, axis, index).to_vec();
        if !(0..extent).any(|index| key(index).iter().any(|class| into.contains_key(class))) {
            continue;
        }
        if graph.is_pinned(value) || cx.is_kept(&[graph.name(value), graph.label(value.node)]) {
            return None;
        }
        let places: BTreeMap<Vec<usize>, usize> = (0..extent).map(|index| (key(index), index)).collect();
        let from = |index: usize| {
            let mut key: Vec<_> = key(index).iter().map(|class| *into.get(class).unwrap_or(class)).collect();
            key.sort_unstable();
            places.get(&key).copied()
        };
        let order = (0..extent).map(from).collect::<Option<Vec<_>>>().filter(|_| places.len() == extent)?;
        if !channels.is_inner(value, axis) {
            moved.insert((value, axis), order);
        }
    }
    Some(moved)
}

/// Puts the channels of all constants where `moved` says, and has `gathers` take them from there. Answers which channel of a value
/// stands where.
fn put(graph: &mut Graph, channels: &Channels, moved: &Moved, gathers: &BTreeSet<NodeId>, pass: &str) -> Left {
    for &gather in gathers {
        let Some((read, made, taken)) = ends(graph, channels, gather) else { continue };
        let taken: Vec<_> = retaken(moved, (read, made), &taken).into_iter().map(|from| from as i64).collect();
        set_ints(graph, gather, 1, &taken, pass);
    }
    select(graph, moved.iter().map(|(&axis, order)| (axis, order.clone())), pass)
}

/// Removes a `Gather` that changes nothing. Where the channels after it moved, it is by the name of its result that their order is
/// known: what it reads takes that.
fn take_out(graph: &mut Graph, gather: NodeId, moved: &Moved) -> Option<()> {
    let (read, own) = (graph.operand(gather, 0)?, graph.op(gather)?.clone());
    if !moved.keys().any(|&(value, _)| value == gather.out()) {
        return graph.bypass(gather, read);
    }
    let operands: Vec<_> = graph.operands(read.node).into_iter().collect::<Option<_>>()?;
    let op = graph.op(read.node)?.clone().in_place_of(&own);
    graph.replace_op(gather, op, &operands);
    Some(())
}
