//! Integers of few bits that stand for the elements of a weight, and the tiles of it that share what they stand for.

use std::ops::Range;

use bytes::Bytes;

use super::tensor::{DType, Tensor, strides};

/// Integers of few bits, one for each element of a weight, and the tiles of it that share a scale or a table.
#[derive(Clone, Debug)]
pub struct Codes {
    /// The shape of the weight.
    dims: Vec<usize>,
    /// Bits of each, 1 to 8.
    bits: u32,
    /// The extents of a tile: along each axis all of it, one element, or a block; the last block may be shorter.
    tile: Vec<usize>,
    /// A byte for each, in row-major order.
    bytes: Bytes,
}

impl Codes {
    /// Codes for a weight of shape `dims`, a byte for each element, of which tiles of the extents of `tile` share what they stand
    /// for; `None` where the lengths do not fit or a code takes more than so many bits.
    #[must_use]
    pub fn new(dims: &[usize], bits: u32, tile: &[usize], bytes: Bytes) -> Option<Self> {
        let is_whole = bytes.len() == dims.iter().product::<usize>() && tile.len() == dims.len();
        let tile: Vec<_> = tile.iter().zip(dims).map(|(&tile, &extent)| tile.min(extent.max(1))).collect();
        let fits = (1..=8).contains(&bits) && tile.iter().all(|&tile| tile > 0);
        (is_whole && fits).then(|| Self { dims: dims.to_vec(), bits, tile, bytes })
    }

    /// The shape of the weight.
    #[must_use]
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// Bits of each code.
    #[must_use]
    pub fn bits(&self) -> u32 {
        self.bits
    }

    /// The extents of a tile.
    #[must_use]
    pub fn tile(&self) -> &[usize] {
        &self.tile
    }

    /// A byte for each code, in row-major order.
    #[must_use]
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The same with other codes for as many elements.
    pub(super) fn with_bytes(self, bytes: Vec<u8>) -> Self {
        Self { bytes: bytes.into(), ..self }
    }

    /// The same codes in `bits` each, which are no fewer.
    pub(super) fn with_bits(self, bits: u32) -> Self {
        Self { bits: self.bits.max(bits), ..self }
    }

    /// The same codes in tiles of `size` along `axis`.
    pub(super) fn cut(mut self, axis: usize, size: usize) -> Self {
        self.tile[axis] = size;
        self
    }

    /// How many tiles there are along each axis.
    #[must_use]
    pub fn grid(&self) -> Vec<usize> {
        self.dims.iter().zip(&self.tile).map(|(extent, tile)| extent.div_ceil(*tile)).collect()
    }

    /// The extents of tiles like these in a weight of another shape: along each axis all of it where they were, else as before; all of the
    /// weight where it has other axes.
    pub(crate) fn tile_for(&self, dims: &[usize]) -> Vec<usize> {
        if dims.len() != self.dims.len() {
            return dims.to_vec();
        }
        let axes = self.tile.iter().zip(&self.dims).zip(dims);
        axes.map(|((&tile, old), &new)| if tile >= *old && *old > 1 { new } else { tile }.max(1)).collect()
    }

    /// The tile that each element is in, in row-major order.
    pub(crate) fn tiles(&self) -> impl Iterator<Item = usize> + use<> {
        let steps = strides(&self.grid());
        let axes = self.dims.iter().zip(&self.tile).zip(steps);
        let places: Vec<Vec<usize>> =
            axes.map(|((&extent, &tile), step)| (0..extent).map(|i| i / tile * step).collect()).collect();
        let (mut index, total) = (vec![0_usize; places.len()], self.bytes.len());
        let mut own: usize = 0;
        (0..total).map(move |_| {
            let here = own;
            for axis in (0..places.len()).rev() {
                let places = &places[axis];
                own -= places[index[axis]];
                index[axis] += 1;
                if index[axis] < places.len() {
                    own += places[index[axis]];
                    break;
                }
                index[axis] = 0;
                own += places[0];
            }
            here
        })
    }

    fn as_tensor(&self) -> Tensor {
        Tensor::made(DType::Uint8, &self.dims, self.bytes.clone())
    }

    /// The slices `indices` along `axis`, and the tiles along it that what they stand for is taken from.
    pub(super) fn select(&self, axis: usize, indices: &[usize]) -> Option<(Self, Vec<usize>)> {
        let bytes = self.as_tensor().select(axis, indices)?.bytes();
        let (mut dims, mut tile) = (self.dims.clone(), self.tile.clone());
        let (extent, old) = (dims[axis], tile[axis]);
        dims[axis] = indices.len();
        if old >= extent {
            tile[axis] = indices.len().max(1);
            return Some((Self::new(&dims, self.bits, &tile, bytes)?, vec![0; usize::from(!indices.is_empty())]));
        }
        // The largest blocks none of which is cut from two.
        let is_whole = |block: &[usize]| block.iter().all(|index| index / old == block[0] / old);
        let size = (1..=old).rev().find(|&size| indices.chunks(size).all(is_whole)).unwrap_or(1);
        tile[axis] = size;
        let taken = indices.chunks(size).map(|block| block[0] / old).collect();
        Some((Self::new(&dims, self.bits, &tile, bytes)?, taken))
    }

    /// The same in the order of axes `perm`.
    pub(super) fn permute(&self, perm: &[usize]) -> Option<Self> {
        let bytes = self.as_tensor().permute(perm)?.bytes();
        let along = |extents: &[usize]| perm.iter().map(|&axis| extents[axis]).collect::<Vec<_>>();
        Self::new(&along(&self.dims), self.bits, &along(&self.tile), bytes)
    }

    /// The same codes in another shape, where its tiles are the same; what they stand for keeps its order.
    pub(super) fn reshape(&self, dims: &[usize]) -> Option<Self> {
        let mut tile = Vec::with_capacity(dims.len());
        for (old, new) in runs(&self.dims, dims)? {
            tile.extend(retiled(&self.dims[old.clone()], &self.tile[old], &dims[new])?);
        }
        Self::new(dims, self.bits, &tile, self.bytes.clone())
    }
}

/// Runs of axes of both shapes that have equally many elements, as short as can be; `None` where the shapes have not.
fn runs(old: &[usize], new: &[usize]) -> Option<Vec<(Range<usize>, Range<usize>)>> {
    let (mut runs, mut i, mut j) = (Vec::new(), 0, 0);
    while i < old.len() || j < new.len() {
        let begin = (i, j);
        let (mut a, mut b) = (old.get(i).copied().unwrap_or(1), new.get(j).copied().unwrap_or(1));
        (i, j) = ((i + 1).min(old.len()), (j + 1).min(new.len()));
        while a != b {
            let (side, axes, place) = if a < b { (&mut a, old, &mut i) } else { (&mut b, new, &mut j) };
            *side *= axes.get(*place)?;
            *place += 1;
        }
        runs.push((begin.0..i, begin.1..j));
    }
    Some(runs)
}

/// The tiles of a run of axes in another shape of as many elements.
fn retiled(dims: &[usize], tile: &[usize], new: &[usize]) -> Option<Vec<usize>> {
    if dims == new {
        return Some(tile.to_vec());
    }
    if tile == dims {
        return Some(new.to_vec());
    }
    if tile.iter().all(|&tile| tile == 1) {
        return Some(vec![1; new.len()]);
    }
    // What follows each other in one tile is so many elements.
    let whole = tile.iter().zip(dims).rev().take_while(|(tile, extent)| tile == extent).count();
    let (outer, inner) = tile.split_at(tile.len() - whole);
    let (last, rest) = outer.split_last()?;
    rest.iter().all(|&tile| tile == 1).then_some(())?;
    let mut size = last * inner.iter().product::<usize>();
    (*last == 1 || dims[outer.len() - 1].is_multiple_of(*last)).then_some(())?;
    let mut tiles = Vec::with_capacity(new.len());
    for &extent in new.iter().rev() {
        let along = if size >= extent { extent } else { size };
        (extent.is_multiple_of(along) && size.is_multiple_of(along)).then_some(())?;
        tiles.push(along);
        size /= along;
    }
    (size == 1).then_some(())?;
    tiles.reverse();
    Some(tiles)
}
