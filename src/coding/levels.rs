//! The values that codes stand for.

use crate::ir::{DType, Storage, Tensor};

/// What codes of each tile stand for.
pub(super) enum Levels {
    /// s·(q − z).
    Uniform { scales: Vec<f64>, zeros: Option<Vec<f64>>, signed: bool, range: (f64, f64) },
    /// Entries of tables, one after the other; `order` are the codes of each by what they stand for, which is `sorted`.
    Tables { tables: Vec<f64>, entries: usize, order: Vec<u8>, sorted: Vec<f64> },
}

/// The least and the greatest signed code of so many bits. Those of seven and eight bits are as far from zero on both sides, as kernels of
/// integers want them; with fewer, no code is given away.
pub(super) fn range(bits: u32) -> (f64, f64) {
    let half = f64::from(1_u32 << (bits - 1));
    (if bits >= 7 { 1.0 - half } else { -half }, half - 1.0)
}

/// The greatest code without a sign of so many bits.
pub(super) fn top(bits: u32) -> f64 {
    f64::from((1_u32 << bits) - 1)
}

/// The integer from `low` to `high` that is nearest to `value`, the even one of two.
#[inline]
pub(super) fn whole(value: f64, low: f64, high: f64) -> f64 {
    /// Beside it, numbers are integers; an instruction that rounds is not there on every machine.
    const INTEGERS: f64 = 6_755_399_441_055_744.0;
    value.clamp(low, high) + INTEGERS - INTEGERS
}

/// How many of `sorted` are less than `value`. Few are counted, which takes no branches.
#[inline]
fn below(sorted: &[f64], value: f64) -> usize {
    const FEW: usize = 32;
    if sorted.len() > FEW {
        return sorted.partition_point(|&level| level < value);
    }
    sorted.iter().map(|&level| usize::from(level < value)).sum()
}

impl Levels {
    pub(super) fn uniform(scales: Vec<f64>, zeros: Option<Vec<f64>>, signed: bool, range: (f64, f64)) -> Self {
        Self::Uniform { scales, zeros, signed, range }
    }

    pub(super) fn tables(tables: &[f64], entries: usize) -> Self {
        let sorted = |table: &[f64]| {
            let mut order: Vec<u8> = (0..entries).map(|code| code as u8).collect();
            order.sort_by(|&a, &b| table[usize::from(a)].total_cmp(&table[usize::from(b)]));
            order
        };
        let order: Vec<u8> = tables.chunks(entries.max(1)).flat_map(sorted).collect();
        let value = |(i, &code): (usize, &u8)| tables[i / entries * entries + usize::from(code)];
        let sorted = order.iter().enumerate().map(value).collect();
        Self::Tables { tables: tables.to_vec(), entries, order, sorted }
    }

    /// Those of a weight, if it is made of codes.
    pub(super) fn of(storage: &Storage) -> Option<Self> {
        match storage {
            Storage::Dense | Storage::Half | Storage::Vectors(_) => None,
            Storage::Affine(affine) => {
                let zeros = affine.zeros().and_then(Tensor::i64s);
                let zeros = zeros.map(|zeros| zeros.into_iter().map(|zero| zero as f64).collect());
                let bits = affine.codes().bits();
                let range = if affine.is_signed() { range(bits) } else { (0.0, top(bits)) };
                Some(Self::uniform(affine.scales().f64s()?, zeros, affine.is_signed(), range))
            }
            Storage::Codebook(codebook) => Some(Self::tables(&codebook.tables().f64s()?, codebook.entries())),
        }
    }

    /// The same as elements of type `dtype`.
    pub(super) fn rounded(&self, dtype: DType) -> Option<Self> {
        let rounded = |values: &[f64]| Tensor::floats(dtype, &[values.len()], values)?.f64s();
        Some(match self {
            Self::Uniform { scales, zeros, signed, range } => {
                Self::uniform(rounded(scales)?, zeros.clone(), *signed, *range)
            }
            Self::Tables { tables, entries, .. } => Self::tables(&rounded(tables)?, *entries),
        })
    }

    /// The code of a tile that stands for what is nearest to `value`, and what that is.
    pub(super) fn nearest(&self, tile: usize, value: f64) -> (u8, f64) {
        match self {
            Self::Uniform { scales, zeros, range: (low, high), .. } => {
                let (scale, zero) = (scales[tile], zeros.as_ref().map_or(0.0, |zeros| zeros[tile]));
                let code = value / scale;
                // Where the scale is zero, all that it stands for is.
                let code = if code.is_finite() { whole(code, low - zero, high - zero) + zero } else { zero };
                (code as i32 as u8, scale * (code - zero))
            }
            Self::Tables { entries, order, sorted, .. } => {
                let (order, sorted) = (&order[tile * entries..][..*entries], &sorted[tile * entries..][..*entries]);
                let mut place = below(sorted, value).min(entries - 1);
                if place > 0 && (value - sorted[place - 1]).abs() <= (sorted[place] - value).abs() {
                    place -= 1;
                }
                (order[place], sorted[place])
            }
        }
    }

    /// What a code of a tile stands for.
    pub(super) fn value(&self, tile: usize, code: u8) -> f64 {
        match self {
            Self::Uniform { scales, zeros, signed, .. } => {
                let code = if *signed { f64::from(code as i8) } else { f64::from(code) };
                scales[tile] * (code - zeros.as_ref().map_or(0.0, |zeros| zeros[tile]))
            }
            Self::Tables { tables, entries, .. } => tables[tile * entries + usize::from(code)],
        }
    }
}
