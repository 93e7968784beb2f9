//! Finding the price at which a result has the cost that is asked for.

use super::{Job, ShrinkError, stage::Stage};
use crate::{
    analysis::cost::Cost,
    pass::{Context, Price},
};

/// The search stops when the cost is at most this much below what is asked for.
const NEAR: f64 = 0.005;
/// Prices are looked for between these powers of ten: predicted error for a byte or a multiply-add.
const POWERS: (f64, f64) = (-24.0, 6.0);
/// Halvings of that range, after which a price is known to a hundredth.
const HALVINGS: usize = 14;
/// More steps than any model has channels.
const MAX_STEPS: usize = 1 << 20;

/// Prices of the items of a stage that make a result of a given cost.
pub(super) struct Landing {
    price: Price,
    /// Measured over predicted error, squared, of each item alone.
    factors: Vec<f64>,
}

impl Landing {
    /// What item `i` may do.
    pub(super) fn price(&self, i: usize) -> Price {
        of_item(self.price, &self.factors, i)
    }
}

/// A price in measured error, as item `i` predicts errors.
fn of_item(price: Price, factors: &[f64], i: usize) -> Price {
    Price { per_byte: price.per_byte / factors[i], ..price }
}

/// The prices at which so large a share of the cost `before` is left, or a little less. Where several items are free, their
/// predictions are worth the same only once each is measured alone, at the price that this led to; `known` is what that told of
/// another share.
pub(super) fn land(
    stage: &Stage<'_>,
    (job, target): (&Job, f64),
    before: &Cost,
    known: Option<&Landing>,
    cx: &mut Context,
    progress: &mut dyn FnMut(&str),
) -> Result<Landing, ShrinkError> {
    let free: Vec<_> = (0..stage.items.len()).filter(|&i| stage.items[i].is_free()).collect();
    let mut factors = known.map_or_else(|| vec![1.0; stage.items.len()], |known| known.factors.clone());
    let mut found = price(stage, job, target, before, &factors, cx, progress)?;
    if let (true, None, Some(judge)) = (free.len() > 1, known, &stage.judge) {
        progress("measuring each pass alone");
        let same = factors.clone();
        for &i in &free {
            let is_run = |j: usize| j == i || !free.contains(&j);
            let own = |j: usize| is_run(j).then(|| of_item(found, &same, j));
            let result = stage.run(cx, &own, Some(judge), progress)?;
            let predicted: f64 = result.outcomes.iter().map(|outcome| outcome.predicted).sum();
            let measured = match result.judged {
                Some(judged) => judged,
                None => judge.compare(&result.model)?.error,
            };
            if predicted > 0.0 && measured > 0.0 && measured.is_finite() {
                factors[i] = measured * measured / predicted;
            }
        }
        found = price(stage, job, target, before, &factors, cx, progress)?;
    }
    Ok(Landing { price: found, factors })
}

/// The price, in measured error, at which so large a share of the cost `before` is left, or a little less; nothing is measured on
/// the way.
fn price(
    stage: &Stage<'_>,
    job: &Job,
    target: f64,
    before: &Cost,
    factors: &[f64],
    cx: &mut Context,
    progress: &mut dyn FnMut(&str),
) -> Result<Price, ShrinkError> {
    let whole = job.minimize.of(before);
    let bound = cx.bound.clone();
    let mut share = |price: Price, progress: &mut dyn FnMut(&str)| {
        progress("looking for the target");
        let result = stage.run(cx, &|i| Some(of_item(price, factors, i)), None, progress)?;
        Ok::<_, ShrinkError>(job.minimize.of_model(&result.model, &bound) / whole.max(1.0))
    };
    let at = |power: f64| Price::per_byte(libm::pow(10.0, power));
    let (mut low, mut high) = POWERS;
    let least = share(at(high), progress)?;
    if least > target {
        return Err(ShrinkError::OutOfReach { target, least });
    }
    let near = target * (1.0 - NEAR);
    for _ in 0..HALVINGS {
        let middle = f64::midpoint(low, high);
        let found = share(at(middle), progress)?;
        if (near..=target).contains(&found) {
            return Ok(at(middle));
        }
        *(if found > target { &mut low } else { &mut high }) = middle;
    }
    // Where many steps are worth the same price, so many are taken that the next would go beyond the target, and the rest is
    // saved by smaller ones.
    let (mut few, mut many, mut over) = (0, MAX_STEPS, 1.0 - target);
    while many - few > 1 {
        let middle = few.midpoint(many);
        let found = share(Price { steps: middle, ..at(high) }, progress)?;
        if (near..=target).contains(&found) {
            return Ok(Price { steps: middle, ..at(high) });
        }
        if found > target {
            (few, over) = (middle, found - target);
        } else {
            many = middle;
        }
    }
    let filled = Price { steps: few, spare: over * whole, ..at(high) };
    let beyond = Price { steps: many, ..at(high) };
    Ok(if share(filled, progress)? <= target { filled } else { beyond })
}
