//! See [`Identity`].

use crate::{
    analysis::{
        is_broadcasting,
        shapes::{Dim, Shapes, Term},
    },
    eval::axis,
    ir::{DType, Graph, NodeId, Outlet},
    pass::{Context, Declare, Fidelity, Pass, rewrite_shaped},
};

/// Remove operators that pass their input on unchanged.
///
/// `Identity`, `Dropout` at inference, `Cast` to the type it has, `Transpose` that keeps the order, `Concat`, `Sum`, `Max`,
/// `Min` and `Mean` of one tensor, `Split` into one part, `Expand` and `Tile` by ones, sums with zero and products with one,
/// `And` with true and `Or` with false, and `Reshape`, `Flatten`, `Squeeze`, `Unsqueeze`, `Expand`, `Resize`, `Slice` and `Pad`
/// whose result has the known shape of their input. A bias of zeros goes, a part of a `Concat` without elements, and an `Expand`
/// before an operator that repeats its operand as well.
///
/// Applies when: the result is no output, or the input can take the output's name. An `Identity` from an input, a
/// constant or another output to an output stays: the interface needs it.
///
/// Fidelity: exact.
#[derive(Debug, clap::Parser)]
#[command(name = "identity")]
pub(super) struct Identity {}

impl Declare for Identity {
    const NAME: &'static str = "identity";
    const FIDELITY: Fidelity = Fidelity::Exact;
}

impl Pass for Identity {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        cx.add("operators removed", rewrite_shaped(graph, &bypass));
        Ok(())
    }
}

/// Has the readers of `node` read its input, if that is the same, and removes it.
fn bypass(graph: &mut Graph, shapes: &Shapes, node: NodeId) -> Option<()> {
    if let Some(shortened) = shorten(graph, shapes, node) {
        return Some(shortened);
    }
    let output = node.out();
    let input = match neutral(graph, shapes, node) {
        Some(input) => input,
        None => graph.operand(node, 0).filter(|&input| is_identity(graph, shapes, node, input) == Some(true))?,
    };
    if graph.is_pinned(output) {
        return None;
    }
    graph.bypass(node, input)
}

/// Has `node` read less: no bias of zeros, no part of a `Concat` that has no elements, and what an `Expand` repeats where
/// `node` repeats it too.
fn shorten(graph: &mut Graph, shapes: &Shapes, node: NodeId) -> Option<()> {
    let op = graph.op(node)?;
    let kind = op.standard()?;
    match kind {
        "Conv" | "ConvTranspose" | "Gemm" if !op.is("Gemm") || graph.opset() >= 11 => {
            let bias = graph.constant(graph.operand(node, 2)?)?;
            bias.f64s().filter(|bias| bias.iter().all(|&value| value == 0.0))?;
            graph.exchange_operand(node, 2, None);
            graph.trim_operands(node);
            Some(())
        }
        "Concat" => {
            let operands = graph.operands(node).into_iter().collect::<Option<Vec<_>>>()?;
            let at = op.int("axis").unwrap_or(1);
            let length = |value: Outlet| {
                let dims = shapes.dims(value)?;
                dims[axis(at, dims.len())?]
            };
            let is_empty = |value: Outlet| length(value) == Some(Term::from(0));
            let (empty, full): (Vec<_>, Vec<_>) = operands.into_iter().partition(|&value| is_empty(value));
            if empty.is_empty() || full.is_empty() {
                return None;
            }
            graph.set_operands(node, &full);
            for value in empty {
                graph.sweep(value.node);
            }
            Some(())
        }
        // The slope of a `PRelu` must not widen what it reads.
        _ if is_broadcasting(kind) && kind != "PRelu" && graph.opset() >= 8 => unexpanded(graph, shapes, node),
        _ => None,
    }
}

/// Has `node`, which broadcasts its operands, read what an `Expand` before it repeats, where its result is of the same shape then.
fn unexpanded(graph: &mut Graph, shapes: &Shapes, node: NodeId) -> Option<()> {
    let operands = graph.operands(node).into_iter().collect::<Option<Vec<_>>>()?;
    let wanted = shapes.dims(node.out())?;
    for (slot, &value) in operands.iter().enumerate() {
        if graph.op_of(value.node, "Expand").is_none() {
            continue;
        }
        let source = graph.operand(value.node, 0)?;
        let others = operands.iter().enumerate().filter(|(i, _)| *i != slot).map(|(_, &other)| other);
        let all: Option<Vec<&[Dim]>> = others.chain([source]).map(|value| shapes.dims(value)).collect();
        let one = Some(Term::from(1));
        let is_made = |(back, &wanted): (usize, &Dim)| {
            let at = |dims: &&[Dim]| dims.len().checked_sub(back + 1).map(|i| dims[i]);
            let extents: Vec<Dim> = all.iter().flatten().filter_map(at).collect();
            // Each operand has this extent or 1, and one of them has it.
            extents.iter().all(|&extent| extent == one || extent.is_some() && extent == wanted)
                && (wanted == one || extents.contains(&wanted))
        };
        // The result keeps its rank.
        let rank = all.iter().flatten().map(|dims| dims.len()).max();
        if rank == Some(wanted.len()) && wanted.iter().rev().enumerate().all(is_made) {
            graph.exchange_operand(node, slot as u32, Some(source));
            return Some(());
        }
    }
    None
}

/// The operand that `node` passes on unchanged since the other one is a constant of zeros, ones or the like.
fn neutral(graph: &Graph, shapes: &Shapes, node: NodeId) -> Option<Outlet> {
    let op = graph.op(node)?.standard().filter(|_| graph.opset() >= 7)?;
    let (a, b) = (graph.operand(node, 0)?, graph.operand(node, 1)?);
    let wanted = match op {
        "Add" | "Sub" | "Or" | "Xor" => 0.0,
        "Mul" | "Div" | "Pow" | "And" => 1.0,
        _ => return None,
    };
    // Zero takes the sign off a zero that it is added to.
    let signed = |zero: f64| op != "Add" || zero.is_sign_negative();
    let is_neutral = |value: Outlet, other: Outlet| {
        let constant = graph.constant(value)?;
        let dims = shapes.dims(other)?;
        // The constant must not widen the result.
        let at = |axis: usize| dims.len().checked_sub(axis + 1).map(|i| dims[i]);
        let fits = constant.dims().len() <= dims.len()
            && constant.dims().iter().rev().enumerate().all(|(axis, &d)| d == 1 || at(axis) == Some(Some(d.into())));
        // Powers are of the type of the base.
        if !fits || shapes.fact(other)?.dtype != Some(constant.dtype()) {
            return None;
        }
        let all = match (constant.f64s(), constant.i64s()) {
            (Some(values), _) => values.iter().all(|&v| v == wanted && signed(v)),
            (None, Some(values)) => values.iter().all(|&v| v as f64 == wanted),
            _ => false,
        };
        all.then_some(other)
    };
    let commutes = matches!(op, "Add" | "Mul" | "And" | "Or" | "Xor");
    is_neutral(b, a).or_else(|| is_neutral(a, b).filter(|_| commutes))
}

/// Whether the `Resize` at `node` keeps every extent, and so every element.
fn resizes_nothing(graph: &Graph, shapes: &Shapes, node: NodeId) -> Option<bool> {
    let op = graph.op(node).filter(|_| graph.opset() >= 11)?;
    if op.string("coordinate_transformation_mode") == Some("tf_crop_and_resize") {
        return Some(false);
    }
    if let Some(scales) = graph.operand(node, 2).filter(|_| graph.operand(node, 3).is_none()) {
        return Some(graph.constant(scales)?.f32s()?.iter().all(|&scale| scale == 1.0));
    }
    let whole = op.ints("axes").is_none() && matches!(op.string("keep_aspect_ratio_policy"), None | Some("stretch"));
    let sizes: Vec<_> = shapes.integers(graph.operand(node, 3)?)?;
    let dims = shapes.known(graph.operand(node, 0)?)?;
    Some(whole && sizes.iter().copied().eq(dims.iter().map(|&d| d as i64)))
}

/// Whether the slice at `node` runs from the first element to one that no extent reaches.
fn takes_all(graph: &Graph, shapes: &Shapes, node: NodeId) -> Option<bool> {
    let given = |attribute: &str, slot: u32| shapes.argument(graph, node, attribute, slot);
    let ends = given("ends", 2)?;
    let steps = if graph.operand(node, 4).is_some() { given("steps", 4)? } else { vec![1] };
    let all = |values: &[i64], wanted: fn(i64) -> bool| values.iter().all(|&value| wanted(value));
    Some(
        all(&given("starts", 1)?, |start| start == 0)
            && all(&ends, |end| end >= i64::from(i32::MAX))
            && all(&steps, |step| step == 1),
    )
}

fn is_identity(graph: &Graph, shapes: &Shapes, node: NodeId, input: Outlet) -> Option<bool> {
    let op = graph.op(node)?;
    let same_shape = || Some(shapes.dims(input)? == shapes.dims(node.out())?);
    Some(match op.standard()? {
        "Identity" => true,
        "Dropout" => {
            let trains = match graph.operand(node, 2) {
                Some(flag) => graph.constant(flag)?.i64s()?.first() != Some(&0),
                None => graph.opset() < 7 && op.int("is_test") != Some(1),
            };
            let mask_is_read =
                graph.output_count(node) > 1 && !graph.uses(node.at(1)).is_empty() || graph.is_output(node.at(1));
            !trains && !mask_is_read
        }
        "Cast" => {
            let from = shapes.fact(input)?.dtype?;
            DType::try_from(i32::try_from(op.int("to")?).ok()?).ok()? == from
        }
        "Transpose" => match op.ints("perm") {
            Some(perm) => perm.iter().copied().eq(0..perm.len() as i64),
            // Without an order, the axes are reversed.
            None => shapes.rank(input)? <= 1,
        },
        "Concat" | "Sum" | "Max" | "Min" | "Mean" => graph.operands(node).len() == 1,
        "Split" => graph.output_count(node) == 1,
        "Tile" if graph.opset() >= 6 => shapes.argument(graph, node, "repeats", 1)?.iter().all(|&times| times == 1),
        "Resize" => resizes_nothing(graph, shapes, node)?,
        "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" => same_shape()?,
        "Expand" => {
            let target = graph.operand(node, 1).and_then(|target| shapes.integers(target));
            let ones = target.is_some_and(|t| t.iter().all(|&d| d == 1) && Some(t.len()) <= shapes.rank(input));
            ones || same_shape()?
        }
        // A slice or pad that keeps every extent keeps every element, unless it runs backwards or moves them.
        "Slice" => takes_all(graph, shapes, node)? || same_shape()? && graph.operand(node, 4).is_none(),
        "Pad" => {
            let pads = match graph.operand(node, 1) {
                Some(pads) => graph.constant(pads)?.i64s()?,
                None => op.ints("pads")?.to_vec(),
            };
            pads.iter().all(|&p| p == 0)
        }
        _ => false,
    })
}
