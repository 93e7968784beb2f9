//! The forms of chains, and how the weights of their layers are laid out.

use nalgebra::DMatrix;

use super::{Family, Shape};
use crate::linalg::product;

/// A chain of layers that may stand in place of one, with its strength.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Form {
    /// `before` mixes the channels that are read into so many, and `after` makes the results of so many (Denil 2013; Zhang
    /// 2015; both: Kim 2016). Of a matrix, there is `after` alone.
    Ranks {
        /// Channels between the mixing of what is read and the kernel, for each group.
        before: Option<usize>,
        /// Channels between the kernel and the mixing into results, for each group.
        after: Option<usize>,
    },
    /// The kernel along one axis into `rank` channels, then along the others (Jaderberg 2014).
    Spatial {
        /// Channels between both, for each group.
        rank: usize,
        /// The axis that comes first.
        first: usize,
    },
    /// `multiplier` kernels for each channel that is read, whose results are then mixed (Guo 2018).
    Separate {
        /// Kernels for each channel.
        multiplier: usize,
    },
    /// What is read is mixed into `multiplier` channels for each that is made, which have a kernel each.
    Mixed {
        /// Kernels for each channel.
        multiplier: usize,
    },
    /// One layer in groups, whose channels stand in the [orders](super::Orders) of a fit (Zhao and Luk 2018).
    Grouped {
        /// Groups of each group.
        parts: usize,
        /// Of what rank is a chain beside it, whose results are added: 0 where there is none.
        bypass: usize,
    },
    /// Of a matrix: a sum of Kronecker products A⊗B, of which B is multiplied first (Van Loan and Pitsianis 1993).
    Kronecker {
        /// Rows of A.
        rows: usize,
        /// Columns of A.
        columns: usize,
        /// How many products.
        terms: usize,
    },
}

/// The weight of a layer of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Its extents: channels that are made, channels that a group reads, kernel. Where the layer
    /// [spreads](Shape::spreads), channels that are read, channels that a group makes, kernel.
    pub dims: Vec<usize>,
    /// How many groups it has.
    pub groups: usize,
    /// Along which axes of the kernel it reaches, strides and pads.
    pub along: Vec<bool>,
    /// How many vectors it multiplies for each that the whole layer does.
    pub repeats: usize,
}

impl Layout {
    /// Of a layer as it is.
    #[must_use]
    pub fn of_whole(shape: &Shape) -> Self {
        let channels = if shape.spreads {
            [shape.groups * shape.reads, shape.makes]
        } else {
            [shape.groups * shape.makes, shape.reads]
        };
        let dims = channels.into_iter().chain(shape.kernel.iter().copied()).collect();
        Self { dims, groups: shape.groups, along: vec![true; shape.kernel.len()], repeats: 1 }
    }

    /// Elements of the weight.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.dims.iter().product()
    }

    /// What the part for one `group` of the whole layer makes of what it reads at place `tap` of the whole kernel.
    fn matrix(&self, values: &[f64], shape: &Shape, group: usize, tap: usize) -> DMatrix<f64> {
        let (mut place, mut step, mut rest) = (0, 1, tap);
        for axis in (0..shape.kernel.len()).rev() {
            if self.along[axis] {
                place += rest % shape.kernel[axis] * step;
                step *= shape.kernel[axis];
            }
            rest /= shape.kernel[axis];
        }
        let (first, second) = (self.dims[0] / shape.groups, self.dims[1]);
        let at = |first_index: usize, second_index: usize| {
            values[((group * first + first_index) * second + second_index) * step + place]
        };
        // Groups within the group of the whole layer stand along the diagonal.
        let parts = self.groups / shape.groups;
        let rows = first / parts;
        if shape.spreads && self.reaches() {
            let element = |made: usize, read: usize| {
                if read / rows == made / second { at(read, made % second) } else { 0.0 }
            };
            return DMatrix::from_fn(second * parts, first, element);
        }
        let element = |made: usize, read: usize| {
            if made / rows == read / second { at(made, read % second) } else { 0.0 }
        };
        DMatrix::from_fn(first, second * parts, element)
    }

    /// Whether it has the kernel, or a part of it.
    #[must_use]
    pub fn reaches(&self) -> bool {
        self.along.contains(&true)
    }
}

impl Form {
    /// What it is a member of.
    #[must_use]
    pub fn family(self) -> Family {
        match self {
            Self::Ranks { before: Some(_), after: None } => Family::Before,
            Self::Ranks { before: Some(_), after: Some(_) } => Family::Both,
            Self::Ranks { before: None, .. } => Family::After,
            Self::Spatial { first, .. } => Family::Spatial { first },
            Self::Separate { .. } => Family::Separate,
            Self::Mixed { .. } => Family::Mixed,
            Self::Grouped { bypass, .. } => Family::Grouped { bypass },
            Self::Kronecker { .. } => Family::Kronecker,
        }
    }

    /// The number that says how strong it is, where it has one.
    #[must_use]
    pub fn rank(self) -> Option<usize> {
        match self {
            Self::Ranks { before: Some(_), after: Some(_) } => None,
            Self::Ranks { before, after } => before.or(after),
            Self::Spatial { rank, .. } => Some(rank),
            Self::Separate { multiplier } | Self::Mixed { multiplier } => Some(multiplier),
            Self::Grouped { parts, .. } => Some(parts),
            Self::Kronecker { terms, .. } => Some(terms),
        }
    }

    /// Whether its ranks are whole multiples of `multiple`.
    #[must_use]
    pub fn is_multiple(self, multiple: usize) -> bool {
        match self {
            Self::Ranks { before, after } => [before, after].into_iter().flatten().all(|r| r.is_multiple_of(multiple)),
            Self::Spatial { rank, .. } => rank.is_multiple_of(multiple),
            Self::Separate { .. } | Self::Mixed { .. } | Self::Grouped { .. } | Self::Kronecker { .. } => true,
        }
    }

    /// The layers of the chain that stands in place of a layer of this `shape`.
    #[must_use]
    pub fn layouts(self, shape: &Shape) -> Vec<Layout> {
        let Shape { groups, makes, reads, kernel, .. } = shape;
        let (groups, makes, reads, axes) = (*groups, *makes, *reads, kernel.len());
        let layout = |channels: [usize; 2], groups: usize, along: Vec<bool>| {
            let kernel = kernel.iter().zip(&along).map(|(&extent, &along)| if along { extent } else { 1 });
            Layout { dims: channels.into_iter().chain(kernel).collect(), groups, along, repeats: 1 }
        };
        let (nowhere, everywhere) = (vec![false; axes], vec![true; axes]);
        match self {
            Self::Ranks { before, after } => {
                let (inner, outer) = (before.unwrap_or(reads), after.unwrap_or(makes));
                let core = if shape.spreads { [groups * inner, outer] } else { [groups * outer, inner] };
                let core = if axes == 0 { None } else { Some(layout(core, groups, everywhere)) };
                let before = match (before, axes, after) {
                    (Some(before), ..) => Some([groups * before, reads]),
                    (None, 0, Some(after)) => Some([groups * after, reads]),
                    _ => None,
                };
                let before = before.map(|channels| layout(channels, groups, nowhere.clone()));
                let after = after.map(|after| layout([groups * makes, after], groups, nowhere.clone()));
                [before, core, after].into_iter().flatten().collect()
            }
            Self::Spatial { rank, first } => {
                let along = |is_first: bool| (0..axes).map(|axis| (axis == first) == is_first).collect();
                vec![
                    layout([groups * rank, reads], groups, along(true)),
                    layout([groups * makes, rank], groups, along(false)),
                ]
            }
            Self::Separate { multiplier } => vec![
                layout([groups * reads * multiplier, 1], groups * reads, everywhere),
                layout([groups * makes, reads * multiplier], groups, nowhere),
            ],
            Self::Mixed { multiplier } => vec![
                layout([groups * makes * multiplier, reads], groups, nowhere),
                layout([groups * makes, multiplier], groups * makes, everywhere),
            ],
            Self::Grouped { parts, bypass } => {
                let channels =
                    if shape.spreads { [groups * reads, makes / parts] } else { [groups * makes, reads / parts] };
                let beside = Self::Ranks { before: None, after: Some(bypass) };
                let beside = if bypass > 0 { beside.layouts(shape) } else { Vec::new() };
                [vec![layout(channels, groups * parts, everywhere)], beside].concat()
            }
            Self::Kronecker { rows, columns, terms } => {
                let (height, width) = (makes / rows, reads / columns);
                let right = Layout { repeats: columns, ..layout([height, width], 1, Vec::new()) };
                let left = Layout { repeats: height, ..layout([rows, columns], 1, Vec::new()) };
                vec![[right, left]; terms].concat()
            }
        }
    }

    /// What a chain with the weights `stages` makes of what it reads: W̃ of each group, o×d; of one in groups, with channels as
    /// they stand in it, and without what is beside it.
    #[must_use]
    pub fn compose(self, shape: &Shape, stages: &[Vec<f64>]) -> Vec<DMatrix<f64>> {
        let layouts = self.layouts(shape);
        if let Self::Kronecker { .. } = self {
            let matrix = |i: usize| DMatrix::from_row_slice(layouts[i].dims[0], layouts[i].dims[1], &stages[i]);
            let terms = (0..stages.len()).step_by(2).map(|i| matrix(i + 1).kronecker(&matrix(i)));
            return terms.reduce(|sum, term| sum + term).into_iter().collect();
        }
        let taps = shape.taps();
        let count = if let Self::Grouped { .. } = self { 1 } else { layouts.len() };
        let of_group = |group: usize| {
            let of_place = |tap: usize| {
                let parts = layouts[..count]
                    .iter()
                    .zip(stages)
                    .map(|(layout, values)| layout.matrix(values, shape, group, tap));
                parts.reduce(|made, part| product(&part, &made)).unwrap_or_default()
            };
            let places: Vec<_> = (0..taps).map(of_place).collect();
            if shape.spreads {
                DMatrix::from_fn(shape.makes * taps, shape.reads, |row, column| {
                    places[row % taps][(row / taps, column)]
                })
            } else {
                DMatrix::from_fn(shape.makes, shape.reads * taps, |row, column| {
                    places[column % taps][(row, column / taps)]
                })
            }
        };
        (0..shape.groups).map(of_group).collect()
    }

    /// Elements of the weights of its layers.
    #[must_use]
    pub fn elements(self, shape: &Shape) -> usize {
        self.layouts(shape).iter().map(Layout::elements).sum()
    }
}
