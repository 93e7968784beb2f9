//! Moments in a file, so that parts that were collected on different machines add up.
//!
//! All numbers are little-endian. The file is: the 8 bytes `oshrmom1`; the hash of the model's file (u64); the number of sources
//! (u64); and for each source, in the order of their names: its name (length as u64, then UTF-8), the number of its groups
//! (u64), and for each group the size d of its vectors (u64), their number n (u64), Σx (d × f64), how often each element is
//! zero (d × f64) and the lower triangle of Σx·xᵀ by rows (d·(d+1)/2 × f64).

use nalgebra::{DMatrix, DVector};

use super::{Moments, Table};

const MAGIC: &[u8; 8] = b"oshrmom1";

/// What is wrong with a file of moments.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FileError {
    /// It is something else, or of another version.
    #[error("it holds no moments of this version; make it anew with --save-moments")]
    Foreign,
    /// It ends too early, or too late.
    #[error("it was cut short or damaged; make it anew with --save-moments")]
    Damaged,
    /// It belongs to another model.
    #[error("it was made from another model file; make it anew with --save-moments")]
    OtherModel,
    /// The files were made in different ways.
    #[error("its layers are not those of the other file; make both with the same options and version")]
    OtherLayers,
}

/// The bytes of `table`, of the model whose file has this hash.
#[must_use]
pub fn encode(table: &Table, model: u64) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    let mut number = |n: u64| bytes.extend(n.to_le_bytes());
    number(model);
    number(table.len() as u64);
    for (source, groups) in table {
        bytes.extend((source.len() as u64).to_le_bytes());
        bytes.extend(source.as_bytes());
        bytes.extend((groups.len() as u64).to_le_bytes());
        for Moments { count, sum, products, zeros } in groups {
            bytes.extend((sum.len() as u64).to_le_bytes());
            bytes.extend(count.to_le_bytes());
            let triangle = (0..sum.len()).flat_map(|i| (0..=i).map(move |j| (i, j))).map(|place| products[place]);
            let values = sum.iter().copied().chain(zeros.iter().copied()).chain(triangle);
            bytes.extend(values.flat_map(f64::to_le_bytes));
        }
    }
    bytes
}

/// The table in `bytes`, which must be of the model whose file has this hash.
///
/// # Errors
///
/// When the bytes are no such table.
pub fn decode(mut bytes: &[u8], model: u64) -> Result<Table, FileError> {
    if take(&mut bytes, MAGIC.len()).ok_or(FileError::Foreign)? != MAGIC {
        return Err(FileError::Foreign);
    }
    if number(&mut bytes).ok_or(FileError::Damaged)? != model {
        return Err(FileError::OtherModel);
    }
    sources(&mut bytes).filter(|_| bytes.is_empty()).ok_or(FileError::Damaged)
}

fn sources(bytes: &mut &[u8]) -> Option<Table> {
    let mut table = Table::new();
    for _ in 0..number(bytes)? {
        let length = usize::try_from(number(bytes)?).ok()?;
        let name = String::from_utf8(take(bytes, length)?.to_vec()).ok()?;
        let mut groups = Vec::new();
        for _ in 0..number(bytes)? {
            groups.push(group(bytes)?);
        }
        table.insert(name, groups);
    }
    Some(table)
}

fn group(bytes: &mut &[u8]) -> Option<Moments> {
    let size = usize::try_from(number(bytes)?).ok()?;
    let count = number(bytes)?;
    let mut floats = |n: usize| {
        let raw = take(bytes, n.checked_mul(8)?)?;
        Some(raw.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap_or_default())).collect::<Vec<_>>())
    };
    let (sum, zeros) = (DVector::from_vec(floats(size)?), DVector::from_vec(floats(size)?));
    let triangle = floats(size.checked_mul(size.checked_add(1)?)? / 2)?;
    let mut products = DMatrix::zeros(size, size);
    for (i, j) in (0..size).flat_map(|i| (0..=i).map(move |j| (i, j))) {
        products[(i, j)] = triangle[i * (i + 1) / 2 + j];
    }
    let all_finite = sum.iter().chain(&zeros).chain(&triangle).all(|v| v.is_finite());
    all_finite.then_some(Moments { count, sum, products, zeros })
}

/// Adds the moments of `other` to `table`.
///
/// # Errors
///
/// When they are not of the same layers.
pub fn merge(table: &mut Table, other: &Table) -> Result<(), FileError> {
    let alike = |a: &[Moments], b: &[Moments]| a.iter().map(|m| m.sum.len()).eq(b.iter().map(|m| m.sum.len()));
    if !table.keys().eq(other.keys()) || !table.values().zip(other.values()).all(|(a, b)| alike(a, b)) {
        return Err(FileError::OtherLayers);
    }
    for (own, others) in table.values_mut().zip(other.values()) {
        own.iter_mut().zip(others).for_each(|(own, other)| own.merge(other));
    }
    Ok(())
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (head, tail) = bytes.split_at_checked(count)?;
    *bytes = tail;
    Some(head)
}

fn number(bytes: &mut &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(take(bytes, 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut moments = Moments::new(3);
        moments.add(&DMatrix::from_row_slice(3, 2, &[1.0, 2.0, 0.0, 4.0, 5.0, 6.0]));
        [("x in 1 rows".to_owned(), vec![moments.clone(), moments])].into()
    }

    #[test]
    fn what_is_written_is_read_and_every_cut_is_an_error() {
        let bytes = encode(&table(), 7);
        assert_eq!(decode(&bytes, 7).unwrap(), table());
        assert_eq!(decode(&bytes, 8), Err(FileError::OtherModel));
        assert_eq!(decode(b"something else", 7), Err(FileError::Foreign));
        for cut in 8..bytes.len() {
            assert_eq!(decode(&bytes[..cut], 7), Err(FileError::Damaged), "{cut}");
        }
        assert_eq!(decode(&[&bytes[..], &[0]].concat(), 7), Err(FileError::Damaged));
    }

    #[test]
    fn parts_add_up_if_they_are_of_the_same_layers() {
        let mut sum = table();
        merge(&mut sum, &table()).unwrap();
        assert_eq!(sum["x in 1 rows"][0].count, 4);
        assert_eq!(merge(&mut sum, &Table::new()), Err(FileError::OtherLayers));
    }
}
