//! Evaluates standard operators on constants, the same to the bit on every machine (transcendental functions come from
//! the `libm` crate). What it does not know it declines.

mod arithmetic;
mod movement;

pub(crate) use self::movement::slice_indices;

use crate::ir::{DType, Op, Tensor, tensor::is_possible};

/// The values that `op` makes of `inputs`; `None` where the operator, its types or its attributes are not known here.
#[must_use]
pub fn evaluate(op: &Op, opset: i64, inputs: &[Option<&Tensor>]) -> Option<Vec<Tensor>> {
    let call = Call { op, opset, inputs };
    let values = movement::evaluate(&call).or_else(|| arithmetic::evaluate(&call).map(|value| vec![value]))?;
    // No file may hold a shape that is absurd but for an extent of zero.
    values.iter().all(|value| is_possible(value.dims())).then_some(values)
}

/// One application of an operator.
struct Call<'a> {
    op: &'a Op,
    opset: i64,
    inputs: &'a [Option<&'a Tensor>],
}

impl<'a> Call<'a> {
    fn input(&self, slot: usize) -> Option<&'a Tensor> {
        self.inputs.get(slot).copied().flatten()
    }

    /// The elements of a result of shape `dims`, unless they are too many to be a constant.
    fn element_count(&self, dims: &[usize]) -> Option<usize> {
        let most = self.inputs.iter().flatten().map(|input| input.len()).fold(MAX_ELEMENTS, usize::max);
        dims.iter().try_fold(1_usize, |n, &d| n.checked_mul(d)).filter(|&n| n <= most)
    }

    /// The integers that are an attribute in old operator sets and input `slot` in new ones.
    fn ints(&self, attribute: &str, slot: usize) -> Option<Vec<i64>> {
        match self.input(slot) {
            Some(tensor) => tensor.i64s(),
            None => self.op.ints(attribute).map(<[i64]>::to_vec),
        }
    }
}

/// `axis` of a tensor of `rank` axes, counted from the front.
#[must_use]
pub fn axis(axis: i64, rank: usize) -> Option<usize> {
    let axis = if axis < 0 { axis.checked_add(rank as i64)? } else { axis };
    usize::try_from(axis).ok().filter(|&axis| axis < rank)
}

/// The shape that both shapes broadcast to.
#[must_use]
pub fn broadcast(a: &[usize], b: &[usize]) -> Option<Vec<usize>> {
    let rank = a.len().max(b.len());
    let at = |dims: &[usize], i: usize| (i + dims.len()).checked_sub(rank).map_or(1, |i| dims[i]);
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y => Some(x),
            (1, y) => Some(y),
            (x, 1) => Some(x),
            _ => None,
        })
        .collect()
}

/// Constants of more elements than this are not computed, unless they are made of one that is as large.
const MAX_ELEMENTS: usize = 1 << 24;

/// The strides with which a tensor of shape `dims` is read as one of shape `target`.
fn broadcast_strides(dims: &[usize], target: &[usize]) -> Vec<usize> {
    let own = crate::ir::tensor::strides(dims);
    let pad = target.len() - dims.len();
    (0..target.len()).map(|i| if i < pad || dims[i - pad] == 1 { 0 } else { own[i - pad] }).collect()
}

/// The element type that number `to` stands for in `Cast`.
fn dtype(to: i64) -> Option<DType> {
    DType::try_from(i32::try_from(to).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_may_be_as_large_as_what_it_is_made_of() {
        let large = Tensor::integers(DType::Uint8, &[MAX_ELEMENTS + 1], &vec![2; MAX_ELEMENTS + 1]);
        let (large, by) = (large.unwrap(), Tensor::integers(DType::Uint8, &[], &[1]).unwrap());
        let shift = Op::new("BitShift").with_string("direction", "RIGHT");
        assert!(evaluate(&shift, 17, &[Some(&large), Some(&by)]).is_some());
        let shape = Tensor::i64(&[1], &[MAX_ELEMENTS as i64 + 1]);
        assert!(evaluate(&Op::new("Expand"), 17, &[Some(&by), Some(&shape)]).is_none());
    }
}
