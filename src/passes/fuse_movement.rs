//! See [`FuseMovement`].

use crate::{
    analysis::shapes::{Shapes, Term},
    eval::axis,
    ir::{Graph, NodeId, Op, Outlet, Tensor, Weight},
    pass::{Context, Declare, Fidelity, Pass, rewrite_shaped},
};

/// Merge operators that move elements and follow each other.
///
/// `Transpose` after `Transpose`, `Reshape` after whatever reshapes, `Squeeze` and `Unsqueeze` after each other, `Slice` after
/// `Slice` of other axes, `Concat` of a `Concat` along the same axis, `Unsqueeze` of one element that `Gather` picks, and `Squeeze`
/// or `Unsqueeze` of the axes that a reduction before it reduces.
///
/// Applies when: orders, axes and indices are constants, and the first is read by nothing else where it would stay.
///
/// Fidelity: exact.
#[derive(Debug, clap::Parser)]
#[command(name = "fuse-movement")]
pub(super) struct FuseMovement {}

impl Declare for FuseMovement {
    const NAME: &'static str = "fuse-movement";
    const FIDELITY: Fidelity = Fidelity::Exact;
}

impl Pass for FuseMovement {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        cx.add("operators merged", rewrite_shaped(graph, &merge));
        Ok(())
    }
}

/// Merges the operator at `node` with the one that makes its first operand.
fn merge(graph: &mut Graph, shapes: &Shapes, node: NodeId) -> Option<()> {
    if graph.op_of(node, "Concat").is_some() {
        return concat(graph, node);
    }
    if let Some(done) = keep_axes(graph, shapes, node) {
        return Some(done);
    }
    let chain = Chain::of(graph, node)?;
    match chain.kinds {
        ("Transpose", "Transpose") => transpose(graph, shapes, &chain),
        ("Reshape" | "Flatten" | "Squeeze" | "Unsqueeze", "Reshape") => reshape(graph, shapes, &chain),
        ("Squeeze" | "Unsqueeze", "Squeeze" | "Unsqueeze") => squeeze(graph, shapes, &chain),
        ("Reshape" | "Flatten", "Flatten" | "Squeeze" | "Unsqueeze") => reshape_once(graph, shapes, &chain),
        ("Gather", "Unsqueeze") => pick(graph, shapes, &chain),
        ("Slice", "Slice") => slice(graph, shapes, &chain),
        _ => None,
    }
}

/// Two operators, the second on what the first makes.
struct Chain {
    kinds: (&'static str, &'static str),
    first: NodeId,
    second: NodeId,
    /// What the first reads.
    source: Outlet,
    /// Whether the first goes when the second no longer reads it.
    alone: bool,
}

const KINDS: &[&str] = &["Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Gather", "Slice"];

impl Chain {
    fn of(graph: &Graph, second: NodeId) -> Option<Self> {
        let kind = |node: NodeId| {
            let op = graph.op(node)?.standard()?;
            KINDS.iter().copied().find(|&kind| kind == op)
        };
        let middle = graph.operand(second, 0)?;
        let kinds = (kind(middle.node)?, kind(second)?);
        let source = graph.operand(middle.node, 0)?;
        let alone = graph.sole_use(middle).is_some() && !graph.is_pinned(middle);
        (!graph.is_pinned(second.out())).then_some(Self { kinds, first: middle.node, second, source, alone })
    }

    /// Has the second read what the first reads.
    fn skip(&self, graph: &mut Graph) {
        graph.exchange_operand(self.second, 0, Some(self.source));
    }
}

fn transpose(graph: &mut Graph, shapes: &Shapes, chain: &Chain) -> Option<()> {
    // Without an order, the axes are reversed.
    let given = [chain.first, chain.second].iter().find_map(|&node| graph.op(node)?.ints("perm").map(<[i64]>::len));
    let rank = given.or_else(|| shapes.rank(chain.source));
    let perm = |node: NodeId| -> Option<Vec<usize>> {
        match graph.op(node)?.ints("perm") {
            Some(perm) => perm.iter().map(|&axis| usize::try_from(axis).ok()).collect(),
            None => rank.map(|rank| (0..rank).rev().collect()),
        }
    };
    if rank.is_none() {
        return graph.bypass(chain.second, chain.source);
    }
    let (before, after) = (perm(chain.first)?, perm(chain.second)?);
    let both: Vec<i64> = after.iter().map(|&axis| before.get(axis).map(|&axis| axis as i64)).collect::<Option<_>>()?;
    if both.iter().copied().eq(0..before.len() as i64) {
        return graph.bypass(chain.second, chain.source);
    }
    if !chain.alone {
        return None;
    }
    graph.edit_op(chain.second, |op| *op = std::mem::take(op).with_ints("perm", &both));
    chain.skip(graph);
    Some(())
}

/// A `Reshape` to a shape that does not ask for the extents of its operand reads what the first one reads.
fn reshape(graph: &mut Graph, shapes: &Shapes, chain: &Chain) -> Option<()> {
    let target = shapes.argument(graph, chain.second, "shape", 1)?;
    let middle = graph.operand(chain.second, 0)?;
    let same = |axis: usize| {
        let extent = |value: Outlet| shapes.dims(value)?.get(axis).copied().flatten();
        extent(middle).is_some() && extent(middle) == extent(chain.source)
    };
    // With `allowzero`, a zero is a length.
    let copying = graph.op(chain.second)?.int("allowzero") != Some(1) || !target.contains(&0);
    let copies = copying && (0..target.len()).filter(|&axis| target[axis] == 0).all(same);
    if !copies || !chain.alone {
        return None;
    }
    chain.skip(graph);
    Some(())
}

/// What is reshaped twice is so once, if all extents of the result but one are known.
fn reshape_once(graph: &mut Graph, shapes: &Shapes, chain: &Chain) -> Option<()> {
    let value = chain.second.out();
    let extents: Vec<_> = shapes.dims(value)?.iter().map(|d| d.and_then(Term::extent).map(|d| d as i64)).collect();
    let one_open = extents.iter().filter(|extent| extent.is_none()).count() <= 1;
    if !chain.alone || !one_open || extents.contains(&Some(0)) || graph.opset() < 5 {
        return None;
    }
    let target: Vec<i64> = extents.into_iter().map(|extent| extent.unwrap_or(-1)).collect();
    let name = format!("{}.{}", graph.name(value), FuseMovement::NAME);
    let target = graph.add_const(Weight::dense(Tensor::i64(&[target.len()], &target)), &name);
    let op = Op::new("Reshape").in_place_of(graph.op(chain.second)?);
    graph.replace_op(chain.second, op, &[chain.source, target]);
    Some(())
}

/// The axes of a `Squeeze` or `Unsqueeze`, counted from the front of the longer of its operand and its result.
fn axes(graph: &Graph, shapes: &Shapes, node: NodeId) -> Option<Vec<usize>> {
    let op = graph.op(node)?;
    let axes = shapes.argument(graph, node, "axes", 1)?;
    let longer = if op.is("Squeeze") { graph.operand(node, 0)? } else { node.out() };
    // The rank matters only where an axis is counted from the back.
    let rank = if axes.iter().all(|&axis| axis >= 0) { usize::MAX } else { shapes.rank(longer)? };
    let mut axes: Vec<usize> = axes
        .into_iter()
        .map(|a| if a >= 0 { usize::try_from(a).ok() } else { axis(a, rank) })
        .collect::<Option<_>>()?;
    axes.sort_unstable();
    axes.dedup();
    (!axes.is_empty()).then_some(axes)
}

fn squeeze(graph: &mut Graph, shapes: &Shapes, chain: &Chain) -> Option<()> {
    let (before, after) = (axes(graph, shapes, chain.first)?, axes(graph, shapes, chain.second)?);
    if chain.kinds.0 != chain.kinds.1 {
        return (before == after).then(|| graph.bypass(chain.second, chain.source))?;
    }
    // Where the second counts, what the first unsqueezes is there already, and what it squeezes is gone.
    let (fixed, counted) = if chain.kinds.0 == "Unsqueeze" { (after, before) } else { (before, after) };
    let place = |count: usize| fixed.iter().fold(count, |axis, &fixed| axis + usize::from(fixed <= axis));
    if !chain.alone {
        return None;
    }
    let mut both: Vec<i64> = counted.iter().map(|&count| place(count)).chain(fixed.clone()).map(|a| a as i64).collect();
    both.sort_unstable();
    give(graph, chain.second, "axes", 1, &both);
    chain.skip(graph);
    Some(())
}

/// Has a reduction before the `Squeeze` or `Unsqueeze` at `node` of the axes that it reduces drop or keep these itself.
fn keep_axes(graph: &mut Graph, shapes: &Shapes, node: NodeId) -> Option<()> {
    let kind = graph.op(node)?.standard().filter(|kind| matches!(*kind, "Squeeze" | "Unsqueeze"))?;
    let keeps = kind == "Unsqueeze";
    let middle = graph.operand(node, 0)?;
    graph.sole_use(middle).filter(|_| !graph.is_pinned(middle) && !graph.is_pinned(node.out()))?;
    let op = graph.op(middle.node)?;
    let kind = op.standard()?;
    let is_reduction = kind.starts_with("Reduce") || matches!(kind, "ArgMax" | "ArgMin");
    if !is_reduction || (op.int("keepdims").unwrap_or(1) == 1) == keeps {
        return None;
    }
    let rank = shapes.rank(graph.operand(middle.node, 0)?)?;
    let given = match kind {
        "ArgMax" | "ArgMin" => Some(vec![op.int("axis").unwrap_or(0)]),
        _ => shapes.argument(graph, middle.node, "axes", 1),
    };
    let is_given = graph.operand(middle.node, 1).is_some() || op.ints("axes").is_some();
    let mut reduced: Vec<usize> = match given.filter(|given| !given.is_empty()) {
        Some(given) => given.into_iter().map(|given| axis(given, rank)).collect::<Option<_>>()?,
        None if !is_given && op.int("noop_with_empty_axes") != Some(1) => (0..rank).collect(),
        None => return None,
    };
    reduced.sort_unstable();
    let has_axes = graph.operand(node, 1).is_some() || graph.op(node)?.ints("axes").is_some();
    let changed = if has_axes || keeps {
        axes(graph, shapes, node)?
    } else {
        // All axes of length 1 go.
        let dims = shapes.known(middle)?;
        (0..dims.len()).filter(|&axis| dims[axis] == 1).collect()
    };
    if changed != reduced {
        return None;
    }
    // What the reduction made keeps its shape, which is known to what follows.
    let read = graph.operands(middle.node).into_iter().collect::<Option<Vec<_>>>()?;
    let reduction = graph.op(middle.node)?.clone().with_int("keepdims", i64::from(keeps));
    let reduction = reduction.in_place_of(graph.op(node)?);
    graph.replace_op(node, reduction, &read);
    Some(())
}

/// Gives `node` integers in place of an attribute or a constant operand, whichever it has.
fn give(graph: &mut Graph, node: NodeId, attribute: &str, slot: u32, values: &[i64]) {
    let Some(old) = graph.operand(node, slot) else {
        return graph.edit_op(node, |op| *op = std::mem::take(op).with_ints(attribute, values));
    };
    let name = format!("{}.{}", graph.name(old), FuseMovement::NAME);
    let new = graph.add_const(Weight::dense(Tensor::i64(&[values.len()], values)), &name);
    graph.exchange_operand(node, slot, Some(new));
}

/// One index, picked and given its axis back, is picked as a list of one.
fn pick(graph: &mut Graph, shapes: &Shapes, chain: &Chain) -> Option<()> {
    let index = graph.operand(chain.first, 1)?;
    let tensor = graph.constant(index).filter(|tensor| tensor.dims().is_empty())?;
    let list = Weight::dense(tensor.reshape(&[1])?);
    let rank = shapes.rank(chain.source)?;
    let at = axis(graph.op(chain.first)?.int("axis").unwrap_or(0), rank)?;
    if axes(graph, shapes, chain.second)? != [at] || !chain.alone {
        return None;
    }
    let list_name = format!("{}.{}", graph.name(index), FuseMovement::NAME);
    let list = graph.add_const(list, &list_name);
    graph.exchange_operand(chain.second, 1, Some(list));
    graph.edit_op(chain.second, |op| *op = Op::new("Gather").with_int("axis", at as i64).in_place_of(op));
    chain.skip(graph);
    Some(())
}

/// What a `Slice` takes: starts, ends, axes and steps.
fn slices(graph: &Graph, shapes: &Shapes, node: NodeId) -> Option<[Vec<i64>; 4]> {
    let rank = shapes.rank(graph.operand(node, 0)?)?;
    let given = |slot: u32| graph.operand(node, slot).map(|_| shapes.argument(graph, node, "", slot));
    let (starts, ends) = (given(1)??, given(2)??);
    let axes = given(3).unwrap_or_else(|| Some((0..starts.len() as i64).collect()))?;
    let axes: Vec<i64> = axes.into_iter().map(|a| axis(a, rank).map(|a| a as i64)).collect::<Option<_>>()?;
    let steps = given(4).unwrap_or_else(|| Some(vec![1; starts.len()]))?;
    let same = [ends.len(), axes.len(), steps.len()] == [starts.len(); 3];
    same.then_some([starts, ends, axes, steps])
}

fn slice(graph: &mut Graph, shapes: &Shapes, chain: &Chain) -> Option<()> {
    if !chain.alone || graph.opset() < 10 {
        return None;
    }
    let (mut both, second) = (slices(graph, shapes, chain.first)?, slices(graph, shapes, chain.second)?);
    if both[2].iter().any(|axis| second[2].contains(axis)) {
        return None;
    }
    both.iter_mut().zip(&second).for_each(|(all, more)| all.extend(more));
    for (slot, values) in (1..).zip(&both) {
        let name = format!("{}.{}", graph.name(chain.second.out()), FuseMovement::NAME);
        let new = graph.add_const(Weight::dense(Tensor::i64(&[values.len()], values)), &name);
        graph.exchange_operand(chain.second, slot, Some(new));
    }
    chain.skip(graph);
    Some(())
}

/// Takes up the operands of each `Concat` along the same axis that is read by nothing but the one at `node`, and of those in
/// it; a `Concat` that another one takes up is left to that.
fn concat(graph: &mut Graph, node: NodeId) -> Option<()> {
    let at = graph.op(node)?.int("axis")?;
    let is_taken_up = |value: Outlet| {
        let reader = graph.sole_use(value).filter(|_| !graph.is_pinned(value)).map(|(reader, _)| reader);
        reader.and_then(|reader| graph.op_of(reader, "Concat")).is_some_and(|op| op.int("axis") == Some(at))
    };
    if is_taken_up(node.out()) {
        return None;
    }
    let operands = |node: NodeId| graph.operands(node).into_iter().collect::<Option<Vec<Outlet>>>();
    let (own, mut taken, mut all) = (operands(node)?, Vec::new(), Vec::new());
    let mut stack: Vec<_> = own.iter().rev().copied().collect();
    while let Some(value) = stack.pop() {
        let same = graph.op_of(value.node, "Concat").is_some_and(|op| op.int("axis") == Some(at)) && is_taken_up(value);
        match operands(value.node).filter(|_| same) {
            Some(inner) => {
                stack.extend(inner.into_iter().rev());
                taken.push(value.node);
            }
            None => all.push(value),
        }
    }
    if taken.is_empty() {
        return None;
    }
    graph.set_operands(node, &all);
    for node in taken {
        graph.sweep(node);
    }
    Some(())
}
