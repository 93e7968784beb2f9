//! When a weight is spelled as a `DequantizeLinear`, and how.

use super::{Runtime, SHIFTS};
use crate::{
    codec::Model,
    ir::{Affine, DType, Graph, Inlet, NodeId, Outlet, Storage, Tensor},
};

/// The version from which on operators are there: `DequantizeLinear`, that of axes, of half precision and
/// of blocks, and their integers of few bits.
const DEQUANTIZES: i64 = 10;
const DEQUANTIZES_AXES: i64 = 13;
const DEQUANTIZES_HALVES: i64 = 19;
const DEQUANTIZES_BLOCKS: i64 = 21;
const INT4: (i64, i64) = (21, 10);
const INT2: (i64, i64) = (25, 13);
/// How a `DequantizeLinear` makes a weight.
pub(super) struct Dequantized {
    /// The type of its codes.
    pub(super) dtype: DType,
    /// The shape of its scales.
    pub(super) shape: Vec<usize>,
    /// The axis along which there are several scales, and how many elements each is for.
    pub(super) axis: Option<(usize, usize)>,
}

impl Dequantized {
    /// That of the constant at `id`, if that is how it is best spelled.
    pub(super) fn of(
        graph: &Graph,
        id: NodeId,
        affine: &Affine,
        (runtime, ir_version): (Runtime, i64),
    ) -> Option<Self> {
        let (codes, opset) = (affine.codes(), graph.opset());
        let is_product = runtime == Runtime::Onnxruntime && affine.is_multiplied_by() && is_multiplied_by(graph, id);
        (runtime == Runtime::Generic || is_product || is_between_codes(graph, id)).then_some(())?;
        let dtype = type_of_codes(affine, (opset, ir_version), is_product)?;
        match affine.scales().dtype() {
            DType::Float => {}
            DType::Float16 if opset >= DEQUANTIZES_HALVES && !is_product => {}
            _ => return None,
        }
        are_zeros_held(affine, dtype).then_some(())?;
        let (dims, tile, grid) = (codes.dims(), codes.tile(), codes.grid());
        let cut: Vec<usize> = (0..dims.len()).filter(|&axis| grid[axis] > 1).collect();
        let is_single = |axis: usize| tile[axis] == 1;
        let (least, shape, axis) = match cut[..] {
            [] => (DEQUANTIZES, Vec::new(), None),
            [axis] if is_single(axis) => (DEQUANTIZES_AXES, vec![grid[axis]], Some((axis, 1))),
            _ => {
                let axis = (0..dims.len()).find(|&axis| !is_single(axis))?;
                (0..dims.len()).all(|other| other == axis || is_single(other)).then_some(())?;
                (DEQUANTIZES_BLOCKS, grid.clone(), Some((axis, tile[axis])))
            }
        };
        (opset >= least).then_some(())?;
        // Of other products, onnxruntime makes floats each time anew.
        let is_fused = || match axis {
            Some((1, 1)) => true,
            Some((0, block)) => block >= FUSED_BLOCK && block.is_power_of_two(),
            _ => false,
        };
        (!is_product || runtime == Runtime::Generic || is_between_codes(graph, id) || is_fused()).then_some(())?;
        Some(Self { dtype, shape, axis })
    }
}

/// The type that a file keeps the codes of `affine` in; those of less than a byte may be taken out of bytes for what is multiplied by them.
fn type_of_codes(affine: &Affine, (opset, ir_version): (i64, i64), is_product: bool) -> Option<DType> {
    let has = |(least, version): (i64, i64)| opset >= least && ir_version >= version;
    Some(match (affine.codes().bits(), affine.is_signed()) {
        (8, true) => DType::Int8,
        (8, false) => DType::Uint8,
        (4, true) if has(INT4) => DType::Int4,
        (4, false) if has(INT4) => DType::Uint4,
        (2, true) if has(INT2) => DType::Int2,
        (2, false) if has(INT2) => DType::Uint2,
        (2 | 4, _) if is_product && opset >= SHIFTS => DType::Uint8,
        _ => return None,
    })
}

/// Whether the zero points of `affine` are among the integers of the type of its codes.
fn are_zeros_held(affine: &Affine, dtype: DType) -> bool {
    let bits = affine.codes().bits();
    let shift = if dtype == DType::Uint8 && affine.is_signed() { 1_i64 << (bits - 1) } else { 0 };
    let held = match dtype {
        DType::Int8 | DType::Int4 | DType::Int2 => -(1_i64 << (bits - 1))..1 << (bits - 1),
        DType::Uint8 => 0..256,
        _ => 0..1 << bits,
    };
    let zeros = affine.zeros().and_then(Tensor::i64s).unwrap_or_default();
    zeros.iter().all(|zero| held.contains(&(zero + shift)))
}

/// The least number of rows that onnxruntime multiplies by codes of one scale.
const FUSED_BLOCK: usize = 16;

/// Whether something multiplies the constant at `id` with what a `DequantizeLinear` makes: kernels of integers look for one before both.
pub(crate) fn is_between_codes(graph: &Graph, id: NodeId) -> bool {
    graph.uses(id.out()).into_iter().any(|(node, _)| {
        let read = graph.operand(node, 0).filter(|&value| value != id.out());
        read.is_some_and(|value| graph.op_of(value.node, "DequantizeLinear").is_some())
    })
}

/// Whether all that read the matrix at `id` are a `MatMul` by it.
fn is_multiplied_by(graph: &Graph, id: NodeId) -> bool {
    let is_product = |&(node, inlet): &(NodeId, Inlet)| {
        graph.op_of(node, "MatMul").is_some()
            && inlet == Inlet::Slot(1)
            && graph.constant(id.out()).is_some_and(|tensor| tensor.dims().len() == 2)
    };
    let uses = graph.uses(id.out());
    let is_seen = uses.iter().all(|(node, _)| !matches!(hidden(graph, *node), Some(Hidden::Otherwise)));
    !uses.is_empty() && uses.iter().all(is_product) && !graph.is_output(id.out()) && is_seen
}

/// How many values onnxruntime rounds to eight bits with one scale before it multiplies them by the codes of the weight at `id` of a model,
/// if it does where the file that was read does not: what is left as it was is run as it was. That is the block of the weight, and 32 where
/// whole columns have a scale.
pub(crate) fn rounded_at_once(model: &Model, graph: &Graph, id: NodeId) -> Option<usize> {
    const OF_COLUMNS: usize = 32;
    let weight = graph.weight(id.out()).filter(|weight| weight.spelling().is_none())?;
    let Storage::Affine(affine) = weight.storage() else { return None };
    let is_multiplied = model.runtime == Runtime::Onnxruntime
        && affine.is_multiplied_by()
        && is_multiplied_by(graph, id)
        && !is_between_codes(graph, id);
    let form = Dequantized::of(graph, id, affine, (model.runtime, model.ir_version())).filter(|_| is_multiplied)?;
    Some(form.axis.map_or(OF_COLUMNS, |(_, block)| if block > 1 { block } else { OF_COLUMNS }))
}

/// Whether onnxruntime would not find the product that `node` is or would become.
pub(crate) fn is_hidden(graph: &Graph, node: NodeId) -> bool {
    matches!(hidden(graph, node), Some(Hidden::Otherwise))
}

/// What reads the product at `product`, or the sum of it and a constant, and hides it from onnxruntime (1.32), which looks for products
/// with codes after it has put activations that cut off aside: a rectifier that can be spelled otherwise, or something else.
pub(super) enum Hidden {
    /// By a `Relu`.
    Rectified(NodeId),
    /// By a `Clip`, or by one of several readers.
    Otherwise,
}

/// What hides the product at `product`, if anything does.
pub(super) fn hidden(graph: &Graph, product: NodeId) -> Option<Hidden> {
    let is_cut = |node: NodeId| ["Relu", "Clip"].iter().any(|kind| graph.op_of(node, kind).is_some());
    let mut value = product.out();
    if let Some((add, slot)) = graph.sole_use(value)
        && graph.op_of(add, "Add").is_some()
        && graph.operand(add, 1 - slot).is_some_and(|bias| graph.constant(bias).is_some())
    {
        value = add.out();
    }
    match graph.sole_use(value) {
        Some((node, _)) if graph.op_of(node, "Relu").is_some() => Some(Hidden::Rectified(node)),
        _ => graph.uses(value).iter().any(|(node, _)| is_cut(*node)).then_some(Hidden::Otherwise),
    }
}

/// The codes that something is multiplied by to make `value`, or to make what `value` is the sum of and a constant.
pub(in crate::codec) fn product_with_codes(graph: &Graph, value: Outlet) -> Option<Outlet> {
    let product = match graph.op_of(value.node, "Add") {
        Some(_) => graph.operands(value.node).into_iter().flatten().find(|part| graph.constant(*part).is_none())?,
        None => value,
    };
    graph.op_of(product.node, "MatMul")?;
    let weight = graph.operand(product.node, 1)?;
    matches!(graph.weight(weight)?.storage(), Storage::Affine(affine) if affine.is_multiplied_by()).then_some(weight)
}
