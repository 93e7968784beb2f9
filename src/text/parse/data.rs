//! The elements of constants: written out, or generated.

use rand_core::{Rng, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;

use super::{Parsed, Parser, Token};
use crate::{
    ir::{DType, Tensor, tensor::is_float},
    linalg::normal,
    proto::{TensorProto, TypeProto, tensor_shape_proto::dimension, type_proto},
};

/// Texts are for small models.
const MAX_ELEMENTS: usize = 1 << 24;
/// More levels than half precision tells apart are none that a test wants.
const MAX_LEVELS: i64 = 1 << 12;
const MAX_RANK: i64 = 1 << 12;

impl Parser {
    /// The data of a constant of type `kind`: `{…}`, or a generator with its arguments.
    ///
    /// - `normal(seed)`: normal values with the variance that keeps the size of what a layer passes on, one over the
    ///   elements of a slice along the first axis;
    /// - `lowrank(rank, seed)`: a matrix, the rest of the axes taken as one, that is a product of two such of that rank;
    /// - `blocks(count, seed)`: normal values in the diagonal blocks along the first two axes, zeros elsewhere;
    /// - `levels(count, seed)`: multiples of 1/64 around zero, so many different ones.
    pub(super) fn data(&mut self, kind: &TypeProto) -> Parsed<TensorProto> {
        let Some((dtype, dims)) = fixed(kind) else {
            return self.wrong("a tensor type with fixed extents before this,");
        };
        let count = dims.iter().try_fold(1_usize, |n, &d| n.checked_mul(d)).filter(|&n| n <= MAX_ELEMENTS);
        let Some(count) = count else { return self.wrong("a constant of fewer elements before this,") };
        let tensor = if self.is_at('{') {
            self.elements(dtype, &dims)?
        } else {
            let generator = self.word()?;
            let arguments = self.list('(', ')', Self::integer)?;
            let values = match (generator.as_str(), &arguments[..]) {
                ("normal", &[seed]) => Some(scaled(&dims, &draw(count, seed))),
                ("lowrank", &[rank @ 1..=MAX_RANK, seed]) => low_rank(&dims, rank as usize, seed),
                ("blocks", &[blocks @ 1..=i64::MAX, seed]) => diagonal(&dims, blocks as usize, seed),
                ("levels", &[levels @ 1..=MAX_LEVELS, seed]) => Some(in_levels(count, levels, seed)),
                _ => {
                    return self.wrong(
                        "{…}, normal(seed), lowrank(rank, seed), blocks(count, seed) or levels(count, seed) before this,",
                    );
                }
            };
            values.and_then(|values| Tensor::floats(dtype, &dims, &values)).map(|tensor| tensor.to_proto())
        };
        match tensor {
            Some(tensor) => Ok(tensor),
            None => self.wrong("data that fits its type before this,"),
        }
    }

    fn elements(&mut self, dtype: DType, dims: &[usize]) -> Parsed<Option<TensorProto>> {
        let tokens = self.list('{', '}', |parser| {
            let token = parser.lexer.peek().clone();
            parser.lexer.next();
            Ok(token)
        })?;
        if tokens.len() != dims.iter().product::<usize>() {
            return Ok(None);
        }
        let dims_proto = dims.iter().map(|&d| d as i64).collect();
        let number = |token: &Token| match token {
            Token::Number(number) => Some(number.clone()),
            _ => None,
        };
        let proto = TensorProto { dims: dims_proto, data_type: Some(dtype as i32), ..TensorProto::default() };
        if dtype == DType::String {
            let text = |token: &Token| match token {
                Token::Text(text) => Some(text.clone().into_bytes().into()),
                _ => None,
            };
            let strings = tokens.iter().map(text).collect::<Option<_>>();
            return Ok(strings.map(|string_data| TensorProto { string_data, ..proto }));
        }
        let Some(numbers) = tokens.iter().map(number).collect::<Option<Vec<_>>>() else { return Ok(None) };
        if is_float(dtype) {
            let values = numbers.iter().map(|n| n.parse::<f64>().ok()).collect::<Option<Vec<_>>>();
            return Ok(values.and_then(|values| Tensor::floats(dtype, dims, &values)).map(|tensor| tensor.to_proto()));
        }
        let Some(values) = numbers.iter().map(|n| n.parse::<i64>().ok()).collect::<Option<Vec<_>>>() else {
            return Ok(None);
        };
        Ok(Tensor::integers(dtype, dims, &values).map(|tensor| tensor.to_proto()))
    }
}

/// Element type and shape, if `kind` is a tensor of a fixed shape.
fn fixed(kind: &TypeProto) -> Option<(DType, Vec<usize>)> {
    let Some(type_proto::Value::TensorType(tensor)) = &kind.value else { return None };
    let dims = tensor.shape.as_ref()?.dim.iter().map(|dim| match dim.value {
        Some(dimension::Value::DimValue(value)) => usize::try_from(value).ok(),
        _ => None,
    });
    Some((DType::try_from(tensor.elem_type()).ok()?, dims.collect::<Option<_>>()?))
}

/// Multiples of 1/64 around zero, of which there are so many.
fn in_levels(count: usize, levels: i64, seed: i64) -> Vec<f64> {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed as u64);
    let level = |random: &mut Xoshiro256PlusPlus| (random.next_u64() % levels as u64) as i64 - levels / 2;
    (0..count).map(|_| level(&mut random) as f64 / 64.0).collect()
}

fn draw(count: usize, seed: i64) -> Vec<f64> {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed as u64);
    (0..count).map(|_| normal(&mut random)).collect()
}

fn scaled(dims: &[usize], values: &[f64]) -> Vec<f64> {
    let slice: usize = dims.iter().skip(1).product();
    values.iter().map(|v| v / (slice.max(1) as f64).sqrt()).collect()
}

fn low_rank(dims: &[usize], rank: usize, seed: i64) -> Option<Vec<f64>> {
    let rows = *dims.first()?;
    let columns: usize = dims[1..].iter().product();
    let (left, right) = (draw(rows * rank, seed), draw(rank * columns, seed.wrapping_add(1)));
    let each = |i: usize| {
        let (row, column) = (i / columns, i % columns);
        (0..rank).map(|k| left[row * rank + k] * right[k * columns + column]).sum::<f64>() / (rank as f64).sqrt()
    };
    Some(scaled(dims, &(0..rows * columns).map(each).collect::<Vec<_>>()))
}

fn diagonal(dims: &[usize], count: usize, seed: i64) -> Option<Vec<f64>> {
    let [rows, columns, ..] = *dims else { return None };
    if rows % count != 0 || columns % count != 0 {
        return None;
    }
    let inner: usize = dims[2..].iter().product();
    let mut values = scaled(dims, &draw(dims.iter().product(), seed));
    for (i, value) in values.iter_mut().enumerate() {
        let (row, column) = (i / inner / columns, i / inner % columns);
        if row / (rows / count) != column / (columns / count) {
            *value = 0.0;
        }
    }
    Some(values)
}
