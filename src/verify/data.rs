//! What models are run on: a person's samples, or seeded random values.

mod npz;

use std::{collections::BTreeMap, io, path::PathBuf};

use rand_core::{Rng, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;

use super::{
    Bound,
    engine::{Cannot, Engine, Value},
};
use crate::{
    analysis::shapes::{Fact, Shapes},
    codec::Model,
    ir::{DType, Graph, Inlet, Op, Outlet},
    linalg::normal,
    proto::{
        TypeProto, ValueInfoProto,
        tensor_shape_proto::{Dimension, dimension},
        type_proto,
    },
};

/// Random samples for the search, and as many others for the final word.
const RANDOM_SAMPLES: usize = 16;
/// What an open axis beyond the first is tried as.
const OPEN_AXES: &[usize] = &[224, 64, 32, 16, 1];
/// At most so many mixtures of these sizes are tried, where one size does not suit all inputs.
const MAX_MIXTURES: usize = 125;
/// Random integers lie below this where they index no table that is known, else below its size: what is done to any row
/// of the table must show.
const INTEGERS_BELOW: usize = 128;
/// So many samples hold as many that take the numbers that inputs are compared with as others.
const COMPARED_PERIOD: usize = 8;

/// Which samples something may look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// For fitting weights.
    Fit,
    /// For choosing how much to do.
    Search,
    /// For the final word; never seen by the others.
    Last,
}

/// Where samples come from.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// An `.npz` file with one array for each input.
    pub data: Option<PathBuf>,
    /// Inputs that always have one value.
    pub fixed: BTreeMap<String, f64>,
    /// Shapes of inputs.
    pub shapes: Bound,
    /// What runs the model.
    pub engine: Engine,
}

/// Samples for the inputs of a model, split into parts that never mix.
#[derive(Clone, Debug)]
pub struct Samples {
    all: Vec<Vec<Value>>,
    /// Whether the values are random.
    pub random: bool,
    /// The shapes that they have.
    pub bound: Bound,
    /// The shapes that half of them have where shapes are open and the values random: what holds at one shape alone is
    /// not always so.
    pub other: Option<Bound>,
    /// Why the model can't be run on them, if it can't.
    pub unrunnable: Option<String>,
    /// Arrays that name no input.
    pub ignored: Vec<String>,
    /// Inputs that the data has no array for, nor the request a value.
    pub drawn: Vec<String>,
}

/// Why samples can't be had.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The file can't be read.
    #[error("{path}: cannot be read; --data wants an .npz file with one array for each input", path = .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// None of the arrays is for an input.
    #[error("no array of the data file is named like an input; it has {found}, and the inputs are {inputs}")]
    NothingNamed {
        /// The arrays.
        found: String,
        /// The inputs.
        inputs: String,
    },
    /// An array holds what is no number.
    #[error("array `{name}` holds NaN in sample {sample}; leave such samples out")]
    NotANumber {
        /// The input.
        name: String,
        /// The sample, from 0.
        sample: usize,
    },
    /// An array has the wrong type.
    #[error("array `{name}` holds {found}, but the input is {wanted}; convert it with .astype", wanted = .wanted.as_str_name())]
    WrongType {
        /// The input.
        name: String,
        /// The type of the array, as numpy writes it.
        found: String,
        /// The type of the input.
        wanted: DType,
    },
    /// An array has the wrong shape.
    #[error("array `{name}` has shape {found}, which gives no samples for an input of shape {wanted}", found = spelled(.found.iter().map(|&d| Some(d))))]
    WrongShape {
        /// The input.
        name: String,
        /// The shape of the array.
        found: Vec<usize>,
        /// The shape of the input, as declared.
        wanted: String,
    },
    /// Too few samples to be split.
    #[error(
        "the data gives {0} samples; at least 8 are needed, since they are split into parts that do different things"
    )]
    TooFew(usize),
    /// Arrays of different lengths.
    #[error("array `{0}` gives {1} samples and array `{2}` {3}; each sample needs one of each")]
    Lengths(String, usize, String, usize),
    /// A shape given on the command line can't be the input's.
    #[error("--shape: `{name}` is declared as {declared}, which {given} is not")]
    Contradicts {
        /// The input.
        name: String,
        /// The shape that the model declares.
        declared: String,
        /// The shape that was given.
        given: String,
    },
    /// A name given on the command line is no input.
    #[error("the model has no input `{0}`; its inputs are {1}")]
    NoSuchInput(String, String),
}

impl DataError {
    /// Whether what was asked for is no matter of the data.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::NoSuchInput(..) | Self::Contradicts { .. })
    }
}

/// A shape as `--shape` takes it; `?` for what is not known.
fn spelled(dims: impl Iterator<Item = Option<usize>>) -> String {
    let extents: Vec<_> = dims.map(|d| d.map_or_else(|| "?".to_owned(), |d| d.to_string())).collect();
    if extents.is_empty() { "scalar".to_owned() } else { extents.join("x") }
}

/// An input that must be fed.
struct Slot {
    name: String,
    fact: Fact,
    /// Axes that are called like the first axis of some input: batches.
    batches: Vec<usize>,
    below: usize,
    /// The numbers that it is compared with.
    compared: Vec<f64>,
}

impl Samples {
    /// The samples that `request` asks for, for `model`.
    ///
    /// # Errors
    ///
    /// When the data does not fit the inputs.
    pub fn gather(model: &Model, request: &Request) -> Result<Self, DataError> {
        let slots = slots(&model.graph);
        let names = || slots.iter().map(|slot| format!("`{}`", slot.name)).collect::<Vec<_>>().join(", ");
        let known = |name: &str| slots.iter().any(|slot| slot.name == *name);
        if let Some(name) = request.fixed.keys().chain(request.shapes.keys()).find(|name| !known(name)) {
            return Err(DataError::NoSuchInput(name.clone(), names()));
        }
        check_shapes(&slots, request)?;
        let (arrays, ignored) = match &request.data {
            Some(path) => npz::read(path, &slots)?,
            None => (BTreeMap::new(), Vec::new()),
        };
        if request.data.is_some() && arrays.is_empty() {
            let found = ignored.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
            let found = if found.is_empty() { "no arrays".to_owned() } else { found };
            return Err(DataError::NothingNamed { found, inputs: names() });
        }
        let (split, shortest) = npz::cut(&slots, arrays)?;
        let drawn: Vec<_> = if request.data.is_some() {
            slots.iter().filter(|slot| slot.is_drawn(request, &split)).map(|slot| slot.name.clone()).collect()
        } else {
            Vec::new()
        };
        if request.data.is_some() && shortest < 8 {
            return Err(DataError::TooFew(shortest));
        }
        let count = if request.data.is_some() { shortest } else { 2 * RANDOM_SAMPLES };
        let mut failures = Vec::new();
        for sizes in open_sizes(&slots, request) {
            // Sizes of their own for each input are worth a try only where sizes make a difference.
            let mixed = sizes.windows(2).any(|pair| pair[0] != pair[1]);
            if mixed && failures.windows(2).all(|pair| pair[0] == pair[1]) {
                break;
            }
            let shape = |(slot, &open): (&Slot, &usize)| match split.get(&slot.name) {
                Some(values) => values.first().map(|value| value.dims.clone()).unwrap_or_default(),
                None => slot.shape(request, 1, open),
            };
            let names = slots.iter().map(|slot| slot.name.clone());
            let bound: Bound = names.zip(slots.iter().zip(&sizes).map(shape)).collect();
            let runs = |bound: &Bound| {
                request.engine.check_memory(model, bound, count)?;
                let one = Self::draw(&slots, request, &split, std::slice::from_ref(bound), 1);
                request.engine.prepare(model, one.first().ok_or(Cannot::NoSamples)?)
            };
            let telling = |bounds: &[Bound]| {
                let mut samples = Self::draw(&slots, request, &split, bounds, count);
                Self::take_compared(&slots, request, &split, &mut samples);
                let runs = |sample: &Vec<Value>| request.engine.prepare(model, sample).is_ok();
                samples.iter().skip(COMPARED_PERIOD / 2).step_by(2).take(bounds.len()).all(runs).then_some(samples)
            };
            let Err(why) = runs(&bound) else {
                let other = if request.data.is_some() {
                    None
                } else {
                    other_shapes(&slots, request, &sizes).into_iter().find(|bound| runs(bound).is_ok())
                };
                let bounds: Vec<_> = std::iter::once(bound.clone()).chain(other.clone()).collect();
                let all = telling(&bounds).unwrap_or_else(|| Self::draw(&slots, request, &split, &bounds, count));
                return Ok(Self {
                    all,
                    random: request.data.is_none(),
                    bound,
                    other,
                    unrunnable: None,
                    ignored,
                    drawn,
                });
            };
            failures.push(why.to_string());
            if matches!(why, Cannot::Unsound { .. }) {
                break;
            }
        }
        let unrunnable = failures.into_iter().next();
        let bound = Self::likely_shapes(model, request);
        Ok(Self { all: Vec::new(), random: true, bound, other: None, unrunnable, ignored, drawn })
    }

    /// Input shapes for a model that is not run: those of `request`, else open axes as large as lets shape inference see
    /// the most.
    #[must_use]
    pub fn likely_shapes(model: &Model, request: &Request) -> Bound {
        let slots = slots(&model.graph);
        let shape = |slot: &Slot, open| (slot.name.clone(), slot.shape(request, 1, open));
        let bound = |open: usize| slots.iter().map(|slot| shape(slot, open)).collect::<Bound>();
        let candidates = OPEN_AXES.iter().map(|&open| {
            let bound = bound(open);
            (Shapes::infer(&model.graph, &bound).known_count(), bound)
        });
        // The first of the best: larger inputs are likelier to be real ones.
        candidates.reduce(|best, next| if next.0 > best.0 { next } else { best }).map(|best| best.1).unwrap_or_default()
    }

    /// Which shapes were taken for open axes, where there were any to choose.
    #[must_use]
    pub fn chosen_shapes(&self) -> Option<String> {
        let other = self.other.as_ref()?;
        let spell = |dims: &[usize]| spelled(dims.iter().map(|&d| Some(d)));
        let each = |(name, dims): (&String, &Vec<usize>)| format!("{name}={} and {}", spell(dims), spell(&other[name]));
        let shapes: Vec<_> = self.bound.iter().filter(|(name, dims)| other[*name] != **dims).map(each).collect();
        Some(format!("open axes were tried as {}; --shape NAME=DIMS sets what matters to you", shapes.join(", ")))
    }

    /// All samples, in order.
    #[must_use]
    pub fn all(&self) -> &[Vec<Value>] {
        &self.all
    }

    /// The samples of one part, each with one value for each input that must be fed.
    #[must_use]
    pub fn part(&self, part: Split) -> Vec<Vec<Value>> {
        let belongs = |i: usize| match (part, i % 4) {
            (Split::Fit, 0 | 1) => !self.random,
            (Split::Search, 2) => true,
            (Split::Search, 0 | 1) => self.random && i.is_multiple_of(2),
            (Split::Last, 3) => true,
            (Split::Last, 1) => self.random,
            _ => false,
        };
        self.all.iter().enumerate().filter(|(i, _)| belongs(*i)).map(|(_, sample)| sample.clone()).collect()
    }

    /// Samples of the shapes of `bounds`, which take turns in pairs so that each part of the split has them all.
    fn draw(
        slots: &[Slot],
        request: &Request,
        given: &BTreeMap<String, Vec<Value>>,
        bounds: &[Bound],
        count: usize,
    ) -> Vec<Vec<Value>> {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(0x5eed);
        let mut one = |slot: &Slot, i: usize| {
            if let Some(values) = given.get(&slot.name) {
                return values[i].clone();
            }
            let dims = &bounds[i / 2 % bounds.len()][&slot.name];
            slot.random(dims, request.fixed.get(&slot.name).copied(), &mut random)
        };
        (0..count).map(|i| slots.iter().map(|slot| one(slot, i)).collect()).collect()
    }

    /// Gives every second four of `samples` the numbers that what is drawn is compared with, so that both arms of what
    /// depends on it are run.
    fn take_compared(
        slots: &[Slot],
        request: &Request,
        given: &BTreeMap<String, Vec<Value>>,
        samples: &mut [Vec<Value>],
    ) {
        for (i, sample) in samples.iter_mut().enumerate().filter(|(i, _)| i % COMPARED_PERIOD >= COMPARED_PERIOD / 2) {
            let compared = |slot: &&Slot| !slot.compared.is_empty() && slot.is_drawn(request, given);
            for (value, slot) in sample.iter_mut().zip(slots).filter(|(_, slot)| compared(slot)) {
                value.values.fill(slot.compared[i / COMPARED_PERIOD % slot.compared.len()]);
            }
        }
    }
}

impl Slot {
    /// Whether its values are drawn: neither `given` nor fixed by `request`.
    fn is_drawn(&self, request: &Request, given: &BTreeMap<String, Vec<Value>>) -> bool {
        !given.contains_key(&self.name) && !request.fixed.contains_key(&self.name)
    }

    /// The shape that `request` gives, else the declared one with its open axes of these extents.
    fn shape(&self, request: &Request, batch: usize, open: usize) -> Vec<usize> {
        if let Some(dims) = request.shapes.get(&self.name) {
            return dims.clone();
        }
        let dims = self.fact.extents().unwrap_or_default();
        let extent =
            |(i, d): (usize, &Option<usize>)| d.unwrap_or(if self.batches.contains(&i) { batch } else { open });
        dims.iter().enumerate().map(extent).collect()
    }

    /// How many axes beyond the batch are open.
    fn open_axes(&self) -> usize {
        let dims = self.fact.extents().unwrap_or_default();
        dims.iter().enumerate().filter(|(i, d)| d.is_none() && !self.batches.contains(i)).count()
    }

    fn random(&self, dims: &[usize], fixed: Option<f64>, random: &mut impl Rng) -> Value {
        let count = dims.iter().product();
        let is_float = self.fact.dtype.is_some_and(crate::ir::tensor::is_float);
        let below = if self.fact.dtype == Some(DType::Bool) { 2 } else { self.below.max(1) };
        // Each sample has integers of a range of its own: drawn from all of them, long rows of integers are all alike.
        let [a, b] = if is_float { [0, 0] } else { [(); 2].map(|()| random.next_u64() % below as u64) };
        let mut draw = || match fixed {
            Some(value) => value,
            None if is_float => f64::from(normal(random) as f32),
            None => (a.min(b) + random.next_u64() % (a.abs_diff(b) + 1)) as f64,
        };
        Value { dims: dims.to_vec(), values: (0..count).map(|_| draw()).collect(), is_float }
    }
}

/// The inputs that must be fed, with the size of the table that each indexes.
fn slots(graph: &Graph) -> Vec<Slot> {
    let firsts: Vec<_> = graph.fed_inputs().filter_map(|input| axis_names(&input.info).into_iter().next()).collect();
    let shapes = Shapes::infer(graph, &Bound::new());
    let slot = |input: &crate::ir::Input| {
        let below = table(graph, &shapes, input.node.out()).unwrap_or(INTEGERS_BELOW);
        let names = axis_names(&input.info);
        let batches = (0..names.len().max(1)).filter(|&i| i == 0 || !names[i].is_empty() && firsts.contains(&names[i]));
        let batches = batches.collect();
        let compared = compared(graph, input.node.out());
        Slot { name: input.info.name().to_owned(), fact: Fact::declared(&input.info), batches, below, compared }
    };
    graph.fed_inputs().map(slot).collect()
}

/// Checks that the shapes of `request` are ones that the inputs can have.
fn check_shapes(slots: &[Slot], request: &Request) -> Result<(), DataError> {
    for slot in slots {
        let (Some(given), Some(declared)) = (request.shapes.get(&slot.name), slot.fact.extents()) else { continue };
        if given.len() != declared.len() || given.iter().zip(&declared).any(|(g, d)| d.is_some_and(|d| d != *g)) {
            let declared = spelled(declared.iter().copied());
            let given = spelled(given.iter().map(|&d| Some(d)));
            return Err(DataError::Contradicts { name: slot.name.clone(), declared, given });
        }
    }
    Ok(())
}

/// Sizes of the open axes beyond the batch to try, one for each of `slots`: the same for all, then all mixtures.
fn open_sizes(slots: &[Slot], request: &Request) -> Vec<Vec<usize>> {
    let is_open =
        |slot: &Slot| (slot.fact.dims.is_none() || slot.open_axes() > 0) && !request.shapes.contains_key(&slot.name);
    let open: Vec<_> = (0..slots.len()).filter(|&i| is_open(&slots[i])).collect();
    if open.is_empty() {
        return vec![vec![1; slots.len()]];
    }
    let mut tries: Vec<Vec<usize>> = OPEN_AXES.iter().map(|&size| vec![size; slots.len()]).collect();
    for number in 0..OPEN_AXES.len().saturating_pow(open.len() as u32).min(MAX_MIXTURES) {
        let mut sizes = vec![OPEN_AXES[0]; slots.len()];
        let mut rest = number;
        for &i in open.iter().rev() {
            sizes[i] = OPEN_AXES[rest % OPEN_AXES.len()];
            rest /= OPEN_AXES.len();
        }
        if !tries.contains(&sizes) {
            tries.push(sizes);
        }
    }
    tries
}

/// Shapes to try besides those of `sizes`: a batch of 2, and other sizes of open axes. One open axis doubles; where there
/// are more, which multiply, they shrink.
fn other_shapes(slots: &[Slot], request: &Request, sizes: &[usize]) -> Vec<Bound> {
    let other = |size: usize, slot: &Slot| match slot.open_axes() {
        0 => size,
        1 => size * 2,
        _ => (size * 3 / 4).next_multiple_of(32).min(size),
    };
    let bound = |batch: usize, grows: bool| -> Bound {
        let shape = |(slot, &size): (&Slot, &usize)| {
            let size = if grows { other(size, slot) } else { size };
            (slot.name.clone(), slot.shape(request, batch, size))
        };
        slots.iter().zip(sizes).map(shape).collect()
    };
    let main = bound(1, false);
    let mut bounds: Vec<_> = [(2, true), (1, true), (2, false)].map(|(batch, grows)| bound(batch, grows)).into();
    bounds.retain(|bound| *bound != main);
    bounds.dedup();
    bounds
}

/// The names of the open axes of an input; empty for the others.
fn axis_names(info: &ValueInfoProto) -> Vec<String> {
    let Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), .. }) = &info.r#type else {
        return Vec::new();
    };
    let name = |dim: &Dimension| match &dim.value {
        Some(dimension::Value::DimParam(name)) => name.clone(),
        _ => String::new(),
    };
    tensor.shape.iter().flat_map(|shape| shape.dim.iter().map(name)).collect()
}

/// Operators that hand indices on to what reads them.
const HANDING_ON: &[&str] = &["Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"];

/// The extent of the smallest table that `value` is an index into.
fn table(graph: &Graph, shapes: &Shapes, value: Outlet) -> Option<usize> {
    let indexed = graph.uses(value).into_iter().filter_map(|(node, inlet)| match inlet {
        Inlet::Slot(1) => {
            let op = graph.op_of(node, "Gather")?;
            let table = shapes.fact(graph.operand(node, 0)?)?.extents()?;
            table[crate::eval::axis(op.int("axis").unwrap_or(0), table.len())?]
        }
        Inlet::Slot(0) if graph.op(node)?.standard().is_some_and(|op| HANDING_ON.contains(&op)) => {
            table(graph, shapes, node.out())
        }
        _ => None,
    });
    indexed.min()
}

/// The numbers that `value`, an integer, is compared with for equality.
fn compared(graph: &Graph, value: Outlet) -> Vec<f64> {
    let mut numbers = Vec::new();
    for (node, inlet) in graph.uses(value) {
        let (Some(op), Inlet::Slot(slot)) = (graph.op(node).and_then(Op::standard), inlet) else { continue };
        if slot == 0 && HANDING_ON.contains(&op) {
            numbers.extend(compared(graph, node.out()));
        } else if op == "Equal" {
            let other = graph.operand(node, 1 - slot).and_then(|other| graph.constant(other)?.i64s());
            numbers.extend(other.into_iter().flatten().map(|number| number as f64));
        }
    }
    numbers
}
