//! How the type and shape of each operator's results follow from those of its inputs.

use super::{Dim, Fact, MAX_FOLLOWED};
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
        match self.op.standard()? {
            "Identity" => Some(vec![x.clone()]),
            "Cast" => {
                let to = DType::try_from(i32::try_from(self.op.int("to")?).ok()?).ok();
                // Other types round or wrap.
                let ints = x.ints.clone().filter(|ints| ints.iter().flatten().all(|&i| fits(i, to)));
                Some(vec![Fact { dtype: to, ints, ..x.clone() }])
            }
            "Dropout" => {
                let mask = Fact { dtype: Some(DType::Bool), dims: x.dims.clone(), ints: None };
                Some(vec![Fact { ints: None, ..x.clone() }, mask])
            }
            "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Min" | "Max" | "Mod" | "PRelu" | "And" | "Or" | "Xor" | "Sum" => {
                self.elementwise(x.dtype)
            }
            "Equal" | "Less" | "Greater" | "LessOrEqual" | "GreaterOrEqual" => self.elementwise(Some(DType::Bool)),
            "Where" => self.elementwise(self.input(1)?.dtype),
            "Conv" => one(self.conv()),
            "ConvTranspose" => one(self.conv_transpose()),
            "MaxPool" | "AveragePool" | "LpPool" => one(self.pool()),
            "GlobalAveragePool" | "GlobalMaxPool" | "GlobalLpPool" => {
                let dims = x.dims.as_ref()?;
                one(Some(dims.iter().enumerate().map(|(i, &d)| if i < 2 { d } else { Some(1) }).collect()))
            }
            "Gemm" => one(self.gemm()),
            "MatMul" => one(self.matmul()),
            "Concat" => self.concat(),
            "Split" => self.split(outputs),
            "Reshape" => one(self.reshape()),
            "Flatten" => one(self.flatten()),
            "Transpose" => one(self.transpose()),
            "Squeeze" => self.squeeze(),
            "Unsqueeze" => self.unsqueeze(),
            "Shape" => Some(self.shape()),
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
                if fits(0, dtype) && (a.len() == b.len() || a.len() == 1 || b.len() == 1) =>
            {
                let n = if a.len() == 1 { b.len() } else { a.len() };
                let at = |v: &[Option<i64>], i: usize| v[if v.len() == 1 { 0 } else { i }];
                let f = |x: i64, y: i64| match self.op.op_type() {
                    "Add" => x.checked_add(y),
                    "Sub" => x.checked_sub(y),
                    "Mul" => x.checked_mul(y),
                    "Div" => x.checked_div(y),
                    _ => None,
                };
                Some((0..n).map(|i| f(at(a, i)?, at(b, i)?).filter(|&value| fits(value, dtype))).collect())
            }
            _ => None,
        };
        Some(vec![Fact { dtype, dims: Some(dims), ints }])
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
                let Some(extent) = *x.get(i + 2)? else { return Some(None) };
                let stride = usize::try_from(*strides.get(i)?).ok().filter(|&s| s > 0)?;
                if auto.starts_with("SAME") {
                    return Some(Some(extent.div_ceil(stride)));
                }
                let pad = if auto == "VALID" { 0 } else { pads[i].checked_add(pads[i + n])? };
                let span = dilations[i].checked_mul(kernel[i] as i64 - 1)?.checked_add(1)?;
                let room = usize::try_from((extent as i64).checked_add(pad)?.checked_sub(span)?).ok()?;
                // Whether a window counts that starts beyond the input differs between versions.
                if ceil && !room.is_multiple_of(stride) && (pad > 0 || room.div_ceil(stride) * stride >= extent) {
                    return Some(None);
                }
                Some(Some(if ceil { room.div_ceil(stride) } else { room / stride } + 1))
            })
            .collect()
    }

    fn conv(&self) -> Option<Vec<Dim>> {
        let w: Vec<usize> = self.dims(1)?.iter().copied().collect::<Option<_>>()?;
        let mut dims = vec![*self.dims(0)?.first()?, Some(*w.first()?)];
        dims.extend(self.spatial(w.get(2..)?)?);
        Some(dims)
    }

    fn conv_transpose(&self) -> Option<Vec<Dim>> {
        let x = self.dims(0)?;
        let w: Vec<usize> = self.dims(1)?.iter().copied().collect::<Option<_>>()?;
        let group = usize::try_from(self.op.int("group").unwrap_or(1)).ok()?;
        let n = w.len().checked_sub(2)?;
        let (strides, dilations) = (self.per_axis("strides", n, 1)?, self.per_axis("dilations", n, 1)?);
        let (pads, extra) = (self.per_axis("pads", 2 * n, 0)?, self.per_axis("output_padding", n, 0)?);
        let fixed = self.op.ints("output_shape");
        let auto = self.op.string("auto_pad").unwrap_or("NOTSET").starts_with("SAME");
        let mut dims = vec![*x.first()?, Some(w[1].checked_mul(group)?)];
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
                Some(fixed) => usize::try_from(*fixed.get((fixed.len() + i).checked_sub(n)?)?).ok(),
                None => extent.and_then(grown),
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

    fn concat(&self) -> Option<Vec<Fact>> {
        let first = self.dims(0)?;
        let at = axis(self.op.int("axis")?, first.len())?;
        let parts = (0..self.inputs.len()).map(|slot| self.dims(slot)).collect::<Option<Vec<_>>>()?;
        if parts.iter().any(|part| part.len() != first.len()) {
            return None;
        }
        let mut dims = first.clone();
        dims[at] = parts.iter().map(|part| part[at]).try_fold(0_usize, |sum, d| sum.checked_add(d?));
        for part in parts {
            for (i, d) in dims.iter_mut().enumerate().filter(|(i, _)| *i != at) {
                *d = d.or(part[i]);
            }
        }
        let ints = self.inputs.iter().map(|fact| fact.as_ref()?.ints.clone()).collect::<Option<Vec<_>>>();
        let ints = ints.map(|parts| parts.concat()).filter(|ints| first.len() == 1 && ints.len() <= MAX_FOLLOWED);
        Some(vec![Fact { dtype: self.input(0)?.dtype, dims: Some(dims), ints }])
    }

    fn split(&self, outputs: usize) -> Option<Vec<Fact>> {
        let dims = self.dims(0)?;
        let at = axis(self.op.int("axis").unwrap_or(0), dims.len())?;
        let parts: Vec<Dim> = match self.integers("split", 1) {
            Given::Known(parts) => parts.into_iter().map(|p| usize::try_from(p?).ok()).collect(),
            Given::Unknown => vec![None; outputs],
            Given::Absent => {
                let each = dims[at].and_then(|d| (outputs > 0).then(|| d.div_ceil(outputs)));
                (0..outputs).map(|i| Some(each?.min(dims[at]?.saturating_sub(i * each?)))).collect()
            }
        };
        let part = |extent: Dim| {
            let mut dims = dims.clone();
            dims[at] = extent;
            Some(Fact::new(self.input(0)?.dtype, dims))
        };
        parts.into_iter().map(part).collect()
    }

    /// Integers that are an attribute in old operator sets and an input in new ones.
    fn integers(&self, attribute: &str, slot: usize) -> Given {
        match (self.input(slot), self.op.ints(attribute)) {
            (Some(fact), _) => fact.ints.clone().map_or(Given::Unknown, Given::Known),
            (None, Some(ints)) => Given::Known(ints.iter().map(|&i| Some(i)).collect()),
            (None, None) => Given::Absent,
        }
    }

    fn reshape(&self) -> Option<Vec<Dim>> {
        let wanted = self.integers("shape", 1).known()?;
        let dims = self.dims(0);
        let zero_copies = self.op.int("allowzero") != Some(1);
        let mut target: Vec<Dim> = Vec::with_capacity(wanted.len());
        for (i, w) in wanted.iter().enumerate() {
            target.push(match w {
                Some(0) if zero_copies => dims.and_then(|dims| dims.get(i).copied().flatten()),
                Some(w) => usize::try_from(*w).ok(),
                None => None,
            });
        }
        let open: Vec<_> = (0..target.len()).filter(|&i| target[i].is_none()).collect();
        if let ([i], Some(dims)) = (&open[..], dims) {
            let rest = target.iter().flatten().try_fold(1_usize, |n, &d| n.checked_mul(d))?;
            let total = product(dims);
            target[*i] = total.and_then(|total| (rest > 0 && total.is_multiple_of(rest)).then(|| total / rest));
        }
        Some(target)
    }

    fn flatten(&self) -> Option<Vec<Dim>> {
        let dims = self.dims(0)?;
        let at = self.op.int("axis").unwrap_or(1);
        let at = if at == dims.len() as i64 { dims.len() } else { axis(at, dims.len())? };
        Some(vec![product(&dims[..at]), product(&dims[at..])])
    }

    fn transpose(&self) -> Option<Vec<Dim>> {
        let dims = self.dims(0)?;
        match self.op.ints("perm") {
            Some(perm) => perm.iter().map(|&p| Some(dims[axis(p, dims.len())?])).collect(),
            None => Some(dims.iter().rev().copied().collect()),
        }
    }

    fn squeeze(&self) -> Option<Vec<Fact>> {
        let x = self.input(0)?;
        let dims = x.dims.as_ref()?;
        let axes: Vec<usize> = match self.integers("axes", 1) {
            // Runtimes take an empty list for none and for all.
            Given::Known(axes) if axes.is_empty() => return None,
            Given::Known(axes) => axes.into_iter().map(|a| axis(a?, dims.len())).collect::<Option<_>>()?,
            Given::Unknown => return None,
            Given::Absent => {
                let known = dims.iter().copied().collect::<Option<Vec<_>>>()?;
                (0..known.len()).filter(|&a| known[a] == 1).collect()
            }
        };
        let kept = (0..dims.len()).filter(|a| !axes.contains(a)).map(|a| dims[a]).collect();
        Some(vec![Fact { dims: Some(kept), ..x.clone() }])
    }

    fn unsqueeze(&self) -> Option<Vec<Fact>> {
        let x = self.input(0)?;
        let dims = x.dims.as_ref()?;
        let axes = self.integers("axes", 1).known()?;
        let rank = dims.len() + axes.len();
        let axes: Vec<_> = axes.into_iter().map(|a| axis(a?, rank)).collect::<Option<_>>()?;
        let mut rest = dims.iter().copied();
        let grown =
            (0..rank).map(|a| if axes.contains(&a) { Some(Some(1)) } else { rest.next() }).collect::<Option<_>>()?;
        let ints = x.ints.clone().filter(|_| rank <= 1);
        Some(vec![Fact { dims: Some(grown), ints, ..x.clone() }])
    }

    fn shape(&self) -> Vec<Fact> {
        let int64 = Some(DType::Int64);
        let Some(dims) = self.dims(0) else { return vec![Fact::new(int64, vec![None])] };
        let rank = dims.len() as i64;
        let clamp = |i: i64| if i < 0 { i.saturating_add(rank) } else { i }.clamp(0, rank) as usize;
        let begin = clamp(self.op.int("start").unwrap_or(0));
        let end = clamp(self.op.int("end").unwrap_or(rank)).max(begin);
        let ints: Vec<_> = dims[begin..end].iter().map(|d| d.map(|d| d as i64)).collect();
        vec![Fact { dtype: int64, dims: Some(vec![Some(ints.len())]), ints: Some(ints) }]
    }

    fn constant_of_shape(&self) -> Option<Vec<Fact>> {
        let wanted = self.input(0)?.ints.as_ref()?;
        let dims: Vec<Dim> = wanted.iter().map(|w| w.and_then(|w| usize::try_from(w).ok())).collect();
        let value = self.op.tensor("value");
        let dtype = value.as_ref().map_or(DType::Float, Tensor::dtype);
        let fill = value.and_then(|value| value.i64s()?.first().copied());
        let count = match dims[..] {
            [Some(count)] if count <= MAX_FOLLOWED => Some(count),
            _ => None,
        };
        let ints = fill.zip(count).map(|(fill, count)| vec![Some(fill); count]);
        Some(vec![Fact { dtype: Some(dtype), dims: Some(dims), ints }])
    }

    fn gather(&self) -> Option<Vec<Fact>> {
        let (x, indices) = (self.input(0)?, self.input(1)?);
        let (dims, picked) = (x.dims.as_ref()?, indices.dims.as_ref()?);
        let at = axis(self.op.int("axis").unwrap_or(0), dims.len())?;
        let mut target = dims[..at].to_vec();
        target.extend(picked);
        target.extend(&dims[at + 1..]);
        let ints = match (&x.ints, &indices.ints) {
            (Some(x), Some(i)) if dims.len() == 1 => Some(i.iter().map(|&i| x[axis(i?, x.len())?]).collect()),
            _ => None,
        };
        Some(vec![Fact { dtype: x.dtype, dims: Some(target), ints }])
    }

    fn slice(&self) -> Option<Vec<Fact>> {
        let x = self.input(0)?;
        let mut dims = x.dims.clone()?;
        let (starts, ends) = (self.integers("starts", 1).known(), self.integers("ends", 2).known());
        let count = starts.as_ref().or(ends.as_ref()).map_or(dims.len(), Vec::len);
        let axes = match self.integers("axes", 3) {
            Given::Known(axes) => axes,
            Given::Unknown => return None,
            Given::Absent => (0..count as i64).map(Some).collect(),
        };
        let steps = match self.input(4) {
            Some(fact) => fact.ints.clone(),
            None => Some(vec![Some(1); axes.len()]),
        };
        let mut ints = x.ints.clone();
        for (i, a) in axes.iter().enumerate() {
            let a = axis((*a)?, dims.len())?;
            let at = |v: &Option<Vec<Option<i64>>>| v.as_ref().and_then(|v| v.get(i).copied().flatten());
            let taken = (|| eval::slice_indices(dims[a]?, at(&starts)?, at(&ends)?, at(&steps)?))();
            ints = ints.zip(taken.clone()).and_then(|(ints, taken)| taken.map(|i| ints.get(i).copied()).collect());
            dims[a] = taken.map(|taken| taken.len());
        }
        Some(vec![Fact { dtype: x.dtype, dims: Some(dims), ints }])
    }

    fn pad(&self) -> Option<Vec<Dim>> {
        let dims = self.dims(0)?;
        let pads = self.integers("pads", 1).known().filter(|_| self.inputs.len() <= 3);
        let Some(pads) = pads else { return Some(vec![None; dims.len()]) };
        let n = dims.len();
        let dim = |i: usize| {
            let grown = (dims[i]? as i64).checked_add((*pads.get(i)?)?)?.checked_add((*pads.get(i + n)?)?)?;
            usize::try_from(grown).ok()
        };
        Some((0..n).map(dim).collect())
    }

    fn expand(&self) -> Option<Vec<Dim>> {
        let wanted = self.input(1)?.ints.as_ref()?;
        let wanted: Vec<Dim> = wanted.iter().map(|w| w.and_then(|w| usize::try_from(w).ok())).collect();
        Some(broadcast(self.dims(0)?, &wanted))
    }

    fn resize(&self) -> Option<Vec<Dim>> {
        let dims = self.dims(0)?;
        let unknown = vec![None; dims.len()];
        let stretches = matches!(self.op.string("keep_aspect_ratio_policy"), None | Some("stretch"));
        let crops = self.op.string("coordinate_transformation_mode") == Some("tf_crop_and_resize");
        if self.op.ints("axes").is_some() || !stretches || crops {
            return Some(unknown);
        }
        if let Some(sizes) = self.input(3) {
            let Some(sizes) = &sizes.ints else { return Some(unknown) };
            return Some(sizes.iter().map(|s| s.and_then(|s| usize::try_from(s).ok())).collect());
        }
        let slot = if self.op.op_type() == "Resize" && self.opset >= 11 { 2 } else { 1 };
        let Some(scales) = self.constants.get(slot).copied().flatten().and_then(Tensor::f32s) else {
            return Some(unknown);
        };
        if scales.len() != dims.len() {
            return Some(unknown);
        }
        // Runtimes multiply in either precision; only where both agree is the extent settled.
        let scaled = |d: usize, s: f32| {
            let (single, double) = ((d as f32 * s).floor() as usize, (d as f64 * f64::from(s)).floor() as usize);
            (single == double).then_some(single)
        };
        Some(dims.iter().zip(scales).map(|(d, s)| scaled((*d)?, s)).collect())
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
        Some(kept.map(|a| if axes.contains(&a) { Some(1) } else { dims[a] }).collect())
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
    "Softmax",
];

/// Whether an integer is one of the type, which is one that shapes are computed in.
fn fits(value: i64, dtype: Option<DType>) -> bool {
    match dtype {
        Some(DType::Int64) => true,
        Some(DType::Int32) => i32::try_from(value).is_ok(),
        _ => false,
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
    dims.iter().try_fold(1_usize, |n, &d| n.checked_mul(d?))
}

/// The shape that both broadcast to; unknown against anything but a number above one is unknown.
fn broadcast(a: &[Dim], b: &[Dim]) -> Vec<Dim> {
    let rank = a.len().max(b.len());
    let at = |dims: &[Dim], i: usize| (i + dims.len()).checked_sub(rank).map_or(Some(1), |i| dims[i]);
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (Some(1), d) | (d, Some(1)) => d,
            (Some(d), _) | (_, Some(d)) => Some(d),
            (None, None) => None,
        })
        .collect()
}
