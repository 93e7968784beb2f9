//! The rules of operators that move elements and never look at them, and of the shape arithmetic that they are told by.

use super::{Dim, Fact, Given, Rule, Term, broadcast, product};
use crate::{
    analysis::shapes::MAX_FOLLOWED,
    eval::{self, axis},
    ir::{DType, Tensor},
};

impl Rule<'_> {
    pub(super) fn concat(&self) -> Option<Vec<Fact>> {
        let first = self.dims(0)?;
        let at = axis(self.op.int("axis")?, first.len())?;
        let parts = (0..self.inputs.len()).map(|slot| self.dims(slot)).collect::<Option<Vec<_>>>()?;
        if parts.iter().any(|part| part.len() != first.len()) {
            return None;
        }
        let mut dims = first.clone();
        dims[at] = parts.iter().map(|part| part[at]).try_fold(Term::number(0), |sum, d| sum.plus(d?));
        for part in parts {
            for (i, d) in dims.iter_mut().enumerate().filter(|(i, _)| *i != at) {
                // All must be the same, so that a number says what the others are.
                *d = d.filter(|d| d.known().is_some()).or(part[i].filter(|d| d.known().is_some())).or(*d);
            }
        }
        let ints = self.inputs.iter().map(|fact| fact.as_ref()?.ints.clone()).collect::<Option<Vec<_>>>();
        let ints = ints.map(|parts| parts.concat()).filter(|ints| first.len() == 1 && ints.len() <= MAX_FOLLOWED);
        Some(vec![Fact { dtype: self.input(0)?.dtype, dims: Some(dims), ints }])
    }

    pub(super) fn split(&self, outputs: usize) -> Option<Vec<Fact>> {
        let dims = self.dims(0)?;
        let at = axis(self.op.int("axis").unwrap_or(0), dims.len())?;
        let parts: Vec<Dim> = match self.integers("split", 1) {
            Given::Known(parts) => parts.into_iter().map(|p| usize::try_from(p?).ok().map(Term::from)).collect(),
            Given::Unknown => vec![None; outputs],
            Given::Absent => {
                let whole = dims[at].and_then(Term::extent);
                let each = whole.and_then(|d| (outputs > 0).then(|| d.div_ceil(outputs)));
                (0..outputs).map(|i| Some(each?.min(whole?.saturating_sub(i * each?)).into())).collect()
            }
        };
        let part = |extent: Dim| {
            let mut dims = dims.clone();
            dims[at] = extent;
            Some(Fact::new(self.input(0)?.dtype, dims))
        };
        parts.into_iter().map(part).collect()
    }

    pub(super) fn reshape(&self) -> Option<Vec<Dim>> {
        let wanted = self.terms("shape", 1)?;
        let dims = self.dims(0);
        let zero_copies = self.op.int("allowzero") != Some(1);
        let target: Vec<Dim> = (0..wanted.len())
            .map(|i| match wanted[i].map(|w| (w, w.known())) {
                Some((_, Some(0))) if zero_copies => dims.and_then(|dims| dims.get(i).copied().flatten()),
                Some((_, Some(-1))) => None,
                // What is not known is an extent, or stands for one.
                Some((w, _)) => Some(w).filter(|w| w.is_extent()),
                None => None,
            })
            .collect();
        let open: Vec<_> = (0..target.len()).filter(|&i| target[i].is_none()).collect();
        let ([i], Some(dims)) = (&open[..], dims) else { return Some(target) };
        let rest = target.iter().flatten().try_fold(Term::ONE, |n, &d| n.times(d))?;
        let inferred = product(dims).and_then(|total| total.over(rest));
        Some(target.iter().enumerate().map(|(at, &d)| if at == *i { inferred } else { d }).collect())
    }

    pub(super) fn flatten(&self) -> Option<Vec<Dim>> {
        let dims = self.dims(0)?;
        let at = self.op.int("axis").unwrap_or(1);
        let at = if at == dims.len() as i64 { dims.len() } else { axis(at, dims.len())? };
        Some(vec![product(&dims[..at]), product(&dims[at..])])
    }

    /// Channels that become blocks of pixels, or blocks that become channels.
    pub(super) fn blocks(&self) -> Option<Vec<Dim>> {
        let [n, c, h, w] = self.dims(0)?[..] else { return None };
        let size = Term::number(self.op.int("blocksize").filter(|&size| size > 0)?);
        let area = size.times(size)?;
        let grow = |d: Dim, by: Term| d.and_then(|d| d.times(by));
        let shrink = |d: Dim, by: Term| d.and_then(|d| d.over(by));
        Some(if self.op.is("DepthToSpace") {
            vec![n, shrink(c, area), grow(h, size), grow(w, size)]
        } else {
            vec![n, grow(c, area), shrink(h, size), shrink(w, size)]
        })
    }

    pub(super) fn transpose(&self) -> Option<Vec<Dim>> {
        let dims = self.dims(0)?;
        match self.op.ints("perm") {
            Some(perm) => perm.iter().map(|&p| Some(dims[axis(p, dims.len())?])).collect(),
            None => Some(dims.iter().rev().copied().collect()),
        }
    }

    pub(super) fn squeeze(&self) -> Option<Vec<Fact>> {
        let x = self.input(0)?;
        let dims = x.dims.as_ref()?;
        let axes: Vec<usize> = match self.integers("axes", 1) {
            // Runtimes take an empty list for none and for all.
            Given::Known(axes) if axes.is_empty() => return None,
            Given::Known(axes) => axes.into_iter().map(|a| axis(a?, dims.len())).collect::<Option<_>>()?,
            Given::Unknown => return None,
            Given::Absent => {
                let known = dims.iter().map(|d| d.and_then(Term::known)).collect::<Option<Vec<_>>>()?;
                (0..known.len()).filter(|&a| known[a] == 1).collect()
            }
        };
        let kept = (0..dims.len()).filter(|a| !axes.contains(a)).map(|a| dims[a]).collect();
        Some(vec![Fact { dims: Some(kept), ..x.clone() }])
    }

    pub(super) fn unsqueeze(&self) -> Option<Vec<Fact>> {
        let x = self.input(0)?;
        let dims = x.dims.as_ref()?;
        let axes = self.integers("axes", 1).known()?;
        let rank = dims.len() + axes.len();
        let axes: Vec<_> = axes.into_iter().map(|a| axis(a?, rank)).collect::<Option<_>>()?;
        let mut rest = dims.iter().copied();
        let grown = (0..rank)
            .map(|a| if axes.contains(&a) { Some(Some(Term::ONE)) } else { rest.next() })
            .collect::<Option<_>>()?;
        let ints = x.ints.clone().filter(|_| rank <= 1);
        Some(vec![Fact { dims: Some(grown), ints, ..x.clone() }])
    }

    pub(super) fn shape(&self) -> Vec<Fact> {
        let int64 = Some(DType::Int64);
        let Some(dims) = self.dims(0) else { return vec![Fact::new(int64, vec![None])] };
        let rank = dims.len() as i64;
        let clamp = |i: i64| if i < 0 { i.saturating_add(rank) } else { i }.clamp(0, rank) as usize;
        let begin = clamp(self.op.int("start").unwrap_or(0));
        let end = clamp(self.op.int("end").unwrap_or(rank)).max(begin);
        let ints = dims[begin..end].to_vec();
        vec![Fact { dtype: int64, dims: Some(vec![Some(ints.len().into())]), ints: Some(ints) }]
    }

    pub(super) fn constant_of_shape(&self) -> Option<Vec<Fact>> {
        let dims = extents(self.input(0)?.ints.as_ref()?);
        let value = self.op.tensor("value");
        let dtype = value.as_ref().map_or(DType::Float, Tensor::dtype);
        let fill = value.and_then(|value| value.i64s()?.first().copied());
        let count = match dims[..] {
            [Some(count)] => count.extent().filter(|&count| count <= MAX_FOLLOWED),
            _ => None,
        };
        let ints = fill.zip(count).map(|(fill, count)| vec![Some(Term::number(fill)); count]);
        Some(vec![Fact { dtype: Some(dtype), dims: Some(dims), ints }])
    }

    pub(super) fn gather(&self) -> Option<Vec<Fact>> {
        let (x, indices) = (self.input(0)?, self.input(1)?);
        let (dims, picked) = (x.dims.as_ref()?, indices.dims.as_ref()?);
        let at = axis(self.op.int("axis").unwrap_or(0), dims.len())?;
        let mut target = dims[..at].to_vec();
        target.extend(picked);
        target.extend(&dims[at + 1..]);
        let ints = match (&x.ints, &indices.ints) {
            (Some(x), Some(i)) if dims.len() == 1 && target.len() <= 1 => {
                Some(i.iter().map(|i| x[axis(i.and_then(Term::known)?, x.len())?]).collect())
            }
            _ => None,
        };
        Some(vec![Fact { dtype: x.dtype, dims: Some(target), ints }])
    }

    pub(super) fn slice(&self) -> Option<Vec<Fact>> {
        let x = self.input(0)?;
        let mut dims = x.dims.clone()?;
        let (starts, ends) = (self.integers("starts", 1).known(), self.integers("ends", 2).known());
        let count = starts.as_ref().or(ends.as_ref()).map_or(dims.len(), Vec::len);
        let axes = match self.integers("axes", 3) {
            Given::Known(axes) => axes,
            Given::Unknown => return None,
            Given::Absent => (0..count as i64).map(Some).collect(),
        };
        let steps = match self.integers("steps", 4) {
            Given::Absent => Some(vec![Some(1); axes.len()]),
            steps => steps.known(),
        };
        let mut ints = x.ints.clone();
        for (i, a) in axes.iter().enumerate() {
            let a = axis((*a)?, dims.len())?;
            let at = |v: &Option<Vec<Option<i64>>>| v.as_ref().and_then(|v| v.get(i).copied().flatten());
            let bounds = (|| Some((at(&starts)?, at(&ends)?, at(&steps)?)))();
            let whole = dims[a].and_then(Term::extent);
            let taken = whole.zip(bounds).and_then(|(d, (start, end, step))| eval::slice_indices(d, start, end, step));
            ints = ints.zip(taken.clone()).and_then(|(ints, taken)| taken.map(|i| ints.get(i).copied()).collect());
            dims[a] = match (taken, bounds) {
                (Some(taken), _) => Some(taken.len().into()),
                (None, Some((0, end, 1))) if end >= i64::from(i32::MAX) => dims[a],
                (None, Some((start, end, step))) => {
                    dims[a].map(|d| Term::derived("slice", &[start, end, step], &[d], true))
                }
                (None, None) => None,
            };
        }
        Some(vec![Fact { dtype: x.dtype, dims: Some(dims), ints }])
    }

    pub(super) fn pad(&self) -> Option<Vec<Dim>> {
        let dims = self.dims(0)?;
        let pads = self.integers("pads", 1).known().filter(|_| self.inputs.len() <= 3);
        let Some(pads) = pads else { return Some(vec![None; dims.len()]) };
        let n = dims.len();
        let grown = |i: usize| dims[i]?.plus(Term::number((*pads.get(i)?)?.checked_add((*pads.get(i + n)?)?)?));
        Some((0..n).map(|i| grown(i).filter(|d| d.known().is_none_or(|d| d >= 0))).collect())
    }

    pub(super) fn expand(&self) -> Option<Vec<Dim>> {
        Some(broadcast(self.dims(0)?, &extents(self.input(1)?.ints.as_ref()?)))
    }

    pub(super) fn resize(&self) -> Option<Vec<Dim>> {
        let dims = self.dims(0)?;
        let unknown = vec![None; dims.len()];
        let stretches = matches!(self.op.string("keep_aspect_ratio_policy"), None | Some("stretch"));
        let crops = self.op.string("coordinate_transformation_mode") == Some("tf_crop_and_resize");
        if self.op.ints("axes").is_some() || !stretches || crops {
            return Some(unknown);
        }
        if let Some(sizes) = self.input(3) {
            let Some(sizes) = &sizes.ints else { return Some(unknown) };
            return Some(extents(sizes));
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
        let one = |(d, s): (&Dim, f32)| match d.and_then(Term::extent) {
            Some(d) => scaled(d, s).map(Term::from),
            None if s == 1.0 => *d,
            None => d.map(|d| Term::derived("resize", &[i64::from(s.to_bits())], &[d], true)),
        };
        Some(dims.iter().zip(scales).map(one).collect())
    }
}

/// Elements that stand for extents; one below zero does not.
fn extents(elements: &[Dim]) -> Vec<Dim> {
    elements.iter().map(|element| element.filter(|e| e.is_extent())).collect()
}
