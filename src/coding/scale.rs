//! The scale and the zero point of uniform levels.

use super::levels::whole;

/// Shares of the scale at which nothing is cut off that are tried before the best is refined (algorithms.md §6.2).
const STEPS: usize = 24;
/// The least of them.
const LEAST: f64 = 0.35;
/// What two that are next to each other differ by.
const WIDTH: f64 = (1.0 - LEAST) / STEPS as f64;
/// Steps of golden-section search around the best.
const REFINEMENTS: usize = 10;
/// Elements that tell the shares apart, and those that the refinement looks at; of more, equally spaced ones.
const FEW: usize = 1 << 10;
const MOST: usize = 1 << 14;

/// The scale s of codes from `low` to `high` that minimizes Σ h·(w − s·q)² over `elements` (w, h), q the nearest code. It is negative
/// where the longer side of an uneven range is better on the other one.
pub(super) fn search(elements: &[(f64, f64)], low: f64, high: f64) -> f64 {
    let largest = elements.iter().fold(0.0_f64, |most, (value, _)| most.max(value.abs()));
    if largest == 0.0 {
        return 1.0;
    }
    let full = largest / high.max(1.0);
    let signs: &[f64] = if low == -high { &[1.0] } else { &[1.0, -1.0] };
    let scales = signs.iter().flat_map(|sign| shares().map(move |share| sign * share * full));
    let best = best_of(elements, scales, full, |_| (low, high));
    refine(elements, (low, high), best, WIDTH * full)
}

/// The scale s and the zero point z from 0 to `high`, for codes in that range, that minimize Σ h·(w − s·(q − z))².
pub(super) fn search_asymmetric(elements: &[(f64, f64)], high: f64) -> (f64, f64) {
    let bound = |(low, high): (f64, f64), &(value, _): &(f64, f64)| (low.min(value), high.max(value));
    let (lowest, highest) = elements.iter().fold((0.0, 0.0), bound);
    let full = (highest - lowest) / high;
    if full == 0.0 {
        return (1.0, 0.0);
    }
    let middle = f64::midpoint(lowest, highest);
    let zero = |scale: f64| (high / 2.0 - middle / scale).round().clamp(0.0, high);
    let range = |scale: f64| (-zero(scale), high - zero(scale));
    let best = best_of(elements, shares().map(|share| share * full), full, range);
    (refine(elements, range(best), best, WIDTH * full), zero(best))
}

/// The shares of the scale at which nothing is cut off that are tried.
fn shares() -> impl Iterator<Item = f64> {
    (0..=STEPS).map(|i| LEAST + (1.0 - LEAST) * i as f64 / STEPS as f64)
}

/// The one of `scales` at which least is lost, with codes in the range that belongs to it, or `full`, at which nothing is cut off: the
/// elements that tell others apart may not have the largest among them.
fn best_of(
    elements: &[(f64, f64)],
    scales: impl Iterator<Item = f64>,
    full: f64,
    range: impl Fn(f64) -> (f64, f64),
) -> f64 {
    let lost = |scale: f64, most: usize| (lost(elements, scale, range(scale), most), scale);
    let least = |a: &(f64, f64), b: &(f64, f64)| a.0.total_cmp(&b.0);
    let few = scales.map(|scale| lost(scale, FEW)).min_by(least).map_or(full, |(_, scale)| scale);
    [few, full].map(|scale| lost(scale, MOST)).into_iter().min_by(least).map_or(full, |(_, scale)| scale)
}

/// Σ h·(w − s·q)² over `most` elements at most, equally spaced, q from `low` to `high`.
fn lost(elements: &[(f64, f64)], scale: f64, (low, high): (f64, f64), most: usize) -> f64 {
    let step = elements.len().div_ceil(most).max(1);
    let inverse = scale.recip();
    let one = |(value, importance): &(f64, f64)| {
        let off = value - scale * whole(value * inverse, low, high);
        importance * off * off
    };
    elements.iter().step_by(step).map(one).sum()
}

/// Golden-section search within `width` of the best, for a function that need not have one minimum there.
fn refine(elements: &[(f64, f64)], range: (f64, f64), best: f64, width: f64) -> f64 {
    let lost = |scale: f64| lost(elements, scale, range, MOST);
    let mut best = (lost(best), best);
    let golden = 5.0_f64.sqrt() / 2.0 - 0.5;
    let (mut a, mut b) = (best.1 - width, best.1 + width);
    let (mut left, mut right) = (b - golden * (b - a), a + golden * (b - a));
    let (mut of_left, mut of_right) = (lost(left), lost(right));
    for _ in 0..REFINEMENTS {
        for (lost, at) in [(of_left, left), (of_right, right)] {
            if lost < best.0 {
                best = (lost, at);
            }
        }
        if of_left < of_right {
            (b, right, of_right) = (right, left, of_left);
            left = b - golden * (b - a);
            of_left = lost(left);
        } else {
            (a, left, of_left) = (left, right, of_right);
            right = a + golden * (b - a);
            of_right = lost(right);
        }
    }
    best.1
}
