//! See [`FuseAffine`].

use super::layer::{Layer, pads};
use crate::{
    analysis::shapes::Shapes,
    eval,
    ir::{DType, Graph, NodeId, Op, Outlet, Weight, tensor::is_float},
    pass::{Context, Declare, Fidelity, Pass, rewrite_shaped},
};

/// Fold `Mul`, `Div`, `Add` and `Sub` by constants into the `Conv`, `ConvTranspose`, `Gemm` or `MatMul` before or after them,
/// and into each other.
///
/// a·(W·x + b) + c is one layer with weight a·W and bias a·b + c; W·(a·x + c) + b is one with weight W·a and bias W·c + b.
/// Two sums, or two products, by constants are one, and a sum with zero is none.
///
/// Applies when: the constants are one number or one for each channel, nothing else reads what is in between, and the
/// layer's weight has no other reader where it changes. A sum before a convolution that pads stays: what it pads with is
/// zero and not the sum.
///
/// Fidelity: rounding; products are computed in double precision and rounded once.
#[derive(Debug, clap::Parser)]
#[command(name = "fuse-affine")]
pub(super) struct FuseAffine {}

impl Declare for FuseAffine {
    const NAME: &'static str = "fuse-affine";
    const FIDELITY: Fidelity = Fidelity::Rounding;
}

impl Pass for FuseAffine {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        let rule = |graph: &mut Graph, shapes: &Shapes, node| {
            let fused = after(graph, node).or_else(|| before(graph, shapes, node)).or_else(|| merge(graph, node));
            fused.or_else(|| zero(graph, shapes, node))
        };
        // Each rewrite removes an operator, and may bring the next one beside a layer.
        let rounds = std::iter::repeat_with(|| rewrite_shaped(graph, &rule));
        let fused = rounds.take_while(|&fused| fused > 0).sum();
        cx.add("operators fused", fused);
        Ok(())
    }
}

/// The operand of `node` that varies, the one that is constant, and whether that is the right one.
fn with_constant(graph: &Graph, node: NodeId) -> Option<(Outlet, Outlet, bool)> {
    let (a, b) = (graph.operand(node, 0)?, graph.operand(node, 1)?);
    match (graph.constant(a).is_some(), graph.constant(b).is_some()) {
        (false, true) => Some((a, b, true)),
        (true, false) => Some((b, a, false)),
        _ => None,
    }
}

/// An operator seen as y = scale·x + shift, of which one is neutral.
struct Affine {
    x: Outlet,
    /// One number, or one for each channel, and how many axes follow that of the channels.
    scale: Option<Vec<f64>>,
    shift: Option<Vec<f64>>,
    trailing: usize,
    /// The rank of the constant.
    rank: usize,
    /// How many elements it has.
    width: usize,
}

impl Affine {
    fn of(graph: &Graph, node: NodeId) -> Option<Self> {
        let op = graph.op(node)?.standard()?;
        if graph.opset() < 7 || !matches!(op, "Mul" | "Div" | "Add" | "Sub") {
            return None;
        }
        let (x, constant, is_right) = with_constant(graph, node)?;
        let constant = graph.constant(constant)?;
        let wide: Vec<_> = (0..constant.dims().len()).filter(|&axis| constant.dims()[axis] != 1).collect();
        let trailing = match wide[..] {
            [] => 0,
            [axis] => constant.dims().len() - 1 - axis,
            _ => return None,
        };
        let values = constant.f64s()?;
        let each = |f: fn(f64) -> f64| Some(values.iter().map(|&v| f(v)).collect::<Vec<_>>());
        let (scale, shift) = match (op, is_right) {
            ("Mul", _) => (each(|v| v), None),
            ("Div", true) => (each(f64::recip), None),
            ("Add", _) => (None, each(|v| v)),
            ("Sub", true) => (None, each(|v| -v)),
            ("Sub", false) => (Some(vec![-1.0]), each(|v| v)),
            _ => return None,
        };
        Some(Self { x, scale, shift, trailing, rank: constant.dims().len(), width: values.len() })
    }

    /// Scale and shift of each of `channels` that `layer` makes or reads; `None` where the constant does not fit them or may
    /// widen the result.
    fn spread(&self, channels: usize, layer: &Layer) -> Option<(Vec<f64>, Vec<f64>)> {
        let trailing = layer.trailing;
        if self.rank > layer.rank {
            return None;
        }
        let spread = |values: &Option<Vec<f64>>, neutral: f64| match values.as_deref() {
            None => Some(vec![neutral; channels]),
            Some(&[one]) => Some(vec![one; channels]),
            Some(values) => (values.len() == channels && self.trailing == trailing).then(|| values.to_vec()),
        };
        Some((spread(&self.scale, 1.0)?, spread(&self.shift, 0.0)?))
    }
}

/// Gives `layer` another bias, and where the operator scales at all, its weight times `factor` of each output and input
/// channel.
fn write(
    graph: &mut Graph,
    layer: &Layer,
    affine: &Affine,
    factor: impl Fn(usize, usize) -> f64,
    bias: &[f64],
) -> Option<()> {
    let mut weight = None;
    if affine.scale.is_some() {
        graph.sole_use(layer.weight)?;
        weight = Some(layer.scaled(graph, factor)?);
    }
    if !layer.takes_bias && bias.iter().any(|&b| b != 0.0) {
        return None;
    }
    let bias = layer.fit_bias(graph, bias)?;
    let name = |graph: &Graph, value: Outlet, what: &str| graph.name_after(value, what);
    if let Some(weight) = weight {
        let name = name(graph, layer.weight, FuseAffine::NAME);
        let new = graph.add_const(weight, &name);
        graph.set_operand(layer.node, 1, Some(new));
        graph.sweep(layer.weight.node);
    }
    let old = graph.operand(layer.node, 2);
    if old.is_some() || bias.value().f64s()?.iter().any(|&v| v != 0.0) {
        let name = match old {
            Some(old) => name(graph, old, FuseAffine::NAME),
            None => name(graph, layer.node.out(), "bias"),
        };
        let new = graph.add_const(bias, &name);
        graph.set_operand(layer.node, 2, Some(new));
        if let Some(old) = old {
            graph.sweep(old.node);
        }
    }
    if graph.op(layer.node)?.attribute("beta").is_some() {
        graph.edit_op(layer.node, |op| *op = std::mem::take(op).without("beta"));
    }
    Some(())
}

/// Folds the affine operator at `node` into the layer that makes its operand.
fn after(graph: &mut Graph, node: NodeId) -> Option<()> {
    let affine = Affine::of(graph, node)?;
    let layer = Layer::of(graph, affine.x.node)?;
    let pinned = graph.is_pinned(affine.x) || graph.is_pinned(node.out()) || graph.is_pinned(layer.weight);
    graph.sole_use(affine.x).filter(|_| !pinned)?;
    let (scale, shift) = affine.spread(layer.channels.0, &layer)?;
    let bias: Vec<_> = layer.bias.iter().zip(&scale).zip(&shift).map(|((b, a), c)| a * b + c).collect();
    write(graph, &layer, &affine, |output, _| scale[output], &bias)?;
    let constants: Vec<_> = graph.operands(node).into_iter().flatten().filter(|value| *value != affine.x).collect();
    graph.replace_uses(node.out(), affine.x);
    graph.sweep(node);
    for constant in constants {
        graph.sweep(constant.node);
    }
    Some(())
}

/// Folds the affine operator at `node` into the layer that alone reads its result.
fn before(graph: &mut Graph, shapes: &Shapes, node: NodeId) -> Option<()> {
    // The constant must not widen the operand.
    let affine = Affine::of(graph, node)?;
    if affine.rank > 0 && shapes.rank(affine.x)? < affine.rank {
        return None;
    }
    if affine.width > 1 {
        let dims = shapes.dims(affine.x)?;
        let channels = dims[dims.len().checked_sub(1 + affine.trailing)?]?.extent()?;
        (channels == affine.width).then_some(())?;
    }
    let (reader, 0) = graph.sole_use(node.out()).filter(|_| !graph.is_pinned(node.out()))? else { return None };
    let layer = Layer::of(graph, reader)?;
    let op = graph.op(reader)?;
    let tensor = graph.constant(layer.weight)?;
    let turned = op.is("Gemm") && (op.int("transA") == Some(1) || op.float("alpha").is_some());
    // Outside its kernel, a transposed convolution has no input to add to.
    let no_sums = pads(op) || op.is("ConvTranspose") || !layer.takes_bias;
    if turned || affine.shift.is_some() && no_sums || graph.is_pinned(layer.weight) {
        return None;
    }
    let (scale, shift) = affine.spread(layer.channels.1, &layer)?;
    let mut bias = layer.bias.clone();
    if affine.shift.is_some() {
        let (run, channels) = layer.runs_of(tensor.dims());
        for (values, (output, input)) in tensor.f64s()?.chunks(run).zip(channels) {
            bias[output] += values.iter().sum::<f64>() * shift[input];
        }
    }
    write(graph, &layer, &affine, |_, input| scale[input], &bias)?;
    graph.set_operand(reader, 0, Some(affine.x));
    graph.sweep(node);
    Some(())
}

/// Removes the sum with zero at `node`, which changes at most the sign of a zero.
fn zero(graph: &mut Graph, shapes: &Shapes, node: NodeId) -> Option<()> {
    graph.op_of(node, "Add").filter(|_| graph.opset() >= 7 && !graph.is_pinned(node.out()))?;
    let (x, constant, _) = with_constant(graph, node)?;
    let zeros = graph.constant(constant)?.f64s()?.iter().all(|&v| v == 0.0);
    let same = zeros && shapes.dims(x)? == shapes.dims(node.out())?;
    same.then(|| graph.bypass(node, x))?
}

/// Merges the sum or product by a constant at `node` with the one that makes its operand.
fn merge(graph: &mut Graph, node: NodeId) -> Option<()> {
    let (outer, inner) = (Factor::of(graph, node)?, Factor::of(graph, graph.operand(node, 0)?.node));
    let inner = inner.or_else(|| Factor::of(graph, graph.operand(node, 1)?.node))?;
    if outer.x.node != inner.node || outer.is_sum != inner.is_sum || graph.is_pinned(node.out()) {
        return None;
    }
    graph.sole_use(inner.node.out())?;
    let (a, b) = (graph.constant(inner.constant)?, graph.constant(outer.constant)?);
    let op = |is_inverse: bool| match (outer.is_sum, is_inverse) {
        (true, false) => "Add",
        (true, true) => "Sub",
        (false, false) => "Mul",
        (false, true) => "Div",
    };
    if a.dtype() != b.dtype() || !matches!(a.dtype(), DType::Float | DType::Double) {
        return None;
    }
    // What is not inverted comes first: c − a, c ÷ a.
    let (first, second) = if inner.is_inverse && !outer.is_inverse { (b, a) } else { (a, b) };
    let merged = Op::new(op(inner.is_inverse != outer.is_inverse));
    let merged = eval::evaluate(&merged, graph.opset(), &[Some(first), Some(second)])?.pop()?;
    let merged = Weight::dense(merged);
    if merged.value().len() > a.len().max(b.len()) || !merged.value().is_finite() {
        return None;
    }
    keeps_range(&merged.value().f64s()?, &a.f64s()?, &b.f64s()?, outer.is_sum).then_some(())?;
    let kept = op(inner.is_inverse && outer.is_inverse);
    let name = graph.name_after(outer.constant, FuseAffine::NAME);
    let constant = graph.add_const(merged, &name);
    graph.edit_op(node, |op| *op = Op::new(kept).in_place_of(op));
    graph.set_operand(node, 0, Some(inner.x));
    graph.set_operand(node, 1, Some(constant));
    graph.sweep(inner.node);
    graph.sweep(outer.constant.node);
    Some(())
}

/// Whether one constant does what two do one after the other: what is added is no more than some bits larger than what is
/// left of it, or it was added to round; and no factor is smaller than any number, but for zeros.
fn keeps_range(merged: &[f64], a: &[f64], b: &[f64], is_sum: bool) -> bool {
    const BITS: f64 = 256.0;
    let largest = |values: &[f64]| values.iter().fold(0.0_f64, |most, v| most.max(v.abs()));
    if is_sum {
        let (before, after) = (largest(a).max(largest(b)), largest(merged));
        return after * BITS >= before || merged.iter().all(|&v| v == 0.0) && before < BITS;
    }
    let has_zero = |values: &[f64]| values.contains(&0.0);
    let is_normal = |&v: &f64| v.abs() >= f64::from(f32::MIN_POSITIVE);
    merged.iter().all(|v| is_normal(v) || *v == 0.0 && (has_zero(a) || has_zero(b)))
}

/// x + c, x − c, x · c or x ÷ c.
struct Factor {
    node: NodeId,
    x: Outlet,
    constant: Outlet,
    is_sum: bool,
    /// Whether the constant is subtracted or divided by.
    is_inverse: bool,
}

impl Factor {
    fn of(graph: &Graph, node: NodeId) -> Option<Self> {
        let op = graph.op(node)?.standard().filter(|_| graph.opset() >= 7)?;
        let (is_sum, is_inverse) = match op {
            "Add" => (true, false),
            "Sub" => (true, true),
            "Mul" => (false, false),
            "Div" => (false, true),
            _ => return None,
        };
        let (x, constant, is_right) = with_constant(graph, node)?;
        graph.constant(constant).filter(|constant| is_float(constant.dtype()))?;
        (is_right || !is_inverse).then_some(Self { node, x, constant, is_sum, is_inverse })
    }
}
