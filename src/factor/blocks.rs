//! Layers in groups: which channels go together, and what each group makes of what it reads.

use std::cmp::Reverse;

use nalgebra::DMatrix;

use super::{
    Form, Metric, Shape,
    features::COLLINEAR,
    fit::{Weights, spectrum},
};
use crate::linalg::{Cholesky, Spectrum, by_rows, product, solve_lower, solve_lower_transposed};

/// The order of channels in which groups are runs of equal length: place `i` holds channel `reads[i]` of those that are read, and
/// `makes[i]` of those that are made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Orders {
    /// Of the channels that are read.
    pub reads: Vec<usize>,
    /// Of the channels that are made.
    pub makes: Vec<usize>,
}

/// A group of a layer in so many parts that do not see each other.
#[derive(Debug)]
pub(super) struct Blocked {
    pub(super) orders: Orders,
    /// What each part makes of the elements that it reads.
    parts: Vec<DMatrix<f64>>,
    /// The factors of what a chain beside the parts makes, B·A of few rows in between.
    beside: Option<[DMatrix<f64>; 2]>,
    /// The energy of W·x that they tell.
    pub(super) energy: f64,
}

/// Groups of more parts keep next to nothing, and assigning channels to them takes long.
const MAX_PARTS: usize = 64;
/// Pairs of channels that are looked at: 128 MB for what they have in common.
const MAX_PAIRS: usize = 1 << 24;

/// In how many parts a layer may be.
pub(super) fn counts(shape: &Shape) -> impl Iterator<Item = usize> {
    let (makes, reads) = (shape.makes, shape.reads);
    let most = if makes * reads > MAX_PAIRS { 0 } else { makes.min(reads).min(MAX_PARTS) };
    (2..=most).filter(move |&parts| makes.is_multiple_of(parts) && reads.is_multiple_of(parts))
}

/// Splits one group of a layer in `parts`, each with the weights for which what it reads tells most of what it makes: what the
/// missing channels vary with is made up for, `W_K = W·C_K·C_KK⁻¹`. Of what is lost then, a chain beside it of the rank `bypass` makes
/// the strongest directions.
pub(super) fn split(
    (matrix, metric): (&DMatrix<f64>, &Metric),
    shape: &Shape,
    parts: usize,
    bypass: usize,
) -> Option<Blocked> {
    let orders = cocluster(&energies(matrix, metric, shape), parts);
    let spread = metric.times(matrix);
    let mut blocked = Blocked { orders, parts: Vec::with_capacity(parts), beside: None, energy: 0.0 };
    for part in 0..parts {
        let (rows, columns) = blocked.orders.elements(shape, parts, part);
        let told = spread.select_columns(&columns).select_rows(&rows);
        let Some(own) = metric.mean_block(std::slice::from_ref(&columns), matrix.ncols()) else {
            blocked.energy += told.norm_squared();
            blocked.parts.push(told);
            continue;
        };
        let lower = Cholesky::ridged(&own, COLLINEAR)?.0.root();
        let crossed = solve_lower(&lower, told.transpose());
        blocked.energy += crossed.norm_squared();
        blocked.parts.push(solve_lower_transposed(&lower, crossed).transpose());
    }
    if bypass > 0 {
        let lost = matrix - blocked.whole(matrix, shape);
        let spectrum = spectrum(&lost, metric, Some(bypass))?;
        let rank = bypass.min(spectrum.basis.ncols());
        blocked.energy += spectrum.energies.iter().take(rank).sum::<f64>();
        blocked.beside = Some(spectrum.factors(&lost, rank).into());
    }
    Some(blocked)
}

impl Orders {
    /// Appends the orders of group `place` of a layer of this `shape`, counted within the group.
    pub fn append(&mut self, own: &Self, shape: &Shape, place: usize) {
        self.reads.extend(own.reads.iter().map(|channel| place * shape.reads + channel));
        self.makes.extend(own.makes.iter().map(|channel| place * shape.makes + channel));
    }

    /// The rows and columns of W that one of so many parts has.
    fn elements(&self, shape: &Shape, parts: usize, part: usize) -> (Vec<usize>, Vec<usize>) {
        let of_channels = |order: &[usize], taps: usize| {
            let size = order.len() / parts;
            let own = &order[part * size..(part + 1) * size];
            own.iter().flat_map(|channel| (0..taps).map(move |tap| channel * taps + tap)).collect()
        };
        let (makes, reads) = shape.extents();
        (of_channels(&self.makes, makes), of_channels(&self.reads, reads))
    }

    /// The weight of the layer in so many groups that has what stands in W where channels of one part meet.
    #[must_use]
    pub fn weight(&self, matrix: &DMatrix<f64>, shape: &Shape, parts: usize) -> Vec<f64> {
        let of_part = |part: usize| {
            let (rows, columns) = self.elements(shape, parts, part);
            let own = matrix.select_columns(&columns).select_rows(&rows);
            // Where it spreads, the weight begins with the channels that are read.
            let stored = if shape.spreads { own } else { own.transpose() };
            stored.as_slice().to_vec()
        };
        (0..parts).flat_map(of_part).collect()
    }
}

impl Blocked {
    pub(super) fn form(&self) -> Form {
        let bypass = self.beside.as_ref().map_or(0, |[left, _]| left.ncols());
        Form::Grouped { parts: self.parts.len(), bypass }
    }

    /// The weights of the layer in groups and of what is beside it, and W̃.
    pub(super) fn fit(&self, matrix: &DMatrix<f64>, shape: &Shape) -> Weights {
        let mut whole = self.whole(matrix, shape);
        let mut stages = vec![self.orders.weight(&whole, shape, self.parts.len())];
        if let Some([left, right]) = &self.beside {
            whole += product(left, right);
            stages.extend([by_rows(right), by_rows(left)]);
        }
        (stages, whole)
    }

    /// What the parts make together.
    fn whole(&self, matrix: &DMatrix<f64>, shape: &Shape) -> DMatrix<f64> {
        let mut whole = DMatrix::zeros(matrix.nrows(), matrix.ncols());
        for (place, part) in self.parts.iter().enumerate() {
            let (rows, columns) = self.orders.elements(shape, self.parts.len(), place);
            for (j, &column) in columns.iter().enumerate() {
                rows.iter().enumerate().for_each(|(i, &row)| whole[(row, column)] = part[(i, j)]);
            }
        }
        whole
    }
}

/// How much of what each channel is made of each channel that is read makes, by itself: `E_oc = tr(W_oc·C_cc·W_ocᵀ)`.
fn energies(matrix: &DMatrix<f64>, metric: &Metric, shape: &Shape) -> DMatrix<f64> {
    let (spread, taps) = shape.extents();
    let mut energies = DMatrix::zeros(shape.makes, shape.reads);
    for channel in 0..shape.reads {
        let support: Vec<_> = (channel * taps..(channel + 1) * taps).collect();
        let own = matrix.select_columns(&support);
        let varied = match metric.mean_block(std::slice::from_ref(&support), matrix.ncols()) {
            Some(block) => product(&own, &block),
            None => own.clone(),
        };
        for row in 0..matrix.nrows() {
            energies[(row / spread, channel)] += own.row(row).dot(&varied.row(row));
        }
    }
    energies
}

/// Rounds of assigning rows to columns and back: it settles in far fewer.
const ROUNDS: usize = 30;

/// Splits rows and columns in `parts` of equal size that keep as much as can be found of the sum of what rows and columns of one
/// part have in common: from the leading singular vectors (Dhillon 2001), and from the order as it is, rows and columns are
/// assigned in turn until nothing is gained. Within a part, they stay in order.
fn cocluster(energies: &DMatrix<f64>, parts: usize) -> Orders {
    let natural = |count: usize| (0..count).map(|i| i * parts / count).collect::<Vec<_>>();
    let starts = [natural(energies.ncols()), spectral(energies, parts)];
    let turned = energies.transpose();
    let mut best: Option<(f64, Vec<usize>, Vec<usize>)> = None;
    for mut of_columns in starts {
        let mut of_rows = Vec::new();
        let mut kept = f64::NEG_INFINITY;
        for _ in 0..ROUNDS {
            of_rows = assign(&shares(energies, &of_columns, parts));
            let found = shares(&turned, &of_rows, parts);
            of_columns = assign(&found);
            let now: f64 = of_columns.iter().enumerate().map(|(column, &part)| found[(column, part)]).sum();
            if now <= kept * (1.0 + 1e-12) {
                break;
            }
            kept = now;
        }
        if best.as_ref().is_none_or(|best| kept > best.0 * (1.0 + 1e-9)) {
            best = Some((kept, of_rows, of_columns));
        }
    }
    let (_, of_rows, of_columns) = best.unwrap_or_default();
    ordered(&of_rows, &of_columns, parts)
}

/// The orders in which parts stand one after the other, the one with the first channel that is made first.
fn ordered(of_rows: &[usize], of_columns: &[usize], parts: usize) -> Orders {
    let mut sequence: Vec<usize> = (0..parts).collect();
    sequence.sort_by_key(|&part| of_rows.iter().position(|&own| own == part));
    let members = |assigned: &[usize]| {
        let of_part = |&part: &usize| (0..assigned.len()).filter(move |&i| assigned[i] == part).collect::<Vec<_>>();
        sequence.iter().flat_map(of_part).collect()
    };
    Orders { reads: members(of_columns), makes: members(of_rows) }
}

/// What each row has in common with the columns of each part.
fn shares(energies: &DMatrix<f64>, of_columns: &[usize], parts: usize) -> DMatrix<f64> {
    let mut shares = DMatrix::zeros(energies.nrows(), parts);
    for (column, &part) in energies.column_iter().zip(of_columns) {
        let mut sum = shares.column_mut(part);
        sum += column;
    }
    shares
}

/// The part of each column by the first singular vectors of D_r^-½·E·D_c^-½, as many as there are parts: columns that lie close
/// to each other along these go together (balanced k-means, from columns that are far apart).
fn spectral(energies: &DMatrix<f64>, parts: usize) -> Vec<usize> {
    let count = energies.ncols();
    let Some(places) = embedded(energies, parts) else { return vec![0; count] };
    let distance = |a: usize, center: &DMatrix<f64>| (places.row(a) - center).norm_squared();
    let first = (0..count).max_by(|&a, &b| places.row(a).norm().total_cmp(&places.row(b).norm()).then(b.cmp(&a)));
    let place = |i: usize| places.rows(i, 1).into_owned();
    let mut centers = vec![place(first.unwrap_or(0))];
    while centers.len() < parts {
        let nearest = |i: usize| centers.iter().map(|center| distance(i, center)).fold(f64::INFINITY, f64::min);
        let next = (0..count).max_by(|&a, &b| nearest(a).total_cmp(&nearest(b)).then(b.cmp(&a)));
        centers.push(place(next.unwrap_or(0)));
    }
    let mut assigned = vec![0; count];
    for _ in 0..ROUNDS {
        let next = assign(&DMatrix::from_fn(count, parts, |i, part| -distance(i, &centers[part])));
        if next == assigned {
            break;
        }
        assigned = next;
        for (part, center) in centers.iter_mut().enumerate() {
            center.fill(0.0);
            (0..count).filter(|&i| assigned[i] == part).for_each(|i| *center += places.rows(i, 1));
            *center *= parts as f64 / count as f64;
        }
    }
    assigned
}

/// Where columns lie along the first `rank` right singular vectors of E, rows and columns divided by the roots of their sums.
fn embedded(energies: &DMatrix<f64>, rank: usize) -> Option<DMatrix<f64>> {
    let weight = |sum: f64| if sum > 0.0 { sum.sqrt().recip() } else { 0.0 };
    let rows: Vec<_> = energies.row_iter().map(|row| weight(row.sum())).collect();
    let columns: Vec<_> = energies.column_iter().map(|column| weight(column.sum())).collect();
    let scaled = DMatrix::from_fn(energies.ncols(), energies.nrows(), |j, i| energies[(i, j)] * rows[i] * columns[j]);
    let basis = Spectrum::of(&scaled, Some(rank.min(scaled.nrows()).min(scaled.ncols())))?.basis;
    // All vectors together would place columns apart whatever they have in common.
    let mut places = basis.columns(0, rank.min(basis.ncols())).into_owned();
    places.row_iter_mut().zip(&columns).for_each(|(mut row, weight)| row *= *weight);
    Some(places)
}

/// The part of each row for which the sum of `shares` is largest, as many rows in each part: rows that lose most by not being where
/// they are best go first; then rows change places in cycles as long as that gains anything, after which no assignment is better (cycle
/// canceling; Klein 1967).
fn assign(shares: &DMatrix<f64>) -> Vec<usize> {
    let (count, parts) = shares.shape();
    let room = count / parts;
    let preferences = |row: usize| {
        let mut order: Vec<usize> = (0..parts).collect();
        order.sort_by(|&a, &b| shares[(row, b)].total_cmp(&shares[(row, a)]).then(a.cmp(&b)));
        order
    };
    let preferred: Vec<_> = (0..count).map(preferences).collect();
    let regret = |row: usize| shares[(row, preferred[row][0])] - shares[(row, preferred[row][1.min(parts - 1)])];
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by(|&a, &b| regret(b).total_cmp(&regret(a)).then(a.cmp(&b)));
    let (mut sizes, mut assigned) = (vec![0; parts], vec![0; count]);
    for row in order {
        let part = preferred[row].iter().copied().find(|&part| sizes[part] < room).unwrap_or(0);
        sizes[part] += 1;
        assigned[row] = part;
    }
    let scale = shares.amax().max(f64::MIN_POSITIVE) * 1e-12;
    // Each cycle gains at least so much, yet there may be many of them that gain little.
    for _ in 0..count * parts {
        let Some(cycle) = gaining_cycle(shares, &assigned, scale) else { break };
        for (row, part) in cycle {
            assigned[row] = part;
        }
    }
    assigned
}

/// Rows that gain by each moving to the part of the next one, with the parts that they move to: a cycle of positive weight among the
/// parts (Bellman and Ford).
fn gaining_cycle(shares: &DMatrix<f64>, assigned: &[usize], least: f64) -> Option<Vec<(usize, usize)>> {
    let parts = shares.ncols();
    let mut best: Vec<Vec<Option<(f64, usize)>>> = vec![vec![None; parts]; parts];
    for (row, &from) in assigned.iter().enumerate() {
        for (to, best) in best[from].iter_mut().enumerate() {
            let gain = shares[(row, to)] - shares[(row, from)];
            if best.is_none_or(|(known, _)| gain > known) {
                *best = Some((gain, row));
            }
        }
    }
    let mut reached = vec![0.0; parts];
    let mut came: Vec<Option<usize>> = vec![None; parts];
    let mut changed = None;
    for _ in 0..parts {
        changed = None;
        for from in 0..parts {
            for to in (0..parts).filter(|&to| to != from) {
                let Some((gain, _)) = best[from][to] else { continue };
                if reached[from] + gain > reached[to] + least {
                    reached[to] = reached[from] + gain;
                    came[to] = Some(from);
                    changed = Some(to);
                }
            }
        }
        changed?;
    }
    // What still gains after so many rounds comes out of a cycle: walk back into it, then around.
    let mut at = changed?;
    for _ in 0..parts {
        at = came[at]?;
    }
    let (mut cycle, first) = (Vec::new(), at);
    loop {
        let from = came[at]?;
        cycle.push((best[from][at]?.1, at));
        at = from;
        if at == first {
            break;
        }
    }
    Some(cycle)
}

/// The connected components of the graph in which a row and a column are joined where their entry is not zero.
#[derive(Debug)]
pub struct Components {
    /// Which one each row is of.
    of_rows: Vec<usize>,
    /// Which one each column is of.
    of_columns: Vec<usize>,
    /// Rows and columns of each.
    sizes: Vec<(usize, usize)>,
}

impl Components {
    /// Of the entries of `energies` that are not zero.
    #[must_use]
    pub fn of(energies: &DMatrix<f64>) -> Self {
        let (rows, columns) = energies.shape();
        let mut label: Vec<Option<usize>> = vec![None; rows + columns];
        let mut sizes: Vec<(usize, usize)> = Vec::new();
        for start in 0..rows + columns {
            if label[start].is_some() {
                continue;
            }
            let (mut open, mut size, own) = (vec![start], (0, 0), sizes.len());
            label[start] = Some(own);
            while let Some(node) = open.pop() {
                let others = if node < rows { rows..rows + columns } else { 0..rows };
                size = if node < rows { (size.0 + 1, size.1) } else { (size.0, size.1 + 1) };
                for other in others {
                    let entry = if node < rows { (node, other - rows) } else { (other, node - rows) };
                    if label[other].is_none() && energies[entry] != 0.0 {
                        label[other] = Some(own);
                        open.push(other);
                    }
                }
            }
            sizes.push(size);
        }
        let of = |nodes: std::ops::Range<usize>| nodes.filter_map(|node| label[node]).collect();
        Self { of_rows: of(0..rows), of_columns: of(rows..rows + columns), sizes }
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.sizes.len()
    }

    /// The order in which so many parts of equal size have whole components, if putting the largest first into any part that has
    /// room for it leads to one.
    #[must_use]
    pub fn packed(&self, parts: usize) -> Option<Orders> {
        let (rows, columns) = (self.of_rows.len(), self.of_columns.len());
        (rows.is_multiple_of(parts) && columns.is_multiple_of(parts)).then_some(())?;
        let packed = pack(&self.sizes, (rows / parts, columns / parts), parts)?;
        let part = |own: &[usize]| own.iter().map(|&own| packed[own]).collect::<Vec<_>>();
        Some(ordered(&part(&self.of_rows), &part(&self.of_columns), parts))
    }
}

/// The part that each of some things of these sizes goes into, the largest first, so that all parts are full.
fn pack(sizes: &[(usize, usize)], room: (usize, usize), parts: usize) -> Option<Vec<usize>> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&i| Reverse((sizes[i].0 + sizes[i].1, sizes[i].0)));
    let (mut left, mut packed) = (vec![room; parts], vec![0; sizes.len()]);
    for i in order {
        let size = sizes[i];
        let part = (0..parts).find(|&part| size.0 <= left[part].0 && size.1 <= left[part].1)?;
        left[part] = (left[part].0 - size.0, left[part].1 - size.1);
        packed[i] = part;
    }
    Some(packed)
}

#[cfg(test)]
mod tests {
    use rand_xoshiro::{
        Xoshiro256PlusPlus,
        rand_core::{Rng, SeedableRng},
    };

    use super::*;

    /// The most that any assignment of rows keeps, by trying all.
    fn most(shares: &DMatrix<f64>, row: usize, room: &mut [usize]) -> f64 {
        if row == shares.nrows() {
            return 0.0;
        }
        let mut best = f64::NEG_INFINITY;
        for part in 0..room.len() {
            if room[part] > 0 {
                room[part] -= 1;
                best = best.max(shares[(row, part)] + most(shares, row + 1, room));
                room[part] += 1;
            }
        }
        best
    }

    #[test]
    fn no_assignment_is_better() {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(3);
        for (count, parts) in [(6, 2), (6, 3), (8, 4), (9, 3), (10, 5)] {
            for _ in 0..20 {
                let shares = DMatrix::from_fn(count, parts, |_, _| (random.next_u64() % 1000) as f64);
                let assigned = assign(&shares);
                let kept: f64 = assigned.iter().enumerate().map(|(row, &part)| shares[(row, part)]).sum();
                assert!((0..parts).all(|p| assigned.iter().filter(|&&own| own == p).count() == count / parts));
                let best = most(&shares, 0, &mut vec![count / parts; parts]);
                assert!((kept - best).abs() < 1e-6, "{count} {parts}: {kept} {best}");
            }
        }
    }

    #[test]
    fn hidden_blocks_are_found() {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(5);
        let mut shuffled = |count: usize| {
            let mut order: Vec<usize> = (0..count).collect();
            (1..count).rev().for_each(|i| order.swap(i, random.next_u64() as usize % (i + 1)));
            order
        };
        for (rows, columns, parts) in [(8, 12, 2), (12, 6, 3), (16, 16, 4), (24, 12, 6)] {
            let (of_rows, of_columns) = (shuffled(rows), shuffled(columns));
            let part = |place: usize, count: usize| place * parts / count;
            let energies = DMatrix::from_fn(rows, columns, |i, j| {
                f64::from(part(of_rows[i], rows) == part(of_columns[j], columns))
            });
            let kept = |orders: &Orders| {
                let pairs = (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j)));
                let own = pairs.filter(|&(i, j)| part(i, rows) == part(j, columns));
                own.map(|(i, j)| energies[(orders.makes[i], orders.reads[j])]).sum::<f64>()
            };
            let whole = energies.sum();
            assert_eq!(kept(&cocluster(&energies, parts)), whole, "{rows} {columns} {parts}");
            let found = Components::of(&energies);
            assert_eq!((found.count(), kept(&found.packed(parts).unwrap())), (parts, whole));
        }
        assert!(Components::of(&DMatrix::from_element(4, 4, 1.0)).packed(2).is_none());
    }

    #[test]
    fn blocks_are_found_in_noise() {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(7);
        for (size, parts) in [(32, 2), (32, 4), (128, 2), (128, 8)] {
            let part = |i: usize| i * 37 % size * parts / size;
            let mut entry =
                |i, j| if part(i) == part(j) { 1.0 } else { 0.6 } + (random.next_u64() % 100) as f64 / 100.0;
            let energies = DMatrix::from_fn(size, size, &mut entry);
            let assigned = spectral(&energies, parts);
            let own = |p: usize| (0..size).filter(|&i| part(i) == p).map(|i| assigned[i]).collect::<Vec<_>>();
            let most = |own: &[usize]| (0..parts).map(|q| own.iter().filter(|&&a| a == q).count()).max().unwrap_or(0);
            let together: usize = (0..parts).map(|p| most(&own(p))).sum();
            assert!(together * 10 >= size * 9, "{size} {parts}: {together}");
        }
    }
}
