//! Recognising weights that a file makes of integers: what [`lower`](super::lower) writes, and what other tools do.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Model,
    lower::{is_any_stored, product_with_codes},
};
use crate::{
    eval,
    ir::{
        Affine, Codebook, Codes, DType, Graph, NodeId, Op, Outlet, Storage, Tensor, Vectors, Weight, tensor::is_float,
    },
};

/// Tables of more entries are no codebooks.
const MOST_ENTRIES: usize = 256;

impl Model {
    /// Has each value that is made of a constant of fewer bits be a weight stored so. That is no edit: it is another view of what the
    /// file says.
    pub fn raise(&mut self) {
        let before = self.graph.clone();
        raise(&mut self.graph, &before);
        self.graph.count_as(&before);
    }
}

/// Whether the file of `model` holds each of its stored weights, bit for bit: what is verified is the twin, in which they are floats.
pub(crate) fn keeps_weights(model: &Model) -> bool {
    let wanted = hashes(&model.graph, &Weight::is_stored);
    if wanted.is_empty() {
        return true;
    }
    let mut written = model.lowered().into_owned();
    written.graph.inline_external();
    let Ok(mut file) = Model::decode(written.encode().into(), None) else { return false };
    file.raise();
    // What can't be spelled otherwise is there element by element.
    let found = hashes(&file.graph, &|weight| is_float(weight.value().dtype()));
    wanted.is_subset(&found)
}

/// The hashes of the values of those weights of `graph`, and of the bodies in it, that `is_wanted` is true of.
fn hashes(graph: &Graph, is_wanted: &dyn Fn(&Weight) -> bool) -> BTreeSet<u64> {
    let weights = graph.node_ids().filter_map(|id| graph.weight(id.out())).filter(|weight| is_wanted(weight));
    let inside = graph.bodies().flat_map(|(_, body)| hashes(&body.graph, is_wanted));
    weights.map(|weight| weight.value().hash()).chain(inside).collect()
}

/// See [`Model::raise`]; `before` is `graph` as the file has it.
pub(crate) fn raise(graph: &mut Graph, before: &Graph) {
    let mut known = BTreeMap::new();
    for id in graph.ops() {
        if graph.op(id).is_none()
            || graph.is_output(id.out())
            || graph.is_pinned(id.out())
            || graph.output_count(id) != 1
        {
            continue;
        }
        // What several nodes make of the same constants is one weight.
        let made = graph.op(id).and_then(Op::signature).map(|signature| (signature, graph.operands(id)));
        if let Some(&first) = made.as_ref().and_then(|made| known.get(made)) {
            graph.replace_uses(id.out(), first);
            graph.sweep(id);
            continue;
        }
        let Some(weight) = recognised(graph, id) else { continue };
        known.extend(made.map(|made| (made, id.out())));
        // Nodes that read a stored weight are no spelling by themselves: that would have to be spelled first.
        let spelling = before.extract(&[], &[id.out()]).filter(|spelling| !is_any_stored(spelling));
        let weight = match spelling {
            Some(spelling) => weight.spelled(spelling),
            None => weight,
        };
        graph.settle(id, weight);
    }
    for id in graph.ops() {
        _ = put_together(graph, id);
    }
    for id in graph.holders() {
        let inside = before.op(id).map_or(&[][..], |op| &op.bodies);
        graph.bodies_mut(id).iter_mut().zip(inside).for_each(|(body, before)| raise(&mut body.graph, &before.graph));
    }
}

/// Makes the larger of a product with codes and zero the rectifier that it was.
fn put_together(graph: &mut Graph, node: NodeId) -> Option<()> {
    let op = graph.op_of(node, "Max").filter(|op| op.arity == 2)?.clone();
    let (read, zero) = (graph.operand(node, 0)?, graph.operand(node, 1)?);
    let is_zero = graph.constant(zero).filter(|zero| zero.dims().is_empty())?.f64s()? == [0.0];
    is_zero.then_some(())?;
    let weight = product_with_codes(graph, read)?;
    let apart = graph.weight(weight)?.clone().apart();
    graph.set_weight(weight, apart);
    graph.replace_op(node, Op::new("Relu").in_place_of(&op), &[read]);
    Some(())
}

/// The stored weight that `node` makes, if it makes one.
fn recognised(graph: &Graph, node: NodeId) -> Option<Weight> {
    let op = graph.op(node)?;
    let operand = |slot: u32| graph.operand(node, slot);
    match op.meaning()? {
        "DequantizeLinear" => dequantized(graph, node),
        "Cast" => {
            let halves = graph.weight(operand(0)?).filter(|weight| !weight.is_stored())?.value();
            (halves.dtype() == DType::Float16).then_some(())?;
            let to = DType::try_from(i32::try_from(op.int("to")?).ok()?).ok()?;
            matches!(to, DType::Float | DType::Double).then_some(())?;
            Weight::half(Tensor::floats(to, halves.dims(), &halves.f64s()?)?)
        }
        "Mul" => {
            let (a, b) = (operand(0)?, operand(1)?);
            product(graph, a, b).or_else(|| product(graph, b, a))
        }
        "Gather" if op.int("axis").unwrap_or(0) == 0 => {
            let places = Integers::of(graph, operand(1)?)?;
            let table = table(graph, operand(0)?)?;
            if let ([_, width], [rows, columns]) = (table.dims(), places.dims()) {
                let (dims, codes) = ([*rows, *columns, *width], places.codes(&[], false)?);
                return Weight::stored(Storage::Vectors(Vectors::new(codes, table.clone(), &dims, false)?));
            }
            (table.dims().len() == 1).then_some(())?;
            let dims: Vec<_> = places.dims().iter().map(|_| 1).chain([table.len()]).collect();
            let codes = places.codes(&[], false)?;
            Weight::stored(Storage::Codebook(Codebook::new(codes, table.reshape(&dims)?)?))
        }
        "GatherElements" => {
            let places = Integers::of(graph, operand(1)?)?;
            let tables = table(graph, operand(0)?).filter(|table| table.dims().len() == places.dims().len())?;
            let axis = eval::axis(op.int("axis").unwrap_or(0), tables.dims().len())?;
            let fits = |i: usize| i == axis || tables.dims()[i] == places.dims()[i];
            (0..tables.dims().len()).all(fits).then_some(())?;
            let mut tile = vec![1; tables.dims().len()];
            tile[axis] = places.dims()[axis];
            let mut order: Vec<_> = (0..tables.dims().len()).collect();
            order.retain(|&other| other != axis);
            order.push(axis);
            let (mut grid, entries) = (tables.dims().to_vec(), tables.dims()[axis]);
            grid[axis] = 1;
            grid.push(entries);
            let tables = tables.permute(&order)?.reshape(&grid)?;
            let codes = places.codes(&tile, false)?;
            Weight::stored(Storage::Codebook(Codebook::new(codes, tables)?))
        }
        // What something else reads as it is stays one weight.
        "Reshape" | "Transpose" | "Identity" => {
            graph.sole_use(operand(0)?)?;
            moved(graph, node)
        }
        _ => None,
    }
}

/// The stored weight that `node` makes of another whose elements it only moves.
pub(crate) fn moved(graph: &Graph, node: NodeId) -> Option<Weight> {
    let op = graph.op(node)?;
    let weight = graph.weight(graph.operand(node, 0)?).filter(|weight| weight.is_stored())?;
    let shape = graph.operand(node, 1).map(|shape| graph.constant(shape).ok_or(())).transpose().ok()?;
    let moved = match op.standard()? {
        "Identity" => Some(weight.clone()),
        "Transpose" => {
            let rank = weight.value().dims().len();
            let given = op.ints("perm").map(|perm| perm.iter().map(|&axis| usize::try_from(axis).ok()).collect());
            let perm: Vec<usize> = given.unwrap_or_else(|| Some((0..rank).rev().collect()))?;
            (perm.len() == rank).then(|| weight.permute(&perm))?
        }
        "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" => {
            let inputs: Vec<_> =
                [Some(weight.value()), shape].into_iter().take(1 + usize::from(shape.is_some())).collect();
            weight.reshape(eval::evaluate(op, graph.opset(), &inputs)?.first()?.dims())
        }
        _ => None,
    }?;
    moved.is_stored().then_some(moved)
}

/// A table that codes may stand for entries of.
fn table(graph: &Graph, value: Outlet) -> Option<&Tensor> {
    let weight = graph.weight(value).filter(|weight| !weight.is_stored())?;
    Some(weight.value()).filter(|tensor| is_float(tensor.dtype()))
}

/// What a `DequantizeLinear` makes of a constant.
fn dequantized(graph: &Graph, node: NodeId) -> Option<Weight> {
    let op = graph.op(node)?;
    op.int("output_dtype").is_none_or(|dtype| dtype == 0).then_some(())?;
    let whole = Integers::of(graph, graph.operand(node, 0)?)?;
    let scales = table(graph, graph.operand(node, 1)?)?;
    let zeros = match graph.operand(node, 2) {
        Some(zeros) => Some(Integers::constant(graph.constant(zeros)?)?),
        None => None,
    };
    let (rank, block) = (whole.dims().len(), op.int("block_size").unwrap_or(0));
    let mut tile = whole.dims().to_vec();
    if block > 0 {
        let axis = eval::axis(op.int("axis").unwrap_or(1), rank)?;
        tile = vec![1; rank];
        tile[axis] = usize::try_from(block).ok()?;
    } else if scales.dims().len() == 1 && scales.len() > 1 {
        tile[eval::axis(op.int("axis").unwrap_or(1), rank)?] = 1;
    } else if scales.len() != 1 {
        return None;
    }
    let form = affine(&whole, &tile, scales, zeros.map(|zeros| zeros.values()))?;
    (block <= 0 || form.scales().dims() == scales.dims()).then_some(())?;
    Weight::stored(Storage::Affine(form.to_multiply_by()))
}

/// Integers of `whole`, times a scale for each tile, less a zero point for each before, in the order of tiles.
fn affine(whole: &Integers, tile: &[usize], scales: &Tensor, zeros: Option<Vec<i64>>) -> Option<Affine> {
    let codes = whole.codes(tile, whole.is_signed)?;
    let grid = codes.grid();
    let zeros = match zeros {
        Some(zeros) if zeros.len() == 1 => {
            Some(Tensor::integers(DType::Int32, &grid, &vec![zeros[0]; grid.iter().product()])?)
        }
        Some(zeros) => Some(Tensor::integers(DType::Int32, &grid, &zeros)?),
        None => None,
    };
    (scales.len() == grid.iter().product::<usize>()).then_some(())?;
    Affine::new(codes, whole.is_signed, scales.reshape(&grid)?, zeros)
}

/// `value`, which is made of integers alone, times the constant `scales`.
fn product(graph: &Graph, value: Outlet, scales: Outlet) -> Option<Weight> {
    let scales = table(graph, scales)?;
    let mut zeros = None;
    let mut float = value;
    if graph.op_of(value.node, "Sub").is_some() {
        zeros = Some(table(graph, graph.operand(value.node, 1)?)?);
        float = graph.operand(value.node, 0)?;
    }
    let cast = graph.op_of(float.node, "Cast")?;
    (cast.int("to") == Some(scales.dtype() as i64)).then_some(())?;
    let whole = Integers::of(graph, graph.operand(float.node, 0)?)?;
    let dims = whole.dims().to_vec();
    let broadcast = eval::broadcast(&dims, scales.dims()).filter(|broadcast| *broadcast == dims)?;
    let pad = broadcast.len() - scales.dims().len();
    let extent = |axis: usize| if axis < pad { 1 } else { scales.dims()[axis - pad] };
    let tile: Vec<_> = (0..dims.len()).map(|axis| if extent(axis) == 1 { dims[axis] } else { 1 }).collect();
    let zeros = match zeros {
        Some(zeros) if zeros.len() == 1 && zeros.dims().len() <= dims.len() || zeros.dims() == scales.dims() => {
            let is_whole = |zero: f64| (zero.fract() == 0.0 && zero.abs() <= 1024.0).then_some(zero as i64);
            Some(zeros.f64s()?.into_iter().map(is_whole).collect::<Option<Vec<_>>>()?)
        }
        Some(_) => return None,
        None => None,
    };
    Weight::stored(Storage::Affine(affine(&whole, &tile, scales, zeros)?))
}

/// Integers that are made of constants, and how many bits each takes there.
struct Integers {
    tensor: Tensor,
    bits: u32,
    is_signed: bool,
}

impl Integers {
    fn dims(&self) -> &[usize] {
        self.tensor.dims()
    }

    fn values(&self) -> Vec<i64> {
        self.tensor.i64s().unwrap_or_default()
    }

    /// Those of a constant of at most eight bits.
    fn constant(tensor: &Tensor) -> Option<Self> {
        let (bits, is_signed) = match tensor.dtype() {
            DType::Int8 => (8, true),
            DType::Uint8 => (8, false),
            DType::Int4 => (4, true),
            DType::Uint4 => (4, false),
            DType::Int2 => (2, true),
            DType::Uint2 => (2, false),
            _ => return None,
        };
        let dtype = if is_signed { DType::Int8 } else { DType::Uint8 };
        Some(Self { tensor: Tensor::integers(dtype, tensor.dims(), &tensor.codes()?)?, bits, is_signed })
    }

    /// Those that `value` is.
    fn of(graph: &Graph, value: Outlet) -> Option<Self> {
        if let Some(tensor) = graph.constant(value) {
            return Self::constant(tensor);
        }
        let op = graph.op(value.node)?;
        let operand = |slot: u32| graph.operand(value.node, slot);
        let evaluate = |op: &Op, inputs: &[Option<&Tensor>]| eval::evaluate(op, graph.opset(), inputs)?.pop();
        match op.standard()? {
            "Cast" | "Reshape" | "Transpose" | "Slice" | "Squeeze" | "Unsqueeze" | "Flatten" | "Identity" => {
                let first = Self::of(graph, operand(0)?)?;
                let rest = graph.operands(value.node).into_iter().skip(1);
                let rest =
                    rest.map(|v| v.map(|v| graph.constant(v).ok_or(())).transpose()).collect::<Result<Vec<_>, _>>();
                let inputs: Vec<_> = std::iter::once(Some(&first.tensor)).chain(rest.ok()?).collect();
                let tensor = evaluate(op, &inputs)?;
                tensor.i64s()?;
                Some(Self { tensor, ..first })
            }
            "BitShift" => {
                let first = Self::of(graph, operand(0)?)?;
                let by = graph.constant(operand(1)?)?;
                let tensor = evaluate(op, &[Some(&first.tensor), Some(by)])?;
                let right = op.string("direction") == Some("RIGHT");
                let by = by.i64s()?.into_iter().min().unwrap_or(0);
                let bits = if right { 8 - u32::try_from(by).ok().filter(|by| *by < 8)? } else { 8 };
                Some(Self { tensor, bits, is_signed: false })
            }
            "Mul" | "Add" => {
                let side = |slot: u32| {
                    let value = operand(slot)?;
                    let given = graph.constant(value).filter(|tensor| tensor.len() == 1);
                    given
                        .map(|tensor| Self { tensor: tensor.clone(), bits: 0, is_signed: false })
                        .or_else(|| Self::of(graph, value))
                };
                let (a, b) = (side(0)?, side(1)?);
                let tensor = evaluate(op, &[Some(&a.tensor), Some(&b.tensor)])?;
                let bits = a.bits + b.bits;
                (bits <= 8).then_some(Self { tensor, bits, is_signed: a.is_signed || b.is_signed })
            }
            _ => None,
        }
    }

    /// The codes of tiles of the extents of `tile`, all of one if there are none; `None` where one takes more bits.
    fn codes(&self, tile: &[usize], is_signed: bool) -> Option<Codes> {
        let (low, high) = if is_signed {
            (-(1_i64 << (self.bits - 1)), (1_i64 << (self.bits - 1)) - 1)
        } else {
            (0, (1 << self.bits) - 1)
        };
        let fits = |value: i64| (low..=high).contains(&value);
        let bytes = match self.tensor.dtype() {
            DType::Int8 => {
                Some(self.tensor.bytes()).filter(|bytes| bytes.iter().all(|&byte| fits(i64::from(byte as i8))))?
            }
            DType::Uint8 => {
                Some(self.tensor.bytes()).filter(|bytes| bytes.iter().all(|&byte| fits(i64::from(byte))))?
            }
            _ => {
                let byte = |value: i64| fits(value).then_some(value as u8);
                self.values().into_iter().map(byte).collect::<Option<Vec<u8>>>()?.into()
            }
        };
        let tile = if tile.is_empty() { self.dims() } else { tile };
        let most = 1 << self.bits;
        (most <= MOST_ENTRIES).then(|| Codes::new(self.dims(), self.bits, tile, bytes))?
    }
}
