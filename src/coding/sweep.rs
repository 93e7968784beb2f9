//! Codes that keep what a layer makes, not its weights: GPTQ (Frantar 2023), then coordinate descent (COMQ, Zhang 2024) in turn with
//! the best scales or tables for the codes ("trained quantization" of Han 2016 in closed form).

use std::collections::BTreeMap;

use nalgebra::{DMatrix, DVector};
use rayon::prelude::*;

use super::{DAMPING, Plane, ROWS, Scheme, levels::Levels, nearest};
use crate::{
    factor::Metric,
    ir::{Codes, DType, Storage},
    linalg::{Cholesky, add_product_of, energy, product, upper_root},
};

/// Columns between which errors are carried on at once.
const BLOCK: usize = 128;
/// Rounds of coordinate descent.
const ROUNDS: usize = 3;
/// Multiply-adds beyond which there is one round less for each multiple.
const WORK: f64 = 2e10;
/// Multiply-adds that tables take at most: of more rows, equally spaced ones tell.
const TABLE_WORK: f64 = 4e8;

/// `values`, of a weight that `plane` lays out, as codes of so many bits for tiles of these extents: those for which
/// tr(ΔW·C·ΔWᵀ) is least as far as can be found, for C of each group by `metrics`. `None` where a value is not finite.
#[must_use]
pub fn fit(
    (plane, (scheme, bits, tile)): (&Plane, (Scheme, u32, &[usize])),
    (dtype, dims): (DType, &[usize]),
    values: &[f64],
    metrics: &[Metric],
) -> Option<Storage> {
    let matrices = plane.matrices(values);
    let metric = |group: usize| metrics.get(group.min(metrics.len().saturating_sub(1))).unwrap_or(&Metric::Identity);
    let is_known = (0..matrices.len()).any(|group| !matches!(metric(group), Metric::Identity));
    let weighed: Vec<_> =
        matrices.iter().enumerate().map(|(group, matrix)| importance(matrix, metric(group))).collect();
    let weighed = is_known.then(|| plane.elements(&weighed));
    let plain = nearest((scheme, bits), (dtype, dims, tile), values, weighed.as_deref())?;
    if !is_known {
        return Some(plain);
    }
    let codes = plain.codes()?;
    let tiles: Vec<f64> = codes.tiles().map(|tile| tile as f64).collect();
    let mut problems: Vec<Problem> = (matrices.iter().zip(plane.matrices(&tiles)).enumerate())
        .filter_map(|(group, (matrix, tiles))| Problem::new(group, matrix, &tiles, metric(group)))
        .collect();
    let mut levels = Levels::of(&plain)?;
    let work: f64 = problems.iter().map(Problem::work).sum();
    for problem in &mut problems {
        problem.carry_on(&levels);
    }
    for _ in 0..ROUNDS.saturating_sub((work / WORK) as usize) {
        improve(&mut levels, &problems);
        for problem in &mut problems {
            problem.descend(&levels);
        }
    }
    let mut coded = matrices;
    for problem in &problems {
        coded[problem.group] = problem.coded(&levels);
    }
    let levels = levels.rounded(dtype)?;
    let coded = plane.elements(&coded);
    let bytes: Vec<u8> = coded.iter().zip(codes.tiles()).map(|(&value, tile)| levels.nearest(tile, value).0).collect();
    levels.store(Codes::new(dims, bits, tile, bytes.into())?, dtype)
}

/// `C_jj` of the column of each element.
fn importance(matrix: &DMatrix<f64>, metric: &Metric) -> DMatrix<f64> {
    let (rows, columns) = matrix.shape();
    match metric {
        Metric::Identity => DMatrix::repeat(rows, columns, 1.0),
        Metric::Full(covariance) => DMatrix::from_fn(rows, columns, |_, j| covariance[(j, j)]),
        Metric::Channels(channels) => {
            let taps = (columns / channels.nrows()).max(1);
            DMatrix::from_fn(rows, columns, |_, j| channels[(j / taps, j / taps)])
        }
    }
}

/// One matrix to be coded, its columns in the order in which that is done: those of the largest `C_jj` first.
struct Problem {
    group: usize,
    /// The columns of W in that order.
    order: Vec<usize>,
    /// Rows of W for each row here, of which each is about one tap of a kernel.
    taps: usize,
    weight: DMatrix<f64>,
    /// The tile of each element.
    tiles: DMatrix<u32>,
    covariance: DMatrix<f64>,
    /// The code of each element.
    codes: DMatrix<u8>,
}

impl Problem {
    fn new(group: usize, weight: &DMatrix<f64>, tiles: &DMatrix<f64>, metric: &Metric) -> Option<Self> {
        let (covariance, taps) = match metric {
            Metric::Identity => return None,
            Metric::Full(covariance) => (covariance, 1),
            Metric::Channels(channels) => (channels, weight.ncols() / channels.nrows().max(1)),
        };
        (covariance.nrows() * taps == weight.ncols()).then_some(())?;
        let mut order: Vec<usize> = (0..covariance.nrows()).collect();
        order.sort_by(|&a, &b| covariance[(b, b)].total_cmp(&covariance[(a, a)]).then(a.cmp(&b)));
        let apart = |matrix: &DMatrix<f64>| {
            let rows = matrix.nrows();
            DMatrix::from_fn(rows * taps, order.len(), |i, j| matrix[(i % rows, order[j] * taps + i / rows)])
        };
        let (weight, tiles) = (apart(weight), apart(tiles).map(|tile| tile as u32));
        let covariance = DMatrix::from_fn(order.len(), order.len(), |i, j| covariance[(order[i], order[j])]);
        let codes = DMatrix::zeros(weight.nrows(), weight.ncols());
        Some(Self { group, order, taps, weight, tiles, covariance, codes })
    }

    /// Multiply-adds of a round.
    fn work(&self) -> f64 {
        self.weight.nrows() as f64 * (self.weight.ncols() as f64).powi(2)
    }

    /// What the codes stand for, as the matrix of the group.
    fn coded(&self, levels: &Levels) -> DMatrix<f64> {
        let (rows, columns) = (self.weight.nrows() / self.taps, self.order.len());
        let mut whole = DMatrix::zeros(rows, columns * self.taps);
        for (j, &place) in self.order.iter().enumerate() {
            for i in 0..self.weight.nrows() {
                let value = levels.value(self.tiles[(i, j)] as usize, self.codes[(i, j)]);
                whole[(i % rows, place * self.taps + i / rows)] = value;
            }
        }
        whole
    }

    /// Some rows of W, their tiles, and their codes.
    fn parts(&self) -> Vec<(DMatrix<f64>, DMatrix<u32>, DMatrix<u8>)> {
        let starts = (0..self.weight.nrows()).step_by(ROWS);
        let part = |first: usize| {
            let count = ROWS.min(self.weight.nrows() - first);
            let of = (self.weight.rows(first, count), self.tiles.rows(first, count), self.codes.rows(first, count));
            (of.0.into_owned(), of.1.into_owned(), of.2.into_owned())
        };
        starts.map(part).collect()
    }

    fn set_codes(&mut self, parts: &[DMatrix<u8>]) {
        for (i, part) in parts.iter().enumerate() {
            self.codes.rows_mut(i * ROWS, part.nrows()).copy_from(part);
        }
    }

    /// GPTQ: each column takes over what the ones before it lost, as far as it can: with H = R·Rᵀ, R upper triangular,
    /// `(ΔW·R)_j = R_jj·(Δw_j + Σ_{i<j} Δw_i·R_ij / R_jj)`, of which all but the rounding of column j is given.
    fn carry_on(&mut self, levels: &Levels) {
        let Some(mut carried) = upper_root(&self.covariance, DAMPING) else {
            return self.round(levels);
        };
        for (j, mut column) in carried.column_iter_mut().enumerate() {
            let scale = column[j].recip();
            column.scale_mut(scale);
        }
        let size = self.order.len();
        let code = |(weight, tiles, mut codes): (DMatrix<f64>, DMatrix<u32>, DMatrix<u8>)| {
            let mut lost = DMatrix::<f64>::zeros(weight.nrows(), size);
            for begin in (0..size).step_by(BLOCK) {
                let width = BLOCK.min(size - begin);
                let mut aim = weight.columns(begin, width).into_owned();
                add_product_of(&mut aim, (&lost, &carried), (0, begin), (begin, width));
                for j in begin..begin + width {
                    for i in 0..weight.nrows() {
                        let tile = tiles[(i, j)] as usize;
                        let (code, value) = levels.nearest(tile, aim[(i, j - begin)]);
                        codes[(i, j)] = code;
                        lost[(i, j)] = weight[(i, j)] - value;
                    }
                    for next in j + 1..begin + width {
                        aim.column_mut(next - begin).axpy(carried[(j, next)], &lost.column(j), 1.0);
                    }
                }
            }
            codes
        };
        let parts: Vec<_> = self.parts().into_par_iter().map(code).collect();
        self.set_codes(&parts);
    }

    /// Each element by the nearest.
    fn round(&mut self, levels: &Levels) {
        let places = self.weight.iter().zip(self.tiles.iter());
        let codes: Vec<u8> = places.map(|(&value, &tile)| levels.nearest(tile as usize, value).0).collect();
        self.codes.as_mut_slice().copy_from_slice(&codes);
    }

    /// Coordinate descent: each element by the best while all others are as they are; the error never grows.
    fn descend(&mut self, levels: &Levels) {
        let (size, covariance) = (self.order.len(), &self.covariance);
        let code = |(weight, tiles, mut codes): (DMatrix<f64>, DMatrix<u32>, DMatrix<u8>)| {
            let value = |i: usize, j: usize, code: u8| levels.value(tiles[(i, j)] as usize, code);
            let mut off = DMatrix::from_fn(weight.nrows(), size, |i, j| value(i, j, codes[(i, j)]) - weight[(i, j)]);
            for begin in (0..size).step_by(BLOCK) {
                let width = BLOCK.min(size - begin);
                let mut slope = DMatrix::zeros(weight.nrows(), width);
                add_product_of(&mut slope, (&off, covariance), (0, size), (begin, width));
                let mut moved = DVector::zeros(weight.nrows());
                for j in begin..begin + width {
                    let curve = covariance[(j, j)];
                    if curve <= 0.0 {
                        continue;
                    }
                    for i in 0..weight.nrows() {
                        let before = weight[(i, j)] + off[(i, j)];
                        let (code, after) =
                            levels.nearest(tiles[(i, j)] as usize, before - slope[(i, j - begin)] / curve);
                        codes[(i, j)] = code;
                        off[(i, j)] = after - weight[(i, j)];
                        moved[i] = after - before;
                    }
                    for next in begin..begin + width {
                        slope.column_mut(next - begin).axpy(covariance[(j, next)], &moved, 1.0);
                    }
                }
            }
            codes
        };
        let parts: Vec<_> = self.parts().into_par_iter().map(code).collect();
        self.set_codes(&parts);
    }
}

/// Other scales or tables for the codes that there are, where the error is less with them.
fn improve(levels: &mut Levels, problems: &[Problem]) {
    let error = |levels: &Levels| problems.iter().map(|problem| problem.error(levels)).sum::<f64>();
    let better = match levels {
        Levels::Uniform { .. } => scales(levels, problems),
        Levels::Tables { .. } => tables(levels, problems),
    };
    if let Some(better) = better.filter(|better| error(better) < error(levels)) {
        *levels = better;
    }
}

impl Problem {
    /// tr(ΔW·C·ΔWᵀ).
    fn error(&self, levels: &Levels) -> f64 {
        energy(&self.off(levels), &self.covariance)
    }

    /// For each element of `numbers`, the product of its row with a column of C, each over the columns of its tile alone.
    fn bent(&self, numbers: &DMatrix<f64>) -> DMatrix<f64> {
        let mut of_tile: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for (column, &tile) in self.tiles.row(0).iter().enumerate() {
            of_tile.entry(tile).or_default().push(column);
        }
        if of_tile.len() == 1 {
            return product(numbers, &self.covariance);
        }
        let mut whole = DMatrix::zeros(numbers.nrows(), numbers.ncols());
        for columns in of_tile.into_values() {
            let own = self.covariance.select_rows(&columns).select_columns(&columns);
            let part = product(&numbers.select_columns(&columns), &own);
            part.column_iter().zip(columns).for_each(|(values, column)| whole.set_column(column, &values));
        }
        whole
    }

    /// What the codes stand for, less W.
    fn off(&self, levels: &Levels) -> DMatrix<f64> {
        let value = |i: usize, j: usize| levels.value(self.tiles[(i, j)] as usize, self.codes[(i, j)]);
        DMatrix::from_fn(self.weight.nrows(), self.weight.ncols(), |i, j| value(i, j) - self.weight[(i, j)])
    }
}

/// The scale of each tile that is best while those of the others are as they are: s + ⟨q, −ΔW·C⟩ / ⟨q, q·C⟩, q of that
/// tile alone, half the way where several tiles are in one row.
fn scales(levels: &Levels, problems: &[Problem]) -> Option<Levels> {
    let Levels::Uniform { scales, zeros, signed, range } = levels else { return None };
    let (mut along, mut curve) = (vec![0.0; scales.len()], vec![0.0; scales.len()]);
    let mut is_shared = false;
    for problem in problems {
        let whole = |i: usize, j: usize| {
            let (tile, code) = (problem.tiles[(i, j)] as usize, problem.codes[(i, j)]);
            let code = if *signed { f64::from(code as i8) } else { f64::from(code) };
            code - zeros.as_ref().map_or(0.0, |zeros| zeros[tile])
        };
        let (rows, columns) = problem.weight.shape();
        let numbers = DMatrix::from_fn(rows, columns, whole);
        let slope = product(&problem.off(levels), &problem.covariance);
        let bent = problem.bent(&numbers);
        for j in 0..columns {
            for i in 0..rows {
                let tile = problem.tiles[(i, j)] as usize;
                is_shared |= tile != problem.tiles[(i, 0)] as usize;
                along[tile] -= numbers[(i, j)] * slope[(i, j)];
                curve[tile] += numbers[(i, j)] * bent[(i, j)];
            }
        }
    }
    let step = if is_shared { 0.5 } else { 1.0 };
    let better = |tile: usize| {
        let moved = scales[tile] + step * along[tile] / curve[tile];
        if curve[tile] > 0.0 && moved.is_finite() && moved != 0.0 { moved } else { scales[tile] }
    };
    Some(Levels::uniform((0..scales.len()).map(better).collect(), zeros.clone(), *signed, *range))
}

/// The entries of each table that are best for the codes: `G·c = g` for `G_kl = Σ m_k·C·m_lᵀ` and
/// `g_k = Σ m_k·C·wᵀ` over rows, `m_k` the places of code k (algorithms.md §5.2), with a ridge towards the entries that there are.
fn tables(levels: &Levels, problems: &[Problem]) -> Option<Levels> {
    const RIDGE: f64 = 1e-3;
    let Levels::Tables { tables, entries, .. } = levels else { return None };
    let (entries, count) = (*entries, tables.len() / entries);
    let mut sums = vec![(DMatrix::<f64>::zeros(entries, entries), DVector::<f64>::zeros(entries)); count];
    for problem in problems {
        let (rows, columns) = problem.weight.shape();
        // Rows that are cut in blocks keep the tables that they have.
        problem.tiles.row(0).iter().all(|tile| *tile == problem.tiles[(0, 0)]).then_some(())?;
        let most = (TABLE_WORK / (columns as f64).powi(2)).max(8.0) as usize;
        // A table of one row needs that row.
        let step = if count > 1 { 1 } else { rows.div_ceil(most) };
        let slope = product(&problem.weight, &problem.covariance);
        let of_row = |i: usize| {
            let tile = problem.tiles[(i, 0)] as usize;
            let mut bent = DMatrix::<f64>::zeros(columns, entries);
            for j in 0..columns {
                bent.column_mut(usize::from(problem.codes[(i, j)])).axpy(1.0, &problem.covariance.column(j), 1.0);
            }
            let (mut square, mut side) = (DMatrix::zeros(entries, entries), DVector::zeros(entries));
            for j in 0..columns {
                let code = usize::from(problem.codes[(i, j)]);
                side[code] += slope[(i, j)];
                for other in 0..entries {
                    square[(code, other)] += bent[(j, other)];
                }
            }
            (tile, square, side)
        };
        let parts: Vec<_> = (0..rows).step_by(step).collect::<Vec<_>>().into_par_iter().map(of_row).collect();
        for (tile, square, side) in parts {
            sums[tile].0 += square;
            sums[tile].1 += side;
        }
    }
    let mut better = tables.clone();
    for ((square, side), table) in sums.iter().zip(better.chunks_mut(entries)) {
        let Some((factor, ridge)) = Cholesky::ridged(square, RIDGE) else { continue };
        let old = DVector::from_column_slice(table);
        let aim = (side + old * ridge).transpose();
        let solved = factor.solve_right(&DMatrix::from_row_slice(1, entries, aim.as_slice()));
        if solved.iter().all(|value| value.is_finite()) {
            table.copy_from_slice(solved.as_slice());
        }
    }
    Some(Levels::tables(&better, entries))
}

#[cfg(test)]
mod tests {
    use rand_core::SeedableRng;
    use rand_xoshiro::Xoshiro256PlusPlus;

    use super::*;
    use crate::linalg::{by_rows, normal};

    #[test]
    fn no_step_of_the_polish_adds_error() {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(1);
        let mut noise = |rows: usize, columns: usize| DMatrix::from_fn(rows, columns, |_, _| normal(&mut random));
        let (weight, mixed) = (noise(150, 160), noise(160, 40));
        let covariance = &mixed * mixed.transpose() + DMatrix::identity(160, 160);
        for (tile, is_table) in [([1, 160], false), ([1, 32], false), ([150, 160], true)] {
            let dims = [150, 160];
            let values = by_rows(&weight);
            let scheme = if is_table { Scheme::Table } else { Scheme::Symmetric };
            let plain = nearest((scheme, 3), (DType::Float, &dims, &tile), &values, None).unwrap();
            let ids: Vec<f64> = plain.codes().unwrap().tiles().map(|tile| tile as f64).collect();
            let ids = DMatrix::from_row_slice(150, 160, &ids);
            let mut problem = Problem::new(0, &weight, &ids, &Metric::Full(covariance.clone())).unwrap();
            let mut levels = Levels::of(&plain).unwrap();
            problem.round(&levels);
            let rounded = problem.error(&levels);
            problem.carry_on(&levels);
            let mut last = problem.error(&levels);
            assert!(last < rounded, "{last} {rounded}");
            for _ in 0..3 {
                improve(&mut levels, std::slice::from_ref(&problem));
                let better = problem.error(&levels);
                problem.descend(&levels);
                let polished = problem.error(&levels);
                assert!(better <= last && polished <= better * (1.0 + 1e-12), "{last} {better} {polished}");
                last = polished;
            }
        }
    }
}
