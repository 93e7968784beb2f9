//! See [`FuseLayerNorm`].

use super::fuse_activation::number;
use crate::{
    analysis::shapes::{Shapes, Term},
    eval::axis,
    ir::{DType, Graph, NodeId, Op, Outlet, Tensor, Weight},
    pass::{Context, Declare, Fidelity, Pass, rewrite_shaped},
};

/// Spell a layer normalization that an exporter took apart as one `LayerNormalization` (Ba 2016).
///
/// (x − mean) ÷ √(variance + ε) · scale + bias over the last axes, from opset 17; also with the reciprocal of the root, and
/// without scale or
/// bias. Without the mean, one `RMSNormalization` (Zhang 2019), from opset 23.
///
/// Applies when: ε is a number, the scale and the bias have the normalized shape, and nothing else reads what is in between.
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

/// A scale of ones has at most so many elements: the file should not grow by it.
const MAX_ONES: usize = 1 << 13;
/// The operator set that `RMSNormalization` came with.
const RMS_NORM: i64 = 23;

/// A normalization without scale and bias.
struct Normalized {
    x: Outlet,
    first: usize,
    epsilon: f64,
    /// The operator that does it.
    kind: &'static str,
}

impl Normalized {
    fn of(graph: &Graph, shapes: &Shapes, value: Outlet) -> Option<Self> {
        let (centred, inverse, deviation) = if let Some((centred, deviation)) = pair(graph, value, "Div") {
            (centred, None, deviation)
        } else {
            let (a, b) = pair(graph, value, "Mul")?;
            let (centred, inverse) = if graph.op_of(b.node, "Reciprocal").is_some() { (a, b) } else { (b, a) };
            graph.op_of(inverse.node, "Reciprocal")?;
            (centred, Some(inverse), graph.operand(inverse.node, 0)?)
        };
        let shifted = graph.op_of(deviation.node, "Sqrt").and_then(|_| graph.operand(deviation.node, 0))?;
        let (a, b) = pair(graph, shifted, "Add")?;
        let (variance, epsilon) = number(graph, b).map(|e| (a, e)).or_else(|| Some((b, number(graph, a)?)))?;
        let (squares, first) = mean(graph, shapes, variance)?;
        let (base, exponent) = pair(graph, squares, "Pow").or_else(|| pair(graph, squares, "Mul"))?;
        let squared = base == centred
            && if graph.op_of(squares.node, "Mul").is_some() {
                exponent == centred
            } else {
                number(graph, exponent) == Some(2.0)
            };
        let between = [deviation, shifted, variance, squares].into_iter().chain(inverse);
        let alone = between.clone().all(|v| graph.sole_use(v).is_some());
        let pinned = between.chain([value]).any(|v| graph.is_pinned(v));
        if !squared || !alone || pinned || epsilon <= 0.0 {
            return None;
        }
        // The centred values are read once by the quotient, and once or twice to be squared.
        let inside = graph.uses(centred).iter().all(|(reader, _)| [value.node, squares.node].contains(reader));
        let inside = inside && !graph.is_pinned(centred) && !graph.is_output(centred);
        let mean_of = |(x, average): (Outlet, Outlet)| {
            let is_mean = mean(graph, shapes, average) == Some((x, first));
            let alone = graph.sole_use(average).is_some() && !graph.is_pinned(average);
            (is_mean && alone).then_some(x)
        };
        match pair(graph, centred, "Sub").filter(|_| inside).and_then(mean_of) {
            Some(x) => Some(Self { x, first, epsilon, kind: "LayerNormalization" }),
            None => {
                (graph.opset() >= RMS_NORM).then_some(Self { x: centred, first, epsilon, kind: "RMSNormalization" })
            }
        }
    }
}

/// The other operand of what alone reads `value`, an `op`, if that has the normalized shape: that of the axes of `x` from `first` on.
fn parameter(
    graph: &Graph,
    shapes: &Shapes,
    (value, op): (Outlet, &str),
    (x, first): (Outlet, usize),
) -> Option<(NodeId, Outlet)> {
    let (reader, _) = graph.sole_use(value).filter(|_| !graph.is_pinned(value))?;
    let (a, b) = pair(graph, reader.out(), op)?;
    let other = if a == value { b } else { a };
    let wanted = &shapes.dims(x)?[first..];
    let is_known = wanted.iter().all(Option::is_some);
    let fits = shapes.dims(other)? == wanted && is_known && shapes.fact(other)?.dtype == Some(DType::Float);
    (fits && !graph.is_pinned(reader.out())).then_some((reader, other))
}

/// Makes the normalized value at `node`, and the product with its scale and the sum with the bias after it, one operator.
fn fuse(graph: &mut Graph, shapes: &Shapes, node: NodeId) -> Option<()> {
    graph.op(node)?.standard().filter(|op| matches!(*op, "Div" | "Mul") && graph.opset() >= 17)?;
    let Normalized { x, first, epsilon, kind } = Normalized::of(graph, shapes, node.out())?;
    let rank = shapes.rank(x)?;
    if shapes.fact(x)?.dtype != Some(DType::Float) {
        return None;
    }
    let scaled = parameter(graph, shapes, (node.out(), "Mul"), (x, first));
    let before = scaled.map_or(node, |(scaled, _)| scaled);
    let shifted = parameter(graph, shapes, (before.out(), "Add"), (x, first)).filter(|_| kind == "LayerNormalization");
    let last = shifted.map_or(before, |(shifted, _)| shifted);
    let scale = if let Some((_, scale)) = scaled {
        scale
    } else {
        let dims = shapes.dims(x)?[first..].iter().map(|d| d.and_then(Term::extent)).collect::<Option<Vec<_>>>()?;
        dims.iter().try_fold(1_usize, |n, &d| n.checked_mul(d)).filter(|&n| n <= MAX_ONES)?;
        let ones = Tensor::f32(&dims, &vec![1.0; dims.iter().product()]);
        let name = format!("{}.scale", graph.name(last.out()));
        graph.add_const(Weight::dense(ones), &name)
    };
    let op = Op::new(kind).with_int("axis", first as i64 - rank as i64);
    let op = op.with_float("epsilon", epsilon as f32).in_place_of(graph.op(last)?);
    let operands: Vec<_> = [x, scale].into_iter().chain(shifted.map(|(_, bias)| bias)).collect();
    graph.replace_op(last, op, &operands);
    Some(())
}
