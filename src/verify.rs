//! Proof that one model computes what another does: both run on the same inputs, and their outputs are compared.

pub mod data;
mod engine;
pub mod error;
mod regions;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use self::error::Pooled;
pub use self::{
    data::{DataError, Request, Samples, Split},
    engine::{Cannot, Engine, Runner, Value, catches_panics},
    regions::compare_regions,
};
use crate::{
    codec::Model,
    ir::{Graph, Outlet},
    proto::ValueInfoProto,
};

/// What exact and rounding passes may change: the relative difference of each output and sample.
pub const ROUNDING_BUDGET: f64 = 1e-4;

/// How two models differ on some samples.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Difference {
    /// The largest error over outputs: ‖Y−Y'‖ / ‖Y−Ȳ‖, pooled over the samples; 1 for a constant function.
    pub error: f64,
    /// The largest ‖y−y'‖ / max(‖y‖, 10⁻³√n) over outputs and samples.
    pub rounding: f64,
    /// The share of samples whose largest class score moved, over the outputs that look like class scores.
    pub flips: f64,
    /// Outputs that these inputs do not exercise, so that their error says nothing.
    pub unexercised: Vec<String>,
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

    fn run(&mut self, sample: &[Value]) -> Result<Vec<Value>, Cannot> {
        let shapes = || sample.iter().map(|value| value.dims.clone());
        let known = self.ready.iter().position(|(ready, _)| ready.iter().cloned().eq(shapes()));
        if known.is_none() {
            self.ready.push((shapes().collect(), self.engine.prepare(self.model, sample)?));
        }
        self.ready[known.unwrap_or(self.ready.len() - 1)].1.run(sample)
    }
}

/// The original model's outputs on some samples, kept to compare others with.
#[derive(Debug)]
pub struct Reference {
    engine: Engine,
    inputs: Vec<Vec<Value>>,
    outputs: Vec<Vec<Value>>,
    names: Vec<String>,
    /// Outputs that hardly vary, which are also judged before the operator that squashes them.
    flat: Vec<String>,
    /// What the error of each output is relative to, where it is a floating-point one that varies.
    spreads: Vec<Option<f64>>,
}

/// Operators whose result may stand still while what goes in varies.
const SQUASHING: &[&str] = &["Sigmoid", "Softmax", "ArgMax", "TopK", "NonMaxSuppression"];

/// `model` with what goes into the last squashing operator before each of `outputs` as an output more.
fn with_logits(model: &Model, outputs: &[String]) -> Model {
    let mut model = model.clone();
    for name in outputs {
        let found = model.graph.outputs().iter().find(|output| output.info.name() == name).map(|output| output.value);
        if let Some(logits) = found.and_then(|value| logits(&model.graph, value))
            && !model.graph.is_output(logits)
        {
            let info = ValueInfoProto { name: Some(model.graph.name(logits).to_owned()), ..ValueInfoProto::default() };
            model.graph.push_output(logits, info);
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
        let outputs = inputs.iter().map(|sample| runners.run(sample)).collect::<Result<_, _>>()?;
        let names = model.graph.outputs().iter().map(|output| output.info.name().to_owned()).collect();
        let reference = Self { engine: engine.clone(), inputs, outputs, names, flat: Vec::new(), spreads: Vec::new() };
        let spreads = reference.pools().iter().map(Pooled::spread).collect();
        Ok(Self { spreads, ..reference })
    }

    /// As [`new`](Self::new), for judging a lossy result: an output that hardly varies over the samples is judged by what
    /// goes into the last squashing operator before it as well.
    ///
    /// # Errors
    ///
    /// When the engine can't run the model.
    pub fn before_squashing(engine: &Engine, model: &Model, inputs: Vec<Vec<Value>>) -> Result<Self, Cannot> {
        let reference = Self::new(engine, model, inputs)?;
        let flat = reference.unexercised();
        if flat.is_empty() {
            return Ok(reference);
        }
        Ok(Self { flat: flat.clone(), ..Self::new(engine, &with_logits(model, &flat), reference.inputs)? })
    }

    /// Compares `model`'s outputs on the same samples.
    ///
    /// # Errors
    ///
    /// When the engine can't run the model.
    pub fn compare(&self, model: &Model) -> Result<Difference, Cannot> {
        self.compare_on(model, &self.inputs, f64::INFINITY)
    }

    /// As [`compare`](Self::compare), but gives up once the error is certain to be above `limit`: then it has seen fewer
    /// samples than there are, and the error is at least what it says.
    ///
    /// # Errors
    ///
    /// When the engine can't run the model.
    pub fn compare_up_to(&self, model: &Model, limit: f64) -> Result<Difference, Cannot> {
        self.compare_on(model, &self.inputs, limit)
    }

    /// How many samples there are.
    #[must_use]
    pub fn samples(&self) -> usize {
        self.inputs.len()
    }

    /// Each output compared with itself.
    fn pools(&self) -> Vec<Pooled> {
        let pool = |o: usize| {
            let mut pool = Pooled::default();
            self.outputs.iter().for_each(|sample| pool.add(&sample[o], &sample[o]));
            pool
        };
        (0..self.names.len()).map(pool).collect()
    }

    /// Compares the outputs of `model` on `inputs`, which are what it reads of the reference's.
    fn compare_on(&self, model: &Model, inputs: &[Vec<Value>], limit: f64) -> Result<Difference, Cannot> {
        let model = with_logits(model, &self.flat);
        let mut runners = Runners::new(&self.engine, &model);
        let mut pools: Vec<Pooled> = self.names.iter().map(|_| Pooled::default()).collect();
        let mut samples = 0;
        for (sample, wanted) in inputs.iter().zip(&self.outputs) {
            let found = runners.run(sample)?;
            // An output that is missing or one too many is no match, whatever the others are.
            if found.len() != wanted.len() {
                return Ok(Difference {
                    error: f64::INFINITY,
                    rounding: f64::INFINITY,
                    flips: 1.0,
                    ..Difference::default()
                });
            }
            for ((pool, wanted), found) in pools.iter_mut().zip(wanted).zip(&found) {
                pool.add(wanted, found);
            }
            samples += 1;
            if pools.iter().zip(&self.spreads).any(|(pool, &spread)| pool.exceeds(limit, spread)) {
                break;
            }
        }
        let mut difference = Difference { samples, ..Difference::default() };
        for ((pool, name), &spread) in pools.iter().zip(&self.names).zip(&self.spreads) {
            difference.rounding = max(difference.rounding, pool.rounding);
            difference.flips = max(difference.flips, pool.flips());
            // Of fewer samples than all, the spread is not the one that counts.
            let error = if pool.exceeds(limit, spread) { Some(f64::INFINITY) } else { pool.error() };
            match error {
                Some(error) => difference.error = max(difference.error, error),
                None => difference.unexercised.push(name.clone()),
            }
        }
        Ok(difference)
    }

    /// Whether no output, and nothing that is squashed into one, varies enough over the samples to be judged by.
    #[must_use]
    pub fn is_flat(&self) -> bool {
        self.unexercised().len() == self.names.len()
    }

    fn unexercised(&self) -> Vec<String> {
        let flat = |pool: &Pooled| pool.error().is_none() || pool.stands_still();
        self.pools().iter().zip(&self.names).filter(|(pool, _)| flat(pool)).map(|(_, name)| name.clone()).collect()
    }
}

/// The larger; NaN wins, so that it never passes a budget.
fn max(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

/// Input shapes by input name.
pub type Bound = BTreeMap<String, Vec<usize>>;
