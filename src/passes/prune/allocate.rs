//! How many channels of each layer go: always those next that cost the least error for what they save, until the price is
//! reached. At every stop all layers pay the same price for a byte (or a multiply-add), which is what a joint optimum does.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{Group, curve::Curve};
use crate::{
    analysis::{
        channels::Channels,
        cost::{latency, macs},
        shapes::Shapes,
    },
    ir::{Graph, Kind, NodeId, Outlet},
    pass::{Minimize, Price},
};

/// An extent, as so many that stay and so many that each stay as long as the units of some groups do.
struct Extent {
    fixed: f64,
    /// How many there are in all, and the groups whose shares that are left they are multiplied by.
    parts: Vec<(f64, Vec<usize>)>,
}

/// A cost that is a product of extents.
struct Term {
    factor: f64,
    extents: Vec<Extent>,
}

/// What a graph costs, by how many units of each group are left.
pub(super) struct Costs {
    terms: Vec<Term>,
    /// The terms that each group is in.
    of_group: Vec<Vec<usize>>,
}

impl Extent {
    /// How many there are where such shares of the groups are left.
    fn at(&self, left: &[f64]) -> f64 {
        self.fixed + self.parts.iter().map(|(count, groups)| product(*count, groups, left)).sum::<f64>()
    }

    /// How many go with the whole of a group.
    fn slope(&self, group: usize, left: &[f64]) -> f64 {
        let own = self.parts.iter().filter(|part| part.1.contains(&group));
        let others = |groups: &[usize]| groups.iter().copied().filter(|&g| g != group).collect::<Vec<_>>();
        own.map(|(count, groups)| product(*count, &others(groups), left)).sum()
    }
}

fn product(count: f64, groups: &[usize], left: &[f64]) -> f64 {
    groups.iter().map(|&group| left[group]).fold(count, |product, share| product * share)
}

impl Costs {
    /// The costs of `graph` of the kind that is to be saved.
    pub(super) fn of(
        graph: &Graph,
        shapes: &Shapes,
        channels: &Channels,
        groups: &[Group],
        minimize: Minimize,
    ) -> Self {
        let mut group_of = BTreeMap::new();
        for (i, group) in groups.iter().enumerate() {
            group_of.extend(group.units.iter().map(|&class| (class, i)));
        }
        let extent = |value: Outlet, axis: usize| {
            let length = channels.extent(value, axis)?;
            let mut counts: BTreeMap<Vec<usize>, f64> = BTreeMap::new();
            for index in 0..length {
                let classes = channels.classes(value, axis, index).iter();
                let groups: BTreeSet<usize> = classes.filter_map(|class| group_of.get(class).copied()).collect();
                *counts.entry(groups.into_iter().collect()).or_default() += 1.0;
            }
            let fixed = counts.remove(&vec![]).unwrap_or(0.0);
            Some(Extent { fixed, parts: counts.into_iter().map(|(groups, count)| (count, groups)).collect() })
        };
        let mut terms = Vec::new();
        let mut term = |whole: f64, axes: &[(Outlet, usize)]| {
            let all: Option<Vec<_>> = axes.iter().map(|&(value, axis)| extent(value, axis)).collect();
            let Some(all) = all else { return };
            let extents = |all: Vec<Extent>| all.into_iter().filter(|e| !e.parts.is_empty()).collect::<Vec<_>>();
            let full = vec![1.0; groups.len()];
            let extents = extents(all);
            if !extents.is_empty() {
                let product: f64 = extents.iter().map(|extent| extent.at(&full)).product();
                terms.push(Term { factor: whole / product.max(1.0), extents });
            }
        };
        for id in graph.node_ids() {
            for (cost, axes) in parts(graph, shapes, id, minimize) {
                term(cost, &axes);
            }
        }
        let mut of_group = vec![Vec::new(); groups.len()];
        for (i, term) in terms.iter().enumerate() {
            for &group in term.extents.iter().flat_map(|extent| &extent.parts).flat_map(|part| &part.1) {
                if of_group[group].last() != Some(&i) {
                    of_group[group].push(i);
                }
            }
        }
        Self { terms, of_group }
    }

    /// What the whole of `group` costs where such shares of all groups are left.
    fn marginal(&self, group: usize, left: &[f64]) -> f64 {
        let terms = self.of_group[group].iter().map(|&i| &self.terms[i]);
        let each = |term: &Term| {
            let extents: Vec<f64> = term.extents.iter().map(|extent| extent.at(left)).collect();
            let product: f64 = extents.iter().product();
            let shares = term
                .extents
                .iter()
                .zip(&extents)
                .map(|(extent, at)| extent.slope(group, left) / at.max(f64::MIN_POSITIVE));
            term.factor * product * shares.sum::<f64>()
        };
        terms.map(each).sum()
    }
}

/// What a node costs, in parts that are each in proportion to the extents of some axes.
fn parts(graph: &Graph, shapes: &Shapes, node: NodeId, minimize: Minimize) -> Vec<(f64, Vec<(Outlet, usize)>)> {
    let all = |value: Outlet| (0..shapes.rank(value).unwrap_or(0)).map(|axis| (value, axis)).collect::<Vec<_>>();
    let of_products = || factors(graph, shapes, node).unwrap_or_default();
    match minimize {
        Minimize::Bytes => match graph.kind(node) {
            Kind::Const(constant) => vec![(constant.weight.stored_bytes() as f64, all(node.out()))],
            _ => Vec::new(),
        },
        Minimize::Macs => macs(graph, shapes, node).map(|macs| (macs, of_products())).into_iter().collect(),
        Minimize::LatencyModel => {
            let Some(latency) = latency(graph, shapes, node) else { return Vec::new() };
            let mut parts = vec![(latency.results, all(node.out()))];
            parts.extend((latency.products > 0.0).then(|| (latency.products, of_products())));
            parts.extend(latency.weights.map(|(weight, time)| (time, all(weight))));
            parts
        }
    }
}

/// The axes whose extents the multiply-adds of a layer are the product of, but for some that no channels stand along.
fn factors(graph: &Graph, shapes: &Shapes, node: NodeId) -> Option<Vec<(Outlet, usize)>> {
    let op = graph.op(node)?;
    if op.is("Conv") || op.is("ConvTranspose") {
        return graph.operand(node, 1).map(|weight| vec![(weight, 0), (weight, 1)]);
    }
    let a = graph.operand(node, 0)?;
    let flipped = op.is("Gemm") && op.int("transA") == Some(1);
    let inner = if flipped { 0 } else { shapes.rank(a)?.checked_sub(1)? };
    let results = (0..shapes.rank(node.out()).unwrap_or(0)).map(|axis| (node.out(), axis));
    Some(results.chain([(a, inner)]).collect())
}

/// The counts that a group can be left with, from the full one down, each with the error there and the slope towards it: the
/// error for each unit on the lower convex hull of the curve.
struct Steps {
    counts: Vec<usize>,
    slopes: Vec<f64>,
}

impl Steps {
    fn of(curve: &Curve, group: &Group, multiple: usize) -> Self {
        let allowed = |gone: usize| (group.width - gone).is_multiple_of(multiple);
        let error = |gone: usize| if gone == 0 { 0.0 } else { curve.errors[gone - 1] };
        let gone: Vec<usize> = (0..=curve.order.len()).filter(|&gone| gone == 0 || allowed(gone)).collect();
        let mut hull: Vec<usize> = Vec::new();
        for &next in &gone {
            while let [.., a, b] = hull[..] {
                let slope = |from: usize, to: usize| (error(to) - error(from)) / (to - from) as f64;
                if slope(a, b) < slope(b, next) {
                    break;
                }
                hull.pop();
            }
            hull.push(next);
        }
        let slope = |step: usize| {
            let end = hull.partition_point(|&point| point < step);
            let (from, to) = (hull[end - 1], hull[end]);
            ((error(to) - error(from)) / (to - from) as f64).max(0.0)
        };
        let slopes = gone[1..].iter().map(|&step| slope(step)).collect();
        Self { counts: gone.iter().map(|gone| group.units.len() - gone).collect(), slopes }
    }
}

/// How many units of each group go at `price`; what is left of each is a multiple of its number in `multiples`.
pub(super) fn allocate(
    groups: &[Group],
    curves: &[Arc<Curve>],
    costs: &Costs,
    price: Price,
    multiples: &[usize],
) -> Vec<usize> {
    let steps = groups.iter().zip(curves).zip(multiples);
    let steps: Vec<_> = steps.map(|((group, curve), &multiple)| Steps::of(curve, group, multiple)).collect();
    let sizes: Vec<_> = groups.iter().map(|group| group.units.len() as f64).collect();
    let mut left: Vec<usize> = groups.iter().map(|group| group.units.len()).collect();
    let mut at = vec![0; groups.len()];
    let mut spare = price.spare;
    // A step changes what those of the groups save that share a term with it: all are looked at again.
    for step in 0.. {
        let filling = step >= price.steps;
        let shares: Vec<f64> = left.iter().zip(&sizes).map(|(&left, size)| left as f64 / size).collect();
        let offer = |i: usize| {
            let slope = *steps[i].slopes.get(at[i])?;
            let next = steps[i].counts[at[i] + 1];
            let each = costs.marginal(i, &shares) / sizes[i];
            let error = curves[i].errors[groups[i].units.len() - next - 1];
            let asked = if slope <= 0.0 { 0.0 } else { slope * groups[i].sensitivity / each };
            let pays = each > 0.0 && error <= price.ceiling && (filling || asked < price.per_byte);
            pays.then_some(Offer { group: i, asked, saved: each * (left[i] - next) as f64 })
        };
        let offers: Vec<_> = (0..groups.len()).filter_map(offer).collect();
        // What is saved beyond the end is worth nothing.
        let asked = |offer: &Offer| offer.asked * if filling { offer.saved / offer.saved.min(spare) } else { 1.0 };
        let best = offers.iter().filter(|_| !filling || spare > 0.0);
        let best = best.min_by(|a, b| asked(a).total_cmp(&asked(b)).then(a.group.cmp(&b.group)));
        let Some(offer) = best else { break };
        if filling {
            spare -= offer.saved;
        }
        at[offer.group] += 1;
        left[offer.group] = steps[offer.group].counts[at[offer.group]];
    }
    groups.iter().zip(&left).map(|(group, left)| group.units.len() - left).collect()
}

/// The next step of a group: the error for what is saved, and what is saved in all.
struct Offer {
    group: usize,
    asked: f64,
    saved: f64,
}
