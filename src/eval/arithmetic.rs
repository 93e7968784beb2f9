//! Operators that compute: element-wise, reductions, ranges and casts.

use super::{Call, axis, broadcast, broadcast_strides, dtype};
use crate::ir::{
    DType, Tensor,
    tensor::{offsets, strides},
};

/// Elements in the type that arithmetic on them is done in.
enum Elements {
    F32(Vec<f32>),
    F64(Vec<f64>),
    /// `INT32`, `INT64` and `BOOL`.
    Int(Vec<i64>),
}

pub(super) fn evaluate(call: &Call<'_>) -> Option<Tensor> {
    match call.op.standard()? {
        "Cast" => cast(call.input(0)?, dtype(call.op.int("to")?)?),
        "CastLike" => cast(call.input(0)?, call.input(1)?.dtype()),
        "BitShift" => shift(call),
        "DequantizeLinear" => dequantize(call),
        "QuantizeLinear" => quantize(call),
        "Where" => select(call),
        "Clip" => clip(call),
        "ConstantOfShape" => constant_of_shape(call),
        "Range" => range(call),
        "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Mod" | "Min" | "Max" | "Equal" | "Less" | "Greater"
        | "LessOrEqual" | "GreaterOrEqual" | "And" | "Or" => binary(call),
        "ReduceSum" | "ReduceProd" | "ReduceMax" | "ReduceMin" | "ReduceMean" => reduce(call),
        _ => unary(call),
    }
}

fn load(x: &Tensor) -> Option<Elements> {
    Some(match x.dtype() {
        DType::Float => Elements::F32(x.f32s()?),
        DType::Double => Elements::F64(x.f64s()?),
        DType::Int32 | DType::Int64 | DType::Bool => Elements::Int(x.i64s()?),
        _ => return None,
    })
}

/// Integers as `dtype`; `None` where one does not fit, since what then happens differs between runtimes.
fn store(dtype: DType, dims: &[usize], values: Elements) -> Option<Tensor> {
    match (dtype, values) {
        (DType::Float, Elements::F32(v)) => Some(Tensor::f32(dims, &v)),
        (_, Elements::F64(v)) => Tensor::floats(dtype, dims, &v),
        (_, Elements::Int(v)) => Tensor::integers(dtype, dims, &v),
        _ => None,
    }
}

fn cast(x: &Tensor, to: DType) -> Option<Tensor> {
    if x.dtype() == to {
        return Some(x.clone());
    }
    let values = if let Some(ints) = x.i64s() {
        match to {
            DType::Float => Elements::F32(ints.into_iter().map(|v| v as f32).collect()),
            DType::Double => Elements::F64(ints.into_iter().map(|v| v as f64).collect()),
            _ => Elements::Int(ints),
        }
    } else {
        let floats = x.f64s()?;
        match to {
            DType::Float | DType::Double | DType::Float16 | DType::Bfloat16 => Elements::F64(floats),
            DType::Bool => Elements::Int(floats.into_iter().map(|v| i64::from(v != 0.0)).collect()),
            _ => {
                let whole = |v: f64| (v.is_finite() && v.abs() < 9e15).then_some(v as i64);
                Elements::Int(floats.into_iter().map(whole).collect::<Option<_>>()?)
            }
        }
    };
    store(to, x.dims(), values)
}

/// Bounds that a file gives, of which the upper one counts last; NaN stays.
fn clip(call: &Call<'_>) -> Option<Tensor> {
    let x = call.input(0)?;
    let bound = |slot: usize, attribute: &str, open: f64| match call.input(slot) {
        Some(bound) if bound.dtype() == x.dtype() && bound.len() == 1 => bound.f64s()?.first().copied(),
        Some(_) => None,
        None => Some(call.op.float(attribute).map_or(open, f64::from)),
    };
    let (low, high) = (bound(1, "min", f64::NEG_INFINITY)?, bound(2, "max", f64::INFINITY)?);
    let within = |v: f64| {
        let raised = if v < low { low } else { v };
        if raised > high { high } else { raised }
    };
    let values = match load(x)? {
        Elements::F32(v) => Elements::F32(v.into_iter().map(|v| within(f64::from(v)) as f32).collect()),
        Elements::F64(v) => Elements::F64(v.into_iter().map(within).collect()),
        Elements::Int(_) => return None,
    };
    store(x.dtype(), x.dims(), values)
}

fn unary(call: &Call<'_>) -> Option<Tensor> {
    let x = call.input(0)?;
    let values = match (call.op.standard()?, load(x)?) {
        ("Not", Elements::Int(v)) if x.dtype() == DType::Bool => {
            Elements::Int(v.into_iter().map(|v| i64::from(v == 0)).collect())
        }
        ("Neg", Elements::Int(v)) => Elements::Int(v.into_iter().map(i64::checked_neg).collect::<Option<_>>()?),
        ("Abs", Elements::Int(v)) => Elements::Int(v.into_iter().map(i64::checked_abs).collect::<Option<_>>()?),
        ("Relu", Elements::Int(v)) => Elements::Int(v.into_iter().map(|v| v.max(0)).collect()),
        (op, Elements::F32(v)) => {
            let f = float_function(op)?;
            Elements::F32(v.into_iter().map(|v| f(f64::from(v)) as f32).collect())
        }
        (op, Elements::F64(v)) => Elements::F64(v.into_iter().map(float_function(op)?).collect()),
        _ => return None,
    };
    store(x.dtype(), x.dims(), values)
}

/// Functions of one number; computed in `f64`, whose rounding to `f32` is the nearest one for all but a few inputs.
fn float_function(op: &str) -> Option<fn(f64) -> f64> {
    Some(match op {
        "Neg" => |v| -v,
        "Abs" => f64::abs,
        "Sqrt" => libm::sqrt,
        "Reciprocal" => |v| 1.0 / v,
        "Exp" => libm::exp,
        "Log" => libm::log,
        "Floor" => libm::floor,
        "Ceil" => libm::ceil,
        "Round" => libm::rint,
        "Relu" => |v| if v < 0.0 { 0.0 } else { v },
        "Sin" => libm::sin,
        "Cos" => libm::cos,
        "Tanh" => libm::tanh,
        "Erf" => libm::erf,
        "Sigmoid" => |v| 1.0 / (1.0 + libm::exp(-v)),
        _ => return None,
    })
}

fn binary(call: &Call<'_>) -> Option<Tensor> {
    let op = call.op.standard()?;
    // Before opset 7, operands were aligned by an attribute.
    if call.inputs.len() != 2 || call.opset < 7 || op == "Mod" && call.op.int("fmod") == Some(1) {
        return None;
    }
    let (a, b) = (call.input(0)?, call.input(1)?);
    if a.dtype() != b.dtype() {
        return None;
    }
    let dims = broadcast(a.dims(), b.dims())?;
    call.element_count(&dims)?;
    let (from_a, from_b) = (broadcast_strides(a.dims(), &dims), broadcast_strides(b.dims(), &dims));
    let pairs = offsets(&dims, &from_a).zip(offsets(&dims, &from_b));
    let compares = matches!(op, "Equal" | "Less" | "Greater" | "LessOrEqual" | "GreaterOrEqual");
    if compares {
        let test: fn(std::cmp::Ordering) -> bool = match op {
            "Equal" => std::cmp::Ordering::is_eq,
            "Less" => std::cmp::Ordering::is_lt,
            "Greater" => std::cmp::Ordering::is_gt,
            "LessOrEqual" => std::cmp::Ordering::is_le,
            _ => std::cmp::Ordering::is_ge,
        };
        let truth = |order: Option<std::cmp::Ordering>| i64::from(order.is_some_and(test));
        let values = match (load(a)?, load(b)?) {
            (Elements::F32(x), Elements::F32(y)) => pairs.map(|(i, j)| truth(x[i].partial_cmp(&y[j]))).collect(),
            (Elements::F64(x), Elements::F64(y)) => pairs.map(|(i, j)| truth(x[i].partial_cmp(&y[j]))).collect(),
            (Elements::Int(x), Elements::Int(y)) => pairs.map(|(i, j)| truth(Some(x[i].cmp(&y[j])))).collect(),
            _ => return None,
        };
        return store(DType::Bool, &dims, Elements::Int(values));
    }
    let values = match (load(a)?, load(b)?) {
        (Elements::F32(x), Elements::F32(y)) => {
            let f = f32_operation(op)?;
            Elements::F32(pairs.map(|(i, j)| f(x[i], y[j])).collect())
        }
        (Elements::F64(x), Elements::F64(y)) => {
            let f = f64_operation(op)?;
            Elements::F64(pairs.map(|(i, j)| f(x[i], y[j])).collect())
        }
        (Elements::Int(x), Elements::Int(y)) if (a.dtype() == DType::Bool) == matches!(op, "And" | "Or") => {
            Elements::Int(pairs.map(|(i, j)| int_operation(op, x[i], y[j])).collect::<Option<_>>()?)
        }
        _ => return None,
    };
    store(a.dtype(), &dims, values)
}

/// For each element of a tensor of shape `dims`, which of `scales` is its own: one is for all, or for each index along an axis, or for
/// each block along it.
fn places_of_scales(call: &Call<'_>, dims: &[usize], scales: &Tensor) -> Option<Vec<usize>> {
    let along = || axis(call.op.int("axis").unwrap_or(1), dims.len());
    let block = call.op.int("block_size").unwrap_or(0);
    let mut tile = dims.to_vec();
    if block > 0 {
        tile = vec![1; dims.len()];
        tile[along()?] = usize::try_from(block).ok()?;
    } else if scales.len() > 1 {
        tile[along()?] = 1;
    }
    let grid: Vec<_> = dims.iter().zip(&tile).map(|(extent, tile)| extent.div_ceil((*tile).max(1))).collect();
    let count: usize = grid.iter().product();
    (if block > 0 { scales.dims() == grid } else { scales.len() == count }).then_some(())?;
    let (steps, indices) = (strides(&grid), strides(dims));
    let place = |i: usize| (0..dims.len()).map(|axis| i / indices[axis] % dims[axis] / tile[axis] * steps[axis]).sum();
    Some((0..dims.iter().product()).map(place).collect())
}

/// s·(q − z).
fn dequantize(call: &Call<'_>) -> Option<Tensor> {
    let (x, scales) = (call.input(0)?, call.input(1)?);
    call.op.int("output_dtype").is_none_or(|dtype| dtype == 0).then_some(())?;
    let places = places_of_scales(call, x.dims(), scales)?;
    let zeros = call.input(2).map_or_else(|| Some(vec![0; scales.len()]), Tensor::codes)?;
    (zeros.len() == scales.len()).then_some(())?;
    let (codes, scale) = (x.codes()?, scales.f64s()?);
    let value = |(code, place): (i64, usize)| (code - zeros[place]) as f64 * scale[place];
    let values: Vec<f64> = codes.into_iter().zip(places).map(value).collect();
    Tensor::floats(scales.dtype(), x.dims(), &values)
}

/// The nearest integer to x / s, halves to even ones, plus z, of eight bits.
fn quantize(call: &Call<'_>) -> Option<Tensor> {
    let (x, scales, zeros) = (call.input(0)?, call.input(1)?, call.input(2)?);
    let range = match zeros.dtype() {
        DType::Int8 => -128..=127,
        DType::Uint8 => 0..=255,
        _ => return None,
    };
    let is_single = x.dtype() == DType::Float && scales.dtype() == DType::Float;
    (is_single && x.is_finite() && zeros.len() == scales.len()).then_some(())?;
    let places = places_of_scales(call, x.dims(), scales)?;
    let (zero, scale) = (zeros.codes()?, scales.f32s()?);
    let code = |(x, place): (f32, usize)| {
        let whole = (x / scale[place]).round_ties_even();
        (whole.abs() < 1e6).then(|| (whole as i64 + zero[place]).clamp(*range.start(), *range.end()))
    };
    let codes: Vec<i64> = x.f32s()?.into_iter().zip(places).map(code).collect::<Option<_>>()?;
    Tensor::integers(zeros.dtype(), x.dims(), &codes)
}

/// Shifts of bytes, which lose the bits that are pushed out.
fn shift(call: &Call<'_>) -> Option<Tensor> {
    let (a, b) = (call.input(0)?, call.input(1)?);
    let dims = broadcast(a.dims(), b.dims())?;
    call.element_count(&dims)?;
    (a.dtype() == DType::Uint8 && b.dtype() == DType::Uint8).then_some(())?;
    let move_by: fn(u8, u32) -> u8 = match call.op.string("direction")? {
        "LEFT" => u8::unbounded_shl,
        "RIGHT" => u8::unbounded_shr,
        _ => return None,
    };
    let (x, by) = (a.bytes(), b.bytes());
    let walk = |t: &Tensor| offsets(&dims, &broadcast_strides(t.dims(), &dims));
    let bytes: Vec<u8> = walk(a).zip(walk(b)).map(|(i, j)| move_by(x[i], u32::from(by[j]))).collect();
    Some(Tensor::made(DType::Uint8, &dims, bytes.into()))
}

fn f32_operation(op: &str) -> Option<fn(f32, f32) -> f32> {
    Some(match op {
        "Add" => |x, y| x + y,
        "Sub" => |x, y| x - y,
        "Mul" => |x, y| x * y,
        "Div" => |x, y| x / y,
        "Pow" => |x, y| libm::pow(f64::from(x), f64::from(y)) as f32,
        "Min" => |x, y| if x < y || x.is_nan() { x } else { y },
        "Max" => |x, y| if x > y || x.is_nan() { x } else { y },
        _ => return None,
    })
}

fn f64_operation(op: &str) -> Option<fn(f64, f64) -> f64> {
    Some(match op {
        "Add" => |x, y| x + y,
        "Sub" => |x, y| x - y,
        "Mul" => |x, y| x * y,
        "Div" => |x, y| x / y,
        "Pow" => libm::pow,
        "Min" => |x, y| if x < y || x.is_nan() { x } else { y },
        "Max" => |x, y| if x > y || x.is_nan() { x } else { y },
        _ => return None,
    })
}

/// Declines overflow and division by zero, on which runtimes disagree.
fn int_operation(op: &str, x: i64, y: i64) -> Option<i64> {
    match op {
        "Add" => x.checked_add(y),
        "Sub" => x.checked_sub(y),
        "Mul" => x.checked_mul(y),
        "Div" => x.checked_div(y),
        "Mod" => x.checked_rem_euclid(y).filter(|_| y > 0),
        "Min" => Some(x.min(y)),
        "Max" => Some(x.max(y)),
        "And" => Some(i64::from(x != 0 && y != 0)),
        "Or" => Some(i64::from(x != 0 || y != 0)),
        _ => None,
    }
}

fn select(call: &Call<'_>) -> Option<Tensor> {
    let (condition, a, b) = (call.input(0)?, call.input(1)?, call.input(2)?);
    let size = a.element_size()?;
    if a.dtype() != b.dtype() {
        return None;
    }
    let dims = broadcast(condition.dims(), &broadcast(a.dims(), b.dims())?)?;
    call.element_count(&dims)?;
    let walk = |t: &Tensor| offsets(&dims, &broadcast_strides(t.dims(), &dims));
    let (truth, x, y) = (condition.i64s()?, a.bytes(), b.bytes());
    let mut bytes = Vec::new();
    for ((c, i), j) in walk(condition).zip(walk(a)).zip(walk(b)) {
        bytes.extend_from_slice(if truth[c] != 0 { &x[i * size..][..size] } else { &y[j * size..][..size] });
    }
    Some(Tensor::made(a.dtype(), &dims, bytes.into()))
}

fn constant_of_shape(call: &Call<'_>) -> Option<Tensor> {
    let dims: Vec<_> = call.input(0)?.i64s()?.into_iter().map(|d| usize::try_from(d).ok()).collect::<Option<_>>()?;
    let value = match call.op.attribute("value") {
        Some(_) => call.op.tensor("value")?,
        None => Tensor::f32(&[1], &[0.0]),
    };
    let count = call.element_count(&dims)?;
    value.element_size().filter(|_| value.len() == 1)?;
    Some(Tensor::made(value.dtype(), &dims, value.bytes().repeat(count).into()))
}

fn range(call: &Call<'_>) -> Option<Tensor> {
    let start = call.input(0)?;
    let one = |slot: usize| call.input(slot)?.i64s()?.first().copied();
    let (first, limit, step) = (one(0)?, one(1)?, one(2)?);
    if step == 0 || !matches!(start.dtype(), DType::Int64 | DType::Int32) {
        return None;
    }
    let count = limit.checked_sub(first)?.checked_add(step - step.signum())?.checked_div(step)?.max(0);
    call.element_count(&[count as usize])?;
    store(start.dtype(), &[count as usize], Elements::Int((0..count).map(|i| first + i * step).collect()))
}

fn reduce(call: &Call<'_>) -> Option<Tensor> {
    let x = call.input(0)?;
    let rank = x.dims().len();
    let axes: Vec<_> = match call.ints("axes", 1) {
        Some(axes) if !axes.is_empty() => axes.into_iter().map(|a| axis(a, rank)).collect::<Option<_>>()?,
        _ if call.op.int("noop_with_empty_axes") == Some(1) => return Some(x.clone()),
        _ => (0..rank).collect(),
    };
    let keep = call.op.int("keepdims").unwrap_or(1) != 0;
    let kept: Vec<_> = (0..rank).map(|a| if axes.contains(&a) { 1 } else { x.dims()[a] }).collect();
    let into = offsets(x.dims(), &broadcast_strides(&kept, x.dims()));
    let count = kept.iter().product::<usize>();
    let each = x.len().checked_div(count)?;
    if each == 0 {
        return None;
    }
    let op = call.op.standard()?;
    let values = match load(x)? {
        Elements::Int(v) if x.dtype() != DType::Bool && op != "ReduceMean" => {
            let mut sums: Vec<Option<i64>> = vec![None; count];
            for (i, v) in into.zip(v) {
                sums[i] = Some(match (sums[i], op) {
                    (None, _) => v,
                    (Some(s), "ReduceSum") => s.checked_add(v)?,
                    (Some(s), "ReduceProd") => s.checked_mul(v)?,
                    (Some(s), "ReduceMax") => s.max(v),
                    (Some(s), _) => s.min(v),
                });
            }
            Elements::Int(sums.into_iter().collect::<Option<_>>()?)
        }
        Elements::F32(v) => {
            let mut sums: Vec<Option<f64>> = vec![None; count];
            for (i, v) in into.zip(v.into_iter().map(f64::from)) {
                sums[i] = Some(match (sums[i], op) {
                    (None, _) => v,
                    (Some(s), "ReduceSum" | "ReduceMean") => s + v,
                    (Some(s), "ReduceProd") => s * v,
                    (Some(s), "ReduceMax") => s.max(v),
                    (Some(s), _) => s.min(v),
                });
            }
            let scale = if op == "ReduceMean" { each as f64 } else { 1.0 };
            Elements::F32(sums.into_iter().map(|s| s.map(|s| (s / scale) as f32)).collect::<Option<_>>()?)
        }
        _ => return None,
    };
    let dims: Vec<_> = (0..rank).filter(|a| keep || !axes.contains(a)).map(|a| kept[a]).collect();
    store(x.dtype(), &dims, values)
}
