//! Pipelines with lossy passes: those of a given strength run as they are, the others as far as the budget allows.

use super::{
    BUDGET_ON_RANDOM, BUDGET_WITH_DATA, Job, Report, ShrinkError, chain, land,
    search::Search,
    stage::{Effort, Stage},
    within,
};
use crate::{
    analysis::{cost::Cost, linear::Linear},
    codec::Model,
    ir::Graph,
    pass::{Context, Fidelity, Price},
    pipeline::Item,
    verify::{Certificate, Difference, ROUNDING_BUDGET, Reference, Samples, Split},
};

/// The search aims between these shares of the budget.
const MARGINS: (f64, f64) = (0.25, 0.9);
/// The share of its multiply-adds below which no pruned convolutional net of the reference experiment answered better than
/// chance when nothing made up for what went (algorithms.md §16: two thirds). With what batch normalizations tell, `fmnist_vgg`
/// keeps 84.0 of 92.6 points there, `fmnist_resnet14` 61, `fmnist_mobilenet` 50 and `fmnist_densenet` 28.
const SURVIVABLE: f64 = 2.0 / 3.0;
/// After a final word above the budget, the search starts over that much lower, at most so many times.
const RETRIES: usize = 4;

/// A job with lossy passes.
pub(super) struct Lossy<'a> {
    /// The model that was read.
    model: &'a Model,
    /// The same before any pass.
    base: &'a Model,
    job: &'a Job,
    samples: &'a Samples,
    /// The outputs of the original on samples that the search does not see.
    last: Reference,
    budget: f64,
    /// The least error of a step of the search that saved something, and the share of the cost that it left.
    closest: Option<(f64, f64)>,
    /// How many results of the search were checked on those samples.
    looks: usize,
    report: &'a mut Report,
    progress: &'a mut dyn FnMut(&str),
}

impl<'a> Lossy<'a> {
    pub(super) fn new(
        model: &'a Model,
        base: &'a Model,
        job: &'a Job,
        samples: &'a Samples,
        report: &'a mut Report,
        progress: &'a mut dyn FnMut(&str),
    ) -> Result<Self, ShrinkError> {
        if let Some(why) = &samples.unrunnable {
            return Err(ShrinkError::Unrunnable(why.clone()));
        }
        if samples.random {
            report.notes.push(
                "the inputs were random, since no --data was given: they are harsher than real ones and show less; \
                 give a few hundred real samples for a smaller file and an error that means something"
                    .to_owned(),
            );
        }
        progress("running the original");
        let last = Reference::before_squashing(&job.request.engine, model, samples.part(Split::Last))?;
        if last.is_flat() {
            return Err(ShrinkError::Flat);
        }
        let budget = job.max_error.unwrap_or(if samples.random { BUDGET_ON_RANDOM } else { BUDGET_WITH_DATA });
        Ok(Self { model, base, job, samples, last, budget, closest: None, looks: 0, report, progress })
    }

    pub(super) fn run(mut self, cx: &mut Context) -> Result<Model, ShrinkError> {
        let stage = Stage::new(self.model, self.base, self.job, self.samples, cx, self.progress)?;
        self.tell_of_priors(&stage.start.0.graph, cx);
        if self.job.chain && stage.items.iter().any(Item::is_free) {
            let links = chain::links(&stage, self.job, &self.report.before, &self.last, cx, self.progress)?;
            self.looks += links.len();
            self.report.chain = links;
        }
        if let Some(target) = self.job.target {
            return self.land(&stage, target, cx);
        }
        let is_given = |i: usize| !stage.items[i].is_free();
        let is_lossy = (0..stage.items.len()).any(|i| is_given(i) && stage.items[i].fidelity() == Fidelity::Lossy);
        let judge = (stage.judge.as_ref(), Effort::Most);
        let left = stage.run(cx, &|i| is_given(i).then(Price::default), judge, self.progress)?;
        self.report.passes = left.outcomes;
        let left = left.model;
        self.warn_of_chance(&left, cx);
        let of_given = self.last.compare(&left)?;
        self.check_given(&of_given, is_lossy)?;
        if self.job.items.iter().any(Item::is_free) {
            self.report.budget = Some(self.budget);
            // Without a budget of its own, what comes on top is measured against what the given strengths left.
            let on_top = is_lossy && self.job.max_error.is_none();
            if let Some((model, difference, did_something)) = self.search(&stage, on_top.then_some(&left), cx)? {
                if !did_something {
                    self.tell_of_nothing();
                }
                self.conclude(difference);
                return Ok(model);
            }
            self.tell_of_nothing();
        } else {
            self.report.budget = self.job.max_error;
        }
        if is_lossy {
            self.conclude(of_given);
        } else {
            self.report.difference = Some(of_given);
        }
        Ok(left)
    }

    /// Finds the price at which the result has the cost that is asked for, runs the passes at it, and checks what was given
    /// beside it.
    fn land(mut self, stage: &Stage<'_>, target: f64, cx: &mut Context) -> Result<Model, ShrinkError> {
        let landing = land::best(stage, (self.job, target), &self.report.before, cx, self.progress)?;
        let judge = (stage.judge.as_ref(), Effort::Most);
        let result = stage.run(cx, &|i| Some(landing.price(i)), judge, self.progress)?;
        self.warn_of_chance(&result.model, cx);
        self.report.passes = result.outcomes;
        self.report.budget = self.job.max_error;
        let difference = self.last.compare(&result.model)?;
        self.check_given(&difference, true)?;
        self.conclude(difference);
        Ok(result.model)
    }

    /// Says so before anything else is done with it if `model` is a convolutional net that was pruned further than such nets
    /// survive without samples.
    fn warn_of_chance(&self, model: &Model, cx: &Context) {
        let is_pruned = self.job.items.iter().any(|item| matches!(item, Item::Pass(step) if step.info.name == "prune"));
        let (before, after) = (&self.report.before, Cost::of(model, &cx.bound));
        let share = after.macs as f64 / before.macs.max(1) as f64;
        if is_pruned && cx.moments.is_empty() && before.nodes.contains_key("Conv") && share < SURVIVABLE {
            let fate =
                if cx.prior.is_empty() { "answer at chance level" } else { "lose 9 to 65 points of their accuracy" };
            (self.job.warn)(&format!(
                "pruning leaves {:.0} % of the multiply-adds, and without samples little makes up for what goes: \
                 convolutional nets {fate} below about {:.0} %; give a few hundred unlabelled samples with --data",
                share * 100.0,
                SURVIVABLE * 100.0
            ));
        }
    }

    /// Says what passes know of what layers read where there are no samples.
    fn tell_of_priors(&mut self, graph: &Graph, cx: &Context) {
        if !cx.moments.is_empty() {
            return;
        }
        let layers = Linear::all(graph);
        let known = layers.iter().filter(|layer| cx.prior.contains_key(&layer.source(graph))).count();
        let known = match known {
            0 => "nothing is known of what layers read without samples: their inputs were taken to be alike".to_owned(),
            known => format!(
                "what {known} of {} layers read was taken from batch normalizations, without samples; the inputs of the others \
                 were taken to be alike",
                layers.len()
            ),
        };
        self.report.notes.push(known);
    }

    /// Says that the budget allows nothing, and what it would take.
    fn tell_of_nothing(&mut self) {
        let closest = self.closest.filter(|(error, _)| *error > self.budget);
        let closest = closest.map(|(error, share)| {
            format!(
                "; the closest left {:.1} % of the cost, at an error of {error:.3} on the samples of the search: more samples \
                 make up for more, and a larger --max-error allows more",
                share * 100.0
            )
        });
        let closest = closest.unwrap_or_default();
        let flips = self.job.max_flips.map(|most| format!(" and changes of {most} of the answers"));
        let flips = flips.unwrap_or_default();
        self.report.notes.push(format!("nothing could be removed within an error of {}{flips}{closest}", self.budget));
    }

    /// Reports the final word of a lossy result, and what it says about inputs that nobody has seen.
    fn conclude(&mut self, difference: Difference) {
        let certificate = if self.samples.random {
            Err("no certificate: random inputs say nothing about real ones".to_owned())
        } else if self.looks > 1 {
            let looks = self.looks;
            Err(format!(
                "no certificate: {looks} results were checked on the samples of the final word, one after another"
            ))
        } else {
            Certificate::of(&difference)
        };
        match certificate {
            Ok(certificate) => self.report.certificate = Some(certificate),
            Err(why) => self.report.notes.push(why),
        }
        self.report.difference = Some(difference);
    }

    /// Checks what passes of a given strength did.
    fn check_given(&mut self, difference: &Difference, is_lossy: bool) -> Result<(), ShrinkError> {
        if !difference.error.is_finite() {
            return Err(ShrinkError::Incomparable);
        }
        within(difference.error, self.job.max_error.unwrap_or(f64::INFINITY))?;
        match self.job.max_flips {
            Some(_) if !difference.classifies => return Err(ShrinkError::NoClasses),
            Some(budget) if difference.flips > budget => {
                return Err(ShrinkError::Flips { found: difference.flips, budget });
            }
            _ => {}
        }
        if !is_lossy {
            return within(difference.rounding, ROUNDING_BUDGET);
        }
        if self.job.max_error.is_none() && difference.error > self.budget {
            self.report.notes.push(format!(
                "what was asked for makes an error of {:.4}, above the default budget of {}",
                difference.error, self.budget
            ));
        }
        Ok(())
    }

    /// Searches for the smallest model inside the budget by the error against what given strengths left, or else against
    /// the original, and checks it on samples that the search did not see; also how it differs from the original, and whether any
    /// lossy pass did anything.
    fn search(
        &mut self,
        stage: &Stage<'_>,
        given: Option<&Model>,
        cx: &mut Context,
    ) -> Result<Option<(Model, Difference, bool)>, ShrinkError> {
        let reference =
            |from, part| Reference::before_squashing(&self.job.request.engine, from, self.samples.part(part));
        let seen = reference(given.unwrap_or(self.model), Split::Search)?;
        let given = given.map(|given| reference(given, Split::Last)).transpose()?;
        if seen.is_flat() || given.as_ref().is_some_and(Reference::is_flat) {
            return Err(ShrinkError::Flat);
        }
        let last = given.as_ref().unwrap_or(&self.last);
        let (job, budget) = (self.job, self.budget);
        let allowed =
            |d: &Difference, budget: f64| d.error <= budget && job.max_flips.is_none_or(|most| d.flips <= most);
        // An error measured on n samples is uncertain by about one in √n, and whoever judges next has others: of random
        // ones, perhaps a handful.
        let doubts = if self.samples.random { 2.0 } else { 1.0 };
        let margin = (1.0 - doubts / (seen.samples() as f64).sqrt()).clamp(MARGINS.0, MARGINS.1);
        let (mut aim, limit) = (budget * margin, budget * f64::midpoint(margin, 1.0));
        let mut search = Search::new(stage, cx, &seen);
        for _ in 0..RETRIES {
            let best = search.best(&|d| allowed(d, aim), (aim, budget), self.progress)?;
            self.report.predictions = search.predictions();
            self.closest = search.closest();
            let Some(trial) = best else { break };
            (self.progress)("verifying on samples that the search did not see");
            let difference = last.compare(&trial.model)?;
            self.looks += 1;
            if allowed(&difference, limit) {
                let did_something = trial.did_something();
                self.report.passes = trial.outcomes;
                let difference = if given.is_some() { self.last.compare(&trial.model)? } else { difference };
                return Ok(Some((trial.model, difference, did_something)));
            }
            self.report.notes.push(format!(
                "a smaller model gave an error of {:.4} and other top classes on {:.1} % of the samples that the search \
                 did not see; searched again, further below, and checked on these samples again",
                difference.error,
                difference.flips * 100.0
            ));
            aim *= 0.8 * (limit / difference.error).min(1.0);
        }
        Ok(None)
    }
}
