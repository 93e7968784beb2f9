//! Running models with `If`s in an engine that can't: each condition is computed first, and the branch taken put in place.

use std::{collections::BTreeMap, sync::OnceLock};

use super::{Branch, Cannot, Prepared, Run, Value, tract};
use crate::{
    codec::Model,
    ir::{Body, DType, Graph, NodeId},
};

/// What a model computes up to its first `If`, and then what it computes in either case; each is planned when a sample
/// first needs it.
pub(super) enum Branches {
    /// There is no `If`.
    Plain(tract::Plan),
    Asks {
        condition: tract::Plan,
        graph: Box<Model>,
        node: NodeId,
        types: Vec<DType>,
        cases: [OnceLock<Box<Self>>; 2],
    },
}

impl Branches {
    /// Prepares a model for inputs shaped like `sample`, as far as the branches go that `sample` takes.
    pub(super) fn new(prepared: &Prepared<'_>, sample: &[Value]) -> Result<Self, Cannot> {
        let mut model = prepared.model.clone();
        loop {
            let graph = &model.graph;
            let Some(node) = graph.ops().into_iter().find(|&id| graph.op_of(id, "If").is_some()) else {
                let plain = Prepared { model: &model, types: prepared.types.clone() };
                return tract::Plan::new(&plain, sample).map(Self::Plain);
            };
            let asked = graph.operand(node, 0);
            let constant = asked.and_then(|value| graph.constant(value)?.i64s()?.first().copied());
            if let Some(condition) = constant {
                take(&mut model.graph, node, condition != 0)?;
                continue;
            }
            let condition = asked.map(|value| model.with_graph(graph.computing(&[value])));
            let condition = condition.ok_or_else(|| unusual(graph, node))?;
            let types = prepared.types.clone();
            let asked = Prepared { model: &condition, types: types.clone() };
            let condition = tract::Plan::new(&asked, sample)?;
            let asks = Self::Asks { condition, graph: Box::new(model), node, types, cases: Default::default() };
            asks.case(sample)?;
            return Ok(asks);
        }
    }

    /// What runs a sample that takes the same branch as `sample`.
    fn case(&self, sample: &[Value]) -> Result<&dyn Run, Cannot> {
        let Self::Asks { condition, graph, node, types, cases } = self else { return Ok(self) };
        let answer = condition.run(sample)?.first().and_then(|value| value.values.first().copied());
        let holds = answer.is_some_and(|answer| answer != 0.0);
        let case = &cases[usize::from(holds)];
        if let Some(case) = case.get() {
            return Ok(case.as_ref());
        }
        let mut model = Model::clone(graph);
        take(&mut model.graph, *node, holds)?;
        let prepared = Self::new(&Prepared { model: &model, types: types.clone() }, sample)?;
        Ok(case.get_or_init(|| Box::new(prepared)).as_ref())
    }
}

impl Run for Branches {
    fn run(&self, sample: &[Value]) -> Result<Vec<Value>, Cannot> {
        match self {
            Self::Plain(plan) => plan.run(sample),
            Self::Asks { .. } => self.case(sample)?.run(sample),
        }
    }

    fn note_branches(&self, taken: &mut BTreeMap<Branch, bool>) {
        let Self::Asks { graph, node, cases, .. } = self else { return };
        for (case, condition) in cases.iter().zip([false, true]) {
            let branch = (graph.graph.label(*node).to_owned(), attribute(condition));
            *taken.entry(branch).or_default() |= case.get().is_some();
            case.get().into_iter().for_each(|case| case.note_branches(taken));
        }
    }
}

fn attribute(condition: bool) -> &'static str {
    if condition { "then_branch" } else { "else_branch" }
}

/// Puts a branch of the `If` at `node` in its place.
fn take(graph: &mut Graph, node: NodeId, condition: bool) -> Result<(), Cannot> {
    let named = |body: &Body| body.attribute == attribute(condition);
    let place = graph.op(node).and_then(|op| op.bodies.iter().position(named));
    place.and_then(|place| graph.inline(node, place)).ok_or_else(|| unusual(graph, node))
}

fn unusual(graph: &Graph, node: NodeId) -> Cannot {
    Cannot::Engine { engine: "tract", why: format!("`{}` is an If of an unusual form", graph.label(node)) }
}
