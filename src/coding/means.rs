//! The best table: one-dimensional k-means, solved exactly by dynamic programming (Wang & Song 2011; Wu 1991 for the divide and conquer).

/// Different values that are told apart; of more, as many equally wide bins.
const MOST: usize = 1 << 14;

/// The `entries` numbers, ascending, that minimize Σ h·(w − c)² over `elements` (w, h), c the nearest of them.
pub(super) fn table(elements: &[(f64, f64)], entries: usize) -> Vec<f64> {
    let points = points(elements);
    if points.len() <= entries {
        let mut table: Vec<_> = points.iter().map(|point| point.value).collect();
        table.resize(entries, points.last().map_or(0.0, |point| point.value));
        return table;
    }
    let sums = Sums::of(&points);
    let count = points.len();
    // The least cost of the first so many points with so many entries, and where the last of these begins.
    let mut costs: Vec<f64> = (0..=count).map(|end| sums.cost(0, end)).collect();
    let mut begins = vec![vec![0; count + 1]];
    for _ in 1..entries {
        let (mut next, mut begin) = (costs.clone(), vec![0; count + 1]);
        let mut layer = Layer { sums: &sums, costs: &costs, next: &mut next, begins: &mut begin };
        layer.solve((1, count), (0, count));
        costs = next;
        begins.push(begin);
    }
    let (mut end, mut table) = (count, Vec::with_capacity(entries));
    for begins in begins.iter().rev() {
        let begin = begins[end];
        table.push(sums.mean(begin, end).unwrap_or_else(|| points[begin.min(count - 1)].value));
        end = begin;
    }
    table.reverse();
    table
}

/// A value, and how much it weighs.
#[derive(Clone, Copy)]
struct Point {
    value: f64,
    weight: f64,
}

/// The different values in ascending order, or the means of bins.
fn points(elements: &[(f64, f64)]) -> Vec<Point> {
    let bounds = elements.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), (v, _)| (a.min(*v), b.max(*v)));
    // What weighs nothing still has to be told from what does.
    let floor = elements.iter().map(|(_, weight)| weight).sum::<f64>() / elements.len().max(1) as f64 * 1e-9;
    let floor = floor.max(f64::MIN_POSITIVE);
    if elements.len() <= MOST || has_few(elements) {
        let mut sorted: Vec<_> =
            elements.iter().map(|&(value, weight)| Point { value, weight: weight.max(floor) }).collect();
        sorted.sort_by(|a, b| a.value.total_cmp(&b.value));
        sorted.dedup_by(|next, kept| {
            let same = next.value == kept.value;
            kept.weight += if same { next.weight } else { 0.0 };
            same
        });
        return sorted;
    }
    let mut bins = vec![(0.0, 0.0); MOST];
    let width = (bounds.1 - bounds.0) / MOST as f64;
    for &(value, weight) in elements {
        let bin = (((value - bounds.0) / width) as usize).min(MOST - 1);
        let weight = weight.max(floor);
        bins[bin].0 += weight * value;
        bins[bin].1 += weight;
    }
    let taken = bins.into_iter().filter(|(_, weight)| *weight > 0.0);
    taken.map(|(sum, weight)| Point { value: sum / weight, weight }).collect()
}

/// Whether no more than [`MOST`] of many values are different.
fn has_few(elements: &[(f64, f64)]) -> bool {
    let mut different = std::collections::BTreeSet::new();
    elements.iter().all(|(value, _)| {
        different.insert(value.to_bits());
        different.len() <= MOST
    })
}

/// Sums over the first points.
struct Sums(Vec<(f64, f64, f64)>);

impl Sums {
    fn of(points: &[Point]) -> Self {
        let mut sums = vec![(0.0, 0.0, 0.0)];
        let mut last = (0.0, 0.0, 0.0);
        for Point { value, weight } in points {
            last = (last.0 + weight, last.1 + weight * value, last.2 + weight * value * value);
            sums.push(last);
        }
        Self(sums)
    }

    fn mean(&self, begin: usize, end: usize) -> Option<f64> {
        let weight = self.0[end].0 - self.0[begin].0;
        (weight > 0.0).then(|| (self.0[end].1 - self.0[begin].1) / weight)
    }

    /// What one entry for the points from `begin` to `end` loses.
    fn cost(&self, begin: usize, end: usize) -> f64 {
        let (a, b) = (self.0[begin], self.0[end]);
        let (weight, sum, squares) = (b.0 - a.0, b.1 - a.1, b.2 - a.2);
        if weight > 0.0 { (squares - sum * sum / weight).max(0.0) } else { 0.0 }
    }
}

/// One more entry for each number of points.
struct Layer<'a> {
    sums: &'a Sums,
    costs: &'a [f64],
    next: &'a mut [f64],
    begins: &'a mut [usize],
}

impl Layer<'_> {
    /// Solves the ends from `first` to `last`, whose last entries begin between `low` and `high`: the further the end, the further
    /// the begin.
    fn solve(&mut self, (first, last): (usize, usize), (low, high): (usize, usize)) {
        if first > last {
            return;
        }
        let end = first.midpoint(last);
        let mut best = (f64::INFINITY, low);
        for begin in low..=high.min(end) {
            let cost = self.costs[begin] + self.sums.cost(begin, end);
            if cost < best.0 {
                best = (cost, begin);
            }
        }
        (self.next[end], self.begins[end]) = best;
        self.solve((first, end - 1), (low, best.1));
        self.solve((end + 1, last), (best.1, high));
    }
}

#[cfg(test)]
mod tests {
    use rand_core::SeedableRng;
    use rand_xoshiro::Xoshiro256PlusPlus;

    use super::*;
    use crate::linalg::normal;

    fn lost(elements: &[(f64, f64)], table: &[f64]) -> f64 {
        let of = |(value, weight): &(f64, f64)| {
            weight * table.iter().map(|entry| (entry - value).powi(2)).fold(f64::INFINITY, f64::min)
        };
        elements.iter().map(of).sum()
    }

    /// The least loss over all ways to cut sorted values in runs.
    fn least(sorted: &[(f64, f64)], entries: usize) -> f64 {
        let one = |part: &[(f64, f64)]| {
            let weight: f64 = part.iter().map(|(_, weight)| weight).sum();
            let mean = part.iter().map(|(value, weight)| value * weight).sum::<f64>() / weight;
            part.iter().map(|(value, weight)| weight * (value - mean).powi(2)).sum::<f64>()
        };
        if entries == 1 || sorted.len() <= 1 {
            return if sorted.is_empty() { 0.0 } else { one(sorted) };
        }
        let cut = |at: usize| one(&sorted[..at]) + least(&sorted[at..], entries - 1);
        (1..sorted.len()).map(cut).fold(one(sorted), f64::min)
    }

    #[test]
    fn the_table_is_as_good_as_any() {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(1);
        for round in 0..20 {
            let mut elements: Vec<_> = (0..9).map(|_| (normal(&mut random), normal(&mut random).abs() + 0.1)).collect();
            let entries = 2 + round % 3;
            let found = lost(&elements, &table(&elements, entries));
            elements.sort_by(|a, b| a.0.total_cmp(&b.0));
            let best = least(&elements, entries);
            assert!((found - best).abs() <= 1e-9 * best.max(1e-9), "{found} {best}");
        }
    }

    #[test]
    fn of_few_values_none_is_lost_however_near_they_are() {
        let elements: Vec<_> = (0..40_000).map(|i| ([0.0, 1e-6, 1.0][i % 3], 1.0)).collect();
        assert_eq!(lost(&elements, &table(&elements, 4)), 0.0);
    }
}
