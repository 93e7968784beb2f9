//! See [`FuseMovement`].

use crate::{
    analysis::shapes::Shapes,
    eval::axis,
    ir::{Graph, NodeId, Op, Outlet, Tensor, Weight},
    pass::{Context, Declare, Fidelity, Pass, rewrite_shaped},
};

/// Merge operators that move elements and follow each other.
///
/// `Transpose` after `Transpose`, `Reshape` after whatever reshapes, `Squeeze` and `Unsqueeze` after each other, `Slice` after
/// `Slice` of other axes, `Concat` of a `Concat` along the same axis, and `Unsqueeze` of one element that `Gather` picks.
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
    let chain = Chain::of(graph, node)?;
    match chain.kinds {
        ("Transpose", "Transpose") => transpose(graph, &chain),
        ("Reshape" | "Flatten" | "Squeeze" | "Unsqueeze", "Reshape") => reshape(graph, shapes, &chain),
        ("Squeeze" | "Unsqueeze", "Squeeze" | "Unsqueeze") => squeeze(graph, shapes, &chain),
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

    /// Has whatever reads the result of the second read what the first reads, which is the same.
    fn cancel(&self, graph: &mut Graph) -> Option<()> {
        if graph.is_output(self.second.out()) && !graph.can_take_name(self.source) {
            return None;
        }
        graph.replace_uses(self.second.out(), self.source);
        graph.sweep(self.second);
        Some(())
    }

    /// Has the second read what the first reads.
    fn skip(&self, graph: &mut Graph) {
        graph.exchange_operand(self.second, 0, Some(self.source));
    }
}

fn transpose(graph: &mut Graph, chain: &Chain) -> Option<()> {
    let perm = |node: NodeId| -> Option<Vec<usize>> {
        graph.op(node)?.ints("perm")?.iter().map(|&axis| usize::try_from(axis).ok()).collect()
    };
    let (before, after) = (perm(chain.first)?, perm(chain.second)?);
    let both: Vec<i64> = after.iter().map(|&axis| before.get(axis).map(|&axis| axis as i64)).collect::<Option<_>>()?;
    if both.iter().copied().eq(0..before.len() as i64) {
        return chain.cancel(graph);
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
    let target = match graph.operand(chain.second, 1) {
        Some(shape) => shapes.integers(shape)?,
        None => graph.op(chain.second)?.ints("shape")?.to_vec(),
    };
    if target.contains(&0) || !chain.alone {
        return None;
    }
    chain.skip(graph);
    Some(())
}

/// The axes of a `Squeeze` or `Unsqueeze`, counted from the front of the longer of its operand and its result.
fn axes(graph: &Graph, shapes: &Shapes, node: NodeId) -> Option<Vec<usize>> {
    let op = graph.op(node)?;
    let axes = match graph.operand(node, 1) {
        Some(axes) => shapes.integers(axes)?,
        None => op.ints("axes")?.to_vec(),
    };
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
    let both = match chain.kinds {
        (first, second) if first != second => return (before == after).then(|| chain.cancel(graph))?,
        // Where the second counts, the axes of the first are there already.
        ("Unsqueeze", _) => {
            let mut longer = after.clone();
            let mut free = (0..).filter(|axis| !after.contains(axis));
            let mut next = 0;
            for &axis in &before {
                longer.push(free.by_ref().nth(axis - next)?);
                next = axis + 1;
            }
            longer
        }
        // Where the second counts, the axes of the first are gone.
        _ => {
            let mut kept = (0..).filter(|axis| !before.contains(axis));
            let mut longer = before.clone();
            let mut next = 0;
            for &axis in &after {
                longer.push(kept.by_ref().nth(axis - next)?);
                next = axis + 1;
            }
            longer
        }
    };
    if !chain.alone {
        return None;
    }
    let mut both: Vec<i64> = both.into_iter().map(|axis| axis as i64).collect();
    both.sort_unstable();
    give(graph, chain.second, "axes", 1, &both);
    chain.skip(graph);
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
    let name = graph.op(chain.second)?.name().to_owned();
    let list_name = format!("{}.{}", graph.name(index), FuseMovement::NAME);
    let list = graph.add_const(list, &list_name);
    graph.exchange_operand(chain.second, 1, Some(list));
    graph.edit_op(chain.second, |op| *op = Op::new("Gather").with_int("axis", at as i64).named(&name));
    chain.skip(graph);
    Some(())
}

/// What a `Slice` takes: starts, ends, axes and steps.
fn slices(graph: &Graph, shapes: &Shapes, node: NodeId) -> Option<[Vec<i64>; 4]> {
    let rank = shapes.rank(graph.operand(node, 0)?)?;
    let given = |slot: u32| graph.operand(node, slot).map(|value| shapes.integers(value));
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

/// Takes up the operands of each `Concat` along the same axis that nothing but the one at `node` reads.
fn concat(graph: &mut Graph, node: NodeId) -> Option<()> {
    let at = graph.op(node)?.int("axis")?;
    let operands: Vec<Outlet> = graph.operands(node).into_iter().collect::<Option<_>>()?;
    let inner = |value: Outlet| {
        let same = graph.op_of(value.node, "Concat")?.int("axis") == Some(at);
        graph.sole_use(value).filter(|_| same && !graph.is_pinned(value))?;
        graph.operands(value.node).into_iter().collect::<Option<Vec<_>>>()
    };
    let found: Vec<_> = operands.iter().map(|&value| inner(value).ok_or(value)).collect();
    if found.iter().all(Result::is_err) {
        return None;
    }
    let taken: Vec<_> = found.into_iter().flat_map(|part| part.unwrap_or_else(|value| vec![value])).collect();
    for (slot, value) in (0..).zip(taken) {
        graph.set_operand(node, slot, Some(value));
    }
    for value in operands {
        graph.sweep(value.node);
    }
    Some(())
}
