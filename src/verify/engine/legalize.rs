//! Legalization for tract: a graph in operators that tract runs, and that compute the same.

use std::collections::BTreeMap;

use crate::{
    analysis::shapes::Shapes,
    ir::{DType, Graph, Kind, NodeId, Op, Outlet, Tensor, Weight},
};

/// Rewrites what tract does not run as the file spells it: operands left out at the end, products of other than single precision with a
/// bias, constants whose type it guesses, scalars where it wants lists and lists where it wants scalars, and `BFLOAT16`, which is
/// computed in single precision and rounded after each operator.
pub(super) fn legalize(graph: &mut Graph) {
    let shapes = Shapes::infer(graph, &BTreeMap::new());
    legalize_with(graph, &shapes);
}

fn legalize_with(graph: &mut Graph, shapes: &Shapes) {
    for id in graph.holders() {
        let infer = shapes.within(graph, id);
        for body in graph.bodies_mut(id) {
            let inside = infer(&body.graph);
            legalize_with(&mut body.graph, &inside);
        }
    }
    // Only what has a type needs another.
    let dtypes: BTreeMap<Outlet, DType> = graph
        .node_ids()
        .flat_map(|id| (0..graph.output_count(id)).map(move |slot| id.at(slot)))
        .filter_map(|value| Some((value, shapes.fact(value)?.dtype?)))
        .collect();
    for id in graph.ops() {
        graph.trim_operands(id);
        let Some(kind) = graph.op(id).and_then(Op::standard) else { continue };
        match kind {
            "Gemm" if dtypes.get(&id.out()).is_some_and(|&dtype| dtype != DType::Float) => {
                _ = gemm(graph, id, dtypes[&id.out()]);
            }
            "ConstantOfShape" if graph.op(id).is_some_and(|op| op.attribute("value").is_none()) => {
                graph.edit_op(id, |op| op.set_tensor("value", &Tensor::f32(&[1], &[0.0])));
            }
            "Pad" => of_shape(graph, shapes, id, 2, &[]),
            "Range" => (0..3).for_each(|slot| of_shape(graph, shapes, id, slot, &[])),
            "NonMaxSuppression" => (2..5).for_each(|slot| of_shape(graph, shapes, id, slot, &[1])),
            _ => {}
        }
    }
    if dtypes.values().any(|&dtype| dtype == DType::Bfloat16) {
        widen(graph, &dtypes);
    }
}

/// Has `node` read its one number in `slot` in this shape.
fn of_shape(graph: &mut Graph, shapes: &Shapes, node: NodeId, slot: u32, wanted: &[usize]) {
    let Some(value) = graph.operand(node, slot) else { return };
    if shapes.rank(value).is_none_or(|rank| rank == wanted.len()) {
        return;
    }
    let constant = graph.constant(value).and_then(|tensor| tensor.reshape(wanted));
    let name = format!("{}.reshaped", graph.name(value));
    let value = if let Some(tensor) = constant {
        graph.add_const(Weight::dense(tensor), &name)
    } else {
        let extents: Vec<i64> = wanted.iter().map(|&extent| extent as i64).collect();
        let target = graph.add_const(Weight::dense(Tensor::i64(&[extents.len()], &extents)), &name);
        graph.add_op(Op::new("Reshape"), &[Some(value), Some(target)], &[&name], node).out()
    };
    graph.set_operand(node, slot, Some(value));
}

/// Makes the `Gemm` at `node` the product, scaled, and the sum that it is.
fn gemm(graph: &mut Graph, node: NodeId, dtype: DType) -> Option<()> {
    let op = graph.op(node)?.clone();
    let (alpha, beta) = (op.float("alpha").unwrap_or(1.0), op.float("beta").unwrap_or(1.0));
    let name = graph.name(node.out()).to_owned();
    let turned = |graph: &mut Graph, slot: u32, flag: &str| {
        let value = graph.operand(node, slot)?;
        let turn = Op::new("Transpose").with_ints("perm", &[1, 0]);
        let is_turned = op.int(flag).is_some_and(|flag| flag != 0);
        Some(if is_turned { graph.add_op(turn, &[Some(value)], &[&name], node).out() } else { value })
    };
    let (a, b) = (turned(graph, 0, "transA")?, turned(graph, 1, "transB")?);
    let scaled = |graph: &mut Graph, value: Outlet, scale: f32| {
        if scale == 1.0 {
            return Some(value);
        }
        let scale = Tensor::floats(dtype, &[], &[f64::from(scale)])?;
        let scale = graph.add_const(Weight::dense(scale), &name);
        Some(graph.add_op(Op::new("Mul"), &[Some(value), Some(scale)], &[&name], node).out())
    };
    let bias = match graph.operand(node, 2).filter(|_| beta != 0.0) {
        Some(bias) => Some(scaled(graph, bias, beta)?),
        None => None,
    };
    let product = Op::new("MatMul");
    if alpha == 1.0 && bias.is_none() {
        graph.replace_op(node, product, &[a, b]);
        return Some(());
    }
    let product = graph.add_op(product, &[Some(a), Some(b)], &[&name], node).out();
    if let Some(bias) = bias {
        let product = scaled(graph, product, alpha)?;
        graph.replace_op(node, Op::new("Add"), &[product, bias]);
    } else {
        let scale = Tensor::floats(dtype, &[], &[f64::from(alpha)])?;
        let scale = graph.add_const(Weight::dense(scale), &name);
        graph.replace_op(node, Op::new("Mul"), &[product, scale]);
    }
    Some(())
}

/// Operators that make no number that they did not read.
const MOVING: &[&str] = &[
    "Clip",
    "Concat",
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Gather",
    "GatherElements",
    "GatherND",
    "Identity",
    "If",
    "Loop",
    "Max",
    "MaxPool",
    "Min",
    "Neg",
    "Pad",
    "Relu",
    "Reshape",
    "Scan",
    "ScatterElements",
    "ScatterND",
    "Slice",
    "SpaceToDepth",
    "Split",
    "Squeeze",
    "Tile",
    "TopK",
    "Transpose",
    "Unsqueeze",
    "Where",
];

/// Has what is of `BFLOAT16` by `dtypes` be of single precision, rounded after each operator that computes it.
fn widen(graph: &mut Graph, dtypes: &BTreeMap<Outlet, DType>) {
    graph.widen_declarations();
    for id in graph.order() {
        let constant = graph.constant(id.out()).filter(|tensor| tensor.dtype() == DType::Bfloat16);
        if let Some(wide) = constant.and_then(|tensor| Tensor::floats(DType::Float, tensor.dims(), &tensor.f64s()?)) {
            graph.set_weight(id.out(), Weight::dense(wide));
            continue;
        }
        let is_input = matches!(graph.kind(id), Kind::Input);
        let Some(op) = graph.op(id) else {
            if is_input && dtypes.get(&id.out()) == Some(&DType::Bfloat16) {
                round(graph, id.out());
            }
            continue;
        };
        let moves = op.standard().is_some_and(|kind| MOVING.contains(&kind));
        let narrows = op.is("Cast") && op.int("to") == Some(DType::Bfloat16 as i64);
        if narrows {
            graph.edit_op(id, |op| *op = std::mem::take(op).with_int("to", DType::Float as i64));
        }
        let value = op_value(graph, id).filter(|value| value.dtype() == DType::Bfloat16);
        if let Some(wide) = value.and_then(|value| Tensor::floats(DType::Float, value.dims(), &value.f64s()?)) {
            graph.edit_op(id, |op| op.set_tensor("value", &wide));
        }
        for value in (0..graph.output_count(id)).map(|slot| id.at(slot)).collect::<Vec<_>>() {
            if !moves && dtypes.get(&value) == Some(&DType::Bfloat16) {
                round(graph, value);
            }
        }
    }
}

fn op_value(graph: &Graph, id: NodeId) -> Option<Tensor> {
    graph.op(id)?.tensor("value")
}

/// Has whatever reads `value` read it rounded to the eight significant bits of `BFLOAT16`: of c = (2¹⁶ + 1)·x, c − (c − x)
/// (Veltkamp 1968).
fn round(graph: &mut Graph, value: Outlet) {
    const SPLIT: f32 = 65_537.0;
    let name = graph.name(value).to_owned();
    let near = value.node;
    let split = graph.add_const(Weight::dense(Tensor::f32(&[], &[SPLIT])), &name);
    // The steps read it as it is.
    let raw = graph.add_op(Op::new("Identity"), &[None], &[&name], near);
    let large = graph.add_op(Op::new("Mul"), &[Some(raw.out()), Some(split)], &[&name], near).out();
    let rest = graph.add_op(Op::new("Sub"), &[Some(large), Some(raw.out())], &[&name], near).out();
    let rounded = graph.add_op(Op::new("Sub"), &[Some(large), Some(rest)], &[&name], near).out();
    graph.replace_uses(value, rounded);
    graph.set_operand(raw, 0, Some(value));
}
