//! Layers with constant weights, as passes fold scales and shifts of channels into them.

use crate::ir::{DType, Graph, NodeId, Op, Outlet, Tensor, Weight, tensor::is_float};

/// A `Conv`, `ConvTranspose`, `Gemm` or `MatMul` by a matrix with constant weights.
pub(super) struct Layer {
    pub(super) node: NodeId,
    pub(super) weight: Outlet,
    /// The axes of the weight that are output and input channels.
    pub(super) axes: (usize, usize),
    pub(super) groups: usize,
    /// How many output and input channels the layer has.
    pub(super) channels: (usize, usize),
    /// The least rank that the operand and the result can have.
    pub(super) rank: usize,
    /// How many axes of the result follow that of the channels.
    pub(super) trailing: usize,
    /// Whether the operator can have a bias.
    pub(super) takes_bias: bool,
    /// The factor that the operator has for its bias.
    pub(super) beta: f64,
    /// The bias of each output channel, that factor included.
    pub(super) bias: Vec<f64>,
}

impl Layer {
    pub(super) fn of(graph: &Graph, node: NodeId) -> Option<Self> {
        let op = graph.op(node)?;
        let weight = graph.operand(node, 1)?;
        let tensor = graph.constant(weight).filter(|tensor| is_float(tensor.dtype()))?;
        let dims = tensor.dims();
        let groups = usize::try_from(op.int("group").unwrap_or(1)).ok().filter(|&groups| groups > 0)?;
        let (axes, groups, trailing) = match op.standard()? {
            "Conv" => ((0, 1), groups, dims.len().checked_sub(2)?),
            "ConvTranspose" => ((1, 0), groups, dims.len().checked_sub(2)?),
            "Gemm" if op.int("transB") == Some(1) => ((0, 1), 1, 0),
            "Gemm" => ((1, 0), 1, 0),
            "MatMul" if dims.len() == 2 => ((1, 0), 1, 0),
            _ => return None,
        };
        if !dims.first()?.is_multiple_of(groups) {
            return None;
        }
        // The first axis of a weight runs over all groups, the second over one.
        let count = |axis: usize| Some(dims.get(axis)? * if axis == 1 { groups } else { 1 });
        let channels = (count(axes.0)?, count(axes.1)?);
        let takes_bias = !op.is("MatMul");
        let rank = if takes_bias { trailing + 2 } else { 1 };
        let beta = if op.is("Gemm") { f64::from(op.float("beta").unwrap_or(1.0)) } else { 1.0 };
        let bias = match graph.operand(node, 2) {
            None => vec![0.0; channels.0],
            Some(bias) => {
                let bias = graph.constant(bias)?;
                let values = bias.f64s()?;
                // A column would be a bias for each row of a Gemm.
                let fits = bias.dims().last().is_none_or(|&d| d == bias.len());
                match values[..] {
                    [one] if fits => vec![beta * one; channels.0],
                    _ if fits && values.len() == channels.0 => values.iter().map(|v| beta * v).collect(),
                    _ => return None,
                }
            }
        };
        Some(Self { node, weight, axes, groups, channels, rank, trailing, takes_bias, beta, bias })
    }

    /// The weight with each element multiplied by `factor` of its output channel and input channel; `None` where that is
    /// beyond what the type holds.
    pub(super) fn scaled(&self, graph: &Graph, factor: impl Fn(usize, usize) -> f64) -> Option<Weight> {
        let weight = graph.weight(self.weight)?;
        let mut values = weight.value().f64s()?;
        let places: Vec<_> = self.channels_of(weight.value()).collect();
        for (value, &(output, input)) in values.iter_mut().zip(&places) {
            *value *= factor(output, input);
        }
        fitted(weight, weight.value().dims(), &values, |i| places[i].0)
    }

    /// A bias of these values, stored as the weight is; `None` where they are beyond what the type holds.
    pub(super) fn fit_bias(&self, graph: &Graph, bias: &[f64]) -> Option<Weight> {
        fitted(graph.weight(self.weight)?, &[self.channels.0], bias, |_| 0)
    }

    /// The output and input channel of each element of the weight.
    pub(super) fn channels_of(&self, weight: &Tensor) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (dims, out_axis, groups) = (weight.dims(), self.axes.0, self.groups);
        let (rows, columns, kernel) = (dims[0], dims[1], dims[2..].iter().product());
        let rows_of_group = (rows / groups).max(1);
        (0..rows).flat_map(move |row| {
            (0..columns).flat_map(move |column| {
                // The first axis runs over all groups, the second over one.
                let sides = [row, row / rows_of_group * columns + column];
                std::iter::repeat_n((sides[out_axis], sides[1 - out_axis]), kernel)
            })
        })
    }
}

/// `values` stored as `template` is; `None` where they are beyond what the type holds: not finite, or so small that the
/// values of a channel, which `channel_of` gives for each place, lose more than rounding takes of plain numbers.
pub(super) fn fitted(
    template: &Weight,
    dims: &[usize],
    values: &[f64],
    channel_of: impl Fn(usize) -> usize,
) -> Option<Weight> {
    let fitted = template.fit(dims, values).filter(|weight| weight.value().is_finite())?;
    let unit = match fitted.value().dtype() {
        DType::Float16 => 1.0 / 2048.0,
        DType::Bfloat16 => 1.0 / 256.0,
        DType::Float => f64::from(f32::EPSILON),
        _ => f64::EPSILON,
    };
    let mut sums: Vec<(f64, f64)> = Vec::new();
    for (i, (stored, value)) in fitted.value().f64s()?.into_iter().zip(values).enumerate() {
        let channel = channel_of(i);
        if channel >= sums.len() {
            sums.resize(channel + 1, (0.0, 0.0));
        }
        let (lost, whole) = &mut sums[channel];
        *lost += ((stored - value) / unit).powi(2);
        *whole += value * value;
    }
    sums.iter().all(|(lost, whole)| *lost <= *whole).then_some(fitted)
}

/// Whether a convolution pads its operand.
pub(super) fn pads(op: &Op) -> bool {
    op.ints("pads").is_some_and(|pads| pads.iter().any(|&pad| pad != 0))
        || !matches!(op.string("auto_pad"), None | Some("NOTSET" | "VALID"))
}
