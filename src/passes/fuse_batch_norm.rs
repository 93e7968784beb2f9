//! See [`FuseBatchNorm`].

use super::layer::Layer;
use crate::{
    ir::{Graph, NodeId, Outlet},
    pass::{Context, Declare, Fidelity, Pass, rewrite},
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
        cx.add("normalizations fused", rewrite(graph, fuse));
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
    graph.sole_use(layer_out)?;
    let layer = Layer::of(graph, layer_out.node).filter(|layer| layer.takes_bias)?;
    graph.sole_use(layer.weight)?;
    let parameter = |slot: u32| graph.constant(graph.operand(bn, slot)?)?.f64s();
    let (scale, shift, mean, var) = (parameter(1)?, parameter(2)?, parameter(3)?, parameter(4)?);
    if graph.is_pinned(layer_out) || graph.is_pinned(bn.out()) || graph.is_pinned(layer.weight) {
        return None;
    }
    let channels = layer.channels.0;
    if [scale.len(), shift.len(), mean.len(), var.len()] != [channels; 4] {
        return None;
    }
    let factor: Vec<f64> = scale.iter().zip(&var).map(|(s, v)| s / (v + epsilon).sqrt()).collect();
    let bias: Vec<f64> = (0..channels).map(|c| factor[c] * (layer.bias[c] - mean[c]) + shift[c]).collect();
    let new_weight = layer.scaled(graph, |output, _| factor[output])?;
    let new_bias = layer.fit_bias(graph, &bias)?;
    // Everything above only reads; everything below only writes.
    let name = |value: Outlet| format!("{}.fuse-batch-norm", graph.name(value));
    let old_bias = graph.operand(layer.node, 2);
    let (weight_name, bias_name) =
        (name(layer.weight), name(old_bias.or(graph.operand(bn, 2)).unwrap_or(layer.weight)));
    let weight = graph.add_const(new_weight, &weight_name);
    let bias = graph.add_const(new_bias, &bias_name);
    graph.set_operand(layer.node, 1, Some(weight));
    graph.set_operand(layer.node, 2, Some(bias));
    if layer.beta != 1.0 {
        graph.edit_op(layer.node, |op| *op = std::mem::take(op).without("beta"));
    }
    graph.replace_uses(bn.out(), layer_out);
    graph.sweep(bn);
    graph.sweep(layer.weight.node);
    if let Some(old_bias) = old_bias {
        graph.sweep(old_bias.node);
    }
    Some(())
}
