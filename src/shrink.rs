//! The main job: run the passes, find how much the budget allows, and prove the result before anybody writes it.

mod search;

use serde::Serialize;

use self::search::{Search, is_free};
use crate::{
    analysis::cost::Cost,
    codec::Model,
    pass::{Context, Fidelity, Price},
    pipeline::{self, Item, Outcome, PipelineError},
    verify::{Cannot, DataError, Difference, ROUNDING_BUDGET, Reference, Request, Samples, Split, compare_regions},
};

/// The default budget with a person's samples.
pub const BUDGET_WITH_DATA: f64 = 0.05;
/// The default budget on random inputs, which are harsher: what a net does with noise depends on directions that real
/// inputs do not use.
pub const BUDGET_ON_RANDOM: f64 = 0.10;
/// The search aims this far below the budget, since its samples are not those of the final word.
const MARGIN: f64 = 0.9;
/// After a final word above the budget, the search starts over that much lower, at most so many times.
const RETRIES: usize = 4;

/// What a person asked for.
#[derive(Debug)]
pub struct Job {
    /// The passes.
    pub items: Vec<Item>,
    /// Where samples come from.
    pub request: Request,
    /// The error budget, if one was given.
    pub max_error: Option<f64>,
    /// The largest share of samples whose top class may change.
    pub max_flips: Option<f64>,
    /// Layers that lossy passes leave alone.
    pub keep: globset::GlobSet,
    /// Constants listed as inputs stay listed.
    pub keep_initializer_inputs: bool,
    /// Whether the result is checked.
    pub verify: bool,
}

/// What was done, and what came of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// The cost of the model that was read.
    pub before: Cost,
    /// The cost of the result.
    pub after: Cost,
    /// What each pass did.
    pub passes: Vec<Outcome>,
    /// How the result differs from the input, on samples that nothing before had seen.
    pub difference: Option<Difference>,
    /// The error budget of lossy passes.
    pub budget: Option<f64>,
    /// The price that the search settled on: predicted error, relative and squared, for each byte saved.
    pub price: Option<f64>,
    /// Whether the samples were random.
    pub random_inputs: bool,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// Why nothing may be written.
#[derive(Debug, thiserror::Error)]
pub enum ShrinkError {
    /// A pass failed.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// The samples do not fit.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The model can't be run.
    #[error("could not verify; use --no-verify to write the result anyway")]
    Cannot(#[from] Cannot),
    /// The model can't be run, for a reason found while the samples were made.
    #[error("could not verify: {0}; use --no-verify to write the result anyway")]
    Unrunnable(String),
    /// The inputs do not exercise any output.
    #[error(
        "could not verify: no output varies over the samples, so that any error would go unseen; \
         give real inputs with --data, or use --no-verify to write the result anyway"
    )]
    Flat,
    /// The result computes something else.
    #[error(
        "the result is not what the input computes: error {found:.2e} where {budget:.2e} is allowed; nothing was written"
    )]
    Differs {
        /// The error that was measured.
        found: f64,
        /// The error that is allowed.
        budget: f64,
    },
}

impl ShrinkError {
    /// Whether the result failed its check or could not be checked, in contrast to not coming about.
    #[must_use]
    pub fn is_verification(&self) -> bool {
        !matches!(self, Self::Pipeline(_) | Self::Data(_))
    }
}

/// Shrinks `model` as `job` says; `progress` is told what is going on.
///
/// # Errors
///
/// When a pass fails, or the result can't be proven to compute the same.
pub fn shrink(model: &Model, job: &Job, progress: &mut dyn FnMut(&str)) -> Result<(Model, Report), ShrinkError> {
    let mut report = Report::default();
    let lossy = job.items.iter().any(|item| fidelity(item) == Fidelity::Lossy);
    progress("preparing samples");
    let samples = if job.verify { Some(Samples::gather(model, &job.request)?) } else { None };
    let mut cx = Context { keep: job.keep.clone(), ..Context::default() };
    if samples.is_none() {
        cx.bound = Samples::likely_shapes(model, &job.request);
    }
    if let Some(samples) = &samples {
        cx.bound.clone_from(&samples.bound);
        report.random_inputs = samples.random;
        report.notes.extend(samples.ignored.iter().map(|name| format!("array `{name}` of the data names no input")));
        report.notes.extend(chosen_shapes(samples));
    }
    report.before = Cost::of(model, &cx.bound);
    let mut base = model.clone();
    if !job.items.is_empty() && !job.keep_initializer_inputs {
        let unlisted = base.graph.unlist_default_values();
        if unlisted > 0 {
            report.notes.push(format!(
                "{unlisted} initializers are no longer listed as inputs, which runtimes need to optimize them; \
                 --keep-initializer-inputs keeps them"
            ));
        }
    }
    let result = match samples {
        Some(samples) if lossy => within_budget(model, &base, job, samples, &mut cx, &mut report, progress)?,
        samples => {
            progress("running passes");
            let mut result = base;
            report.passes = pipeline::run(&job.items, &mut result, &mut cx, Price::default())?;
            if let Some(samples) = samples.filter(|_| result.graph.edits() != model.graph.edits()) {
                progress("verifying");
                report.difference = Some(prove_same(model, &result, job, &samples)?);
                if let Some(why) = &samples.unrunnable {
                    report.notes.push(format!("only what changed was verified, region by region, since {why}"));
                }
            }
            result
        }
    };
    report.after = Cost::of(&result, &cx.bound);
    Ok((result, report))
}

/// Which shapes were taken for open axes.
fn chosen_shapes(samples: &Samples) -> Option<String> {
    let other = samples.other.as_ref()?;
    let spell = |dims: &[usize]| dims.iter().map(ToString::to_string).collect::<Vec<_>>().join("x");
    let each = |(name, dims): (&String, &Vec<usize>)| format!("{name}={} and {}", spell(dims), spell(&other[name]));
    let shapes: Vec<_> = samples.bound.iter().filter(|(name, dims)| other[*name] != **dims).map(each).collect();
    Some(format!("open axes were tried as {}; --shape NAME=DIMS sets what matters to you", shapes.join(", ")))
}

fn fidelity(item: &Item) -> Fidelity {
    match item {
        Item::Simplify => Fidelity::Rounding,
        Item::Pass(step) => step.info.fidelity,
    }
}

/// Checks that only rounding differs.
fn prove_same(model: &Model, result: &Model, job: &Job, samples: &Samples) -> Result<Difference, ShrinkError> {
    let difference = match &samples.unrunnable {
        None => Reference::new(&job.request.engine, model, samples.part(Split::Last))?.compare(result)?,
        Some(_) => compare_regions(&job.request.engine, model, result, &samples.bound)?,
    };
    // Written so that NaN fails.
    if difference.rounding <= ROUNDING_BUDGET {
        Ok(difference)
    } else {
        Err(ShrinkError::Differs { found: difference.rounding, budget: ROUNDING_BUDGET })
    }
}

/// Runs a pipeline with lossy passes as far as the budget allows.
fn within_budget(
    model: &Model,
    base: &Model,
    job: &Job,
    samples: Samples,
    cx: &mut Context,
    report: &mut Report,
    progress: &mut dyn FnMut(&str),
) -> Result<Model, ShrinkError> {
    if let Some(why) = samples.unrunnable {
        return Err(ShrinkError::Unrunnable(why));
    }
    let budget = job.max_error.unwrap_or(if samples.random { BUDGET_ON_RANDOM } else { BUDGET_WITH_DATA });
    report.budget = Some(budget);
    if samples.random {
        report.notes.push(
            "the inputs were random, since no --data was given: they are harsher than real ones and show less; \
             give a few hundred real samples for a smaller file and an error that means something"
                .to_owned(),
        );
    }
    progress("running the original");
    let reference = Reference::before_squashing(&job.request.engine, model, samples.part(Split::Search))?;
    let last = Reference::before_squashing(&job.request.engine, model, samples.part(Split::Last))?;
    if reference.is_flat() || last.is_flat() {
        return Err(ShrinkError::Flat);
    }
    let free = job.items.iter().any(is_free);
    let allowed = |d: &Difference, budget: f64| d.error <= budget && job.max_flips.is_none_or(|most| d.flips <= most);
    let mut aim = budget * MARGIN;
    let mut search = Search::new(base, &job.items, cx, &reference)?;
    for _ in 0..RETRIES {
        let found = if free { search.best(&|d| allowed(d, aim), budget, progress)? } else { Some(search.fixed()?) };
        let Some(trial) = found else { break };
        progress("verifying on samples not seen before");
        let difference = last.compare(&trial.model)?;
        if allowed(&difference, budget) || !free && job.max_error.is_none() && job.max_flips.is_none() {
            if difference.error > budget {
                report.notes.push(format!("the strengths given lead past the default budget of {budget}"));
            }
            report.price = free.then_some(trial.price);
            (report.passes, report.difference) = (trial.outcomes, Some(difference));
            return Ok(trial.model);
        }
        if !free {
            return Err(ShrinkError::Differs { found: difference.error, budget });
        }
        report.notes.push(format!(
            "samples not seen before gave an error of {:.4}, above {budget}; searched again, further below",
            difference.error
        ));
        aim *= 0.8 * (budget / difference.error).min(1.0);
    }
    report.notes.push(format!("nothing could be removed within an error of {budget}: only exact rewrites were made"));
    let exact: Vec<Item> = vec![Item::Simplify];
    let mut result = base.clone();
    report.passes = pipeline::run(&exact, &mut result, cx, Price::default())?;
    let difference = last.compare(&result)?;
    if difference.rounding > ROUNDING_BUDGET || difference.rounding.is_nan() {
        return Err(ShrinkError::Differs { found: difference.rounding, budget: ROUNDING_BUDGET });
    }
    report.difference = Some(difference);
    Ok(result)
}
