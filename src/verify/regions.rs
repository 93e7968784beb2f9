//! Comparing only what changed, each region on its own: the proof for models that the engine can't run as a whole.
//!
//! Nodes that stand in both graphs with the same attributes and operands compute the same. What is left are regions; each
//! is run on random values of the types and shapes of what it reads, in the old and in the new form.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{Cannot, Difference, Engine, Reference, Value};
use crate::{
    analysis::shapes::{Dim, Fact, Shapes, Term},
    codec::Model,
    ir::{DType, Graph, Kind, NodeId, Outlet},
    linalg::normal,
    verify::Bound,
};
use rand_core::{Rng, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;

/// Random inputs for each region.
const RUNS: usize = 4;
/// Random integers lie below this: they may be indices or extents.
const INTEGERS_BELOW: u64 = 4;

/// Compares the regions in which `b` differs from `a`, at the input shapes of `bound`.
///
/// # Errors
///
/// When the engine can't run a region that changed.
pub fn compare_regions(engine: &Engine, a: &Model, b: &Model, bound: &Bound) -> Result<Difference, Cannot> {
    if let Some(what) = other_interface(a, b) {
        return Err(Cannot::Interface(what));
    }
    let shapes = Shapes::infer(&a.graph, bound);
    let mut difference = Difference { samples: RUNS, ..Difference::default() };
    compare_graphs((engine, a), (&a.graph, &shapes), &b.graph, &mut difference)?;
    Ok(difference)
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

fn compare_graphs(
    from: (&Engine, &Model),
    (a, shapes): (&Graph, &Shapes),
    b: &Graph,
    difference: &mut Difference,
) -> Result<(), Cannot> {
    let old = Old::new(a);
    let twins: BTreeMap<NodeId, NodeId> = b.ops().into_iter().filter_map(|id| Some((id, twin(&old, b, id)?))).collect();
    let kept: BTreeSet<NodeId> = twins.values().copied().collect();
    // Values that unchanged nodes or the outputs read, and that a changed node makes in either graph.
    let mut wanted: BTreeMap<Outlet, Outlet> = BTreeMap::new();
    let mut want = |x: Outlet, y: Outlet| {
        let (x, y) = (old.canonical(x), source(b, y));
        let settled = is_source(a, x) && is_source(b, y) && old.is_same(x, b, y)
            || twins.get(&y.node) == Some(&x.node) && x.slot == y.slot;
        if !settled {
            wanted.insert(x, y);
        }
    };
    for (y, x) in &twins {
        for (x, y) in a.operands(*x).into_iter().zip(b.operands(*y)) {
            if let (Some(x), Some(y)) = (x, y) {
                want(x, y);
            }
        }
        for (x, y) in captured(a, *x, b, *y) {
            want(x, y);
        }
    }
    for (x, y) in a.outputs().iter().zip(b.outputs()) {
        want(x.value, y.value);
    }
    for (&x, &y) in &wanted {
        compare_values(from, (&old, shapes, x), (b, y), &kept, difference)?;
    }
    for (y, x) in twins {
        let (Some(was), Some(is)) = (a.op(x), b.op(y)) else { continue };
        for (old, new) in was.bodies.iter().zip(&is.bodies) {
            let inside = shapes.inside(a, x, &old.graph);
            compare_graphs(from, (&old.graph, &inside), &new.graph, difference)?;
        }
    }
    Ok(())
}

/// Whether `value` is not computed: an input, a captured value, or a constant.
fn is_source(graph: &Graph, value: Outlet) -> bool {
    graph.op(value.node).is_none()
}

/// The old graph, and for each of its values the first that is the same: copies, and results of equal operators on equal
/// operands, are one value.
struct Old<'a> {
    graph: &'a Graph,
    names: BTreeMap<&'a str, Outlet>,
    first: BTreeMap<Outlet, Outlet>,
}

impl<'a> Old<'a> {
    fn new(graph: &'a Graph) -> Self {
        let mut old = Self { graph, names: graph.values(), first: BTreeMap::new() };
        let mut seen: HashMap<(Vec<u8>, Vec<Option<Outlet>>), NodeId> = HashMap::new();
        for id in graph.order() {
            let operands: Vec<_> = graph.operands(id).into_iter().map(|v| v.map(|v| old.canonical(v))).collect();
            if graph.op_of(id, "Identity").is_some()
                && let [Some(source)] = operands[..]
            {
                old.first.insert(id.out(), source);
                continue;
            }
            let key = match graph.kind(id) {
                Kind::Const(constant) => constant.weight.value().hash().to_le_bytes().to_vec(),
                Kind::Op(op) => match op.signature() {
                    Some(signature) => signature,
                    None => continue,
                },
                _ => continue,
            };
            let twin = *seen.entry((key, operands)).or_insert(id);
            let same = match (graph.kind(twin), graph.kind(id)) {
                (Kind::Const(p), Kind::Const(q)) => p.weight.value().same(q.weight.value()),
                (Kind::Op(_), Kind::Op(_)) => graph.output_count(twin) == graph.output_count(id),
                _ => false,
            };
            if same {
                old.first.extend((0..graph.output_count(id)).map(|slot| (id.at(slot), twin.at(slot))));
            }
        }
        old
    }

    fn canonical(&self, value: Outlet) -> Outlet {
        self.first.get(&value).copied().unwrap_or(value)
    }

    /// The old value that `value` of the new graph is, by name.
    fn of(&self, new: &Graph, value: Outlet) -> Option<Outlet> {
        self.names.get(new.name(value)).map(|&value| self.canonical(value))
    }

    /// Whether an operand of each graph is the same value: constants by content, others by name.
    fn is_same(&self, x: Outlet, new: &Graph, y: Outlet) -> bool {
        let (x, y) = (self.canonical(x), source(new, y));
        match (self.graph.kind(x.node), new.kind(y.node)) {
            (Kind::Const(p), Kind::Const(q)) => p.weight.value().same(q.weight.value()),
            (Kind::Sparse(p), Kind::Sparse(q)) => p == q,
            // What is computed in one graph may be a constant in the other, which is then compared as a region.
            (Kind::Const(_) | Kind::Op(_), Kind::Const(_) | Kind::Op(_))
            | (Kind::Input, Kind::Input)
            | (Kind::Capture(_), Kind::Capture(_)) => self.of(new, y) == Some(x),
            _ => false,
        }
    }
}

/// `value`, or what it is a mere copy of.
fn source(graph: &Graph, mut value: Outlet) -> Outlet {
    while graph.op_of(value.node, "Identity").is_some()
        && let Some(from) = graph.operand(value.node, 0)
    {
        value = from;
    }
    value
}

/// The node of `a` that is `node` of `b`: same operator, attributes, operands and results.
fn twin(old: &Old<'_>, b: &Graph, node: NodeId) -> Option<NodeId> {
    let a = old.graph;
    let other = old.of(b, node.out())?.node;
    let (from, to) = (a.op(other)?, b.op(node)?);
    let (x, y) = (a.operands(other), b.operands(node));
    let same_operands = x.len() == y.len()
        && x.into_iter().zip(y).all(|(x, y)| match (x, y) {
            (Some(x), Some(y)) => old.is_same(x, b, y),
            (x, y) => x.is_none() && y.is_none(),
        });
    let same_bodies = from.bodies.len() == to.bodies.len()
        && from.bodies.iter().zip(&to.bodies).all(|(x, y)| {
            x.attribute == y.attribute
                && x.graph.inputs().len() == y.graph.inputs().len()
                && x.graph.outputs().len() == y.graph.outputs().len()
        });
    let same = same_operands
        && same_bodies
        && from.attributes() == to.attributes()
        && (from.op_type(), from.domain()) == (to.op_type(), to.domain())
        && a.output_count(other) == b.output_count(node)
        && (0..a.output_count(other)).all(|slot| match b.name(node.at(slot)) {
            "" => a.name(other.at(slot)).is_empty(),
            _ => old.of(b, node.at(slot)) == Some(other.at(slot)),
        });
    same.then_some(other)
}

/// The values that the bodies of a node and of its twin capture under one number.
fn captured(a: &Graph, x: NodeId, b: &Graph, y: NodeId) -> Vec<(Outlet, Outlet)> {
    let theirs = b.captures(y);
    a.captures(x).into_iter().filter_map(|(i, value)| Some((value, *theirs.get(&i)?))).collect()
}

/// Computes one value in both graphs from what its region reads there, and compares.
fn compare_values(
    (engine, model): (&Engine, &Model),
    (old, shapes, x): (&Old<'_>, &Shapes, Outlet),
    (b, y): (&Graph, Outlet),
    kept: &BTreeSet<NodeId>,
    difference: &mut Difference,
) -> Result<(), Cannot> {
    let a = old.graph;
    let region = |why: String| Cannot::Region { value: a.name(x).to_owned(), why };
    let mut feeds = Feeds { random: Xoshiro256PlusPlus::seed_from_u64(0x5eed), drawn: BTreeMap::new() };
    let (mut inputs_a, mut samples_a) = (Vec::new(), vec![Vec::new(); RUNS]);
    for value in reads(old, x, kept) {
        let fact = shapes.fact(value).cloned().unwrap_or_default();
        // Any shape that both forms accept will do: an open extent may as well be 1.
        let declared = a.info(a.name(value)).map(Fact::declared).unwrap_or_default();
        let dims = fact.extents().or_else(|| declared.extents());
        let dims = dims.map(|dims| dims.iter().map(|d| d.unwrap_or(1)).collect::<Vec<_>>());
        let (Some(dtype), Some(dims)) = (fact.dtype, dims) else {
            return Err(region(format!("the shape of `{}` before it is not known", a.name(value))));
        };
        let known = fact.ints.as_deref().unwrap_or_default();
        for (sample, value) in samples_a.iter_mut().zip(feeds.of(old.canonical(value), dtype, &dims, known)) {
            sample.push(value.clone());
        }
        inputs_a.push((value, dtype, dims));
    }
    // What the new form no longer reads is fed to the old one alone; it must not matter.
    let (mut inputs_b, mut samples_b) = (Vec::new(), vec![Vec::new(); RUNS]);
    for value in b.values().into_values() {
        let Some((drawn, dtype)) = old.of(b, value).and_then(|twin| feeds.drawn.get(&twin)) else { continue };
        if value != y {
            inputs_b.push((value, *dtype, drawn[0].dims.clone()));
            samples_b.iter_mut().zip(drawn).for_each(|(sample, value)| sample.push(value.clone()));
        }
    }
    let cut = |graph: &Graph, inputs: &[_], output| {
        graph.extract(inputs, &[output]).ok_or_else(|| region("it can't be cut out".to_owned()))
    };
    let (before, after) = (cut(a, &inputs_a, x)?, cut(b, &inputs_b, y)?);
    let at = |cannot: Cannot| region(cannot.to_string());
    let reference = Reference::new(engine, &model.with_graph(before), samples_a).map_err(at)?;
    let found = reference.compare_on(&model.with_graph(after), &samples_b, f64::INFINITY).map_err(at)?;
    difference.rounding = super::max(difference.rounding, found.rounding);
    difference.error = super::max(difference.error, found.error);
    Ok(())
}

/// The values that the region which makes `x` reads: those of unchanged nodes, inputs and captures.
fn reads(old: &Old<'_>, x: Outlet, kept: &BTreeSet<NodeId>) -> BTreeSet<Outlet> {
    let graph = old.graph;
    let (mut reads, mut seen, mut stack) = (BTreeSet::new(), BTreeSet::new(), vec![x]);
    while let Some(value) = stack.pop() {
        let constant = matches!(graph.kind(value.node), Kind::Const(_) | Kind::Sparse(_));
        let unchanged = kept.contains(&old.canonical(value).node) || is_source(graph, value);
        if value != x && unchanged && !constant {
            reads.insert(value);
        } else if !constant && seen.insert(value.node) {
            stack.extend(graph.operands(value.node).into_iter().flatten());
            stack.extend(graph.captures(value.node).into_values());
        }
    }
    reads
}

/// Random values for what regions read; equal values are fed the same.
struct Feeds {
    random: Xoshiro256PlusPlus,
    drawn: BTreeMap<Outlet, (Vec<Value>, DType)>,
}

impl Feeds {
    /// Values of this type and shape; integers that are `known`, as extents are, are what they always are.
    fn of(&mut self, value: Outlet, dtype: DType, dims: &[usize], known: &[Dim]) -> &[Value] {
        let random = &mut self.random;
        let entry = self.drawn.entry(value).or_insert_with(|| {
            let is_float = crate::ir::tensor::is_float(dtype);
            let mut draw = || if is_float { normal(random) } else { (random.next_u64() % INTEGERS_BELOW) as f64 };
            let count: usize = dims.iter().product();
            let known = |i: usize| known.get(i).copied().flatten().and_then(Term::known);
            let mut element = |i: usize| {
                let drawn = draw();
                known(i).map_or(drawn, |known| known as f64)
            };
            let mut one = || Value { dims: dims.to_vec(), values: (0..count).map(&mut element).collect(), is_float };
            ((0..RUNS).map(|_| one()).collect(), dtype)
        });
        &entry.0
    }
}
