//! Running models: what is fed, what comes out, and the engines that do it.

mod branches;
mod interpreter;
mod legalize;
mod onnxruntime;
mod tract;

use std::{
    borrow::Cow,
    cell::Cell,
    collections::BTreeMap,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use super::Bound;
use crate::{
    analysis::{
        cost::peak_memory,
        shapes::{Fact, Shapes},
    },
    codec::Model,
    ir::{DType, Outlet, tensor::is_float},
};

/// A tensor that a model is fed or makes; the values of every type fit `f64` but for integers beyond 2⁵³.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// The shape.
    pub dims: Vec<usize>,
    /// The elements.
    pub values: Vec<f64>,
    /// The type of the elements, as far as the engine tells it: floating-point numbers may come in a wider type.
    pub dtype: DType,
}

impl Value {
    /// Whether the elements are floating-point numbers, which are compared by distance and not by equality.
    #[must_use]
    pub fn is_float(&self) -> bool {
        is_float(self.dtype)
    }
}

/// Why a model could not be run.
#[derive(Debug, thiserror::Error)]
pub enum Cannot {
    /// The engine computes an operator wrongly, so that its word is worth nothing.
    #[error("node `{node}` ({op}): {why}")]
    Unsound {
        /// The node.
        node: String,
        /// Its operator.
        op: String,
        /// What is wrong.
        why: &'static str,
    },
    /// The engine refuses the model.
    #[error("{engine} can't run it: {why}")]
    Engine {
        /// The engine.
        engine: &'static str,
        /// What it says.
        why: String,
    },
    /// A region that changed can't be run.
    #[error("what computes `{value}` changed, and {why}")]
    Region {
        /// The value that the region makes.
        value: String,
        /// Why it can't be run.
        why: String,
    },
    /// Running the model takes more memory than it may.
    #[error(
        "running it takes about {needed} bytes, and {allowed} are allowed; give smaller shapes with --shape, or --max-memory"
    )]
    Memory {
        /// The weights and the largest set of values alive at once.
        needed: u64,
        /// The limit.
        allowed: u64,
    },
    /// The element type of an input is none that can be fed.
    #[error("input `{0}` is of a type that can't be fed")]
    InputType(String),
    /// Two models that can only be compared region by region differ as wholes.
    #[error("the two models have different {0}, and one of them can't be run as a whole")]
    Interface(&'static str),
    /// A part of a model can't be run by itself.
    #[error("what is computed from `{0}` on can't be run by itself")]
    Segment(String),
    /// A model that is compared reads what the original does not.
    #[error("it has an input `{0}`, which the original lacks")]
    ForeignInput(String),
    /// There is nothing to feed.
    #[error("there are no samples")]
    NoSamples,
}

/// What runs models, and how much memory a run may take.
#[derive(Clone, Debug)]
pub struct Engine {
    /// ONNX Runtime, if it and not tract is to run them.
    onnxruntime: Option<onnxruntime::Library>,
    /// What it is given of a model.
    given: Given,
    /// Bytes that a run may take.
    max_memory: u64,
}

/// What ONNX Runtime is given of a model, and how it is to run that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Given {
    /// The model with weights as floats, run operator by operator.
    #[default]
    Twin,
    /// The file as it will be written, run operator by operator.
    Written,
    /// The file as it will be written, with all optimizations.
    Optimized,
}

impl Default for Engine {
    fn default() -> Self {
        Self { onnxruntime: None, given: Given::default(), max_memory: u64::MAX }
    }
}

impl Engine {
    /// ONNX Runtime, loaded from the shared library at `path`; it runs models without optimizations, stored weights as
    /// floats.
    ///
    /// # Errors
    ///
    /// When the library can't be loaded or is too old.
    pub fn onnxruntime(path: &Path) -> Result<Self, Cannot> {
        Ok(Self { onnxruntime: Some(onnxruntime::Library::load(path)?), ..Self::default() })
    }

    /// Whether it is ONNX Runtime, and not tract.
    #[must_use]
    pub fn is_onnxruntime(&self) -> bool {
        self.onnxruntime.is_some()
    }

    /// The same engine for files as they will be written, weights in the operators that they are stored by; `None` for tract,
    /// which lacks some of these.
    #[must_use]
    pub fn as_written(&self) -> Option<Self> {
        self.onnxruntime.is_some().then(|| Self { given: Given::Written, ..self.clone() })
    }

    /// The same engine for files as they will be written, with all its optimizations, so that it may multiply by the codes of weights;
    /// `None` for tract.
    #[must_use]
    pub fn optimized(&self) -> Option<Self> {
        self.onnxruntime.is_some().then(|| Self { given: Given::Optimized, ..self.clone() })
    }

    /// The same engine with a limit on the memory of a run, in bytes.
    #[must_use]
    pub fn with_max_memory(self, bytes: u64) -> Self {
        Self { max_memory: bytes, ..self }
    }

    /// Checks that `model` can be run on `samples` inputs of the shapes of `bound` in the memory that is allowed.
    ///
    /// # Errors
    ///
    /// When what is known of its values already takes more.
    pub fn check_memory(&self, model: &Model, bound: &Bound, samples: usize) -> Result<(), Cannot> {
        let elements = |dims: &Vec<usize>| dims.iter().fold(1_u64, |n, &d| n.saturating_mul(d as u64));
        let fed = bound.values().map(elements).fold(0, u64::saturating_add).saturating_mul(8 * samples as u64);
        let needed = peak_memory(&model.graph, &Shapes::infer(&model.graph, bound)).saturating_add(fed);
        if needed > self.max_memory {
            return Err(Cannot::Memory { needed, allowed: self.max_memory });
        }
        Ok(())
    }

    /// Prepares `model` for inputs shaped like `sample`, one value for each input that must be fed.
    ///
    /// # Errors
    ///
    /// When the engine can't run the model, or is known to run it wrongly.
    pub fn prepare(&self, model: &Model, sample: &[Value]) -> Result<Runner, Cannot> {
        let types = model
            .graph
            .fed_inputs()
            .map(|input| {
                let name = || Cannot::InputType(input.info.name().to_owned());
                Fact::declared(&input.info).dtype.filter(|&t| can_be_fed(t)).ok_or_else(name)
            })
            .collect::<Result<_, _>>()?;
        // Listed constants would be taken for inputs that nobody feeds.
        let mut plain = model.clone();
        plain.graph.unlist_default_values();
        plain.graph.inline_external();
        let prepared = Prepared { model: &plain, types };
        Ok(Runner(match &self.onnxruntime {
            Some(library) => Box::new(library.session(&prepared, sample, self.given)?),
            None => in_tract(&prepared, sample)?,
        }))
    }
}

/// Prepares a model for tract, or for the evaluator of constants where that knows all of it and tract does not.
fn in_tract(prepared: &Prepared<'_>, sample: &[Value]) -> Result<Box<dyn Run>, Cannot> {
    let planned = branches::Branches::new(prepared, sample);
    planned.map(|plan| Box::new(plan) as Box<dyn Run>).or_else(|why| {
        interpreter::Interpreter::new(prepared, sample).map(|all| Box::new(all) as Box<dyn Run>).map_err(|_| why)
    })
}

/// A model ready to show some of its values.
#[derive(Debug)]
pub struct Probe {
    /// `None` where nothing has to be computed.
    runner: Option<Runner>,
    /// Where each value is found.
    places: Vec<Place>,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    Input(usize),
    Output(usize),
}

impl Probe {
    /// The values for one sample.
    ///
    /// # Errors
    ///
    /// When the engine fails on it.
    pub fn run(&self, sample: &[Value]) -> Result<Vec<Value>, Cannot> {
        let mut found = self.runner.as_ref().map_or(Ok(Vec::new()), |runner| runner.run(sample))?;
        let mut take = |place: &Place| match *place {
            Place::Input(i) => sample[i].clone(),
            Place::Output(i) => {
                std::mem::replace(&mut found[i], Value { dims: vec![], values: vec![], dtype: DType::Float })
            }
        };
        Ok(self.places.iter().map(&mut take).collect())
    }
}

impl Engine {
    /// Prepares `model` to show `values`, each once, for inputs shaped like `sample`.
    ///
    /// # Errors
    ///
    /// As [`prepare`](Self::prepare).
    pub fn probe(&self, model: &Model, values: &[Outlet], sample: &[Value]) -> Result<Probe, Cannot> {
        let graph = &model.graph;
        let input = |value: &Outlet| graph.fed_inputs().position(|input| input.node.out() == *value);
        let computed: Vec<_> = values.iter().copied().filter(|value| input(value).is_none()).collect();
        let place = |value: &Outlet| match input(value) {
            Some(i) => Place::Input(i),
            None => Place::Output(computed.iter().position(|other| other == value).unwrap_or_default()),
        };
        let places = values.iter().map(place).collect();
        let runner = if computed.is_empty() {
            None
        } else {
            Some(self.prepare(&model.with_graph(graph.computing(&computed)), sample)?)
        };
        Ok(Probe { runner, places })
    }
}

/// A model whose every constant is inside, and the types of the inputs to feed.
struct Prepared<'a> {
    model: &'a Model,
    types: Vec<DType>,
}

/// A model that an engine has loaded.
trait Run: Send + Sync {
    /// The outputs for one sample.
    fn run(&self, sample: &[Value]) -> Result<Vec<Value>, Cannot>;

    /// Notes which branches have been taken, as far as that is known.
    fn note_branches(&self, _: &mut BTreeMap<Branch, bool>) {}
}

/// A branch: the label of the `If` and the attribute that holds it.
pub(super) type Branch = (String, &'static str);

/// A model ready to be run on inputs of one set of shapes.
pub struct Runner(Box<dyn Run>);

impl fmt::Debug for Runner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Runner")
    }
}

impl Runner {
    /// The outputs for one sample.
    ///
    /// # Errors
    ///
    /// When the engine fails on it.
    pub fn run(&self, sample: &[Value]) -> Result<Vec<Value>, Cannot> {
        self.0.run(sample)
    }

    /// Notes which branches the samples so far took, beside what is noted already.
    pub(super) fn note_branches(&self, taken: &mut BTreeMap<Branch, bool>) {
        self.0.note_branches(taken);
    }
}

fn can_be_fed(dtype: DType) -> bool {
    use DType::{Bfloat16, Bool, Double, Float, Float16, Int8, Int16, Int32, Int64, Uint8, Uint16, Uint32, Uint64};
    matches!(
        dtype,
        Float | Double | Float16 | Bfloat16 | Int64 | Int32 | Int16 | Int8 | Uint64 | Uint32 | Uint16 | Uint8 | Bool
    )
}

thread_local! {
    static GUARDING: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is running an engine, whose panics are caught and told as errors: a panic hook need not print.
#[must_use]
pub fn catches_panics() -> bool {
    GUARDING.get()
}

/// Runs `f`, turning errors and panics of `engine` into a [`Cannot`].
fn guarded<T, E: fmt::Display>(engine: &'static str, f: impl FnOnce() -> Result<T, E>) -> Result<T, Cannot> {
    GUARDING.set(true);
    let result = catch_unwind(AssertUnwindSafe(f));
    GUARDING.set(false);
    let why = match result {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => Cow::Owned(format!("{error:#}")),
        Err(_) => Cow::Borrowed("it fails without saying why"),
    };
    Err(Cannot::Engine { engine, why: why.into_owned() })
}
