//! A weight that may be stored in other ways.

use nalgebra::{DMatrix, DVector};
use xxhash_rust::xxh3::Xxh3;

use super::super::rewrite::{Known, Statistics, shape_of};
use crate::{
    analysis::linear::Linear,
    codec::{is_between_codes, least_opset, packs, spelled_bytes},
    coding::{self, Form, Plane, Scheme, Tiling},
    factor::{Metric, Shape},
    ir::{Codes, DType, Graph, Inlet, Kind, NodeId, Outlet, Storage, Tensor, Weight},
    pass::Context,
    refit::Bias,
};

/// A way to store a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::passes) enum Way {
    /// In half precision.
    Half,
    /// As a table of all its values.
    Exact,
    /// As codes.
    Codes(Form),
    /// As codes of this many bits, each for this many elements.
    Vectors(u32, usize),
}

impl Way {
    /// Why a weight of a graph over this operator set can be stored in none of some ways.
    pub(super) fn why_not(ways: &[Self], opset: i64) -> String {
        let least = ways.iter().map(|way| way.least_opset()).min().unwrap_or(0);
        if least > opset {
            let bytes =
                |way: &Self| matches!(way, Self::Codes(form) if least_opset(Form { bits: 8, ..*form }) <= opset);
            let instead = if ways.iter().any(bytes) { "; bits=8 does not" } else { "" };
            return format!("takes operators of set {least}, and the model imports {opset}{instead}");
        }
        match ways {
            [Self::Half] => "holds values beyond what half precision does, or is no wider",
            [Self::Vectors(..), ..] => "can't be cut in such vectors",
            _ => "can't be cut in such blocks",
        }
        .to_owned()
    }

    /// The first operator set that has what is spelled so.
    fn least_opset(self) -> i64 {
        let plain = |bits: u32| Form { scheme: Scheme::Table, bits, tiling: Tiling::Tensor };
        least_opset(match self {
            Self::Half | Self::Exact => plain(8),
            Self::Codes(form) => form,
            Self::Vectors(bits, _) => plain(bits),
        })
    }

    /// Bits of each element, about.
    pub(super) fn bits(self) -> u32 {
        match self {
            Self::Half => 16,
            Self::Exact => 8,
            Self::Codes(form) => form.bits,
            Self::Vectors(bits, width) => bits.div_ceil(width as u32),
        }
    }

    /// Whether less than eight bits are left of each element.
    pub(super) fn is_coarse(self) -> bool {
        match self {
            Self::Half | Self::Exact => false,
            Self::Codes(form) => form.bits < 8,
            Self::Vectors(..) => true,
        }
    }

    /// Whether blocks of each row have scales of their own.
    pub(super) fn is_cut(self) -> bool {
        matches!(self, Self::Codes(Form { tiling: Tiling::Blocks(_), .. }))
    }

    /// What is counted where a weight is stored so.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Half => "weights in half precision",
            Self::Exact => "weights that are tables of their values",
            Self::Vectors(..) => "weights that are tables of vectors",
            Self::Codes(Form { bits: 8, .. }) => "weights in 8 bits",
            Self::Codes(Form { bits: 4, .. }) => "weights in 4 bits",
            Self::Codes(Form { bits: 3, .. }) => "weights in 3 bits",
            Self::Codes(Form { bits: 2, .. }) => "weights in 2 bits",
            Self::Codes(_) => "weights in 1 bit",
        }
    }
}

/// A weight that may be stored in other ways.
pub(in crate::passes) struct Site {
    pub(super) weight: Outlet,
    pub(super) name: String,
    /// Tells it from all others, whatever becomes of those.
    pub(super) label: String,
    /// How many layers multiply by it.
    pub(super) readers: usize,
    /// Bytes of it as it is.
    pub(super) whole: f64,
    /// The layers, where all of them are of one form and nothing else reads it.
    linear: Vec<Linear>,
    plane: Plane,
    shape: Option<Shape>,
    known: Option<Known>,
    pub(super) key: u64,
}

/// A weight stored in one way.
pub(in crate::passes) struct Coded {
    pub(super) weight: Weight,
    /// What it loses, relative and squared, in the metric of what is read.
    pub(super) error: f64,
    /// Bytes of all that it takes in the file.
    pub(super) bytes: f64,
    /// (W − Ŵ)·μ of all groups, where that goes into a bias.
    pub(super) lost: Option<Vec<f64>>,
}

/// Elements of the smallest weight that is looked at.
const FEWEST: usize = 64;

impl Site {
    /// The weight that `value` is: a matrix at least, in the element type of floats, of more than a few elements, in more than `fewest` bits.
    /// An error is why it is none that may be stored otherwise.
    pub(super) fn of(
        graph: &Graph,
        value: Outlet,
        (statistics, cx): (&Statistics, &Context),
        (outermost, fewest): (bool, u32),
    ) -> Result<Option<Self>, &'static str> {
        if !is_large(graph, value) {
            return Ok(None);
        }
        let weight = objection(graph, value, cx, fewest)?;
        let linear = layers(graph, value).unwrap_or_default();
        let shape = linear.first().map(|first| {
            let shape = shape_of(graph, first);
            // Directions of a recurrence are groups of their own.
            if first.is_recurrent() { Shape { groups: first.groups, makes: first.rows, ..shape } } else { shape }
        });
        let takes_bias = |linear: &Linear| linear.is_direct() && !matches!(Bias::of(graph, linear), Bias::Outside);
        let known = (outermost && !linear.is_empty()).then(|| Known::of(graph, linear.clone(), statistics)).flatten();
        let known = known.map(|known| known.taking_bias(linear.iter().all(takes_bias)));
        let mut hasher = Xxh3::new();
        hasher.update(&weight.value().hash().to_le_bytes());
        let axis = linear.first().map(Linear::output_axis);
        hasher.update(
            format!("{shape:?} {axis:?} {} {:?}", graph.opset(), known.as_ref().map(|known| known.takes_bias))
                .as_bytes(),
        );
        if let Some(known) = &known {
            known.identify(graph, statistics, &mut hasher);
        }
        let made = |linear: &Linear| graph.name(linear.node.out()).to_owned();
        let label = if linear.is_empty() { graph.name(value).to_owned() } else { linear.iter().map(made).collect() };
        Ok(Some(Self {
            weight: value,
            name: graph.name(value).to_owned(),
            label,
            readers: linear.len().max(1),
            whole: weight.stored_bytes() as f64,
            plane: Plane::new(weight.value().dims(), linear.first()),
            linear,
            shape,
            known,
            key: hasher.digest(),
        }))
    }

    /// The layers that multiply by it.
    pub(super) fn layers(&self) -> &[Linear] {
        &self.linear
    }

    /// The weight stored in a way, if that is possible.
    pub(super) fn code(&self, graph: &Graph, statistics: &Statistics, way: Way) -> Option<Coded> {
        let tensor = graph.constant(self.weight)?;
        let values = tensor.f64s()?;
        let metrics = match (&self.known, &self.shape) {
            (Some(known), Some(shape)) => known.metrics(graph, statistics, shape)?,
            _ => Vec::new(),
        };
        let weight = match way {
            Way::Half => half(tensor, &values)?,
            Way::Exact => coding::exact_table(tensor, packs(graph.opset()))?,
            Way::Codes(form) => {
                (graph.opset() >= least_opset(form)).then_some(())?;
                let tile = self.plane.tile(form.tiling)?;
                let form = (form.scheme, form.bits, &tile[..]);
                let storage = coding::fit((&self.plane, form), (tensor.dtype(), tensor.dims()), &values, &metrics)?;
                Weight::stored(storage)?
            }
            Way::Vectors(bits, width) => {
                let form = (&self.plane, (bits, width));
                Weight::stored(coding::fit_vectors(form, (tensor.dtype(), tensor.dims()), &values, &metrics)?)?
            }
        };
        let bytes = spelled_bytes(graph, self.weight, &weight)? as f64;
        let stored = weight.value().f64s()?;
        stored.iter().all(|value| value.is_finite()).then_some(())?;
        let (before, after) = (self.plane.matrices(&values), self.plane.matrices(&stored));
        let lost: Vec<DMatrix<f64>> = before.iter().zip(&after).map(|(before, after)| before - after).collect();
        let energy = |matrices: &[DMatrix<f64>]| {
            let of = |(group, matrix): (usize, &DMatrix<f64>)| {
                let some = some_rows(matrix);
                match metrics.get(group.min(metrics.len().max(1) - 1)) {
                    Some(metric) => metric.times(&some).dot(&some),
                    None => Metric::Identity.times(&some).dot(&some),
                }
            };
            matrices.iter().enumerate().map(of).sum::<f64>()
        };
        let whole = energy(&before);
        let error = if whole > 0.0 { energy(&lost).max(0.0) / whole } else { 0.0 };
        let lost = if error > 0.0 { self.means(graph, statistics) } else { None }.map(|means| {
            let of_group = |(lost, mean): (&DMatrix<f64>, &DVector<f64>)| (lost * mean).as_slice().to_vec();
            lost.iter().zip(&means).flat_map(of_group).collect()
        });
        Some(Coded { weight, error, bytes, lost })
    }

    /// μ of what each group reads, where what is lost of it goes into a bias.
    fn means(&self, graph: &Graph, statistics: &Statistics) -> Option<Vec<DVector<f64>>> {
        self.known.as_ref().filter(|known| known.takes_bias)?.means(graph, statistics, self.shape.as_ref()?)
    }
}

/// Whether the constant `value` is of floats, a matrix at least, and of more than a few elements.
fn is_large(graph: &Graph, value: Outlet) -> bool {
    let Kind::Const(constant) = graph.kind(value.node) else { return false };
    let tensor = constant.weight.value();
    let is_float = matches!(tensor.dtype(), DType::Float | DType::Double | DType::Float16);
    // What has one axis only, such as a bias for each channel, has no rows.
    let is_matrix = tensor.dims().iter().filter(|extent| **extent > 1).count() > 1;
    let is_of_gates = |(node, inlet): &(NodeId, Inlet)| {
        ["LSTM", "GRU", "RNN"].iter().any(|kind| graph.op_of(*node, kind).is_some()) && *inlet > Inlet::Slot(2)
    };
    let uses = graph.uses(value);
    is_float && is_matrix && tensor.len() >= FEWEST && (uses.is_empty() || !uses.iter().all(is_of_gates))
}

/// The weight that `value` is; an error is why it may not be stored in other ways, or in none of `fewest` bits.
fn objection<'g>(graph: &'g Graph, value: Outlet, cx: &Context, fewest: u32) -> Result<&'g Weight, &'static str> {
    let weight = graph.weight(value).ok_or("is listed as an input, for which a caller may feed another")?;
    let bits = match weight.storage() {
        Storage::Dense => None,
        Storage::Half => Some(16),
        Storage::Affine(_) | Storage::Codebook(_) => weight.storage().codes().map(Codes::bits),
        Storage::Vectors(_) => Some(0),
    };
    let nodes: Vec<_> = graph.uses(value).into_iter().map(|(node, _)| graph.label(node)).collect();
    let objections = [
        (bits.is_some_and(|bits| bits <= fewest), "is stored in as few bits already"),
        (
            weight.storage().codes().is_some() && is_between_codes(graph, value.node),
            "is multiplied with integers as it is",
        ),
        (cx.is_kept(&[graph.name(value)]) || cx.is_kept(&nodes), "kept by --keep"),
        (graph.is_pinned(value), "is named by an annotation or by training information"),
        (graph.is_output(value), "is an output of the graph"),
        (!weight.value().is_finite(), "holds values that are not finite"),
    ];
    objections.into_iter().find(|(holds, _)| *holds).map_or(Ok(weight), |(_, why)| Err(why))
}

/// Rows of `matrix` that tell its energy: all, or of large ones, equally spaced ones.
fn some_rows(matrix: &DMatrix<f64>) -> DMatrix<f64> {
    const FEWEST: usize = 256;
    const WORK: f64 = 1e10;
    let (rows, columns) = matrix.shape();
    let most = ((WORK / (columns as f64).powi(2)) as usize).max(FEWEST);
    let step = rows.div_ceil(most).max(1);
    if step == 1 { matrix.clone() } else { matrix.select_rows(&(0..rows).step_by(step).collect::<Vec<_>>()) }
}

/// The layers that multiply by `weight`, if nothing else reads it and all of them are of one form.
fn layers(graph: &Graph, weight: Outlet) -> Option<Vec<Linear>> {
    let of_use = |(node, inlet): (_, Inlet)| {
        let mut found = Linear::within(graph, node).into_iter();
        found.find(|linear| linear.weight == weight && inlet == Inlet::Slot(linear.slot()))
    };
    let layers = graph.uses(weight).into_iter().map(of_use).collect::<Option<Vec<_>>>()?;
    let first = layers.first()?;
    let kind = |linear: &Linear| graph.op(linear.node).map(|op| op.op_type().to_owned());
    let form =
        |linear: &Linear| (kind(linear), linear.groups, linear.rows, linear.taps, linear.spread, linear.output_axis());
    layers.iter().all(|linear| form(linear) == form(first)).then_some(layers)
}

/// `tensor` in half precision; `None` where an element is too large for that, or it is no wider.
fn half(tensor: &Tensor, values: &[f64]) -> Option<Weight> {
    let halves = Tensor::floats(DType::Float16, tensor.dims(), values)?;
    halves.is_finite().then_some(())?;
    Weight::half(Tensor::floats(tensor.dtype(), tensor.dims(), &halves.f64s()?)?)
}
