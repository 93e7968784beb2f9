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
    pub(super) inputs: &'a [Fact],
    pub(super) constants: &'a [Option<&'a Tensor>],
}

impl Rule<'_> {
    pub(super) fn facts(&self, outputs: usize) -> Option<Vec<Fact>> {
        if !self.constants.is_empty()
            && self.constants.iter().all(Option::is_some)
            && self.inputs.iter().all(|fact| fact.ints.is_some())
            && let Some(values) = eval::evaluate(self.op, self.opset, self.constants)
        {
            return Some(values.iter().map(Fact::of).collect());
        }
        let x = self.inputs.first()?;
        let same = || Some(vec![Fact { ints: None, ..x.clone() }]);
        let one = |dims: Option<Vec<Dim>>| Some(vec![Fact::new(x.dtype, dims?)]);
        match self.op.standard()? {
            "Identity" => Some(vec![x.clone()]),
            "Cast" => {
                let to = DType::try_from(i32::try_from(self.op.int("to")?).ok()?).ok();
                Some(vec![Fact { dtype: to, ..x.clone() }])
            }
            "Dropout" => {
                let mask = Fact { dtype: Some(DType::Bool), dims: x.dims.clone(), ints: None };
                Some(vec![Fact { ints: None, ..x.clone() }, mask])
            }
            "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Min" | "Max" | "Mod" | "PRelu" | "And" | "Or" | "Xor" | "Sum" => {
                self.elementwise(x.dtype)
            }
            "Equal" | "Less" | "Greater" | "LessOrEqual" | "GreaterOrEqual" => self.elementwise(Some(DType::Bool)),
            "Where" => self.elementwise(self.inputs.get(1)?.dtype),
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

    fn elementwise(&self, dtype: Option<DType>) -> Option<Vec<Fact>> {
        let mut dims: Vec<Dim> = Vec::new();
        for input in self.inputs {
            dims = broadcast(&dims, input.dims.as_ref()?);
        }
        let ints = match self.inputs {
            [Fact { ints: Some(a), .. }, Fact { ints: Some(b), .. }]
                if a.len() == b.len() || a.len() == 1 || b.len() == 1 =>
            {
                let n = a.len().max(b.len());
                let at = |v: &[Option<i64>], i: usize| v[if v.len() == 1 { 0 } else { i }];
                let f = |x: i64, y: i64| match self.op.op_type() {
                    "Add" => x.checked_add(y),
                    "Sub" => x.checked_sub(y),
                    "Mul" => x.checked_mul(y),
                    "Div" => x.checked_div(y),
                    _ => None,
                };
                Some((0..n).map(|i| f(at(a, i)?, at(b, i)?)).collect())
            }
            _ => None,
        };
        Some(vec![Fact { dtype, dims: Some(dims), ints }])
    }

    fn spatial(&self, kernel: &[usize]) -> Option<Vec<Dim>> {
        let x = self.inputs[0].dims.as_ref()?;
        let ints =
            |name: &str, n: usize, default: i64| self.op.ints(name).map_or_else(|| vec![default; n], <[i64]>::to_vec);
        let n = kernel.len();
        let (strides, dilations, pads) = (ints("strides", n, 1), ints("dilations", n, 1), ints("pads", 2 * n, 0));
        let auto = self.op.string("auto_pad").unwrap_or("NOTSET");
        let ceil = self.op.int("ceil_mode") == Some(1);
        (0..n)
            .map(|i| {
                let Some(extent) = *x.get(i + 2)? else { return Some(None) };
                let stride = usize::try_from(*strides.get(i)?).ok().filter(|&s| s > 0)?;
                if auto.starts_with("SAME") {
                    return Some(Some(extent.div_ceil(stride)));
                }
                let pad = if auto == "VALID" { 0 } else { pads.get(i)? + pads.get(i + n)? };
                let span = *dilations.get(i)? * (kernel[i] as i64 - 1) + 1;
                let room = usize::try_from(extent as i64 + pad - span).ok()?;
                Some(Some(if ceil { room.div_ceil(stride) } else { room / stride } + 1))
            })
            .collect()
    }

    fn conv(&self) -> Option<Vec<Dim>> {
        let w: Vec<usize> = self.inputs.get(1)?.dims.as_ref()?.iter().copied().collect::<Option<_>>()?;
        let mut dims = vec![*self.inputs[0].dims.as_ref()?.first()?, Some(*w.first()?)];
        dims.extend(self.spatial(w.get(2..)?)?);
        Some(dims)
    }

    fn conv_transpose(&self) -> Option<Vec<Dim>> {
        let x = self.inputs[0].dims.as_ref()?;
        let w: Vec<usize> = self.inputs.get(1)?.dims.as_ref()?.iter().copied().collect::<Option<_>>()?;
        let group = usize::try_from(self.op.int("group").unwrap_or(1)).ok()?;
        let n = w.len().checked_sub(2)?;
        let ints =
            |name: &str, n: usize, default: i64| self.op.ints(name).map_or_else(|| vec![default; n], <[i64]>::to_vec);
        let (strides, dilations, pads) = (ints("strides", n, 1), ints("dilations", n, 1), ints("pads", 2 * n, 0));
        let (extra, fixed) = (ints("output_padding", n, 0), self.op.ints("output_shape"));
        let auto = self.op.string("auto_pad").unwrap_or("NOTSET").starts_with("SAME");
        let mut dims = vec![*x.first()?, Some(w.get(1)? * group)];
        for i in 0..n {
            let extent = *x.get(i + 2)?;
            dims.push(match fixed {
                Some(fixed) => usize::try_from(*fixed.get(fixed.len() - n + i)?).ok(),
                None => extent.and_then(|extent| {
                    let grown = strides[i] * extent as i64;
                    let span = dilations[i] * (w[i + 2] as i64 - 1) + 1;
                    let full = grown - strides[i] + extra[i] + span - pads[i] - pads[i + n];
                    usize::try_from(if auto { grown } else { full }).ok()
                }),
            });
        }
        Some(dims)
    }

    fn pool(&self) -> Option<Vec<Dim>> {
        let kernel: Vec<_> =
            self.op.ints("kernel_shape")?.iter().map(|&k| usize::try_from(k).ok()).collect::<Option<_>>()?;
        let mut dims = self.inputs[0].dims.as_ref()?.get(..2)?.to_vec();
        dims.extend(self.spatial(&kernel)?);
        Some(dims)
    }

    fn gemm(&self) -> Option<Vec<Dim>> {
        let side = |slot: usize, flag: &str, plain: usize| {
            let transposed = self.op.int(flag) == Some(1);
            self.inputs.get(slot)?.dims.as_ref()?.get(if transposed { 1 - plain } else { plain }).copied()
        };
        Some(vec![side(0, "transA", 0)?, side(1, "transB", 1)?])
    }

    fn matmul(&self) -> Option<Vec<Dim>> {
        let (a, b) = (self.inputs[0].dims.as_ref()?, self.inputs.get(1)?.dims.as_ref()?);
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
        let first = self.inputs[0].dims.as_ref()?;
        let at = axis(self.op.int("axis")?, first.len())?;
        let mut dims = first.clone();
        dims[at] = self.inputs.iter().map(|fact| *fact.dims.as_ref()?.get(at)?).sum();
        for input in self.inputs {
            for (i, d) in dims.iter_mut().enumerate().filter(|(i, _)| *i != at) {
                *d = d.or(*input.dims.as_ref()?.get(i)?);
            }
        }
        let ints = self.inputs.iter().map(|fact| fact.ints.clone()).collect::<Option<Vec<_>>>();
        let ints = ints.map(|parts| parts.concat()).filter(|ints| first.len() == 1 && ints.len() <= MAX_FOLLOWED);
        Some(vec![Fact { dtype: self.inputs[0].dtype, dims: Some(dims), ints }])
    }

    fn split(&self, outputs: usize) -> Option<Vec<Fact>> {
        let dims = self.inputs[0].dims.as_ref()?;
        let at = axis(self.op.int("axis").unwrap_or(0), dims.len())?;
        let parts: Vec<Dim> = if let Some(parts) = self.integers("split", 1) {
            parts.into_iter().map(|p| usize::try_from(p?).ok()).collect()
        } else {
            let each = dims[at].map(|d| d.div_ceil(outputs));
            (0..outputs).map(|i| Some(each?.min(dims[at]?.saturating_sub(i * each?)))).collect()
        };
        let part = |extent: Dim| {
            let mut dims = dims.clone();
            dims[at] = extent;
            Fact::new(self.inputs[0].dtype, dims)
        };
        Some(parts.into_iter().map(part).collect())
    }

    /// Integers that are an attribute in old operator sets and an input in new ones.
    fn integers(&self, attribute: &str, slot: usize) -> Option<Vec<Option<i64>>> {
        match self.inputs.get(slot) {
            Some(fact) if fact != &Fact::default() => fact.ints.clone(),
            _ => self.op.ints(attribute).map(|ints| ints.iter().map(|&i| Some(i)).collect()),
        }
    }

    fn reshape(&self) -> Option<Vec<Dim>> {
        let wanted = self.integers("shape", 1)?;
        let dims = self.inputs[0].dims.as_ref();
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
            let total: Option<usize> = dims.iter().copied().product();
            let rest: usize = target.iter().flatten().product();
            target[*i] = total.and_then(|total| (rest > 0 && total.is_multiple_of(rest)).then(|| total / rest));
        }
        Some(target)
    }

    fn flatten(&self) -> Option<Vec<Dim>> {
        let dims = self.inputs[0].dims.as_ref()?;
        let at = self.op.int("axis").unwrap_or(1);
        let at = if at == dims.len() as i64 { dims.len() } else { axis(at, dims.len())? };
        Some(vec![dims[..at].iter().copied().product(), dims[at..].iter().copied().product()])
    }

    fn transpose(&self) -> Option<Vec<Dim>> {
        let dims = self.inputs[0].dims.as_ref()?;
        match self.op.ints("perm") {
            Some(perm) => perm.iter().map(|&p| Some(dims[axis(p, dims.len())?])).collect(),
            None => Some(dims.iter().rev().copied().collect()),
        }
    }

    fn squeeze(&self) -> Option<Vec<Fact>> {
        let x = &self.inputs[0];
        let dims = x.dims.as_ref()?;
        let axes: Vec<usize> = match self.integers("axes", 1) {
            Some(axes) => axes.into_iter().map(|a| axis(a?, dims.len())).collect::<Option<_>>()?,
            None if self.inputs.len() < 2 => {
                let known = dims.iter().copied().collect::<Option<Vec<_>>>()?;
                (0..known.len()).filter(|&a| known[a] == 1).collect()
            }
            None => return None,
        };
        let kept = (0..dims.len()).filter(|a| !axes.contains(a)).map(|a| dims[a]).collect();
        Some(vec![Fact { dims: Some(kept), ..x.clone() }])
    }

    fn unsqueeze(&self) -> Option<Vec<Fact>> {
        let x = &self.inputs[0];
        let dims = x.dims.as_ref()?;
        let axes = self.integers("axes", 1)?;
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
        let Some(dims) = &self.inputs[0].dims else { return vec![Fact::new(int64, vec![None])] };
        let rank = dims.len() as i64;
        let clamp = |i: i64| if i < 0 { i + rank } else { i }.clamp(0, rank) as usize;
        let begin = clamp(self.op.int("start").unwrap_or(0));
        let end = clamp(self.op.int("end").unwrap_or(rank)).max(begin);
        let ints: Vec<_> = dims[begin..end].iter().map(|d| d.map(|d| d as i64)).collect();
        vec![Fact { dtype: int64, dims: Some(vec![Some(ints.len())]), ints: Some(ints) }]
    }

    fn constant_of_shape(&self) -> Option<Vec<Fact>> {
        let wanted = self.inputs[0].ints.as_ref()?;
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
        let (x, indices) = (&self.inputs[0], self.inputs.get(1)?);
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
        let x = &self.inputs[0];
        let mut dims = x.dims.clone()?;
        let (starts, ends) = (self.integers("starts", 1), self.integers("ends", 2));
        let axes = self.integers("axes", 3);
        let count = starts.as_ref().or(ends.as_ref()).map_or(dims.len(), Vec::len);
        let axes = axes.unwrap_or_else(|| (0..count as i64).map(Some).collect());
        let steps = match self.inputs.get(4) {
            Some(fact) if fact != &Fact::default() => fact.ints.clone(),
            _ => Some(vec![Some(1); axes.len()]),
        };
        let mut ints = x.ints.clone();
        for (i, a) in axes.iter().enumerate() {
            let a = axis((*a)?, dims.len())?;
            let at = |v: &Option<Vec<Option<i64>>>| v.as_ref().and_then(|v| v.get(i).copied().flatten());
            let taken = (|| eval::slice_indices(dims[a]?, at(&starts)?, at(&ends)?, at(&steps)?))();
            ints = ints.zip(taken.as_ref()).map(|(ints, taken)| taken.iter().map(|&i| ints[i]).collect());
            dims[a] = taken.map(|taken| taken.len());
        }
        Some(vec![Fact { dtype: x.dtype, dims: Some(dims), ints }])
    }

    fn pad(&self) -> Option<Vec<Dim>> {
        let dims = self.inputs[0].dims.as_ref()?;
        if self.inputs.len() > 3 {
            return Some(vec![None; dims.len()]);
        }
        let Some(pads) = self.integers("pads", 1) else { return Some(vec![None; dims.len()]) };
        let n = dims.len();
        let dim = |i: usize| {
            let grown = dims[i]? as i64 + (*pads.get(i)?)? + (*pads.get(i + n)?)?;
            usize::try_from(grown).ok()
        };
        Some((0..n).map(dim).collect())
    }

    fn expand(&self) -> Option<Vec<Dim>> {
        let wanted = self.inputs.get(1)?.ints.as_ref()?;
        let wanted: Vec<Dim> = wanted.iter().map(|w| w.and_then(|w| usize::try_from(w).ok())).collect();
        Some(broadcast(self.inputs[0].dims.as_ref()?, &wanted))
    }

    fn resize(&self) -> Option<Vec<Dim>> {
        let dims = self.inputs[0].dims.as_ref()?;
        let unknown = vec![None; dims.len()];
        if self.op.ints("axes").is_some() {
            return Some(unknown);
        }
        if let Some(sizes) = self.inputs.get(3).and_then(|fact| fact.ints.as_ref()) {
            return Some(sizes.iter().map(|s| s.and_then(|s| usize::try_from(s).ok())).collect());
        }
        let slot = if self.op.op_type() == "Resize" && self.opset >= 11 { 2 } else { 1 };
        let Some(scales) = self.constants.get(slot).copied().flatten().and_then(Tensor::f64s) else {
            return Some(unknown);
        };
        if scales.len() != dims.len() {
            return Some(unknown);
        }
        Some(dims.iter().zip(scales).map(|(d, s)| d.map(|d| (d as f64 * s).floor() as usize)).collect())
    }

    fn reduced(&self) -> Option<Vec<Dim>> {
        let dims = self.inputs[0].dims.as_ref()?;
        let argument = self.op.op_type().starts_with("Arg");
        let axes: Vec<usize> = if argument {
            vec![axis(self.op.int("axis").unwrap_or(0), dims.len())?]
        } else {
            match self.integers("axes", 1) {
                Some(axes) if !axes.is_empty() => {
                    axes.into_iter().map(|a| axis(a?, dims.len())).collect::<Option<_>>()?
                }
                None if self.inputs.len() > 1 => return None,
                _ if self.op.int("noop_with_empty_axes") == Some(1) => Vec::new(),
                _ => (0..dims.len()).collect(),
            }
        };
        let keep = self.op.int("keepdims").unwrap_or(1) != 0;
        let kept = (0..dims.len()).filter(|a| keep || !axes.contains(a));
        Some(kept.map(|a| if axes.contains(&a) { Some(1) } else { dims[a] }).collect())
    }

    fn recurrent(&self, outputs: usize) -> Option<Vec<Fact>> {
        let (x, w) = (&self.inputs[0], self.inputs.get(2)?.dims.as_ref()?);
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
