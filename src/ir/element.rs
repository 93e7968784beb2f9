//! How elements of each type are kept: as packed bytes, or in the fields that a message has for some types.

use bytes::Bytes;

use super::tensor::DType;
use crate::proto::TensorProto;

/// Bits of one element; 0 for strings.
#[must_use]
pub fn bits(dtype: DType) -> usize {
    match dtype {
        DType::Undefined | DType::String => 0,
        DType::Uint2 | DType::Int2 => 2,
        DType::Uint4 | DType::Int4 | DType::Float4e2m1 => 4,
        DType::Float6e2m3 | DType::Float6e3m2 => 6,
        DType::Uint8
        | DType::Int8
        | DType::Bool
        | DType::Float8e4m3fn
        | DType::Float8e4m3fnuz
        | DType::Float8e5m2
        | DType::Float8e5m2fnuz
        | DType::Float8e8m0 => 8,
        DType::Uint16 | DType::Int16 | DType::Float16 | DType::Bfloat16 => 16,
        DType::Int32 | DType::Uint32 | DType::Float => 32,
        DType::Int64 | DType::Uint64 | DType::Double | DType::Complex64 => 64,
        DType::Complex128 => 128,
    }
}

/// Whether `dtype` is one whose values [`Tensor::f32s`](super::Tensor::f32s) can give.
#[must_use]
pub fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::Float | DType::Double | DType::Float16 | DType::Bfloat16)
}

/// The bytes of `values`, each of which takes `N`; several times faster than collecting them.
pub(super) fn packed<const N: usize>(values: &[f64], bytes_of: impl Fn(f64) -> [u8; N]) -> Bytes {
    let mut bytes = vec![0; N * values.len()];
    for (bytes, &value) in bytes.chunks_exact_mut(N).zip(values) {
        bytes.copy_from_slice(&bytes_of(value));
    }
    bytes.into()
}

/// Bytes of `count` elements, those of less than a byte side by side.
pub(super) fn packed_len(dtype: DType, count: usize) -> usize {
    (count * bits(dtype)).div_ceil(8)
}

/// How many entries of the typed field hold `count` elements: sub-byte types are packed into bytes there too.
pub(super) fn typed_count(dtype: DType, count: usize) -> usize {
    if (1..8).contains(&bits(dtype)) { packed_len(dtype, count) } else { count }
}

/// Entries for each element, and entries there, of the typed field that `dtype` is kept in.
pub(super) fn typed_len(proto: &TensorProto, dtype: DType) -> (usize, usize) {
    match dtype {
        DType::Float => (1, proto.float_data.len()),
        DType::Complex64 => (2, proto.float_data.len()),
        DType::Double => (1, proto.double_data.len()),
        DType::Complex128 => (2, proto.double_data.len()),
        DType::Int64 => (1, proto.int64_data.len()),
        DType::Uint32 | DType::Uint64 => (1, proto.uint64_data.len()),
        DType::String => (1, proto.string_data.len()),
        _ => (1, proto.int32_data.len()),
    }
}

/// The elements of the typed field as packed little-endian bytes.
pub(super) fn typed_bytes(proto: &TensorProto, dtype: DType) -> Bytes {
    match dtype {
        DType::Float | DType::Complex64 => proto.float_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::Double | DType::Complex128 => proto.double_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::Int64 => proto.int64_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::Uint64 => proto.uint64_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::Uint32 => proto.uint64_data.iter().flat_map(|&v| (v as u32).to_le_bytes()).collect(),
        DType::String => Bytes::new(),
        _ => match bits(dtype) {
            32 => proto.int32_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
            16 => proto.int32_data.iter().flat_map(|&v| (v as u16).to_le_bytes()).collect(),
            _ => proto.int32_data.iter().map(|&v| v as u8).collect(),
        },
    }
}

/// `bytes` as an array; they are as long as it is.
pub(super) fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(bytes);
    array
}
