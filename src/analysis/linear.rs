//! Layers as y = W·x + b: how an operand is cut into vectors x, and a constant into matrices W.

use std::ops::Range;

use nalgebra::DMatrix;

use crate::{
    ir::{Graph, NodeId, Op, Outlet, tensor::is_float},
    linalg::{by_rows, transposed},
    verify::Value,
};

/// A `Conv`, `ConvTranspose`, `Gemm` or `MatMul` by a constant, or one of the two products of an `LSTM`, `GRU` or `RNN`, seen
/// as y = W·x + b for each of its groups.
///
/// - `Gemm` and `MatMul`: x is a row of the operand, d its last axis.
/// - `Conv`: x is the patch that a filter reads, in the order (channel, kernel), zeros of the padding included.
/// - `ConvTranspose`: x is a pixel of the operand, and y what it adds to the result, in the order (channel, kernel).
/// - `Conv` [by pixels](Linear::by_pixels): x is a pixel of the operand, and y what it adds to the results around it.
/// - Recurrences: x is a row of the operand, or a state of the layer; y is what it adds to the gates. Each direction is a
///   group.
#[derive(Clone, Debug)]
pub struct Linear {
    /// The node.
    pub node: NodeId,
    /// The constant.
    pub weight: Outlet,
    /// What is read.
    pub input: Outlet,
    /// How many independent matrices there are.
    pub groups: usize,
    /// Rows o of the matrix of each group.
    pub rows: usize,
    /// Columns d of the matrix of each group.
    pub columns: usize,
    /// Columns for each channel that is read, next to each other: the size of the kernel of a `Conv`.
    pub taps: usize,
    /// Rows for each channel that is made, where x is a pixel: the size of the kernel.
    pub spread: usize,
    form: Form,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Form {
    /// `stored` is whether the constant holds W itself (o×d) and not its transpose.
    Dense {
        stored: bool,
    },
    Patches(Window),
    /// Rows are in the order (channel, kernel).
    Pixels,
    /// The same of a `Conv`.
    Taps,
    /// The rows of what is read go to the gates of each direction.
    Gates,
    /// The states of each direction, which stand along an axis of what is read.
    States {
        directions: usize,
    },
}

/// How a filter slides.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Window {
    kernel: Vec<usize>,
    strides: Vec<usize>,
    dilations: Vec<usize>,
    pads: Pads,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Pads {
    /// At the begin and at the end of each axis.
    Given(Vec<(usize, usize)>),
    /// As many as make the result ⌈n / stride⌉ long, the odd one at the end or at the begin.
    Same { odd_at_end: bool },
}

impl Window {
    fn of(op: &Op, kernel: &[usize]) -> Option<Self> {
        let rank = kernel.len();
        let list = |name: &str| match op.ints(name) {
            Some(values) => values.iter().map(|&v| usize::try_from(v).ok()).collect::<Option<Vec<_>>>(),
            None => Some(vec![1; rank]),
        };
        let pads = match op.string("auto_pad") {
            Some("SAME_UPPER") => Pads::Same { odd_at_end: true },
            Some("SAME_LOWER") => Pads::Same { odd_at_end: false },
            Some("VALID") => Pads::Given(vec![(0, 0); rank]),
            _ => match op.ints("pads") {
                None => Pads::Given(vec![(0, 0); rank]),
                Some(pads) if pads.len() == 2 * rank => {
                    let pads = pads.iter().map(|&p| usize::try_from(p).ok()).collect::<Option<Vec<_>>>()?;
                    Pads::Given((0..rank).map(|a| (pads[a], pads[a + rank])).collect())
                }
                Some(_) => return None,
            },
        };
        let window = Self { kernel: kernel.to_vec(), strides: list("strides")?, dilations: list("dilations")?, pads };
        (window.strides.len() == rank && window.dilations.len() == rank && !window.strides.contains(&0))
            .then_some(window)
    }

    /// The extent of the result along an axis, and the padding before the operand's begin.
    fn slide(&self, axis: usize, extent: usize) -> (usize, usize) {
        let (stride, reach) = (self.strides[axis], (self.kernel[axis] - 1) * self.dilations[axis] + 1);
        match &self.pads {
            Pads::Given(pads) => {
                let (begin, end) = pads[axis];
                ((extent + begin + end).checked_sub(reach).map_or(0, |rest| rest / stride + 1), begin)
            }
            Pads::Same { odd_at_end } => {
                let result = extent.div_ceil(stride);
                let total = ((result.max(1) - 1) * stride + reach).saturating_sub(extent);
                (result, if *odd_at_end { total / 2 } else { total.div_ceil(2) })
            }
        }
    }
}

/// Whether `node` is of a kind that multiplies by weights: a `Conv`, `ConvTranspose`, `Gemm` or `MatMul`.
#[must_use]
pub fn multiplies(graph: &Graph, node: NodeId) -> bool {
    ["Conv", "ConvTranspose", "Gemm", "MatMul"].iter().any(|kind| graph.op_of(node, kind).is_some())
}

impl Linear {
    /// The layer that `node` is, if it is one.
    #[must_use]
    pub fn of(graph: &Graph, node: NodeId) -> Option<Self> {
        let op = graph.op(node)?;
        let (input, weight) = (graph.operand(node, 0)?, graph.operand(node, 1)?);
        let tensor = graph.constant(weight).filter(|tensor| is_float(tensor.dtype()) && !tensor.is_empty())?;
        let dims = tensor.dims();
        let one = |name: &str, default: f32| op.float(name).unwrap_or(default) == default;
        let dense = |stored: bool| {
            let [a, b] = dims else { return None };
            let (rows, columns) = if stored { (*a, *b) } else { (*b, *a) };
            Some(Self {
                node,
                weight,
                input,
                groups: 1,
                rows,
                columns,
                taps: 1,
                spread: 1,
                form: Form::Dense { stored },
            })
        };
        match op.standard()? {
            "MatMul" => dense(false),
            "Gemm" if op.int("transA").unwrap_or(0) == 0 && one("alpha", 1.0) && one("beta", 1.0) => {
                dense(op.int("transB") == Some(1))
            }
            kind @ ("Conv" | "ConvTranspose") if dims.len() > 2 => {
                let groups = usize::try_from(op.int("group").unwrap_or(1)).ok().filter(|&g| g > 0)?;
                let taps: usize = dims[2..].iter().product();
                if !dims[0].is_multiple_of(groups) {
                    return None;
                }
                let (rows, columns, form) = if kind == "Conv" {
                    (dims[0] / groups, dims[1] * taps, Form::Patches(Window::of(op, &dims[2..])?))
                } else {
                    (dims[1] * taps, dims[0] / groups, Form::Pixels)
                };
                let (taps, spread) = if kind == "Conv" { (taps, 1) } else { (1, taps) };
                Some(Self { node, weight, input, groups, rows, columns, taps, spread, form })
            }
            _ => None,
        }
    }

    /// Every layer of `graph`, in order.
    #[must_use]
    pub fn all(graph: &Graph) -> Vec<Self> {
        graph.ops().into_iter().flat_map(|node| Self::within(graph, node)).collect()
    }

    /// The layers that `node` is made of.
    #[must_use]
    pub fn within(graph: &Graph, node: NodeId) -> Vec<Self> {
        let recurrent = graph.op(node).is_some_and(|op| ["LSTM", "GRU", "RNN"].iter().any(|kind| op.is(kind)));
        if !recurrent {
            return Self::of(graph, node).into_iter().collect();
        }
        let directions = if graph.op(node).and_then(|op| op.int("layout")) == Some(1) { 2 } else { 1 };
        let states = Some(node.at(0)).filter(|&states| !graph.name(states).is_empty());
        let parts = [(1, graph.operand(node, 0), Form::Gates), (2, states, Form::States { directions })];
        let layer = |(slot, input, form): (u32, Option<Outlet>, Form)| {
            let weight = graph.operand(node, slot)?;
            let tensor = graph.constant(weight).filter(|tensor| is_float(tensor.dtype()) && !tensor.is_empty())?;
            let [groups, rows, columns] = *tensor.dims() else { return None };
            Some(Self { node, weight, input: input?, groups, rows, columns, taps: 1, spread: 1, form })
        };
        parts.into_iter().filter_map(layer).collect()
    }

    /// A `Conv` as what each pixel adds to the results around it, in the order (channel, kernel): vectors are shorter by the
    /// size of the kernel, and what is known of them is less.
    #[must_use]
    pub fn by_pixels(&self) -> Option<Self> {
        let Form::Patches(_) = self.form else { return None };
        let (rows, columns) = (self.rows * self.taps, self.columns / self.taps);
        Some(Self { rows, columns, taps: 1, spread: self.taps, form: Form::Taps, ..self.clone() })
    }

    /// The layer as it reads vectors of at most `size` elements, if it does in some way.
    #[must_use]
    pub fn at_most(self, size: usize) -> Option<Self> {
        if self.columns <= size { Some(self) } else { self.by_pixels().filter(|coarse| coarse.columns <= size) }
    }

    /// A name for the vectors that it reads: layers that cut one value in one way read the same.
    #[must_use]
    pub fn source(&self, graph: &Graph) -> String {
        let how = match &self.form {
            Form::Dense { .. } | Form::Gates => "rows".to_owned(),
            Form::States { .. } => "states".to_owned(),
            Form::Pixels | Form::Taps => "pixels".to_owned(),
            Form::Patches(window) => format!(
                "patches of {:?} by {:?} at {:?} in {:?}",
                window.kernel, window.strides, window.dilations, window.pads
            ),
        };
        format!("{} in {} {how}", graph.name(self.input), self.groups)
    }

    /// Whether the rows of W are one output channel each, so that they have a bias each.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        matches!(self.form, Form::Dense { .. } | Form::Patches(_))
    }

    /// How many channels it makes, those of all groups.
    #[must_use]
    pub fn output_channels(&self) -> usize {
        self.rows / self.spread * self.groups
    }

    /// Whether it is a part of a recurrent layer.
    #[must_use]
    pub fn is_recurrent(&self) -> bool {
        matches!(self.form, Form::Gates | Form::States { .. })
    }

    /// Whether what it multiplies is its first operand, and no state.
    #[must_use]
    pub fn reads_input(&self) -> bool {
        !matches!(self.form, Form::States { .. })
    }

    /// The operand slot of the constant.
    #[must_use]
    pub fn slot(&self) -> u32 {
        if matches!(self.form, Form::States { .. }) { 2 } else { 1 }
    }

    /// The columns of a group that index `index` along the axis of the constant that reads stands for.
    #[must_use]
    pub fn columns_of(&self, index: usize, group: usize) -> Range<usize> {
        match self.form {
            Form::Pixels if index / self.columns != group => 0..0,
            Form::Pixels => index % self.columns..index % self.columns + 1,
            _ => index * self.taps..(index + 1) * self.taps,
        }
    }

    /// The rows of a group that index `index` along the axis of the constant that makes stands for.
    #[must_use]
    pub fn rows_of(&self, index: usize, group: usize) -> Range<usize> {
        match self.form {
            Form::Pixels => index * self.spread..(index + 1) * self.spread,
            Form::Dense { .. } | Form::Patches(_) | Form::Taps if index / (self.rows / self.spread) != group => 0..0,
            Form::Taps => {
                let channel = index % (self.rows / self.spread);
                channel * self.spread..(channel + 1) * self.spread
            }
            _ => index % self.rows..index % self.rows + 1,
        }
    }

    /// The axis of the operand and of the result, values of this `rank`, along which their channels stand.
    #[must_use]
    pub fn channel_axis(&self, rank: usize) -> usize {
        match self.form {
            Form::Dense { .. } | Form::Gates | Form::States { .. } => rank.saturating_sub(1),
            Form::Patches(_) | Form::Pixels | Form::Taps => 1,
        }
    }

    /// The axis of the constant that makes output channels.
    #[must_use]
    pub fn output_axis(&self) -> usize {
        match self.form {
            Form::Dense { stored: true } | Form::Patches(_) | Form::Taps => 0,
            Form::Dense { stored: false } | Form::Pixels | Form::Gates | Form::States { .. } => 1,
        }
    }

    /// W of each group, o×d.
    #[must_use]
    pub fn matrices(&self, values: &[f64]) -> Vec<DMatrix<f64>> {
        let size = self.rows * self.columns;
        let group = |values: &[f64]| match self.form {
            Form::Dense { stored: false } | Form::Pixels => DMatrix::from_column_slice(self.rows, self.columns, values),
            Form::Taps => {
                let place = |row: usize, column: usize| self.place_of_tap(row, column);
                DMatrix::from_fn(self.rows, self.columns, |row, column| values[place(row, column)])
            }
            _ => DMatrix::from_vec(self.rows, self.columns, transposed(values, self.columns)),
        };
        values.chunks_exact(size).take(self.groups).map(group).collect()
    }

    /// The elements of the constant whose matrices these are.
    #[must_use]
    pub fn elements(&self, matrices: &[DMatrix<f64>]) -> Vec<f64> {
        let flat = |matrix: &DMatrix<f64>| match self.form {
            Form::Dense { stored: false } | Form::Pixels => matrix.as_slice().to_vec(),
            Form::Taps => {
                let mut values = vec![0.0; matrix.len()];
                for (column, elements) in matrix.column_iter().enumerate() {
                    for (row, &value) in elements.iter().enumerate() {
                        values[self.place_of_tap(row, column)] = value;
                    }
                }
                values
            }
            _ => by_rows(matrix),
        };
        matrices.iter().map(flat).collect::<Vec<_>>().concat()
    }

    /// Where an element of the matrix of a group stands in the filters of a `Conv` by pixels.
    fn place_of_tap(&self, row: usize, column: usize) -> usize {
        (row / self.spread * self.columns + column) * self.spread + row % self.spread
    }

    /// How many vectors an operand holds.
    #[must_use]
    pub fn positions(&self, x: &Value) -> usize {
        match &self.form {
            Form::Dense { .. } | Form::Gates => x.dims.iter().rev().skip(1).product(),
            Form::States { .. } => x.dims.iter().rev().skip(1).product::<usize>() / self.groups,
            Form::Pixels | Form::Taps => x.dims[0] * x.dims[2..].iter().product::<usize>(),
            Form::Patches(window) => {
                x.dims[0] * (0..window.kernel.len()).map(|a| window.slide(a, x.dims[a + 2]).0).product::<usize>()
            }
        }
    }

    /// How many vectors a value shaped like the result was made of.
    #[must_use]
    pub fn positions_of(&self, y: &Value) -> usize {
        y.values.len() / y.dims.get(self.channel_axis(y.dims.len())).copied().unwrap_or(1).max(1)
    }

    /// The vectors of `x` at `positions` as columns, those of each group: d×n.
    #[must_use]
    pub fn vectors(&self, x: &Value, positions: &[usize]) -> Vec<DMatrix<f64>> {
        match &self.form {
            Form::Dense { .. } | Form::Gates => vec![rows(x, self.columns, positions); self.groups],
            Form::States { directions } => {
                let inner: usize = x.dims[directions + 1..x.dims.len() - 1].iter().product();
                let of_direction = |d: usize| {
                    let at = positions.iter().map(|p| (p / inner * self.groups + d) * inner + p % inner);
                    rows(x, self.columns, &at.collect::<Vec<_>>())
                };
                (0..self.groups).map(of_direction).collect()
            }
            Form::Pixels | Form::Taps => self.split(&pixels(x, positions)),
            Form::Patches(window) => self.split(&self.patches(window, x, positions)),
        }
    }

    /// The rows of each group of a matrix over all channels.
    fn split(&self, all: &DMatrix<f64>) -> Vec<DMatrix<f64>> {
        (0..self.groups).map(|group| all.rows(group * self.columns, self.columns).into_owned()).collect()
    }

    /// What stands in `y`, a value shaped like the result, at `positions`: o·groups×n. Only for layers that are
    /// [direct](Self::is_direct).
    #[must_use]
    pub fn results(&self, y: &Value, positions: &[usize]) -> DMatrix<f64> {
        match self.form {
            Form::Patches(_) | Form::Pixels | Form::Taps => pixels(y, positions),
            _ => rows(y, y.dims.last().copied().unwrap_or(1), positions),
        }
    }

    fn patches(&self, window: &Window, x: &Value, positions: &[usize]) -> DMatrix<f64> {
        let space = &x.dims[2..];
        let (channels, area): (_, usize) = (x.dims[1], space.iter().product());
        let slides: Vec<_> = (0..space.len()).map(|axis| window.slide(axis, space[axis])).collect();
        let each: usize = slides.iter().map(|slide| slide.0).product();
        let mut patches = DMatrix::zeros(channels * self.taps, positions.len());
        for (column, &position) in positions.iter().enumerate() {
            let (batch, mut rest) = (position / each, position % each);
            let mut corner = vec![0_isize; space.len()];
            for axis in (0..space.len()).rev() {
                let (extent, begin) = slides[axis];
                corner[axis] = (rest % extent * window.strides[axis]) as isize - begin as isize;
                rest /= extent;
            }
            for tap in 0..self.taps {
                let (mut rest, mut place, mut step) = (tap, 0, 1);
                let mut inside = true;
                for axis in (0..space.len()).rev() {
                    let at = corner[axis] + (rest % window.kernel[axis] * window.dilations[axis]) as isize;
                    rest /= window.kernel[axis];
                    inside &= at >= 0 && (at as usize) < space[axis];
                    place += at.max(0) as usize * step;
                    step *= space[axis];
                }
                if !inside {
                    continue;
                }
                for channel in 0..channels {
                    let from = (batch * channels + channel) * area + place;
                    patches[(channel * self.taps + tap, column)] = x.values[from];
                }
            }
        }
        patches
    }
}

/// The rows of `x` along its last axis at `positions`, as columns.
fn rows(x: &Value, width: usize, positions: &[usize]) -> DMatrix<f64> {
    let mut found = DMatrix::zeros(width, positions.len());
    for (column, &position) in positions.iter().enumerate() {
        found.column_mut(column).copy_from_slice(&x.values[position * width..(position + 1) * width]);
    }
    found
}

/// The channels of `x` at the places `positions` of its batch and space, as columns.
fn pixels(x: &Value, positions: &[usize]) -> DMatrix<f64> {
    let (channels, area): (_, usize) = (x.dims[1], x.dims[2..].iter().product());
    DMatrix::from_fn(channels, positions.len(), |channel, column| {
        let (batch, place) = (positions[column] / area, positions[column] % area);
        x.values[(batch * channels + channel) * area + place]
    })
}
