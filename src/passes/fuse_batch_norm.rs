//! See [`FuseBatchNorm`].

use crate::{
    ir::{Graph, NodeId, Op, Outlet, Weight, tensor::strides},
    pass::{Context, Declare, Fidelity, Pass, everywhere},
};

/// Fold a `BatchNormalization` into the `Conv`, `ConvTranspose` or `Gemm` before it.
///
/// With s = scale / √(var + ε) for each channel, s·(W·x + c − mean) + bias is one layer with weight s·W and bias
/// s·(c − mean) + bias.
///
/// Applies when: weights and statistics are constant, the layer's weight has no other reader, and nothing but the
/// normalization reads the layer's output.
///
/// Fidelity: rounding; products are computed in double precision and rounded once.
#[derive(Debug, clap::Parser)]
#[command(name = "fuse-batch-norm")]
pub(super) struct FuseBatchNorm {}

impl Declare for FuseBatchNorm {
    const NAME: &'static str = "fuse-batch-norm";
    const FIDELITY: Fidelity = Fidelity::Rounding;
}

impl Pass for FuseBatchNorm {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        let mut fused = 0;
        everywhere(graph, &mut |graph| {
            fused += graph.ops().into_iter().filter_map(|node| fuse(graph, node)).count();
        });
        cx.add("normalizations fused", fused);
        Ok(())
    }
}

/// The default of `epsilon`.
const EPSILON: f32 = 1e-5;

/// Fuses the normalization at `bn`, or leaves the graph alone.
fn fuse(graph: &mut Graph, bn: NodeId) -> Option<()> {
    let norm = graph.op_of(bn, "BatchNormalization")?;
    let unusual = norm.int("training_mode") == Some(1) || norm.int("spatial") == Some(0) || graph.opset() < 7;
    let more_read = (1..graph.output_count(bn)).any(|slot| !graph.name(bn.at(slot)).is_empty());
    if unusual || more_read {
        return None;
    }
    let epsilon = f64::from(norm.float("epsilon").unwrap_or(EPSILON));
    let layer_out = graph.operand(bn, 0)?;
    let layer = layer_out.node;
    graph.sole_use(layer_out)?;
    let op = graph.op(layer)?;
    let axis = out_axis(op)?;
    let (weight_at, bias_at) = (graph.operand(layer, 1)?, graph.operand(layer, 2));
    graph.sole_use(weight_at)?;
    let weight = graph.weight(weight_at)?;
    let parameter = |slot: u32| graph.constant(graph.operand(bn, slot)?)?.f64s();
    let (scale, bias, mean, var) = (parameter(1)?, parameter(2)?, parameter(3)?, parameter(4)?);
    if graph.is_pinned(layer_out) || graph.is_pinned(bn.out()) || graph.is_pinned(weight_at) {
        return None;
    }
    let channels = scale.len();
    if [bias.len(), mean.len(), var.len()] != [channels; 3] {
        return None;
    }
    let factor: Vec<f64> = scale.iter().zip(&var).map(|(s, v)| s / (v + epsilon).sqrt()).collect();
    let old_bias = match bias_at {
        Some(at) => {
            // A column would be a bias for each row of a Gemm.
            let bias = graph.constant(at).filter(|bias| bias.dims().last().is_none_or(|&d| d == bias.len()))?;
            bias.f64s()?
        }
        None => vec![0.0],
    };
    let beta = if op.is("Gemm") { f64::from(op.float("beta").unwrap_or(1.0)) } else { 1.0 };
    if old_bias.len() != channels && old_bias.len() != 1 {
        return None;
    }
    let new_bias: Vec<f64> = (0..channels)
        .map(|c| factor[c] * (beta * old_bias[if old_bias.len() == 1 { 0 } else { c }] - mean[c]) + bias[c])
        .collect();
    let new_weight = scaled(weight, axis, op.int("group").unwrap_or(1), &factor)?;
    let new_bias = weight.fit(&[channels], &new_bias)?;
    if !new_weight.value().f64s()?.iter().chain(&new_bias.value().f64s()?).all(|v| v.is_finite()) {
        return None;
    }
    // Everything above only reads; everything below only writes.
    let name = |graph: &Graph, value: Outlet| format!("{}.fuse-batch-norm", graph.name(value));
    let weight_name = name(graph, weight_at);
    let bias_name = name(graph, bias_at.unwrap_or_else(|| graph.operand(bn, 2).unwrap_or(weight_at)));
    let weight = graph.add_const(new_weight, &weight_name);
    let bias = graph.add_const(new_bias, &bias_name);
    graph.set_operand(layer, 1, Some(weight));
    graph.set_operand(layer, 2, Some(bias));
    if beta != 1.0 {
        graph.edit_op(layer, |op| *op = std::mem::take(op).without("beta"));
    }
    graph.replace_uses(bn.out(), layer_out);
    graph.sweep(bn);
    graph.sweep(weight_at.node);
    if let Some(bias_at) = bias_at {
        graph.sweep(bias_at.node);
    }
    Some(())
}

/// The axis of the weight of `op` that is its output channels.
fn out_axis(op: &Op) -> Option<usize> {
    match op.standard()? {
        "Conv" => Some(0),
        "ConvTranspose" => Some(1),
        "Gemm" => Some(usize::from(op.int("transB") != Some(1))),
        _ => None,
    }
}

/// `weight` with output channel c multiplied by `factor[c]`. Along axis 1 (`ConvTranspose`) the channels of group g
/// are those of the g-th share of axis 0.
fn scaled(weight: &Weight, axis: usize, groups: i64, factor: &[f64]) -> Option<Weight> {
    let dims = weight.value().dims();
    let groups = if axis == 1 && dims.len() > 2 { usize::try_from(groups).ok().filter(|&g| g > 0)? } else { 1 };
    if dims.get(axis)? * groups != factor.len() {
        return None;
    }
    let step = strides(dims)[axis];
    let share = weight.value().len() / groups;
    let mut values = weight.value().f64s()?;
    for (i, value) in values.iter_mut().enumerate() {
        *value *= factor[i / share.max(1) * dims[axis] * usize::from(groups > 1) + i / step % dims[axis]];
    }
    weight.fit(dims, &values)
}
