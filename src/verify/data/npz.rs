//! Samples from the files that numpy writes.

use std::{collections::BTreeMap, fs::File, io, path::Path};

use super::{DataError, Slot, spelled};
use crate::{ir::DType, verify::Value};

/// An array of the data file.
pub(super) struct Array {
    dims: Vec<usize>,
    values: Vec<f64>,
}

enum ArrayError {
    Io(io::Error),
    Data(DataError),
}

impl ArrayError {
    fn at(self, path: &Path) -> DataError {
        match self {
            Self::Io(source) => DataError::Unreadable { path: path.to_owned(), source },
            Self::Data(error) => error,
        }
    }
}

/// The arrays of the file at `path` that are named like inputs, and the names of the others.
pub(super) fn read(path: &Path, slots: &[Slot]) -> Result<(BTreeMap<String, Array>, Vec<String>), DataError> {
    let unreadable = |source| DataError::Unreadable { path: path.to_owned(), source };
    let damaged = |error| unreadable(io::Error::other(error));
    let mut archive = zip::ZipArchive::new(File::open(path).map_err(unreadable)?).map_err(damaged)?;
    let (mut arrays, mut ignored) = (BTreeMap::new(), Vec::new());
    for i in 0..archive.len() {
        let entry = archive.by_index(i).map_err(damaged)?;
        let name = entry.name().map_err(damaged)?.trim_end_matches(".npy").to_owned();
        match slots.iter().find(|slot| slot.name == name) {
            Some(slot) => _ = arrays.insert(name, array(entry, slot).map_err(|error| error.at(path))?),
            None => ignored.push(name),
        }
    }
    Ok((arrays, ignored))
}

fn array(entry: impl io::Read, slot: &Slot) -> Result<Array, ArrayError> {
    let file = npyz::NpyFile::new(entry).map_err(ArrayError::Io)?;
    let wanted = slot.fact.dtype.unwrap_or(DType::Float);
    let found = file.dtype().descr();
    let dims = file.shape().iter().map(|&d| d as usize).collect();
    let wrong = || ArrayError::Data(DataError::WrongType { name: slot.name.clone(), found: found.clone(), wanted });
    if file.order() == npyz::Order::Fortran && file.shape().len() > 1 {
        let why = format!("array `{}` is in Fortran order; save it with np.ascontiguousarray", slot.name);
        return Err(ArrayError::Io(io::Error::other(why)));
    }
    macro_rules! read {
        ($t:ty, $convert:expr) => {
            file.try_data::<$t>().map_err(|_| wrong())?.map(|v| v.map($convert)).collect::<Result<Vec<f64>, _>>()
        };
    }
    let values = match wanted {
        DType::Float => read!(f32, f64::from),
        DType::Double => read!(f64, |v| v),
        DType::Float16 => read!(half::f16, half::f16::to_f64),
        DType::Int64 => read!(i64, |v| v as f64),
        DType::Int32 => read!(i32, f64::from),
        DType::Int16 => read!(i16, f64::from),
        DType::Int8 => read!(i8, f64::from),
        DType::Uint8 => read!(u8, f64::from),
        DType::Uint16 => read!(u16, f64::from),
        DType::Bool => read!(bool, |v| f64::from(u8::from(v))),
        _ => return Err(wrong()),
    };
    Ok(Array { dims, values: values.map_err(ArrayError::Io)? })
}

/// Cuts each array into samples of its input's shape; also how many there are.
pub(super) fn cut(
    slots: &[Slot],
    arrays: BTreeMap<String, Array>,
) -> Result<(BTreeMap<String, Vec<Value>>, usize), DataError> {
    let mut cut = BTreeMap::new();
    let mut shortest = 0;
    for (name, array) in arrays {
        let Some(slot) = slots.iter().find(|slot| slot.name == name) else { continue };
        let declared = slot.fact.extents();
        let declared = declared.as_deref();
        let rank = declared.map_or(array.dims.len(), <[_]>::len);
        let (group, dims) = match array.dims.len().checked_sub(rank) {
            Some(0) if rank > 0 => {
                let batch = declared.and_then(|dims| dims[0]).unwrap_or(1).max(1);
                (batch, [&[batch], &array.dims[1..]].concat())
            }
            Some(1) => (1, array.dims[1..].to_vec()),
            _ => (0, Vec::new()),
        };
        let agrees = declared.is_none_or(|d| d.iter().zip(&dims).all(|(d, &found)| d.is_none_or(|d| d == found)));
        if group == 0 || !agrees {
            let wanted = spelled(declared.unwrap_or_default().iter().copied());
            return Err(DataError::WrongShape { name, found: array.dims, wanted });
        }
        let dtype = slot.fact.dtype.unwrap_or(DType::Float);
        let size = dims.iter().product::<usize>();
        // An axis may be of length 0, as that of an empty cache is.
        let count = array.dims.first().map_or(1, |&first| first / group);
        let value =
            |i: usize| Value { dims: dims.clone(), values: array.values[i * size..(i + 1) * size].to_vec(), dtype };
        let values: Vec<_> = (0..count).map(value).collect();
        if let Some(i) = array.values.iter().position(|value| value.is_nan()) {
            return Err(DataError::NotANumber { name, sample: i / size.max(1) });
        }
        if let Some((other, others)) =
            cut.iter().next().map(|(other, values): (&String, &Vec<_>)| (other, values.len()))
            && others != values.len()
        {
            return Err(DataError::Lengths(other.clone(), others, name, values.len()));
        }
        shortest = values.len();
        cut.insert(name, values);
    }
    Ok((cut, shortest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{analysis::shapes::Fact, text};

    #[test]
    fn an_axis_of_samples_may_be_of_length_zero() {
        let model = text::parse(
            "<ir_version: 8, opset_import: [\"\": 17]>\ng (float[1,past,4] x) => (float[1,past,4] y)\n{ y = Abs (x) }\n",
        );
        let fact = Fact::declared(&model.unwrap().graph.inputs()[0].info);
        let slot = Slot { name: "x".into(), fact, axes: vec![], batches: vec![0], compared: vec![] };
        let array = Array { dims: vec![8, 0, 4], values: vec![] };
        let (cut, count) = cut(&[slot], [("x".to_owned(), array)].into()).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(count, 8);
        assert!(cut["x"].iter().all(|value| value.dims == [1, 0, 4]));
    }
}
