//! See [`FuseLayerNorm`].

use super::fuse_activation::number;
use crate::{
    analysis::shapes::{Shapes, Term},
    eval::axis,
    ir::{DType, Graph, NodeId, Op, Outlet},
    pass::{Context, Declare, Fidelity, Pass, rewrite_shaped},
};

/// Spell a layer normalization that an exporter took apart as one `LayerNormalization` (Ba 2016).
///
/// (x − mean) ÷ √(variance + ε) · scale + bias over the last axes, from opset 17.
///
/// Applies when: ε is a number, the scale and the bias are constants of the normalized shape, and nothing else reads what is
/// in between.
///
/// Fidelity: rounding.
#[derive(Debug, clap::Parser)]
#[command(name = "fuse-layer-norm")]
pub(super) struct FuseLayerNorm {}

impl Declare for FuseLayerNorm {
    const NAME: &'static str = "fuse-layer-norm";
    const FIDELITY: Fidelity = Fidelity::Rounding;
}

impl Pass for FuseLayerNorm {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        cx.add("normalizations fused", rewrite_shaped(graph, &fuse));
        Ok(())
    }
}

/// The operands of `value`, which is made by an `op` of two operands.
fn pair(graph: &Graph, value: Outlet, op: &str) -> Option<(Outlet, Outlet)> {
    graph.op_of(value.node, op)?;
    Some((graph.operand(value.node, 0)?, graph.operand(value.node, 1)?))
}

/// What is averaged in `value`, and the first of the last axes over which it is.
fn mean(graph: &Graph, shapes: &Shapes, value: Outlet) -> Option<(Outlet, usize)> {
    graph.op_of(value.node, "ReduceMean").filter(|op| op.int("keepdims").unwrap_or(1) == 1)?;
    let x = graph.operand(value.node, 0)?;
    let rank = shapes.rank(x)?;
    let axes = shapes.argument(graph, value.node, "axes", 1)?;
    let mut axes: Vec<usize> = axes.into_iter().map(|a| axis(a, rank)).collect::<Option<_>>()?;
    axes.sort_unstable();
    let first = *axes.first()?;
    axes.into_iter().eq(first..rank).then_some((x, first))
}

/// A normalization without scale and bias.
struct Normalized {
    x: Outlet,
    first: usize,
    epsilon: f64,
}

impl Normalized {
    fn of(graph: &Graph, shapes: &Shapes, value: Outlet) -> Option<Self> {
        let (centred, deviation) = pair(graph, value, "Div")?;
        let (x, average) = pair(graph, centred, "Sub")?;
        let (averaged, first) = mean(graph, shapes, average)?;
        let shifted = graph.op_of(deviation.node, "Sqrt").and_then(|_| graph.operand(deviation.node, 0))?;
        let (a, b) = pair(graph, shifted, "Add")?;
        let (variance, epsilon) = number(graph, b).map(|e| (a, e)).or_else(|| Some((b, number(graph, a)?)))?;
        let (squares, over) = mean(graph, shapes, variance)?;
        let (base, exponent) = pair(graph, squares, "Pow").or_else(|| pair(graph, squares, "Mul"))?;
        let squared = base == centred
            && if graph.op_of(squares.node, "Mul").is_some() {
                exponent == centred
            } else {
                number(graph, exponent) == Some(2.0)
            };
        // The centred values are read once by the quotient, and once or twice to be squared.
        let inside = graph.uses(centred).iter().all(|(reader, _)| [value.node, squares.node].contains(reader));
        let alone = [average, deviation, shifted, variance, squares].iter().all(|&v| graph.sole_use(v).is_some());
        let pinned =
            [value, centred, average, deviation, shifted, variance, squares].iter().any(|&v| graph.is_pinned(v));
        let fits = squared && inside && alone && !pinned && !graph.is_output(centred);
        (fits && averaged == x && over == first && epsilon > 0.0).then_some(Self { x, first, epsilon })
    }
}

/// The operand of `node` that is a constant of the normalized shape, and the other one.
fn parameter(graph: &Graph, shapes: &Shapes, node: NodeId) -> Option<(Outlet, Outlet)> {
    let (a, b) = (graph.operand(node, 0)?, graph.operand(node, 1)?);
    let (x, constant) = if graph.constant(b).is_some() { (a, b) } else { (b, a) };
    let tensor = graph.constant(constant).filter(|tensor| tensor.dtype() == DType::Float)?;
    let dims = shapes.dims(x)?;
    let wanted = &dims[dims.len().checked_sub(tensor.dims().len())?..];
    let same = tensor.dims().iter().zip(wanted).all(|(&d, wanted)| *wanted == Some(Term::from(d)));
    same.then_some((x, constant))
}

/// Makes the product at `node` of a normalized value and its scale, or the sum with the bias after it, one operator.
fn fuse(graph: &mut Graph, shapes: &Shapes, node: NodeId) -> Option<()> {
    graph.op_of(node, "Mul").filter(|_| graph.opset() >= 17)?;
    let (value, scale) = parameter(graph, shapes, node)?;
    let Normalized { x, first, epsilon } = Normalized::of(graph, shapes, value)?;
    graph.sole_use(value)?;
    let rank = shapes.rank(x)?;
    if shapes.fact(x)?.dtype != Some(DType::Float) || graph.constant(scale)?.dims().len() != rank - first {
        return None;
    }
    let sum = graph.sole_use(node.out()).filter(|_| !graph.is_pinned(node.out())).map(|(reader, _)| reader);
    let sum = sum.filter(|&sum| graph.op_of(sum, "Add").is_some());
    let bias = sum.and_then(|sum| parameter(graph, shapes, sum)).filter(|(value, _)| *value == node.out());
    let bias = bias.filter(|(_, bias)| graph.constant(*bias).is_some_and(|bias| bias.dims().len() == rank - first));
    let (last, bias) = match (sum, bias) {
        (Some(sum), Some((_, bias))) => (sum, Some(bias)),
        _ => (node, None),
    };
    let op = Op::new("LayerNormalization").with_int("axis", first as i64 - rank as i64);
    let op = op.with_float("epsilon", epsilon as f32).in_place_of(graph.op(last)?);
    let operands: Vec<_> = [x, scale].into_iter().chain(bias).collect();
    graph.replace_op(last, op, &operands);
    Some(())
}
