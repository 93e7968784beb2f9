//! A weight as the matrices that its layers multiply by, and what of it shares a scale or a table.

use nalgebra::DMatrix;

use crate::{
    analysis::linear::Linear,
    linalg::{by_rows, transposed},
};

/// What shares a scale or a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tiling {
    /// All elements.
    Tensor,
    /// Those that make one output channel.
    Rows,
    /// Of those, so many that multiply neighbours, or the channels of these for a kernel.
    Blocks(usize),
}

/// A weight as the matrices that its layers multiply by.
#[derive(Clone, Debug)]
pub struct Plane {
    dims: Vec<usize>,
    linear: Option<Linear>,
}

impl Plane {
    /// A weight of shape `dims` that `linear` multiplies by, or whose rows stand along its first axis where nothing is known of it.
    #[must_use]
    pub fn new(dims: &[usize], linear: Option<&Linear>) -> Self {
        Self { dims: dims.to_vec(), linear: linear.cloned() }
    }

    /// The extents of a tile of the weight; `None` where it can't be cut so.
    #[must_use]
    pub fn tile(&self, tiling: Tiling) -> Option<Vec<usize>> {
        let mut tile = self.dims.clone();
        if tiling == Tiling::Tensor {
            return Some(tile);
        }
        let (makes, reads) = match &self.linear {
            Some(linear) if linear.is_recurrent() => (1, 2),
            Some(linear) => (linear.output_axis(), 1 - linear.output_axis()),
            None => (0, 1),
        };
        *tile.get_mut(makes)? = 1;
        let mut whole = *self.dims.get(reads).unwrap_or(&1);
        if let Some(linear) = &self.linear {
            // Axis 0 runs over groups, of which each has its own rows.
            if makes == 1 && self.dims.len() > 2 {
                tile[0] = self.dims[0] / linear.groups;
            }
            whole /= if reads == 0 { linear.groups } else { 1 };
        }
        if let Tiling::Blocks(size) = tiling {
            let taps: usize = if self.linear.is_none() { 1 } else { self.dims.get(2..)?.iter().product() };
            let kernel = if self.linear.as_ref().is_some_and(Linear::is_recurrent) { 1 } else { taps };
            let size = (size / kernel.max(1)).max(1);
            (self.dims.len() > 1 && size < whole && whole.is_multiple_of(size)).then_some(())?;
            tile[reads] = size;
        }
        Some(tile)
    }

    /// Whether the columns of the weight are rows of W; `None` where neither these nor its rows are.
    pub(super) fn is_turned(&self) -> Option<bool> {
        match &self.linear {
            Some(linear) if linear.output_axis() == 0 || linear.is_recurrent() => Some(false),
            Some(_) => (self.dims.len() == 2).then_some(true),
            None => Some(false),
        }
    }

    /// The elements of the weight as matrices W, o×d, one for each group.
    #[must_use]
    pub fn matrices(&self, values: &[f64]) -> Vec<DMatrix<f64>> {
        if let Some(linear) = &self.linear {
            return linear.matrices(values);
        }
        let rows = if self.dims.len() > 1 { self.dims[0] } else { 1 };
        let columns = values.len() / rows.max(1);
        vec![DMatrix::from_vec(rows, columns, transposed(values, columns))]
    }

    /// The elements of the weight whose matrices these are.
    #[must_use]
    pub fn elements(&self, matrices: &[DMatrix<f64>]) -> Vec<f64> {
        match &self.linear {
            Some(linear) => linear.elements(matrices),
            None => matrices.iter().map(by_rows).collect::<Vec<_>>().concat(),
        }
    }
}
