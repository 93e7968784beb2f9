//! Replacing layers by chains of cheaper ones: what the passes that do so share.

mod cost;
mod dense;
mod emit;
mod regroup;
mod site;

use std::{collections::BTreeSet, sync::Arc};

use xxhash_rust::xxh3::xxh3_64;

use self::{cost::Costs, regroup::Regrouped, site::sites};
pub(super) use self::{
    emit::Replacement,
    site::{Known, Site, Statistics, shape_of},
};
use super::{
    menu::{Candidate, Choosing, Menu, allocate, probe},
    reorder::settle,
};
use crate::{
    analysis::shapes::Shapes,
    factor::{Family, Form, Shape, Target, evbmf_rank},
    ir::{Graph, NodeId},
    linalg::Spectrum,
    pass::{Context, open_to_loss},
    refit::{Factored, Moved},
};

/// How strong the chains are that stand in place of layers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Strength {
    /// As the price of the error allows.
    Budget,
    /// Of this rank.
    Rank(usize),
    /// The cheapest that keep so large a share of the energy of what a layer makes.
    Energy(f64),
    /// Of the rank that stands out from noise.
    Evbmf,
}

impl Strength {
    /// Of the options of a pass, at most one of which is given.
    pub(super) fn of(rank: Option<usize>, energy: Option<f64>, evbmf: bool) -> Self {
        match (rank, energy) {
            (Some(rank), _) => Self::Rank(rank),
            (None, Some(energy)) => Self::Energy(energy),
            (None, None) if evbmf => Self::Evbmf,
            (None, None) => Self::Budget,
        }
    }

    pub(super) fn is_fixed(self) -> bool {
        self != Self::Budget
    }
}

/// A pass that replaces layers by chains of some families.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rewrite<'a> {
    /// The name of the pass.
    pub(super) name: &'static str,
    pub(super) families: &'a [Family],
    /// Those of which one is chosen wherever any makes a layer cheaper.
    pub(super) preferred: &'a [Family],
    pub(super) strength: Strength,
    /// What is said of layers that have no kernel which fits the families, if that is worth a word.
    pub(super) wants: &'static str,
}

/// The chains of a family that may stand in place of a layer, each with its error.
type Curve = Vec<(Form, f64)>;

/// What layers may become.
struct Choices<'s> {
    site: Site,
    /// Chains that cost less.
    menu: Menu<Form>,
    /// All chains of the first family that fits, those included that cost more.
    curve: Arc<Curve>,
    statistics: &'s Statistics,
    /// The name of the pass.
    pass: &'static str,
}

impl Choosing<Form> for Choices<'_> {
    fn menu(&self) -> &Menu<Form> {
        &self.menu
    }

    fn menu_mut(&mut self) -> &mut Menu<Form> {
        &mut self.menu
    }

    fn label(&self, graph: &Graph) -> String {
        let made = |node| (0..graph.output_count(node)).map(move |slot| graph.name(node.at(slot)));
        format!("{:?}", self.site.nodes().flat_map(made).collect::<Vec<_>>())
    }

    fn put(&self, graph: &Graph, candidate: Candidate<Form>) -> Option<Graph> {
        let chain = replacement(graph, &self.site, candidate.form, self.statistics)?;
        let mut trial = graph.clone();
        self.site.replace(&mut trial, candidate.form, &chain, self.pass)?;
        Some(trial)
    }
}

impl Rewrite<'_> {
    /// Replaces layers of the outermost graph, and of the bodies in it.
    pub(super) fn start(&self, graph: &mut Graph, cx: &mut Context) {
        let shapes = cx.shapes(graph);
        self.run(graph, &shapes, cx, true);
    }

    /// Replaces layers of `graph`, then those of the bodies in it.
    fn run(&self, graph: &mut Graph, shapes: &Shapes, cx: &mut Context, outermost: bool) {
        let statistics = Statistics::of(cx);
        let mut all = self.choices(graph, shapes, &statistics, cx, outermost);
        if outermost && !self.strength.is_fixed() {
            probe(graph, &mut all, self.name, cx);
        }
        if let (true, Some(products)) =
            (outermost, all.iter().find(|choices| choices.site.fits(graph, Family::Kronecker)))
            && self.families.contains(&Family::Kronecker)
        {
            // How often they won is said even where they never did.
            cx.tally.entry(word(Family::Kronecker.member(&products.site.shape, 1))).or_default();
        }
        let chosen = self.choose(&all, cx);
        let made: Vec<_> = all.iter().zip(chosen).filter_map(|(choices, chosen)| Some((choices, *chosen?))).collect();
        for choices in
            all.iter().filter(|choices| made.iter().all(|(other, _)| other.site.weight != choices.site.weight))
        {
            cx.decline(&choices.site.name, &self.reason(choices, cx));
        }
        // All are found before any is put in place, since what is known of layers is known by the names that values have.
        let key = |(choices, candidate): &(&Choices<'_>, Candidate<Form>)| {
            xxh3_64(format!("{} {:?} chain", choices.site.key, candidate.form).as_bytes())
        };
        let chains = cx.remember_all(&made, key, |(choices, candidate)| {
            replacement(graph, &choices.site, candidate.form, &statistics)
        });
        let mut gathers = BTreeSet::new();
        for ((choices, candidate), chain) in made.iter().zip(chains) {
            let chain = (*chain).as_ref();
            match chain.and_then(|chain| self.apply(graph, choices, (candidate.form, chain), cx, outermost)) {
                Some(own) => gathers.extend(own),
                None => cx.decline(&choices.site.name, "the chain holds values beyond what its type does"),
            }
        }
        if outermost {
            settle(graph, &gathers, cx, self.name);
        }
        for id in open_to_loss(graph, self.strength.is_fixed(), cx) {
            let bodies = graph.op(id).map_or(&[][..], |op| &op.bodies);
            let inside: Vec<_> = bodies.iter().map(|body| shapes.inside(graph, id, &body.graph)).collect();
            for (body, shapes) in graph.bodies_mut(id).iter_mut().zip(&inside) {
                self.run(&mut body.graph, shapes, cx, false);
            }
        }
    }

    /// What each weight of `graph` may become.
    fn choices<'s>(
        &self,
        graph: &Graph,
        shapes: &Shapes,
        statistics: &'s Statistics,
        cx: &mut Context,
        outermost: bool,
    ) -> Vec<Choices<'s>> {
        let mut fitting = Vec::new();
        for site in sites(graph, statistics, cx, outermost) {
            let Ok(mut site) = site.map_err(|(name, why)| cx.decline(&name, &why)) else { continue };
            let is_vector = |value| shapes.rank(value).is_none_or(|rank| rank < 2);
            if site.is_stack() && site.operands(graph).any(is_vector) {
                cx.decline(&site.name, "may multiply a vector, by a stack of matrices");
                continue;
            }
            site.look_up_rank(graph, shapes);
            if self.families.iter().any(|&family| site.fits(graph, family)) {
                fitting.push(site);
            } else {
                cx.decline(&site.name, self.wants);
            }
        }
        let questions: Vec<_> = fitting.iter().flat_map(|site| self.families.iter().map(move |&f| (site, f))).collect();
        let key = |&(site, family): &(&Site, Family)| {
            xxh3_64(format!("{} {:?} {family:?}", site.key, self.strength).as_bytes())
        };
        let curves = cx.remember_all(&questions, key, |&(site, family)| {
            let target = if site.fits(graph, family) { site.target(graph, statistics) } else { None };
            target.map_or_else(Vec::new, |target| self.curve(&target, family))
        });
        let only = cx.price.prefers.is_some_and(|preference| preference.only) && !self.preferred.is_empty();
        let mut unknown = Vec::new();
        let choices = |(site, curves): (Site, &[Arc<Curve>])| {
            let Some(costs) = Costs::of(graph, shapes, &site, cx.minimize) else {
                unknown.push(site.name);
                return None;
            };
            let shape = &site.shape;
            let candidate = |&(form, error): &(Form, f64)| Candidate { form, error, cost: costs.of_chain(form, shape) };
            let mut candidates: Vec<_> = curves.iter().flat_map(|curve| curve.iter().map(candidate)).collect();
            let is_cheaper = |c: &Candidate<Form>| {
                if self.strength.is_fixed() { c.form.elements(shape) < shape.elements() } else { c.cost < costs.whole }
            };
            candidates.retain(is_cheaper);
            let is_preferred = |c: &Candidate<Form>| self.preferred.contains(&c.form.family());
            if only || candidates.iter().any(is_preferred) {
                candidates.retain(is_preferred);
            }
            candidates.sort_by(|a, b| a.cost.total_cmp(&b.cost).then(a.error.total_cmp(&b.error)));
            let curve = curves.iter().find(|curve| !curve.is_empty()).cloned().unwrap_or_default();
            let menu = Menu { whole: costs.whole, candidates, probes: Vec::new() };
            Some(Choices { site, menu, curve, statistics, pass: self.name })
        };
        let all = fitting.into_iter().zip(curves.chunks(self.families.len())).filter_map(choices).collect();
        for name in unknown {
            cx.decline(&name, "the shape of what it multiplies is not known");
        }
        all
    }

    /// The chains of a family that may stand in place of a layer, with their errors; of a given rank, which is chosen whatever
    /// its error is, without.
    fn curve(&self, target: &Target, family: Family) -> Curve {
        let shape = &target.shape;
        let rank = match self.strength {
            Strength::Rank(rank) => Some(rank),
            Strength::Evbmf => Some(rank_above_noise(target)),
            Strength::Budget | Strength::Energy(_) => None,
        };
        let most = (shape.makes * if shape.spreads { shape.taps() } else { 1 }).min(shape.reads * shape.taps());
        match rank {
            Some(rank) if (1..=most).contains(&rank) && family.has(shape, rank) => {
                vec![(family.member(shape, rank), 0.0)]
            }
            Some(_) => Vec::new(),
            None => {
                let step = if self.strength.is_fixed() { 1 } else { multiple(shape, family) };
                let curve = family.prepare(target, None).map(|prepared| prepared.curve(step));
                curve.into_iter().flatten().filter(|(form, _)| form.is_multiple(step)).collect()
            }
        }
    }

    /// The candidate of each that the strength names, or the price allows.
    fn choose<'c>(&self, all: &'c [Choices<'_>], cx: &Context) -> Vec<Option<&'c Candidate<Form>>> {
        match self.strength {
            Strength::Budget => allocate(&all.iter().map(|choices| &choices.menu).collect::<Vec<_>>(), cx.price),
            Strength::Energy(energy) => {
                let keeps = |candidate: &&Candidate<Form>| candidate.error <= 1.0 - energy;
                let cheapest = |choices: &'c Choices<'_>| choices.menu.candidates.iter().find(keeps);
                all.iter().map(cheapest).collect()
            }
            Strength::Rank(_) | Strength::Evbmf => all.iter().map(|choices| choices.menu.candidates.first()).collect(),
        }
    }

    /// Why a layer is left whole, in numbers.
    fn reason(&self, choices: &Choices<'_>, cx: &Context) -> String {
        let (shape, menu) = (&choices.site.shape, &choices.menu);
        let family = self.families.iter().find(|family| family.fits(shape)).copied().unwrap_or(Family::After);
        let strength = match family {
            Family::Grouped { .. } => "number of groups",
            Family::Kronecker => "number of terms",
            Family::Separate | Family::Mixed => "multiplier",
            _ => "rank",
        };
        // The more groups, the less is left.
        let below = match family {
            Family::Grouped { .. } => String::new(),
            _ => format!(" below break-even {}", break_even(shape, family)),
        };
        if self.strength == Strength::Evbmf {
            return format!("what stands out from noise has no rank{below}, or none at all");
        }
        if let (Strength::Energy(energy), false) = (self.strength, menu.candidates.is_empty()) {
            return format!("keeps less than {energy} of its energy{below}");
        }
        let saved = |candidate: &Candidate<Form>| menu.whole - candidate.cost;
        let slope = |candidate: &Candidate<Form>| menu.minded(candidate.error) / saved(candidate);
        let best = menu.candidates.iter().min_by(|a, b| slope(a).total_cmp(&slope(b)));
        let Some(best) = best.filter(|_| !self.strength.is_fixed()) else {
            return match family {
                Family::Grouped { .. } => {
                    "its channels can't be put in that many groups, or it saves nothing".to_owned()
                }
                _ => format!("pays only with a {strength}{below}"),
            };
        };
        let allowed = (cx.price.per_byte * saved(best)).min(cx.price.ceiling).max(0.0);
        let enough = choices.curve.iter().filter(|(_, error)| menu.minded(*error) <= allowed);
        let needed = enough.filter_map(|(form, _)| form.rank()).min().filter(|_| !below.is_empty());
        format!(
            "no {strength}{below} is worth its error: the best saves {:.0} % of the layer for an error of {:.1e}, where {:.1e} is \
             allowed for that{}",
            saved(best) / menu.whole * 100.0,
            menu.minded(best.error).sqrt(),
            allowed.sqrt(),
            needed.map_or_else(String::new, |needed| format!(", which takes a {strength} of {needed}"))
        )
    }

    /// Puts a chain in the place of each layer of a site; `None`, and nothing done, where that does not work out. Answers what only
    /// puts channels in another order.
    fn apply(
        &self,
        graph: &mut Graph,
        choices: &Choices<'_>,
        (form, chain): (Form, &Replacement),
        cx: &mut Context,
        outermost: bool,
    ) -> Option<Vec<NodeId>> {
        let site = &choices.site;
        let regrouped = site.replace(graph, form, chain, self.name)?;
        if outermost {
            note(graph, site, (form, chain), &regrouped, cx);
        }
        let count = site.readers();
        cx.predicted += choices.menu.minded(chain.error) * count as f64;
        cx.add(word(form), count);
        Some(regrouped.into_iter().flat_map(|regrouped| regrouped.gathers).collect())
    }
}

/// Notes what values the layers of a site now make, for the refit.
fn note(graph: &Graph, site: &Site, (form, chain): (Form, &Replacement), regrouped: &[Regrouped], cx: &mut Context) {
    let is_known = site.known.is_some() && !cx.moments.is_empty();
    cx.refit |= is_known;
    for (place, linear) in site.linear().iter().enumerate().filter(|(_, linear)| linear.is_direct()) {
        let node = regrouped.get(place).map_or(linear.node, |regrouped| regrouped.node);
        let (name, original) = (graph.name(node.out()).to_owned(), graph.name(linear.node.out()).to_owned());
        match &chain.orders {
            // What a chain beside it adds is another summand.
            Some(orders) if node != linear.node && chain.stages.len() == 1 => {
                cx.kept.reorder(name, Moved { original, linear: linear.clone() }, &orders.makes);
            }
            None if is_known => {
                cx.kept.replace(name, Factored { linear: linear.clone(), form, shape: site.shape.clone() });
            }
            _ => {}
        }
    }
}

/// What is counted where a layer becomes a chain of this form.
fn word(form: Form) -> &'static str {
    match form {
        Form::Ranks { before: Some(_), after: Some(_) } => "layers split in three",
        Form::Ranks { .. } => "layers split",
        Form::Spatial { .. } => "layers split by axes",
        Form::Separate { .. } | Form::Mixed { .. } => "layers made depthwise",
        Form::Grouped { .. } => "layers put in groups",
        Form::Kronecker { .. } => "layers made Kronecker products",
    }
}

/// The chain of this form for a site, which is the same at every price.
fn replacement(graph: &Graph, site: &Site, form: Form, statistics: &Statistics) -> Option<Replacement> {
    let target = site.target(graph, statistics)?;
    let prepared = form.family().prepare(&target, form.rank())?;
    let (fitted, error) = (prepared.fit(&target, form)?, prepared.error(form));
    let lost = site.means(graph, statistics).map(|means| {
        let groups = target.matrices.iter().zip(&fitted.whole).zip(&means);
        groups.flat_map(|((matrix, whole), mean)| ((matrix - whole) * mean).as_slice().to_vec()).collect()
    });
    Some(Replacement { stages: fitted.stages, lost, orders: fitted.orders, error })
}

/// The rank of the weight of a layer that stands out from noise.
fn rank_above_noise(target: &Target) -> usize {
    let of = |matrix| {
        let spectrum: Spectrum = Spectrum::of(matrix, None)?;
        Some(evbmf_rank(&spectrum.energies, matrix.nrows(), matrix.ncols()))
    };
    target.matrices.iter().filter_map(of).max().unwrap_or(0)
}

/// Ranks that the budget chooses are multiples of this: of 8, which runtimes compute at a time, where there are enough below
/// break-even, else of less.
fn multiple(shape: &Shape, family: Family) -> usize {
    const BLOCK: usize = 8;
    let choices = break_even(shape, family) / BLOCK;
    if choices == 0 { 1 } else { BLOCK.min(1 << choices.ilog2()) }
}

/// The rank from which on a chain of a family has at least as many elements as the layer that it stands for.
fn break_even(shape: &Shape, family: Family) -> usize {
    let most = shape.makes.max(shape.reads) * shape.taps();
    let (mut low, mut high) = (0, most + 1);
    while high - low > 1 {
        let middle = low.midpoint(high);
        if family.member(shape, middle).elements(shape) < shape.elements() { low = middle } else { high = middle }
    }
    high
}
