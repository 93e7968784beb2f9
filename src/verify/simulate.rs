//! What runtimes compute otherwise than the operators of a file say.

use std::borrow::Cow;

use crate::{
    codec::{Model, rounded_at_once},
    ir::{DType, Graph, NodeId, Op, Outlet, Tensor, Weight},
};

/// The largest of the integers that it rounds them to.
const LARGEST: f64 = 127.0;

/// `model` with what its runtime rounds rounded: onnxruntime makes integers of eight bits of what it multiplies by codes, as many with one scale as
/// those of the weight have, or 32 (`MatMulNBits` of accuracy level 4).
pub(super) fn simulated(model: &Model) -> Cow<'_, Model> {
    let mut graph = model.graph.clone();
    simulate(model, &mut graph);
    if graph.edits() == model.graph.edits() {
        Cow::Borrowed(model)
    } else {
        Cow::Owned(Model { graph, ..model.clone() })
    }
}

fn simulate(model: &Model, graph: &mut Graph) {
    for id in graph.node_ids().collect::<Vec<_>>() {
        if let Some(block) = rounded_at_once(model, graph, id) {
            let rows = graph.constant(id.out()).map_or(0, |tensor| tensor.dims()[0]);
            for (product, _) in graph.uses(id.out()) {
                let _ = round_operand(graph, product, (rows, block));
            }
        }
    }
    for id in graph.holders() {
        graph.bodies_mut(id).iter_mut().for_each(|body| simulate(model, &mut body.graph));
    }
}

/// Has `product` read its first operand, of rows of so many values, rounded; the last block of a row may be shorter.
fn round_operand(graph: &mut Graph, product: NodeId, (width, block): (usize, usize)) -> Option<()> {
    let read = graph.operand(product, 0)?;
    let step = |graph: &mut Graph, op: Op, operands: &[Outlet]| {
        let operands: Vec<_> = operands.iter().copied().map(Some).collect();
        graph.add_op(op, &operands, &["rounded"], product).out()
    };
    let constant = |graph: &mut Graph, tensor: Tensor| graph.add_const(Weight::dense(tensor), "rounded");
    let number = |graph: &mut Graph, value: f64| Some(constant(graph, Tensor::floats(DType::Float, &[], &[value])?));
    let extents = |graph: &mut Graph, extents: &[i64]| constant(graph, Tensor::i64(&[extents.len()], extents));
    let shape = step(graph, Op::new("Shape"), &[read]);
    let whole = width.next_multiple_of(block);
    let apart = extents(graph, &[-1, width as i64]);
    let rows = step(graph, Op::new("Reshape"), &[read, apart]);
    let pads = extents(graph, &[0, 0, 0, (whole - width) as i64]);
    let padded = step(graph, Op::new("Pad"), &[rows, pads]);
    let apart = extents(graph, &[-1, block as i64]);
    let blocks = step(graph, Op::new("Reshape"), &[padded, apart]);
    let sizes = step(graph, Op::new("Abs"), &[blocks]);
    let largest = if graph.opset() >= 18 {
        let axes = extents(graph, &[1]);
        step(graph, Op::new("ReduceMax"), &[sizes, axes])
    } else {
        step(graph, Op::new("ReduceMax").with_ints("axes", &[1]), &[sizes])
    };
    let (count, least) = (number(graph, LARGEST)?, number(graph, f64::from(f32::MIN_POSITIVE))?);
    let scale = step(graph, Op::new("Div"), &[largest, count]);
    let scale = step(graph, Op::new("Max"), &[scale, least]);
    let codes = step(graph, Op::new("Div"), &[blocks, scale]);
    let codes = step(graph, Op::new("Round"), &[codes]);
    let rounded = step(graph, Op::new("Mul"), &[codes, scale]);
    let apart = extents(graph, &[-1, whole as i64]);
    let rounded = step(graph, Op::new("Reshape"), &[rounded, apart]);
    let (begin, end, axis) = (extents(graph, &[0]), extents(graph, &[width as i64]), extents(graph, &[1]));
    let rounded = step(graph, Op::new("Slice"), &[rounded, begin, end, axis]);
    let rounded = step(graph, Op::new("Reshape"), &[rounded, shape]);
    graph.set_operand(product, 0, Some(rounded));
    Some(())
}
