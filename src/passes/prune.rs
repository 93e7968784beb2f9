//! See [`Prune`].

mod allocate;
mod compensate;
mod curve;
mod pair;
mod score;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use xxhash_rust::xxh3::Xxh3;

use self::{
    allocate::{Costs, allocate},
    compensate::Compensation,
    curve::Curve,
    score::Score,
};
use super::surgery::{remove, spare};
use crate::{
    analysis::{
        channels::{Channels, Role, Side},
        moments,
        shapes::Shapes,
    },
    ir::{Body, Graph, Tensor, tensor::is_float},
    pass::{Context, Declare, Fidelity, Pass, open_to_loss},
};

/// Remove whole channels of `Conv`, `ConvTranspose`, `Gemm` and `MatMul`, and everything that hangs on them.
///
/// A channel goes together with its bias, normalization, depthwise filters, the channels that residual additions,
/// concatenations, splits and flattenings tie it to, and the slices of the weights that read it. Constant shapes and
/// declared shapes follow.
///
/// With samples, what the rest of the model reads less of is made up for: the weights that read the removed channels are
/// fitted to what the kept ones tell about them (affine least squares), and then all layers after the first change are
/// fitted again, one after another, to what they computed in the original (Y. He 2017; Zhang 2015).
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
    /// What makes a channel matter; obs where samples or batch normalizations tell what is read, else l2.
    #[arg(long, value_enum)]
    score: Option<Score>,
    /// How what is left makes up for what went: refit with samples, bias where batch normalizations alone tell what is read,
    /// else none.
    #[arg(long, value_enum)]
    compensate: Option<Compensate>,
    /// The counts of channels that are left are multiples of this, or of the largest power of two that the counts before
    /// and it have in common; 16 for convolutions where the error budget decides, 4 where a target does, else 1.
    #[arg(long, value_parser = super::positive)]
    multiple: Option<usize>,
}

/// How what is left makes up for what went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
enum Compensate {
    /// Not at all.
    None,
    /// By the biases of what reads it, which take the mean of what went.
    Bias,
    /// By the weights and biases of what reads it, fitted to what went.
    Fit,
    /// By those, and then by all layers after the first change, fitted to the original one after another.
    Refit,
}

/// What counts of channels are a multiple of where a target is to be met: a quarter of a block costs little accuracy, while odd
/// counts make `fmnist_resnet14` at half of its multiply-adds no faster than it was (now 0.74 of the time).
const SMALL_BLOCK: usize = 4;

/// The channels that onnxruntime computes at a time on processors with AVX-512; it is half of that on others.
const BLOCK: usize = 16;

impl Declare for Prune {
    const NAME: &'static str = "prune";
    const FIDELITY: Fidelity = Fidelity::Lossy;
}

impl Pass for Prune {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        let shapes = (cx.shapes(graph), cx.telling_shapes(graph));
        self.prune(graph, (&shapes.0, &shapes.1), cx, true);
        Ok(())
    }

    fn is_fixed(&self) -> bool {
        self.ratio.is_some()
    }
}

/// Channels that are made side by side: the classes along the axes that the same weights make.
struct Group {
    /// Classes that may go.
    units: Vec<usize>,
    /// How many classes there are with those that are pinned.
    width: usize,
    /// The weights that make and read them, once each.
    sides: Vec<Side>,
    /// What error of the whole model an error of what reads them makes, both relative and squared.
    sensitivity: f64,
}

impl Group {
    /// The units by their class.
    fn places(&self) -> BTreeMap<usize, usize> {
        self.units.iter().enumerate().map(|(i, &class)| (class, i)).collect()
    }

    /// Whether an axis of some weight is a product of both.
    fn shares_a_product(&self, other: &Self, channels: &Channels) -> bool {
        let (places, others) = (self.places(), other.places());
        let is_of = |a: &Side, b: &Side| (a.weight, a.axis) == (b.weight, b.axis);
        let mut both = self.sides.iter().filter(|side| other.sides.iter().any(|own| is_of(own, side)));
        both.any(|side| {
            (0..channels.extent(side.weight, side.axis).unwrap_or(0))
                .any(|i| place(&places, channels, side, i).is_some() && place(&others, channels, side, i).is_some())
        })
    }

    fn of_role(&self, role: Role) -> impl Iterator<Item = &Side> {
        self.sides.iter().filter(move |side| side.role == role)
    }
}

/// The unit with which an index of a side goes, by the [places](Group::places) of a group.
fn place(places: &BTreeMap<usize, usize>, channels: &Channels, side: &Side, index: usize) -> Option<usize> {
    channels.classes(side.weight, side.axis, index).iter().find_map(|class| places.get(class).copied())
}

/// The classes that are made side by side, in sets: those along an axis of a weight, and along each factor of one that is a
/// product.
fn families(channels: &Channels) -> Vec<BTreeSet<usize>> {
    let makers = channels.sides.iter().filter(|side| side.role == Role::Makes).map(|side| (side.weight, side.axis));
    let mut families: Vec<BTreeSet<usize>> = Vec::new();
    for (value, axis) in makers.chain(channels.factors()).filter(|&(value, axis)| !channels.is_product(value, axis)) {
        let extent = channels.extent(value, axis).unwrap_or(0);
        let mut own: BTreeSet<_> = (0..extent).flat_map(|i| channels.classes(value, axis, i)).copied().collect();
        let (joined, apart): (Vec<_>, Vec<_>) = families.into_iter().partition(|family| !family.is_disjoint(&own));
        families = apart;
        own.extend(joined.into_iter().flatten());
        families.push(own);
    }
    families.sort_by_key(|family| family.first().copied());
    families
}

/// The groups of channels that may go; those that are pinned or kept are reported.
fn groups(graph: &Graph, channels: &Channels, cx: &mut Context) -> Vec<Group> {
    let classes = |side: &Side| -> BTreeSet<usize> {
        let extent = channels.extent(side.weight, side.axis).unwrap_or(0);
        (0..extent).flat_map(|i| channels.classes(side.weight, side.axis, i)).copied().collect()
    };
    let of_sides: Vec<_> = channels.sides.iter().map(|side| (*side, classes(side))).collect();
    let is_shut = |class: &usize| channels.pinned(*class).is_some();
    let mut shut = BTreeSet::new();
    let open = families(channels).into_iter().filter_map(|classes| {
        let of_role = |role: Role| {
            let sides = of_sides.iter().filter(|(side, own)| side.role == role && !own.is_disjoint(&classes));
            sides.map(|(side, _)| *side).collect::<Vec<_>>()
        };
        let makers = of_role(Role::Makes);
        let mut sides = [makers.clone(), of_role(Role::Reads)].concat();
        let mut seen = BTreeSet::new();
        sides.retain(|side| seen.insert((side.weight, side.axis)));
        let names: Vec<_> = sides.iter().map(|side| graph.name(side.weight)).collect();
        let users = sides.iter().flat_map(|side| graph.uses(side.weight));
        let labels: Vec<_> = users.map(|(node, _)| graph.label(node)).collect();
        let first = graph.name(makers.first()?.weight);
        if cx.is_kept(&names) || cx.is_kept(&labels) {
            cx.decline(first, "kept by --keep");
            return None;
        }
        if sides.iter().any(|side| graph.is_pinned(side.weight)) {
            cx.decline(first, "is named by an annotation or by training information");
            return None;
        }
        let reason = classes.iter().find_map(|&class| channels.pinned(class)).map(str::to_owned);
        let width = classes.len();
        let units: Vec<_> = classes.into_iter().filter(|&class| channels.pinned(class).is_none()).collect();
        // A weight whose channels are products is reported once, and if no factor of them can lose anything.
        let made = of_sides.iter().find(|(side, _)| (side.weight, side.axis) == (makers[0].weight, makers[0].axis));
        if let Some(reason) = reason.filter(|_| made.is_some_and(|(_, own)| own.iter().all(is_shut)))
            && shut.insert(makers[0].weight)
        {
            cx.decline(first, &format!("its channels must stay: {reason}"));
        }
        let damaged = |weight: &Tensor| is_float(weight.dtype()) && !weight.is_finite();
        if sides.iter().any(|side| graph.constant(side.weight).is_some_and(damaged)) {
            cx.decline(first, "its weights are not finite");
            return None;
        }
        (!units.is_empty()).then_some(Group { units, width, sides, sensitivity: 1.0 })
    });
    open.collect()
}

/// The classes of the first `gone` units of `group` to go, with their places in that order.
fn doomed_of(group: &Group, curve: &Curve, gone: usize) -> BTreeMap<usize, f64> {
    curve.order[..gone].iter().enumerate().map(|(i, &unit)| (group.units[unit], i as f64)).collect()
}

/// The error of what reads a group at which the sensitivity of the model to it is measured, relative and squared: small
/// enough for the answer to be in proportion, and large enough to stand out.
const PROBED: f64 = 0.03;

/// Measures how much error of the whole model an error of what reads each group makes: each is pruned a little by itself, and where
/// its curve is one of norms, further too.
fn probe(
    (graph, channels, shapes): (&Graph, &Channels, &Shapes),
    groups: &mut [Group],
    curves: &[Arc<Curve>],
    cx: &mut Context,
) {
    if cx.yardstick.is_none() {
        return;
    }
    let moments = cx.statistics();
    // How much the model minds is measured once for each group: what other passes did before changes it little, and measuring it
    // anew at each step of a search takes longer than all else.
    let key = |(group, _): &(&Group, &Arc<Curve>)| {
        let mut hasher = Xxh3::new();
        let makers = group.of_role(Role::Makes).flat_map(|side| graph.uses(side.weight));
        // What a layer makes keeps its name, whatever becomes of its weights.
        let made = makers.flat_map(|(node, _)| (0..graph.output_count(node)).map(move |slot| node.at(slot)));
        made.for_each(|value| hasher.update(format!("{}\0", graph.name(value)).as_bytes()));
        hasher.digest()
    };
    let both: Vec<_> = groups.iter().zip(curves).collect();
    let yardstick = cx.yardstick_for(graph, both.iter().map(key));
    let at = |group: &Group, curve: &Curve, gone: usize| {
        let mut doomed = doomed_of(group, curve, gone);
        spare(channels, &mut doomed);
        let doomed = doomed.into_keys().collect();
        let mut trial = graph.clone();
        let compensation =
            Compensation::of((graph, channels, shapes), std::slice::from_ref(group), &doomed, &moments, false);
        remove(&mut trial, channels, &doomed, Prune::NAME);
        compensation.apply(&mut trial, Prune::NAME);
        let (error, predicted) = (yardstick.as_ref()?.error(&trial)?, curve.errors[gone - 1]);
        (predicted > 0.0 && error.is_finite()).then(|| error * error / predicted)
    };
    let one = |(group, curve): (&Group, &Arc<Curve>)| {
        let count = curve.errors.len();
        let gone = curve.errors.iter().position(|&error| error >= PROBED).map_or(count, |at| at + 1);
        // Norms say in which order channels go, but not how the error grows on the way.
        let further = Some(count.div_ceil(2)).filter(|&further| curve.is_blind && further > gone);
        let found = [Some(gone).filter(|&gone| gone > 0), further].into_iter().flatten();
        found.filter_map(|gone| at(group, curve, gone)).reduce(f64::max)
    };
    let found = cx.remember_all(&both, key, |&both| one(both));
    for (group, sensitivity) in groups.iter_mut().zip(found) {
        group.sensitivity = sensitivity.unwrap_or(1.0);
    }
}

impl Prune {
    /// Prunes `graph`, then the bodies in it: the values that they share are pinned on both sides. What is known of samples
    /// is known of the outermost graph. Costs are those at the first shapes, channels are followed at the other.
    fn prune(&self, graph: &mut Graph, (shapes, telling): (&Shapes, &Shapes), cx: &mut Context, outermost: bool) {
        let channels = Channels::of(graph, telling);
        let mut groups = groups(graph, &channels, cx);
        let mut doomed = BTreeMap::new();
        let curves = self.curves((graph, &channels, shapes), &groups, cx, outermost);
        if outermost && self.ratio.is_none() {
            probe((graph, &channels, shapes), &mut groups, &curves, cx);
        }
        for ((group, curve), gone) in
            groups.iter().zip(&curves).zip(self.counts(graph, &channels, shapes, &groups, &curves, cx))
        {
            if gone > 0 {
                cx.predicted += curve.errors[gone - 1] * group.sensitivity;
                cx.count("layers pruned");
            }
            doomed.extend(doomed_of(group, curve, gone));
        }
        spare(&channels, &mut doomed);
        cx.add("channels removed", doomed.len());
        if !doomed.is_empty() {
            let doomed = doomed.into_keys().collect();
            let compensate = if outermost { self.compensation(cx) } else { Compensate::None };
            let compensation = (compensate > Compensate::None).then(|| {
                Compensation::of(
                    (graph, &channels, shapes),
                    &groups,
                    &doomed,
                    &cx.statistics(),
                    compensate == Compensate::Bias,
                )
            });
            let kept = remove(graph, &channels, &doomed, Self::NAME);
            if outermost {
                cx.kept.narrow(kept);
            }
            if let Some(compensation) = compensation {
                compensation.mixed().for_each(|(name, axis, matrix)| cx.kept.mix(name, axis, matrix));
                let fitted = compensation.apply(graph, Self::NAME);
                cx.add("layers fitted to what went", fitted);
            }
            cx.refit |= compensate == Compensate::Refit;
        }
        for id in open_to_loss(graph, self.is_fixed(), cx) {
            let inside: Vec<_> = graph.op(id).map_or_else(Vec::new, |op| {
                let inside = |shapes: &Shapes, body: &Body| shapes.inside(graph, id, &body.graph);
                op.bodies.iter().map(|body| (inside(shapes, body), inside(telling, body))).collect()
            });
            for (body, (shapes, telling)) in graph.bodies_mut(id).iter_mut().zip(&inside) {
                self.prune(&mut body.graph, (shapes, telling), cx, false);
            }
        }
    }

    fn compensation(&self, cx: &Context) -> Compensate {
        self.compensate.unwrap_or(match (cx.moments.is_empty(), cx.prior.is_empty()) {
            (false, _) => Compensate::Refit,
            // What is known of the means is worth more than nothing (fmnist_resnet14 at 0.8 of its multiply-adds, without
            // samples: 84.7 % against 68.7).
            (true, false) => Compensate::Bias,
            (true, true) => Compensate::None,
        })
    }

    /// The order in which the units of each group go, and the error that this makes.
    fn curves(
        &self,
        place @ (graph, channels, _): (&Graph, &Channels, &Shapes),
        groups: &[Group],
        cx: &mut Context,
        outermost: bool,
    ) -> Vec<Arc<Curve>> {
        let none = moments::Table::new();
        let (table, others) = (cx.statistics(), Arc::clone(&cx.held_out));
        let (table, others) = if outermost { (&*table, &*others) } else { (&none, &none) };
        let score = self.score.unwrap_or(if table.is_empty() { Score::L2 } else { Score::Obs });
        let key = |group: &Group| score.key(graph, channels, group, table);
        cx.remember_all(groups, key, |group| score.curve(place, group, (table, others)))
    }

    /// How many units of each group go.
    fn counts(
        &self,
        graph: &Graph,
        channels: &Channels,
        shapes: &Shapes,
        groups: &[Group],
        curves: &[Arc<Curve>],
        cx: &Context,
    ) -> Vec<usize> {
        let multiples: Vec<_> = groups.iter().map(|group| self.multiple(group, graph, cx)).collect();
        if let Some(ratio) = self.ratio {
            // So many, less what makes those that are left a multiple. Of the factors of a product, the widest loses them.
            let is_wider = |other: usize, than: usize| {
                let (a, b) = (groups[other].units.len(), groups[than].units.len());
                (a > b || (a == b && other < than)) && groups[other].shares_a_product(&groups[than], channels)
            };
            let count = |i: usize| {
                if (0..groups.len()).any(|other| is_wider(other, i)) {
                    return 0;
                }
                let group = &groups[i];
                let wanted = ((ratio * group.units.len() as f64).floor() as usize).min(group.units.len() - 1);
                group.width - (group.width - wanted).next_multiple_of(multiples[i])
            };
            return (0..groups.len()).map(count).collect();
        }
        let costs = Costs::of(graph, shapes, channels, groups, cx.minimize);
        allocate(groups, curves, &costs, cx.price, &multiples)
    }

    /// What the count of channels that are left of `group` is to be a multiple of.
    fn multiple(&self, group: &Group, graph: &Graph, cx: &Context) -> usize {
        let is_convolution = |side: &Side| graph.constant(side.weight).is_some_and(|weight| weight.dims().len() > 2);
        let wanted = match self.multiple {
            Some(multiple) => multiple,
            None if self.ratio.is_none() && group.sides.iter().any(is_convolution) => {
                if cx.has_target {
                    SMALL_BLOCK
                } else {
                    BLOCK
                }
            }
            None => 1,
        };
        let common = 1 << wanted.trailing_zeros().min(group.width.trailing_zeros());
        if group.width.is_multiple_of(wanted) { wanted } else { common }
    }
}
