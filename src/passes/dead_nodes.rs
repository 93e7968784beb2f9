//! See [`DeadNodes`].

use std::collections::BTreeSet;

use crate::{
    ir::{Graph, Kind},
    pass::{Context, Declare, Fidelity, Pass},
};

/// Remove nodes and constants that no output depends on, and operands that are left out at the end of a list.
///
/// Inputs that must be fed stay, since they are the model's interface; so do values that quantization annotations name.
///
/// Fidelity: exact.
#[derive(Debug, clap::Parser)]
#[command(name = "dead-nodes")]
pub(super) struct DeadNodes {}

impl Declare for DeadNodes {
    const NAME: &'static str = "dead-nodes";
    const FIDELITY: Fidelity = Fidelity::Exact;
}

impl Pass for DeadNodes {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        cx.add("nodes and constants removed", sweep(graph));
        Ok(())
    }
}

/// Bodies first: what they no longer capture may be dead outside.
fn sweep(graph: &mut Graph) -> usize {
    let mut swept = 0;
    for id in graph.order().into_iter().rev() {
        if !graph.contains(id) {
            continue;
        }
        swept += graph.sweep(id);
        if graph.contains(id) && graph.op(id).is_some_and(|op| op.bodies.is_empty() && op.standard().is_some()) {
            graph.trim_operands(id);
        }
        if !graph.contains(id) || graph.op(id).is_none_or(|op| op.bodies.is_empty()) {
            continue;
        }
        let mut read = BTreeSet::new();
        for body in graph.bodies_mut(id) {
            swept += sweep(&mut body.graph);
            read.extend(body.graph.node_ids().filter_map(|inner| match body.graph.kind(inner) {
                Kind::Capture(i) => Some(*i),
                _ => None,
            }));
        }
        for (i, value) in graph.captures(id) {
            if !read.contains(&i) {
                graph.drop_capture(id, i);
                swept += graph.sweep(value.node);
            }
        }
    }
    swept
}
