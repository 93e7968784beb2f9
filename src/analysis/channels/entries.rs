//! Where an entry of a computed shape comes from, and where the extents that a `Shape` reads go to.

use super::Axis;
use crate::{
    analysis::shapes::Shapes,
    eval::slice_indices,
    ir::{Graph, Inlet, NodeId, Outlet},
};

/// Operators between an extent and where it is used: more are no shape arithmetic.
const DEPTH: usize = 16;

/// Where an entry of a list of extents comes from.
#[derive(Debug)]
pub(super) enum Entry {
    /// Entry `at` of the constant that `reader` reads in `slot`.
    Constant { reader: NodeId, slot: u32, at: usize, value: i64 },
    /// A `Shape` of this axis.
    Extent(Axis),
}

/// The slot in which an operator takes a shape whose entries [`source`] follows.
pub(super) fn shape_slot(graph: &Graph, node: NodeId) -> Option<u32> {
    let slots = [("Reshape", 1), ("Resize", 3), ("Expand", 1), ("ConstantOfShape", 0)];
    slots.into_iter().find_map(|(op, slot)| graph.op_of(node, op).map(|_| slot))
}

fn takes_shape(graph: &Graph, node: NodeId, slot: u32) -> bool {
    shape_slot(graph, node) == Some(slot)
}

/// The source of entry `at` of the list that `reader` reads in `slot`, if nothing was computed with it.
pub(super) fn source(graph: &Graph, shapes: &Shapes, reader: NodeId, slot: u32, at: usize) -> Option<Entry> {
    find(graph, shapes, reader, slot, at, DEPTH)
}

fn find(graph: &Graph, shapes: &Shapes, reader: NodeId, slot: u32, at: usize, depth: usize) -> Option<Entry> {
    let value = graph.operand(reader, slot)?;
    if let Some(constant) = graph.constant(value) {
        return Some(Entry::Constant { reader, slot, at, value: *constant.i64s()?.get(at)? });
    }
    let (node, op, depth) = (value.node, graph.op(value.node)?, depth.checked_sub(1)?);
    let entry = match op.standard()? {
        "Shape" => {
            let x = graph.operand(node, 0)?;
            let rank = shapes.known(x)?.len() as i64;
            let start = op.int("start").unwrap_or(0);
            let start = if start < 0 { start + rank } else { start }.clamp(0, rank);
            Entry::Extent((x, start as usize + at))
        }
        "Identity" | "Cast" | "Unsqueeze" | "Squeeze" => find(graph, shapes, node, 0, at, depth)?,
        "Concat" => {
            let mut offset = 0;
            let parts = graph.operands(node).into_iter().zip(0..);
            let lengths = parts.map(|(part, slot)| Some((slot, length(shapes, part?)?)));
            let lengths = lengths.collect::<Option<Vec<_>>>()?;
            let part = lengths.into_iter().find_map(|(slot, length)| {
                offset += length;
                (at < offset).then_some((slot, at + length - offset))
            });
            let (slot, at) = part?;
            find(graph, shapes, node, slot, at, depth)?
        }
        "Gather" | "Slice" => find(graph, shapes, node, 0, *taken(graph, shapes, node)?.get(at)?, depth)?,
        _ => return None,
    };
    // A constant may be rewritten only where nobody sees it but those who take a shape.
    let is_taker =
        |(user, inlet)| matches!(inlet, Inlet::Slot(slot) if user == reader || takes_shape(graph, user, slot));
    let is_private = || !graph.is_output(value) && graph.uses(value).into_iter().all(is_taker);
    let is_whole = graph.op_of(node, "Gather").or(graph.op_of(node, "Slice")).is_none();
    (matches!(entry, Entry::Extent(_)) || (is_whole && is_private())).then_some(entry)
}

pub(super) fn length(shapes: &Shapes, value: Outlet) -> Option<usize> {
    shapes.known(value).map(|dims| dims.iter().product())
}

/// The entries that a `Gather` or `Slice` takes of a list, all named by constants.
fn taken(graph: &Graph, shapes: &Shapes, node: NodeId) -> Option<Vec<usize>> {
    let extent = length(shapes, graph.operand(node, 0)?)?;
    let constant = |slot: u32| graph.constant(graph.operand(node, slot)?)?.i64s();
    if graph.op_of(node, "Gather").is_some() {
        let wrap = |i: i64| usize::try_from(if i < 0 { i + extent as i64 } else { i }).ok();
        return constant(1)?.into_iter().map(wrap).collect();
    }
    let (starts, ends) = (constant(1)?, constant(2)?);
    let steps = if graph.operand(node, 4).is_some() { constant(4)? } else { vec![1] };
    let ([start], [end], [step]) = (&starts[..], &ends[..], &steps[..]) else { return None };
    Some(slice_indices(extent, *start, *end, *step)?.collect())
}

/// Whether entry `at` of `value`, an extent of something, reaches anything but where [`source`] finds it again.
pub(super) fn escapes(graph: &Graph, shapes: &Shapes, value: Outlet, at: usize) -> bool {
    goes(graph, shapes, value, at, DEPTH)
}

fn goes(graph: &Graph, shapes: &Shapes, value: Outlet, at: usize, depth: usize) -> bool {
    let Some(depth) = depth.checked_sub(1) else { return true };
    let through = |(user, inlet): (NodeId, Inlet)| -> Option<bool> {
        let Inlet::Slot(slot) = inlet else { return None };
        if takes_shape(graph, user, slot) {
            return Some(false);
        }
        let next = |at: usize| goes(graph, shapes, user.out(), at, depth);
        match (graph.op(user)?.standard()?, slot) {
            ("Identity" | "Cast" | "Unsqueeze" | "Squeeze", 0) => Some(next(at)),
            ("Concat", _) => {
                let lengths = graph.operands(user).into_iter().map(|part| length(shapes, part?));
                let lengths = lengths.collect::<Option<Vec<_>>>()?;
                Some(next(lengths[..slot as usize].iter().sum::<usize>() + at))
            }
            ("Gather" | "Slice", 0) => {
                let taken = taken(graph, shapes, user)?;
                Some((0..taken.len()).filter(|&i| taken[i] == at).any(next))
            }
            _ => None,
        }
    };
    graph.is_output(value) || graph.uses(value).into_iter().any(|user| through(user).unwrap_or(true))
}
