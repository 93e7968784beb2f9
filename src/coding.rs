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

/// What codes stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scheme {
    /// Whole multiples of a scale, positive and negative.
    Uniform,
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
    let mut tiles: Vec<Vec<(f64, f64)>> = vec![Vec::with_capacity(values.len() / count.max(1)); count];
    for (i, (&value, tile)) in values.iter().zip(places.tiles()).enumerate() {
        tiles[tile].push((value, importance.map_or(1.0, |importance| importance[i])));
    }
    let levels = match scheme {
        Scheme::Uniform => {
            let (low, high) = levels::range(bits);
            let scales: Vec<f64> = tiles.par_iter().map(|tile| scale::search(tile, low, high)).collect();
            Levels::uniform(scales, None, true, (low, high))
        }
        Scheme::Table => {
            let entries = 1 << bits;
            let tables: Vec<Vec<f64>> = tiles.par_iter().map(|tile| means::table(tile, entries)).collect();
            Levels::tables(&tables.concat(), entries)
        }
    };
    drop(tiles);
    let levels = levels.rounded(dtype)?;
    let codes: Vec<u8> =
        values.iter().zip(places.tiles()).map(|(&value, tile)| levels.nearest(tile, value).0).collect();
    levels.store(Codes::new(dims, bits, tile, codes.into())?, dtype)
}

/// `value` in the form of `storage`, or in one as like it as another shape allows, each element by the nearest.
#[must_use]
pub(crate) fn like(storage: &Storage, value: &Tensor) -> Option<Weight> {
    let (scheme, codes) = match storage {
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
        Storage::Affine(affine) => (Scheme::Uniform, affine.codes()),
        Storage::Codebook(codebook) => (Scheme::Table, codebook.codes()),
    };
    let tile = codes.tile_for(value.dims());
    let like = nearest((scheme, codes.bits()), (value.dtype(), value.dims(), &tile), &value.f64s()?, None)?;
    Weight::stored(like.multiplied_like(storage))
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
    let form = (Scheme::of(template.storage())?, codes.bits(), codes.tile());
    let fitted = fit((&Plane::new(dims, Some(linear)), form), (dtype, dims), &values, metrics)?;
    Weight::stored(fitted.multiplied_like(template.storage()))
}

/// The form of a weight of few different values, if there is one that takes fewer bytes: a table of them all.
#[must_use]
pub fn exact_table(value: &Tensor) -> Option<Weight> {
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
    let bits = WIDTHS.into_iter().find(|&bits| entries.len() <= 1 << bits)?;
    let table: Bytes = entries.concat().into();
    let dims = vec![1; value.dims().len()].into_iter().chain([entries.len()]).collect::<Vec<_>>();
    let codes = Codes::new(value.dims(), bits, value.dims(), codes.into())?;
    Weight::stored(Storage::Codebook(Codebook::new(codes, Tensor::made(value.dtype(), &dims, table))?))
}

/// Bits that codes may have.
pub const WIDTHS: [u32; 5] = [1, 2, 3, 4, 8];

impl Scheme {
    fn of(storage: &Storage) -> Option<Self> {
        match storage {
            Storage::Dense | Storage::Half | Storage::Vectors(_) => None,
            Storage::Affine(_) => Some(Self::Uniform),
            Storage::Codebook(_) => Some(Self::Table),
        }
    }
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
