//! Running a graph in segments over all samples at once: what is alive at the cut is kept, and each node runs once.

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;

use crate::{
    analysis::shapes::Shapes,
    codec::Model,
    ir::{Graph, NodeId, Outlet, Tensor, Weight},
    verify::{Cannot, Engine, Value},
};

/// Values by what they are, for one sample.
pub(super) type Alive = BTreeMap<Outlet, Value>;

/// A graph that has been run up to some node.
pub(super) struct Walk<'a> {
    engine: &'a Engine,
    done: BTreeSet<NodeId>,
    /// What is alive there, for each sample.
    pub(super) samples: Vec<Alive>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(engine: &'a Engine, graph: &Graph, samples: &[Vec<Value>]) -> Self {
        let inputs: Vec<_> = graph.fed_inputs().map(|input| input.node.out()).collect();
        let samples = samples.iter().map(|sample| inputs.iter().copied().zip(sample.iter().cloned()).collect());
        Self { engine, done: BTreeSet::new(), samples: samples.collect() }
    }

    /// Runs everything before `node`; that and what follows may still change.
    pub(super) fn advance(&mut self, model: &Model, node: NodeId) -> Result<(), Cannot> {
        let graph = &model.graph;
        let before = graph.ops().into_iter().take_while(|&id| id != node);
        let segment: Vec<_> = before.filter(|id| !self.done.contains(id)).collect();
        self.done.extend(&segment);
        let is_read_later = |value: Outlet| graph.uses(value).iter().any(|(user, _)| !self.done.contains(user));
        let made = segment.iter().flat_map(|&id| (0..graph.output_count(id)).map(move |slot| id.at(slot)));
        let wanted: Vec<_> = made.filter(|&value| is_read_later(value)).collect();
        if !wanted.is_empty() {
            run(self.engine, &mut self.samples, model, &segment, &wanted)?;
        }
        for alive in &mut self.samples {
            alive.retain(|&value, _| is_read_later(value));
        }
        Ok(())
    }
}

/// Runs a segment on what is alive before it, and adds what is `wanted` of it.
fn run(
    engine: &Engine,
    samples: &mut [Alive],
    model: &Model,
    segment: &[NodeId],
    wanted: &[Outlet],
) -> Result<(), Cannot> {
    let graph = &model.graph;
    let Some(first) = samples.first() else { return Ok(()) };
    let reads = |id: &NodeId| graph.operands(*id).into_iter().flatten().chain(graph.captures(*id).into_values());
    let mut read: Vec<_> = segment.iter().flat_map(reads).filter(|value| first.contains_key(value)).collect();
    read.sort_unstable();
    read.dedup();
    let shapes = Shapes::infer(graph, &BTreeMap::new());
    // The engine knows the types that operators of other domains make.
    let dtype = |value: Outlet| {
        let inferred = shapes.fact(value).and_then(|fact| fact.dtype);
        inferred.or_else(|| first.get(&value).map(|made| made.dtype))
    };
    // Integers that are the same for all samples are shapes and the like, which engines want to know beforehand.
    let mut settled = graph.clone();
    read.retain(|&value| {
        let known = samples.iter().all(|alive| alive[&value] == first[&value]) && !first[&value].is_float();
        let dtype = dtype(value);
        let integers: Vec<_> = first[&value].values.iter().map(|&v| v as i64).collect();
        let tensor = dtype.filter(|_| known).and_then(|t| Tensor::integers(t, &first[&value].dims, &integers));
        let Some(tensor) = tensor else { return true };
        let constant = settled.add_const(Weight::dense(tensor), graph.name(value));
        settled.replace_uses(value, constant);
        false
    });
    let input = |&value: &Outlet| Some((value, dtype(value)?, first[&value].dims.clone()));
    let unknown = || Cannot::Segment(graph.label(segment[0]).to_owned());
    let inputs = read.iter().map(input).collect::<Option<Vec<_>>>().ok_or_else(unknown)?;
    let part = settled.extract(&inputs, wanted).ok_or_else(unknown)?;
    let feed = |alive: &Alive| read.iter().map(|value| alive[value].clone()).collect::<Vec<_>>();
    let runner = engine.prepare(&model.with_graph(part), &feed(first))?;
    let step = |alive: &mut Alive| {
        let found = runner.run(&feed(alive))?;
        alive.extend(wanted.iter().copied().zip(found));
        Ok(())
    };
    samples.par_iter_mut().try_for_each(step)
}
