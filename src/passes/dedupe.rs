//! See [`Dedupe`].

use std::collections::HashMap;

use crate::{
    analysis::shapes::{Fact, Shapes},
    ir::{DType, Graph, Inlet, Kind, NodeId, Op, Outlet, Tensor},
    pass::{Context, Declare, Fidelity, Pass, everywhere, everywhere_shaped},
};

/// Merge equal constants, operators that compute the same from the same inputs, and shapes that are known to be equal.
///
/// Constants are equal when type, shape and every bit agree; a large matrix that is another one transposed becomes that, transposed by the
/// `Gemm` that reads it or by a `Transpose`, which runtimes fold. Those of eight bits that kernels of integers read are left
/// alone. Operators that draw random numbers are left alone.
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
            constants += merge_constants(graph) + share_transposed(graph);
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

/// Matrices of fewer bytes are not compared with others transposed.
const FEWEST_TRANSPOSED: usize = 1 << 14;
/// Elements that are compared before all are.
const SAMPLED: usize = 61;

/// Keeps of two large matrices that are each other's transposes one.
fn share_transposed(graph: &mut Graph) -> usize {
    let is_matrix = |id: &NodeId| {
        graph.weight(id.out()).is_some_and(|weight| {
            let tensor = weight.value();
            !weight.is_stored()
                && !is_of_codes(graph, *id)
                && tensor.dims().len() == 2
                && tensor.byte_len() >= FEWEST_TRANSPOSED
        })
    };
    let candidates: Vec<_> = graph.order().into_iter().filter(is_matrix).collect();
    let mut kept: HashMap<(usize, usize), Vec<NodeId>> = HashMap::new();
    let mut shared = 0;
    for id in candidates {
        let Some(tensor) = graph.constant(id.out()) else { continue };
        let (rows, columns) = (tensor.dims()[0], tensor.dims()[1]);
        let twin = kept
            .get(&(columns, rows))
            .into_iter()
            .flatten()
            .copied()
            .find(|twin| graph.constant(twin.out()).is_some_and(|twin| is_transpose(twin, tensor)));
        let is_free = !graph.is_output(id.out()) && !graph.is_pinned(id.out());
        let Some(twin) = twin.filter(|_| is_free) else {
            kept.entry((rows, columns)).or_default().push(id);
            continue;
        };
        read_transposed(graph, id, twin);
        shared += 1;
    }
    shared
}

/// Whether `b` is `a` with rows as columns, bit for bit.
fn is_transpose(a: &Tensor, b: &Tensor) -> bool {
    let (rows, columns) = (a.dims()[0], a.dims()[1]);
    let width = a.byte_len() / a.len().max(1);
    if a.dtype() != b.dtype() || width * a.len() != a.byte_len() || a.len() != b.len() || width == 0 {
        return false;
    }
    let (a, b) = (a.bytes(), b.bytes());
    let same = |place: usize| {
        let (row, column) = (place / columns, place % columns);
        let turned = column * rows + row;
        a[place * width..(place + 1) * width] == b[turned * width..(turned + 1) * width]
    };
    let step = (rows * columns / SAMPLED).max(1);
    (0..rows * columns).step_by(step).all(same) && (0..rows * columns).all(same)
}

/// Has whatever reads the constant at `id` read `twin` transposed.
fn read_transposed(graph: &mut Graph, id: NodeId, twin: NodeId) {
    for (reader, inlet) in graph.uses(id.out()) {
        let flag = match inlet {
            Inlet::Slot(0) => "transA",
            Inlet::Slot(1) => "transB",
            _ => continue,
        };
        if graph.op_of(reader, "Gemm").is_none() {
            continue;
        }
        let Inlet::Slot(slot) = inlet else { continue };
        graph.edit_op(reader, |op| {
            let flagged = op.int(flag).unwrap_or(0);
            *op = std::mem::take(op).with_int(flag, i64::from(flagged == 0));
        });
        graph.set_operand(reader, slot, Some(twin.out()));
    }
    if let Some(near) = graph.uses(id.out()).first().map(|(reader, _)| *reader) {
        let transpose = Op::new("Transpose").with_ints("perm", &[1, 0]);
        let name = graph.name(id.out()).to_owned();
        let turned = graph.add_op(transpose, &[Some(twin.out())], &[&name], near);
        graph.replace_uses(id.out(), turned.out());
    }
    graph.sweep(id);
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
