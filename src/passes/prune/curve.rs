//! How much error removing the channels of a layer makes, one after another.

use nalgebra::{DMatrix, DVector};

use super::pair::Elimination;
use crate::linalg::{Cholesky, energy, product, subtract_product};

/// Channels that are removed between two looks at what each would cost are this share of those that are left: a small one,
/// since every removal changes the cost of the others.
const ROUND: usize = 64;

/// The order in which the units of a layer go, and the error when they are gone.
#[derive(Clone, Debug)]
pub(super) struct Curve {
    /// Units, the first to go first; the last one is not among them.
    pub(super) order: Vec<usize>,
    /// The error, relative and squared, summed over readers, when as many are gone and the readers make up for it.
    pub(super) errors: Vec<f64>,
    /// Whether nothing is known of what is read, so that the errors are shares of norms.
    pub(super) is_blind: bool,
}

/// The curve is checked on samples that the fit has not seen at so many points.
const CHECKS: usize = 16;

/// A weight that reads the channels of a layer, as W·x for x of a known covariance.
#[derive(Clone)]
pub(super) struct Reader {
    /// W before anything went.
    original: DMatrix<f64>,
    /// E[(x − μ)(x − μ)ᵀ] over samples that the fit has not seen, μ the mean of those that it has.
    check: Option<DMatrix<f64>>,
    /// W, o×d.
    weight: DMatrix<f64>,
    /// (C + λI)⁻¹, d×d.
    inverse: DMatrix<f64>,
    /// tr(W·C·Wᵀ).
    energy: f64,
    /// What its error counts for: less than 1 where it is one of the groups of a layer.
    share: f64,
    /// The columns that each unit is read by.
    columns: Vec<Vec<usize>>,
}

impl Reader {
    /// `None` where nothing that is read varies.
    pub(super) fn new(
        weight: DMatrix<f64>,
        covariance: &DMatrix<f64>,
        ridge: f64,
        columns: Vec<Vec<usize>>,
        check: Option<DMatrix<f64>>,
    ) -> Option<Self> {
        let energy = energy(&weight, covariance);
        let (factor, _) = Cholesky::ridged(covariance, ridge)?;
        let inverse = factor.inverse(covariance.nrows());
        let original = weight.clone();
        (energy > 0.0 && energy.is_finite()).then_some(Self {
            original,
            check,
            weight,
            inverse,
            energy,
            share: 1.0,
            columns,
        })
    }

    /// The same as one group of a layer, of this share of its energy.
    pub(super) fn of_share(self, share: f64) -> Self {
        Self { share, ..self }
    }

    /// The inverse's block of `columns`, inverted, and W's columns of it.
    fn block(&self, columns: &[usize]) -> Option<(DMatrix<f64>, DMatrix<f64>)> {
        let block = DMatrix::from_fn(columns.len(), columns.len(), |i, j| self.inverse[(columns[i], columns[j])]);
        Some((block.cholesky()?.inverse(), self.weight.select_columns(columns)))
    }

    /// What removing `units` adds to the error, the others making up for it: `tr(W_J·(H⁻¹_JJ)⁻¹·W_Jᵀ)` (Hassibi & Stork 1993, by
    /// blocks as in Kurtic 2023), as a share of the energy.
    fn cost(&self, units: &[usize]) -> f64 {
        let columns = self.columns_of(units);
        if columns.is_empty() {
            return 0.0;
        }
        let cost = |(block, own): (DMatrix<f64>, DMatrix<f64>)| (&own * block).dot(&own) / self.energy * self.share;
        self.block(&columns).map_or(f64::INFINITY, cost)
    }

    fn columns_of(&self, units: &[usize]) -> Vec<usize> {
        units.iter().flat_map(|&unit| &self.columns[unit]).copied().collect()
    }

    /// The error so far on samples that the fit has not seen: few samples make a fit look better than it is.
    fn checked(&self) -> Option<f64> {
        let check = self.check.as_ref()?;
        let whole = energy(&self.original, check);
        (whole > 0.0).then(|| energy(&(&self.weight - &self.original), check) / whole * self.share)
    }

    /// Removes `units`: `W ← W − W_J·(H⁻¹_JJ)⁻¹·H⁻¹_J`, and `H⁻¹ ← H⁻¹ − H⁻¹_J·(H⁻¹_JJ)⁻¹·H⁻¹_Jᵀ`.
    fn remove(&mut self, units: &[usize]) {
        let columns = self.columns_of(units);
        if columns.is_empty() {
            return;
        }
        let Some((block, own)) = self.block(&columns) else { return };
        let across = self.inverse.select_columns(&columns);
        let turned = product(&block, &across.transpose());
        subtract_product(&mut self.weight, &own, &turned);
        subtract_product(&mut self.inverse, &across, &turned);
        for &j in &columns {
            self.weight.column_mut(j).fill(0.0);
            self.inverse.column_mut(j).fill(0.0);
            self.inverse.row_mut(j).fill(0.0);
            self.inverse[(j, j)] = 1.0;
        }
    }
}

impl Curve {
    /// Greedy structured OBS over all `readers` of `count` units, and over the `products` that they meet in (Hassibi & Stork 1993; Kurtic 2023): always the unit goes
    /// that costs least.
    pub(super) fn greedy(readers: Vec<Reader>, products: Option<Elimination>, count: usize) -> Self {
        let (mut left, mut walk) = ((0..count).collect::<Vec<_>>(), Walk::new(readers, products, count));
        while left.len() > 1 {
            let mut costs: Vec<_> = left.iter().map(|&unit| (walk.cost(unit), unit)).collect();
            costs.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            let next: Vec<_> = costs.into_iter().take(round(left.len())).collect();
            left.retain(|unit| next.iter().all(|(_, gone)| gone != unit));
            walk.remove(&next);
        }
        walk.finish()
    }

    /// The units in the order of their scores, the smallest first; each reader makes up for what went before.
    pub(super) fn scored(readers: Vec<Reader>, products: Option<Elimination>, scores: &[f64]) -> Self {
        let mut walk = Walk::new(readers, products, scores.len());
        let (mut order, mut left) = (&ascending(scores)[..], scores.len());
        while !order.is_empty() {
            let (next, rest) = order.split_at(round(left).min(order.len()));
            let next: Vec<_> = next.iter().map(|&unit| (walk.cost(unit), unit)).collect();
            walk.remove(&next);
            (order, left) = (rest, left - next.len());
        }
        walk.finish()
    }

    /// The units in the order of their scores, where nothing is known of what is read: the error is the share of the squared
    /// scores.
    pub(super) fn blind(scores: &[f64]) -> Self {
        let order = ascending(scores);
        let total: f64 = scores.iter().map(|score| score * score).sum();
        let mut error = 0.0;
        let errors = order.iter().map(|&unit| {
            error += if total > 0.0 { scores[unit] * scores[unit] / total } else { 0.0 };
            error
        });
        let errors = errors.collect();
        Self { order, errors, is_blind: true }
    }
}

/// Units being removed one after another.
struct Walk {
    readers: Vec<Reader>,
    products: Option<Elimination>,
    /// The part of the error so far that is theirs.
    lost_in_products: f64,
    curve: Curve,
    /// Removals between two checks, and what the error at each check is above the prediction, with how many units were gone.
    every: usize,
    checks: Vec<(usize, f64)>,
}

impl Walk {
    fn new(readers: Vec<Reader>, products: Option<Elimination>, count: usize) -> Self {
        let curve = Curve { order: Vec::new(), errors: Vec::new(), is_blind: false };
        Self {
            readers,
            products,
            lost_in_products: 0.0,
            curve,
            every: count.div_ceil(CHECKS).max(1),
            checks: vec![(0, 0.0)],
        }
    }

    fn cost(&self, unit: usize) -> f64 {
        let of_readers: f64 = self.readers.iter().map(|reader| reader.cost(&[unit])).sum();
        of_readers + self.products.as_ref().map_or(0.0, |products| products.cost(unit))
    }

    /// Removes some units, given with what each alone would cost; what they cost together is split in that proportion.
    fn remove(&mut self, next: &[(f64, usize)]) {
        let before = self.curve.errors.last().copied().unwrap_or(0.0);
        let units: Vec<_> = next.iter().map(|&(_, unit)| unit).collect();
        let (alone, mut together): (f64, f64) =
            (next.iter().map(|(cost, _)| cost).sum(), self.readers.iter().map(|reader| reader.cost(&units)).sum());
        if let Some(products) = &mut self.products {
            for &unit in &units {
                let cost = products.cost(unit);
                together += cost;
                self.lost_in_products += cost;
                products.remove(unit);
            }
        }
        let mut so_far = 0.0;
        for &(cost, unit) in next {
            so_far += cost;
            let share = if alone > 0.0 && alone.is_finite() { so_far / alone } else { 1.0 };
            self.curve.errors.push(before + share * together);
            self.curve.order.push(unit);
        }
        for reader in &mut self.readers {
            reader.remove(&units);
        }
        let gone = self.curve.order.len();
        if gone / self.every > (gone - next.len()) / self.every {
            let checked: f64 = self.readers.iter().map(|reader| reader.checked().unwrap_or(0.0)).sum();
            let predicted = self.curve.errors.last().copied().unwrap_or(0.0) - self.lost_in_products;
            self.checks.push((gone, (checked - predicted).max(0.0)));
        }
    }

    /// The curve, lifted by what the checks found, with straight lines between them.
    fn finish(mut self) -> Curve {
        let mut floor = 0.0_f64;
        for (gone, error) in (1..).zip(&mut self.curve.errors) {
            let next = self.checks.partition_point(|check| check.0 < gone).min(self.checks.len() - 1);
            let ((a, low), (b, high)) = (self.checks[next.saturating_sub(1)], self.checks[next]);
            let share = if b > a { ((gone - a) as f64 / (b - a) as f64).min(1.0) } else { 1.0 };
            floor = floor.max(*error + low + share * (high - low));
            *error = floor;
        }
        self.curve
    }
}

/// How many of `left` units go at once.
fn round(left: usize) -> usize {
    (left / ROUND).max(1).min(left - 1)
}

/// All units but the one of the largest score, by score.
fn ascending(scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<_> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]).then(a.cmp(&b)));
    order.truncate(scores.len().saturating_sub(1));
    order
}

/// The order in which the LASSO (Y. He 2017), in its Gram form, drops units as its price rises: the first to be dropped for
/// good has the smallest score. `gram` is `G_ij = tr(W_i·C_ij·W_jᵀ)` over the units.
pub(super) fn lasso(gram: &DMatrix<f64>) -> Vec<f64> {
    const STEPS: i32 = 60;
    const SWEEPS: usize = 8;
    let count = gram.nrows();
    let target = gram.column_sum();
    let largest = target.iter().fold(0.0_f64, |most, v| most.max(v.abs()));
    let mut beta = DVector::from_element(count, 1.0);
    let mut scores = vec![0.0; count];
    for step in 0..STEPS {
        let price = largest * libm::pow(10.0, f64::from(step - STEPS) / 15.0);
        for _ in 0..SWEEPS {
            for j in 0..count {
                let diagonal = gram[(j, j)];
                if diagonal <= 0.0 {
                    beta[j] = 0.0;
                    continue;
                }
                let rest = target[j] - gram.column(j).dot(&beta) + diagonal * beta[j];
                beta[j] = rest.signum() * (rest.abs() - price).max(0.0) / diagonal;
            }
        }
        for j in (0..count).filter(|&j| beta[j] != 0.0) {
            scores[j] = f64::from(step) + 1.0 + beta[j].abs().min(1e3) * 1e-6;
        }
    }
    scores
}

#[cfg(test)]
mod tests {
    use rand_core::SeedableRng;
    use rand_xoshiro::Xoshiro256PlusPlus;

    use super::*;
    use crate::linalg::normal;

    /// A weight, the covariance of what it reads, and the columns of each unit.
    type Case = (DMatrix<f64>, DMatrix<f64>, Vec<Vec<usize>>);

    /// Two readers of 4 units, of 3 columns and of 1 for each unit, and what they read.
    fn readers() -> [Case; 2] {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(3);
        [3, 1].map(|taps| {
            let size = 4 * taps;
            let mix = DMatrix::from_fn(size, size, |_, _| normal(&mut random));
            let weight = DMatrix::from_fn(5, size, |_, _| normal(&mut random));
            let covariance = product(&mix, &mix.transpose());
            (weight, covariance, (0..4).map(|unit| (unit * taps..(unit + 1) * taps).collect()).collect())
        })
    }

    /// The least error of any weights that read the columns `kept` only: the normal equations, solved from scratch.
    fn least(weight: &DMatrix<f64>, covariance: &DMatrix<f64>, kept: &[usize]) -> f64 {
        let part = covariance.select_rows(kept).select_columns(kept);
        let cross = product(weight, covariance).select_columns(kept);
        let fitted = &cross * part.try_inverse().unwrap();
        (energy(weight, covariance) - fitted.dot(&cross)) / energy(weight, covariance)
    }

    #[test]
    fn the_error_of_each_removal_is_that_of_the_best_fit_of_what_is_left() {
        let readers = readers();
        let build =
            || readers.iter().map(|(w, c, units)| Reader::new(w.clone(), c, 1e-12, units.clone(), None).unwrap());
        for curve in
            [Curve::greedy(build().collect(), None, 4), Curve::scored(build().collect(), None, &[3.0, 1.0, 2.0, 4.0])]
        {
            assert_eq!(curve.order.len(), 3);
            for gone in 1..=3 {
                let error = |(weight, covariance, units): &Case| {
                    let kept: Vec<_> = (0..4).filter(|unit| !curve.order[..gone].contains(unit)).collect();
                    least(weight, covariance, &kept.iter().flat_map(|&unit| units[unit].clone()).collect::<Vec<_>>())
                };
                let wanted: f64 = readers.iter().map(error).sum();
                assert!((curve.errors[gone - 1] - wanted).abs() < 1e-6, "{} {wanted}", curve.errors[gone - 1]);
            }
        }
        // The first to go is the one whose removal costs least, and scores order the units.
        let first = |unit: usize| -> f64 {
            let of = |(w, c, units): &Case| {
                least(w, c, &(0..4).filter(|&u| u != unit).flat_map(|u| units[u].clone()).collect::<Vec<_>>())
            };
            readers.iter().map(of).sum()
        };
        let best = (0..4).min_by(|&a, &b| first(a).total_cmp(&first(b))).unwrap();
        assert_eq!(Curve::greedy(build().collect(), None, 4).order[0], best);
        assert_eq!(Curve::scored(build().collect(), None, &[3.0, 1.0, 2.0, 4.0]).order, [1, 2, 0]);
    }

    #[test]
    fn a_fit_that_only_suits_its_own_samples_is_seen_through() {
        let [(weight, covariance, units), _] = readers();
        let curve = |check: &DMatrix<f64>| {
            let reader = Reader::new(weight.clone(), &covariance, 1e-12, units.clone(), Some(check.clone())).unwrap();
            Curve::scored(vec![reader], None, &[3.0, 1.0, 2.0, 4.0]).errors
        };
        let (own, other) = (curve(&covariance), curve(&DMatrix::identity(12, 12)));
        assert!(own.iter().zip(&other).all(|(own, other)| own <= other), "{own:?} {other:?}");
        assert!(other[0] > own[0] * 1.5, "{own:?} {other:?}");
        // On the same samples, the check agrees with the prediction.
        let plain = Reader::new(weight.clone(), &covariance, 1e-12, units.clone(), None).unwrap();
        let plain = Curve::scored(vec![plain], None, &[3.0, 1.0, 2.0, 4.0]).errors;
        assert!(own.iter().zip(&plain).all(|(own, plain)| (own - plain).abs() < 1e-6), "{own:?} {plain:?}");
    }

    #[test]
    fn the_lasso_drops_what_nothing_is_made_of_first() {
        // Unit 0 contributes nothing, unit 1 a little, unit 2 a lot.
        let gram = DMatrix::from_diagonal(&DVector::from_vec(vec![0.0, 0.1, 5.0]));
        let scores = lasso(&gram);
        assert!(scores[0] < scores[1] && scores[1] < scores[2], "{scores:?}");
    }
}
