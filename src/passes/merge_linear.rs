//! See [`MergeLinear`].

use nalgebra::{DMatrix, DVector};

use super::layer::{Layer, pads};
use crate::{
    ir::{Graph, NodeId, Op, Tensor, Weight},
    pass::{Context, Declare, Fidelity, Pass, rewrite},
};

/// Make one layer of two linear ones that follow each other, where that is cheaper.
///
/// V·(W·x + b) + c is one layer with weight V·W and bias V·b + c: `Gemm` or `MatMul` after the like, and convolutions of one
/// group of which one is 1×1.
///
/// Applies when: nothing else reads what is in between, the one weight has no more elements than those of the two that go, and where the
/// second convolution pads, the first has no bias and neither a stride nor padding.
///
/// Fidelity: rounding; products are summed in double precision and rounded once.
#[derive(Debug, clap::Parser)]
#[command(name = "merge-linear")]
pub(super) struct MergeLinear {}

impl Declare for MergeLinear {
    const NAME: &'static str = "merge-linear";
    const FIDELITY: Fidelity = Fidelity::Rounding;
}

impl Pass for MergeLinear {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        cx.add("layers merged", rewrite(graph, merge));
        Ok(())
    }
}

/// A weight as one matrix of output by input channels for each place of its kernel.
fn kernels(layer: &Layer, weight: &Tensor) -> Option<Vec<DMatrix<f64>>> {
    let places: usize = weight.dims().get(2..)?.iter().product();
    let mut kernels = vec![DMatrix::zeros(layer.channels.0, layer.channels.1); places];
    let (run, channels) = layer.runs_of(weight.dims());
    for (values, channels) in weight.f64s()?.chunks(run).zip(channels) {
        for (kernel, &value) in kernels.iter_mut().zip(values) {
            kernel[channels] = value;
        }
    }
    Some(kernels)
}

/// The weights of `kernels` in the order of axes that `layer` keeps its own in.
fn flatten(layer: &Layer, kernels: &[DMatrix<f64>], dims: &[usize], template: &Weight) -> Option<Weight> {
    let (_, channels) = layer.runs_of(dims);
    let values: Vec<f64> = channels.flat_map(|channels| kernels.iter().map(move |kernel| kernel[channels])).collect();
    layer.fit_weight(template, dims, &values)
}

/// Whether the convolution at `node` looks at each pixel where it is, alone.
fn is_pointwise(graph: &Graph, layer: &Layer) -> Option<bool> {
    let op = graph.op(layer.node)?;
    let ones = |name: &str, wanted: i64| op.ints(name).is_none_or(|values| values.iter().all(|&value| value == wanted));
    let kernel = graph.constant(layer.weight)?.dims().get(2..)?.iter().all(|&extent| extent == 1);
    Some(
        kernel
            && ones("strides", 1)
            && ones("pads", 0)
            && matches!(op.string("auto_pad"), None | Some("NOTSET" | "VALID")),
    )
}

/// Merges the layer at `node` with the one that makes its operand.
fn merge(graph: &mut Graph, node: NodeId) -> Option<()> {
    let middle = graph.operand(node, 0)?;
    graph.sole_use(middle).filter(|_| !graph.is_pinned(middle) && !graph.is_pinned(node.out()))?;
    let (first, second) = (Layer::of(graph, middle.node)?, Layer::of(graph, node)?);
    let kinds = (graph.op(first.node)?.standard()?, graph.op(node)?.standard()?);
    let plain = |node: NodeId| {
        let op = graph.op(node);
        op.is_some_and(|op| op.int("transA").unwrap_or(0) == 0 && op.float("alpha").unwrap_or(1.0) == 1.0)
    };
    let convolutions = match kinds {
        ("Conv", "Conv") => true,
        ("Gemm" | "MatMul", "Gemm") | ("MatMul", "MatMul") => false,
        _ => return None,
    };
    if ![first.node, node].into_iter().all(plain) || first.channels.0 != second.channels.1 {
        return None;
    }
    let (w, v) = (graph.constant(first.weight)?, graph.constant(second.weight)?);
    let leading = is_pointwise(graph, &first) == Some(true);
    if convolutions && !can_merge(graph, &first, &second, leading) {
        return None;
    }
    let (kept, shape_of) = if convolutions && !leading { (first.node, w) } else { (node, v) };
    let channels = (second.channels.0, first.channels.1);
    let mut dims = shape_of.dims().to_vec();
    (dims[second.axes.0], dims[second.axes.1]) = channels;
    // A weight that something else reads stays beside the merged one.
    let goes = |value, tensor: &Tensor| if graph.sole_use(value).is_some() { tensor.len() } else { 0 };
    if dims.iter().product::<usize>() > goes(first.weight, w) + goes(second.weight, v) {
        return None;
    }
    let (before, after) = (kernels(&first, w)?, kernels(&second, v)?);
    let both = Layer { channels, groups: 1, ..second };
    let merged: Vec<_> = if before.len() == 1 {
        after.iter().map(|after| after * &before[0]).collect()
    } else {
        before.iter().map(|before| &after[0] * before).collect()
    };
    let through = after.iter().fold(DVector::from_column_slice(&both.bias), |sum, after| {
        sum + after * DVector::from_column_slice(&first.bias)
    });
    let bias = through.as_slice();
    let weight = flatten(&both, &merged, &dims, graph.weight(both.weight)?)?;
    let is_needed = bias.iter().any(|&b| b != 0.0) || kinds.1 == "Gemm" && graph.opset() < super::GEMM_MAY_ADD_NOTHING;
    let bias = if is_needed { Some(both.fit_bias(graph, bias)?) } else { None };
    replace(graph, (&first, &both), kept, weight, bias)
}

/// Whether two convolutions, of which the first may be pointwise, are one.
fn can_merge(graph: &Graph, first: &Layer, second: &Layer, leading: bool) -> bool {
    let pads = graph.op(second.node).is_some_and(pads);
    let biased = first.bias.iter().any(|&b| b != 0.0);
    // What the second pads with is zero, and not the bias of the first.
    let fits = leading && !(pads && biased) || is_pointwise(graph, second) == Some(true);
    first.groups == 1 && second.groups == 1 && fits
}

/// Makes the operator at `second` the one of both layers: with the attributes of `kept`, this weight and this bias.
fn replace(
    graph: &mut Graph,
    (first, second): (&Layer, &Layer),
    kept: NodeId,
    weight: Weight,
    bias: Option<Weight>,
) -> Option<()> {
    let node = second.node;
    let name = |what: &str| format!("{}.{what}", graph.name(node.out()));
    let (weight_name, bias_name) = (name("weight"), name("bias"));
    let source = graph.operand(first.node, 0)?;
    let op = graph.op(kept)?.clone().in_place_of(graph.op(node)?).without("beta");
    let weight = graph.add_const(weight, &weight_name);
    let bias = bias.map(|bias| graph.add_const(bias, &bias_name));
    graph.exchange_operand(node, 1, Some(weight));
    graph.exchange_operand(node, 2, bias);
    graph.edit_op(node, |old| *old = Op { arity: old.arity, ..op });
    graph.exchange_operand(node, 0, Some(source));
    Some(())
}
