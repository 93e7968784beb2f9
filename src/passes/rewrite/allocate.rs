//! Which chain each layer becomes at a price.

use super::Choices;
use crate::{factor::Form, pass::Price};

/// A chain that may stand in place of a layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) form: Form,
    /// The error of the layer, relative and squared.
    pub(super) error: f64,
    /// What it costs of what is to be saved.
    pub(super) cost: f64,
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
pub(super) fn allocate<'c>(all: &'c [Choices], price: Price) -> Vec<Option<&'c Candidate>> {
    if price.per_byte.is_infinite() {
        let cheapest = |choices: &'c Choices| choices.candidates.iter().find(|c| is_below(choices, c, price));
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

fn is_below(choices: &Choices, candidate: &Candidate, price: Price) -> bool {
    choices.minded(candidate.error) <= price.ceiling
}

/// The candidates on the lower convex hull of error over cost, from the layer as it is on down, with the price of each step.
fn hull(choices: &Choices, price: Price) -> Vec<(usize, f64)> {
    let candidates = &choices.candidates;
    let error = |i: usize| choices.minded(candidates[i].error);
    let (mut hull, mut at) = (Vec::new(), (0.0, choices.costs.whole));
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
fn fill(all: &[Choices], chosen: &mut [Option<usize>], price: Price) {
    let mut missing = price.spare;
    while missing > 0.0 {
        let moves = all.iter().zip(chosen.iter()).enumerate().flat_map(|(place, (choices, chosen))| {
            let at = chosen
                .map_or((0.0, choices.costs.whole), |i| (choices.candidates[i].error, choices.candidates[i].cost));
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
