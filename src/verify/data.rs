//! What models are run on: a person's samples, or seeded random values.

mod npz;
mod tries;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::PathBuf,
};

use rand_core::{Rng, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;

use self::tries::{OpenAxes, bound};
use super::{
    Bound,
    engine::{Cannot, Engine, Value},
};
use crate::{
    analysis::{
        cost::work,
        shapes::{Fact, Shapes},
    },
    codec::Model,
    ir::{DType, Graph, Inlet, NodeId, Op, Outlet},
    linalg::normal,
    proto::{
        TypeProto, ValueInfoProto,
        tensor_shape_proto::{Dimension, dimension},
        type_proto,
    },
};

/// Random samples for the search, and as many others for the final word.
const RANDOM_SAMPLES: usize = 16;
/// As many where running the model takes long and few will do.
const FEW_SAMPLES: usize = 2;
/// Open axes are so short that a run is estimated to take at most so many multiply-adds, where that is possible.
const MAX_WORK: u64 = 2_000_000_000;
/// A sample has at most so many elements, where open axes allow that.
const MAX_ELEMENTS: u64 = 1 << 20;
/// Shapes that are looked at for a model that is not run.
const MAX_LIKELY: usize = 16;
/// Shapes at which the engine fails before no others are tried; so many if it always says the same.
const MAX_FAILURES: usize = 64;
const ALIKE_FAILURES: usize = 10;
/// Shapes that take long that are tried where no others will do.
const MAX_LATE: usize = 3;
/// All random samples together are to take about this many multiply-adds where only a few of them are needed.
const FEW_WORK: u64 = 200_000_000;
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

/// Why the model does not run at these shapes.
fn told(bound: &Bound, why: &Cannot) -> String {
    const NAMED: usize = 4;
    let shape = |(name, dims): (&String, &Vec<usize>)| format!("{name}={}", spelled(dims.iter().map(|&d| Some(d))));
    let shapes: Vec<_> = bound.iter().take(NAMED).map(shape).collect();
    let more = if bound.len() > NAMED { ", …" } else { "" };
    format!("{why}, at input shapes {}{more}", shapes.join(", "))
}

/// The elements of one sample.
fn elements(bound: &Bound) -> u64 {
    let count = |dims: &Vec<usize>| dims.iter().fold(1_u64, |n, &d| n.saturating_mul(d as u64));
    bound.values().map(count).fold(0, u64::saturating_add)
}

/// An input that must be fed.
struct Slot {
    name: String,
    fact: Fact,
    /// The names of its open axes; empty for the others.
    axes: Vec<String>,
    /// Axes that are called like the first axis of some input: batches.
    batches: Vec<usize>,
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
        Ok(Source::new(model, request)?.gather(model, false))
    }

    /// Input shapes for a model that is not run: those of `request`, else open axes as long as lets shape inference see the most.
    #[must_use]
    pub fn likely_shapes(model: &Model, request: &Request) -> Bound {
        let slots = slots(&model.graph);
        let (mut best, mut most) = (Bound::new(), None);
        for lengths in OpenAxes::of(&slots, request).tries().iter().take(MAX_LIKELY) {
            let bound = bound(&slots, request, 1, lengths);
            let shapes = Shapes::infer(&model.graph, &bound);
            // The first of the best: larger inputs are likelier to be real ones.
            let is_light = work(&model.graph, &shapes) <= MAX_WORK && elements(&bound) <= MAX_ELEMENTS;
            let rank = (shapes.is_possible(), is_light, shapes.known_count());
            if most.is_none_or(|most| rank > most) {
                most = Some(rank);
                best = bound;
            }
        }
        best
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
}

/// What samples are made of: the inputs to feed, and the values that are given for some of them.
pub struct Source<'a> {
    request: &'a Request,
    slots: Vec<Slot>,
    given: BTreeMap<String, Vec<Value>>,
    /// How many samples the data gives.
    given_count: usize,
    /// Arrays that name no input.
    pub ignored: Vec<String>,
    /// Inputs that the data has no array for, nor the request a value.
    pub drawn: Vec<String>,
}

impl<'a> Source<'a> {
    /// Reads what `request` gives for the inputs of `model`.
    ///
    /// # Errors
    ///
    /// When that does not fit the inputs.
    pub fn new(model: &Model, request: &'a Request) -> Result<Self, DataError> {
        let slots = slots(&model.graph);
        let names = || slots.iter().map(|slot| format!("`{}`", slot.name)).collect::<Vec<_>>().join(", ");
        let known = |name: &str| slots.iter().any(|slot| slot.name == *name);
        if let Some(name) = request.fixed.keys().chain(request.shapes.keys()).find(|name| !known(name)) {
            return Err(DataError::NoSuchInput(name.clone(), names()));
        }
        check_shapes(&slots, request)?;
        let Some(path) = &request.data else {
            let (given, drawn) = (BTreeMap::new(), Vec::new());
            return Ok(Self { request, slots, given, given_count: 0, ignored: Vec::new(), drawn });
        };
        let (arrays, ignored) = npz::read(path, &slots)?;
        if arrays.is_empty() {
            let found = ignored.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
            let found = if found.is_empty() { "no arrays".to_owned() } else { found };
            return Err(DataError::NothingNamed { found, inputs: names() });
        }
        let (given, given_count) = npz::cut(&slots, arrays)?;
        let drawn = slots.iter().filter(|slot| slot.is_drawn(request, &given)).map(|slot| slot.name.clone()).collect();
        if given_count < 8 {
            return Err(DataError::TooFew(given_count));
        }
        Ok(Self { request, slots, given, given_count, ignored, drawn })
    }

    /// Samples at shapes at which the engine runs `model`; `few` of them where a run takes long and they are drawn.
    #[must_use]
    pub fn gather(self, model: &Model, few: bool) -> Samples {
        let open = OpenAxes::of(&self.slots, self.request);
        let tries = open.tries();
        let (mut failures, mut reasons) = (Vec::new(), Vec::new());
        // Shapes that take too long come last, the shortest first.
        let mut late = Vec::new();
        for (place, lengths) in tries.iter().enumerate() {
            let bound = self.bound(1, lengths);
            if tries.len() > 1 {
                let shapes = Shapes::infer(&model.graph, &bound);
                if !shapes.is_possible() {
                    continue;
                }
                let work = work(&model.graph, &shapes);
                if work > MAX_WORK || elements(&bound) > MAX_ELEMENTS {
                    late.push((work.saturating_add(elements(&bound)), place));
                    continue;
                }
            }
            match self.try_shapes(model, (&open, lengths), few) {
                Ok(samples) => return samples,
                Err(why) => {
                    let is_final = matches!(why, Cannot::Unsound { .. }) || failures.len() >= MAX_FAILURES;
                    failures.push(told(&bound, &why));
                    // Where the lengths make no difference, others need not be tried.
                    reasons.push(why.to_string());
                    let alike = reasons.len() > ALIKE_FAILURES && reasons.windows(2).all(|pair| pair[0] == pair[1]);
                    if is_final || alike {
                        late.clear();
                        break;
                    }
                }
            }
        }
        late.sort_unstable();
        for (_, place) in late.into_iter().take(MAX_LATE) {
            match self.try_shapes(model, (&open, &tries[place]), few) {
                Ok(samples) => return samples,
                Err(why) => failures.push(told(&self.bound(1, &tries[place]), &why)),
            }
        }
        let bound = Samples::likely_shapes(model, self.request);
        let unrunnable = failures.into_iter().next();
        let unrunnable = unrunnable.or_else(|| Some("no shapes of its inputs were found that it accepts".to_owned()));
        let (ignored, drawn) = (self.ignored, self.drawn);
        Samples { all: Vec::new(), random: true, bound, other: None, unrunnable, ignored, drawn }
    }

    /// The shapes of the inputs: of what is given, else with open axes of these lengths.
    fn bound(&self, batch: usize, lengths: &[Vec<usize>]) -> Bound {
        let mut bound = bound(&self.slots, self.request, batch, lengths);
        for (name, values) in &self.given {
            bound.insert(name.clone(), values.first().map(|value| value.dims.clone()).unwrap_or_default());
        }
        bound
    }

    /// Samples with open axes of these lengths, if the engine runs the model on them.
    fn try_shapes(
        &self,
        model: &Model,
        (open, lengths): (&OpenAxes, &[Vec<usize>]),
        few: bool,
    ) -> Result<Samples, Cannot> {
        let engine = &self.request.engine;
        let main = self.bound(1, lengths);
        let is_random = self.request.data.is_none();
        let count = if !is_random {
            self.given_count
        } else if few {
            self.few(work(&model.graph, &Shapes::infer(&model.graph, &main)))
        } else {
            2 * RANDOM_SAMPLES
        };
        let runs = |bound: &Bound| {
            engine.check_memory(model, bound, count)?;
            let one = self.draw(model, std::slice::from_ref(bound), 1);
            engine.prepare(model, one.first().ok_or(Cannot::NoSamples)?)
        };
        runs(&main)?;
        let others = if is_random { open.others(&self.slots, self.request, lengths) } else { Vec::new() };
        let limit = MAX_WORK.max(2 * work(&model.graph, &Shapes::infer(&model.graph, &main)));
        let is_likely = |bound: &Bound| {
            let shapes = Shapes::infer(&model.graph, bound);
            shapes.is_possible() && work(&model.graph, &shapes) <= limit
        };
        let other = others.into_iter().filter(is_likely).find(|bound| runs(bound).is_ok());
        let bounds: Vec<_> = std::iter::once(main.clone()).chain(other.clone()).collect();
        let all = self.telling(model, &bounds, count).unwrap_or_else(|| self.draw(model, &bounds, count));
        let (ignored, drawn) = (self.ignored.clone(), self.drawn.clone());
        Ok(Samples { all, random: is_random, bound: main, other, unrunnable: None, ignored, drawn })
    }

    /// How many samples of a model that takes so much work are a few.
    fn few(&self, work: u64) -> usize {
        let least = if self.compares() { 2 * FEW_SAMPLES } else { FEW_SAMPLES };
        let affordable = (FEW_WORK / work.max(1)).min(RANDOM_SAMPLES as u64) as usize;
        2 * affordable.next_multiple_of(4).clamp(least, RANDOM_SAMPLES)
    }

    /// Whether inputs that are drawn are compared with numbers.
    fn compares(&self) -> bool {
        self.slots.iter().any(|slot| !slot.compared.is_empty() && slot.is_drawn(self.request, &self.given))
    }

    /// Samples some of which take the numbers that inputs are compared with, if the model runs on these.
    fn telling(&self, model: &Model, bounds: &[Bound], count: usize) -> Option<Vec<Vec<Value>>> {
        if !self.compares() {
            return None;
        }
        let mut samples = self.draw(model, bounds, count);
        self.take_compared(&mut samples);
        let runs = |sample: &Vec<Value>| self.request.engine.prepare(model, sample).is_ok();
        samples.iter().skip(COMPARED_PERIOD / 2).step_by(2).take(bounds.len()).all(runs).then_some(samples)
    }

    /// Samples of the shapes of `bounds`, which take turns in pairs so that each part of the split has them all.
    fn draw(&self, model: &Model, bounds: &[Bound], count: usize) -> Vec<Vec<Value>> {
        let below = below(&model.graph, bounds);
        let mut random = Xoshiro256PlusPlus::seed_from_u64(0x5eed);
        let mut one = |(slot, &below): (&Slot, &usize), i: usize| {
            if let Some(values) = self.given.get(&slot.name) {
                return values[i].clone();
            }
            let dims = &bounds[i / 2 % bounds.len()][&slot.name];
            slot.random(dims, self.request.fixed.get(&slot.name).copied(), below, &mut random)
        };
        (0..count).map(|i| self.slots.iter().zip(&below).map(|slot| one(slot, i)).collect()).collect()
    }

    /// Gives every second four of `samples` the numbers that what is drawn is compared with, so that both arms of what depends on it are
    /// run.
    fn take_compared(&self, samples: &mut [Vec<Value>]) {
        for (i, sample) in samples.iter_mut().enumerate().filter(|(i, _)| i % COMPARED_PERIOD >= COMPARED_PERIOD / 2) {
            let compared = |slot: &&Slot| !slot.compared.is_empty() && slot.is_drawn(self.request, &self.given);
            for (value, slot) in sample.iter_mut().zip(&self.slots).filter(|(_, slot)| compared(slot)) {
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

    /// The shape that `request` gives, else the declared one with open axes of these lengths.
    fn shape(&self, request: &Request, batch: usize, lengths: &[usize]) -> Vec<usize> {
        if let Some(dims) = request.shapes.get(&self.name) {
            return dims.clone();
        }
        let dims = self.fact.extents().unwrap_or_default();
        let extent =
            |(i, d): (usize, &Option<usize>)| d.unwrap_or(if self.batches.contains(&i) { batch } else { lengths[i] });
        dims.iter().enumerate().map(extent).collect()
    }

    fn random(&self, dims: &[usize], fixed: Option<f64>, below: usize, random: &mut impl Rng) -> Value {
        let count = dims.iter().product();
        let is_float = self.fact.dtype.is_some_and(crate::ir::tensor::is_float);
        let below = if self.fact.dtype == Some(DType::Bool) { 2 } else { below.max(1) };
        // Each sample has integers of a range of its own: drawn from all of them, long rows of integers are all alike.
        let [a, b] = if is_float { [0, 0] } else { [(); 2].map(|()| random.next_u64() % below as u64) };
        let mut draw = || match fixed {
            Some(value) => value,
            None if is_float => f64::from(normal(random) as f32),
            None => (a.min(b) + random.next_u64() % (a.abs_diff(b) + 1)) as f64,
        };
        Value {
            dims: dims.to_vec(),
            values: (0..count).map(|_| draw()).collect(),
            dtype: self.fact.dtype.unwrap_or(DType::Float),
        }
    }
}

/// The inputs that must be fed.
fn slots(graph: &Graph) -> Vec<Slot> {
    let firsts: Vec<_> = graph.fed_inputs().filter_map(|input| axis_names(&input.info).into_iter().next()).collect();
    let slot = |input: &crate::ir::Input| {
        let names = axis_names(&input.info);
        let batches = (0..names.len().max(1)).filter(|&i| i == 0 || !names[i].is_empty() && firsts.contains(&names[i]));
        let batches = batches.collect();
        let compared = compared(graph, input.node.out());
        Slot { name: input.info.name().to_owned(), fact: Fact::declared(&input.info), axes: names, batches, compared }
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

/// What integers of each input lie below: the extent of the smallest table that they index at any of these shapes.
fn below(graph: &Graph, bounds: &[Bound]) -> Vec<usize> {
    let shapes: Vec<_> = bounds.iter().map(|bound| Shapes::infer(graph, bound)).collect();
    let below = |input: &crate::ir::Input| {
        let tables = shapes.iter().filter_map(|shapes| table(graph, shapes, input.node.out()));
        tables.min().unwrap_or(INTEGERS_BELOW)
    };
    graph.fed_inputs().map(below).collect()
}

/// Operators that hand indices on to what reads them.
const HANDING_ON: &[&str] = &["Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"];
/// Operators that hand some of their indices on.
const PICKING: &[&str] = &["Gather", "Slice", "Split", "Expand", "Tile", "Concat"];

/// The extent of the smallest table that `value` is an index into.
pub(super) fn table(graph: &Graph, shapes: &Shapes, value: Outlet) -> Option<usize> {
    let (mut smallest, mut seen, mut stack) = (None, BTreeSet::from([value]), vec![value]);
    while let Some(value) = stack.pop() {
        for (node, inlet) in graph.uses(value) {
            let Some(kind) = graph.op(node).and_then(Op::standard) else { continue };
            let Inlet::Slot(slot) = inlet else { continue };
            if let Some(extent) = indexed(graph, shapes, (node, kind), slot) {
                smallest = Some(smallest.map_or(extent, |least: usize| least.min(extent)));
            }
            let hands_on =
                slot == 0 && HANDING_ON.contains(&kind) || PICKING.contains(&kind) && (slot == 0 || kind == "Concat");
            if hands_on {
                let made = (0..graph.output_count(node)).map(|slot| node.at(slot));
                stack.extend(made.filter(|&made| seen.insert(made)));
            }
        }
    }
    smallest
}

/// How many places there are for what `node` reads in `slot`, if those are indices.
fn indexed(graph: &Graph, shapes: &Shapes, (node, kind): (NodeId, &str), slot: u32) -> Option<usize> {
    if slot != 1 {
        return None;
    }
    let table = shapes.fact(graph.operand(node, 0)?)?.extents()?;
    match kind {
        "Gather" | "GatherElements" | "ScatterElements" | "Scatter" => {
            table[crate::eval::axis(graph.op(node)?.int("axis").unwrap_or(0), table.len())?]
        }
        "GatherND" | "ScatterND" => table.into_iter().min()?,
        _ => None,
    }
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
