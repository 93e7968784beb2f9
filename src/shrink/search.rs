//! How much the passes that the budget drives may do.

use std::collections::BTreeMap;

use xxhash_rust::xxh3::xxh3_64;

use super::ShrinkError;
use crate::{
    analysis::cost::Cost,
    codec::Model,
    pass::{Context, Price},
    pipeline::{self, Item, Outcome},
    verify::{Difference, Reference},
};

/// The search for a price or a ceiling stops when it knows it to this ratio.
const RATIO: f64 = 1.25;
/// Prices are looked for this far from the first guess, up and down.
const PRICE_SPAN: f64 = 1e8;
/// Ceilings are looked for this far from the squared budget, up and down.
const CEILING_SPAN: f64 = 100.0;
/// How often the passes are measured alone: at the first guess, and at the price that this led to.
const CALIBRATIONS: usize = 2;

/// The search for the greatest price inside the budget: one price for every lossy pass and layer, which at the joint
/// optimum all pay equally for a byte.
pub(super) struct Search<'a> {
    /// The model as the items before the first free one leave it, and what these did.
    start: (Model, Vec<Outcome>),
    /// The items from the first free one on.
    items: &'a [Item],
    cx: &'a mut Context,
    reference: &'a Reference,
    /// Measured over predicted error, squared, of each item alone.
    factors: Vec<f64>,
    /// What came of each model that was tried, by the hash of its bytes: different prices often lead to one model.
    seen: BTreeMap<u64, Difference>,
    tried: usize,
    /// The bytes of the start, and of the smallest model inside the budget.
    bytes: usize,
    smallest: Option<usize>,
}

/// A model that the search tried.
pub(super) struct Trial {
    pub(super) model: Model,
    pub(super) outcomes: Vec<Outcome>,
    /// The price for each byte, before any ceiling.
    pub(super) price: f64,
    difference: Difference,
    bytes: usize,
    /// What each item was allowed.
    prices: Vec<Price>,
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

impl Best<'_> {
    /// Keeps `trial` if it is inside the budget and the smallest so far; says whether it is inside.
    fn offer(&mut self, trial: Trial) -> bool {
        let good = (self.allowed)(&trial.difference);
        if good && self.trial.as_ref().is_none_or(|best| trial.bytes < best.bytes) {
            self.trial = Some(trial);
        }
        good
    }
}

impl<'a> Search<'a> {
    pub(super) fn new(
        base: &Model,
        items: &'a [Item],
        cx: &'a mut Context,
        reference: &'a Reference,
    ) -> Result<Self, ShrinkError> {
        let (before, items) = items.split_at(items.iter().position(Item::is_free).unwrap_or(items.len()));
        let mut model = base.clone();
        let outcomes = pipeline::run(before, &mut model, cx, Price::default())?;
        let factors = vec![1.0; items.len()];
        let bytes = Cost::bytes(&model);
        let seen = BTreeMap::new();
        Ok(Self { start: (model, outcomes), items, cx, reference, factors, seen, tried: 0, bytes, smallest: None })
    }

    /// The smallest model found inside the budget, if there is any besides the start.
    pub(super) fn best(
        &mut self,
        allowed: Allowed<'_>,
        budget: f64,
        progress: Progress<'_>,
    ) -> Result<Option<Trial>, ShrinkError> {
        let mut best = Best { allowed, limit: budget, trial: None };
        // The whole budget for the whole file: the right order of magnitude.
        let mut price = budget * budget / self.bytes.max(1) as f64;
        let free: Vec<_> = (0..self.items.len()).filter(|&i| self.items[i].is_free()).collect();
        for _ in 0..if free.len() > 1 { CALIBRATIONS } else { 1 } {
            if free.len() > 1 {
                self.calibrate(&free, price, progress)?;
            }
            price = self.price(price, &mut best, progress)?;
        }
        // What is left of the budget goes to one pass after another: each alone, then on top of what the others did.
        let none = vec![Price::default(); self.items.len()];
        if free.len() > 1 {
            for &i in &free {
                self.ceiling(i, &none, (price, budget), &mut best, progress)?;
            }
        }
        for &i in &free {
            let prices = best.trial.as_ref().map_or(&none, |trial| &trial.prices).clone();
            self.ceiling(i, &prices, (price, budget), &mut best, progress)?;
        }
        Ok(best.trial)
    }

    /// Bisects for the greatest price inside the budget, from a first guess.
    fn price(&mut self, guess: f64, best: &mut Best<'_>, progress: Progress<'_>) -> Result<f64, ShrinkError> {
        let mut attempt = |per_byte: f64| {
            let prices = vec![Price::per_byte(per_byte); self.items.len()];
            self.attempt(per_byte, &prices, best, progress)
        };
        let (mut low, mut high) = (guess, guess);
        if attempt(guess)? {
            while high < guess * PRICE_SPAN {
                high *= 8.0;
                if !attempt(high)? {
                    break;
                }
                low = high;
            }
        } else {
            while low > guess / PRICE_SPAN {
                low /= 8.0;
                if attempt(low)? {
                    break;
                }
                high = low;
            }
        }
        while high / low > RATIO {
            let middle = (low * high).sqrt();
            if attempt(middle)? {
                low = middle;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }

    /// Bisects for the highest ceiling of item `i` inside the budget while the others keep to `prices`: what no price
    /// reaches, since the saving is too small for its error wherever an item stands alone, a ceiling does.
    fn ceiling(
        &mut self,
        i: usize,
        prices: &[Price],
        (price, budget): (f64, f64),
        best: &mut Best<'_>,
        progress: Progress<'_>,
    ) -> Result<(), ShrinkError> {
        let (mut floor, mut top) = (budget * budget / CEILING_SPAN, budget * budget * CEILING_SPAN);
        while top / floor > RATIO {
            let ceiling = (floor * top).sqrt();
            let mut prices = prices.to_vec();
            prices[i] = Price { per_byte: f64::INFINITY, ceiling };
            if self.attempt(price, &prices, best, progress)? {
                floor = ceiling;
            } else {
                top = ceiling;
            }
        }
        Ok(())
    }

    /// Tries what each item does at its price; says whether it is inside the budget.
    fn attempt(
        &mut self,
        price: f64,
        prices: &[Price],
        best: &mut Best<'_>,
        progress: Progress<'_>,
    ) -> Result<bool, ShrinkError> {
        let good = best.offer(self.measure(price, prices, &[], best.limit, progress)?);
        self.smallest = best.trial.as_ref().map(|trial| trial.bytes);
        Ok(good)
    }

    /// Measures each free item alone at one price: only then are the predictions of different passes worth the same.
    fn calibrate(&mut self, free: &[usize], price: f64, progress: Progress<'_>) -> Result<(), ShrinkError> {
        for &i in free {
            let others = free.iter().filter(|&&j| j != i).copied().collect::<Vec<_>>();
            let prices = vec![Price::per_byte(price); self.items.len()];
            let trial = self.measure(price, &prices, &others, f64::INFINITY, progress)?;
            let predicted: f64 = trial.outcomes.iter().map(|outcome| outcome.predicted).sum();
            let measured = trial.difference.error.powi(2);
            if predicted > 0.0 && measured.is_finite() && measured > 0.0 {
                self.factors[i] = measured / predicted;
            }
        }
        Ok(())
    }

    /// Runs all items but those `left_out`, each at its price, and measures.
    fn measure(
        &mut self,
        price: f64,
        prices: &[Price],
        left_out: &[usize],
        limit: f64,
        progress: Progress<'_>,
    ) -> Result<Trial, ShrinkError> {
        self.tried += 1;
        let share = |bytes: usize| format!(", {:.1} % of the bytes so far", bytes as f64 / self.bytes as f64 * 100.0);
        progress(&format!("search step {}{}", self.tried, self.smallest.map(share).unwrap_or_default()));
        let (mut model, mut outcomes) = self.start.clone();
        for (i, item) in self.items.iter().enumerate().filter(|(i, _)| !left_out.contains(i)) {
            let factor = self.factors[i];
            let own = Price { per_byte: prices[i].per_byte / factor, ceiling: prices[i].ceiling / factor };
            outcomes.extend(pipeline::run(std::slice::from_ref(item), &mut model, self.cx, own)?);
        }
        let difference = self.difference(&model, limit)?;
        let bytes = Cost::bytes(&model);
        Ok(Trial { model, outcomes, price, difference, bytes, prices: prices.to_vec() })
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
