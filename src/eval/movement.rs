//! Operators that move elements and never look at them.

use super::{Call, axis, broadcast, broadcast_strides};
use crate::ir::{
    Tensor,
    tensor::{offsets, strides},
};

pub(super) fn evaluate(call: &Call<'_>) -> Option<Vec<Tensor>> {
    let x = call.input(0)?;
    if call.op.standard()? == "Split" {
        return split(call, x);
    }
    let value = match call.op.standard()? {
        "Identity" => Some(x.clone()),
        "Reshape" => reshape(call, x),
        "Flatten" => flatten(call, x),
        "Squeeze" => squeeze(call, x),
        "Unsqueeze" => unsqueeze(call, x),
        "Transpose" => transpose(call, x),
        "Concat" => concat(call),
        "Slice" => slice(call, x),
        "Gather" => gather(call, x),
        "GatherElements" => gather_elements(call, x),
        "Expand" => expand(call, x),
        "Tile" => tile(call, x),
        "Shape" => shape(call, x),
        "Size" => Some(Tensor::i64(&[], &[x.len() as i64])),
        _ => None,
    };
    Some(vec![value?])
}

/// The elements of `x` at `positions` (counted in elements), in shape `dims`.
fn pick(x: &Tensor, dims: &[usize], positions: impl Iterator<Item = usize>) -> Option<Tensor> {
    let size = x.element_size()?;
    let source = x.bytes();
    let mut bytes = Vec::with_capacity(dims.iter().product::<usize>() * size);
    for position in positions {
        bytes.extend_from_slice(source.get(position * size..(position + 1) * size)?);
    }
    Some(Tensor::made(x.dtype(), dims, bytes.into()))
}

/// The shape that `Reshape` makes of `dims` for the constant `wanted`.
fn reshaped(dims: &[usize], wanted: &[i64], allow_zero: bool) -> Option<Vec<usize>> {
    let mut target = Vec::with_capacity(wanted.len());
    let mut open = None;
    for (i, &w) in wanted.iter().enumerate() {
        target.push(match w {
            -1 if open.is_none() => {
                open = Some(i);
                1
            }
            0 if !allow_zero => *dims.get(i)?,
            w => usize::try_from(w).ok()?,
        });
    }
    let product = |dims: &[usize]| dims.iter().try_fold(1_usize, |n, &d| n.checked_mul(d));
    let (total, rest) = (product(dims)?, product(&target)?);
    if let Some(i) = open {
        target[i] = (rest > 0 && total.is_multiple_of(rest)).then(|| total / rest)?;
    }
    (product(&target)? == total).then_some(target)
}

fn reshape(call: &Call<'_>, x: &Tensor) -> Option<Tensor> {
    let wanted = call.ints("shape", 1)?;
    x.reshape(&reshaped(x.dims(), &wanted, call.op.int("allowzero") == Some(1))?)
}

fn flatten(call: &Call<'_>, x: &Tensor) -> Option<Tensor> {
    let at = call.op.int("axis").unwrap_or(1);
    let at = if at == x.dims().len() as i64 { x.dims().len() } else { axis(at, x.dims().len())? };
    x.reshape(&[x.dims()[..at].iter().product(), x.dims()[at..].iter().product()])
}

fn squeeze(call: &Call<'_>, x: &Tensor) -> Option<Tensor> {
    let rank = x.dims().len();
    let axes = match call.ints("axes", 1) {
        Some(axes) => axes.into_iter().map(|a| axis(a, rank)).collect::<Option<Vec<_>>>()?,
        None => (0..rank).filter(|&a| x.dims()[a] == 1).collect(),
    };
    // Runtimes take an empty list of axes for none and for all.
    let is_unclear = axes.is_empty() && call.input(1).is_some();
    if is_unclear || axes.iter().any(|&a| x.dims()[a] != 1) {
        return None;
    }
    let dims: Vec<_> = (0..rank).filter(|a| !axes.contains(a)).map(|a| x.dims()[a]).collect();
    x.reshape(&dims)
}

fn unsqueeze(call: &Call<'_>, x: &Tensor) -> Option<Tensor> {
    let axes = call.ints("axes", 1)?;
    let rank = x.dims().len() + axes.len();
    let axes = axes.into_iter().map(|a| axis(a, rank)).collect::<Option<Vec<_>>>()?;
    let mut rest = x.dims().iter();
    let dims: Vec<_> =
        (0..rank).map(|a| if axes.contains(&a) { Some(1) } else { rest.next().copied() }).collect::<Option<_>>()?;
    x.reshape(&dims)
}

fn transpose(call: &Call<'_>, x: &Tensor) -> Option<Tensor> {
    let rank = x.dims().len();
    let perm: Vec<_> = match call.op.ints("perm") {
        Some(perm) => perm.iter().map(|&p| axis(p, rank)).collect::<Option<_>>()?,
        None => (0..rank).rev().collect(),
    };
    x.permute(&perm)
}

fn concat(call: &Call<'_>) -> Option<Tensor> {
    let parts: Vec<_> = call.inputs.iter().copied().collect::<Option<_>>()?;
    let first = parts.first()?;
    let size = first.element_size()?;
    let at = axis(call.op.int("axis")?, first.dims().len())?;
    let fits = |t: &&Tensor| {
        t.dtype() == first.dtype()
            && t.dims().len() == first.dims().len()
            && (0..t.dims().len()).all(|i| i == at || t.dims()[i] == first.dims()[i])
    };
    if !parts.iter().all(fits) {
        return None;
    }
    let outer: usize = first.dims()[..at].iter().product();
    let data: Vec<_> = parts.iter().map(|t| (t.bytes(), t.dims()[at..].iter().product::<usize>() * size)).collect();
    let mut bytes = Vec::with_capacity(data.iter().map(|(b, _)| b.len()).sum());
    for o in 0..outer {
        for (source, run) in &data {
            bytes.extend_from_slice(&source[o * run..][..*run]);
        }
    }
    let mut dims = first.dims().to_vec();
    dims[at] = parts.iter().map(|t| t.dims()[at]).sum();
    Some(Tensor::made(first.dtype(), &dims, bytes.into()))
}

/// The indices that a slice from `start` to `end` by `step` takes of an axis of `extent`.
pub(crate) fn slice_indices(extent: usize, start: i64, end: i64, step: i64) -> Option<Strided> {
    let n = i64::try_from(extent).ok()?;
    let wrap = |i: i64| if i < 0 { i.saturating_add(n) } else { i };
    if step == 0 {
        return None;
    }
    let (first, stop) = if step > 0 {
        (wrap(start).clamp(0, n), wrap(end).clamp(0, n))
    } else {
        // A start before the first element is the first.
        (wrap(start).clamp(0, n.max(1) - 1).min(n - 1), wrap(end).clamp(-1, n - 1))
    };
    let span = if step > 0 { stop - first } else { first - stop };
    let count = usize::try_from(span.max(0)).ok()?.div_ceil(usize::try_from(step.unsigned_abs()).ok()?);
    Some(Strided { first, step, count })
}

/// Indices at equal distances.
#[derive(Clone, Debug)]
pub(crate) struct Strided {
    first: i64,
    step: i64,
    count: usize,
}

impl ExactSizeIterator for Strided {}

impl Iterator for Strided {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        self.count = self.count.checked_sub(1)?;
        let here = self.first as usize;
        self.first = self.first.saturating_add(self.step);
        Some(here)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.count, Some(self.count))
    }
}

fn slice(call: &Call<'_>, x: &Tensor) -> Option<Tensor> {
    let (starts, ends) = (call.ints("starts", 1)?, call.ints("ends", 2)?);
    let axes = call.ints("axes", 3).unwrap_or_else(|| (0..starts.len() as i64).collect());
    let steps = call.input(4).map_or_else(|| Some(vec![1; starts.len()]), Tensor::i64s)?;
    if [ends.len(), axes.len(), steps.len()] != [starts.len(); 3] {
        return None;
    }
    let mut value = x.clone();
    for (i, &a) in axes.iter().enumerate() {
        let a = axis(a, x.dims().len())?;
        let indices = slice_indices(value.dims()[a], starts[i], ends[i], steps[i])?;
        value = value.select(a, &indices.collect::<Vec<_>>())?;
    }
    Some(value)
}

fn split(call: &Call<'_>, x: &Tensor) -> Option<Vec<Tensor>> {
    let at = axis(call.op.int("axis").unwrap_or(0), x.dims().len())?;
    let mut begin = 0_usize;
    let parts = call.ints("split", 1)?.into_iter().map(|part| {
        let end = begin.checked_add(usize::try_from(part).ok()?).filter(|&end| end <= x.dims()[at])?;
        let indices: Vec<_> = (begin..end).collect();
        begin = end;
        x.select(at, &indices)
    });
    parts.collect()
}

/// Of each line along an axis, the elements that indices in the same place say.
fn gather_elements(call: &Call<'_>, x: &Tensor) -> Option<Tensor> {
    let indices = call.input(1)?;
    let at = axis(call.op.int("axis").unwrap_or(0), x.dims().len())?;
    let (from, dims) = (strides(x.dims()), indices.dims());
    let fits = |i: usize| i == at || dims[i] <= x.dims()[i];
    (dims.len() == x.dims().len() && (0..dims.len()).all(fits)).then_some(())?;
    let lines: Vec<_> = (0..dims.len()).map(|i| if i == at { 0 } else { from[i] }).collect();
    let chosen: Vec<_> = indices.i64s()?.into_iter().map(|i| axis(i, x.dims()[at])).collect::<Option<_>>()?;
    pick(x, dims, offsets(dims, &lines).zip(chosen).map(|(line, i)| line + i * from[at]))
}

fn gather(call: &Call<'_>, x: &Tensor) -> Option<Tensor> {
    let indices = call.input(1)?;
    let at = axis(call.op.int("axis").unwrap_or(0), x.dims().len())?;
    let extent = x.dims()[at];
    let picked: Vec<_> = indices.i64s()?.into_iter().map(|i| axis(i, extent)).collect::<Option<_>>()?;
    let mut dims = x.dims()[..at].to_vec();
    dims.extend(indices.dims());
    dims.extend(&x.dims()[at + 1..]);
    x.select(at, &picked)?.reshape(&dims)
}

fn expand(call: &Call<'_>, x: &Tensor) -> Option<Tensor> {
    let wanted: Vec<_> = call.input(1)?.i64s()?.into_iter().map(|d| usize::try_from(d).ok()).collect::<Option<_>>()?;
    let dims = broadcast(x.dims(), &wanted)?;
    call.element_count(&dims)?;
    pick(x, &dims, offsets(&dims, &broadcast_strides(x.dims(), &dims)))
}

fn tile(call: &Call<'_>, x: &Tensor) -> Option<Tensor> {
    let repeats: Vec<_> = call.input(1)?.i64s()?.into_iter().map(|d| usize::try_from(d).ok()).collect::<Option<_>>()?;
    if repeats.len() != x.dims().len() {
        return None;
    }
    let own = strides(x.dims());
    // Each axis as (repetition, element), the repetition standing still in the source.
    let dims: Vec<_> = repeats.iter().zip(x.dims()).flat_map(|(&r, &d)| [r, d]).collect();
    let steps: Vec<_> = own.iter().flat_map(|&s| [0, s]).collect();
    let target: Vec<_> = repeats.iter().zip(x.dims()).map(|(r, &d)| r.checked_mul(d)).collect::<Option<_>>()?;
    call.element_count(&target)?;
    pick(x, &target, offsets(&dims, &steps))
}

fn shape(call: &Call<'_>, x: &Tensor) -> Option<Tensor> {
    let rank = x.dims().len() as i64;
    let clamp = |i: i64| if i < 0 { i.saturating_add(rank) } else { i }.clamp(0, rank) as usize;
    let (start, end) = (clamp(call.op.int("start").unwrap_or(0)), clamp(call.op.int("end").unwrap_or(rank)));
    let dims: Vec<_> = x.dims().get(start..end.max(start))?.iter().map(|&d| d as i64).collect();
    Some(Tensor::i64(&[dims.len()], &dims))
}

#[cfg(test)]
mod tests {
    use super::slice_indices;

    #[test]
    fn a_slice_backwards_from_before_the_first_element_takes_that() {
        let taken = |extent, start, end| slice_indices(extent, start, end, -1).unwrap().collect::<Vec<_>>();
        assert_eq!(taken(5, -10, -20), [0]);
        assert_eq!(taken(5, 10, 1), [4, 3, 2]);
        assert_eq!(taken(5, -10, 0), [0; 0]);
        assert_eq!(taken(0, -1, -9), [0; 0]);
    }
}
