//! Products of matrices by constants, and splitting them in two.

use crate::{
    ir::{Graph, Inlet, NodeId, Op, Outlet, Tensor, Weight, tensor::is_float},
    passes::GEMM_MAY_ADD_NOTHING,
};

/// A `Gemm` or `MatMul` with a constant matrix, seen as y = x·M, or y = M·x.
pub(super) struct Layer {
    pub(super) node: NodeId,
    /// The constant itself, before any `Identity` or `Transpose`.
    pub(super) weight: Outlet,
    /// The slot that the constant, or what is made of it, enters.
    pub(super) slot: u32,
    /// Whether the product reads the transposed constant.
    transposed: bool,
}

impl Layer {
    pub(super) fn of(graph: &Graph, node: NodeId) -> Option<Self> {
        let op = graph.op(node)?;
        let gemm = match op.standard()? {
            "Gemm" => true,
            "MatMul" => false,
            _ => return None,
        };
        [1, 0].into_iter().find_map(|slot| {
            let (weight, flipped) = source(graph, graph.operand(node, slot)?, !gemm)?;
            let flag = gemm && op.int(if slot == 0 { "transA" } else { "transB" }) == Some(1);
            let transposed = flipped != flag;
            Some(Self { node, weight, slot, transposed })
        })
    }
}

/// The constant matrix that `value` is, or the stack of them if that may be, and whether transposed on the way.
fn source(graph: &Graph, mut value: Outlet, stacks: bool) -> Option<(Outlet, bool)> {
    let mut flipped = false;
    loop {
        if let Some(weight) = graph.weight(value) {
            let axes = weight.value().dims().len();
            let fits = (axes == 2 || axes > 2 && !flipped && stacks) && is_float(weight.value().dtype());
            return fits.then_some((value, flipped));
        }
        flipped ^= flips(graph.op(value.node)?)?;
        value = graph.operand(value.node, 0)?;
    }
}

/// Whether an operator transposes a matrix or passes it on as it is; `None` for any other operator.
fn flips(op: &Op) -> Option<bool> {
    match (op.standard()?, op.ints("perm")) {
        ("Identity", _) | ("Transpose", Some([0, 1])) => Some(false),
        ("Transpose", None | Some([1, 0])) => Some(true),
        _ => None,
    }
}

/// Collects the layers that read `value`, directly or through `Identity` and `Transpose`; `false` if anything else does.
pub(super) fn collect(graph: &Graph, value: Outlet, layers: &mut Vec<Layer>) -> bool {
    if graph.is_output(value) {
        return false;
    }
    graph.uses(value).into_iter().all(|(node, inlet)| {
        let Inlet::Slot(slot) = inlet else { return false };
        let Some(op) = graph.op(node) else { return false };
        match op.standard() {
            _ if flips(op).is_some() => collect(graph, node.out(), layers),
            Some("Gemm" | "MatMul") => match Layer::of(graph, node) {
                Some(layer) if layer.slot == slot => {
                    layers.push(layer);
                    true
                }
                _ => false,
            },
            _ => false,
        }
    })
}

/// The operator set from which on what a `Gemm` adds is broadcast unasked.
const BROADCASTS_UNASKED: i64 = 7;

/// `op` with the flag `name` set, or without it: absent means zero.
fn flagged(op: Op, name: &str, set: bool) -> Op {
    if set { op.with_int(name, 1) } else { op.without(name) }
}

/// Has `layer` multiply by the factors of its weight, left·right, one after the other.
pub(super) fn split(graph: &mut Graph, layer: &Layer, (left, right): (Outlet, Outlet), pass: &str) -> Option<()> {
    let op = graph.op(layer.node)?.clone();
    let gemm = op.is("Gemm");
    let x = graph.operand(layer.node, 1 - layer.slot)?;
    let whole = graph.operand(layer.node, layer.slot)?;
    let zero = if gemm && graph.opset() < GEMM_MAY_ADD_NOTHING {
        Some(Weight::dense(Tensor::floats(graph.constant(left)?.dtype(), &[1], &[0.0])?))
    } else {
        None
    };
    // What the product reads is left·right, or rightᵀ·leftᵀ.
    let (first, second) = if layer.transposed { (right, left) } else { (left, right) };
    let (inner, outer) = if layer.slot == 1 { (first, second) } else { (second, first) };
    let name = format!("{}.{pass}", graph.name(layer.node.out()));
    let node_name = if op.name().is_empty() { String::new() } else { format!("{}.{pass}", op.name()) };
    let (inner, outer) = if layer.transposed && !gemm {
        let mut turned = |value: Outlet| {
            let turned = format!("{}.transposed", graph.name(value));
            let weight = graph.weight(value)?.permute(&[1, 0])?;
            Some(graph.add_const(weight, &turned))
        };
        (turned(inner)?, turned(outer)?)
    } else {
        (inner, outer)
    };
    let (mut reduce, place) = (Op::new(op.op_type()).named(&node_name), layer.slot as usize);
    if gemm {
        let flag = if layer.slot == 0 { "transA" } else { "transB" };
        let other = if layer.slot == 0 { "transB" } else { "transA" };
        // The factors are plain constants: the flags say all of the transposition, and x is turned in the first product.
        let turned = op.int(other) == Some(1);
        reduce = flagged(flagged(reduce, flag, layer.transposed), other, turned);
        graph.edit_op(layer.node, |op| {
            *op = flagged(flagged(std::mem::take(op), flag, layer.transposed), other, false);
        });
    }
    let mut operands = vec![Some(x), Some(x)];
    operands[place] = Some(inner);
    if let Some(zero) = zero {
        operands.push(Some(graph.add_const(zero, &format!("{name}.bias"))));
        if graph.opset() < BROADCASTS_UNASKED {
            reduce = reduce.with_int("broadcast", 1);
        }
    }
    let reduced = graph.add_op(reduce, &operands, &[&name], layer.node).out();
    graph.set_operand(layer.node, layer.slot, Some(outer));
    graph.set_operand(layer.node, 1 - layer.slot, Some(reduced));
    graph.sweep(whole.node);
    Some(())
}
