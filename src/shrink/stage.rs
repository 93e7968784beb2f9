//! What lossy passes start from, and how they are run: the passes, then the refit, then the clean-up after them.

use std::sync::{Arc, Mutex, PoisonError};

use globset::GlobSet;
use xxhash_rust::xxh3::xxh3_64;

use super::{Job, ShrinkError};
use crate::{
    analysis::{linear::Linear, moments},
    codec::Model,
    pass::{Context, Fidelity, Price, Yardstick},
    pipeline::{self, Item, Outcome},
    refit::{Fit, Kept, Originals, refit},
    verify::{Difference, Engine, Reference, Samples, Split, Value},
};

/// Samples on which the sensitivity of the model to each layer is measured.
const PROBES: usize = 64;

/// The model that the first lossy pass sees, and what is run on it.
pub(super) struct Stage<'a> {
    /// The model as the items before the first lossy one leave it, and what these did.
    pub(super) start: (Model, Vec<Outcome>),
    /// The items from the first lossy one on.
    pub(super) items: &'a [Item],
    engine: &'a Engine,
    /// The longest vectors whose covariance is taken.
    max_size: usize,
    /// What is left alone.
    keep: GlobSet,
    /// Samples for fitting, and what the original computes on them.
    fit: Vec<Vec<Value>>,
    originals: Originals,
    /// What came of the last refits, by the hash of the model before: different prices often lead to one model.
    refits: Mutex<Vec<(u64, Refit)>>,
    /// Where nothing is searched for: samples for choosing between ways to fit, and then for fitting too.
    choose: Vec<Vec<Value>>,
    /// What the original computes on those, to say whether a refit helps.
    pub(super) judge: Option<Reference>,
}

/// How much is done to bring a model closer to the original.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effort {
    /// As much as tells which of several models is closest.
    Least,
    /// All.
    Most,
}

/// Bytes of models that are kept with what came of refitting them: 256 MB.
const MAX_KEPT: usize = 1 << 28;

/// The model after a refit, whether it was one, and what the judge says of it.
#[derive(Clone)]
struct Refit {
    model: Model,
    helped: bool,
    difference: Option<Difference>,
    /// The error by the judge before its samples were used for fitting too.
    judged: f64,
}

/// What came of running a stage.
pub(super) struct Result {
    pub(super) model: Model,
    pub(super) outcomes: Vec<Outcome>,
    /// Whether layers were fitted to the original.
    pub(super) refitted: bool,
    /// Whether that was tried for the first time.
    pub(super) is_new: bool,
    /// The error by the judge of what was refitted, before its samples were used for fitting too.
    pub(super) judged: Option<f64>,
    /// How the model differs from what the judge knows, but for the rounding of what cleaned up after it was judged.
    pub(super) difference: Option<Difference>,
}

impl<'a> Stage<'a> {
    /// Runs what stands before the first lossy item of `job` on `base`, which is `original` before any pass, and looks at what
    /// the layers then read.
    pub(super) fn new(
        original: &Model,
        base: &Model,
        job: &'a Job,
        samples: &Samples,
        cx: &mut Context,
        progress: &mut dyn FnMut(&str),
    ) -> std::result::Result<Self, ShrinkError> {
        let first = job.items.iter().position(|item| item.fidelity() == Fidelity::Lossy);
        let (before, items) = job.items.split_at(first.unwrap_or(job.items.len()));
        let mut model = base.clone();
        let outcomes = pipeline::run(before, &mut model, cx, Price::default())?;
        let engine = &job.request.engine;
        let real = |part| if samples.random { Vec::new() } else { samples.part(part) };
        let (fit, others) = (real(Split::Fit), real(Split::Search));
        let has_free = job.items.iter().any(Item::is_free);
        if !fit.is_empty() {
            // What was fitted to a few samples is judged by others.
            cx.held_out = Arc::new(moments::collect(engine, &model, &others, job.max_gram_dim, &mut |_| {})?);
            if has_free {
                let few = others.iter().take(PROBES).cloned().collect();
                cx.yardstick = Some(Arc::new(Yardstick::new(engine, &model, few)?));
            }
        }
        if let Some(known) = &job.moments {
            let layers = Linear::all(&model.graph);
            let is_read = |source: &String| layers.iter().any(|layer| layer.source(&model.graph) == *source);
            if !known.keys().any(is_read) {
                return Err(ShrinkError::ForeignMoments);
            }
            cx.moments = Arc::clone(known);
        } else if !fit.is_empty() {
            let count = fit.len();
            let mut tell = |done: usize| progress(&format!("calibrating on sample {done} of {count}"));
            cx.moments = Arc::new(moments::collect(engine, &model, &fit, job.max_gram_dim, &mut tell)?);
        } else {
            cx.prior = Arc::new(moments::prior::of_normalizations(original, &model));
        }
        let choose = if has_free && job.target.is_none() { Vec::new() } else { others };
        let judge =
            if choose.is_empty() { None } else { Some(Reference::before_squashing(engine, original, choose.clone())?) };
        Ok(Self {
            start: (model, outcomes),
            items,
            engine,
            max_size: job.max_gram_dim,
            keep: cx.keep.clone(),
            fit,
            originals: Originals::default(),
            refits: Mutex::default(),
            choose,
            judge,
        })
    }

    /// Runs each item that `price` has a price for; refits if a pass asks for it, `judge` is there and says that it helps.
    pub(super) fn run(
        &self,
        cx: &mut Context,
        price: &dyn Fn(usize) -> Option<Price>,
        (judge, effort): (Option<&Reference>, Effort),
        progress: &mut dyn FnMut(&str),
    ) -> std::result::Result<Result, ShrinkError> {
        let (mut model, mut outcomes) = self.start.clone();
        cx.kept.clear();
        cx.refit = false;
        let last = self.items.iter().rposition(|item| item.fidelity() == Fidelity::Lossy);
        let (mut refitted, mut is_new, mut difference, mut judged) = (false, false, None, None);
        for (i, item) in self.items.iter().enumerate() {
            if let Some(price) = price(i) {
                outcomes.extend(pipeline::run(std::slice::from_ref(item), &mut model, cx, price)?);
            }
            if let (true, true, Some(judge)) = (Some(i) == last, cx.refit && !self.fit.is_empty(), judge) {
                let bytes = model.encode();
                let key = xxh3_64(&bytes) ^ u64::from(effort == Effort::Least);
                let (key, refits) = (key, || self.refits.lock().unwrap_or_else(PoisonError::into_inner));
                let known = refits().iter().find(|(known, _)| *known == key).map(|(_, refit)| refit.clone());
                is_new = known.is_none();
                let refit = match known {
                    Some(known) => known,
                    None => self.refit(&model, &cx.kept, (judge, effort), progress)?,
                };
                if is_new {
                    let mut refits = refits();
                    let most = (MAX_KEPT / bytes.len().max(1)).max(1);
                    let excess = (refits.len() + 1).saturating_sub(most);
                    refits.drain(..excess);
                    refits.push((key, refit.clone()));
                }
                judged = Some(refit.judged);
                Refit { model, helped: refitted, difference, .. } = refit;
            }
        }
        Ok(Result { model, outcomes, refitted, is_new, judged, difference })
    }

    /// Refits `model` where `judge` finds it closer to the original then, and where nothing is searched for gives channels the
    /// mean and deviation that they have there if that is closer still. What minimizes the error of each layer need not do so
    /// for the model (algorithms.md §16), so all are measured.
    fn refit(
        &self,
        model: &Model,
        kept: &Kept,
        (judge, effort): (&Reference, Effort),
        progress: &mut dyn FnMut(&str),
    ) -> std::result::Result<Refit, ShrinkError> {
        let mut run = |model: &Model, ways: &[Fit], originals: &Originals, samples: &[Vec<Value>]| {
            let mut fitted = model.clone();
            for &way in ways {
                let samples = (way, samples, self.max_size, &self.keep);
                refit((self.engine, originals), &self.start.0, &mut fitted, kept, samples, progress)?;
            }
            Ok::<_, ShrinkError>(fitted)
        };
        let (mut ways, mut best) = (&[][..], (model.clone(), judge.compare(model)?));
        let is_chosen = effort == Effort::Most && !self.choose.is_empty();
        let candidates: &[&[Fit]] = if is_chosen {
            &[&[Fit::Weights], &[Fit::Weights, Fit::Statistics], &[Fit::Statistics]]
        } else {
            &[&[Fit::Weights]]
        };
        for candidate in candidates {
            let fitted = match candidate {
                [Fit::Weights, rest @ ..] if ways == [Fit::Weights] => run(&best.0, rest, &self.originals, &self.fit)?,
                _ => run(model, candidate, &self.originals, &self.fit)?,
            };
            let difference = judge.compare(&fitted)?;
            if difference.error <= best.1.error {
                (ways, best) = (candidate, (fitted, difference));
            }
        }
        let judged = best.1.error;
        if ways.is_empty() || !is_chosen {
            let (model, difference) = best;
            return Ok(Refit { model, helped: !ways.is_empty(), difference: Some(difference), judged });
        }
        let all: Vec<_> = self.fit.iter().chain(&self.choose).cloned().collect();
        let model = run(model, ways, &Originals::default(), &all)?;
        Ok(Refit { model, helped: true, difference: None, judged })
    }
}
