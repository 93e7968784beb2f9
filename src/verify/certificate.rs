//! What samples that nothing has seen say about all inputs like them.

use serde::Serialize;

use super::Difference;

/// Where nothing can be counted.
pub const NO_CLASSES: &str =
    "no output looks like class scores, rows of several numbers or sequences of them by a softmax";
/// With which the bound holds.
pub const CONFIDENCE: f64 = 0.95;
/// Fewer samples in the final word say too little: a quarter of 256.
const FEWEST: usize = 64;
/// Halvings of the interval in which the bound is.
const HALVINGS: usize = 60;

/// How often the top class changes, at most, over all inputs of which the samples are a fair draw. It bounds the loss of
/// accuracy too, without labels: an answer can only become wrong by changing.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Certificate {
    /// Rows of class scores that were compared, none of which anything had seen before.
    pub samples: usize,
    /// Those whose top class changed.
    pub changed: usize,
    /// The share of inputs that change is not above this.
    pub bound: f64,
    /// With this probability over the draw of the samples.
    pub confidence: f64,
}

impl Certificate {
    /// What `difference` on such samples says; else why it says nothing.
    ///
    /// # Errors
    ///
    /// A sentence: there are no class scores, or too few samples.
    pub fn of(difference: &Difference) -> Result<Self, String> {
        let (samples, changed) = (difference.classified, difference.flipped);
        if !difference.classifies {
            return Err(format!("no certificate: {NO_CLASSES}"));
        }
        if samples < FEWEST {
            return Err(format!(
                "no certificate: {samples} samples that nothing else saw are too few to say anything about other inputs; \
                 a quarter of the data is kept for that, so give {} or more",
                4 * FEWEST
            ));
        }
        Ok(Self { samples, changed, bound: upper_bound(changed, samples, 1.0 - CONFIDENCE), confidence: CONFIDENCE })
    }
}

/// The one-sided bound of a probability after `k` successes in `n` independent tries: the largest p at which so few are not
/// less likely than `risk` (Clopper & Pearson 1934).
#[must_use]
pub fn upper_bound(k: usize, n: usize, risk: f64) -> f64 {
    if k >= n {
        return 1.0;
    }
    let (mut low, mut high) = (k as f64 / n as f64, 1.0);
    for _ in 0..HALVINGS {
        let middle = f64::midpoint(low, high);
        if at_most(k, n, middle) > risk { low = middle } else { high = middle }
    }
    high
}

/// The probability of at most `k` successes in `n` tries of probability `p`, 0 < p < 1.
fn at_most(k: usize, n: usize, p: f64) -> f64 {
    let ln_choose = |k: usize| {
        let ln_factorial = |n: usize| libm::lgamma(n as f64 + 1.0);
        ln_factorial(n) - ln_factorial(k) - ln_factorial(n - k)
    };
    let one = |i: usize| libm::exp(ln_choose(i) + i as f64 * libm::log(p) + (n - i) as f64 * libm::log1p(-p));
    (0..=k).map(one).sum()
}

#[cfg(test)]
mod tests {
    use rand_core::{Rng, SeedableRng};
    use rand_xoshiro::Xoshiro256PlusPlus;

    use super::*;

    #[test]
    fn bounds_are_those_of_the_beta_distribution() {
        // scipy.stats.beta.ppf(0.95, k + 1, n - k)
        for (k, n, wanted) in [
            (0, 300, 0.009_936_138),
            (0, 1000, 0.002_991_250),
            (2, 1000, 0.006_281_9),
            (5, 1000, 0.010_478_0),
            (10, 1000, 0.016_899_8),
        ] {
            assert!((upper_bound(k, n, 0.05) - wanted).abs() < 2e-5, "{k} {n} {}", upper_bound(k, n, 0.05));
        }
        assert_eq!(upper_bound(7, 7, 0.05), 1.0);
    }

    #[test]
    fn the_bound_holds_in_at_least_95_of_100_draws() {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(1);
        for (p, n) in [(0.004, 256), (0.02, 256), (0.1, 100), (0.3, 64)] {
            let holds = (0..2000).filter(|_| {
                let hits = (0..n).filter(|_| ((random.next_u64() >> 11) as f64) < p * (1_u64 << 53) as f64).count();
                upper_bound(hits, n, 0.05) >= p
            });
            let share = holds.count() as f64 / 2000.0;
            assert!(share >= 0.95, "{p} {n}: {share}");
        }
    }
}
