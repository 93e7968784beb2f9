//! Spelling stored weights as nodes that standard runtimes load: the one place that knows how (algorithms.md §14).

mod dequantized;

use std::{borrow::Cow, collections::BTreeMap};

use prost::Message;

pub(super) use self::dequantized::product_with_codes;
use self::dequantized::{Dequantized, Hidden, hidden};
pub(crate) use self::dequantized::{is_between_codes, is_hidden, rounded_at_once};
use super::Model;
use crate::{
    coding::{Form, Scheme, Tiling},
    ir::{Affine, Codebook, Codes, DType, Graph, Kind, NodeId, Op, Outlet, Spelling, Storage, Tensor, Vectors, Weight},
};

/// What is to run the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Runtime {
    /// ONNX Runtime, which multiplies by integers of matrices of `MatMul`, and makes floats of all others once, when it loads the
    /// file.
    #[default]
    Onnxruntime,
    /// Any: `DequantizeLinear` wherever it says what is to be said.
    Generic,
}

/// `BitShift` and `GatherElements`.
const SHIFTS: i64 = 11;
/// Products broadcast as they do now.
const BROADCASTS: i64 = 7;

/// Whether graphs over this operator set can hold several codes in a byte.
#[must_use]
pub fn packs(opset: i64) -> bool {
    opset >= SHIFTS
}

/// The first operator set that has what codes of this form are spelled with.
#[must_use]
pub fn least_opset(form: Form) -> i64 {
    let has_tables = form.scheme == Scheme::Table && form.tiling != Tiling::Tensor;
    if form.bits < 8 || has_tables { SHIFTS } else { BROADCASTS }
}

impl Model {
    /// The model as the file has it: each stored weight is the last of the nodes that make it.
    pub(crate) fn lowered(&self) -> Cow<'_, Self> {
        if !is_any_stored(&self.graph) {
            return Cow::Borrowed(self);
        }
        let mut model = self.clone();
        lower(&mut model.graph, self.runtime, self.ir_version());
        Cow::Owned(model)
    }
}

/// Whether any weight of `graph` or of a body in it is made of other constants in the file.
pub(super) fn is_any_stored(graph: &Graph) -> bool {
    graph.node_ids().any(|id| graph.weight(id.out()).is_some_and(Weight::is_stored))
        || graph.bodies().any(|(_, body)| is_any_stored(&body.graph))
}

/// Makes each stored weight of `graph`, and of the bodies in it, the last of the nodes that it is spelled as.
fn lower(graph: &mut Graph, runtime: Runtime, ir_version: i64) {
    let stored = |id: &NodeId| graph.weight(id.out()).is_some_and(Weight::is_stored);
    let mut stored: Vec<_> = graph.order().into_iter().filter(stored).collect();
    // What is multiplied by codes goes by what is around it, biases that are stored otherwise included.
    stored.sort_by_key(|id| {
        !matches!(graph.weight(id.out()).map(Weight::storage), Some(Storage::Affine(affine)) if affine.is_multiplied_by())
    });
    graph.free_names();
    let given = graph.values().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let mut speller = Speller { graph, known: BTreeMap::new(), given, steps: 0, runtime, ir_version };
    for id in stored {
        if let Kind::Const(constant) = speller.graph.kind(id) {
            let weight = constant.weight.clone();
            // What can't be spelled stays the elements.
            let _ = speller.spell(id, &weight);
        }
    }
    for id in graph.holders() {
        graph.bodies_mut(id).iter_mut().for_each(|body| lower(&mut body.graph, runtime, ir_version));
    }
}

/// Bytes of the nodes and constants that the constant `value` of `graph` would be spelled as if it were `weight`; `None` where it can't.
pub(crate) fn spelled_bytes(graph: &Graph, value: Outlet, weight: &Weight) -> Option<usize> {
    let mut alone = Graph::new(graph.opset());
    let constant = alone.add_const(weight.clone(), graph.name(value));
    let mut speller = Speller {
        graph: &mut alone,
        known: BTreeMap::new(),
        given: BTreeMap::new(),
        steps: 0,
        runtime: Runtime::default(),
        ir_version: i64::MAX,
    };
    speller.spell(constant.node, weight)?;
    Some(Model { graph: alone, ..Model::default() }.to_proto().encoded_len())
}

/// What the short names begin with.
const STEP: &str = "code.";

struct Speller<'g> {
    graph: &'g mut Graph,
    /// The parts that were added, by hash: equal ones are kept once.
    known: BTreeMap<u64, Outlet>,
    /// What there is by name, and what files had for weights.
    given: BTreeMap<String, Outlet>,
    /// How many values have been named.
    steps: usize,
    runtime: Runtime,
    ir_version: i64,
}

impl Speller<'_> {
    /// Makes the constant at `id` the nodes that it is spelled as.
    fn spell(&mut self, id: NodeId, weight: &Weight) -> Option<()> {
        if let Some(spelling) = weight.spelling() {
            return self.as_before(id, spelling);
        }
        (self.graph.opset() >= BROADCASTS).then_some(())?;
        let to = weight.value().dtype();
        match weight.storage() {
            Storage::Dense => None,
            Storage::Half => {
                let halves = Tensor::floats(DType::Float16, weight.value().dims(), &weight.value().f64s()?)?;
                let halves = self.part(id, "half", halves);
                self.graph.unsettle(id, Op::new("Cast").with_int("to", to as i64), &[halves]);
                Some(())
            }
            Storage::Affine(affine) => self.dequantized(id, affine).or_else(|| self.product(id, affine, to)),
            Storage::Codebook(codebook) => self.table(id, codebook),
            Storage::Vectors(vectors) => self.vectors(id, vectors, weight.value().dims()),
        }
    }

    /// Makes the constant at `id` what a file had for it. Parts are what they were called where another weight has the same.
    fn as_before(&mut self, id: NodeId, spelling: &Spelling) -> Option<()> {
        let (is_apart, spelling) = (spelling.is_apart, &*spelling.nodes);
        let last = spelling.outputs().first()?.value.node;
        let mut copies: BTreeMap<Outlet, Outlet> = BTreeMap::new();
        for part in spelling.order() {
            let name = spelling.name(part.out()).to_owned();
            let operands: Vec<Option<Outlet>> =
                spelling.operands(part).into_iter().map(|value| copies.get(&value?).copied()).collect();
            if part == last {
                let (operands, op) = (operands.into_iter().flatten().collect::<Vec<_>>(), spelling.op(part)?.clone());
                let dtype = self.graph.constant(id.out())?.dtype();
                self.graph.unsettle(id, op, &operands);
                if is_apart {
                    self.keep_apart(id, dtype);
                }
                break;
            }
            let signature = |graph: &Graph, node: NodeId| graph.op(node).and_then(Op::signature);
            let is_same = |&known: &Outlet| match (spelling.constant(part.out()), self.graph.constant(known)) {
                (Some(tensor), Some(known)) => known.same(tensor),
                (None, None) => {
                    self.graph.operands(known.node) == operands
                        && signature(self.graph, known.node) == signature(spelling, part)
                }
                _ => false,
            };
            let known = self.given.get(&name).copied().filter(is_same);
            let copy = match (known, spelling.kind(part)) {
                (Some(known), _) => known,
                (None, Kind::Const(constant)) => self.graph.add_const(constant.weight.clone(), &name),
                (None, Kind::Op(op)) => {
                    let near = self.graph.uses(id.out()).first().map_or(id, |(reader, _)| *reader);
                    self.graph.add_op(op.as_ref().clone(), &operands, &[&name], near).out()
                }
                _ => return None,
            };
            self.given.insert(name, copy);
            copies.insert(part.out(), copy);
        }
        Some(())
    }

    /// A constant called after `id` and what it is, or one that is the same.
    fn part(&mut self, id: NodeId, what: &str, tensor: Tensor) -> Outlet {
        let key = tensor.hash();
        if let Some(&known) = self.known.get(&key) {
            return known;
        }
        let part = self.own_part(id, what, tensor);
        self.known.insert(key, part);
        part
    }

    /// A constant called after `id` and what it is, which nothing else reads: onnxruntime can't multiply by codes whose scales are those
    /// of others too. What says little has a short name.
    fn own_part(&mut self, id: NodeId, what: &str, tensor: Tensor) -> Outlet {
        const TELLING: &[&str] = &["codes", "half", "high", "low", "scale", "table"];
        let name =
            if TELLING.contains(&what) { format!("{}.{what}", self.graph.name(id.out())) } else { self.short_name() };
        self.graph.add_const(Weight::dense(tensor), &name)
    }

    /// A name that no value has, of a few letters, since there are many.
    fn short_name(&mut self) -> String {
        loop {
            self.steps += 1;
            let name = format!("{STEP}{}", self.steps);
            if !self.graph.names().contains(&name) {
                return name;
            }
        }
    }

    /// An operator that comes before the constant at `id`.
    fn step(&mut self, id: NodeId, op: Op, operands: &[Outlet]) -> Outlet {
        let name = self.short_name();
        let near = self.graph.uses(id.out()).first().map_or(id, |(reader, _)| *reader);
        let operands: Vec<_> = operands.iter().copied().map(Some).collect();
        self.graph.add_op(op, &operands, &[&name], near).out()
    }

    fn cast(&mut self, id: NodeId, value: Outlet, to: DType) -> Outlet {
        self.step(id, Op::new("Cast").with_int("to", to as i64), &[value])
    }

    fn reshape(&mut self, id: NodeId, value: Outlet, dims: &[usize]) -> Outlet {
        let shape = self.shape(id, dims);
        self.step(id, Op::new("Reshape"), &[value, shape])
    }

    fn shape(&mut self, id: NodeId, dims: &[usize]) -> Outlet {
        let extents: Vec<_> = dims.iter().map(|&extent| extent as i64).collect();
        self.part(id, "shape", Tensor::i64(&[dims.len()], &extents))
    }

    /// Makes the constant at `id` the value of the operator `op` on `operands`, in shape `dims` where that of `made` is another.
    fn finish(&mut self, id: NodeId, op: Op, operands: &[Outlet], (made, dims): (&[usize], &[usize])) {
        if made == dims {
            return self.graph.unsettle(id, op, operands);
        }
        let value = self.step(id, op, operands);
        let shape = self.shape(id, dims);
        self.graph.unsettle(id, Op::new("Reshape"), &[value, shape]);
    }

    /// `DequantizeLinear`, of bytes that shifts take out of others where there are no integers of few bits. Scales that are not one for all
    /// have zero points even where these are zero: onnxruntime may make unsigned codes of signed ones, and then asks for them.
    fn dequantized(&mut self, id: NodeId, affine: &Affine) -> Option<()> {
        let form = Dequantized::of(self.graph, id, affine, (self.runtime, self.ir_version))?;
        let codes = affine.codes();
        let (bits, offset) = match form.dtype {
            DType::Uint8 if codes.bits() < 8 => (8, if affine.is_signed() { 1_i64 << (codes.bits() - 1) } else { 0 }),
            _ => (codes.bits(), 0),
        };
        let given = affine.zeros().map(|zeros| zeros.i64s().unwrap_or_default());
        let is_shifted = offset != 0 || given.is_some();
        let zeros: Vec<u8> = match given {
            Some(zeros) => zeros.into_iter().map(|zero| (zero + offset) as u8).collect(),
            None => vec![offset as u8; affine.scales().len()],
        };
        let scales = self.own_part(id, "scale", affine.scales().reshape(&form.shape)?);
        let whole = if bits == codes.bits() {
            let held = Tensor::made(form.dtype, codes.dims(), packed(codes.bytes(), bits).into());
            self.own_part(id, "codes", held)
        } else {
            let bytes: Vec<u8> = codes.bytes().iter().map(|byte| byte.wrapping_add(offset as u8)).collect();
            self.integers(id, (&bytes, codes.bits(), DType::Uint8), codes.dims())?
        };
        let mut operands = vec![whole, scales];
        if is_shifted || !form.shape.is_empty() && form.dtype == DType::Int8 {
            let zeros = Tensor::made(form.dtype, &form.shape, packed(&zeros, bits).into());
            operands.push(self.own_part(id, "zero", zeros));
        }
        let mut op = Op::new("DequantizeLinear");
        if let Some((axis, block)) = form.axis {
            op = op.with_int("axis", axis as i64);
            op = if block > 1 { op.with_int("block_size", block as i64) } else { op };
        }
        self.graph.unsettle(id, op, &operands);
        self.keep_apart(id, affine.scales().dtype());
        Some(())
    }

    /// Has rectifiers of products with the weight of type `dtype` at `id` be written as the larger of these and zero, which hides no
    /// product.
    fn keep_apart(&mut self, id: NodeId, dtype: DType) {
        let uses = self.graph.uses(id.out()).into_iter().map(|(node, _)| node);
        let products: Vec<_> = uses.filter(|&node| self.graph.op_of(node, "MatMul").is_some()).collect();
        if self.runtime != Runtime::Onnxruntime || is_between_codes(self.graph, id) {
            return;
        }
        for product in products {
            let Some(Hidden::Rectified(relu)) = hidden(self.graph, product) else { continue };
            let Some(read) = self.graph.operand(relu, 0) else { continue };
            let Some(zero) = Tensor::floats(dtype, &[], &[0.0]) else { continue };
            let zero = self.part(id, "zero", zero);
            let max = self.graph.op(relu).map(|op| Op::new("Max").in_place_of(op)).unwrap_or_default();
            self.graph.replace_op(relu, max, &[read, zero]);
        }
    }

    /// `Cast`, `Sub` of the zero points and `Mul` by the scales.
    fn product(&mut self, id: NodeId, affine: &Affine, to: DType) -> Option<()> {
        let affine = divided(affine)?;
        let codes = affine.codes();
        let (dims, tile) = (codes.dims().to_vec(), codes.tile().to_vec());
        // Axes that are cut in blocks are two, one of which scales broadcast along.
        let (mut apart, mut grid) = (Vec::new(), Vec::new());
        for (&extent, &tile) in dims.iter().zip(&tile) {
            let is_block = tile > 1 && tile < extent;
            if is_block || tile == 1 {
                apart.push(extent / tile);
                grid.push(extent / tile);
            }
            if is_block || tile > 1 {
                apart.push(tile);
                grid.push(1);
            }
        }
        let is_one = affine.scales().len() == 1;
        let grid = if is_one { Vec::new() } else { grid };
        let offset = if codes.bits() < 8 && affine.is_signed() { 1_i64 << (codes.bits() - 1) } else { 0 };
        let bytes: Vec<u8> = codes.bytes().iter().map(|byte| byte.wrapping_add(offset as u8)).collect();
        let dtype = if codes.bits() == 8 && affine.is_signed() { DType::Int8 } else { DType::Uint8 };
        let made = if is_one { &dims } else { &apart };
        let whole = self.integers(id, (&bytes, codes.bits(), dtype), made)?;
        let mut value = self.cast(id, whole, to);
        let zeros: Vec<f64> = match affine.zeros() {
            Some(zeros) => zeros.i64s()?.into_iter().map(|zero| (zero + offset) as f64).collect(),
            None => vec![offset as f64],
        };
        if zeros.iter().any(|&zero| zero != 0.0) {
            let alike = zeros.iter().all(|zero| zero == &zeros[0]);
            let zeros = if alike { Tensor::floats(to, &[], &zeros[..1])? } else { Tensor::floats(to, &grid, &zeros)? };
            let zeros = self.part(id, "zero", zeros);
            value = self.step(id, Op::new("Sub"), &[value, zeros]);
        }
        let scales = self.part(id, "scale", affine.scales().reshape(&grid)?);
        self.finish(id, Op::new("Mul"), &[value, scales], (made, &dims));
        Some(())
    }

    /// `Gather` from one table, or `GatherElements` from one for each tile.
    fn table(&mut self, id: NodeId, codebook: &Codebook) -> Option<()> {
        let (codes, tables, entries) = (codebook.codes(), codebook.tables(), codebook.entries());
        let dims = codes.dims().to_vec();
        let part = (&codes.bytes()[..], codes.bits(), DType::Uint8);
        if codes.grid().iter().product::<usize>() == 1 {
            let whole = self.integers(id, part, &dims)?;
            let places = self.cast(id, whole, DType::Int32);
            let table = self.part(id, "table", tables.reshape(&[entries])?);
            self.graph.unsettle(id, Op::new("Gather").with_int("axis", 0), &[table, places]);
            return Some(());
        }
        (self.graph.opset() >= SHIFTS).then_some(())?;
        let (outer, tile, inner) = in_three(codes)?;
        let tables = tables.reshape(&[outer, inner, entries])?.permute(&[0, 2, 1])?;
        let of = |size: usize| match (outer, inner) {
            (_, 1) => (vec![outer, size], 1),
            (1, _) => (vec![size, inner], 0),
            _ => (vec![outer, size, inner], 1),
        };
        let (shape, axis) = of(tile);
        let whole = self.integers(id, part, &shape)?;
        let places = self.cast(id, whole, DType::Int32);
        let tables = self.part(id, "table", tables.reshape(&of(entries).0)?);
        self.finish(id, Op::new("GatherElements").with_int("axis", axis), &[tables, places], (&shape, &dims));
        Some(())
    }

    /// `Gather` of the rows of a table, turned where they stand below each other.
    fn vectors(&mut self, id: NodeId, vectors: &Vectors, dims: &[usize]) -> Option<()> {
        let codes = vectors.codes();
        let whole = self.integers(id, (&codes.bytes()[..], codes.bits(), DType::Uint8), codes.dims())?;
        let places = self.cast(id, whole, DType::Int32);
        let table = self.part(id, "table", vectors.table().clone());
        let mut value = self.step(id, Op::new("Gather").with_int("axis", 0), &[table, places]);
        if vectors.is_turned() {
            value = self.step(id, Op::new("Transpose").with_ints("perm", &[0, 2, 1]), &[value]);
        }
        let shape = self.shape(id, dims);
        self.graph.unsettle(id, Op::new("Reshape"), &[value, shape]);
        Some(())
    }

    /// Codes of so many bits as integers of shape `dims`: bytes, or what shifts take out of bytes that hold several, each of which holds
    /// those that stand at one place of as many equal parts; those of three bits in two such planes.
    fn integers(&mut self, id: NodeId, (bytes, bits, dtype): (&[u8], u32, DType), dims: &[usize]) -> Option<Outlet> {
        match bits {
            8 => Some(self.part(id, "codes", Tensor::made(dtype, dims, bytes.to_vec().into()))),
            3 if self.graph.opset() >= SHIFTS => {
                let high: Vec<u8> = bytes.iter().map(|code| code >> 1).collect();
                let low: Vec<u8> = bytes.iter().map(|code| code & 1).collect();
                let high = self.plane(id, "high", &high, 2, dims);
                let low = self.plane(id, "low", &low, 1, dims);
                let high = self.cast(id, high, DType::Int32);
                let low = self.cast(id, low, DType::Int32);
                let two = self.part(id, "two", Tensor::integers(DType::Int32, &[], &[2])?);
                let high = self.step(id, Op::new("Mul"), &[high, two]);
                Some(self.step(id, Op::new("Add"), &[high, low]))
            }
            1 | 2 | 4 if self.graph.opset() >= SHIFTS => Some(self.plane(id, "codes", bytes, bits, dims)),
            _ => None,
        }
    }

    fn plane(&mut self, id: NodeId, what: &str, bytes: &[u8], bits: u32, dims: &[usize]) -> Outlet {
        let (count, parts) = (bytes.len(), (8 / bits) as usize);
        let length = count.div_ceil(parts);
        let at = |part: usize, place: usize| {
            bytes.get(part * length + place).copied().unwrap_or(0) << (bits as usize * part)
        };
        let held: Vec<u8> = (0..length).map(|place| (0..parts).map(|part| at(part, place)).sum()).collect();
        let held = self.part(id, what, Tensor::made(DType::Uint8, &[1, length], held.into()));
        let lefts: Vec<u8> = (1..=parts).map(|part| 8 - bits as u8 * part as u8).collect();
        let lefts = self.part(id, "shifts", Tensor::made(DType::Uint8, &[parts, 1], lefts.into()));
        let right = self.part(id, "shift", Tensor::made(DType::Uint8, &[], vec![8 - bits as u8].into()));
        let shift = |direction: &str| Op::new("BitShift").with_string("direction", direction);
        let left = self.step(id, shift("LEFT"), &[held, lefts]);
        let mut whole = self.step(id, shift("RIGHT"), &[left, right]);
        if length * parts > count {
            let flat = self.reshape(id, whole, &[length * parts]);
            let begin = self.part(id, "begin", Tensor::i64(&[1], &[0]));
            let end = self.part(id, "end", Tensor::i64(&[1], &[count as i64]));
            whole = self.step(id, Op::new("Slice"), &[flat, begin, end]);
        }
        self.reshape(id, whole, dims)
    }
}

/// Codes of so many bits, several to a byte, the first in the lowest bits.
fn packed(codes: &[u8], bits: u32) -> Vec<u8> {
    let (each, mask) = ((8 / bits) as usize, if bits == 8 { 255 } else { (1 << bits) - 1 });
    let byte = |codes: &[u8]| codes.iter().rev().fold(0, |byte: u8, code| byte.unbounded_shl(bits) | code & mask);
    codes.chunks(each).map(byte).collect()
}

/// The same with tiles that divide the axes that they cut.
fn divided(affine: &Affine) -> Option<Cow<'_, Affine>> {
    let codes = affine.codes();
    let fits = |(extent, tile): (&usize, &usize)| extent.is_multiple_of(*tile);
    if codes.dims().iter().zip(codes.tile()).all(fits) {
        return Some(Cow::Borrowed(affine));
    }
    let mut affine = affine.clone();
    for axis in 0..codes.dims().len() {
        let (extent, tile) = (codes.dims()[axis], codes.tile()[axis]);
        if !extent.is_multiple_of(tile) {
            let size = greatest_divisor(extent, tile);
            // A scale for each element is none.
            affine = affine.cut(axis, size).filter(|cut| cut.scales().len() < cut.codes().bytes().len())?;
        }
    }
    Some(Cow::Owned(affine))
}

/// The greatest common divisor.
fn greatest_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_divisor(b, a % b) }
}

/// A shape of three axes in which tiles are all of the middle one and one of the others, if there is one.
fn in_three(codes: &Codes) -> Option<(usize, usize, usize)> {
    let (dims, tile, grid) = (codes.dims(), codes.tile(), codes.grid());
    let cut: Vec<usize> = (0..dims.len()).filter(|&axis| tile[axis] > 1).collect();
    let (first, last) = match (cut.first(), cut.last()) {
        (Some(&first), Some(&last)) => (first, last),
        _ => (0, 0),
    };
    (first + 1..=last).all(|axis| grid[axis] == 1).then_some(())?;
    dims[first].is_multiple_of(tile[first]).then_some(())?;
    let outer = dims[..first].iter().product::<usize>() * grid[first];
    Some((outer, tile[first..=last].iter().product(), dims[last + 1..].iter().product()))
}
