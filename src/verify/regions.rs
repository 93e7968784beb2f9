//! Comparing only what changed, region by region: the proof for models that the engine can't run as a whole, and for those that it need
//! not run.
//!
//! The values of both graphs fall into [classes](classes) of equal ones: the same inputs, the same constants, and the same operators on
//! operands of the same classes. A value of the new graph that is called like one of the old graph and is in no class of that is the end
//! of a region that changed. Its old and its new form are cut at values that both graphs have, and run on random inputs of the types and
//! shapes of these; where they agree, the value is in the old one's class, and what comes after it may be equal again. Where nothing
//! can be proven, the old form takes the place of the new one.

mod classes;
mod feeds;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
};

use self::{
    classes::{Classes, Cut, Outer},
    feeds::Feeds,
};
use super::{Bound, Cannot, Difference, Engine, ROUNDING_BUDGET, Reference, Value};
use crate::{
    analysis::shapes::{Fact, Shapes},
    codec::Model,
    ir::{DType, Graph, Kind, NodeId, Outlet, Tensor, Weight, tensor::is_float},
};

/// Random inputs for each region.
const RUNS: usize = 4;
/// How often a region is cut, each time further back.
const ATTEMPTS: usize = 3;

/// What is done where a region can't be proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Policy {
    /// The first one is an error.
    Refuse,
    /// The old form takes the place of the new one.
    Undo,
}

/// A change that was taken back, and why.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Undone {
    /// The value that the region makes.
    pub value: String,
    /// Why it was not proven.
    pub why: String,
}

/// What is known of two models that were compared region by region.
#[derive(Clone, Debug, Default)]
pub struct Proof {
    /// How the regions that were run differ.
    pub difference: Difference,
    /// How many regions were run.
    pub regions: usize,
    /// The changes that were taken back.
    pub undone: Vec<Undone>,
}

/// Compares the regions in which `b` differs from `a`, at the input shapes of `bound`.
///
/// # Errors
///
/// When the engine can't run a region that changed.
pub fn compare_regions(engine: &Engine, a: &Model, b: &Model, bound: &Bound) -> Result<Difference, Cannot> {
    let mut b = b.clone();
    prove(engine, a, &mut b, bound, Policy::Refuse).map(|proof| proof.difference)
}

/// As [`compare_regions`], but takes back in `b` what can't be proven to compute the same.
///
/// # Errors
///
/// When the models differ in more than what they compute.
pub fn prove_regions(engine: &Engine, a: &Model, b: &mut Model, bound: &Bound) -> Result<Proof, Cannot> {
    prove(engine, a, b, bound, Policy::Undo)
}

/// Whether both models are the same but for names, copies of values, and operators and constants that were merged, moved or left out.
#[must_use]
pub fn are_alike(a: &Model, b: &Model) -> bool {
    if other_interface(a, b).is_some() {
        return false;
    }
    are_graphs_alike(&plain(a), &plain(b), [Captured::new(), Captured::new()])
}

fn are_graphs_alike(a: &Graph, b: &Graph, [captured_a, captured_b]: [Captured; 2]) -> bool {
    let mut classes = Classes::new(&settled(a, &captured_a), captured_a);
    classes.bind(captured_b);
    for id in b.order() {
        let equal = classes.same_but_for_bodies(a, b, id).is_some_and(|was| {
            let captured =
                [Classes::outer(a, was, &|v| classes.of_old(v)), Classes::outer(b, id, &|v| classes.of_new(v))];
            let bodies = |graph: &Graph, id: NodeId| graph.op(id).map(|op| op.bodies.clone()).unwrap_or_default();
            let mut pairs = bodies(a, was).into_iter().zip(bodies(b, id));
            pairs.all(|(old, new)| are_graphs_alike(&old.graph, &new.graph, captured.clone()))
        });
        classes.number(a, b, id, equal);
    }
    a.outputs().iter().zip(b.outputs()).all(|(x, y)| classes.are_equal(x.value, y.value))
}

/// `graph` with captured values that are constants as constants.
fn settled<'a>(graph: &'a Graph, captured: &Captured) -> Cow<'a, Graph> {
    let constant = |id: NodeId| match graph.kind(id) {
        Kind::Capture(number) => Some((id, captured.get(number)?.constant()?.clone())),
        _ => None,
    };
    let constants: Vec<_> = graph.node_ids().filter_map(constant).collect();
    if constants.is_empty() {
        return Cow::Borrowed(graph);
    }
    let mut graph = graph.clone();
    for (id, tensor) in constants {
        graph.settle(id, Weight::dense(tensor));
    }
    Cow::Owned(graph)
}

fn plain(model: &Model) -> Graph {
    let mut graph = model.graph.clone();
    graph.unlist_default_values();
    graph
}

fn prove(engine: &Engine, a: &Model, b: &mut Model, bound: &Bound, policy: Policy) -> Result<Proof, Cannot> {
    if let Some(what) = other_interface(a, b) {
        return Err(Cannot::Interface(what));
    }
    // Constants that callers may override are known by their names, where the new graph still lists them.
    let listed = b.graph.inputs().len() > b.graph.fed_inputs().count();
    let old = if listed { a.graph.clone() } else { plain(a) };
    let shapes = Shapes::infer(&old, bound);
    let mut prover = Prover { engine, model: a, policy, proof: Proof::default() };
    prover.proof.difference.samples = RUNS;
    let mut new = std::mem::take(&mut b.graph);
    let proven = prover.graph(&old, &mut new, &shapes, [Captured::new(), Captured::new()]);
    b.graph = new;
    if !proven? && policy == Policy::Undo {
        let value = a.graph.outputs().first().map(|output| output.info.name().to_owned()).unwrap_or_default();
        return Err(Cannot::Region { value, why: "what changed can't be taken back".to_owned() });
    }
    Ok(prover.proof)
}

/// What two models differ in that no region shows.
fn other_interface(a: &Model, b: &Model) -> Option<&'static str> {
    let inputs = |model: &Model| model.graph.fed_inputs().map(|input| input.info.clone()).collect::<Vec<_>>();
    let outputs =
        |model: &Model| model.graph.outputs().iter().map(|out| out.info.name().to_owned()).collect::<Vec<_>>();
    let opsets = |model: &Model| model.opsets().map(|(d, v)| (d.to_owned(), v)).collect::<BTreeSet<_>>();
    match () {
        () if inputs(a) != inputs(b) => Some("inputs"),
        () if outputs(a) != outputs(b) => Some("outputs"),
        () if opsets(a) != opsets(b) => Some("operator sets"),
        () if a.rest.functions != b.rest.functions => Some("functions"),
        () => None,
    }
}

/// What came of comparing a region.
enum Verdict {
    Equal,
    /// They compute something else, by so much.
    Different(f64),
    Unknown(Cannot),
}

/// The captured values of a body by number: their classes in the graph around it, and the tensors of those that are constants.
type Captured = BTreeMap<u32, Outer>;

struct Prover<'a> {
    engine: &'a Engine,
    model: &'a Model,
    policy: Policy,
    proof: Proof,
}

impl Prover<'_> {
    /// Has each output of `b` be in the class of that of `a`, by proof or by taking changes back. Whether all are.
    fn graph(
        &mut self,
        a: &Graph,
        b: &mut Graph,
        shapes: &Shapes,
        [captured_a, captured_b]: [Captured; 2],
    ) -> Result<bool, Cannot> {
        let a = &*settled(a, &captured_a);
        let mut classes = Classes::new(a, captured_a);
        classes.bind(captured_b.clone());
        let names = a.values();
        for id in b.order() {
            if !b.contains(id) {
                continue;
            }
            // What computes from equal values need not be run, as operators without a known kind can't be.
            for (x, y) in classes.other_operands(a, b, id) {
                match self.compare((a, shapes), &settled(b, &captured_b), (x, y), &classes, 2) {
                    Verdict::Equal => classes.unite(x, y),
                    Verdict::Different(_) | Verdict::Unknown(_) => break,
                }
            }
            if let Some(was) = classes.same_but_for_bodies(a, b, id) {
                let equal = self.bodies(a, was, b, id, (shapes, &classes))?;
                classes.number(a, b, id, equal);
            } else {
                classes.number(a, b, id, false);
            }
            for slot in 0..b.output_count(id) {
                let y = id.at(slot);
                let Some(&x) = names.get(b.name(y)).filter(|_| b.contains(id) && !b.name(y).is_empty()) else {
                    continue;
                };
                if classes.are_equal(x, y) || !is_computed(a, x) && !is_computed(b, y) {
                    continue;
                }
                self.settle((a, shapes), (b, &captured_b), (x, y), &mut classes)?;
            }
        }
        let mut all = true;
        for place in 0..a.outputs().len().min(b.outputs().len()) {
            let (x, y) = (a.outputs()[place].value, b.outputs()[place].value);
            if !classes.are_equal(x, y) && self.policy == Policy::Refuse {
                match self.compare((a, shapes), &settled(b, &captured_b), (x, y), &classes, ATTEMPTS) {
                    Verdict::Equal => classes.unite(x, y),
                    Verdict::Different(by) => self.note(by),
                    Verdict::Unknown(why) => return Err(why),
                }
            } else if !classes.are_equal(x, y) {
                let why = Cannot::Region { value: a.name(x).to_owned(), why: "it computes something else".to_owned() };
                all &= self.undo(a, b, (x, y), &mut classes, &why);
            }
        }
        Ok(all)
    }

    /// Puts `y` into the class of `x`, of the same name, if both are proven equal, or the old form is put in its place.
    fn settle(
        &mut self,
        (a, shapes): (&Graph, &Shapes),
        (b, captured): (&mut Graph, &Captured),
        (x, y): (Outlet, Outlet),
        classes: &mut Classes,
    ) -> Result<(), Cannot> {
        /// What is off by less computes the same, if not as exactly.
        const CLOSE: f64 = 1e-2;
        match self.compare((a, shapes), &settled(b, captured), (x, y), classes, ATTEMPTS) {
            Verdict::Equal => classes.unite(x, y),
            Verdict::Unknown(why) => {
                if self.policy == Policy::Refuse {
                    return Err(why);
                }
                self.undo(a, b, (x, y), classes, &why);
            }
            // What has its name may be something else, such as the same in another order of axes.
            Verdict::Different(by) => {
                let is_output = b.is_output(y);
                if self.policy == Policy::Refuse {
                    if is_output || by <= CLOSE {
                        self.note(by);
                        classes.unite(x, y);
                    }
                } else if is_output || by <= CLOSE {
                    let why = format!("old and new form differ by {by:.1e} where {ROUNDING_BUDGET:.0e} is rounding");
                    let why = Cannot::Region { value: a.name(x).to_owned(), why };
                    self.undo(a, b, (x, y), classes, &why);
                }
            }
        }
        Ok(())
    }

    fn note(&mut self, rounding: f64) {
        let difference = &mut self.proof.difference;
        difference.rounding = super::max(difference.rounding, rounding);
        difference.error = super::max(difference.error, rounding);
    }

    /// Has whatever reads `y` of the new graph read what computes `x` in the old one. Whether that can be done.
    fn undo(
        &mut self,
        a: &Graph,
        b: &mut Graph,
        (x, y): (Outlet, Outlet),
        classes: &mut Classes,
        why: &Cannot,
    ) -> bool {
        let mut known = classes.shared(b, (x, y));
        let before = known.clone();
        let Some(copy) = b.graft(a, x, &mut known, y.node) else { return false };
        for (&old, &new) in known.iter().filter(|(old, _)| !before.contains_key(old)) {
            classes.adopt(old, new);
        }
        b.forget_info(y);
        b.replace_uses(y, copy);
        b.sweep(y.node);
        self.proof.undone.push(Undone { value: a.name(x).to_owned(), why: why.to_string() });
        true
    }

    /// Runs both forms of a region, and again cut further back where they differ: values that depend on each other were drawn apart, or
    /// beyond the range of the element-wise operator that makes them. Not further than that: where more is between, less is seen of what
    /// differs.
    fn compare(
        &mut self,
        (a, shapes): (&Graph, &Shapes),
        b: &Graph,
        (x, y): (Outlet, Outlet),
        classes: &Classes,
        attempts: usize,
    ) -> Verdict {
        let is_known = |value: Outlet| fact(a, shapes, value).is_some();
        let mut verdict = Verdict::Unknown(Cannot::NoSamples);
        let (mut last, mut passed) = (Cut::default(), BTreeSet::new());
        for attempt in 0..attempts {
            let apart = attempt == 0;
            if attempt > 1 {
                passed = last.elementwise(a);
                if passed.is_empty() {
                    break;
                }
            }
            let cut = classes.cut((a, x), (b, y), (apart, &passed), &is_known);
            if attempt > 0 && last == cut {
                continue;
            }
            verdict = match self.run((a, shapes, x), (b, y), &cut) {
                Ok(rounding) if rounding <= ROUNDING_BUDGET => {
                    self.note(rounding);
                    return Verdict::Equal;
                }
                // What was found nearer says more than what is found further back.
                _ if attempt > 1 && matches!(verdict, Verdict::Different(_)) => verdict,
                Ok(rounding) => Verdict::Different(rounding),
                Err(why) => Verdict::Unknown(why),
            };
            last = cut;
        }
        match verdict {
            Verdict::Unknown(Cannot::NoSamples) => {
                let why = "old and new form read nothing in common whose type and shape are known".to_owned();
                Verdict::Unknown(Cannot::Region { value: a.name(x).to_owned(), why })
            }
            verdict => verdict,
        }
    }

    /// Computes one value in both graphs from random values at a cut, and says by how much they differ.
    fn run(
        &mut self,
        (a, shapes, x): (&Graph, &Shapes, Outlet),
        (b, y): (&Graph, Outlet),
        cut: &Cut,
    ) -> Result<f64, Cannot> {
        self.proof.regions += 1;
        let region = |why: String| Cannot::Region { value: a.name(x).to_owned(), why };
        let mut feeds = Feeds::default();
        let (mut inputs_a, mut samples_a) = (Vec::new(), vec![Vec::new(); RUNS]);
        let mut settled = BTreeMap::new();
        for &(class, value) in &cut.old {
            let Some((dtype, dims, known)) = fact(a, shapes, value) else {
                return Err(region(format!("the type and shape of `{}` before it are not known", a.name(value))));
            };
            let drawn = feeds.of(class, (dtype, &dims), &known, super::data::table(a, shapes, value));
            // Engines need to know what sets shapes.
            let all: Option<Vec<_>> = known.iter().copied().collect();
            let all = all.filter(|all| !is_float(dtype) && all.len() == dims.iter().product::<usize>());
            if let Some(tensor) = all.and_then(|all| Tensor::integers(dtype, &dims, &all)) {
                settled.insert(class, tensor);
            }
            inputs_a.push((class, value, dtype, dims));
            samples_a.iter_mut().zip(drawn).for_each(|(sample, value)| sample.push(value.clone()));
        }
        let (mut inputs_b, mut samples_b) = (Vec::new(), vec![Vec::new(); RUNS]);
        for &(class, value) in &cut.new {
            let Some((dtype, drawn)) = feeds.drawn(class) else {
                return Err(region(format!("it reads `{}`, which the old form does not", b.name(value))));
            };
            inputs_b.push((class, value, dtype, drawn[0].dims.clone()));
            samples_b.iter_mut().zip(drawn).for_each(|(sample, value)| sample.push(value.clone()));
        }
        let extract =
            |graph: &Graph, inputs: &[(usize, Outlet, DType, Vec<usize>)], samples: &mut [Vec<Value>], output| {
                let cut: Vec<_> = inputs.iter().map(|(_, value, dtype, dims)| (*value, *dtype, dims.clone())).collect();
                let part = graph.extract(&cut, &[output]);
                let mut part =
                    part.ok_or_else(|| region("it depends on an input whose type or shape is not known".to_owned()))?;
                for (place, (class, ..)) in inputs.iter().enumerate().rev() {
                    if let Some(tensor) = settled.get(class) {
                        part.settle_input(place, Weight::dense(tensor.clone()));
                        for sample in samples.iter_mut() {
                            sample.remove(place);
                        }
                    }
                }
                Ok(part)
            };
        let before = extract(a, &inputs_a, &mut samples_a, x)?;
        let after = extract(b, &inputs_b, &mut samples_b, y)?;
        let at = |cannot: Cannot| region(cannot.to_string());
        let reference = Reference::new(self.engine, &self.model.with_graph(before), samples_a).map_err(at)?;
        let found = reference.compare_on(&self.model.with_graph(after), &samples_b, f64::INFINITY).map_err(at)?;
        Ok(found.rounding)
    }

    /// Whether the bodies of an operator and of what it was compute the same, by proof or by taking changes back.
    fn bodies(
        &mut self,
        a: &Graph,
        was: NodeId,
        b: &mut Graph,
        is: NodeId,
        (shapes, classes): (&Shapes, &Classes),
    ) -> Result<bool, Cannot> {
        let Some(old) = a.op(was).map(|op| &op.bodies) else { return Ok(false) };
        let captured_a = Classes::outer(a, was, &|value| classes.of_old(value));
        let captured_b = Classes::outer(b, is, &|value| classes.of_new(value));
        let mut all = true;
        for (place, body) in old.iter().enumerate() {
            let Some(slot) = b.bodies_mut(is).get_mut(place) else { return Ok(false) };
            let mut new = std::mem::take(&mut slot.graph);
            let inside = shapes.inside(a, was, &body.graph);
            let proven = self.graph(&body.graph, &mut new, &inside, [captured_a.clone(), captured_b.clone()]);
            if let Some(slot) = b.bodies_mut(is).get_mut(place) {
                slot.graph = new;
            }
            all &= proven?;
        }
        Ok(all)
    }
}

fn is_computed(graph: &Graph, value: Outlet) -> bool {
    matches!(graph.kind(value.node), Kind::Op(_))
}

/// The type and shape of a value of the old graph, and the elements that are known of one that is small: any shape that both forms accept
/// will do, so an open extent may as well be 1.
fn fact(a: &Graph, shapes: &Shapes, value: Outlet) -> Option<(DType, Vec<usize>, Vec<Option<i64>>)> {
    let fact = shapes.fact(value).cloned().unwrap_or_default();
    let declared = a.info(a.name(value)).map(Fact::declared).unwrap_or_default();
    let dims = fact.extents().or_else(|| declared.extents())?;
    let known = fact.ints.as_deref().unwrap_or_default().iter();
    let known = known.map(|term| term.and_then(crate::analysis::shapes::Term::known)).collect();
    Some((fact.dtype.or(declared.dtype)?, dims.iter().map(|extent| extent.unwrap_or(1)).collect(), known))
}
