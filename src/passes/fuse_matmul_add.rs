//! See [`FuseMatmulAdd`].

use crate::{
    analysis::shapes::{Dim, Shapes, Term},
    ir::{Graph, NodeId, Op, Storage, tensor::is_float},
    pass::{Context, Declare, Fidelity, Pass, rewrite, rewrite_shaped},
};

/// Make one `Gemm` of a `MatMul` of matrices and the `Add` of a bias after it, and of a `Gemm` and the `Transpose` before it.
///
/// Applies when: both operands of the product are known to be matrices of floats, the bias broadcasts to the product, and nothing but the
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
        cx.add("transposes fused", rewrite(graph, turn));
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
    let (&[rows, _], &[_, columns]) = (shapes.dims(a)?, shapes.dims(b)?) else { return None };
    let is_of_floats = shapes.fact(product)?.dtype.is_some_and(is_float);
    // The bias must not widen the product.
    let one = Some(Term::from(1));
    let fits = |(extent, wanted): (&Dim, Dim)| *extent == one || extent.is_some() && *extent == wanted;
    let dims = shapes.dims(bias).filter(|dims| dims.len() <= 2)?;
    if !is_of_floats || !dims.iter().rev().zip([columns, rows]).all(fits) {
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

/// Has the `Gemm` at `node` transpose what a `Transpose` before it does.
fn turn(graph: &mut Graph, node: NodeId) -> Option<()> {
    graph.op_of(node, "Gemm")?;
    let mut turned = None;
    for (slot, flag) in [(0, "transA"), (1, "transB")] {
        let value = graph.operand(node, slot)?;
        let Some(transpose) = graph.op_of(value.node, "Transpose") else { continue };
        let swaps = transpose.ints("perm").is_none_or(|perm| *perm == [1, 0]);
        if !swaps || graph.sole_use(value).is_none() || graph.is_pinned(value) {
            continue;
        }
        let source = graph.operand(value.node, 0)?;
        let flagged = graph.op(node)?.int(flag).unwrap_or(0);
        graph.edit_op(node, |op| *op = std::mem::take(op).with_int(flag, i64::from(flagged == 0)));
        graph.exchange_operand(node, slot, Some(source));
        turned = Some(());
    }
    turned
}
