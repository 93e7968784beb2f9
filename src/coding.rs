//! Coding weights: integers of few bits whose scales or tables keep closest to what the layers make of what they read. All errors
//! are in the metric of E‖Δy‖² = tr(ΔW·C·ΔWᵀ), C the covariance of what is read.

mod levels;
mod means;
mod plane;
mod scale;
mod sweep;
mod vectors;

use bytes::Bytes;
use nalgebra::DMatrix;
use rayon::prelude::*;

use self::levels::Levels;
pub use self::{
    plane::{Plane, Tiling},
    sweep::fit,
    vectors::fit_vectors,
};
use crate::{
    analysis::linear::Linear,
    factor::Metric,
    ir::{Affine, Codebook, Codes, DType, Storage, Tensor, Weight},
};

/// Rows that one task codes.
const ROWS: usize = 128;
/// What is added to the covariance for GPTQ, as a share of the mean of its diagonal (algorithms.md §6.3).
const DAMPING: f64 = 0.01;

/// What codes stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scheme {
    /// Whole multiples of a scale, positive and negative.
    Symmetric,
    /// Whole multiples of a scale, of which a zero point tells how many are negative: the best for each tile, or this one for all.
    Asymmetric(Option<u8>),
    /// Entries of a table.
    Table,
}

/// How many bits codes have, what they stand for, and what tiles of a weight share that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Form {
    /// What they stand for.
    pub scheme: Scheme,
    /// Bits of each code.
    pub bits: u32,
    /// What shares a scale or a table.
    pub tiling: Tiling,
}

/// `values`, of a weight of shape `dims` and type `dtype`, as codes of so many bits for tiles of the extents of `tile`, each value by
/// the nearest; what they stand for is chosen for the least sum of squares, each weighed by its `importance`, equal without any.
/// `None` where a value is not finite.
#[must_use]
pub fn nearest(
    (scheme, bits): (Scheme, u32),
    (dtype, dims, tile): (DType, &[usize], &[usize]),
    values: &[f64],
    importance: Option<&[f64]>,
) -> Option<Storage> {
    values.iter().all(|value| value.is_finite()).then_some(())?;
    let places = Codes::new(dims, 8, tile, vec![0; values.len()].into())?;
    let grid = places.grid();
    let count = grid.iter().product::<usize>();
    let places: Vec<usize> = places.tiles().collect();
    let mut tiles: Vec<Vec<(f64, f64)>> = vec![Vec::with_capacity(values.len() / count.max(1)); count];
    for (i, (&value, &tile)) in values.iter().zip(&places).enumerate() {
        tiles[tile].push((value, importance.map_or(1.0, |importance| importance[i])));
    }
    let levels = match scheme {
        Scheme::Symmetric => {
            let (low, high) = levels::range(bits);
            let scales: Vec<f64> = tiles.par_iter().map(|tile| scale::search(tile, low, high)).collect();
            Levels::uniform(scales, None, true, (low, high))
        }
        Scheme::Asymmetric(zero) => {
            let top = levels::top(bits);
            let search = |tile: &Vec<(f64, f64)>| match zero.map(f64::from) {
                Some(zero) => (scale::search(tile, -zero, top - zero), zero),
                None => scale::search_asymmetric(tile, top),
            };
            let (scales, zeros) = tiles.par_iter().map(search).unzip();
            Levels::uniform(scales, Some(zeros), false, (0.0, top))
        }
        Scheme::Table => {
            let entries = 1 << bits;
            let tables: Vec<Vec<f64>> = tiles.par_iter().map(|tile| means::table(tile, entries)).collect();
            Levels::tables(&tables.concat(), entries)
        }
    };
    drop(tiles);
    let levels = levels.rounded(dtype)?;
    let codes: Vec<u8> = values.par_iter().zip(&places).map(|(&value, &tile)| levels.nearest(tile, value).0).collect();
    levels.store(Codes::new(dims, bits, tile, codes.into())?, dtype)
}

/// `value` in the form of `storage`, or in one as like it as another shape allows, each element by the nearest.
#[must_use]
pub(crate) fn like(storage: &Storage, value: &Tensor) -> Option<Weight> {
    let codes = match storage {
        Storage::Dense => return Some(Weight::dense(value.clone())),
        Storage::Half => {
            let halves = Tensor::floats(DType::Float16, value.dims(), &value.f64s()?)?;
            return Weight::half(Tensor::floats(value.dtype(), value.dims(), &halves.f64s()?)?);
        }
        Storage::Vectors(vectors) => {
            let form = (vectors.codes().bits(), vectors.width());
            let plane = Plane::new(value.dims(), None);
            return Weight::stored(fit_vectors((&plane, form), (value.dtype(), value.dims()), &value.f64s()?, &[])?);
        }
        Storage::Affine(affine) => affine.codes(),
        Storage::Codebook(codebook) => codebook.codes(),
    };
    let tile = codes.tile_for(value.dims());
    let like = nearest(Scheme::of(storage)?, (value.dtype(), value.dims(), &tile), &value.f64s()?, None)?;
    Weight::stored(like.like(storage))
}

/// `matrices` as the weight of `linear`, stored as `template` is, as close to it as can be in `metrics`; `None` where it is beyond what the
/// type holds.
pub(crate) fn fit_like(
    template: &Weight,
    linear: &Linear,
    matrices: &[DMatrix<f64>],
    metrics: &[Metric],
) -> Option<Weight> {
    let (dtype, dims) = (template.value().dtype(), template.value().dims());
    let values = linear.elements(matrices);
    if let Storage::Vectors(vectors) = template.storage() {
        let form = (vectors.codes().bits(), vectors.width());
        return Weight::stored(fit_vectors((&Plane::new(dims, Some(linear)), form), (dtype, dims), &values, metrics)?);
    }
    let Some(codes) = template.storage().codes() else { return template.fit(dims, &values) };
    let (scheme, bits) = Scheme::of(template.storage())?;
    let form = (scheme, bits, codes.tile());
    let fitted = fit((&Plane::new(dims, Some(linear)), form), (dtype, dims), &values, metrics)?;
    Weight::stored(fitted.like(template.storage()))
}

/// A table of all values of a weight that has at most 256 different ones, and indices of the fewest bits, or of eight.
#[must_use]
pub fn exact_table(value: &Tensor, is_packed: bool) -> Option<Weight> {
    let size = value.element_size()?;
    let bytes = value.bytes();
    let mut entries: Vec<&[u8]> = Vec::new();
    let mut known: std::collections::BTreeMap<&[u8], u8> = std::collections::BTreeMap::new();
    let mut codes = Vec::with_capacity(value.len());
    for element in bytes.chunks_exact(size) {
        if let Some(&code) = known.get(element) {
            codes.push(code);
            continue;
        }
        let code = u8::try_from(entries.len()).ok()?;
        known.insert(element, code);
        entries.push(element);
        codes.push(code);
    }
    let bits = WIDTHS.into_iter().find(|&bits| entries.len() <= 1 << bits && (is_packed || bits == 8))?;
    let table: Bytes = entries.concat().into();
    let dims = vec![1; value.dims().len()].into_iter().chain([entries.len()]).collect::<Vec<_>>();
    let codes = Codes::new(value.dims(), bits, value.dims(), codes.into())?;
    Weight::stored(Storage::Codebook(Codebook::new(codes, Tensor::made(value.dtype(), &dims, table))?))
}

/// Bits that codes may have.
pub const WIDTHS: [u32; 5] = [1, 2, 3, 4, 8];

impl Scheme {
    /// The scheme and the bits of codes like those of `storage`, if it has any for each element.
    fn of(storage: &Storage) -> Option<(Self, u32)> {
        match storage {
            Storage::Dense | Storage::Half | Storage::Vectors(_) => None,
            Storage::Affine(affine) => Some(of_affine(affine)),
            Storage::Codebook(codebook) => Some((Self::Table, codebook.codes().bits())),
        }
    }
}

/// The scheme and the bits of codes like those of `affine`: with zero points where these are not in the middle, one for all tiles where they
/// are alike, as kernels may ask for it; and in seven bits where half of the range of eight is used, in which kernels add two products
/// without overflow.
fn of_affine(affine: &Affine) -> (Scheme, u32) {
    let bits = affine.codes().bits();
    let lowest = if affine.is_signed() { -(1_i64 << (bits - 1)) } else { 0 };
    let middle = lowest + (1 << (bits - 1));
    let zeros = affine.zeros().and_then(Tensor::i64s).unwrap_or_else(|| vec![0]);
    let is_symmetric = zeros.iter().all(|zero| *zero == middle);
    let code = |&byte: &u8| if affine.is_signed() { i64::from(byte as i8) } else { i64::from(byte) };
    let half = if is_symmetric || affine.is_signed() { middle - 64..=middle + 64 } else { 0..=127 };
    let is_reduced = bits == 8 && affine.codes().bytes().iter().all(|byte| half.contains(&code(byte)));
    let bits = if is_reduced { 7 } else { bits };
    if is_symmetric {
        return (Scheme::Symmetric, bits);
    }
    let alike = affine.scales().len() > 1 && zeros.iter().all(|zero| *zero == zeros[0]);
    // In seven bits, signed codes begin at half of what they do in eight.
    let lowest = if is_reduced { lowest / 2 } else { lowest };
    let zero = u8::try_from(zeros[0] - lowest).ok().filter(|zero| alike && f64::from(*zero) <= levels::top(bits));
    (Scheme::Asymmetric(zero), bits)
}

impl Levels {
    /// The storage of `codes` that stand for these levels.
    fn store(&self, codes: Codes, dtype: DType) -> Option<Storage> {
        let grid = codes.grid();
        Some(match self {
            Self::Uniform { scales, zeros, signed, .. } => {
                let zeros = zeros.as_ref().map(|zeros| {
                    let zeros: Vec<_> = zeros.iter().map(|&zero| zero as i64).collect();
                    Tensor::integers(DType::Int32, &grid, &zeros)
                });
                let scales = Tensor::floats(dtype, &grid, scales)?;
                Storage::Affine(Affine::new(codes, *signed, scales, zeros.flatten())?)
            }
            Self::Tables { tables, entries, .. } => {
                let dims: Vec<_> = grid.into_iter().chain([*entries]).collect();
                Storage::Codebook(Codebook::new(codes, Tensor::floats(dtype, &dims, tables)?)?)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use rand_core::SeedableRng;
    use rand_xoshiro::Xoshiro256PlusPlus;

    use super::*;
    use crate::linalg::{by_rows, energy, normal};

    /// A matrix of noise.
    fn noise(rows: usize, columns: usize, seed: u64) -> DMatrix<f64> {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
        DMatrix::from_fn(rows, columns, |_, _| normal(&mut random))
    }

    /// The covariance of elements that vary together, and by different amounts.
    fn covariance(size: usize) -> DMatrix<f64> {
        let mut mixed = noise(size, size / 3, 3);
        mixed.row_iter_mut().enumerate().for_each(|(i, mut row)| row *= 1.0 + i as f64 / size as f64);
        &mixed * mixed.transpose() + DMatrix::identity(size, size)
    }

    fn lost(weight: &DMatrix<f64>, storage: &Storage, covariance: &DMatrix<f64>) -> f64 {
        let stored = Weight::stored(storage.clone()).unwrap().value().f64s().unwrap();
        energy(&(weight - DMatrix::from_row_slice(weight.nrows(), weight.ncols(), &stored)), covariance)
    }

    const DIMS: [usize; 2] = [24, 48];

    #[test]
    fn codes_in_a_metric_lose_less_of_it_than_the_nearest() {
        let (weight, spread) = (noise(24, 48, 1), covariance(48));
        let (values, plane) = (by_rows(&weight), Plane::new(&DIMS, None));
        for scheme in [Scheme::Symmetric, Scheme::Asymmetric(None), Scheme::Table] {
            for bits in [2, 4] {
                for tiling in [Tiling::Tensor, Tiling::Rows, Tiling::Blocks(24)] {
                    let tile = match tiling {
                        Tiling::Blocks(size) => vec![1, size],
                        tiling => plane.tile(tiling).unwrap(),
                    };
                    let of = (DType::Float, &DIMS[..]);
                    let plain = nearest((scheme, bits), (DType::Float, &DIMS, &tile), &values, None).unwrap();
                    let form = (scheme, bits, &tile[..]);
                    let fitted = fit((&plane, form), of, &values, &[Metric::Full(spread.clone())]).unwrap();
                    let (before, after) = (lost(&weight, &plain, &spread), lost(&weight, &fitted, &spread));
                    assert!(after < before * 0.8, "{scheme:?} {bits} {tiling:?}: {after} of {before}");
                    let alike = fit((&plane, form), of, &values, &[Metric::Identity]).unwrap();
                    assert_eq!(alike.codes().unwrap().bytes(), plain.codes().unwrap().bytes());
                }
            }
        }
    }

    /// Codes of some template, to which other values are fitted.
    fn template(bits: u32, is_signed: bool, zero: i64, codes: impl Fn(usize) -> i64) -> Storage {
        let bytes: Vec<u8> = (0..24 * 48).map(|i| codes(i) as u8).collect();
        let codes = Codes::new(&DIMS, bits, &DIMS, bytes.into()).unwrap();
        let scales = Tensor::floats(DType::Float, &[1, 1], &[0.1]).unwrap();
        let zeros = Tensor::integers(DType::Int32, &[1, 1], &[zero]);
        Storage::Affine(Affine::new(codes, is_signed, scales, zeros).unwrap())
    }

    #[test]
    fn what_is_fitted_is_kept_as_the_template_is() {
        let weight = noise(24, 48, 1);
        let off = |template: &Storage, values: &[f64]| {
            let value = Tensor::floats(DType::Float, &DIMS, values).unwrap();
            let fitted = like(template, &value).unwrap();
            let stored = fitted.value().f64s().unwrap();
            let lost: f64 = stored.iter().zip(values).map(|(a, b)| (a - b).powi(2)).sum();
            let Storage::Affine(affine) = fitted.storage().clone() else { panic!("no integers") };
            (affine, lost / values.iter().map(|value| value * value).sum::<f64>())
        };
        let values = by_rows(&weight);
        let uneven: Vec<f64> = values.iter().map(|value| value.abs() + 0.2 * value).collect();
        // One that is not in the middle is worth a bit where values are of one sign.
        for (bits, is_signed) in [(4, false), (8, false), (8, true)] {
            let zero = if is_signed { -100 } else { 3 };
            let code = |i: usize, is_signed: bool| (i as i64 * 7) % (1 << bits) - (i64::from(is_signed) << (bits - 1));
            let (affine, shifted) = off(&template(bits, is_signed, zero, |i| code(i, is_signed)), &uneven);
            let (_, even) = off(&template(bits, true, 0, |i| code(i, true)), &uneven);
            assert!(shifted < 0.4 * even, "{bits}: {shifted} for {even}");
            assert!(affine.codes().bits() == bits && affine.is_signed() == is_signed);
        }
        // Half of the range stays half of it.
        for (is_signed, zero, middle) in [(true, 0, 0), (false, 128, 128), (false, 70, 0)] {
            let reach = |i: usize| if is_signed { i as i64 % 129 - 64 } else { zero + i as i64 % 114 - 57 };
            let (affine, lost) = off(&template(8, is_signed, zero, reach), &values);
            let far = |&byte: &u8| if is_signed { i64::from(byte as i8) - middle } else { i64::from(byte) - middle };
            let codes: Vec<i64> = affine.codes().bytes().iter().map(far).collect();
            assert!(codes.iter().all(|code| (-64..=127).contains(code)) && affine.codes().bits() == 8, "{codes:?}");
            assert!(codes.iter().max().unwrap() - codes.iter().min().unwrap() <= 128 && lost < 2e-3);
            assert_eq!(affine.is_signed(), is_signed);
        }
    }

    #[test]
    fn zero_points_that_are_alike_stay_so() {
        let values: Vec<f64> = by_rows(&noise(24, 48, 1)).iter().map(|value| value.abs()).collect();
        let value = Tensor::floats(DType::Float, &DIMS, &values).unwrap();
        for (zero, is_signed, others, kept) in
            [(0, false, 0, Some(0)), (40, false, 0, Some(40)), (-100, true, 0, Some(-100)), (40, false, 1, None)]
        {
            let lowest = if is_signed { -128 } else { 0 };
            let bytes: Vec<u8> = (0..24 * 48).map(|i| (lowest + i * 7 % 256) as u8).collect();
            let codes = Codes::new(&DIMS, 8, &[1, 48], bytes.into()).unwrap();
            let scales = Tensor::floats(DType::Float, &[24, 1], &[0.1; 24]).unwrap();
            let zeros: Vec<i64> = (0..24).map(|tile| zero + others * (tile % 2)).collect();
            let zeros = Tensor::integers(DType::Int32, &[24, 1], &zeros);
            let template = Storage::Affine(Affine::new(codes, is_signed, scales, zeros).unwrap());
            let Storage::Affine(fitted) = like(&template, &value).unwrap().storage().clone() else { panic!() };
            let zeros = fitted.zeros().and_then(Tensor::i64s).unwrap_or_else(|| vec![0]);
            let alike = zeros.iter().all(|zero| *zero == zeros[0]).then_some(zeros[0]);
            // What is best for values of one sign is the lowest for each tile.
            assert_eq!(alike, kept.or(Some(0)), "{zeros:?}");
            assert_eq!(fitted.is_signed(), is_signed);
        }
    }

    #[test]
    fn vectors_in_a_metric_lose_less_of_it_than_the_nearest() {
        let (weight, spread) = (noise(24, 48, 1), covariance(48));
        let (values, plane, metric) = (by_rows(&weight), Plane::new(&DIMS, None), [Metric::Full(spread.clone())]);
        let of = (DType::Float, &DIMS[..]);
        let vectors = fit_vectors((&plane, (4, 2)), of, &values, &metric).unwrap();
        let plain = fit_vectors((&plane, (4, 2)), of, &values, &[]).unwrap();
        assert!(lost(&weight, &vectors, &spread) < lost(&weight, &plain, &spread));
        assert!(fit_vectors((&plane, (4, 5)), of, &values, &metric).is_none());
    }

    #[test]
    fn a_weight_of_few_values_is_a_table_of_them() {
        let values: Vec<f64> = (0..300).map(|i| f64::from(i % 7) / 8.0).collect();
        let tensor = Tensor::floats(DType::Float, &[300], &values).unwrap();
        assert!(exact_table(&tensor, true).unwrap().value().same(&tensor));
        assert_eq!(exact_table(&tensor, true).unwrap().storage().codes().unwrap().bits(), 3);
        assert_eq!(exact_table(&tensor, false).unwrap().storage().codes().unwrap().bits(), 8);
        let many: Vec<f64> = (0..300).map(f64::from).collect();
        assert!(exact_table(&Tensor::floats(DType::Float, &[300], &many).unwrap(), true).is_none());
    }
}
