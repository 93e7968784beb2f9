//! See [`FuseMatmulAdd`].

use crate::{
    analysis::shapes::{Shapes, Term},
    ir::{Graph, NodeId, Op, Storage},
    pass::{Context, Declare, Fidelity, Pass, rewrite_shaped},
};

/// Make one `Gemm` of a `MatMul` of matrices and the `Add` of a bias after it.
///
/// Applies when: both operands of the product are known to be matrices, the bias is a constant row, and nothing but the
/// sum reads the product.
///
/// Fidelity: rounding.
#[derive(Debug, clap::Parser)]
#[command(name = "fuse-matmul-add")]
pub(super) struct FuseMatmulAdd {}

impl Declare for FuseMatmulAdd {
    const NAME: &'static str = "fuse-matmul-add";
    const FIDELITY: Fidelity = Fidelity::Rounding;
}

impl Pass for FuseMatmulAdd {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        cx.add("products fused", rewrite_shaped(graph, &fuse));
        Ok(())
    }
}

/// Makes the `Add` at `node` a `Gemm`.
fn fuse(graph: &mut Graph, shapes: &Shapes, node: NodeId) -> Option<()> {
    graph.op_of(node, "Add").filter(|_| graph.opset() >= 7)?;
    let operands = [graph.operand(node, 0)?, graph.operand(node, 1)?];
    let [product, bias] =
        if graph.op_of(operands[0].node, "MatMul").is_some() { operands } else { [operands[1], operands[0]] };
    let multiply = graph.op_of(product.node, "MatMul")?;
    graph.sole_use(product).filter(|_| !graph.is_pinned(product) && !graph.is_pinned(node.out()))?;
    let (a, b) = (graph.operand(product.node, 0)?, graph.operand(product.node, 1)?);
    // Runtimes multiply by codes in a `MatMul` alone.
    let is_multiplied = |storage: &Storage| matches!(storage, Storage::Affine(affine) if affine.is_multiplied_by());
    if graph.weight(b).is_some_and(|weight| is_multiplied(weight.storage())) {
        return None;
    }
    let columns = shapes.dims(b).filter(|dims| dims.len() == 2)?.last()?.and_then(Term::extent);
    let row = graph.constant(bias).filter(|bias| bias.f64s().is_some())?;
    let is_row = row.dims().len() <= 2 && row.dims().last().is_some_and(|&d| Some(d) == columns && d == row.len());
    if shapes.rank(a)? != 2 || !is_row {
        return None;
    }
    let name = [graph.op(node)?.name(), multiply.name()].into_iter().find(|name| !name.is_empty()).unwrap_or_default();
    let name = name.to_owned();
    graph.edit_op(node, |op| *op = Op::new("Gemm").in_place_of(op).named(&name));
    for (slot, operand) in (0..).zip([a, b, bias]) {
        graph.set_operand(node, slot, Some(operand));
    }
    graph.sweep(product.node);
    Some(())
}
