//! What each weight may become, and which of that it becomes at a price.

use xxhash_rust::xxh3::xxh3_64;

use crate::{
    ir::Graph,
    pass::{Context, Price, Yardstick},
};

/// What may stand in place of a layer, or of its weight.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate<F> {
    pub(super) form: F,
    /// The error of the layer, relative and squared.
    pub(super) error: f64,
    /// What it costs of what is to be saved.
    pub(super) cost: f64,
}

/// What a layer may become.
#[derive(Clone, Debug)]
pub(super) struct Menu<F> {
    /// What it costs as it is.
    pub(super) whole: f64,
    /// What costs less, the cheapest first.
    pub(super) candidates: Vec<Candidate<F>>,
    /// What error of the whole model errors of the layer make, both relative and squared, from small to large.
    pub(super) probes: Vec<(f64, f64)>,
}

/// The errors of a layer at which it is measured how much the model minds them, relative and squared: one small enough for the
/// answer to be in proportion, yet large enough to stand out, and one at which much of what a model makes up for is gone
/// (algorithms.md §13.1: two strengths).
const PROBED: [f64; 2] = [0.03, 0.3];

impl<F: Copy> Menu<F> {
    /// The error of the whole model that an error of the layer makes: in proportion below the first that was measured, beyond it
    /// as the power of it that goes through both, but at least in proportion.
    pub(super) fn minded(&self, error: f64) -> f64 {
        match self.probes[..] {
            [(at, measured), (next, more), ..] if error > at => {
                let power = ((more / measured).ln() / (next / at).ln()).max(1.0);
                measured * (error / at).powf(power)
            }
            [(at, measured), ..] => measured * error / at,
            [] => error,
        }
    }

    /// The candidate whose error is nearest to one that is wanted.
    fn nearest(&self, wanted: f64) -> Option<Candidate<F>> {
        let distance = |c: &&Candidate<F>| (c.error.max(f64::MIN_POSITIVE) / wanted).ln().abs();
        self.candidates.iter().min_by(|a, b| distance(a).total_cmp(&distance(b))).copied()
    }
}

/// A layer that has a menu.
pub(super) trait Choosing<F>: Sync {
    /// The menu.
    fn menu(&self) -> &Menu<F>;
    /// The menu, to be added to.
    fn menu_mut(&mut self) -> &mut Menu<F>;
    /// A text that tells the layer from all others, whatever became of those.
    fn label(&self, graph: &Graph) -> String;
    /// `graph` with a candidate in place.
    fn put(&self, graph: &Graph, candidate: Candidate<F>) -> Option<Graph>;
}

/// Measures how much error of the whole model an error of each layer makes: each becomes something else by itself. It is measured once
/// for each layer and `kind` of pass: what other passes did before changes it little, and measuring it anew at each step of a search
/// takes longer than all else.
pub(super) fn probe<F: Copy + Send + Sync>(graph: &Graph, all: &mut [impl Choosing<F>], kind: &str, cx: &mut Context) {
    if cx.yardstick.is_none() {
        return;
    }
    let questions: Vec<_> = (0..all.len()).flat_map(|place| PROBED.map(|wanted| (place, wanted))).collect();
    let key = |&(place, wanted): &(usize, f64)| {
        xxh3_64(format!("{kind} {wanted} {} sensitivity", all[place].label(graph)).as_bytes())
    };
    let yardstick = cx.yardstick_for(graph, questions.iter().map(key));
    let measure = |&(place, wanted): &(usize, f64)| {
        let yardstick: &Yardstick = yardstick.as_ref()?;
        let probed = all[place].menu().nearest(wanted).filter(|probed| probed.error > 0.0)?;
        let error = yardstick.error(&all[place].put(graph, probed)?)?;
        (error > 0.0 && error.is_finite()).then_some((probed.error, error * error))
    };
    let found = cx.remember_all(&questions, key, measure);
    for ((place, _), measured) in questions.into_iter().zip(found) {
        all[place].menu_mut().probes.extend(*measured);
    }
    for choices in all {
        choices.menu_mut().probes.dedup_by_key(|probe| probe.0);
    }
}
/// A step of one layer from one point of its hull to the next.
struct Step {
    choices: usize,
    candidate: usize,
    /// Error for what is saved.
    price: f64,
}

/// The candidate of each layer that the price allows: the least of error + price · cost, which lies on the lower convex hull of
/// its candidates and the layer as it is (algorithms.md §13.2); of all steps along the hulls, so many as the price says.
pub(super) fn allocate<'c, F: Copy + 'c>(all: &[&'c Menu<F>], price: Price) -> Vec<Option<&'c Candidate<F>>> {
    if price.per_byte.is_infinite() {
        let cheapest = |choices: &&'c Menu<F>| choices.candidates.iter().find(|c| is_below(choices, c, price));
        return all.iter().map(cheapest).collect();
    }
    let mut steps: Vec<Step> = Vec::new();
    for (i, choices) in all.iter().enumerate() {
        steps.extend(hull(choices, price).into_iter().map(|(candidate, price)| Step { choices: i, candidate, price }));
    }
    steps.retain(|step| step.price <= price.per_byte);
    // Steps of one layer are in the order of their prices already, and a stable sort keeps them so.
    steps.sort_by(|a, b| a.price.total_cmp(&b.price));
    let mut chosen: Vec<Option<usize>> = vec![None; all.len()];
    for step in steps.iter().take(price.steps) {
        chosen[step.choices] = Some(step.candidate);
    }
    fill(all, &mut chosen, price);
    all.iter().zip(chosen).map(|(choices, chosen)| Some(&choices.candidates[chosen?])).collect()
}

fn is_below<F: Copy>(choices: &Menu<F>, candidate: &Candidate<F>, price: Price) -> bool {
    choices.minded(candidate.error) <= price.ceiling
}

/// The candidates on the lower convex hull of error over cost, from the layer as it is on down, with the price of each step.
fn hull<F: Copy>(choices: &Menu<F>, price: Price) -> Vec<(usize, f64)> {
    let candidates = &choices.candidates;
    let error = |i: usize| choices.minded(candidates[i].error);
    let (mut hull, mut at) = (Vec::new(), (0.0, choices.whole));
    loop {
        let slope = |i: usize| (error(i) - at.0).max(0.0) / (at.1 - candidates[i].cost);
        let below =
            (0..candidates.len()).filter(|&i| candidates[i].cost < at.1 && is_below(choices, &candidates[i], price));
        // Of equal slopes, the furthest.
        let Some(next) = below.min_by(|&a, &b| slope(a).total_cmp(&slope(b)).then(a.cmp(&b))) else { break };
        hull.push((next, slope(next)));
        at = (error(next), candidates[next].cost);
    }
    hull
}

/// Saves what is to be saved on top: by the one step of any layer that saves enough and costs the least error, or else by the
/// step that saves most, and so on.
fn fill<F: Copy>(all: &[&Menu<F>], chosen: &mut [Option<usize>], price: Price) {
    let mut missing = price.spare;
    while missing > 0.0 {
        let moves = all.iter().zip(chosen.iter()).enumerate().flat_map(|(place, (choices, chosen))| {
            let at = chosen.map_or((0.0, choices.whole), |i| (choices.candidates[i].error, choices.candidates[i].cost));
            let own = choices.candidates.iter().enumerate().filter(move |(_, c)| c.cost < at.1);
            own.map(move |(i, c)| (place, i, at.1 - c.cost, choices.minded(c.error) - choices.minded(at.0)))
        });
        let moves: Vec<_> = moves.collect();
        let enough = moves.iter().filter(|step| step.2 >= missing).min_by(|a, b| a.3.total_cmp(&b.3));
        let Some(&(place, candidate, saved, _)) = enough.or_else(|| moves.iter().max_by(|a, b| a.2.total_cmp(&b.2)))
        else {
            return;
        };
        chosen[place] = Some(candidate);
        missing -= saved;
    }
}
