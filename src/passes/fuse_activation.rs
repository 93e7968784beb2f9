//! See [`FuseActivation`].

use crate::{
    analysis::shapes::Shapes,
    ir::{DType, Graph, NodeId, Op, Outlet, Tensor},
    pass::{Context, Declare, Fidelity, Pass, rewrite_shaped},
};

/// Spell activations that exporters took apart with the fewest operators of the model's own opset.
///
/// Clip(x + b, 0, h) ÷ h is one `HardSigmoid`, also where it multiplies something first and is divided after:
/// v · Clip(x + 3, 0, 6) ÷ 6 is `HardSigmoid` and `Mul`. x · HardSigmoid(x) with its usual numbers is `HardSwish` from
/// opset 14 (Howard 2019). x · (1 + erf(x ÷ √2)) ÷ 2 is `Gelu` from opset 20 (Hendrycks 2016), also with its approximation by
/// tanh; x · tanh(softplus(x)) is `Mish` from opset 18 (Misra 2019). The logarithm of a softmax is
/// `LogSoftmax`, which is finite where the softmax is too small for its type.
///
/// Applies when: the numbers are constants and nothing else reads what is in between.
///
/// Fidelity: rounding.
#[derive(Debug, clap::Parser)]
#[command(name = "fuse-activation")]
pub(super) struct FuseActivation {}

impl Declare for FuseActivation {
    const NAME: &'static str = "fuse-activation";
    const FIDELITY: Fidelity = Fidelity::Rounding;
}

impl Pass for FuseActivation {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        let rule = |graph: &mut Graph, shapes: &Shapes, node: NodeId| {
            // What the first makes, the second may take up.
            let (sigmoid, swish) = (hard_sigmoid(graph, shapes, node), hard_swish(graph, node));
            sigmoid
                .or(swish)
                .or_else(|| gelu(graph, shapes, node))
                .or_else(|| mish(graph, node))
                .or_else(|| log_softmax(graph, node))
        };
        cx.add("activations fused", rewrite_shaped(graph, &rule));
        Ok(())
    }
}

/// Numbers that were rounded to single precision on the way agree to this.
const CLOSE: f64 = 1e-6;

/// The one number that `value` is, if it is a constant of single precision.
pub(super) fn number(graph: &Graph, value: Outlet) -> Option<f64> {
    let is_number = |constant: &&Tensor| constant.dtype() == DType::Float && matches!(constant.dims(), [] | [1]);
    graph.constant(value).filter(is_number)?.f64s()?.first().copied()
}

/// The other operand and the number, where one operand of `node` is a number.
fn with_number(graph: &Graph, node: NodeId) -> Option<(Outlet, f64)> {
    let (a, b) = (graph.operand(node, 0)?, graph.operand(node, 1)?);
    number(graph, b).map(|number| (a, number)).or_else(|| Some((b, number(graph, a)?)))
}

/// That `x` has axes: numbers that are lists of one make a list of a single number.
fn is_list(shapes: &Shapes, x: Outlet) -> Option<()> {
    (shapes.rank(x)? > 0).then_some(())
}

/// Clip(x + shift, 0, high), which only `reader` reads.
struct Clipped {
    x: Outlet,
    shift: f64,
    high: f64,
}

impl Clipped {
    fn of(graph: &Graph, value: Outlet) -> Option<Self> {
        let op = graph.op_of(value.node, "Clip")?;
        graph.sole_use(value)?;
        let bound = |slot: u32, attribute: &str| match graph.operand(value.node, slot) {
            Some(bound) => number(graph, bound),
            None => op.float(attribute).map(f64::from),
        };
        let (low, high) = (bound(1, "min")?, bound(2, "max")?);
        if low != 0.0 || high <= 0.0 {
            return None;
        }
        let inner = graph.operand(value.node, 0)?;
        let add = graph.op_of(inner.node, "Add").and_then(|_| with_number(graph, inner.node));
        Some(match add.filter(|_| graph.sole_use(inner).is_some()) {
            Some((x, shift)) => Self { x, shift, high },
            None => Self { x: inner, shift: 0.0, high },
        })
    }
}

/// Makes the `Log` at `node` of a `Softmax` one operator.
fn log_softmax(graph: &mut Graph, node: NodeId) -> Option<()> {
    graph.op_of(node, "Log")?;
    let middle = graph.operand(node, 0)?;
    let softmax = graph.op_of(middle.node, "Softmax")?;
    graph.sole_use(middle).filter(|_| !graph.is_pinned(middle) && !graph.is_pinned(node.out()))?;
    let source = graph.operand(middle.node, 0)?;
    let mut op = Op::new("LogSoftmax").in_place_of(graph.op(node)?);
    if let Some(axis) = softmax.int("axis") {
        op = op.with_int("axis", axis);
    }
    graph.replace_op(node, op, &[source]);
    Some(())
}

/// Rewrites the division or product at `node` that ends a hard sigmoid.
fn hard_sigmoid(graph: &mut Graph, shapes: &Shapes, node: NodeId) -> Option<()> {
    let op = graph.op(node)?.standard().filter(|_| graph.opset() >= 7)?;
    let (x, number) = with_number(graph, node)?;
    let scale = match op {
        "Mul" => number,
        "Div" if graph.operand(node, 0) == Some(x) => number.recip(),
        _ => return None,
    };
    let (clipped, factor) = Clipped::of(graph, x).map(|clipped| (clipped, None)).or_else(|| gated(graph, x))?;
    if (clipped.high * scale - 1.0).abs() > CLOSE || graph.is_pinned(node.out()) {
        return None;
    }
    is_list(shapes, clipped.x)?;
    let sigmoid = Op::new("HardSigmoid").with_float("alpha", scale as f32);
    let sigmoid = sigmoid.with_float("beta", (clipped.shift * scale) as f32);
    let name = graph.op(node)?.name().to_owned();
    let number_at = u32::from(graph.operand(node, 0) == Some(x));
    let number = graph.operand(node, number_at)?;
    if let Some(factor) = factor {
        let named = format!("{}.gate", graph.name(node.out()));
        let gate = if name.is_empty() { sigmoid } else { sigmoid.named(&format!("{name}.gate")) };
        let gate = graph.add_op(gate, &[Some(clipped.x)], &[&named], node).out();
        graph.edit_op(node, |op| *op = Op::new("Mul").in_place_of(op));
        graph.set_operand(node, 0, Some(factor));
        graph.set_operand(node, 1, Some(gate));
    } else {
        graph.set_operand(node, 1, None);
        graph.set_operand(node, 0, Some(clipped.x));
        graph.edit_op(node, |op| *op = sigmoid.in_place_of(op));
    }
    graph.sweep(x.node);
    graph.sweep(number.node);
    Some(())
}

/// The clipped operand of the product that `value` is, and the other operand.
fn gated(graph: &Graph, value: Outlet) -> Option<(Clipped, Option<Outlet>)> {
    graph.op_of(value.node, "Mul")?;
    graph.sole_use(value)?;
    let (a, b) = (graph.operand(value.node, 0)?, graph.operand(value.node, 1)?);
    let first = Clipped::of(graph, a).map(|clipped| (clipped, Some(b)));
    first.or_else(|| Some((Clipped::of(graph, b)?, Some(a))))
}

/// Rewrites the product at `node` of a value and its own hard sigmoid.
fn hard_swish(graph: &mut Graph, node: NodeId) -> Option<()> {
    graph.op_of(node, "Mul").filter(|_| graph.opset() >= 14)?;
    let (a, b) = (graph.operand(node, 0)?, graph.operand(node, 1)?);
    let gates = |gate: Outlet, x: Outlet| {
        let op = graph.op_of(gate.node, "HardSigmoid")?;
        let near =
            |value: Option<f32>, default: f64, wanted: f64| (value.map_or(default, f64::from) - wanted).abs() <= CLOSE;
        let usual = near(op.float("alpha"), 0.2, 1.0 / 6.0) && near(op.float("beta"), 0.5, 0.5);
        (usual && graph.operand(gate.node, 0) == Some(x) && graph.sole_use(gate).is_some()).then_some((x, gate))
    };
    let (x, gate) = gates(b, a).or_else(|| gates(a, b)).filter(|_| !graph.is_pinned(node.out()))?;
    graph.set_operand(node, 1, None);
    graph.set_operand(node, 0, Some(x));
    graph.edit_op(node, |op| *op = Op::new("HardSwish").in_place_of(op));
    graph.sweep(gate.node);
    Some(())
}

/// The factors of a product that nothing else reads a part of: those that are no numbers, and the product of the numbers.
fn factors(graph: &Graph, value: Outlet) -> (Vec<Outlet>, f64) {
    let (mut leaves, mut product, mut stack) = (Vec::new(), 1.0, vec![(value, true)]);
    while let Some((value, is_root)) = stack.pop() {
        let alone = is_root || graph.sole_use(value).is_some() && !graph.is_pinned(value);
        let operands = (graph.operand(value.node, 0), graph.operand(value.node, 1));
        match (graph.op(value.node).and_then(Op::standard).filter(|_| alone), operands) {
            (Some("Mul"), (Some(a), Some(b))) => stack.extend([(b, false), (a, false)]),
            (Some("Div"), (Some(a), Some(b))) if number(graph, b).is_some() => {
                product /= number(graph, b).unwrap_or(1.0);
                stack.push((a, false));
            }
            _ => match number(graph, value) {
                Some(number) => product *= number,
                None => leaves.push(value),
            },
        }
    }
    (leaves, product)
}

fn is_near(value: f64, wanted: f64) -> bool {
    (value / wanted - 1.0).abs() <= CLOSE
}

/// Rewrites the last product of a Gaussian error linear unit, at `node`.
fn gelu(graph: &mut Graph, shapes: &Shapes, node: NodeId) -> Option<()> {
    graph.op(node)?.standard().filter(|op| matches!(*op, "Mul" | "Div") && graph.opset() >= 20)?;
    let (leaves, half) = factors(graph, node.out());
    let [a, b] = leaves[..] else { return None };
    let (x, approximates) =
        gate(graph, b).filter(|gate| gate.0 == a).or_else(|| gate(graph, a).filter(|g| g.0 == b))?;
    if !is_near(half, 0.5) || graph.is_pinned(node.out()) {
        return None;
    }
    is_list(shapes, x)?;
    let mut op = Op::new("Gelu").in_place_of(graph.op(node)?);
    if approximates {
        op = op.with_string("approximate", "tanh");
    }
    graph.replace_op(node, op, &[x]);
    Some(())
}

/// The x of 1 + erf(x ÷ √2), or of 1 + tanh(√(2 ÷ π) · (x + 0.044715 · x³)), and whether it is the latter.
fn gate(graph: &Graph, value: Outlet) -> Option<(Outlet, bool)> {
    graph.op_of(value.node, "Add")?;
    let (inner, one) = with_number(graph, value.node)?;
    let inside = [value, inner].iter().all(|&v| graph.sole_use(v).is_some() && !graph.is_pinned(v));
    let argument = graph.operand(inner.node, 0).filter(|_| inside && one == 1.0)?;
    let (leaves, scale) = factors(graph, argument);
    let [x] = leaves[..] else { return None };
    match graph.op(inner.node)?.standard()? {
        "Erf" => is_near(scale, std::f64::consts::FRAC_1_SQRT_2).then_some((x, false)),
        "Tanh" if is_near(scale, (2.0 / std::f64::consts::PI).sqrt()) => {
            graph.op_of(x.node, "Add")?;
            let (a, b) = (graph.operand(x.node, 0)?, graph.operand(x.node, 1)?);
            let is_cube = |cube: Outlet, of: Outlet| {
                let (leaves, scale) = factors(graph, cube);
                let powers = match leaves[..] {
                    [power] if graph.op_of(power.node, "Pow").is_some() => {
                        let exponent = graph.operand(power.node, 1).and_then(|exponent| number(graph, exponent));
                        graph.operand(power.node, 0) == Some(of) && exponent == Some(3.0)
                    }
                    [a, b, c] => [a, b, c] == [of; 3],
                    _ => false,
                };
                powers && is_near(scale, 0.044_715)
            };
            let x = if is_cube(b, a) { Some(a) } else { is_cube(a, b).then_some(b) };
            x.map(|x| (x, true))
        }
        _ => None,
    }
}

/// Rewrites the product at `node` of a value and the hyperbolic tangent of its softplus.
fn mish(graph: &mut Graph, node: NodeId) -> Option<()> {
    graph.op_of(node, "Mul").filter(|_| graph.opset() >= 18 && !graph.is_pinned(node.out()))?;
    let (a, b) = (graph.operand(node, 0)?, graph.operand(node, 1)?);
    let gates = |gate: Outlet, x: Outlet| {
        let inner = graph.op_of(gate.node, "Tanh").and_then(|_| graph.operand(gate.node, 0))?;
        let alone = graph.sole_use(gate).is_some() && graph.sole_use(inner).is_some();
        graph.op_of(inner.node, "Softplus").filter(|_| alone && graph.operand(inner.node, 0) == Some(x)).map(|_| x)
    };
    let x = gates(b, a).or_else(|| gates(a, b))?;
    let op = Op::new("Mish").in_place_of(graph.op(node)?);
    graph.replace_op(node, op, &[x]);
    Some(())
}
