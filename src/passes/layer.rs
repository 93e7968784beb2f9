//! Layers with constant weights, as passes fold scales and shifts of channels into them.

use crate::ir::{DType, Graph, NodeId, Op, Outlet, Weight, tensor::is_float};

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
        let (run, channels) = self.runs_of(weight.value().dims());
        for (values, (output, input)) in values.chunks_mut(run).zip(channels) {
            let factor = factor(output, input);
            for value in values {
                *value *= factor;
            }
        }
        self.fit_weight(weight, weight.value().dims(), &values)
    }

    /// A weight of this shape and these values, stored as `template` is; `None` where they are beyond what the type holds.
    pub(super) fn fit_weight(&self, template: &Weight, dims: &[usize], values: &[f64]) -> Option<Weight> {
        if self.axes.0 == 0 {
            return fitted(template, dims, values, dims[1..].iter().product(), 0..dims[0]);
        }
        let (run, channels) = self.runs_of(dims);
        fitted(template, dims, values, run, channels.map(|(output, _)| output))
    }

    /// A bias of these values, stored as the weight is; `None` where they are beyond what the type holds.
    pub(super) fn fit_bias(&self, graph: &Graph, bias: &[f64]) -> Option<Weight> {
        let like = Weight::dense(graph.constant(self.weight)?.clone());
        fitted(&like, &[self.channels.0], bias, bias.len(), [0].into_iter())
    }

    /// How many elements of a weight of this shape that follow each other are of the same channels, which are its kernel, and the output
    /// and input channel of each such run.
    pub(super) fn runs_of(&self, dims: &[usize]) -> (usize, impl Iterator<Item = (usize, usize)> + use<>) {
        let (out_axis, groups) = (self.axes.0, self.groups);
        let (rows, columns, kernel) = (dims[0], dims[1], dims[2..].iter().product::<usize>());
        let rows_of_group = (rows / groups).max(1);
        let channels = (0..rows).flat_map(move |row| {
            // The first axis runs over all groups, the second over one.
            let first = row / rows_of_group * columns;
            (first..first + columns).map(move |column| if out_axis == 0 { (row, column) } else { (column, row) })
        });
        (kernel.max(1), channels)
    }
}

/// `values` stored as `template` is; `None` where they are beyond what the type holds: not finite, or so small that the
/// values of a channel lose more than rounding takes of plain numbers. Each `run` of values is of the next of `channels`.
fn fitted(
    template: &Weight,
    dims: &[usize],
    values: &[f64],
    run: usize,
    channels: impl Iterator<Item = usize>,
) -> Option<Weight> {
    let fitted = template.fit(dims, values)?;
    let stored = fitted.value().f64s().filter(|stored| stored.iter().all(|value| value.is_finite()))?;
    let per_unit = match fitted.value().dtype() {
        DType::Float16 => 2048.0,
        DType::Bfloat16 => 256.0,
        DType::Float => f64::from(f32::EPSILON).recip(),
        _ => f64::EPSILON.recip(),
    };
    let mut sums: Vec<(f64, f64)> = Vec::new();
    let runs = stored.chunks(run.max(1)).zip(values.chunks(run.max(1)));
    for ((stored, values), channel) in runs.zip(channels) {
        if channel >= sums.len() {
            sums.resize(channel + 1, (0.0, 0.0));
        }
        let (lost, whole) = &mut sums[channel];
        for (stored, value) in stored.iter().zip(values) {
            *lost += ((stored - value) * per_unit).powi(2);
            *whole += value * value;
        }
    }
    sums.iter().all(|(lost, whole)| *lost <= *whole).then_some(fitted)
}

/// Whether a convolution pads its operand.
pub(super) fn pads(op: &Op) -> bool {
    op.ints("pads").is_some_and(|pads| pads.iter().any(|&pad| pad != 0))
        || !matches!(op.string("auto_pad"), None | Some("NOTSET" | "VALID"))
}
