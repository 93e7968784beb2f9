//! Weights that may be replaced, with all layers that multiply by them.

use std::sync::Arc;

use nalgebra::{DMatrix, DVector};
use xxhash_rust::xxh3::Xxh3;

use super::dense::{self, Layer};
use crate::{
    analysis::{
        linear::Linear,
        moments::{Moments, Table, together_of_kept},
        shapes::Shapes,
    },
    factor::{Family, Metric, Shape, Target},
    ir::{DType, Graph, Inlet, NodeId, Outlet, Weight},
    pass::Context,
    refit::{Bias, Kept},
};

/// A weight, and all layers that multiply by it.
pub(in crate::passes) struct Site {
    pub(super) name: String,
    pub(super) weight: Outlet,
    pub(super) readers: Readers,
    pub(in crate::passes) shape: Shape,
    /// The layers as y = W·x, if all of them are of one form.
    views: Option<Vec<Linear>>,
    stacked: bool,
    /// How many axes what plain matrices multiply has, where that is one count and was [looked up](Self::look_up_rank).
    pub(super) rank: Option<usize>,
    /// What the layers read, if that is known.
    pub(super) known: Option<Known>,
    /// A hash of the weight and of what is known of what it multiplies.
    pub(in crate::passes) key: u64,
}

/// What is known of what layers read.
#[derive(Default)]
pub(in crate::passes) struct Statistics {
    table: Arc<Table>,
    kept: Kept,
}

impl Statistics {
    pub(in crate::passes) fn of(cx: &Context) -> Self {
        Self { table: cx.statistics(), kept: cx.kept.clone() }
    }

    fn moments(&self, graph: &Graph, layers: &[Linear]) -> Option<Vec<Moments>> {
        together_of_kept(&self.table, &self.kept, graph, layers)
    }
}

/// The layers that multiply by a weight.
pub(super) enum Readers {
    /// `Gemm`s and `MatMul`s.
    Dense(Vec<Layer>),
    /// Convolutions, or products with what recurrences read.
    Linear(Vec<Linear>),
}

/// What the moments of a table are of.
pub(in crate::passes) struct Known {
    /// The layers as they read the vectors that moments are of: pixels, where nothing is known of patches.
    layers: Vec<Linear>,
    /// Whether the layers can take what is lost of the mean in a bias.
    pub(in crate::passes) takes_bias: bool,
}

impl Readers {
    fn nodes(&self) -> Vec<NodeId> {
        match self {
            Self::Dense(layers) => layers.iter().map(|layer| layer.node).collect(),
            Self::Linear(layers) => layers.iter().map(|linear| linear.node).collect(),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Dense(layers) => layers.len(),
            Self::Linear(layers) => layers.len(),
        }
    }
}

/// The weights of `graph` that layers multiply by, or the name of each that can't be replaced, and why.
pub(super) fn sites(
    graph: &Graph,
    statistics: &Statistics,
    cx: &Context,
    outermost: bool,
) -> Vec<Result<Site, (String, String)>> {
    let weights_of = |node| {
        let dense = Layer::of(graph, node).map(|layer| layer.weight);
        let linear = Linear::within(graph, node).into_iter().filter(Linear::reads_input).map(|linear| linear.weight);
        linear.chain(dense)
    };
    let mut weights: Vec<Outlet> = graph.ops().into_iter().flat_map(weights_of).collect();
    weights.sort_unstable();
    weights.dedup();
    let site = |&weight: &Outlet| {
        let site = Site::of(graph, weight, (statistics, cx), outermost);
        site.map_err(|why| (graph.name(weight).to_owned(), why))
    };
    weights.iter().map(site).collect()
}

/// All that read `weight`, if each of them multiplies by it in one way.
fn readers(graph: &Graph, weight: Outlet) -> Option<Readers> {
    let mut layers = Vec::new();
    if dense::collect(graph, weight, &mut layers) && !layers.is_empty() {
        return Some(Readers::Dense(layers));
    }
    let of_use = |(node, inlet): (_, Inlet)| {
        let found = Linear::within(graph, node).into_iter().find(|linear| linear.weight == weight)?;
        (inlet == Inlet::Slot(found.slot()) && found.reads_input()).then_some(found)
    };
    let layers = graph.uses(weight).into_iter().map(of_use).collect::<Option<Vec<_>>>()?;
    let first = layers.first()?;
    let kind = |linear: &Linear| graph.op(linear.node).map(|op| op.op_type().to_owned());
    let form = |linear: &Linear| (kind(linear), linear.groups, linear.rows, linear.taps, linear.spread);
    let is_alike = |linear: &Linear| form(linear) == form(first);
    (!graph.is_output(weight) && layers.iter().all(is_alike)).then_some(Readers::Linear(layers))
}

impl Site {
    /// All layers that multiply by `weight`, or why it can't be replaced.
    pub(in crate::passes) fn of(
        graph: &Graph,
        weight: Outlet,
        (statistics, cx): (&Statistics, &Context),
        outermost: bool,
    ) -> Result<Self, String> {
        let readers = readers(graph, weight).ok_or("is also read by something that can't be split")?;
        let nodes = readers.nodes();
        let labels: Vec<_> = nodes.iter().map(|&node| graph.label(node)).collect();
        if cx.is_kept(&[graph.name(weight)]) || cx.is_kept(&labels) {
            return Err("kept by --keep".to_owned());
        }
        if graph.is_pinned(weight) {
            return Err("is named by an annotation or by training information".to_owned());
        }
        let tensor = graph.constant(weight).ok_or("is no constant")?;
        if !tensor.is_finite() {
            return Err("holds values that are not finite".to_owned());
        }
        let linear = match &readers {
            Readers::Dense(layers) => {
                let linear = |layer: &Layer| Linear::of(graph, layer.node).filter(|linear| linear.weight == weight);
                layers
                    .iter()
                    .map(linear)
                    .collect::<Option<Vec<_>>>()
                    .filter(|layers| layers.iter().all(|linear| linear.output_axis() == layers[0].output_axis()))
            }
            Readers::Linear(layers) => Some(layers.clone()),
        };
        let shape = if let Some(layers) = &linear {
            shape_of(graph, &layers[0])
        } else {
            let [groups @ .., rows, columns] = tensor.dims() else { return Err("is no matrix".to_owned()) };
            let groups = groups.iter().product();
            Shape { groups, makes: *rows, reads: *columns, kernel: Vec::new(), spreads: false }
        };
        let known = linear.clone().filter(|_| outermost).and_then(|layers| Known::of(graph, layers, statistics));
        let mut hasher = Xxh3::new();
        hasher.update(&tensor.hash().to_le_bytes());
        let axis = linear.as_ref().map(|layers| layers[0].output_axis());
        let takes_bias = known.as_ref().map(|known| known.takes_bias);
        hasher.update(format!("{shape:?} {axis:?} {takes_bias:?}").as_bytes());
        if let Some(known) = &known {
            known.identify(graph, statistics, &mut hasher);
        }
        let name = graph.name(weight).to_owned();
        let stacked = tensor.dims().len() > 2;
        Ok(Self { name, weight, readers, shape, views: linear, stacked, rank: None, known, key: hasher.digest() })
    }

    /// Whether the weight is a stack of matrices, by which a vector can't be multiplied twice.
    pub(in crate::passes) fn is_stack(&self) -> bool {
        matches!(self.readers, Readers::Dense(_)) && self.stacked
    }

    /// Looks up how many axes what plain matrices multiply has, which some forms go by.
    pub(in crate::passes) fn look_up_rank(&mut self, graph: &Graph, shapes: &Shapes) {
        let ranks: Vec<_> = self.operands(graph).map(|value| shapes.rank(value)).collect();
        self.rank = ranks.first().copied().flatten().filter(|_| ranks.iter().all(|rank| *rank == ranks[0]));
    }

    /// Whether the layers can become chains of a family.
    pub(in crate::passes) fn fits(&self, graph: &Graph, family: Family) -> bool {
        let is_dense = matches!(self.readers, Readers::Dense(_));
        let is_known = || {
            // Runtimes multiply matrices of doubles, but have no kernels for them.
            let dtype = self.stored(graph).map(|weight| weight.value().dtype());
            let is_float = match dtype {
                Some(DType::Float | DType::Float16) => true,
                Some(DType::Double) => !is_dense || family == Family::Kronecker,
                _ => false,
            };
            let takes_bias = |linear: &Linear| {
                let is_own = graph.op_of(linear.node, "MatMul").is_none();
                !is_own || Bias::of(graph, linear).values(graph, linear).is_some()
            };
            let layers = self.linear();
            is_float && !layers.is_empty() && layers.iter().all(|linear| !linear.is_recurrent() && takes_bias(linear))
        };
        // Shapes are operands from opset 5 on.
        let most = match family {
            Family::Grouped { .. } => 3,
            _ => usize::MAX,
        };
        let is_of_rows = || graph.opset() >= 5 && self.rank.is_some_and(|rank| (2..=most).contains(&rank));
        family.fits(&self.shape)
            && match family {
                Family::Grouped { .. } => is_known() && (!is_dense || is_of_rows()),
                Family::Kronecker => is_dense && is_known() && is_of_rows(),
                _ => true,
            }
    }

    /// The values that the layers multiply.
    pub(super) fn operands<'g>(&'g self, graph: &'g Graph) -> impl Iterator<Item = Outlet> + 'g {
        let slot = |node: NodeId| match &self.readers {
            Readers::Dense(layers) => layers.iter().find(|layer| layer.node == node).map_or(0, |layer| 1 - layer.slot),
            Readers::Linear(_) => 0,
        };
        self.nodes().filter_map(move |node| graph.operand(node, slot(node)))
    }

    /// The nodes of the layers.
    pub(in crate::passes) fn nodes(&self) -> impl Iterator<Item = NodeId> {
        self.readers.nodes().into_iter()
    }

    /// How many layers there are.
    pub(in crate::passes) fn readers(&self) -> usize {
        self.readers.len()
    }

    /// The layers as y = W·x, where all of them are of one form.
    pub(super) fn linear(&self) -> &[Linear] {
        self.views.as_deref().unwrap_or_default()
    }

    /// The weight as it stands in `graph`.
    pub(in crate::passes) fn stored<'g>(&self, graph: &'g Graph) -> Option<&'g Weight> {
        graph.weight(self.weight)
    }

    /// Whether the constant of a plain matrix holds Wᵀ.
    pub(super) fn is_flipped(&self) -> bool {
        matches!(self.readers, Readers::Dense(_))
            && self.linear().first().is_some_and(|linear| linear.output_axis() == 1)
    }

    /// W of each group, and how what it multiplies varies by `statistics`.
    pub(in crate::passes) fn target(&self, graph: &Graph, statistics: &Statistics) -> Option<Target> {
        let values = graph.constant(self.weight)?.f64s()?;
        let matrices = if let Some(linear) = self.linear().first() {
            linear.matrices(&values)
        } else {
            let (rows, columns) = (self.shape.makes, self.shape.reads);
            let group = |values: &[f64]| DMatrix::from_row_slice(rows, columns, values);
            values.chunks_exact((rows * columns).max(1)).map(group).collect()
        };
        let matrices = stacked(matrices, &self.shape);
        let metrics = match &self.known {
            Some(known) => known.metrics(graph, statistics, &self.shape)?,
            None => vec![Metric::Identity; matrices.len()],
        };
        Some(Target { matrices, metrics, shape: self.shape.clone() })
    }

    /// μ of what each group multiplies, where what is lost of it can be made up for.
    pub(super) fn means(&self, graph: &Graph, statistics: &Statistics) -> Option<Vec<DVector<f64>>> {
        self.known.as_ref().filter(|known| known.takes_bias)?.means(graph, statistics, &self.shape)
    }
}

/// Matrices of one group after the other, as those of as many groups as the shape has: directions of a recurrence read the same.
fn stacked(matrices: Vec<DMatrix<f64>>, shape: &Shape) -> Vec<DMatrix<f64>> {
    if matrices.len() == shape.groups {
        return matrices;
    }
    let mut whole = DMatrix::zeros(shape.makes, shape.reads);
    let mut first = 0;
    for matrix in matrices {
        whole.rows_mut(first, matrix.nrows()).copy_from(&matrix);
        first += matrix.nrows();
    }
    vec![whole]
}

/// The axes of the weight of a layer.
pub(in crate::passes) fn shape_of(graph: &Graph, linear: &Linear) -> Shape {
    if linear.is_recurrent() {
        let makes = linear.groups * linear.rows;
        return Shape { groups: 1, makes, reads: linear.columns, kernel: Vec::new(), spreads: false };
    }
    let kernel = graph.constant(linear.weight).map_or(&[][..], |tensor| tensor.dims().get(2..).unwrap_or(&[]));
    Shape {
        groups: linear.groups,
        makes: linear.rows / linear.spread,
        reads: linear.columns / linear.taps,
        kernel: kernel.to_vec(),
        spreads: linear.spread > 1 || graph.op_of(linear.node, "ConvTranspose").is_some(),
    }
}

impl Known {
    /// What is known of what `layers` read: patches, or else pixels.
    pub(in crate::passes) fn of(graph: &Graph, layers: Vec<Linear>, statistics: &Statistics) -> Option<Self> {
        let is_known = |layers: &[Linear]| statistics.moments(graph, layers).is_some();
        let layers = if is_known(&layers) {
            layers
        } else {
            layers.iter().map(Linear::by_pixels).collect::<Option<Vec<_>>>().filter(|layers| is_known(layers))?
        };
        let takes_bias =
            |linear: &Linear| !linear.is_recurrent() && Bias::of(graph, linear).values(graph, linear).is_some();
        let takes_bias = layers.iter().all(takes_bias);
        Some(Self { layers, takes_bias })
    }

    /// The same, where only some layers that could take a bias do.
    pub(in crate::passes) fn taking_bias(self, takes_bias: bool) -> Self {
        Self { takes_bias: self.takes_bias && takes_bias, ..self }
    }

    /// Tells `hasher` what it is of.
    pub(in crate::passes) fn identify(&self, graph: &Graph, statistics: &Statistics, hasher: &mut Xxh3) {
        for layer in &self.layers {
            hasher.update(layer.source(graph).as_bytes());
            hasher.update(format!("{:?}", statistics.kept.channels_of(graph.name(layer.input))).as_bytes());
        }
    }

    /// μ of what each group of layers of this shape multiplies.
    pub(in crate::passes) fn means(
        &self,
        graph: &Graph,
        statistics: &Statistics,
        shape: &Shape,
    ) -> Option<Vec<DVector<f64>>> {
        let moments = statistics.moments(graph, &self.layers)?;
        let taps = if shape.spreads { 1 } else { shape.taps() };
        let mean = |moments: &Moments| {
            let mean = moments.mean();
            // What is known of pixels holds at each place of a kernel.
            let repeat = shape.reads * taps / mean.len().max(1);
            DVector::from_fn(mean.len() * repeat, |i, _| mean[i / repeat])
        };
        Some(moments.iter().take(shape.groups).map(mean).collect())
    }

    /// How what the groups of layers of this shape multiply varies.
    pub(in crate::passes) fn metrics(
        &self,
        graph: &Graph,
        statistics: &Statistics,
        shape: &Shape,
    ) -> Option<Vec<Metric>> {
        let moments = statistics.moments(graph, &self.layers)?;
        let metric = |moments: &Moments| {
            let mut spread = if self.takes_bias { moments.covariance() } else { moments.second() };
            // Directions that few samples do not show are no free ones.
            let ridge = moments.ridge() * spread.diagonal().mean();
            if !ridge.is_finite() || ridge <= 0.0 {
                return Metric::Identity;
            }
            (0..spread.nrows()).for_each(|i| spread[(i, i)] += ridge);
            let is_of_channels = !shape.spreads && spread.nrows() < shape.reads * shape.taps();
            if is_of_channels { Metric::Channels(spread) } else { Metric::Full(spread) }
        };
        Some(moments.iter().take(shape.groups).map(metric).collect())
    }
}
