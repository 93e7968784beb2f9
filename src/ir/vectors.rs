//! Weights stored as indices of short vectors.

use super::{
    Codes,
    tensor::{Tensor, is_float},
};

/// Codes that stand for vectors of elements side by side, all from one table (Gong 2014; Wu 2016).
#[derive(Clone, Debug)]
pub struct Vectors {
    /// A code for each vector: a matrix.
    codes: Codes,
    /// The vectors: a matrix of the weight's element type, each a row.
    table: Tensor,
    /// The shape of the weight.
    dims: Vec<usize>,
    /// Whether the elements of a vector stand below each other, and not side by side.
    turned: bool,
}

impl Vectors {
    /// A form of these codes for a weight of shape `dims`; `None` where they are not as many, or one is beyond the table.
    #[must_use]
    pub fn new(codes: Codes, table: Tensor, dims: &[usize], turned: bool) -> Option<Self> {
        let [entries, width] = *table.dims() else { return None };
        let fits = codes.dims().len() == 2 && codes.bytes().len() * width == dims.iter().product::<usize>();
        let is_known = codes.bytes().iter().all(|&code| usize::from(code) < entries);
        (fits && is_known && width > 0 && is_float(table.dtype())).then(|| Self {
            codes,
            table,
            dims: dims.to_vec(),
            turned,
        })
    }

    /// The codes, one for each vector.
    #[must_use]
    pub fn codes(&self) -> &Codes {
        &self.codes
    }

    /// The vectors, each a row.
    #[must_use]
    pub fn table(&self) -> &Tensor {
        &self.table
    }

    /// Whether the elements of a vector stand below each other, and not side by side.
    #[must_use]
    pub fn is_turned(&self) -> bool {
        self.turned
    }

    /// The elements of a vector.
    #[must_use]
    pub fn width(&self) -> usize {
        self.table.dims()[1]
    }

    /// The values.
    pub(super) fn decode(&self) -> Option<Tensor> {
        let (rows, size) = (self.table.bytes(), self.table.element_size()?);
        let (width, columns) = (self.width(), self.codes.dims()[1]);
        let element = |code: u8, place: usize| &rows[(usize::from(code) * width + place) * size..][..size];
        let mut bytes = Vec::with_capacity(self.codes.bytes().len() * width * size);
        if self.turned {
            for row in self.codes.bytes().chunks(columns.max(1)) {
                for place in 0..width {
                    for &code in row {
                        bytes.extend_from_slice(element(code, place));
                    }
                }
            }
        } else {
            for &code in self.codes.bytes() {
                bytes.extend_from_slice(&rows[usize::from(code) * width * size..][..width * size]);
            }
        }
        Some(Tensor::made(self.table.dtype(), &self.dims, bytes.into()))
    }

    /// That of the slices `indices` along `axis`, where no vector is cut.
    pub(super) fn select(&self, axis: usize, indices: &[usize]) -> Option<Self> {
        let mut dims = self.dims.clone();
        let along = usize::from(self.turned);
        let is_whole = axis == along && dims.get(axis) == Some(&self.codes.dims()[along]);
        (is_whole && (!self.turned || dims.len() == 2)).then_some(())?;
        dims[axis] = indices.len();
        Self::new(self.codes.select(along, indices)?.0, self.table.clone(), &dims, self.turned)
    }

    /// That of the axes in the order of `perm`, where vectors stand side by side or below each other then.
    pub(super) fn permute(&self, perm: &[usize]) -> Option<Self> {
        let dims: Vec<_> = perm.iter().map(|&axis| self.dims[axis]).collect();
        let is_apart = !self.turned
            && self.dims.len() == 3
            && self.dims[2] == self.width()
            && self.dims[..2] == *self.codes.dims();
        let along = usize::from(self.turned);
        let is_matrix = self.dims.len() == 2 && self.dims[along] == self.codes.dims()[along];
        let codes = match *perm {
            [1, 0] if is_matrix => self.codes.permute(&[1, 0])?,
            [0, 2, 1] if is_apart => self.codes.clone(),
            _ => return None,
        };
        Self::new(codes, self.table.clone(), &dims, !self.turned)
    }

    /// That of another shape.
    pub(super) fn reshape(&self, dims: &[usize]) -> Option<Self> {
        Self::new(self.codes.clone(), self.table.clone(), dims, self.turned)
    }
}
