//! Proof that one model computes what another does: both run on the same inputs, and their outputs are compared.

mod certificate;
pub mod data;
mod engine;
pub mod error;
mod precision;
mod regions;
mod simulate;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, VecDeque},
};

use rayon::prelude::*;

pub use self::{
    certificate::{CONFIDENCE, Certificate, NO_CLASSES, upper_bound},
    data::{DataError, Request, Samples, Source, Split},
    engine::{Cannot, Engine, Probe, Runner, Value, catches_panics},
    regions::{Proof, Undone, are_alike, compare_regions, prove_regions},
};
use self::{error::Pooled, precision::coarseness, simulate::simulated};
use crate::{
    analysis::shapes::Fact,
    codec::Model,
    ir::{Graph, Input, Op, Outlet},
    proto::ValueInfoProto,
};

/// What exact and rounding passes may change: the relative difference of each output and sample, of what is computed in single precision.
pub const ROUNDING_BUDGET: f64 = 1e-4;

/// Samples that are run before any is looked at.
const CHUNK: usize = 8;

/// How two models differ on some samples.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Difference {
    /// The largest error over outputs: ‖Y−Y'‖ / ‖Y−Ȳ‖, pooled over the samples; 1 for a constant function. Where an output
    /// hardly varies, 10⁻³ of its size stands in for ‖Y−Ȳ‖.
    pub error: f64,
    /// The largest ‖y−y'‖ / max(‖y‖, 10⁻³√n) over outputs and samples, a hundredth of it for outputs that are computed in
    /// half precision, and a
    /// quarter of that for `BFLOAT16`.
    pub rounding: f64,
    /// The share of samples whose largest class score moved, over the outputs that look like class scores.
    pub flips: f64,
    /// Rows of class scores, of the output whose top class changed most often.
    pub classified: usize,
    /// Those whose top class changed.
    pub flipped: usize,
    /// Whether any output looks like class scores.
    pub classifies: bool,
    /// Outputs that these inputs hardly vary: they must nearly keep their values.
    pub unexercised: Vec<String>,
    /// Branches that the original never takes on these inputs, so that nothing of them was compared.
    pub untaken: Vec<String>,
    /// How many samples were compared.
    pub samples: usize,
}

/// A model prepared for each set of shapes that its inputs come in.
struct Runners<'a> {
    engine: &'a Engine,
    model: &'a Model,
    ready: Vec<(Vec<Vec<usize>>, Runner)>,
}

impl<'a> Runners<'a> {
    fn new(engine: &'a Engine, model: &'a Model) -> Self {
        Self { engine, model, ready: Vec::new() }
    }

    /// The outputs for each of `samples`, which are run side by side.
    fn run(&mut self, samples: &[Vec<Value>]) -> Result<Vec<Vec<Value>>, Cannot> {
        let mut places = Vec::new();
        for sample in samples {
            let shapes = || sample.iter().map(|value| value.dims.clone());
            let known = self.ready.iter().position(|(ready, _)| ready.iter().cloned().eq(shapes()));
            if known.is_none() {
                self.ready.push((shapes().collect(), self.engine.prepare(self.model, sample)?));
            }
            places.push(known.unwrap_or(self.ready.len() - 1));
        }
        samples.par_iter().zip(places).map(|(sample, place)| self.ready[place].1.run(sample)).collect()
    }

    /// The branches that no sample took.
    fn untaken(&self) -> Vec<String> {
        let mut taken = BTreeMap::new();
        self.ready.iter().for_each(|(_, runner)| runner.note_branches(&mut taken));
        let untaken = taken.into_iter().filter(|(_, taken)| !taken);
        untaken.map(|((label, attribute), _)| format!("{attribute} of `{label}`")).collect()
    }
}

/// Samples that [`takes_batches`] puts together: other than those that passes follow channels at.
const BATCH: usize = 8;

/// Whether `model` computes of several samples in one batch what it computes of each alone; `None` where its inputs do not say
/// that they can be put together, or `samples` are not of one shape.
///
/// # Errors
///
/// When the engine can't run the model.
pub fn takes_batches(engine: &Engine, model: &Model, samples: &[Vec<Value>]) -> Result<Option<bool>, Cannot> {
    const CLOSE: f64 = 1e-3;
    let first = |input: &Input| Fact::declared(&input.info).extents().and_then(|dims| dims.first().copied());
    let is_open = model.graph.fed_inputs().all(|input| first(input) == Some(None));
    let batch: Vec<_> = samples.iter().cycle().take(BATCH).collect();
    let Some(like) = batch.first().filter(|_| is_open) else { return Ok(None) };
    let fits = |sample: &&&Vec<Value>| sample.iter().zip(*like).all(|(a, b)| a.dims == b.dims && !a.dims.is_empty());
    if batch.iter().filter(fits).count() < BATCH {
        return Ok(None);
    }
    let stacked = |(i, like): (usize, &Value)| Value {
        dims: [&[BATCH * like.dims[0]], &like.dims[1..]].concat(),
        values: batch.iter().flat_map(|sample| sample[i].values.iter().copied()).collect(),
        dtype: like.dtype,
    };
    let mut runners = Runners::new(engine, model);
    let together = runners.run(&[like.iter().enumerate().map(stacked).collect()])?;
    let alone = runners.run(&samples[..BATCH.min(samples.len())])?;
    let agrees = |(i, together): (usize, &Value)| {
        let apart = alone.iter().cycle().take(BATCH).flat_map(|sample| &sample[i].values);
        are_close(&together.values, &apart.copied().collect::<Vec<_>>(), CLOSE)
    };
    Ok(Some(together.iter().flatten().enumerate().all(agrees)))
}

/// The error of `result` as its file will be run, with all optimizations of the engine, against `model` run so too; `None` where the engine
/// only runs twins, or `model` not so.
///
/// # Errors
///
/// When the engine can't run the result so.
pub fn error_when_optimized(
    engine: &Engine,
    (model, result): (&Model, &Model),
    samples: &[Vec<Value>],
) -> Result<Option<f64>, Cannot> {
    let reference = engine.optimized().map(|engine| Reference::new(&engine, model, samples.to_vec()));
    match reference {
        Some(Ok(reference)) => Ok(Some(reference.compare(result)?.error)),
        Some(Err(_)) | None => Ok(None),
    }
}

/// Whether the file of `model` loads and computes of the first of `samples` what its twin with weights as floats computes; `None` where
/// the engine only runs twins.
///
/// # Errors
///
/// When the engine can't run the file or the twin.
pub fn runs_as_written(engine: &Engine, model: &Model, samples: &[Vec<Value>]) -> Result<Option<bool>, Cannot> {
    /// What is off by less is rounding; that the file holds the weights is checked bit by bit elsewhere.
    const CLOSE: f64 = 1e-2;
    let Some(literal) = engine.as_written() else { return Ok(None) };
    let first = &samples[..samples.len().min(1)];
    let written = Runners::new(&literal, model).run(first)?.concat();
    let twin = Runners::new(engine, model).run(first)?.concat();
    let mut pairs = written.iter().zip(&twin);
    Ok(Some(pairs.all(|(written, twin)| are_close(&written.values, &twin.values, CLOSE))))
}

/// Whether the values are as many, and those that are not the same off by a share of at most `share` in all.
fn are_close(found: &[f64], wanted: &[f64], share: f64) -> bool {
    let are_same = |(found, wanted): (&f64, &f64)| found == wanted || found.is_nan() && wanted.is_nan();
    let off = found.iter().zip(wanted).filter(|&pair| !are_same(pair));
    let lost: f64 = off.map(|(found, wanted)| (found - wanted).powi(2)).sum();
    let whole: f64 = wanted.iter().filter(|wanted| wanted.is_finite()).map(|wanted| wanted * wanted).sum();
    found.len() == wanted.len() && lost <= share * share * whole
}

/// The original model's outputs on some samples, kept to compare others with.
#[derive(Debug)]
pub struct Reference {
    engine: Engine,
    /// The names of the inputs that are fed.
    fed: Vec<String>,
    inputs: Vec<Vec<Value>>,
    outputs: Vec<Vec<Value>>,
    names: Vec<String>,
    /// Outputs that hardly vary, which are also judged before the operator that squashes them.
    flat: Vec<String>,
    /// What the error of each floating-point output is relative to.
    scales: Vec<f64>,
    /// Outputs that these inputs hardly vary.
    unexercised: Vec<String>,
    /// Branches that no input takes.
    untaken: Vec<String>,
    /// Whether what others are compared with it for is lossy, so that what their runtime rounds counts.
    simulates: bool,
    /// Whether each output is scores by a softmax over its last axis: of three axes, it is a sequence of answers.
    sequences: Vec<bool>,
    /// How many times more than in single precision rounding may change each output.
    coarseness: Vec<f64>,
}

/// Operators whose result may stand still while what goes in varies.
const SQUASHING: &[&str] = &["Sigmoid", "Softmax", "ArgMax", "TopK", "NonMaxSuppression"];

/// `model` with what goes into the last squashing operator before each of `outputs` as an output more, which is called
/// after that output whatever the value itself is called.
fn with_logits(model: &Model, outputs: &[String]) -> Model {
    let mut model = model.clone();
    for name in outputs {
        let found = model.graph.outputs().iter().find(|output| output.info.name() == name).map(|output| output.value);
        if let Some(logits) = found.and_then(|value| logits(&model.graph, value)) {
            let copy = Op::new("Identity");
            let copy = model.graph.add_op(copy, &[Some(logits)], &[&format!("{name}.before squashing")], logits.node);
            let name = model.graph.name(copy.out()).to_owned();
            let info = ValueInfoProto { name: Some(name), ..ValueInfoProto::default() };
            model.graph.push_output(copy.out(), info);
        }
    }
    model
}

/// What goes into the last squashing operator before `value`.
fn logits(graph: &Graph, value: Outlet) -> Option<Outlet> {
    let (mut seen, mut queue) = (BTreeSet::new(), VecDeque::from([value]));
    while let Some(value) = queue.pop_front() {
        let Some(op) = graph.op(value.node) else { continue };
        if op.standard().is_some_and(|op| SQUASHING.contains(&op)) {
            return graph.operand(value.node, 0);
        }
        if seen.insert(value.node) {
            queue.extend(graph.operands(value.node).into_iter().flatten());
        }
    }
    None
}

/// Whether `value` is what a softmax over the last axis makes, of three if it says which.
fn is_softmax(graph: &Graph, value: Outlet) -> bool {
    let Some(op) = graph.op(value.node) else { return false };
    match op.standard() {
        Some("Softmax" | "LogSoftmax") => {
            // Before opset 13, the axes from one on were taken together, by default from the second.
            let axis = op.int("axis").unwrap_or(if graph.opset() >= 13 { -1 } else { 1 });
            axis == -1 || axis == 2
        }
        Some("Identity" | "Cast") => graph.operand(value.node, 0).is_some_and(|value| is_softmax(graph, value)),
        _ => false,
    }
}

impl Reference {
    /// Runs `model` on `inputs`.
    ///
    /// # Errors
    ///
    /// When the engine can't run the model.
    pub fn new(engine: &Engine, model: &Model, inputs: Vec<Vec<Value>>) -> Result<Self, Cannot> {
        if inputs.is_empty() {
            return Err(Cannot::NoSamples);
        }
        let mut runners = Runners::new(engine, model);
        let outputs = runners.run(&inputs)?;
        let (fed, names) = (input_names(model), output_names(model));
        // Each output compared with itself.
        let sequences: Vec<_> =
            model.graph.outputs().iter().map(|output| is_softmax(&model.graph, output.value)).collect();
        let coarseness = coarseness(&model.graph);
        let mut pools: Vec<_> = sequences.iter().map(|&sequences| Pooled::new(sequences, 1.0)).collect();
        for sample in &outputs {
            pools.iter_mut().zip(sample).for_each(|(pool, value)| pool.add(value, value));
        }
        let scales = pools.iter().map(Pooled::scale).collect();
        let still = pools.iter().zip(&names).filter(|(pool, _)| !pool.varies());
        let unexercised = still.map(|(_, name)| name.clone()).collect();
        Ok(Self {
            engine: engine.clone(),
            fed,
            inputs,
            outputs,
            names,
            flat: Vec::new(),
            scales,
            unexercised,
            untaken: runners.untaken(),
            simulates: false,
            sequences,
            coarseness,
        })
    }

    /// As [`new`](Self::new), for judging a lossy result: what its runtime rounds is rounded, and an output that hardly varies over the
    /// samples is judged by what goes into the last squashing operator before it as well.
    ///
    /// # Errors
    ///
    /// When the engine can't run the model.
    pub fn before_squashing(engine: &Engine, model: &Model, inputs: Vec<Vec<Value>>) -> Result<Self, Cannot> {
        let reference = Self { simulates: true, ..Self::new(engine, model, inputs)? };
        if reference.unexercised.is_empty() {
            return Ok(reference);
        }
        let flat = reference.unexercised;
        let more = Self::new(engine, &with_logits(model, &flat), reference.inputs)?;
        Ok(Self { flat, simulates: true, ..more })
    }

    /// The same of `model` on the same samples.
    ///
    /// # Errors
    ///
    /// When the engine can't run the model.
    pub fn of(&self, model: &Model, samples: usize) -> Result<Self, Cannot> {
        Self::before_squashing(&self.engine, model, self.inputs.iter().take(samples).cloned().collect())
    }

    /// Compares `model`'s outputs on the same samples.
    ///
    /// # Errors
    ///
    /// When the engine can't run the model.
    pub fn compare(&self, model: &Model) -> Result<Difference, Cannot> {
        self.compare_up_to(model, f64::INFINITY)
    }

    /// As [`compare`](Self::compare), but gives up once the error is certain to be above `limit`: then it has seen fewer
    /// samples than there are, and the error is at least what it says.
    ///
    /// # Errors
    ///
    /// When the engine can't run the model.
    pub fn compare_up_to(&self, model: &Model, limit: f64) -> Result<Difference, Cannot> {
        let names = input_names(model);
        if names == self.fed {
            return self.compare_on(model, &self.inputs, limit);
        }
        // Inputs are known by their names, not by their places.
        let place = |name: &String| {
            self.fed.iter().position(|fed| fed == name).ok_or_else(|| Cannot::ForeignInput(name.clone()))
        };
        let places = names.iter().map(place).collect::<Result<Vec<_>, _>>()?;
        let pick = |sample: &Vec<Value>| places.iter().map(|&i| sample[i].clone()).collect();
        self.compare_on(model, &self.inputs.iter().map(pick).collect::<Vec<_>>(), limit)
    }

    /// How many samples there are.
    #[must_use]
    pub fn samples(&self) -> usize {
        self.inputs.len()
    }

    /// Compares the outputs of `model` on `inputs`, which are what it reads of the reference's.
    fn compare_on(&self, model: &Model, inputs: &[Vec<Value>], limit: f64) -> Result<Difference, Cannot> {
        let model = with_logits(model, &self.flat);
        let model = if self.simulates { simulated(&model) } else { Cow::Borrowed(&model) };
        let model = &*model;
        let kinds = self.sequences.iter().zip(&self.coarseness);
        let mut pools: Vec<Pooled> =
            kinds.map(|(&sequences, &coarseness)| Pooled::new(sequences, coarseness)).collect();
        // An output that is missing or one too many is no match, whatever the others are.
        let found = output_names(model);
        let places = self.names.iter().map(|name| found.iter().position(|found| found == name));
        let places = if found.len() == 1 && self.names.len() == 1 { Some(vec![0]) } else { places.collect() };
        let Some(places) = places.filter(|_| found.len() == self.names.len()) else {
            return Ok(Difference {
                error: f64::INFINITY,
                rounding: f64::INFINITY,
                flips: 1.0,
                ..Difference::default()
            });
        };
        let mut runners = Runners::new(&self.engine, model);
        let mut samples = 0;
        'all: for (inputs, outputs) in inputs.chunks(CHUNK).zip(self.outputs.chunks(CHUNK)) {
            for (wanted, found) in outputs.iter().zip(runners.run(inputs)?) {
                for ((pool, wanted), &place) in pools.iter_mut().zip(wanted).zip(&places) {
                    pool.add(wanted, &found[place]);
                }
                samples += 1;
                if pools.iter().zip(&self.scales).any(|(pool, &scale)| pool.exceeds(limit, scale)) {
                    break 'all;
                }
            }
        }
        let mut difference = Difference { samples, untaken: self.untaken.clone(), ..Difference::default() };
        for ((pool, name), &scale) in pools.iter().zip(&self.names).zip(&self.scales) {
            difference.rounding = max(difference.rounding, pool.rounding);
            if pool.classifies() && (!difference.classifies || pool.flips() > difference.flips) {
                (difference.flips, difference.classifies) = (pool.flips(), true);
                (difference.flipped, difference.classified) = pool.classified();
            }
            // Of fewer samples than all, the scale is not the one that counts.
            let given_up = samples < self.outputs.len() && pool.exceeds(limit, scale);
            difference.error = max(difference.error, if given_up { f64::INFINITY } else { pool.error() });
            if !pool.varies() && samples == self.outputs.len() {
                difference.unexercised.push(name.clone());
            }
        }
        Ok(difference)
    }

    /// Whether no output, and nothing that is squashed into one, varies enough over the samples to be judged by.
    #[must_use]
    pub fn is_flat(&self) -> bool {
        self.unexercised.len() == self.names.len()
    }
}

fn input_names(model: &Model) -> Vec<String> {
    model.graph.fed_inputs().map(|input| input.info.name().to_owned()).collect()
}

fn output_names(model: &Model) -> Vec<String> {
    model.graph.outputs().iter().map(|output| output.info.name().to_owned()).collect()
}

/// The larger; NaN wins, so that it never passes a budget.
fn max(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

/// Input shapes by input name.
pub type Bound = BTreeMap<String, Vec<usize>>;
