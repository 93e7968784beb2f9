//! See [`FuseElementwise`].

use crate::{
    analysis::{never_negative, shapes::Shapes},
    ir::{DType, Graph, NodeId, Op, Outlet, Tensor, Weight, tensor::is_float},
    pass::{Context, Declare, Fidelity, Pass, rewrite_shaped},
};

/// Merge element-wise operators that undo or repeat the one before them.
///
/// `Neg` of `Neg`, `Not` of `Not`, and `Relu`, `Abs`, `Floor`, `Ceil`, `Round` or `Sign` of what is so already; `Clip` and
/// `Relu` after each other are one `Clip`; a `Cast` after one to a type that holds every value of the first is the second
/// alone.
///
/// Applies when: the bounds of a `Clip` are constants, and nothing else reads the first of the two where it would stay.
///
/// Fidelity: exact.
#[derive(Debug, clap::Parser)]
#[command(name = "fuse-elementwise")]
pub(super) struct FuseElementwise {}

impl Declare for FuseElementwise {
    const NAME: &'static str = "fuse-elementwise";
    const FIDELITY: Fidelity = Fidelity::Exact;
}

impl Pass for FuseElementwise {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        cx.add("operators merged", rewrite_shaped(graph, &merge));
        Ok(())
    }
}

/// Results of these are whole.
const WHOLE: &[&str] = &["Floor", "Ceil", "Round", "Sign"];

fn merge(graph: &mut Graph, shapes: &Shapes, node: NodeId) -> Option<()> {
    let middle = graph.operand(node, 0).filter(|_| !graph.is_pinned(node.out()))?;
    let (second, first) = (graph.op(node)?.standard()?, graph.op(middle.node)?.standard()?);
    let source = graph.operand(middle.node, 0)?;
    match (first, second) {
        ("Neg", "Neg") | ("Not", "Not") => graph.bypass(node, source),
        // The least integer has no absolute value.
        ("Abs", "Relu" | "Abs") if !shapes.fact(source)?.dtype.is_some_and(is_float) => None,
        (first, "Relu" | "Abs") if never_negative(first) => graph.bypass(node, middle),
        (first, "Floor" | "Ceil" | "Round") if WHOLE.contains(&first) => graph.bypass(node, middle),
        ("Sign", "Sign") => graph.bypass(node, middle),
        ("Neg" | "Abs", "Abs") => skip(graph, node, middle, source),
        ("Cast", "Cast") => cast(graph, shapes, node, middle, source),
        ("Clip" | "Relu", "Clip" | "Relu") => clip(graph, shapes, node, middle, source),
        _ => None,
    }
}

/// Has `node` read `source`, and not `middle`, if that goes then.
fn skip(graph: &mut Graph, node: NodeId, middle: Outlet, source: Outlet) -> Option<()> {
    graph.sole_use(middle).filter(|_| !graph.is_pinned(middle))?;
    graph.exchange_operand(node, 0, Some(source));
    Some(())
}

fn cast(graph: &mut Graph, shapes: &Shapes, node: NodeId, middle: Outlet, source: Outlet) -> Option<()> {
    let to = |node: NodeId| DType::try_from(i32::try_from(graph.op(node)?.int("to")?).ok()?).ok();
    let (from, through, to) = (shapes.fact(source)?.dtype?, to(middle.node)?, to(node)?);
    // Numbers that a type does not hold become something else, by way of which type matters.
    let narrows = is_float(through) && !is_float(from) && !is_float(to) && to != DType::Bool && !holds(to, from);
    if !holds(through, from) || narrows {
        return None;
    }
    if from == to {
        return graph.bypass(node, source);
    }
    skip(graph, node, middle, source)
}

/// Whether every value of type `small` is one of type `large`.
fn holds(large: DType, small: DType) -> bool {
    use DType::{Bool, Double, Float, Float16, Int8, Int16, Int32, Int64, Uint8, Uint16, Uint32};
    match small {
        // Other types read it as a number, and a number is true unless it is zero.
        Bool => matches!(large, Bool | Uint8 | Int8 | Int32 | Int64 | Float | Double),
        Uint8 => matches!(large, Uint8 | Uint16 | Int16 | Uint32 | Int32 | Int64 | Float16 | Float | Double),
        Int8 => matches!(large, Int8 | Int16 | Int32 | Int64 | Float16 | Float | Double),
        Int16 => matches!(large, Int16 | Int32 | Int64 | Float | Double),
        Uint16 => matches!(large, Uint16 | Uint32 | Int32 | Int64 | Float | Double),
        Int32 => matches!(large, Int32 | Int64 | Double),
        Int64 => large == Int64,
        Float16 => matches!(large, Float16 | Float | Double),
        Float => matches!(large, Float | Double),
        Double => large == Double,
        _ => false,
    }
}

/// Lowest and highest value that a `Clip` or `Relu` lets through.
fn bounds(graph: &Graph, node: NodeId) -> Option<(f64, f64)> {
    let op = graph.op(node)?;
    if op.is("Relu") {
        return Some((0.0, f64::INFINITY));
    }
    let bound = |slot: u32, attribute: &str, open: f64| match graph.operand(node, slot) {
        Some(bound) => match graph.constant(bound)?.f64s()?[..] {
            [bound] if !bound.is_nan() => Some(bound),
            _ => None,
        },
        None => Some(op.float(attribute).map_or(open, f64::from)),
    };
    Some((bound(1, "min", f64::NEG_INFINITY)?, bound(2, "max", f64::INFINITY)?))
}

/// Makes the `Clip` or `Relu` at `node` of one of the other one `Clip`.
fn clip(graph: &mut Graph, shapes: &Shapes, node: NodeId, middle: Outlet, source: Outlet) -> Option<()> {
    let ((low, high), (after_low, after_high)) = (bounds(graph, middle.node)?, bounds(graph, node)?);
    // Written so that NaN is no bound.
    if !(low <= high && after_low <= after_high) {
        return None;
    }
    if after_low <= low && after_high >= high {
        return graph.bypass(node, middle);
    }
    graph.sole_use(middle).filter(|_| !graph.is_pinned(middle))?;
    let (least, most) = (low.clamp(after_low, after_high), high.clamp(after_low, after_high));
    let dtype = shapes.fact(source)?.dtype.filter(|&dtype| is_float(dtype))?;
    let mut merged = Op::new("Clip").in_place_of(graph.op(node)?);
    let given = [("min", least), ("max", most)].map(|(what, bound)| (what, bound.is_finite().then_some(bound)));
    for (slot, (what, bound)) in (1..).zip(given) {
        let mut new = None;
        if let Some(bound) = bound {
            if graph.opset() < 11 {
                merged = merged.with_float(what, bound as f32);
            } else if let Some(tensor) = Tensor::floats(dtype, &[], &[bound]) {
                let name = format!("{}.{what}", graph.name(node.out()));
                new = Some(graph.add_const(Weight::dense(tensor), &name));
            }
        }
        graph.exchange_operand(node, slot, new);
    }
    graph.edit_op(node, |op| *op = Op { arity: op.arity, ..merged });
    graph.exchange_operand(node, 0, Some(source));
    Some(())
}
