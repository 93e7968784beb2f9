//! Constant tensors, whose bytes are shared with the file they came from until a pass makes new ones.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use half::{bf16, f16};
use xxhash_rust::xxh3::xxh3_64;

use super::element::{array, packed, packed_len, typed_bytes, typed_count, typed_len};
pub use super::element::{bits, is_float};
use crate::proto::{TensorProto, tensor_proto::DataLocation};

/// The element type of a tensor.
pub use crate::proto::tensor_proto::DataType as DType;

/// More elements than any memory holds: what dims beyond it say is a mistake, not a tensor.
const MAX_ELEMENTS: usize = 1 << 40;

/// A constant: an element type, a shape, and the elements in row-major order.
///
/// Cloning is cheap: the elements are shared.
#[derive(Clone, Debug)]
pub struct Tensor {
    dtype: DType,
    dims: Vec<usize>,
    data: Data,
}

#[derive(Clone, Debug)]
enum Data {
    /// As the file holds it; `external` are its bytes where they lie in another file.
    Carried { proto: Arc<TensorProto>, external: Option<Bytes> },
    /// Little-endian bytes that a pass computed.
    Made(Bytes),
}

/// What is wrong with a tensor in a file.
#[derive(Debug, thiserror::Error)]
pub enum TensorError {
    /// The element type is not one of the format's.
    #[error("element type {0} is unknown; the file may be newer than this program")]
    DType(i32),
    /// The shape is impossible.
    #[error("shape {0:?} is impossible")]
    Dims(Vec<i64>),
    /// The data does not fill the shape.
    #[error("shape {dims:?} of {dtype:?} needs {wanted} {unit} but the file holds {found}; it was cut or damaged")]
    Length {
        /// The shape.
        dims: Vec<usize>,
        /// The element type.
        dtype: DType,
        /// How many units the shape takes.
        wanted: usize,
        /// How many there are.
        found: usize,
        /// Bytes or elements.
        unit: &'static str,
    },
}

impl Tensor {
    /// The tensor that `proto` describes; `external` are its bytes where it keeps them in another file.
    ///
    /// # Errors
    ///
    /// When its type is unknown, its shape impossible, or its data too short or too long for the shape.
    pub fn carried(proto: TensorProto, external: Option<Bytes>) -> Result<Self, TensorError> {
        let number = proto.data_type.unwrap_or_default();
        let dtype = DType::try_from(number)
            .ok()
            .filter(|dtype| *dtype != DType::Undefined)
            .ok_or(TensorError::DType(number))?;
        let impossible = || TensorError::Dims(proto.dims.clone());
        let dims = proto.dims.iter().map(|&d| usize::try_from(d).ok()).collect::<Option<Vec<_>>>();
        let dims = dims.ok_or_else(impossible)?;
        let count = count(&dims).ok_or_else(impossible)?;
        let (wanted, found, unit) = match external.as_ref().or(proto.raw_data.as_ref()) {
            Some(raw) if dtype != DType::String => (packed_len(dtype, count), raw.len(), "bytes"),
            _ => {
                let (per_element, found) = typed_len(&proto, dtype);
                (per_element * typed_count(dtype, count), found, "elements")
            }
        };
        if wanted != found {
            return Err(TensorError::Length { dims, dtype, wanted, found, unit });
        }
        Ok(Self { dtype, dims, data: Data::Carried { proto: Arc::new(proto), external } })
    }

    /// A tensor of little-endian `bytes` computed by a pass; their length fits `dims`.
    #[must_use]
    pub fn made(dtype: DType, dims: &[usize], bytes: Bytes) -> Self {
        debug_assert_eq!(packed_len(dtype, dims.iter().product()), bytes.len());
        Self { dtype, dims: dims.to_vec(), data: Data::Made(bytes) }
    }

    /// A tensor of `FLOAT`.
    #[must_use]
    pub fn f32(dims: &[usize], values: &[f32]) -> Self {
        Self::made(DType::Float, dims, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    /// A tensor of `INT64`.
    #[must_use]
    pub fn i64(dims: &[usize], values: &[i64]) -> Self {
        Self::made(DType::Int64, dims, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    /// Whether its elements are floating-point numbers, none of which is NaN or infinite.
    #[must_use]
    pub fn is_finite(&self) -> bool {
        match self.dtype {
            DType::Float => {
                let bytes = self.bytes();
                bytes.chunks_exact(4).all(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).is_finite())
            }
            _ => self.f64s().is_some_and(|values| values.iter().all(|v| v.is_finite())),
        }
    }

    /// A tensor of the integer type `dtype` of at least eight bits, or of booleans; `None` for other types, and where a
    /// value does not fit or there are more or fewer than elements.
    #[must_use]
    pub fn integers(dtype: DType, dims: &[usize], values: &[i64]) -> Option<Self> {
        (values.len() == dims.iter().product::<usize>()).then_some(())?;
        macro_rules! packed {
            ($t:ty) => {
                values.iter().map(|&v| <$t>::try_from(v).ok()).collect::<Option<Vec<$t>>>()?
            };
        }
        let bytes = match dtype {
            DType::Int64 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::Int32 => packed!(i32).iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::Int16 => packed!(i16).iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::Int8 => packed!(i8).iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::Uint64 => packed!(u64).iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::Uint32 => packed!(u32).iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::Uint16 => packed!(u16).iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::Uint8 => packed!(u8).into(),
            DType::Bool => values.iter().map(|&v| u8::from(v != 0)).collect(),
            _ => return None,
        };
        Some(Self::made(dtype, dims, bytes))
    }

    /// A tensor of the floating-point type `dtype`, each value rounded to it; `None` for other types, and where there are more or fewer
    /// values than elements.
    #[must_use]
    pub fn floats(dtype: DType, dims: &[usize], values: &[f64]) -> Option<Self> {
        (values.len() == dims.iter().product::<usize>()).then_some(())?;
        let bytes = match dtype {
            DType::Float => packed(values, |v| (v as f32).to_le_bytes()),
            DType::Double => packed(values, f64::to_le_bytes),
            DType::Float16 => packed(values, |v| f16::from_f64(v).to_le_bytes()),
            DType::Bfloat16 => packed(values, |v| bf16::from_f64(v).to_le_bytes()),
            _ => return None,
        };
        Some(Self::made(dtype, dims, bytes))
    }

    /// The element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The shape.
    #[must_use]
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// How many elements there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many bytes the elements take, packed.
    #[must_use]
    pub fn byte_len(&self) -> usize {
        match self.strings() {
            Some(strings) => strings.iter().map(Bytes::len).sum(),
            None => packed_len(self.dtype, self.len()),
        }
    }

    /// How many bytes the elements take where they are kept: typed data is packed otherwise than raw.
    #[must_use]
    pub fn stored_len(&self) -> usize {
        match &self.data {
            Data::Carried { proto, external: None } if proto.raw_data.is_none() => {
                let text = proto.name().len() + proto.doc_string().len();
                prost::Message::encoded_len(proto.as_ref()).saturating_sub(text)
            }
            _ => self.byte_len(),
        }
    }

    /// Whether a pass computed the elements (they are not those of a file).
    #[must_use]
    pub fn is_made(&self) -> bool {
        matches!(self.data, Data::Made(_))
    }

    /// The elements as packed little-endian bytes; empty for strings.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        match &self.data {
            Data::Made(bytes) => bytes.clone(),
            Data::Carried { external: Some(bytes), .. } => bytes.clone(),
            Data::Carried { proto, .. } => match &proto.raw_data {
                Some(raw) => raw.clone(),
                None => typed_bytes(proto, self.dtype),
            },
        }
    }

    /// The elements of a tensor of strings.
    #[must_use]
    pub fn strings(&self) -> Option<&[Bytes]> {
        match &self.data {
            Data::Carried { proto, .. } if self.dtype == DType::String => Some(&proto.string_data),
            _ => None,
        }
    }

    /// The elements as `f32`, if they are of a floating-point type.
    #[must_use]
    pub fn f32s(&self) -> Option<Vec<f32>> {
        let bytes = self.bytes();
        Some(match self.dtype {
            DType::Float => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            _ => self.f64s().filter(|_| is_float(self.dtype))?.into_iter().map(|v| v as f32).collect(),
        })
    }

    /// The elements as `f64`, if they are of a floating-point type.
    #[must_use]
    pub fn f64s(&self) -> Option<Vec<f64>> {
        let bytes = self.bytes();
        Some(match self.dtype {
            DType::Float => {
                bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect()
            }
            DType::Double => bytes.chunks_exact(8).map(|b| f64::from_le_bytes(array(b))).collect(),
            DType::Float16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f64()).collect(),
            DType::Bfloat16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f64()).collect(),
            _ => return None,
        })
    }

    /// Some elements as `f64`, by their places in row-major order, if they are of 32 or 64 bits and all there.
    #[must_use]
    pub fn floats_at(&self, places: impl Iterator<Item = usize>) -> Option<Vec<f64>> {
        let bytes = self.bytes();
        match self.dtype {
            DType::Float => {
                places.map(|at| Some(f64::from(f32::from_le_bytes(array(bytes.get(at * 4..at * 4 + 4)?))))).collect()
            }
            DType::Double => places.map(|at| Some(f64::from_le_bytes(array(bytes.get(at * 8..at * 8 + 8)?)))).collect(),
            _ => None,
        }
    }

    /// The elements as `i64`, if they are integers of at least eight bits or booleans and all fit.
    #[must_use]
    pub fn i64s(&self) -> Option<Vec<i64>> {
        let bytes = self.bytes();
        Some(match self.dtype {
            DType::Int64 => bytes.chunks_exact(8).map(|b| i64::from_le_bytes(array(b))).collect(),
            DType::Int32 => {
                bytes.chunks_exact(4).map(|b| i64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect()
            }
            DType::Int16 => bytes.chunks_exact(2).map(|b| i64::from(i16::from_le_bytes([b[0], b[1]]))).collect(),
            DType::Int8 => bytes.iter().map(|&b| i64::from(b as i8)).collect(),
            DType::Uint8 | DType::Bool => bytes.iter().map(|&b| i64::from(b)).collect(),
            DType::Uint16 => bytes.chunks_exact(2).map(|b| i64::from(u16::from_le_bytes([b[0], b[1]]))).collect(),
            DType::Uint32 => {
                bytes.chunks_exact(4).map(|b| i64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect()
            }
            DType::Uint64 => {
                let fits = |b: &[u8]| i64::try_from(u64::from_le_bytes(array(b))).ok();
                bytes.chunks_exact(8).map(fits).collect::<Option<_>>()?
            }
            _ => return None,
        })
    }

    /// The elements of a tensor of integers of eight, four or two bits.
    #[must_use]
    pub fn codes(&self) -> Option<Vec<i64>> {
        let (bits, is_signed) = match self.dtype {
            DType::Int8 | DType::Uint8 => return self.i64s(),
            DType::Int4 => (4, true),
            DType::Uint4 => (4, false),
            DType::Int2 => (2, true),
            DType::Uint2 => (2, false),
            _ => return None,
        };
        let (each, held) = (8 / bits, self.bytes());
        let code = |place: usize| {
            let code = i64::from(held[place / each] >> (place % each * bits)) & ((1 << bits) - 1);
            if is_signed && code >> (bits - 1) == 1 { code - (1 << bits) } else { code }
        };
        Some((0..self.len()).map(code).collect())
    }

    /// The same elements in another shape of as many elements.
    #[must_use]
    pub fn reshape(&self, dims: &[usize]) -> Option<Self> {
        if dims.iter().product::<usize>() != self.len() || self.dtype == DType::String {
            return None;
        }
        Some(Self::made(self.dtype, dims, self.bytes()))
    }

    /// The slices `indices` along `axis`, in that order; `None` for types of less than a byte, or an index out of range.
    #[must_use]
    pub fn select(&self, axis: usize, indices: &[usize]) -> Option<Self> {
        let size = self.element_size()?;
        let extent = *self.dims.get(axis)?;
        if indices.iter().any(|&i| i >= extent) {
            return None;
        }
        let inner = self.dims[axis + 1..].iter().product::<usize>() * size;
        let outer: usize = self.dims[..axis].iter().product();
        let source = self.bytes();
        let mut bytes = Vec::with_capacity(outer * indices.len() * inner);
        for o in 0..outer {
            for &i in indices {
                bytes.extend_from_slice(&source[(o * extent + i) * inner..][..inner]);
            }
        }
        let mut dims = self.dims.clone();
        dims[axis] = indices.len();
        Some(Self::made(self.dtype, &dims, bytes.into()))
    }

    /// Axis `k` of the result is axis `perm[k]` of this; `None` for types of less than a byte, or no permutation.
    #[must_use]
    pub fn permute(&self, perm: &[usize]) -> Option<Self> {
        let size = self.element_size()?;
        let mut sorted = perm.to_vec();
        sorted.sort_unstable();
        if !sorted.iter().copied().eq(0..self.dims.len()) {
            return None;
        }
        let strides = strides(&self.dims);
        let dims: Vec<_> = perm.iter().map(|&p| self.dims[p]).collect();
        let strides: Vec<_> = perm.iter().map(|&p| strides[p]).collect();
        let source = self.bytes();
        let mut bytes = Vec::with_capacity(source.len());
        for offset in offsets(&dims, &strides) {
            bytes.extend_from_slice(&source[offset * size..][..size]);
        }
        Some(Self::made(self.dtype, &dims, bytes.into()))
    }

    /// Bytes of one element; `None` for strings and for types of less than a byte.
    #[must_use]
    pub fn element_size(&self) -> Option<usize> {
        let bits = bits(self.dtype);
        (bits >= 8).then_some(bits / 8)
    }

    /// The message that describes this tensor, with its data inside or where the file had it.
    #[must_use]
    pub fn to_proto(&self) -> TensorProto {
        match &self.data {
            Data::Carried { proto, .. } => TensorProto::clone(proto),
            Data::Made(bytes) => TensorProto {
                dims: self.dims.iter().map(|&d| d as i64).collect(),
                data_type: Some(self.dtype as i32),
                raw_data: Some(bytes.clone()),
                ..TensorProto::default()
            },
        }
    }

    /// Whether the file kept the elements in another file.
    #[must_use]
    pub fn is_external(&self) -> bool {
        matches!(&self.data, Data::Carried { proto, .. } if proto.data_location == Some(DataLocation::External as i32))
    }

    /// Whether both hold the same type, shape and bits.
    #[must_use]
    pub fn same(&self, other: &Self) -> bool {
        self.dtype == other.dtype
            && self.dims == other.dims
            && match (self.strings(), other.strings()) {
                (Some(a), Some(b)) => a == b,
                (None, None) => {
                    let (a, b) = (self.bytes(), other.bytes());
                    (a.as_ptr(), a.len()) == (b.as_ptr(), b.len()) || a == b
                }
                _ => false,
            }
    }

    /// A hash of type, shape and bits, the same on every machine.
    #[must_use]
    pub fn hash(&self) -> u64 {
        self.hash_of(xxh3_64)
    }

    /// A hash of type, shape and some of the bits, by which large tensors that differ are quickly told apart.
    #[must_use]
    pub fn sketch(&self) -> u64 {
        const PIECES: usize = 16;
        const PIECE: usize = 64;
        self.hash_of(|bytes| {
            if bytes.len() <= PIECES * PIECE {
                return xxh3_64(bytes);
            }
            let step = (bytes.len() - PIECE) / (PIECES - 1);
            let pieces = (0..PIECES).map(|i| xxh3_64(&bytes[i * step..][..PIECE]));
            xxh3_64(&pieces.flat_map(u64::to_le_bytes).collect::<Vec<_>>())
        })
    }

    fn hash_of(&self, hash: impl Fn(&[u8]) -> u64) -> u64 {
        let mut key = vec![self.dtype as u64];
        key.extend(self.dims.iter().map(|&d| d as u64));
        match self.strings() {
            Some(strings) => key.extend(strings.iter().map(|s| hash(s))),
            None => key.push(hash(&self.bytes())),
        }
        xxh3_64(&key.iter().flat_map(|k| k.to_le_bytes()).collect::<Vec<_>>())
    }
}

/// How many elements a tensor of this shape has; `None` where that is absurd.
fn count(dims: &[usize]) -> Option<usize> {
    dims.iter().try_fold(1_usize, |n, &d| n.checked_mul(d).filter(|&n| n <= MAX_ELEMENTS))
}

/// Whether a file may hold a tensor of this shape.
#[must_use]
pub fn is_possible(dims: &[usize]) -> bool {
    count(dims).is_some()
}

/// Elements each step along an axis skips, row-major.
#[must_use]
pub fn strides(dims: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; dims.len()];
    for axis in (1..dims.len()).rev() {
        strides[axis - 1] = strides[axis] * dims[axis];
    }
    strides
}

/// The offsets visited by walking `dims` in row-major order with `strides`.
pub fn offsets(dims: &[usize], strides: &[usize]) -> impl Iterator<Item = usize> + use<> {
    let total: usize = dims.iter().product();
    let (dims, strides) = (dims.to_vec(), strides.to_vec());
    let mut index = vec![0_usize; dims.len()];
    let mut offset = 0_usize;
    Range { start: 0, end: total }.map(move |_| {
        let here = offset;
        for axis in (0..dims.len()).rev() {
            index[axis] += 1;
            offset += strides[axis];
            if index[axis] < dims[axis] {
                break;
            }
            offset -= strides[axis] * dims[axis];
            index[axis] = 0;
        }
        here
    })
}
