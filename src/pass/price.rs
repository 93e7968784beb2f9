//! How much passes that the budget drives may do, what they are to save, and what their errors are measured by.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::{
    analysis::{
        cost::{Cost, latency, macs},
        shapes::Shapes,
    },
    codec::Model,
    ir::{Graph, Kind, NodeId},
    verify::{Cannot, Engine, Reference, Value},
};

/// How much passes that the budget drives may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd, Serialize)]
pub struct Price {
    /// Predicted error, relative and squared, that a byte saved may cost.
    pub per_byte: f64,
    /// The most that the predicted error of one layer may be.
    pub ceiling: f64,
    /// The most steps that a pass takes which goes step by step: many may be worth the same price.
    pub steps: usize,
    /// What may be saved on top by steps that save less each, at any price; the last one may go beyond.
    pub spare: f64,
    /// What a pass that has several kinds of changes is to prefer.
    pub prefers: Option<Preference>,
}

/// A kind of change that a pass is to prefer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Preference {
    /// Which of them.
    pub kind: usize,
    /// Whether what can't be changed so is left alone.
    pub only: bool,
}

impl Price {
    /// A price for each byte, whatever the error of one layer.
    #[must_use]
    pub const fn per_byte(per_byte: f64) -> Self {
        Self { per_byte, ceiling: f64::INFINITY, steps: usize::MAX, spare: 0.0, prefers: None }
    }
}

/// Multiply-adds that finding out what the model minds may take, about: some seconds.
const WORK: f64 = 1e11;
/// Samples that tell it at least.
const FEWEST: f64 = 8.0;

/// What the model that the first lossy pass sees computes on a few samples.
#[derive(Debug)]
pub struct Yardstick {
    model: Model,
    reference: Reference,
}

impl Yardstick {
    /// Of `model` on `samples`.
    ///
    /// # Errors
    ///
    /// When the engine can't run it.
    pub fn new(engine: &Engine, model: &Model, samples: Vec<Vec<Value>>) -> Result<Self, Cannot> {
        Ok(Self { model: model.clone(), reference: Reference::before_squashing(engine, model, samples)? })
    }

    /// The same of `graph` in place of the model's, on so many of the samples that running `graph` on them `questions` times over
    /// takes no more than [`WORK`], but on [`FEWEST`] at least; `None` where it can't be run.
    pub(super) fn of(&self, graph: &Graph, bound: &BTreeMap<String, Vec<usize>>, questions: usize) -> Option<Self> {
        let model = Model { graph: graph.clone(), ..self.model.clone() };
        let work = Cost::of(&model, bound).macs.max(1) as f64 * questions.max(1) as f64;
        let reference = self.reference.of(&model, (WORK / work).max(FEWEST) as usize).ok()?;
        Some(Self { model, reference })
    }

    /// The error of `graph` in place of the model's; `None` where it can't be run.
    #[must_use]
    pub fn error(&self, graph: &Graph) -> Option<f64> {
        let model = Model { graph: graph.clone(), ..self.model.clone() };
        Some(self.reference.compare(&model).ok()?.error)
    }
}

/// What passes that the budget drives are to save.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Minimize {
    /// Bytes of the file.
    #[default]
    Bytes,
    /// Multiply-adds.
    Macs,
    /// Nanoseconds by a model of what runtimes take.
    LatencyModel,
}

impl Minimize {
    /// What is to be saved of a cost.
    #[must_use]
    pub fn of(self, cost: &Cost) -> f64 {
        match self {
            Self::Bytes => cost.bytes as f64,
            Self::Macs => cost.macs as f64,
            Self::LatencyModel => cost.latency as f64,
        }
    }

    /// What is to be saved of what `model` costs at the input shapes of `bound`; a shape is asked for only where one counts.
    #[must_use]
    pub fn of_model(self, model: &Model, bound: &BTreeMap<String, Vec<usize>>) -> f64 {
        match self {
            Self::Bytes => Cost::bytes(model) as f64,
            Self::Macs | Self::LatencyModel => self.of(&Cost::of(model, bound)),
        }
    }

    /// What one node costs of that beside its constants, or a constant.
    #[must_use]
    pub fn of_node(self, graph: &Graph, shapes: &Shapes, node: NodeId) -> Option<f64> {
        match (self, graph.kind(node)) {
            (Self::Bytes, Kind::Const(constant)) => Some(constant.weight.stored_bytes() as f64),
            (Self::Bytes, _) => None,
            (Self::Macs, _) => macs(graph, shapes, node),
            (Self::LatencyModel, _) => Some(latency(graph, shapes, node)?.total()),
        }
    }
}
