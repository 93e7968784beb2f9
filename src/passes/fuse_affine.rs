//! See [`FuseAffine`].

use crate::{
    eval,
    ir::{DType, Graph, NodeId, Op, Outlet, Tensor, Weight, tensor::strides},
    pass::{Context, Declare, Fidelity, Pass, everywhere},
};

/// Fold `Mul`, `Div`, `Add` and `Sub` by constants into the `Conv`, `ConvTranspose` or `Gemm` before or after them, and
/// into each other.
///
/// a·(W·x + b) + c is one layer with weight a·W and bias a·b + c; W·(a·x + c) + b is one with weight W·a and bias W·c + b.
/// Two sums, or two products, by constants are one.
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
        let mut fused = 0;
        everywhere(graph, &mut |graph| {
            // Each rewrite removes an operator, and may bring the next one beside a layer.
            loop {
                let rewrite = |graph: &mut Graph, node| {
                    after(graph, node).or_else(|| before(graph, node)).or_else(|| merge(graph, node))
                };
                let now = graph.ops().into_iter().filter_map(|node| rewrite(graph, node)).count();
                fused += now;
                if now == 0 {
                    break;
                }
            }
        });
        cx.add("operators fused", fused);
        Ok(())
    }
}

/// An operator seen as y = scale·x + shift, of which one is neutral.
struct Affine {
    x: Outlet,
    /// One number, or one for each channel, and how many axes follow that of the channels.
    scale: Option<Vec<f64>>,
    shift: Option<Vec<f64>>,
    trailing: usize,
}

impl Affine {
    fn of(graph: &Graph, node: NodeId) -> Option<Self> {
        let op = graph.op(node)?.standard()?;
        if graph.opset() < 7 || !matches!(op, "Mul" | "Div" | "Add" | "Sub") {
            return None;
        }
        let (a, b) = (graph.operand(node, 0)?, graph.operand(node, 1)?);
        let (x, constant, is_right) = match (graph.constant(a), graph.constant(b)) {
            (None, Some(constant)) => (a, constant, true),
            (Some(constant), None) => (b, constant, false),
            _ => return None,
        };
        let values = constant.f64s()?;
        let wide: Vec<_> = (0..constant.dims().len()).filter(|&axis| constant.dims()[axis] != 1).collect();
        let trailing = match wide[..] {
            [] if !values.is_empty() => 0,
            [axis] => constant.dims().len() - 1 - axis,
            _ => return None,
        };
        let each = |f: fn(f64) -> f64| Some(values.iter().map(|&v| f(v)).collect::<Vec<_>>());
        let (scale, shift) = match (op, is_right) {
            ("Mul", _) => (each(|v| v), None),
            ("Div", true) => (each(f64::recip), None),
            ("Add", _) => (None, each(|v| v)),
            ("Sub", true) => (None, each(|v| -v)),
            ("Sub", false) => (Some(vec![-1.0]), each(|v| v)),
            _ => return None,
        };
        Some(Self { x, scale, shift, trailing })
    }

    /// Scale and shift of each of `channels`, which `trailing` axes follow.
    fn spread(&self, channels: usize, trailing: usize) -> Option<(Vec<f64>, Vec<f64>)> {
        let spread = |values: &Option<Vec<f64>>, neutral: f64| match values.as_deref() {
            None => Some(vec![neutral; channels]),
            Some(&[one]) => Some(vec![one; channels]),
            Some(values) => (values.len() == channels && self.trailing == trailing).then(|| values.to_vec()),
        };
        Some((spread(&self.scale, 1.0)?, spread(&self.shift, 0.0)?))
    }
}

/// A layer with constant weights.
struct Layer {
    node: NodeId,
    weight: Outlet,
    /// The axes of the weight that are output and input channels; how many of the former the layer has.
    axes: (usize, usize),
    channels: usize,
    groups: usize,
    /// How many axes of the result follow that of the channels.
    trailing: usize,
    /// The bias of each output channel, with the factor that the operator has for it.
    bias: Vec<f64>,
}

impl Layer {
    fn of(graph: &Graph, node: NodeId) -> Option<Self> {
        let op = graph.op(node)?;
        let weight = graph.operand(node, 1)?;
        let tensor = graph.constant(weight).filter(|tensor| tensor.f64s().is_some())?;
        let dims = tensor.dims();
        let groups = usize::try_from(op.int("group").unwrap_or(1)).ok().filter(|&groups| groups > 0)?;
        let (axes, groups, trailing) = match op.standard()? {
            "Conv" => ((0, 1), groups, dims.len().checked_sub(2)?),
            "ConvTranspose" => ((1, 0), groups, dims.len().checked_sub(2)?),
            "Gemm" if op.int("transB") == Some(1) => ((0, 1), 1, 0),
            "Gemm" => ((1, 0), 1, 0),
            _ => return None,
        };
        let channels = dims.get(axes.0)? * if axes.0 == 1 { groups } else { 1 };
        let beta = if op.is("Gemm") { f64::from(op.float("beta").unwrap_or(1.0)) } else { 1.0 };
        let bias = match graph.operand(node, 2) {
            None => vec![0.0; channels],
            Some(bias) => {
                let bias = graph.constant(bias)?;
                let values = bias.f64s()?;
                // A column would be a bias for each row of a Gemm.
                let fits = bias.dims().last().is_none_or(|&d| d == bias.len());
                match values[..] {
                    [one] if fits => vec![beta * one; channels],
                    _ if fits && values.len() == channels => values.iter().map(|v| beta * v).collect(),
                    _ => return None,
                }
            }
        };
        Some(Self { node, weight, axes, channels, groups, trailing, bias })
    }

    /// The weight with each element multiplied by `factor` of its output channel and input channel.
    fn scaled(&self, graph: &Graph, factor: impl Fn(usize, usize) -> f64) -> Option<Weight> {
        let weight = graph.weight(self.weight)?;
        let mut values = weight.value().f64s()?;
        for (value, (output, input)) in values.iter_mut().zip(self.channels_of(weight.value())) {
            *value *= factor(output, input);
        }
        weight.fit(weight.value().dims(), &values).filter(is_finite)
    }

    /// The output and input channel of each element of the weight.
    fn channels_of(&self, weight: &Tensor) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (dims, steps) = (weight.dims().to_vec(), strides(weight.dims()));
        let ((out_axis, in_axis), groups) = (self.axes, self.groups);
        (0..weight.len()).map(move |i| {
            let at = |axis: usize| i / steps[axis] % dims[axis];
            // The first axis runs over all groups, the second over one.
            let group = at(0) / (dims[0] / groups).max(1);
            let whole = |axis: usize| if axis == 1 { group * dims[1] + at(1) } else { at(0) };
            (whole(out_axis), whole(in_axis))
        })
    }

    /// Gives the layer other weights.
    fn write(&self, graph: &mut Graph, weight: Option<Weight>, bias: &[f64]) -> Option<()> {
        let like = graph.weight(self.weight)?;
        let bias = like.fit(&[self.channels], bias).filter(is_finite)?;
        let name = |graph: &Graph, value: Outlet, what: &str| format!("{}.{what}", graph.name(value));
        if let Some(weight) = weight {
            let name = name(graph, self.weight, FuseAffine::NAME);
            let new = graph.add_const(weight, &name);
            graph.set_operand(self.node, 1, Some(new));
            graph.sweep(self.weight.node);
        }
        let old = graph.operand(self.node, 2);
        if old.is_some() || bias.value().f64s()?.iter().any(|&v| v != 0.0) {
            let name = match old {
                Some(old) => name(graph, old, FuseAffine::NAME),
                None => name(graph, self.node.out(), "bias"),
            };
            let new = graph.add_const(bias, &name);
            graph.set_operand(self.node, 2, Some(new));
            if let Some(old) = old {
                graph.sweep(old.node);
            }
        }
        if graph.op(self.node)?.attribute("beta").is_some() {
            graph.edit_op(self.node, |op| *op = std::mem::take(op).without("beta"));
        }
        Some(())
    }
}

fn is_finite(weight: &Weight) -> bool {
    weight.value().f64s().is_some_and(|values| values.iter().all(|v| v.is_finite()))
}

/// Folds the affine operator at `node` into the layer that makes its operand.
fn after(graph: &mut Graph, node: NodeId) -> Option<()> {
    let affine = Affine::of(graph, node)?;
    let layer = Layer::of(graph, affine.x.node)?;
    let pinned = graph.is_pinned(affine.x) || graph.is_pinned(node.out()) || graph.is_pinned(layer.weight);
    graph.sole_use(affine.x).filter(|_| !pinned)?;
    let (scale, shift) = affine.spread(layer.channels, layer.trailing)?;
    let weight = match &affine.scale {
        Some(_) => {
            graph.sole_use(layer.weight)?;
            Some(layer.scaled(graph, |output, _| scale[output])?)
        }
        None => None,
    };
    let bias: Vec<_> = (0..layer.channels).map(|c| scale[c] * layer.bias[c] + shift[c]).collect();
    layer.write(graph, weight, &bias)?;
    let constants: Vec<_> = graph.operands(node).into_iter().flatten().filter(|value| *value != affine.x).collect();
    graph.replace_uses(node.out(), affine.x);
    graph.sweep(node);
    for constant in constants {
        graph.sweep(constant.node);
    }
    Some(())
}

/// Folds the affine operator at `node` into the layer that alone reads its result.
fn before(graph: &mut Graph, node: NodeId) -> Option<()> {
    let affine = Affine::of(graph, node)?;
    let (reader, 0) = graph.sole_use(node.out()).filter(|_| !graph.is_pinned(node.out()))? else { return None };
    let layer = Layer::of(graph, reader)?;
    let op = graph.op(reader)?;
    let tensor = graph.constant(layer.weight)?;
    let inputs = tensor.dims().get(layer.axes.1)? * if layer.axes.1 == 1 { layer.groups } else { 1 };
    let turned = op.is("Gemm") && (op.int("transA") == Some(1) || op.float("alpha").is_some());
    let padded = op.ints("pads").is_some_and(|pads| pads.iter().any(|&pad| pad != 0))
        || !matches!(op.string("auto_pad"), None | Some("NOTSET" | "VALID"));
    // Outside its kernel, a transposed convolution has no input to add to.
    let no_sums = padded || op.is("ConvTranspose");
    if turned || affine.shift.is_some() && no_sums || graph.is_pinned(layer.weight) {
        return None;
    }
    let (scale, shift) = affine.spread(inputs, layer.trailing)?;
    let mut bias = layer.bias.clone();
    for (value, (output, input)) in tensor.f64s()?.iter().zip(layer.channels_of(tensor)) {
        bias[output] += value * shift[input];
    }
    let weight = match &affine.scale {
        Some(_) => {
            graph.sole_use(layer.weight)?;
            Some(layer.scaled(graph, |_, input| scale[input])?)
        }
        None => None,
    };
    layer.write(graph, weight, &bias)?;
    graph.set_operand(reader, 0, Some(affine.x));
    graph.sweep(node);
    Some(())
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
    // The first is applied as it is, so that a divided constant stays divided.
    let op = match (inner.is_inverse, outer.is_inverse, outer.is_sum) {
        (false, false, true) | (true, true, true) => "Add",
        (_, _, true) => "Sub",
        (false, false, false) | (true, true, false) => "Mul",
        _ => "Div",
    };
    if a.dtype() != b.dtype() || !matches!(a.dtype(), DType::Float | DType::Double) {
        return None;
    }
    // What is not inverted comes first: c − a, c ÷ a.
    let (first, second) = if inner.is_inverse && !outer.is_inverse { (b, a) } else { (a, b) };
    let merged = eval::evaluate(&Op::new(op), graph.opset(), &[Some(first), Some(second)])?.pop()?;
    let merged = Weight::dense(merged);
    if merged.value().len() > a.len().max(b.len()) || !is_finite(&merged) {
        return None;
    }
    let is_inverse = inner.is_inverse && outer.is_inverse;
    let kept = match (outer.is_sum, is_inverse) {
        (true, false) => "Add",
        (true, true) => "Sub",
        (false, false) => "Mul",
        (false, true) => "Div",
    };
    let name = format!("{}.{}", graph.name(outer.constant), FuseAffine::NAME);
    let constant = graph.add_const(merged, &name);
    let node_name = graph.op(node)?.name().to_owned();
    graph.edit_op(node, |op| *op = Op::new(kept).named(&node_name));
    graph.set_operand(node, 0, Some(inner.x));
    graph.set_operand(node, 1, Some(constant));
    graph.sweep(inner.node);
    graph.sweep(outer.constant.node);
    Some(())
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
        let (a, b) = (graph.operand(node, 0)?, graph.operand(node, 1)?);
        let (x, constant) = match (graph.constant(a), graph.constant(b)) {
            (None, Some(_)) => (a, b),
            (Some(_), None) if !is_inverse => (b, a),
            _ => return None,
        };
        graph.constant(constant)?.f64s()?;
        Some(Self { node, x, constant, is_sum, is_inverse })
    }
}
