//! See [`FuseElementwise`].

mod bounds;

use crate::{
    analysis::{never_negative, shapes::Shapes},
    eval,
    ir::{DType, Graph, NodeId, Op, Outlet, Tensor, tensor::is_float},
    pass::{Context, Declare, Fidelity, Pass, rewrite_shaped},
};

/// Merge element-wise operators that undo or repeat the one before them.
///
/// `Neg` of `Neg`, `Not` of `Not`, and `Relu`, `Abs`, `Floor`, `Ceil`, `Round` or `Sign` of what is so already; `Clip`, `Relu`
/// and `Min` or `Max` with a number after each other are one `Clip`, and other `Min` or `Max` after each other one of more
/// operands; `And`, `Or`, `Min` and `Max` of a value with itself are that; `Where` of a `Not` exchanges its branches; a `Cast`
/// after one to a type that holds every value of the first is the second alone, and after a `ConstantOfShape` the type of its
/// number; `CastLike` to a type that is known is a `Cast`.
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
    if graph.is_pinned(node.out()) {
        return None;
    }
    let kind = graph.op(node)?.standard()?.to_owned();
    match &kind[..] {
        "CastLike" => return cast_like(graph, shapes, node),
        "Where" => return exchange_branches(graph, node),
        "And" | "Or" | "Min" | "Max" if is_repeated(graph, node) => return graph.bypass(node, graph.operand(node, 0)?),
        "Clip" | "Relu" | "Min" | "Max" if bounds::merge(graph, shapes, node).is_some() => return Some(()),
        "Min" | "Max" => return bounds::flatten(graph, node),
        _ => {}
    }
    let middle = graph.operand(node, 0)?;
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
        ("ConstantOfShape", "Cast") => cast_filled(graph, node, middle, source),
        _ => None,
    }
}

/// Whether `node` reads one value twice and nothing else.
fn is_repeated(graph: &Graph, node: NodeId) -> bool {
    matches!(graph.operands(node)[..], [Some(a), Some(b)] if a == b)
}

/// Makes the `CastLike` at `node` a `Cast` to the type of its second operand.
fn cast_like(graph: &mut Graph, shapes: &Shapes, node: NodeId) -> Option<()> {
    let (x, like) = (graph.operand(node, 0)?, graph.operand(node, 1)?);
    let to = shapes.fact(like)?.dtype?;
    let old = graph.op(node)?;
    if old.attributes().iter().any(|attribute| attribute.name() != "saturate") {
        return None;
    }
    let mut cast = Op::new("Cast").with_int("to", to as i64).in_place_of(old);
    if let Some(saturate) = old.int("saturate") {
        cast = cast.with_int("saturate", saturate);
    }
    graph.replace_op(node, cast, &[x]);
    Some(())
}

/// Has the `Where` at `node`, whose condition is a `Not`, read what that negates, and its branches the other way round.
fn exchange_branches(graph: &mut Graph, node: NodeId) -> Option<()> {
    let negated = graph.operand(node, 0)?;
    graph.op_of(negated.node, "Not")?;
    graph.sole_use(negated).filter(|_| !graph.is_pinned(negated))?;
    let (condition, a, b) = (graph.operand(negated.node, 0)?, graph.operand(node, 1)?, graph.operand(node, 2)?);
    graph.set_operands(node, &[condition, b, a]);
    graph.sweep(negated.node);
    Some(())
}

/// Makes the `Cast` at `node` of a tensor of one number a tensor of that number in the other type.
fn cast_filled(graph: &mut Graph, node: NodeId, filled: Outlet, shape: Outlet) -> Option<()> {
    graph.sole_use(filled).filter(|_| !graph.is_pinned(filled))?;
    let number = match graph.op(filled.node)?.attribute("value") {
        Some(_) => graph.op(filled.node)?.tensor("value")?,
        None => Tensor::f32(&[1], &[0.0]),
    };
    let number = eval::evaluate(graph.op(node)?, graph.opset(), &[Some(&number)])?.pop()?;
    // Numbers of these types came later.
    let is_old = matches!(
        number.dtype(),
        DType::Bool
            | DType::Float
            | DType::Double
            | DType::Float16
            | DType::Int8
            | DType::Int16
            | DType::Int32
            | DType::Int64
            | DType::Uint8
            | DType::Uint16
            | DType::Uint32
            | DType::Uint64
    );
    if !is_old {
        return None;
    }
    let mut op = Op::new("ConstantOfShape").in_place_of(graph.op(node)?);
    op.set_tensor("value", &number);
    graph.replace_op(node, op, &[shape]);
    Some(())
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
