//! See [`Prune`].

use std::collections::{BTreeMap, BTreeSet};

use super::surgery::{remove, spare};
use crate::{
    analysis::{
        channels::{Channels, Role, Side},
        shapes::Shapes,
    },
    ir::{Graph, tensor::strides},
    pass::{Context, Declare, Fidelity, Pass, open_to_loss},
};

/// Remove whole channels of `Conv`, `ConvTranspose`, `Gemm` and `MatMul`, and everything that hangs on them.
///
/// A channel goes together with its bias, normalization, depthwise filters, the channels that residual additions,
/// concatenations, splits and flattenings tie it to, and the slices of the weights that read it. Constant shapes and
/// declared shapes follow.
///
/// Applies when: no operator on the way is one that the channel can't be followed through, and the channel is no input
/// or output of the model. What is pinned so is reported with the reason.
///
/// Fidelity: lossy. Without `ratio`, the error budget decides how many channels of each layer go. What is left of the
/// channels of a convolution is then a multiple of 16, or of 8 or less where that is all that their count was a multiple
/// of: runtimes compute in blocks of so many, and are several times slower where a block is not full.
#[derive(Debug, clap::Parser)]
#[command(name = "prune")]
pub(super) struct Prune {
    /// The share of the channels of every layer that goes, between 0 and 1.
    #[arg(long, value_parser = super::share)]
    ratio: Option<f64>,
    /// What makes a channel matter.
    #[arg(long, value_enum, default_value = "l2")]
    score: Score,
    /// The counts of channels that are left are multiples of this, or of the largest power of two that the counts before
    /// and it have in common; 16 for convolutions where the budget decides, else 1.
    #[arg(long, value_parser = super::positive)]
    multiple: Option<usize>,
}

/// What makes a channel matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Score {
    /// The sum of the absolute weights that make it (Li 2017).
    L1,
    /// The Euclidean norm of the weights that make it (Li 2017).
    L2,
    /// The mean absolute weight that reads it (He 2014).
    Onorm,
}

/// The channels that onnxruntime computes at a time on processors with AVX-512; it is half of that on others.
const BLOCK: usize = 16;

impl Declare for Prune {
    const NAME: &'static str = "prune";
    const FIDELITY: Fidelity = Fidelity::Lossy;
}

impl Pass for Prune {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        let shapes = cx.shapes(graph);
        self.prune(graph, &shapes, cx);
        Ok(())
    }

    fn is_fixed(&self) -> bool {
        self.ratio.is_some()
    }
}

/// Channels that are made side by side: the classes along the axes that the same weights make.
struct Layer {
    classes: BTreeSet<usize>,
    /// How many classes there are with those that are pinned.
    width: usize,
    /// The weights that make and read them, once each.
    sides: Vec<Side>,
}

/// The layers whose channels may go; those that are pinned or kept are reported.
fn layers(graph: &Graph, channels: &Channels, cx: &mut Context) -> Vec<Layer> {
    let classes = |side: &Side| -> BTreeSet<usize> {
        let extent = channels.extent(side.weight, side.axis).unwrap_or(0);
        (0..extent).filter_map(|i| channels.class(side.weight, side.axis, i)).collect()
    };
    let mut layers: Vec<Layer> = Vec::new();
    for side in channels.sides.iter().filter(|side| side.role == Role::Makes) {
        let mut own = Layer { classes: classes(side), width: 0, sides: vec![*side] };
        let (joined, apart): (Vec<_>, Vec<_>) =
            layers.into_iter().partition(|layer| !layer.classes.is_disjoint(&own.classes));
        layers = apart;
        for layer in joined {
            own.classes.extend(layer.classes);
            own.sides.extend(layer.sides);
        }
        layers.push(own);
    }
    layers.sort_by_key(|layer| layer.classes.first().copied());
    for layer in &mut layers {
        let readers = channels.sides.iter().filter(|side| side.role == Role::Reads);
        layer.sides.extend(readers.filter(|side| !classes(side).is_disjoint(&layer.classes)));
        let mut seen = BTreeSet::new();
        layer.sides.retain(|side| seen.insert((side.weight, side.axis)));
    }
    layers.retain_mut(|layer| {
        let names: Vec<_> = layer.sides.iter().map(|side| graph.name(side.weight)).collect();
        let users = layer.sides.iter().flat_map(|side| graph.uses(side.weight));
        let labels: Vec<_> = users.map(|(node, _)| graph.label(node)).collect();
        let first = names.first().copied().unwrap_or_default();
        if cx.is_kept(&names) || cx.is_kept(&labels) {
            cx.decline(first, "kept by --keep");
            return false;
        }
        if layer.sides.iter().any(|side| graph.is_pinned(side.weight)) {
            cx.decline(first, "is named by an annotation or by training information");
            return false;
        }
        layer.width = layer.classes.len();
        let reason = layer.classes.iter().find_map(|&class| channels.pinned(class)).map(str::to_owned);
        layer.classes.retain(|&class| channels.pinned(class).is_none());
        if let (true, Some(reason)) = (layer.classes.is_empty(), reason) {
            cx.decline(first, &format!("its channels must stay: {reason}"));
        }
        !layer.classes.is_empty()
    });
    layers
}

impl Prune {
    /// Prunes `graph`, then the bodies in it: the values that they share are pinned on both sides.
    fn prune(&self, graph: &mut Graph, shapes: &Shapes, cx: &mut Context) {
        let channels = Channels::of(graph, shapes);
        let layers = layers(graph, &channels, cx);
        let mut doomed = BTreeMap::new();
        for layer in &layers {
            doomed.extend(self.choose(graph, &channels, layer, cx));
        }
        spare(&channels, &mut doomed);
        cx.add("channels removed", doomed.len());
        if !doomed.is_empty() {
            remove(graph, &channels, &doomed.into_keys().collect(), Self::NAME);
        }
        for id in open_to_loss(graph, self.is_fixed(), cx) {
            let inside: Vec<_> = graph.op(id).map_or_else(Vec::new, |op| {
                op.bodies.iter().map(|body| shapes.inside(graph, id, &body.graph)).collect()
            });
            for (body, shapes) in graph.bodies_mut(id).iter_mut().zip(&inside) {
                self.prune(&mut body.graph, shapes, cx);
            }
        }
    }

    /// The channels of `layer` that go, each with its score.
    fn choose(&self, graph: &Graph, channels: &Channels, layer: &Layer, cx: &mut Context) -> Vec<(usize, f64)> {
        let mut scores: BTreeMap<usize, f64> = layer.classes.iter().map(|&class| (class, 0.0)).collect();
        let mut bytes: BTreeMap<usize, f64> = BTreeMap::new();
        let wanted = if self.score == Score::Onorm { Role::Reads } else { Role::Makes };
        for side in &layer.sides {
            let Some(weight) = graph.weight(side.weight) else { continue };
            let Some(values) = weight.value().f64s() else { continue };
            let extent = weight.value().dims()[side.axis];
            let norms = self.norms(&values, weight.value().dims(), side.axis);
            for (i, norm) in norms.into_iter().enumerate() {
                let Some(class) = channels.class(side.weight, side.axis, i) else { continue };
                *bytes.entry(class).or_default() += weight.stored_bytes() as f64 / extent as f64;
                if side.role == wanted
                    && let Some(score) = scores.get_mut(&class)
                {
                    *score += norm;
                }
            }
        }
        let total: f64 = scores.values().map(|s| s * s).sum();
        let mut ranked: Vec<_> = scores.into_iter().collect();
        ranked.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
        if !total.is_finite() {
            cx.decline(graph.name(layer.sides[0].weight), "its weights are not finite");
            return Vec::new();
        }
        // The last channel of a layer stays.
        let most = ranked.len() - 1;
        let share = |score: f64| if total > 0.0 { score * score / total } else { 0.0 };
        let count = if let Some(ratio) = self.ratio {
            ((ratio * ranked.len() as f64).floor() as usize).min(most)
        } else {
            let saved = |class: &usize| bytes.get(class).copied().unwrap_or(0.0);
            let mut error = 0.0;
            let mut pays = |(class, score): &(usize, f64)| {
                error += share(*score);
                share(*score) < cx.price.per_byte * saved(class) && error <= cx.price.ceiling
            };
            ranked.iter().take(most).take_while(|unit| pays(unit)).count()
        };
        let count = self.rounded(count, layer, graph);
        cx.predicted += ranked[..count].iter().map(|unit| share(unit.1)).sum::<f64>();
        if count > 0 {
            cx.count("layers pruned");
        }
        ranked.truncate(count);
        ranked
    }

    /// `count`, less what makes the channels that are left a multiple of what runtimes compute in.
    fn rounded(&self, count: usize, layer: &Layer, graph: &Graph) -> usize {
        let is_convolution = |side: &Side| graph.constant(side.weight).is_some_and(|weight| weight.dims().len() > 2);
        let wanted = match self.multiple {
            Some(multiple) => multiple,
            None if self.ratio.is_none() && layer.sides.iter().any(is_convolution) => BLOCK,
            None => 1,
        };
        let common = 1 << wanted.trailing_zeros().min(layer.width.trailing_zeros());
        let multiple = if layer.width.is_multiple_of(wanted) { wanted } else { common };
        layer.width - (layer.width - count).next_multiple_of(multiple)
    }

    /// The norm of each slice along `axis`.
    fn norms(&self, values: &[f64], dims: &[usize], axis: usize) -> Vec<f64> {
        let (step, extent) = (strides(dims)[axis], dims[axis]);
        let mut sums = vec![0.0; extent];
        for (i, value) in values.iter().enumerate() {
            sums[i / step % extent] += if self.score == Score::L2 { value * value } else { value.abs() };
        }
        let each = (values.len() / extent.max(1)).max(1) as f64;
        sums.into_iter()
            .map(|sum| match self.score {
                Score::L1 => sum,
                Score::L2 => sum.sqrt(),
                Score::Onorm => sum / each,
            })
            .collect()
    }
}
