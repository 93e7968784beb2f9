//! The main job: run the passes, find how much the budget allows, and prove the result before anybody writes it.

mod chain;
mod land;
mod lossy;
mod prove;
mod search;
mod stage;

pub use self::{
    chain::{Link, table},
    search::Predictions,
};
use std::sync::Arc;

use serde::Serialize;

use self::lossy::Lossy;
use crate::{
    analysis::{cost::Cost, moments},
    codec::{Model, Runtime},
    ir::Graph,
    pass::{Context, Fidelity, Minimize, Price},
    pipeline::{self, Item, Outcome, PipelineError},
    verify::{Cannot, Certificate, DataError, Difference, NO_CLASSES, Request, Samples, Source},
};

/// The default budget with a person's samples.
pub const BUDGET_WITH_DATA: f64 = 0.05;
/// The default budget on random inputs, which are harsher: what a net does with noise depends on directions that real
/// inputs do not use.
pub const BUDGET_ON_RANDOM: f64 = 0.10;

/// The largest vectors whose covariance is taken by default: 170 MB for each such layer.
pub const MAX_GRAM_DIM: usize = 4608;

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
    /// What passes that the budget drives are to save.
    pub minimize: Minimize,
    /// The share of the input's cost, of the kind that is to be saved, that the result is to have.
    pub target: Option<f64>,
    /// Whether results of falling size are made beside the one.
    pub chain: bool,
    /// What layers read, from files; else it is collected from samples.
    pub moments: Option<Arc<moments::Table>>,
    /// Layers that read longer vectors are calibrated by their channels alone, or not at all.
    pub max_gram_dim: usize,
    /// Layers that lossy passes leave alone.
    pub keep: Vec<globset::Glob>,
    /// What is to run the result.
    pub runtime: Runtime,
    /// Constants listed as inputs stay listed.
    pub keep_initializer_inputs: bool,
    /// Whether the result is checked.
    pub verify: bool,
    /// Changes that can't be proven are an error, and are not taken back.
    pub strict: bool,
    /// Is told what a person should know before the work is done.
    pub warn: fn(&str),
}

impl Job {
    /// Whether any pass may change more than rounding does.
    fn is_lossy(&self) -> bool {
        self.items.iter().any(|item| item.fidelity() == Fidelity::Lossy)
    }
}

impl Default for Job {
    fn default() -> Self {
        Self {
            items: vec![Item::Simplify { is_last: true }],
            request: Request::default(),
            max_error: None,
            max_flips: None,
            minimize: Minimize::default(),
            target: None,
            chain: false,
            moments: None,
            max_gram_dim: MAX_GRAM_DIM,
            keep: Vec::new(),
            runtime: Runtime::default(),
            keep_initializer_inputs: false,
            verify: true,
            strict: false,
            warn: |_| {},
        }
    }
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
    /// How often the top class changes on other inputs, at most, after a lossy pass and where there is an answer.
    pub certificate: Option<Certificate>,
    /// The error budget of lossy passes.
    pub budget: Option<f64>,
    /// How well the errors of the steps of the search were predicted.
    pub predictions: Option<Predictions>,
    /// Whether the samples were random.
    pub random_inputs: bool,
    /// Results of falling size, where they were asked for.
    pub chain: Vec<Link>,
    /// What the layers read that the first lossy pass saw.
    #[serde(skip)]
    pub moments: Arc<moments::Table>,
    /// What a person should know.
    pub notes: Vec<String>,
    /// Why some of it is so, for whoever looks for the cause.
    pub causes: Vec<String>,
}

impl Report {
    /// Notes what a person should know of the data: arrays that name no input, and inputs that it lacks.
    fn tell_of_data(&mut self, ignored: &[String], drawn: &[String]) {
        self.notes.extend(ignored.iter().map(|name| format!("array `{name}` of the data names no input")));
        self.notes.extend(drawn.iter().map(|name| format!("the data has no array `{name}`: it was random")));
    }

    /// Notes what a person should know of the samples.
    fn tell_of_shapes(&mut self, samples: &Samples) {
        self.random_inputs = samples.random;
        self.notes.extend(samples.chosen_shapes());
    }
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
    #[error("the result could not be verified")]
    Cannot(#[from] Cannot),
    /// The model can't be run, for a reason found while the samples were made.
    #[error("the result could not be verified, since the model can't be run: {0}")]
    Unrunnable(String),
    /// Changes that would have to be taken back.
    #[error(
        "the rewritten form of the operators before {0} could not be verified; leave out --strict to keep these as they were"
    )]
    Unproven(String),
    /// The inputs do not exercise any output.
    #[error(
        "the result could not be verified: no output varies over the samples by more than a thousandth of one and of its size, or what varies is not a \
         number, so that any error would go unseen; look for NaN in the weights"
    )]
    Flat,
    /// The result differs without measure.
    #[error(
        "the result is not what the input computes: an output has another shape, or NaN or infinity stand in other \
         places; nothing was written"
    )]
    Incomparable,
    /// The result is bound to one size of batch.
    #[error(
        "the result does not compute of several samples in one batch what it computes of each alone, which the input does; \
         nothing was written"
    )]
    Batches,
    /// The file would not hold what was verified.
    #[error(
        "the weights that the file would hold are not those that were verified, which is a mistake in this program; nothing was \
         written, and passes that store weights can be left out"
    )]
    Misspelled,
    /// Runtimes would refuse the file.
    #[error(
        "runtimes would refuse the file, since {0}, which is a mistake in this program; nothing was written; passes that have to do with \
         that can be left out"
    )]
    Invalid(String),
    /// What runs the file computes something else.
    #[error(
        "with its optimizations, onnxruntime computes something else of the result: error {found:.2e}, where {verified:.2e} was verified; \
         nothing was written"
    )]
    Optimized {
        /// The error.
        found: f64,
        /// The error that was verified.
        verified: f64,
    },
    /// The top class changes too often.
    #[error("the top class changes on {found:.4} of the samples where {budget} is allowed; nothing was written")]
    Flips {
        /// The share that was measured.
        found: f64,
        /// The share that is allowed.
        budget: f64,
    },
    /// The result can't be as small as is asked for.
    #[error(
        "the target is a share of {target}, but when all that may go is gone, {least:.3} is left; -v says what may not go, \
         and more passes reach further"
    )]
    OutOfReach {
        /// The share that is asked for.
        target: f64,
        /// What is left at the highest price.
        least: f64,
    },
    /// The moments are of other layers.
    #[error(
        "--moments: no layer reads what the file tells of; it belongs to the passes before the first lossy one, so give the \
         same list, or make it anew with --save-moments"
    )]
    ForeignMoments,
    /// Flips are limited, but nothing looks like class scores.
    #[error("--max-flips: {NO_CLASSES}; leave it out")]
    NoClasses,
    /// The budget is to drive a pass, but nothing is measured.
    #[error(
        "--no-verify: how much `{0}` may do is found by measuring; give it an option that fixes its strength \
         (`onnx-shrink passes {0}`), or leave out --no-verify"
    )]
    Unmeasured(String),
    /// A glob names nothing.
    #[error("--keep: `{0}` matches no node and no weight")]
    KeepsNothing(String),
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
    /// What a person who asked for `job` can do about it, other than what is done already.
    #[must_use]
    pub fn remedies(&self, job: &Job) -> Vec<&'static str> {
        let is_unrun = matches!(self, Self::Cannot(_) | Self::Unrunnable(_));
        let is_unverified = is_unrun || matches!(self, Self::Flat);
        let is_given = job.request.data.is_some();
        let has_shapes = is_given || !job.request.shapes.is_empty() || !job.request.fixed.is_empty();
        let remedies = [
            (is_unrun && !job.request.engine.is_onnxruntime(), "--engine onnxruntime runs more models than tract"),
            (is_unrun && !has_shapes, "--shape NAME=DIMS and --input NAME=VALUE say what an input is like"),
            (is_unverified && !is_given, "--data gives real inputs"),
            (is_unverified && job.verify, "--no-verify writes the result anyway"),
        ];
        remedies.into_iter().filter(|(applies, _)| *applies).map(|(_, remedy)| remedy).collect()
    }

    /// Whether the job asks for what can't be done.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Unmeasured(_) | Self::KeepsNothing(_) | Self::NoClasses => true,
            Self::Data(error) => error.is_usage(),
            _ => false,
        }
    }

    /// Whether the result failed its check or could not be checked, in contrast to not coming about.
    #[must_use]
    pub fn is_verification(&self) -> bool {
        matches!(
            self,
            Self::Cannot(_)
                | Self::Unrunnable(_)
                | Self::Unproven(_)
                | Self::Flat
                | Self::Incomparable
                | Self::Batches
                | Self::Misspelled
                | Self::Invalid(_)
                | Self::Optimized { .. }
                | Self::Differs { .. }
                | Self::Flips { .. }
        )
    }
}

/// Shrinks `model` as `job` says; `progress` is told what is going on.
///
/// # Errors
///
/// When a pass fails, or the result can't be proven to compute the same.
pub fn shrink(model: &Model, job: &Job, progress: &mut dyn FnMut(&str)) -> Result<(Model, Report), ShrinkError> {
    let (file, mut raised) = (model, Model { runtime: job.runtime, ..model.clone() });
    if !job.items.is_empty() {
        raised.raise();
    }
    let model = &raised;
    let mut report = Report::default();
    let lossy = job.is_lossy();
    // A target is met without measuring, but what is lost on the way is judged by samples.
    let is_driven = job.target.is_none() || job.request.data.is_none();
    if let (false, true, Some(Item::Pass(step))) = (job.verify, is_driven, job.items.iter().find(|item| item.is_free()))
    {
        return Err(ShrinkError::Unmeasured(step.info.name.to_owned()));
    }
    let keep = keep(model, &job.keep)?;
    let is_run = job.verify || lossy && job.request.data.is_some();
    let source = if is_run { Some(Source::new(model, &job.request)?) } else { None };
    if let Some(source) = &source {
        report.tell_of_data(&source.ignored, &source.drawn);
    }
    let (source, samples) = match source {
        Some(source) if lossy => {
            progress("preparing samples");
            (None, Some(source.gather(model, false)))
        }
        source => (source, None),
    };
    let has_target = job.target.is_some();
    let mut cx = Context { keep, minimize: job.minimize, runtime: job.runtime, has_target, ..Context::default() };
    match &samples {
        None => cx.bound = Samples::likely_shapes(model, &job.request),
        Some(samples) => {
            cx.bound.clone_from(&samples.bound);
            report.tell_of_shapes(samples);
        }
    }
    report.before = Cost { bytes: Cost::bytes(file), ..Cost::of(model, &cx.bound) };
    let base = unlisted(model, job, &mut report);
    let is_edited = |result: &Model| result.graph.edits() != model.graph.edits();
    let result = if let Some(samples) = &samples {
        let result = Lossy::new(model, &base, job, samples, &mut report, progress)?.run(&mut cx)?;
        if is_edited(&result) {
            prove::usable(model, &result, job, Some(samples), &mut report)?;
        }
        result
    } else {
        progress("running passes");
        let mut result = base.clone();
        report.passes = pipeline::run(&job.items, &mut result, &mut cx, Price::default())?;
        if is_edited(&result) {
            progress("verifying");
            prove::lossless(&base, &mut result, job, source, &mut report)?;
        }
        result
    };
    report.moments = Arc::clone(&cx.moments);
    if result.graph.edits() == model.graph.edits() {
        report.after = report.before.clone();
        return Ok((file.clone(), report));
    }
    report.after = Cost::of(&result, &cx.bound);
    Ok((result, report))
}

/// `model` without constants that are listed as inputs, unless the job keeps these.
fn unlisted(model: &Model, job: &Job, report: &mut Report) -> Model {
    let mut model = model.clone();
    if job.items.is_empty() || job.keep_initializer_inputs {
        return model;
    }
    let unlisted = model.graph.unlist_default_values();
    if unlisted > 0 {
        report.notes.push(format!(
            "{unlisted} initializers are no longer listed as inputs, which runtimes need to optimize them; \
             --keep-initializer-inputs keeps them"
        ));
    }
    model
}

/// The set of `globs`, each of which must match something.
fn keep(model: &Model, globs: &[globset::Glob]) -> Result<globset::GlobSet, ShrinkError> {
    fn names(graph: &Graph) -> Vec<String> {
        let own = graph.node_ids().flat_map(|id| [graph.label(id).to_owned(), graph.name(id.out()).to_owned()]);
        own.chain(graph.bodies().flat_map(|(_, body)| names(&body.graph))).collect()
    }
    let names = names(&model.graph);
    for glob in globs {
        let matcher = glob.compile_matcher();
        if !names.iter().any(|name| matcher.is_match(name)) {
            return Err(ShrinkError::KeepsNothing(glob.glob().to_owned()));
        }
    }
    let mut set = globset::GlobSetBuilder::new();
    for glob in globs {
        set.add(glob.clone());
    }
    // Each of them is valid; only all of them together could be too large.
    Ok(set.build().unwrap_or_default())
}

/// Whether an error is inside a budget; NaN never is.
fn within(found: f64, budget: f64) -> Result<(), ShrinkError> {
    if found <= budget { Ok(()) } else { Err(ShrinkError::Differs { found, budget }) }
}
