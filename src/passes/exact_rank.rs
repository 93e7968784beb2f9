//! See [`ExactRank`].

use std::collections::BTreeSet;

use nalgebra::DMatrix;
use xxhash_rust::xxh3::xxh3_64;

use super::rewrite::{Replacement, Site, Statistics};
use crate::{
    analysis::{linear::multiplies, moments::side_by_side},
    factor::{Family, Form, Shape, Target},
    ir::{DType, Graph, NodeId, Outlet, Tensor, Weight},
    linalg::{Spectrum, least_rank},
    pass::{Context, Declare, Fidelity, Pass, everywhere},
};

/// Split weights that are products of much smaller ones.
///
/// A weight W (o×d) of rank r below half of o·d / (o + d) becomes B·A, B o×r and A r×d, without an error; a kernel whose channels
/// are mixed so becomes one of fewer channels with a 1×1 after or before it. That saves half of the elements and of the
/// multiply-adds at least.
///
/// Applies when: the weight is of 32 bits, every row and column of the product is the weight's but for rounding, and what a kernel
/// reads or makes at the places of the 1×1 is no larger than elsewhere. Ranks above 255 are not looked for.
///
/// Fidelity: rounding.
#[derive(Debug, clap::Parser)]
#[command(name = "exact-rank")]
pub(super) struct ExactRank {}

impl Declare for ExactRank {
    const NAME: &'static str = "exact-rank";
    const FIDELITY: Fidelity = Fidelity::Rounding;
}

/// Ranks up to this are looked for: telling that a matrix has no lower one takes work that grows with its cube.
const MAX_RANK: usize = 256;
/// Elements that a weight must have for the names and the node of a second one to be worth it.
const LEAST: usize = 1024;
/// The energy beyond the rank, of all energy: some ten times what rounding to 32 bits leaves.
const NOISE: f64 = 1e-13;
/// How far a row or column of the product may be from the weight's, of its norm: some rounding errors of 32 bits.
const CLOSE: f64 = 2e-6;

/// Tells what is remembered of a weight by this pass.
const EXACT: u64 = 0x6578_6163_7472_616e;

impl Pass for ExactRank {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        let mut split = 0;
        everywhere(graph, &mut |graph| loop {
            let before = split;
            let statistics = Statistics::default();
            for weight in suspects(graph, cx) {
                let Ok(site) = Site::of(graph, weight, (&statistics, cx), false) else { continue };
                if site.is_stack() {
                    continue;
                }
                let find = || exact(graph, &site, &statistics);
                if let Some((form, chain)) = &*cx.remember(site.key ^ EXACT, find)
                    && site.replace(graph, *form, chain, Self::NAME).is_some()
                {
                    split += site.readers();
                }
            }
            // What is left of a kernel may be of low rank on its other side.
            if split == before {
                break;
            }
        });
        cx.add("layers split", split);
        Ok(())
    }
}

/// The weights of layers of `graph` that may have such a rank, told by a few of their elements.
fn suspects(graph: &Graph, cx: &mut Context) -> BTreeSet<Outlet> {
    let mut questions = Vec::new();
    for node in graph.ops() {
        let slots = (0..2).filter_map(|slot| graph.operand(node, slot));
        for weight in slots.filter(|_| multiplies(graph, node)) {
            // What is stored otherwise has few values, which factors of it have not.
            let stored = graph.weight(weight).filter(|weight| !weight.is_stored());
            let Some(tensor) = stored.map(Weight::value) else { continue };
            if tensor.dtype() == DType::Float && tensor.len() >= LEAST {
                let groups = graph.op(node).and_then(|op| op.int("group")).unwrap_or(1).max(1) as usize;
                questions.push((weight, groups));
            }
        }
    }
    questions.sort_unstable();
    questions.dedup();
    let key = |&(weight, groups): &(Outlet, usize)| {
        let sketch = graph.constant(weight).map_or(0, Tensor::sketch);
        xxh3_64(format!("{} {sketch} {groups} exact rank", graph.name(weight)).as_bytes())
    };
    let found = cx.remember_all(&questions, key, |&(weight, groups)| {
        graph.constant(weight).is_some_and(|tensor| is_suspect(tensor, groups))
    });
    questions.iter().zip(found).filter(|(_, found)| **found).map(|((weight, _), _)| *weight).collect()
}

/// Whether the elements of the first rows and columns do not show that a weight has no rank that is worth a split: seen as rows and
/// the rest, and as columns and the rest, of its first group.
fn is_suspect(tensor: &Tensor, groups: usize) -> bool {
    let [rows, columns, kernel @ ..] = tensor.dims() else { return false };
    let (rows, columns, taps) = (rows / groups, *columns, kernel.iter().product::<usize>());
    let has_rank = |height: usize, width: usize, at: &dyn Fn(usize, usize) -> usize| {
        let size = worthwhile(height, width);
        if size < 2 {
            return true;
        }
        // A few more than that, since some may be dead.
        let more = size + size / 4;
        let (height, width) = (height.min(more), width.min(more));
        let places = (0..width).flat_map(|j| (0..height).map(move |i| (i, j)));
        let values = tensor.floats_at(places.map(|(i, j)| at(i, j)));
        values.is_none_or(|values| least_rank(DMatrix::from_vec(height, width, values)) >= size)
    };
    let by_rows = has_rank(rows, columns * taps, &|i, j| i * columns * taps + j);
    let by_columns = taps == 1 || has_rank(columns, rows * taps, &|i, j| (j / taps * columns + i) * taps + j % taps);
    !(by_rows && by_columns)
}

/// The rank from which on factors have more than half of the elements of a matrix, or are not looked for.
fn worthwhile(rows: usize, columns: usize) -> usize {
    (rows * columns / (2 * (rows + columns)).max(1) + 1).min(MAX_RANK)
}

/// The chain that makes the weight of `site` but for rounding, if there is one that is worth it.
fn exact(graph: &Graph, site: &Site, statistics: &Statistics) -> Option<(Form, Replacement)> {
    let target = site.target(graph, statistics)?;
    // A 1×1 before a kernel runs at each place that is read, and one after a kernel that spreads at each that is made.
    let keeps = site.nodes().all(|node| keeps_extents(graph, node));
    let is_lean = |family: Family| keeps || (family == Family::Before) == site.shape.spreads;
    let families = [Family::After, Family::Before].into_iter().filter(|&f| f.fits(&site.shape) && is_lean(f));
    let found = families.filter_map(|family| of_family(&target, family));
    found.min_by_key(|(form, _)| form.elements(&site.shape))
}

/// Whether a convolution makes as many places as it reads; so do products of matrices.
fn keeps_extents(graph: &Graph, node: NodeId) -> bool {
    let Some(op) = graph.op(node) else { return false };
    let kernel = graph.operand(node, 1).and_then(|weight| graph.constant(weight)).map_or(&[][..], Tensor::dims);
    let kernel = kernel.get(2..).unwrap_or_default();
    let entry =
        |name: &str, axis: usize, absent: i64| op.ints(name).and_then(|v| v.get(axis).copied()).unwrap_or(absent);
    let is_kept = |axis: usize| {
        let reach = (kernel[axis] as i64 - 1) * entry("dilations", axis, 1);
        let pads = entry("pads", axis, 0) + entry("pads", axis + kernel.len(), 0);
        let is_padded = matches!(op.string("auto_pad"), Some("SAME_UPPER" | "SAME_LOWER")) || pads == reach;
        entry("strides", axis, 1) == 1 && is_padded
    };
    (0..kernel.len()).all(is_kept)
}

/// The member of a family of the least rank that loses nothing, if that is worth it.
fn of_family(target: &Target, family: Family) -> Option<(Form, Replacement)> {
    let Target { matrices, shape, .. } = target;
    let rank = |matrix: &DMatrix<f64>| {
        let unfolded = unfolded(matrix, shape, family);
        let limit = worthwhile(unfolded.nrows(), unfolded.ncols());
        let spectrum = Spectrum::of(&unfolded, Some(limit))?;
        (1..limit).find(|&rank| spectrum.tail(rank) <= NOISE * spectrum.total)
    };
    let rank = matrices.iter().map(rank).collect::<Option<Vec<_>>>()?.into_iter().max()?;
    let form = family.member(shape, rank);
    if form.elements(shape) * 2 > shape.elements() {
        return None;
    }
    let stages = family.prepare(target, None)?.fit(target, form)?.stages;
    let rounded = stages.iter().map(|stage| stage.iter().map(|&v| f64::from(v as f32)).collect()).collect::<Vec<_>>();
    let made = form.compose(shape, &rounded);
    let is_close = |(made, matrix): (&DMatrix<f64>, &DMatrix<f64>)| {
        // What is zero may become as little as rounding of the rest makes of it.
        let least = matrix.norm() * f64::EPSILON;
        let rows = made.row_iter().zip(matrix.row_iter()).map(|(made, row)| ((made - row).norm(), row.norm()));
        let columns = made.column_iter().zip(matrix.column_iter()).map(|(made, own)| ((made - own).norm(), own.norm()));
        rows.chain(columns).all(|(lost, whole)| lost <= CLOSE * whole + least)
    };
    made.iter()
        .zip(matrices)
        .all(is_close)
        .then_some((form, Replacement { stages, lost: None, orders: None, error: 0.0 }))
}

/// W with the side that a family factors as its rows.
fn unfolded(matrix: &DMatrix<f64>, shape: &Shape, family: Family) -> DMatrix<f64> {
    let taps = shape.taps();
    let part = |tap: usize| match (family, shape.spreads) {
        (Family::Before, false) => {
            matrix.select_columns(&(0..shape.reads).map(|c| c * taps + tap).collect::<Vec<_>>()).transpose()
        }
        _ => matrix.select_rows(&(0..shape.makes).map(|row| row * taps + tap).collect::<Vec<_>>()),
    };
    match (family, shape.spreads) {
        (Family::After, false) | (Family::Before, true) => matrix.clone(),
        _ => side_by_side((0..taps).map(part).collect::<Vec<_>>().iter()),
    }
}
