//! The error of an output, pooled over samples.

use std::collections::BTreeMap;

use super::engine::Value;

/// Outputs whose spread is below this share of their size, or of one for each element, are not exercised by the inputs.
const FLAT: f64 = 1e-3;

/// Sums over samples of one output of two models. The mean over samples is subtracted elementwise.
#[derive(Clone, Debug, Default)]
pub struct Pooled {
    /// For each size of output, the sum over its samples and their count: outputs of one size have one mean.
    sums: BTreeMap<usize, (Vec<f64>, usize)>,
    sum_of_squares: f64,
    difference: f64,
    elements: usize,
    samples: usize,
    classified: usize,
    flipped: usize,
    unequal: usize,
    discrete: usize,
    /// The first sample of a discrete output, and whether all others are like it.
    first: Option<Vec<f64>>,
    /// Whether samples of three axes are sequences of rows of class scores.
    sequences: bool,
    discrete_varies: bool,
    broken: bool,
    coarseness: f64,
    /// The largest ‖y−y'‖ / max(‖y‖, 10⁻³√n) of one sample, over the coarseness.
    pub rounding: f64,
}

impl Pooled {
    /// Of no samples; `sequences` is whether those of three axes are sequences of rows of class scores, which together are one
    /// answer, and `coarseness` how many times more than in single precision rounding may change them.
    #[must_use]
    pub fn new(sequences: bool, coarseness: f64) -> Self {
        Self { sequences, coarseness, ..Self::default() }
    }

    /// Adds one sample: what was wanted and what was found.
    pub fn add(&mut self, wanted: &Value, found: &Value) {
        self.samples += 1;
        if wanted.dims != found.dims || wanted.is_float() != found.is_float() {
            self.broken = true;
            self.rounding = f64::INFINITY;
            return;
        }
        let (y, z) = (&wanted.values, &found.values);
        if !wanted.is_float() {
            let unequal = y.iter().zip(z).filter(|(a, b)| a != b).count();
            self.discrete_varies |= self.first.as_ref().is_some_and(|first| first != y);
            self.first.get_or_insert_with(|| y.clone());
            self.unequal += unequal;
            self.discrete += y.len();
            self.rounding = super::max(self.rounding, unequal as f64 / y.len().max(1) as f64);
            return;
        }
        let same_kind = |a: f64, b: f64| {
            a.is_nan() == b.is_nan() && (a.is_infinite() == b.is_infinite()) && (!a.is_infinite() || a == b)
        };
        if !y.iter().zip(z).all(|(&a, &b)| same_kind(a, b)) {
            self.broken = true;
            self.rounding = f64::INFINITY;
            return;
        }
        let (sums, count) = self.sums.entry(y.len()).or_insert_with(|| (vec![0.0; y.len()], 0));
        *count += 1;
        let (mut norm, mut difference) = (0.0, 0.0);
        for ((sum, &a), &b) in sums.iter_mut().zip(y).zip(z).filter(|((_, a), _)| a.is_finite()) {
            *sum += a;
            norm += a * a;
            difference += (a - b) * (a - b);
        }
        self.sum_of_squares += norm;
        self.difference += difference;
        self.elements += y.len();
        let scale = norm.sqrt().max(FLAT * (y.len() as f64).sqrt());
        let off = if difference == 0.0 { 0.0 } else { difference.sqrt() / scale / self.coarseness };
        self.rounding = super::max(self.rounding, off);
        let answer = match wanted.dims[..] {
            [_, classes] if classes > 1 => Some((1, classes)),
            [_, steps, classes] if self.sequences && classes > 1 => Some((steps.max(1), classes)),
            _ => None,
        };
        if let Some((steps, classes)) = answer {
            // An answer with NaN is none.
            let answers = y.chunks_exact(steps * classes).zip(z.chunks_exact(steps * classes));
            for (a, b) in answers.filter(|(a, _)| a.iter().all(|score| !score.is_nan())) {
                let changed = a.chunks_exact(classes).zip(b.chunks_exact(classes)).any(|(a, b)| argmax(a) != argmax(b));
                self.classified += 1;
                self.flipped += usize::from(changed);
            }
        }
    }

    /// ‖Y−Y'‖ over [`scale`](Self::scale), or the share of unequal elements of a discrete output; infinite where shapes, NaN
    /// or Inf differ.
    #[must_use]
    pub fn error(&self) -> f64 {
        if self.broken {
            f64::INFINITY
        } else if self.discrete > 0 {
            self.unequal as f64 / self.discrete as f64
        } else if self.difference == 0.0 {
            0.0
        } else {
            self.difference.sqrt() / self.scale()
        }
    }

    /// What the error of a floating-point output is relative to: its spread ‖Y−Ȳ‖, but never less than what makes it
    /// [vary](Self::varies), so that an output which stands still must nearly keep its value.
    #[must_use]
    pub fn scale(&self) -> f64 {
        self.spread().max(self.floor())
    }

    /// Whether the samples exercise the output: they give it a spread of more than 10⁻³ of its size, or different values
    /// where it is discrete.
    #[must_use]
    pub fn varies(&self) -> bool {
        if self.discrete > 0 { self.discrete_varies } else { self.spread() > self.floor() }
    }

    fn spread(&self) -> f64 {
        let of_mean = |(sums, count): &(Vec<f64>, usize)| sums.iter().map(|s| s * s).sum::<f64>() / *count as f64;
        let mean_part: f64 = self.sums.values().map(of_mean).sum();
        (self.sum_of_squares - mean_part).max(0.0).sqrt()
    }

    fn floor(&self) -> f64 {
        (FLAT * self.sum_of_squares.sqrt()).max(FLAT * (self.elements as f64).sqrt())
    }

    /// Whether the samples so far alone put the error of an output of this `scale` over all of them above `limit`.
    #[must_use]
    pub fn exceeds(&self, limit: f64, scale: f64) -> bool {
        self.broken || self.discrete == 0 && self.difference.sqrt() > limit * scale
    }

    /// Whether the output looks like class scores: rows of several numbers, or sequences of such.
    #[must_use]
    pub fn classifies(&self) -> bool {
        self.classified > 0
    }

    /// How many answers have another top class somewhere, and how many answers there are.
    #[must_use]
    pub fn classified(&self) -> (usize, usize) {
        (self.flipped, self.classified)
    }

    /// The share of samples whose largest class score moved.
    #[must_use]
    pub fn flips(&self) -> f64 {
        self.flipped as f64 / self.classified.max(1) as f64
    }
}

fn argmax(values: &[f64]) -> Option<usize> {
    (0..values.len()).max_by(|&a, &b| values[a].total_cmp(&values[b]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::DType;

    fn value(values: &[f64]) -> Value {
        Value { dims: vec![1, values.len()], values: values.to_vec(), dtype: DType::Float }
    }

    #[test]
    fn a_constant_function_scores_one() {
        let samples = [[1.0, -2.0, 5.0], [3.0, 0.0, -1.0], [2.0, 5.0, -1.0]];
        let mut pool = Pooled::default();
        for sample in samples {
            pool.add(&value(&sample), &value(&[2.0, 1.0, 1.0]));
        }
        assert!(pool.varies() && (pool.error() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_sequence_changes_with_any_of_its_rows() {
        let sequence = |values: &[f64]| Value { dims: vec![1, 2, 2], values: values.to_vec(), dtype: DType::Float };
        for (found, flipped) in [([0.9, 0.1, 0.2, 0.8], 0), ([0.9, 0.1, 0.8, 0.2], 1), ([0.1, 0.9, 0.8, 0.2], 1)] {
            let mut pool = Pooled::new(true, 1.0);
            pool.add(&sequence(&[0.7, 0.3, 0.4, 0.6]), &sequence(&found));
            assert_eq!(pool.classified(), (flipped, 1));
            let mut other = Pooled::new(false, 1.0);
            other.add(&sequence(&[0.7, 0.3, 0.4, 0.6]), &sequence(&found));
            assert!(!other.classifies());
        }
    }

    #[test]
    fn nan_and_infinity_must_stand_in_the_same_places() {
        for (wanted, found) in [(f64::NAN, 1.0), (1.0, f64::NAN), (f64::INFINITY, f64::NEG_INFINITY)] {
            let mut pool = Pooled::default();
            pool.add(&value(&[wanted, 2.0]), &value(&[found, 2.0]));
            assert_eq!(pool.error(), f64::INFINITY);
        }
    }

    #[test]
    fn an_output_that_does_not_vary_must_nearly_keep_its_value() {
        for (found, good) in [([1.0, 2.0], true), ([1.00001, 2.0], true), ([1.01, 2.0], false), ([0.0, 0.0], false)] {
            let mut pool = Pooled::default();
            (0..3).for_each(|_| pool.add(&value(&[1.0, 2.0]), &value(&found)));
            assert!(!pool.varies());
            assert_eq!(pool.error() < 0.05, good, "{}", pool.error());
        }
    }

    #[test]
    fn outputs_of_different_sizes_have_means_of_their_own() {
        let mut pool = Pooled::default();
        for sample in [&[1.0, 2.0][..], &[5.0, 6.0, 7.0], &[3.0, 2.0], &[5.0, 6.0, 9.0]] {
            let mean: &[f64] = if sample.len() == 2 { &[2.0, 2.0] } else { &[5.0, 6.0, 8.0] };
            pool.add(&value(sample), &value(mean));
        }
        assert!((pool.error() - 1.0).abs() < 1e-12, "{}", pool.error());
    }
}
