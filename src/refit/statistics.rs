//! Giving the channels of a layer the mean and deviation that they have in the original (Jordan 2022, REPAIR).

use nalgebra::DMatrix;

use super::{Bias, NAME, Target, set_matrices, walk::Walk};
use crate::{
    analysis::{
        linear::Linear,
        moments::{self, side_by_side},
    },
    ir::Graph,
    verify::Value,
};

/// What a channel may be scaled by (algorithms.md §2.7).
const LEAST: f64 = 0.5;
/// See [`LEAST`].
const MOST: f64 = 2.0;
/// So many samples are worth as much as the belief that nothing need be scaled.
const DOUBT: f64 = 10.0;

/// Scales and shifts each channel of a layer that has been run: `W'_o = α·W_o` and `b'_o = μ − α·(μ' − b_o)` for the mean and
/// deviation μ and σ in the original and μ' and σ' now, where `α = clip(σ/σ', ½, 2)`, drawn towards 1 by few samples.
pub(super) fn repair(graph: &mut Graph, target: &Target, walk: &mut Walk<'_>, keys: &[u64]) -> Option<()> {
    let (linear, name) = (&target.linear, graph.name(target.result).to_owned());
    let cut = |(alive, key): (&super::walk::Alive, &u64)| {
        let made = alive.get(&target.result)?;
        Some(linear.results(made, &moments::positions(linear.positions_of(made), &name, *key)))
    };
    let made = walk.samples.iter().zip(keys).map(cut).collect::<Option<Vec<_>>>()?;
    let wanted: Vec<_> = target.rows.iter().map(|rows| rows.map(f64::from)).collect();
    let (made, wanted) = (side_by_side(made.iter()), side_by_side(wanted.iter()));
    let count = linear.output_channels();
    if made.shape() != wanted.shape() || made.nrows() != count || made.ncols() == 0 {
        return None;
    }
    let trust = keys.len() as f64 / (keys.len() as f64 + DOUBT);
    let each = |channel: usize| {
        let of = |rows: &DMatrix<f64>| (rows.row(channel).mean(), rows.row(channel).variance().sqrt());
        let ((mean, deviation), (own_mean, own_deviation)) = (of(&wanted), of(&made));
        let ratio = if own_deviation > 0.0 { (deviation / own_deviation).clamp(LEAST, MOST) } else { 1.0 };
        let scale = 1.0 + (ratio - 1.0) * trust;
        (scale, mean - scale * own_mean)
    };
    let affine: Vec<_> = (0..count).map(each).collect();
    rescale(graph, linear, &affine)?;
    for alive in &mut walk.samples {
        let made = alive.get_mut(&target.result)?;
        apply(made, linear.channel_axis(made.dims.len()), &affine);
    }
    Some(())
}

/// Has a layer make scale·y + shift of each channel y.
fn rescale(graph: &mut Graph, linear: &Linear, affine: &[(f64, f64)]) -> Option<()> {
    let bias = Bias::of(graph, linear);
    // A new node would shift what has been shifted already.
    (!matches!(bias, Bias::Outside)).then_some(())?;
    let values = bias.values(graph, linear)?;
    let values: Vec<_> = values.iter().zip(affine).map(|(value, (scale, shift))| scale * value + shift).collect();
    let mut matrices = linear.matrices(&graph.constant(linear.weight)?.f64s()?);
    let each = linear.rows / linear.spread;
    for (group, matrix) in matrices.iter_mut().enumerate() {
        for (row, mut elements) in matrix.row_iter_mut().enumerate() {
            elements *= affine[group * each + row / linear.spread].0;
        }
    }
    values.iter().all(|value| value.is_finite()).then_some(())?;
    set_matrices(graph, linear, &matrices, NAME)?;
    bias.set(graph, linear, &values, NAME)
}

/// Makes scale·y + shift of each channel of `value` along `axis`.
fn apply(value: &mut Value, axis: usize, affine: &[(f64, f64)]) {
    let inner: usize = value.dims[axis + 1..].iter().product();
    for (run, elements) in value.values.chunks_mut(inner.max(1)).enumerate() {
        let (scale, shift) = affine[run % affine.len()];
        for element in elements {
            *element = scale * *element + shift;
        }
    }
}
