//! Putting channels in another order, in all weights that hold them, so that nothing has to be moved when the model runs.

use std::collections::{BTreeMap, BTreeSet};

use super::surgery::{select, set_ints};
use crate::{
    analysis::channels::{Axis, Channels},
    ir::{Graph, NodeId, Op, Outlet},
    pass::Context,
    refit::Left,
};

/// The axes whose channels change places, each with what stands where.
type Places = BTreeMap<Axis, Vec<usize>>;

/// Takes out those of `gathers`, each of which puts the channels of a value in another order, that are of no use where the weights
/// before or after them hold channels in that order; where others stand in the way, they take channels from where they now are.
/// Answers which values now hold channels in another order.
pub(super) fn settle(graph: &mut Graph, gathers: &BTreeSet<NodeId>, cx: &mut Context, pass: &str) -> BTreeSet<Outlet> {
    let (mut open, mut reordered) = (gathers.clone(), BTreeSet::new());
    while !open.is_empty() {
        let channels = Channels::apart(graph, &cx.telling_shapes(graph), &open);
        // Those of different channels are taken out together.
        let (mut all, mut touched, mut found) = (Places::new(), BTreeSet::new(), Vec::new());
        for &gather in &open {
            let Some((read, made, taken)) = ends(graph, &channels, gather) else { continue };
            let Some(moved) = moved(graph, &channels, (read, made, &taken), cx) else { continue };
            let is_needed = graph.is_output(made.0) && !graph.can_take_name(read.0);
            let touches: Vec<Axis> = moved.keys().copied().chain([read, made]).collect();
            if !is_needed && touches.iter().all(|axis| !touched.contains(axis)) {
                found.push((gather, moved.contains_key(&made)));
                touched.extend(touches);
                all.extend(moved);
            }
        }
        if found.is_empty() {
            break;
        }
        let left = put(graph, &channels, &all, &open, pass);
        cx.kept.narrow(left);
        reordered.extend(all.keys().map(|(value, _)| *value).filter(|value| graph.op(value.node).is_some()));
        for (gather, is_known_by_result) in found {
            if let (true, Some(read)) = (is_known_by_result, graph.operand(gather, 0)) {
                cx.kept.rename(graph.name(read), graph.name(gather.out()));
            }
            take_out(graph, gather, is_known_by_result);
            open.remove(&gather);
        }
    }
    reordered
}

/// The orders in which a `Gather` that takes these changes nothing: those of the channels after it, or of those before it.
fn moved(
    graph: &Graph,
    channels: &Channels,
    (read, made, taken): (Axis, Axis, &[usize]),
    cx: &Context,
) -> Option<Places> {
    let wanted = [(made, inverse(taken)), (read, taken.to_vec())];
    wanted.into_iter().find_map(|(axis, order)| {
        let moved = spread(graph, channels, axis, &order, cx)?;
        let taken = retaken(&moved, (read, made), taken);
        taken.iter().enumerate().all(|(place, &from)| place == from).then_some(moved)
    })
}

/// The permutation that undoes one.
pub(super) fn inverse(order: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; order.len()];
    order.iter().enumerate().for_each(|(place, &from)| inverse[from] = place);
    inverse
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
fn retaken(moved: &Places, (read, made): (Axis, Axis), taken: &[usize]) -> Vec<usize> {
    let stood = |place: usize| moved.get(&made).map_or(place, |order| order[place]);
    let stand = moved.get(&read).map(|order| inverse(order));
    let stands = |from: usize| stand.as_ref().map_or(from, |stand| stand[from]);
    (0..taken.len()).map(|place| stands(taken[stood(place)])).collect()
}

/// The order of every axis where the one of `axis` is such that `order[i]` comes to stand at place `i`: the channels that stand or
/// fall with one another change places with one another. `None` where some of them can't, or are not told apart.
fn spread(graph: &Graph, channels: &Channels, axis: Axis, order: &[usize], cx: &Context) -> Option<Places> {
    let class = |index: usize| match channels.classes(axis.0, axis.1, index) {
        [class] if channels.pinned(*class).is_none() => Some(*class),
        _ => None,
    };
    let classes = (0..order.len()).map(class).collect::<Option<Vec<_>>>()?;
    let into: BTreeMap<usize, usize> = classes.iter().copied().zip(order.iter().map(|&from| classes[from])).collect();
    (into.len() == order.len()).then_some(())?;
    let mut moved = Places::new();
    for (value, axis, extent) in channels.axes() {
        let key = |index: usize| channels.classes(value, axis, index).to_vec();
        if !(0..extent).any(|index| key(index).iter().any(|class| into.contains_key(class))) {
            continue;
        }
        let readers = graph.uses(value).into_iter().filter(|_| graph.weight(value).is_some());
        let labels = readers.map(|(node, _)| graph.label(node)).chain([graph.name(value), graph.label(value.node)]);
        if graph.is_pinned(value) || cx.is_kept(&labels.collect::<Vec<_>>()) {
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
fn put(graph: &mut Graph, channels: &Channels, moved: &Places, gathers: &BTreeSet<NodeId>, pass: &str) -> Left {
    for &gather in gathers {
        let Some((read, made, taken)) = ends(graph, channels, gather) else { continue };
        let taken: Vec<_> = retaken(moved, (read, made), &taken).into_iter().map(|from| from as i64).collect();
        set_ints(graph, gather, 1, &taken, pass);
    }
    select(graph, moved.iter().map(|(&axis, order)| (axis, order.clone())), pass)
}

/// Removes a `Gather` that changes nothing. Where the channels after it moved, it is by the name of its result that their order is
/// known: what it reads takes that.
fn take_out(graph: &mut Graph, gather: NodeId, is_known_by_result: bool) {
    let (Some(read), Some(own)) = (graph.operand(gather, 0), graph.op(gather).cloned()) else { return };
    if !is_known_by_result {
        graph.bypass(gather, read);
        return;
    }
    let is_alone = graph.sole_use(read).is_some() && graph.output_count(read.node) == 1 && !graph.is_output(read);
    let maker = graph.op(read.node).filter(|op| is_alone && op.bodies.is_empty()).cloned();
    let operands = graph.operands(read.node).into_iter().collect::<Option<Vec<_>>>();
    match (maker, operands) {
        (Some(op), Some(operands)) => graph.replace_op(gather, op.in_place_of(&own), &operands),
        _ => graph.replace_op(gather, Op::new("Identity").in_place_of(&own), &[read]),
    }
}
