//! How the type and shape of each operator's results follow from those of its inputs.

mod movement;

use super::{Dim, Fact, Term};
use crate::{
    analysis::ELEMENTWISE,
    eval::{self, axis},
    ir::{DType, Op, Tensor},
};

/// The shape rule of one operator, applied to what is known of its inputs.
pub(super) struct Rule<'a> {
    pub(super) op: &'a Op,
    pub(super) opset: i64,
    /// What is known of each operand; `None` for one that is left out.
    pub(super) inputs: &'a [Option<Fact>],
    pub(super) constants: &'a [Option<&'a Tensor>],
}

impl Rule<'_> {
    pub(super) fn facts(&self, outputs: usize) -> Option<Vec<Fact>> {
        if !self.constants.is_empty()
            && self.constants.iter().all(Option::is_some)
            && self.inputs.iter().flatten().all(|fact| fact.ints.is_some())
            && let Some(values) = eval::evaluate(self.op, self.opset, self.constants)
        {
            return Some(values.iter().map(Fact::of).collect());
        }
        let x = self.input(0)?;
        let same = || Some(vec![Fact { ints: None, ..x.clone() }]);
        let one = |dims: Option<Vec<Dim>>| Some(vec![Fact::new(x.dtype, dims?)]);
        match self.op.meaning()? {
            "Identity" => Some(vec![x.clone()]),
            kind @ ("Cast" | "CastLike") => {
                let to = match kind {
                    "Cast" => DType::try_from(i32::try_from(self.op.int("to")?).ok()?).ok(),
                    _ => self.input(1)?.dtype,
                };
                let truth = |i: Term| match to {
                    Some(DType::Bool) => i.equals(Term::number(0)).map(|zero| Term::number(i64::from(!zero))),
                    // Other types round or wrap.
                    to => Some(i).filter(|&i| fits(i, to)),
                };
                let ints = x.ints.as_ref().filter(|_| fits(Term::ONE, to));
                let ints = ints.map(|ints| ints.iter().map(|i| i.and_then(truth)).collect());
                Some(vec![Fact { dtype: to, ints, ..x.clone() }])
            }
            "QuantizeLinear" | "DequantizeLinear" => Some(vec![self.quantized(x)?]),
            "DynamicQuantizeLinear" => {
                let one = |dtype| Fact::new(Some(dtype), Vec::new());
                let codes = Fact { dtype: Some(DType::Uint8), ints: None, ..x.clone() };
                Some(vec![codes, one(DType::Float), one(DType::Uint8)])
            }
            "MatMulInteger" => Some(vec![Fact::new(Some(DType::Int32), self.matmul()?)]),
            "ConvInteger" => Some(vec![Fact::new(Some(DType::Int32), self.conv()?)]),
            "QLinearMatMul" | "QLinearConv" => {
                // Beside each operand are its scale and zero point.
                let inputs = [self.inputs.first()?.clone(), self.inputs.get(3)?.clone()];
                let product = Rule { inputs: &inputs, constants: &[], ..*self };
                let dims = if self.op.is("QLinearConv") { product.conv() } else { product.matmul() };
                Some(vec![Fact::new(self.input(7)?.dtype, dims?)])
            }
            "Dropout" => {
                let truth = Some(DType::Bool).filter(|_| self.opset >= 10);
                let mask = Fact { dtype: truth, dims: x.dims.clone(), ints: None };
                Some(vec![Fact { ints: None, ..x.clone() }, mask])
            }
            "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Min" | "Max" | "Mod" | "PRelu" | "And" | "Or" | "Xor" | "Sum"
            | "BitShift" => self.elementwise(x.dtype),
            "Equal" | "Less" | "Greater" | "LessOrEqual" | "GreaterOrEqual" => self.elementwise(Some(DType::Bool)),
            "Not" => {
                let ints = x.ints.as_ref().map(|ints| ints.iter().map(|i| not((*i)?)).collect());
                Some(vec![Fact { ints, ..x.clone() }])
            }
            "Where" => self.elementwise(self.input(1)?.dtype),
            "Conv" => one(self.conv()),
            "ConvTranspose" => one(self.conv_transpose()),
            "MaxPool" | "AveragePool" | "LpPool" => one(self.pool()),
            "GlobalAveragePool" | "GlobalMaxPool" | "GlobalLpPool" => {
                let dims = x.dims.as_ref()?;
                one(Some(dims.iter().enumerate().map(|(i, &d)| if i < 2 { d } else { Some(Term::ONE) }).collect()))
            }
            "Gemm" => one(self.gemm()),
            "MatMul" => one(self.matmul()),
            "Concat" => self.concat(),
            "Split" => self.split(outputs),
            "Reshape" => {
                let dims = self.reshape()?;
                let ints = x.ints.clone().filter(|_| dims.len() <= 1);
                Some(vec![Fact { dtype: x.dtype, dims: Some(dims), ints }])
            }
            "Flatten" => one(self.flatten()),
            "DepthToSpace" | "SpaceToDepth" => one(self.blocks()),
            "Transpose" => one(self.transpose()),
            "Squeeze" => self.squeeze(),
            "Unsqueeze" => self.unsqueeze(),
            "Shape" => Some(self.shape()),
            "Size" => {
                let count = product(x.dims.as_ref()?);
                Some(vec![Fact { dtype: Some(DType::Int64), dims: Some(Vec::new()), ints: Some(vec![count]) }])
            }
            "ConstantOfShape" => self.constant_of_shape(),
            "Gather" => self.gather(),
            "Slice" => self.slice(),
            "Pad" => one(self.pad()),
            "Expand" => one(self.expand()),
            "Resize" | "Upsample" => one(self.resize()),
            "ArgMax" | "ArgMin" => {
                let dims = self.reduced()?;
                Some(vec![Fact::new(Some(DType::Int64), dims)])
            }
            op if op.starts_with("Reduce") => one(self.reduced()),
            "LSTM" | "GRU" | "RNN" => self.recurrent(outputs),
            op if ELEMENTWISE.contains(&op) || SAME_SHAPE.contains(&op) => same(),
            _ => None,
        }
    }

    /// Codes of `x`, of the type of their zero point, or what codes `x` stand for, of the type of their scale.
    fn quantized(&self, x: &Fact) -> Option<Fact> {
        let asked = self.op.int("output_dtype").filter(|&dtype| dtype != 0);
        let dtype = match asked {
            Some(dtype) => DType::try_from(i32::try_from(dtype).ok()?).ok(),
            None if self.op.meaning() == Some("DequantizeLinear") => self.input(1)?.dtype,
            None => self.inputs.get(2).and_then(Option::as_ref).map_or(Some(DType::Uint8), |zero| zero.dtype),
        };
        Some(Fact { dtype, ints: None, ..x.clone() })
    }

    /// Whether the operator is sure to fail on operands of which this is known.
    pub(super) fn fails(&self) -> bool {
        let rank = |slot: usize| self.dims(slot).map(Vec::len);
        let Some(x) = rank(0) else { return false };
        let extent = |slot: usize, axis: usize| self.dims(slot)?.get(axis)?.and_then(Term::known);
        let differ = |a: Option<i64>, b: Option<i64>| a.zip(b).is_some_and(|(a, b)| a != b);
        match self.op.standard() {
            Some("LSTM" | "GRU" | "RNN") => x != 3,
            Some("Conv") => {
                let read = extent(1, 1).and_then(|read| read.checked_mul(self.op.int("group").unwrap_or(1)));
                rank(1).is_some_and(|w| w != x) || differ(extent(0, 1), read)
            }
            Some("ConvTranspose") => rank(1).is_some_and(|w| w != x) || differ(extent(0, 1), extent(1, 0)),
            Some("Gemm") => {
                let turned = |flag: &str| usize::from(self.op.int(flag) == Some(1));
                let inner = (extent(0, 1 - turned("transA")), extent(1, turned("transB")));
                x != 2 || rank(1).is_some_and(|w| w != 2) || differ(inner.0, inner.1)
            }
            Some("MatMul") => {
                let inner = rank(1).and_then(|w| extent(1, w.saturating_sub(2)));
                differ(x.checked_sub(1).and_then(|last| extent(0, last)), inner)
            }
            Some("Concat") => {
                let along = self.op.int("axis").and_then(|a| axis(a, x));
                // Runtimes let parts without elements pass.
                let is_empty = |slot: usize| self.dims(slot).is_some_and(|dims| dims.contains(&Some(Term::number(0))));
                let others =
                    (1..self.inputs.len()).filter(|&slot| rank(slot).is_some() && !is_empty(slot) && !is_empty(0));
                let fails = |slot: usize| {
                    let apart = (0..x).any(|a| Some(a) != along && differ(extent(0, a), extent(slot, a)));
                    rank(slot) != Some(x) || along.is_some() && apart
                };
                others.into_iter().any(fails)
            }
            Some("Reshape") => {
                let count = |dims: &[Dim]| product(dims).and_then(Term::known);
                let wanted = self.reshape().as_deref().and_then(count);
                differ(self.dims(0).and_then(|dims| count(dims)), wanted)
            }
            Some("Squeeze") => {
                let Given::Known(axes) = self.integers("axes", 1) else { return false };
                let is_wide = |d: &Dim| d.and_then(Term::known).is_some_and(|d| d != 1);
                let fails = |a: i64| axis(a, x).is_none_or(|a| self.dims(0).is_some_and(|dims| is_wide(&dims[a])));
                axes.into_iter().flatten().any(fails)
            }
            Some("Add" | "Sub" | "Mul" | "Div") if self.opset >= 7 => {
                let ranks = (0..2).map(rank).collect::<Option<Vec<_>>>().unwrap_or_default();
                let from_end = |slot: usize, back: usize| extent(slot, ranks[slot].checked_sub(back)?);
                let fails = |back: usize| {
                    let both = from_end(0, back).zip(from_end(1, back));
                    both.is_some_and(|(a, b)| a != b && a != 1 && b != 1)
                };
                (1..=ranks.iter().copied().min().unwrap_or(0)).any(fails)
            }
            _ => false,
        }
    }

    fn input(&self, slot: usize) -> Option<&Fact> {
        self.inputs.get(slot)?.as_ref()
    }

    /// What is known of the shape of an operand.
    fn dims(&self, slot: usize) -> Option<&Vec<Dim>> {
        self.input(slot)?.dims.as_ref()
    }

    fn elementwise(&self, dtype: Option<DType>) -> Option<Vec<Fact>> {
        // Before opset 7, operands were aligned by an attribute.
        if self.opset < 7 && (self.op.int("broadcast").is_some() || self.op.op_type() == "PRelu") {
            return None;
        }
        let mut dims: Vec<Dim> = Vec::new();
        for slot in 0..self.inputs.len() {
            dims = broadcast(&dims, self.dims(slot)?);
        }
        let ints = match self.inputs {
            [Some(Fact { ints: Some(a), .. }), Some(Fact { ints: Some(b), .. })]
                if fits(Term::ONE, dtype)
                    && dims.len() <= 1
                    && (a.len() == b.len() || a.len() == 1 || b.len() == 1) =>
            {
                let n = if a.len() == 1 { b.len() } else { a.len() };
                let at = |v: &[Dim], i: usize| v[if v.len() == 1 { 0 } else { i }];
                let one =
                    |i: usize| binary(self.op.op_type(), at(a, i)?, at(b, i)?).filter(|&value| fits(value, dtype));
                Some((0..n).map(one).collect())
            }
            _ => None,
        };
        let ints = ints.or_else(|| self.chosen(&dims));
        Some(vec![Fact { dtype, dims: Some(dims), ints }])
    }

    /// The elements that `Where` chooses, where the conditions are settled or both choices are the same.
    fn chosen(&self, dims: &[Dim]) -> Option<Vec<Dim>> {
        if self.op.op_type() != "Where" || dims.len() > 1 {
            return None;
        }
        let [condition, a, b] = [0, 1, 2].map(|slot| self.input(slot).and_then(|fact| fact.ints.as_ref()));
        let (condition, a, b) = (condition?, a?, b?);
        let n = [condition, a, b].into_iter().map(Vec::len).find(|&len| len != 1).unwrap_or(1);
        let at = |v: &[Dim], i: usize| v.get(if v.len() == 1 { 0 } else { i }).copied().flatten();
        let one = |i: usize| match at(condition, i).and_then(Term::known) {
            Some(0) => at(b, i),
            Some(_) => at(a, i),
            None => at(a, i).filter(|_| at(a, i) == at(b, i)),
        };
        Some((0..n).map(one).collect())
    }

    /// An attribute of one integer for each of `n` spatial axes, or the default.
    fn per_axis(&self, name: &str, n: usize, default: i64) -> Option<Vec<i64>> {
        match self.op.ints(name) {
            Some(values) => (values.len() == n).then(|| values.to_vec()),
            None => Some(vec![default; n]),
        }
    }

    fn spatial(&self, kernel: &[usize]) -> Option<Vec<Dim>> {
        let x = self.dims(0)?;
        let n = kernel.len();
        let (strides, dilations) = (self.per_axis("strides", n, 1)?, self.per_axis("dilations", n, 1)?);
        let pads = self.per_axis("pads", 2 * n, 0)?;
        let auto = self.op.string("auto_pad").unwrap_or("NOTSET");
        let ceil = self.op.int("ceil_mode") == Some(1);
        (0..n)
            .map(|i| {
                let Some(open) = *x.get(i + 2)? else { return Some(None) };
                let stride = usize::try_from(*strides.get(i)?).ok().filter(|&s| s > 0)?;
                let pad = if auto == "VALID" { 0 } else { pads[i].checked_add(pads[i + n])? };
                let span = dilations[i].checked_mul(kernel[i] as i64 - 1)?.checked_add(1)?;
                let Some(extent) = open.extent() else {
                    if stride == 1 && (auto.starts_with("SAME") || pad == span - 1) {
                        return Some(Some(open));
                    }
                    // Whether a window counts that starts beyond the input differs between versions.
                    let numbers = [stride as i64, pad, span, i64::from(auto.starts_with("SAME"))];
                    return Some((!ceil).then(|| Term::derived("windows", &numbers, &[open], true)));
                };
                if auto.starts_with("SAME") {
                    return Some(Some(extent.div_ceil(stride).into()));
                }
                let room = usize::try_from((extent as i64).checked_add(pad)?.checked_sub(span)?).ok()?;
                // Whether a window counts that starts beyond the input differs between versions.
                if ceil && !room.is_multiple_of(stride) && (pad > 0 || room.div_ceil(stride) * stride >= extent) {
                    return Some(None);
                }
                Some(Some(Term::from(if ceil { room.div_ceil(stride) } else { room / stride } + 1)))
            })
            .collect()
    }

    fn conv(&self) -> Option<Vec<Dim>> {
        let w: Vec<usize> = self.dims(1)?.iter().map(|d| d.and_then(Term::extent)).collect::<Option<_>>()?;
        let mut dims = vec![*self.dims(0)?.first()?, Some(Term::from(*w.first()?))];
        dims.extend(self.spatial(w.get(2..)?)?);
        Some(dims)
    }

    fn conv_transpose(&self) -> Option<Vec<Dim>> {
        let x = self.dims(0)?;
        let w: Vec<usize> = self.dims(1)?.iter().map(|d| d.and_then(Term::extent)).collect::<Option<_>>()?;
        let group = usize::try_from(self.op.int("group").unwrap_or(1)).ok()?;
        let n = w.len().checked_sub(2)?;
        let (strides, dilations) = (self.per_axis("strides", n, 1)?, self.per_axis("dilations", n, 1)?);
        let (pads, extra) = (self.per_axis("pads", 2 * n, 0)?, self.per_axis("output_padding", n, 0)?);
        let fixed = self.op.ints("output_shape");
        let auto = self.op.string("auto_pad").unwrap_or("NOTSET").starts_with("SAME");
        let mut dims = vec![*x.first()?, Some(Term::from(w[1].checked_mul(group)?))];
        for i in 0..n {
            let extent = *x.get(i + 2)?;
            let grown = |extent: usize| {
                let grown = strides[i].checked_mul(extent as i64)?;
                let span = dilations[i].checked_mul(w[i + 2] as i64 - 1)?.checked_add(1)?;
                let added = extra[i].checked_add(span)?.checked_sub(strides[i])?;
                let full = grown.checked_add(added)?.checked_sub(pads[i])?.checked_sub(pads[i + n])?;
                // Runtimes disagree on how to pad by less than nothing.
                if auto && span < strides[i] {
                    return None;
                }
                usize::try_from(if auto { grown } else { full }).ok()
            };
            dims.push(match fixed {
                Some(fixed) => usize::try_from(*fixed.get((fixed.len() + i).checked_sub(n)?)?).ok().map(Term::from),
                None => extent.and_then(Term::extent).and_then(grown).map(Term::from),
            });
        }
        Some(dims)
    }

    fn pool(&self) -> Option<Vec<Dim>> {
        let kernel: Vec<_> =
            self.op.ints("kernel_shape")?.iter().map(|&k| usize::try_from(k).ok()).collect::<Option<_>>()?;
        let mut dims = self.dims(0)?.get(..2)?.to_vec();
        dims.extend(self.spatial(&kernel)?);
        Some(dims)
    }

    fn gemm(&self) -> Option<Vec<Dim>> {
        let side = |slot: usize, flag: &str, plain: usize| {
            let transposed = self.op.int(flag) == Some(1);
            self.dims(slot)?.get(if transposed { 1 - plain } else { plain }).copied()
        };
        Some(vec![side(0, "transA", 0)?, side(1, "transB", 1)?])
    }

    fn matmul(&self) -> Option<Vec<Dim>> {
        let (a, b) = (self.dims(0)?, self.dims(1)?);
        if a.is_empty() || b.is_empty() {
            return None;
        }
        let (outer_a, outer_b) = (&a[..a.len().saturating_sub(2)], &b[..b.len().saturating_sub(2)]);
        let mut dims = broadcast(outer_a, outer_b);
        if a.len() > 1 {
            dims.push(a[a.len() - 2]);
        }
        if b.len() > 1 {
            dims.push(b[b.len() - 1]);
        }
        Some(dims)
    }

    /// Integers that are an attribute in old operator sets and an input in new ones.
    fn integers(&self, attribute: &str, slot: usize) -> Given {
        match (self.input(slot), self.op.ints(attribute)) {
            (Some(Fact { ints: Some(ints), .. }), _) => {
                Given::Known(ints.iter().map(|i| i.and_then(Term::known)).collect())
            }
            (Some(_), _) => Given::Unknown,
            (None, Some(ints)) => Given::Known(ints.iter().map(|&i| Some(i)).collect()),
            (None, None) => Given::Absent,
        }
    }

    /// As [`integers`](Self::integers), with those that are not known by name; `None` where nothing is known or given.
    fn terms(&self, attribute: &str, slot: usize) -> Option<Vec<Dim>> {
        match self.input(slot) {
            Some(fact) => fact.ints.clone(),
            None => Some(self.op.ints(attribute)?.iter().map(|&i| Some(Term::number(i))).collect()),
        }
    }

    fn reduced(&self) -> Option<Vec<Dim>> {
        let dims = self.dims(0)?;
        let argument = self.op.op_type().starts_with("Arg");
        let axes: Vec<usize> = if argument {
            vec![axis(self.op.int("axis").unwrap_or(0), dims.len())?]
        } else {
            match self.integers("axes", 1) {
                Given::Known(axes) if !axes.is_empty() => {
                    axes.into_iter().map(|a| axis(a?, dims.len())).collect::<Option<_>>()?
                }
                Given::Unknown => return None,
                _ if self.op.int("noop_with_empty_axes") == Some(1) => Vec::new(),
                _ => (0..dims.len()).collect(),
            }
        };
        let keep = self.op.int("keepdims").unwrap_or(1) != 0;
        let kept = (0..dims.len()).filter(|a| keep || !axes.contains(a));
        Some(kept.map(|a| if axes.contains(&a) { Some(Term::ONE) } else { dims[a] }).collect())
    }

    fn recurrent(&self, outputs: usize) -> Option<Vec<Fact>> {
        let (x, w) = (self.input(0)?, self.dims(2)?);
        let dims = x.dims.as_ref()?;
        if self.op.int("layout") == Some(1) {
            return None;
        }
        let (directions, hidden) = (*w.first()?, *w.get(2)?);
        let (steps, batch) = (*dims.first()?, *dims.get(1)?);
        let state = Fact::new(x.dtype, vec![directions, batch, hidden]);
        let mut facts = vec![Fact::new(x.dtype, vec![steps, directions, batch, hidden]), state.clone(), state];
        facts.truncate(outputs);
        Some(facts)
    }
}

/// Operators besides the element-wise ones whose first result has the type and shape of their first input.
const SAME_SHAPE: &[&str] = &[
    "BatchNormalization",
    "CumSum",
    "GroupNormalization",
    "Hardmax",
    "InstanceNormalization",
    "LRN",
    "LayerNormalization",
    "LogSoftmax",
    "LpNormalization",
    "RMSNormalization",
    "Softmax",
];

/// Whether a number is one of the type, which is one that shapes are computed in.
fn fits(value: Term, dtype: Option<DType>) -> bool {
    match (dtype, value.known()) {
        (Some(DType::Int64), _) => true,
        (Some(DType::Int32), Some(value)) => i32::try_from(value).is_ok(),
        // Extents of tensors that fit in memory are small enough, multiples of them may not be.
        (Some(DType::Int32), None) => value.is_extent() && value.is_plain(),
        (Some(DType::Bool), Some(value)) => value == 0 || value == 1,
        _ => false,
    }
}

/// The truth of zero, and the untruth of everything else.
fn not(value: Term) -> Dim {
    value.equals(Term::number(0)).map(|zero| Term::number(i64::from(zero)))
}

/// What an element-wise operator makes of two integers.
fn binary(op: &str, x: Term, y: Term) -> Dim {
    let truth = |holds: bool| Term::number(i64::from(holds));
    let both = x.known().zip(y.known());
    match op {
        "Add" => x.plus(y),
        "Sub" => x.minus(y),
        "Mul" => x.times(y),
        "Div" => match both {
            Some((x, y)) => x.checked_div(y).map(Term::number),
            None if y == Term::ONE => Some(x),
            None if y.equals(Term::number(0)) == Some(false) && x.is_extent() && y.is_extent() => {
                Some(Term::derived("quotient", &[], &[x, y], true))
            }
            None => None,
        },
        "Equal" => x.equals(y).map(truth),
        "Less" => both.map(|(x, y)| truth(x < y)),
        "Greater" => both.map(|(x, y)| truth(x > y)),
        "LessOrEqual" => both.map(|(x, y)| truth(x <= y)),
        "GreaterOrEqual" => both.map(|(x, y)| truth(x >= y)),
        "And" => both.map(|(x, y)| truth(x != 0 && y != 0)),
        "Or" => both.map(|(x, y)| truth(x != 0 || y != 0)),
        _ => None,
    }
}

/// Integers that an operator may be given.
enum Given {
    Known(Vec<Option<i64>>),
    Unknown,
    Absent,
}

impl Given {
    fn known(self) -> Option<Vec<Option<i64>>> {
        match self {
            Self::Known(values) => Some(values),
            Self::Unknown | Self::Absent => None,
        }
    }
}

/// The product of extents; unknown where one is, or where it is absurd.
fn product(dims: &[Dim]) -> Dim {
    dims.iter().try_fold(Term::ONE, |n, &d| n.times(d?))
}

/// The shape that both broadcast to; unknown against anything but itself or a number above one is unknown.
fn broadcast(a: &[Dim], b: &[Dim]) -> Vec<Dim> {
    let rank = a.len().max(b.len());
    let at = |dims: &[Dim], i: usize| (i + dims.len()).checked_sub(rank).map_or(Some(Term::ONE), |i| dims[i]);
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (Some(Term::ONE), d) | (d, Some(Term::ONE)) => d,
            (a, b) if a == b => a,
            (Some(d), _) | (_, Some(d)) if d.known().is_some() => Some(d),
            _ => None,
        })
        .collect()
}
