//! See [`Dedupe`].

use std::collections::HashMap;

use crate::{
    analysis::shapes::{Fact, Shapes},
    ir::{DType, Graph, Kind, NodeId, Op, Outlet},
    pass::{Context, Declare, Fidelity, Pass, everywhere, everywhere_shaped},
};

/// Merge equal constants, operators that compute the same from the same inputs, and shapes that are known to be equal.
///
/// Constants are equal when type, shape and every bit agree; those of eight bits that kernels of integers read are left alone. Operators that draw random numbers are left alone.
///
/// Fidelity: exact.
#[derive(Debug, clap::Parser)]
#[command(name = "dedupe")]
pub(super) struct Dedupe {}

impl Declare for Dedupe {
    const NAME: &'static str = "dedupe";
    const FIDELITY: Fidelity = Fidelity::Exact;
}

impl Pass for Dedupe {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        let (mut constants, mut operators) = (0, 0);
        everywhere(graph, &mut |graph| {
            constants += merge_constants(graph);
            operators += merge_operators(graph);
        });
        cx.add("constants merged", constants);
        cx.add("operators merged", operators);
        cx.add("shapes merged", everywhere_shaped(graph, &merge_shapes));
        Ok(())
    }
}

/// Has what reads a computed shape read the first one that has the same extents.
fn merge_shapes(graph: &mut Graph, shapes: &Shapes) -> usize {
    let mut seen: HashMap<&Fact, Outlet> = HashMap::new();
    let mut merged = 0;
    for id in graph.ops() {
        let (value, alone) = (id.out(), graph.output_count(id) == 1);
        let Some(fact) = shapes.fact(value).filter(|fact| alone && fact.ints.is_some()) else { continue };
        if graph.is_output(value) || graph.is_pinned(value) || !graph.contains(id) {
            continue;
        }
        match seen.get(fact) {
            Some(&first) if graph.contains(first.node) => {
                graph.replace_uses(value, first);
                graph.sweep(id);
                merged += 1;
            }
            _ => _ = seen.insert(fact, value),
        }
    }
    merged
}

fn merge_constants(graph: &mut Graph) -> usize {
    let mut seen: HashMap<u64, Vec<NodeId>> = HashMap::new();
    let mut merged = 0;
    for id in graph.order() {
        let Kind::Const(_) = graph.kind(id) else { continue };
        let Some(tensor) = graph.constant(id.out()).filter(|_| !is_of_codes(graph, id)) else { continue };
        let equal = seen.entry(tensor.sketch()).or_default();
        let twin = equal.iter().find(|&&twin| graph.constant(twin.out()).is_some_and(|t| t.same(tensor)));
        match twin.copied() {
            Some(twin) if !graph.is_output(id.out()) && !graph.is_pinned(id.out()) => {
                graph.replace_uses(id.out(), twin.out());
                graph.sweep(id);
                merged += 1;
            }
            _ => equal.push(id),
        }
    }
    merged
}

/// Whether kernels of integers read the constant at `id`: onnxruntime writes others in the place of some, and fails where they are shared.
fn is_of_codes(graph: &Graph, id: NodeId) -> bool {
    let is_code = graph
        .constant(id.out())
        .is_some_and(|tensor| matches!(tensor.dtype(), DType::Int8 | DType::Uint8 | DType::Int4 | DType::Uint4));
    // What operators of other domains, and functions, do with codes is not known.
    let reads_codes = |op: &Op| {
        op.standard().is_none_or(|kind| {
            kind.ends_with("Linear")
                || kind.ends_with("Integer")
                || kind.starts_with("QLinear")
                || kind.contains("Quantize")
        })
    };
    let uses = graph.uses(id.out());
    is_code && uses.iter().any(|(node, _)| graph.op(*node).is_some_and(reads_codes))
}

/// What makes two operators compute the same: type, domain, attributes, operands, number of results.
type Key = (Vec<u8>, Vec<Option<Outlet>>, u32);

fn merge_operators(graph: &mut Graph) -> usize {
    let mut seen: HashMap<Key, NodeId> = HashMap::new();
    let mut merged = 0;
    for id in graph.ops() {
        let Some(op) = graph.op(id) else { continue };
        let outputs = graph.output_count(id);
        let kept = (0..outputs).any(|slot| graph.is_output(id.at(slot)) || graph.is_pinned(id.at(slot)));
        let Some(signature) = op.signature() else { continue };
        let key = (signature, graph.operands(id), outputs);
        // A twin that leaves out a result can't stand in for it.
        let has = |twin: NodeId| {
            (0..outputs).all(|slot| graph.name(id.at(slot)).is_empty() || !graph.name(twin.at(slot)).is_empty())
        };
        match seen.get(&key) {
            // An output can take the twin's place as well as the other way round.
            Some(&twin) if kept && outputs == 1 && !graph.is_pinned(id.out()) && graph.can_take_name(twin.out()) => {
                merged += usize::from(graph.bypass(id, twin.out()).is_some());
            }
            Some(&twin) if !kept && has(twin) => {
                for slot in (0..outputs).filter(|&slot| !graph.name(id.at(slot)).is_empty()).collect::<Vec<_>>() {
                    graph.replace_uses(id.at(slot), twin.at(slot));
                }
                graph.sweep(id);
                merged += 1;
            }
            _ => _ = seen.insert(key, id),
        }
    }
    merged
}
