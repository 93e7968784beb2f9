//! Proof that one model computes what another does: both run on the same inputs, and their outputs are compared.

pub mod data;
mod engine;
pub mod error;
mod regions;

use std::collections::BTreeMap;

use self::error::Pooled;
pub use self::{
    data::{DataError, Request, Samples, Split},
    engine::{Cannot, Runner, Value, catches_panics},
    regions::compare_regions,
};
use crate::codec::Model;

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

/// The original model's outputs on some samples, kept to compare others with.
#[derive(Debug)]
pub struct Reference {
    inputs: Vec<Vec<Value>>,
    outputs: Vec<Vec<Value>>,
    names: Vec<String>,
}

impl Reference {
    /// Runs `model` on `samples`.
    ///
    /// # Errors
    ///
    /// When the engine can't run the model.
    pub fn new(model: &Model, inputs: Vec<Vec<Value>>) -> Result<Self, Cannot> {
        let runner = Runner::new(model, inputs.first().ok_or(Cannot::NoSamples)?)?;
        let outputs = inputs.iter().map(|sample| runner.run(sample)).collect::<Result<_, _>>()?;
        let names = model.graph.outputs().iter().map(|output| output.info.name().to_owned()).collect();
        Ok(Self { inputs, outputs, names })
    }

    /// Compares `model`'s outputs on the same samples.
    ///
    /// # Errors
    ///
    /// When the engine can't run the model.
    pub fn compare(&self, model: &Model) -> Result<Difference, Cannot> {
        self.compare_on(model, &self.inputs)
    }

    /// Compares the outputs of `model` on `inputs`, which are what it reads of the reference's.
    fn compare_on(&self, model: &Model, inputs: &[Vec<Value>]) -> Result<Difference, Cannot> {
        let runner = Runner::new(model, inputs.first().ok_or(Cannot::NoSamples)?)?;
        let mut pools: Vec<Pooled> = self.names.iter().map(|_| Pooled::default()).collect();
        for (sample, wanted) in inputs.iter().zip(&self.outputs) {
            for ((pool, wanted), found) in pools.iter_mut().zip(wanted).zip(&runner.run(sample)?) {
                pool.add(wanted, found);
            }
        }
        let mut difference = Difference { samples: self.inputs.len(), ..Difference::default() };
        for (pool, name) in pools.iter().zip(&self.names) {
            difference.rounding = max(difference.rounding, pool.rounding);
            difference.flips = max(difference.flips, pool.flips());
            match pool.error() {
                Some(error) => difference.error = max(difference.error, error),
                None => difference.unexercised.push(name.clone()),
            }
        }
        Ok(difference)
    }

    /// Whether no output varies enough over the samples to be judged by.
    #[must_use]
    pub fn is_flat(&self) -> bool {
        let pools = (0..self.names.len()).map(|o| {
            let mut pool = Pooled::default();
            self.outputs.iter().for_each(|sample| pool.add(&sample[o], &sample[o]));
            pool
        });
        pools.into_iter().all(|pool| pool.error().is_none())
    }
}

/// The larger; NaN wins, so that it never passes a budget.
fn max(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

/// Input shapes by input name.
pub type Bound = BTreeMap<String, Vec<usize>>;
