//! The scale of uniform levels.

use super::levels::whole;

/// Shares of the scale at which nothing is cut off that are tried before the best is refined (algorithms.md §6.2).
const STEPS: usize = 24;
/// The least of them.
const LEAST: f64 = 0.35;
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
    let lost = |scale: f64, most: usize| {
        let step = elements.len().div_ceil(most).max(1);
        let inverse = scale.recip();
        let one = |(value, importance): &(f64, f64)| {
            let off = value - scale * whole(value * inverse, low, high);
            importance * off * off
        };
        elements.iter().step_by(step).map(one).sum::<f64>()
    };
    let signs: &[f64] = if low == -high { &[1.0] } else { &[1.0, -1.0] };
    let full = largest / high.max(1.0);
    let mut best = (f64::INFINITY, full);
    for sign in signs {
        for i in 0..=STEPS {
            let share = LEAST + (1.0 - LEAST) * i as f64 / STEPS as f64;
            let scale = sign * share * full;
            let lost = lost(scale, FEW);
            if lost < best.0 {
                best = (lost, scale);
            }
        }
    }
    let width = (1.0 - LEAST) / STEPS as f64 * full;
    let best = (lost(best.1, MOST), best.1);
    refine(&|scale| lost(scale, MOST), best, width)
}

/// Golden-section search within `width` of the best, for a function that need not have one minimum there.
fn refine(lost: &dyn Fn(f64) -> f64, mut best: (f64, f64), width: f64) -> f64 {
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
