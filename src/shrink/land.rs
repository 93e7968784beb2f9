//! Finding the price at which a result has the cost that is asked for.

use super::{
    Job, ShrinkError,
    stage::{Effort, Stage},
};
use crate::{
    analysis::cost::Cost,
    pass::{Context, Fidelity, Preference, Price},
};

/// The search stops when the cost is at most this much below what is asked for.
const NEAR: f64 = 0.005;
/// Prices are looked for between these powers of ten: predicted error for a byte or a multiply-add.
const POWERS: (f64, f64) = (-24.0, 6.0);
/// Halvings of that range, after which a price is known to a hundredth.
const HALVINGS: usize = 14;
/// Predictions are corrected by this factor at most: where a pass alone does almost nothing, what is measured says little.
const TRUSTED: f64 = 8.0;
/// How much dearer an error of an item is made, to see whether the others do better then, and how often.
const DAMPED: f64 = 4.0;
const DAMPINGS: usize = 3;
/// More steps than any model has channels.
const MAX_STEPS: usize = 1 << 20;

/// Prices of the items of a stage that make a result of a given cost.
#[derive(Clone)]
pub(super) struct Landing {
    price: Price,
    shares: Shares,
}

/// How the items of a stage share a price.
#[derive(Clone)]
struct Shares {
    /// Measured over predicted error, squared, of each item alone.
    factors: Vec<f64>,
    /// The item that saves what is to be saved on top.
    last: Option<usize>,
    /// The item that does all by itself, if one does.
    alone: Option<usize>,
    /// The item that prefers a kind of change, and which.
    prefers: Option<(usize, Preference)>,
}

impl Landing {
    /// What item `i` may do.
    pub(super) fn price(&self, i: usize) -> Price {
        self.shares.of_item(self.price, i)
    }
}

impl Shares {
    /// A price in measured error, as item `i` predicts errors.
    fn of_item(&self, price: Price, i: usize) -> Price {
        if self.alone.is_some_and(|alone| alone != i) {
            return Price::default();
        }
        let spare = if self.last == Some(i) { price.spare } else { 0.0 };
        let prefers = self.prefers.filter(|(item, _)| *item == i).map(|(_, preference)| preference);
        Price { per_byte: price.per_byte / self.factors[i], spare, prefers, ..price }
    }
}

/// The best of a few ways to reach a target: as [`land`] finds it; of several items, where one does all by itself, and where one does
/// less than what it does alone speaks for; of one that has kinds of changes, where it prefers one of them. Which of them is closest to
/// the original is told after the refit, by samples that it was not fitted to.
pub(super) fn best(
    stage: &Stage<'_>,
    (job, target): (&Job, f64),
    before: &Cost,
    cx: &mut Context,
    progress: &mut dyn FnMut(&str),
) -> Result<Landing, ShrinkError> {
    let landing = land(stage, (job, target), before, None, cx, progress)?;
    let free: Vec<_> = (0..stage.items.len()).filter(|&i| stage.items[i].is_free()).collect();
    let kinds: usize = free.iter().map(|&i| stage.items[i].kinds()).sum();
    if stage.judge.is_none() || free.len() < 2 && kinds == 0 {
        return Ok(landing);
    }
    let mut tried = Tried { least: f64::INFINITY, best: landing.clone() };
    let shares = landing.shares.clone();
    let first = tried.judge(stage, landing, cx, progress)?;
    let mut attempt = |shares: Shares, cx: &mut Context, progress: &mut dyn FnMut(&str)| match price(
        stage, job, target, before, &shares, cx, progress,
    ) {
        Ok(price) => tried.judge(stage, Landing { price, shares }, cx, progress),
        Err(ShrinkError::OutOfReach { .. }) => Ok(f64::INFINITY),
        Err(error) => Err(error),
    };
    if let [i] = free[..] {
        let preference = |kind: usize| [false, true].map(|only| Preference { kind, only });
        for preference in (0..stage.items[i].kinds()).flat_map(preference) {
            attempt(Shares { prefers: Some((i, preference)), ..shares.clone() }, cx, progress)?;
        }
        return Ok(tried.best);
    }
    for &i in &free {
        attempt(Shares { alone: Some(i), last: Some(i), ..shares.clone() }, cx, progress)?;
    }
    for &i in &free {
        let (mut shares, mut last, mut helped) = (shares.clone(), first, false);
        for _ in 0..DAMPINGS {
            shares.factors[i] *= DAMPED;
            let error = attempt(shares.clone(), cx, progress)?;
            if error >= last {
                break;
            }
            (last, helped) = (error, true);
        }
        if helped {
            break;
        }
    }
    Ok(tried.best)
}

/// The best of the ways that were tried so far.
struct Tried {
    /// Its error.
    least: f64,
    best: Landing,
}

impl Tried {
    /// Says what error one more way leads to.
    fn judge(
        &mut self,
        stage: &Stage<'_>,
        landing: Landing,
        cx: &mut Context,
        progress: &mut dyn FnMut(&str),
    ) -> Result<f64, ShrinkError> {
        let judge = (stage.judge.as_ref(), Effort::Least);
        let result = stage.run(cx, &|i| Some(landing.price(i)), judge, progress)?;
        let error = result.judged.unwrap_or(f64::INFINITY);
        if error < self.least {
            *self = Self { least: error, best: landing };
        }
        Ok(error)
    }
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
    let fresh =
        || Shares { factors: vec![1.0; stage.items.len()], last: free.last().copied(), alone: None, prefers: None };
    let mut shares = known.map_or_else(fresh, |known| known.shares.clone());
    // What the model minds is measured where a pass first asks for it: on a model that others have not taken to pieces.
    stage.run(cx, &|_| Some(Price::default()), (None, Effort::Least), progress)?;
    let mut found = price(stage, job, target, before, &shares, cx, progress)?;
    // What is fixed adds an error of its own to each of them, so then their predictions stay as they are.
    let is_alone = (0..stage.items.len()).all(|i| free.contains(&i) || stage.items[i].fidelity() != Fidelity::Lossy);
    if let (true, None, Some(judge)) = (free.len() > 1 && is_alone, known, &stage.judge) {
        progress("measuring each pass alone");
        let same = shares.clone();
        for &i in &free {
            let is_run = |j: usize| j == i || !free.contains(&j);
            let own = |j: usize| is_run(j).then(|| same.of_item(found, j));
            let result = stage.run(cx, &own, (Some(judge), Effort::Least), progress)?;
            let predicted: f64 = result.outcomes.iter().map(|outcome| outcome.predicted).sum();
            let measured = match result.judged {
                Some(judged) => judged,
                None => judge.compare(&result.model)?.error,
            };
            if predicted > 0.0 && measured > 0.0 && measured.is_finite() {
                shares.factors[i] = (measured * measured / predicted).clamp(TRUSTED.recip(), TRUSTED);
            }
        }
        found = price(stage, job, target, before, &shares, cx, progress)?;
    }
    Ok(Landing { price: found, shares })
}

/// The price, in measured error, at which so large a share of the cost `before` is left, or a little less; nothing is measured on
/// the way.
fn price(
    stage: &Stage<'_>,
    job: &Job,
    target: f64,
    before: &Cost,
    shares: &Shares,
    cx: &mut Context,
    progress: &mut dyn FnMut(&str),
) -> Result<Price, ShrinkError> {
    let whole = job.minimize.of(before);
    let bound = cx.bound.clone();
    let mut share = |price: Price, progress: &mut dyn FnMut(&str)| {
        progress("looking for the target");
        let result = stage.run(cx, &|i| Some(shares.of_item(price, i)), (None, Effort::Least), progress)?;
        Ok::<_, ShrinkError>(job.minimize.of_model(&result.model, &bound) / whole.max(1.0))
    };
    let at = |power: f64| Price::per_byte(libm::pow(10.0, power));
    let (mut low, mut high) = POWERS;
    let least = share(at(high), progress)?;
    if least > target {
        return Err(ShrinkError::OutOfReach { target, least });
    }
    let (near, mut above) = (target * (1.0 - NEAR), 1.0);
    for _ in 0..HALVINGS {
        let middle = f64::midpoint(low, high);
        let found = share(at(middle), progress)?;
        if (near..=target).contains(&found) {
            return Ok(at(middle));
        }
        if found > target {
            (low, above) = (middle, found);
        } else {
            high = middle;
        }
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
    // What is missing may also be saved on top of all that a lower price allows.
    let ways = [
        Price { steps: few, spare: over * whole, ..at(high) },
        Price { spare: (above - target) * whole, ..at(low) },
        Price { steps: many, ..at(high) },
    ];
    closest(ways, target, &mut |way| share(way, progress))
}

/// The one of `ways` that leaves most of what `target` allows, or else the last.
fn closest(
    ways: [Price; 3],
    target: f64,
    share: &mut dyn FnMut(Price) -> Result<f64, ShrinkError>,
) -> Result<Price, ShrinkError> {
    let mut best = (0.0, ways[2]);
    for way in ways {
        let found = share(way)?;
        if found <= target && found > best.0 {
            best = (found, way);
        }
    }
    Ok(best.1)
}
