//! How much the passes that the budget drives may do.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use xxhash_rust::xxh3::xxh3_64;

use super::{
    ShrinkError,
    stage::{Effort, Stage},
};
use crate::{
    codec::Model,
    pass::{Context, Fidelity, Price},
    pipeline::Outcome,
    verify::{Difference, ROUNDING_BUDGET, Reference},
};

/// The search for a price or a ceiling stops when it knows it to this ratio.
const RATIO: f64 = 1.25;
/// The search for a price stops at an error of this share of what is aimed at.
const NEAR: f64 = 0.97;
/// Prices change at most by this factor before they are bracketed.
const EXPANSION: f64 = 64.0;
/// Prices that are tried at most.
const MAX_STEPS: usize = 24;
/// Ceilings that are tried at most: what they add is little.
const MAX_CEILINGS: usize = 6;
/// Prices and ceilings are looked for this far from the first guess, up and down.
const SPAN: f64 = 1e8;
/// How often a price is raised at which a pass that is measured alone does nothing.
const RAISES: usize = 4;
/// The share of the error that is aimed at from which on what a pass does alone tells what its predictions are worth.
const TELLING: f64 = 0.25;
/// Refits that do not help one after the other, after which no more are tried: that is what few samples lead to.
const MAX_REFUSED: usize = 2;
/// Only of a model whose error is at most so many times what is aimed at does a refit tell of others.
const WITHIN_REACH: f64 = 4.0;
/// Larger errors, and those of mere rounding, are not in proportion to what layers make of them any more.
const PREDICTABLE: f64 = 0.3;
/// How often the passes are measured alone: at the first guess, and at the price that this led to.
const CALIBRATIONS: usize = 2;

/// The search for the greatest price inside the budget: one price for every lossy pass and layer, which at the joint
/// optimum all pay equally for a byte.
pub(super) struct Search<'a> {
    stage: &'a Stage<'a>,
    cx: &'a mut Context,
    reference: &'a Reference,
    /// Measured over predicted error, squared, of each item alone.
    factors: Vec<f64>,
    /// The same of all items together in the last step.
    correction: f64,
    /// Predicted and measured errors of the steps that say something about predictions.
    steps: Vec<(f64, f64)>,
    /// What came of each model that was tried, by the hash of its bytes: different prices often lead to one model.
    seen: BTreeMap<u64, Difference>,
    tried: usize,
    /// The error that is aimed at.
    aim: f64,
    /// The least error that was measured of what costs less than the start, with the share of the cost that is left there.
    closest: Option<(f64, f64)>,
    /// Refits in a row that did not help, of models that were not far beyond that.
    refused: usize,
    /// The items that, each alone, lead to a refit.
    refitted: BTreeSet<usize>,
    /// What the start costs of what is to be saved, and the cheapest model inside the budget.
    whole: f64,
    least: Option<f64>,
}

/// How far predicted errors were from measured ones, over the steps of a search.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Predictions {
    /// How many steps that led to different models, of errors below 0.3.
    pub steps: usize,
    /// The factor between both in the median.
    pub median: f64,
    /// The largest.
    pub worst: f64,
}

/// A model that the search tried.
pub(super) struct Trial {
    pub(super) model: Model,
    pub(super) outcomes: Vec<Outcome>,
    difference: Difference,
    /// What it costs of what is to be saved.
    cost: f64,
    /// What each item was allowed, by its own prediction.
    prices: Vec<Price>,
}

/// A price or ceiling, and the error that it led to; infinite where that is not known.
#[derive(Clone, Copy, Debug)]
struct Point {
    at: f64,
    error: f64,
}

impl Point {
    /// The factor by which the price leads to `aim` if the squared error is in proportion to it.
    fn towards(self, aim: f64) -> f64 {
        let factor = (aim / self.error.max(aim * 1e-3)).powi(2);
        if factor > 0.0 { factor } else { EXPANSION.recip() }
    }

    /// The price at which the error is `aim` if it is a power of the price through both points, kept away from their ends.
    fn between(self, other: Self, aim: f64) -> f64 {
        let (begin, width) = (self.at.ln(), (other.at / self.at).ln());
        let share = (aim / self.error).ln() / (other.error / self.error).ln();
        let share = if share.is_finite() && other.error.is_finite() { share.clamp(0.15, 0.85) } else { 0.5 };
        (begin + share * width).exp()
    }
}

/// Says what the search is at.
type Progress<'p> = &'p mut dyn FnMut(&str);
/// Whether a difference is inside the budget.
type Allowed<'p> = &'p dyn Fn(&Difference) -> bool;

/// The smallest model inside the budget so far.
struct Best<'p> {
    allowed: Allowed<'p>,
    /// The error above which nothing is allowed.
    limit: f64,
    trial: Option<Trial>,
}

impl Trial {
    /// Whether any lossy pass did anything.
    pub(super) fn did_something(&self) -> bool {
        self.outcomes.iter().any(|outcome| outcome.fidelity == Fidelity::Lossy && outcome.did_something())
    }

    /// The error that its passes predict, squared.
    fn predicted(&self) -> f64 {
        self.outcomes.iter().map(|outcome| outcome.predicted).sum()
    }
}

impl Best<'_> {
    /// Keeps `trial` if it is inside the budget and the smallest so far; says whether it is inside.
    fn offer(&mut self, trial: Trial) -> bool {
        let good = (self.allowed)(&trial.difference);
        if good && self.trial.as_ref().is_none_or(|best| trial.cost < best.cost) {
            self.trial = Some(trial);
        }
        good
    }
}

impl<'a> Search<'a> {
    pub(super) fn new(stage: &'a Stage<'a>, cx: &'a mut Context, reference: &'a Reference) -> Self {
        let (factors, seen) = (vec![1.0; stage.items.len()], BTreeMap::new());
        let whole = cx.minimize.of_model(&stage.start.0, &cx.bound);
        let refitted = BTreeSet::new();
        Self {
            stage,
            cx,
            reference,
            factors,
            correction: 1.0,
            steps: Vec::new(),
            seen,
            tried: 0,
            aim: 0.0,
            closest: None,
            refused: 0,
            refitted,
            whole,
            least: None,
        }
    }

    /// The least error that was measured of what costs less than the start, with the share of the cost that is left there.
    pub(super) fn closest(&self) -> Option<(f64, f64)> {
        self.closest
    }

    /// How far the errors that were predicted were from those that were measured; `None` where there was nothing to predict.
    pub(super) fn predictions(&self) -> Option<Predictions> {
        let ratio = |&(predicted, measured): &(f64, f64)| (predicted / measured).max(measured / predicted);
        let mut ratios: Vec<f64> = self.steps.iter().map(ratio).collect();
        ratios.sort_by(f64::total_cmp);
        let (median, worst) = (*ratios.get(ratios.len() / 2)?, *ratios.last()?);
        Some(Predictions { steps: ratios.len(), median, worst })
    }

    /// The smallest model found inside the budget, if there is any besides the start.
    pub(super) fn best(
        &mut self,
        allowed: Allowed<'_>,
        (aim, budget): (f64, f64),
        progress: Progress<'_>,
    ) -> Result<Option<Trial>, ShrinkError> {
        self.aim = aim;
        let mut best = Best { allowed, limit: budget, trial: None };
        // The whole budget for the whole file: the right order of magnitude.
        let mut price = budget * budget / self.whole.max(1.0);
        let free: Vec<_> = (0..self.stage.items.len()).filter(|&i| self.stage.items[i].is_free()).collect();
        for _ in 0..if free.len() > 1 { CALIBRATIONS } else { 1 } {
            if free.len() > 1 {
                self.calibrate(&free, price, progress)?;
            }
            // What one number of measured error is in the predicted error of each item.
            let factors = self.factors.clone();
            let all = |price: f64| factors.iter().map(|factor| Price::per_byte(price / factor)).collect();
            price = self.climb((price, MAX_STEPS), aim, &all, &mut best, progress)?;
        }
        // What is left of the budget goes to one pass after another: each alone, if there is nothing yet, then on top of what the
        // others did.
        // A refit at each step is too much work for what an item gains that leads to one.
        let none = vec![Price::default(); self.stage.items.len()];
        let plain: Vec<_> = free.iter().copied().filter(|i| !self.refitted.contains(i)).collect();
        let is_vain = !best.trial.as_ref().is_some_and(Trial::did_something);
        if free.len() > 1 && is_vain {
            for &i in &plain {
                self.ceiling(i, &none, aim, &mut best, progress)?;
            }
        }
        for i in plain {
            let prices = best.trial.as_ref().map_or(&none, |trial| &trial.prices).clone();
            self.ceiling(i, &prices, aim, &mut best, progress)?;
        }
        Ok(best.trial)
    }

    /// Looks for the greatest number that, as the prices that `prices` makes of it, stays inside the budget, from a first
    /// guess, in so many steps at most. The squared error is about a power of it: each next one is where that power, through
    /// the last two, meets the aim. Answers that number, or a smaller one if nothing is inside.
    fn climb(
        &mut self,
        (guess, most): (f64, usize),
        aim: f64,
        prices: &dyn Fn(f64) -> Vec<Price>,
        best: &mut Best<'_>,
        progress: Progress<'_>,
    ) -> Result<f64, ShrinkError> {
        let (mut low, mut high): (Option<Point>, Option<Point>) = (None, None);
        let mut at = guess;
        for _ in 0..most {
            let (good, error) = self.attempt(&prices(at), best, progress)?;
            let point = Point { at, error };
            *(if good { &mut low } else { &mut high }) = Some(point);
            at = match (low, high) {
                (Some(low), _) if low.error >= aim * NEAR && low.error <= aim => break,
                (Some(low), None) if low.at >= guess * SPAN => break,
                (None, Some(high)) if high.at <= guess / SPAN => break,
                (Some(low), None) => low.at * low.towards(aim).clamp(2.0, EXPANSION),
                (None, Some(high)) => high.at * high.towards(aim).clamp(EXPANSION.recip(), 0.5),
                (Some(low), Some(high)) if high.at / low.at <= RATIO => break,
                (Some(low), Some(high)) => low.between(high, aim),
                (None, None) => break,
            };
        }
        Ok(low.map_or(at, |low| low.at))
    }

    /// Looks for the highest ceiling of item `i` inside the budget while the others keep to `prices`: what no price
    /// reaches, since the saving is too small for its error wherever an item stands alone, a ceiling does.
    fn ceiling(
        &mut self,
        i: usize,
        prices: &[Price],
        aim: f64,
        best: &mut Best<'_>,
        progress: Progress<'_>,
    ) -> Result<(), ShrinkError> {
        let with = |ceiling: f64| {
            let mut prices = prices.to_vec();
            prices[i] = Price { ceiling, ..Price::per_byte(f64::INFINITY) };
            prices
        };
        self.climb((aim * aim / self.factors[i], MAX_CEILINGS), aim, &with, best, progress).map(drop)
    }

    /// Tries what each item does at its price; says whether it is inside the budget, and the error.
    fn attempt(
        &mut self,
        prices: &[Price],
        best: &mut Best<'_>,
        progress: Progress<'_>,
    ) -> Result<(bool, f64), ShrinkError> {
        let trial = self.measure(prices, &[], best.limit, progress)?;
        let error = trial.difference.error;
        let good = best.offer(trial);
        self.least = best.trial.as_ref().map(|trial| trial.cost);
        Ok((good, error))
    }

    /// Measures each free item alone at one price: only then are the predictions of different passes worth the same.
    fn calibrate(&mut self, free: &[usize], price: f64, progress: Progress<'_>) -> Result<(), ShrinkError> {
        for &i in free {
            let others = free.iter().filter(|&&j| j != i).copied().collect::<Vec<_>>();
            // An item that does nothing yet, since its first step is a large one, or what hardly counts, is measured at a price
            // at which it does.
            let mut price = price;
            for _ in 0..RAISES {
                let prices = vec![Price::per_byte(price / self.factors[i]); self.stage.items.len()];
                let trial = self.measure(&prices, &others, f64::INFINITY, progress)?;
                let (predicted, measured) = (trial.predicted(), trial.difference.error.powi(2));
                if predicted > 0.0 && measured.is_finite() && measured > 0.0 {
                    self.factors[i] *= measured / predicted;
                }
                let telling = (self.aim * TELLING).powi(2);
                if predicted > 0.0 && (measured >= telling || !measured.is_finite()) {
                    break;
                }
                price *= if predicted > 0.0 { (telling / measured).clamp(2.0, EXPANSION) } else { EXPANSION };
            }
        }
        // What all of them together were off by was another matter.
        self.correction = 1.0;
        Ok(())
    }

    /// Runs all items but those `left_out`, each at its price, and measures.
    fn measure(
        &mut self,
        prices: &[Price],
        left_out: &[usize],
        limit: f64,
        progress: Progress<'_>,
    ) -> Result<Trial, ShrinkError> {
        self.tried += 1;
        let share = |cost: f64| format!(", {:.1} % of the cost so far", cost / self.whole.max(1.0) * 100.0);
        progress(&format!("search step {}{}", self.tried, self.least.map(share).unwrap_or_default()));
        let own = |i: usize| (!left_out.contains(&i)).then_some(prices[i]);
        let judge = Some(self.reference).filter(|_| self.refused < MAX_REFUSED);
        let mut result = self.stage.run(self.cx, &own, (judge, Effort::Most), progress)?;
        match &result.difference {
            _ if result.refitted => self.refused = 0,
            Some(plain) if result.is_new && plain.error <= self.aim * WITHIN_REACH => self.refused += 1,
            _ => {}
        }
        let free = |i: &usize| self.stage.items[*i].is_free() && !left_out.contains(i);
        let mut alone = (0..self.stage.items.len()).filter(free);
        if let (true, Some(i), None) = (result.refitted, alone.next(), alone.next()) {
            self.refitted.insert(i);
        }
        // The search for a price learns from the error above the limit too, and measuring is little beside a refit.
        let limit = if result.refitted { f64::INFINITY } else { limit };
        let difference = match result.difference {
            Some(difference) => difference,
            None => self.difference(&result.model, limit)?,
        };
        let cost = self.cx.minimize.of_model(&result.model, &self.cx.bound);
        let is_lossy = |i: &usize| self.stage.items[*i].fidelity() == Fidelity::Lossy && own(*i).is_some();
        let items = (0..self.stage.items.len()).filter(is_lossy);
        let outcomes = result.outcomes.iter_mut().filter(|outcome| outcome.fidelity == Fidelity::Lossy);
        let correction = if left_out.is_empty() { self.correction } else { 1.0 };
        for (outcome, i) in outcomes.zip(items) {
            outcome.predicted *= self.factors[i] * correction;
        }
        let trial = Trial { model: result.model, outcomes: result.outcomes, difference, cost, prices: prices.to_vec() };
        let (error, share) = (trial.difference.error, trial.cost / self.whole.max(1.0));
        if trial.did_something()
            && share < 1.0
            && error.is_finite()
            && self.closest.is_none_or(|(least, _)| error < least)
        {
            self.closest = Some((error, share));
        }
        if left_out.is_empty() {
            self.compare_to_prediction(&trial);
        }
        Ok(trial)
    }

    /// Notes how far the prediction was from what was measured, and corrects the next one by that.
    fn compare_to_prediction(&mut self, trial: &Trial) {
        let (predicted, measured) = (trial.predicted().sqrt(), trial.difference.error);
        let is_whole = trial.difference.samples == self.reference.samples();
        // Different prices often lead to one model.
        let is_new = self.steps.iter().all(|step| step.1 != measured);
        let range = ROUNDING_BUDGET..PREDICTABLE;
        if is_whole && is_new && range.contains(&measured) && range.contains(&predicted) {
            self.steps.push((predicted, measured));
            self.correction *= (measured / predicted).powi(2);
        }
    }

    /// How `model` differs from the reference; of an error above `limit` no more than that is known.
    fn difference(&mut self, model: &Model, limit: f64) -> Result<Difference, ShrinkError> {
        let key = xxh3_64(&model.encode());
        let is_enough = |known: &&Difference| known.samples == self.reference.samples() || limit.is_finite();
        if let Some(known) = self.seen.get(&key).filter(is_enough) {
            return Ok(known.clone());
        }
        let difference = self.reference.compare_up_to(model, limit)?;
        self.seen.insert(key, difference.clone());
        Ok(difference)
    }
}
