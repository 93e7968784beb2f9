//! Sequential refit: layer after layer, the weights of a compressed model are fitted so that what each layer makes of what
//! the compressed layers before it hand on is closest to what it makes in the original (Zhang 2015; Y. He 2017).

mod bias;
mod chain;
mod kept;
mod statistics;
mod walk;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use globset::GlobSet;
use nalgebra::{DMatrix, DVector};
use rayon::prelude::*;

pub(crate) use self::bias::{Bias, set_matrices};
pub use self::kept::{Factored, Kept, Left, Moved};
use self::{bias::set_weight, chain::Chain, walk::Walk};
use crate::{
    analysis::{
        linear::Linear,
        moments::{self, side_by_side},
    },
    codec::Model,
    coding,
    factor::Metric,
    ir::{Graph, NodeId, Outlet},
    linalg::{Cholesky, add_cross, product},
    verify::{Cannot, Engine, Value},
};

/// The name that what is refitted gets.
const NAME: &str = "refit";
/// Rounds of fitting a layer before a rectifier to what the rectifier lets through.
const ROUNDS: usize = 4;
/// A weight may grow by this much (algorithms.md §0.5): beyond, the system was too badly conditioned.
const MAX_GROWTH: f64 = 10.0;

/// What of layers is fitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// The weights; the mean and deviation of each channel where these can't be, or the vectors that are read are too long.
    Weights,
    /// The mean and deviation of each channel.
    Statistics,
}

/// What a layer is fitted to: rows that the original computes, by sample.
struct Target {
    fit: Fit,
    linear: Linear,
    /// The layers that stand in its place, if it was replaced.
    chain: Option<Chain>,
    /// The node before which it is fitted: the layer itself, or the first one that reads what it makes.
    next: NodeId,
    /// What the layer makes, bias included.
    result: Outlet,
    /// The value whose original the layer approximates: its result, or the sum that it goes into.
    value: Outlet,
    /// The name of that original, and the layer as whose result it holds its channels.
    original: (String, Linear),
    /// The other summand, if the layer is fitted to a sum.
    partner: Option<Outlet>,
    /// Above what the value is cut off where it is cut off below 0, if it is: infinity for a plain rectifier.
    rectified: Option<f64>,
    /// The original's rows at the positions of each sample, of the channels that are left.
    rows: Vec<DMatrix<f32>>,
}

/// The rows that the original computes for a target.
#[derive(Debug)]
struct Wanted {
    /// The axis of the value along which channels stand.
    axis: usize,
    /// All channels at the positions that are looked at, for each sample.
    rows: Vec<DMatrix<f32>>,
}

/// What the original computes for each target, by the names of its result and its value. It is the same for every model that
/// is refitted on the same samples.
#[derive(Debug, Default)]
pub struct Originals(Mutex<BTreeMap<(String, String), Arc<Wanted>>>);

/// Elements of rows that are kept for the next refit: 512 MB.
const MAX_KEPT: usize = 1 << 27;

impl Originals {
    fn known(&self) -> MutexGuard<'_, BTreeMap<(String, String), Arc<Wanted>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The rows for each of `targets`, channels that are gone included.
    fn rows(
        &self,
        engine: &Engine,
        original: &Model,
        model: &Model,
        targets: &[Target],
        samples: (&[Vec<Value>], &[u64]),
    ) -> Result<Vec<Arc<Wanted>>, Cannot> {
        let name = |value: Outlet| model.graph.name(value).to_owned();
        let keys: Vec<_> = targets.iter().map(|target| (name(target.result), name(target.value))).collect();
        let mut found: BTreeMap<_, _> = self.known().clone();
        let open: Vec<_> = targets.iter().zip(&keys).filter(|(_, key)| !found.contains_key(*key)).collect();
        if let (Some(first), false) = (samples.0.first(), open.is_empty()) {
            let known = original.graph.values();
            let wanted: Vec<Outlet> = open.iter().map(|(target, _)| known[target.original.0.as_str()]).collect();
            let mut unique = wanted.clone();
            unique.sort_unstable();
            unique.dedup();
            let probe = engine.probe(original, &unique, first)?;
            let cut = |(sample, key): (&Vec<Value>, &u64)| {
                let values = probe.run(sample)?;
                let rows = |((target, (result, _)), value): (&(&Target, &(String, String)), &Outlet)| {
                    let value = &values[unique.binary_search(value).unwrap_or_default()];
                    let layer = &target.original.1;
                    let at = moments::positions(layer.positions_of(value), result, *key);
                    (target.linear.channel_axis(value.dims.len()), layer.results(value, &at).map(|v| v as f32))
                };
                Ok(open.iter().zip(&wanted).map(rows).collect::<Vec<_>>())
            };
            let cut: Vec<Vec<_>> = samples.0.par_iter().zip(samples.1).map(cut).collect::<Result<_, Cannot>>()?;
            let mut wanted: Vec<_> =
                open.iter().map(|_| Wanted { axis: 0, rows: Vec::with_capacity(cut.len()) }).collect();
            for sample in cut {
                for (wanted, (axis, rows)) in wanted.iter_mut().zip(sample) {
                    wanted.axis = axis;
                    wanted.rows.push(rows);
                }
            }
            let size = |wanted: &Wanted| wanted.rows.iter().map(DMatrix::len).sum::<usize>();
            let mut kept: usize = found.values().map(|wanted| size(wanted)).sum();
            for ((_, key), rows) in open.into_iter().zip(wanted) {
                kept += size(&rows);
                let rows = Arc::new(rows);
                if kept <= MAX_KEPT {
                    self.known().insert(key.clone(), Arc::clone(&rows));
                }
                found.insert(key.clone(), rows);
            }
        }
        Ok(keys.iter().filter_map(|key| found.get(key).cloned()).collect())
    }
}

/// Refits the layers of `model`, which was made from `original` and of whose channels `kept` are left, on `samples`; the weights
/// of those that read vectors of more than `max_size` elements are not fitted, and none of the layers that `keep` names. Says how many
/// layers were.
///
/// # Errors
///
/// When the engine can't run one of them, or a part of it.
pub fn refit(
    (engine, originals): (&Engine, &Originals),
    original: &Model,
    model: &mut Model,
    kept: &Kept,
    (what, samples, max_size, keep): (Fit, &[Vec<Value>], usize, &GlobSet),
    progress: &mut dyn FnMut(&str),
) -> Result<usize, Cannot> {
    let is_fitted = |linear: &Linear| what == Fit::Weights && linear.is_direct() && linear.columns <= max_size;
    let mut targets = targets(original, model, kept, &is_fitted);
    let is_kept = |target: &Target| {
        let linear = &target.linear;
        [model.graph.label(linear.node), model.graph.name(linear.weight)].iter().any(|name| keep.is_match(name))
    };
    targets.retain(|target| !is_kept(target));
    if samples.is_empty() || targets.is_empty() {
        return Ok(0);
    }
    progress("running the original for the refit");
    let keys: Vec<u64> = samples.iter().map(|sample| moments::hash(sample)).collect();
    let rows = originals.rows(engine, original, model, &targets, (samples, &keys))?;
    for (target, wanted) in targets.iter_mut().zip(rows) {
        let of_original = |rows| kept.of_original(model.graph.name(target.value), wanted.axis, rows);
        target.rows = wanted.rows.iter().map(of_original).collect();
    }
    let (mut walk, mut fitted) = (Walk::new(engine, &model.graph, samples), 0);
    let count = targets.len();
    for (i, target) in targets.iter().enumerate() {
        progress(&format!("refitting layer {} of {count}", i + 1));
        walk.advance(model, target.next)?;
        let done = match target.fit {
            Fit::Weights => fit(&mut model.graph, target, kept, &walk, &keys),
            Fit::Statistics => statistics::repair(&mut model.graph, target, &mut walk, &keys),
        };
        fitted += usize::from(done.is_some());
    }
    Ok(fitted)
}

/// The layers of `model` that read something else than in the original, in the order in which they are fitted, with what each is
/// fitted to; `is_fitted` says of which the weights are.
fn targets(original: &Model, model: &Model, kept: &Kept, is_fitted: &dyn Fn(&Linear) -> bool) -> Vec<Target> {
    let (graph, known) = (&model.graph, original.graph.values());
    let mut touched: BTreeSet<Outlet> = BTreeSet::new();
    let order: BTreeMap<NodeId, usize> = graph.ops().into_iter().enumerate().map(|(i, id)| (id, i)).collect();
    let mut targets = Vec::new();
    for id in graph.ops() {
        let mut reads = graph.operands(id).into_iter().flatten().chain(graph.captures(id).into_values());
        let reads_other = reads.any(|value| touched.contains(&value) || kept.touches(graph.name(value)))
            || reads_elsewhere(&original.graph, graph, id, &known);
        let chain = Chain::of(graph, id, kept);
        let linear = Linear::of(graph, id);
        let is_other = linear.as_ref().is_some_and(|linear| !is_as_before(original, graph, linear, &known, kept));
        let reads_other = reads_other || chain.is_some();
        if reads_other || is_other {
            touched.extend((0..graph.output_count(id)).map(|slot| id.at(slot)));
        }
        let chain = chain.filter(|chain| is_fitted(&chain.whole));
        let alone = || linear.filter(|linear| !linear.is_recurrent() && graph.uses(linear.weight).len() == 1);
        let linear = chain.as_ref().map(|chain| chain.whole.clone()).or_else(alone);
        let Some(linear) = linear.filter(|_| reads_other) else { continue };
        let result = Bias::of(graph, &linear).result(&linear);
        let fit = if is_fitted(&linear) { Fit::Weights } else { Fit::Statistics };
        let is_known = |value: Outlet| known.contains_key(kept.original(graph.name(value)));
        let sum = partner(graph, &linear, result, &order).filter(|(sum, _)| is_known(*sum));
        let sum = sum.filter(|_| fit == Fit::Weights);
        let (value, partner) = sum.map_or((result, None), |(sum, partner)| (sum, Some(partner)));
        let next = match fit {
            Fit::Weights => Some(chain.as_ref().map_or(id, |chain| chain.first)),
            Fit::Statistics => graph.uses(result).into_iter().map(|(node, _)| node).min_by_key(|node| order.get(node)),
        };
        if let (Some(next), true) = (next, is_known(value)) {
            let (rectified, name) = (rectified(graph, value), graph.name(value));
            let layer = kept.moved.get(name).map_or_else(|| linear.clone(), |moved| moved.linear.clone());
            let original = (kept.original(name).to_owned(), layer);
            let rows = Vec::new();
            targets.push(Target { fit, linear, chain, next, result, value, original, partner, rectified, rows });
        }
    }
    targets.sort_by_key(|target| order.get(&target.next));
    targets
}

/// Whether a node reads another value than that which makes the same in the original.
fn reads_elsewhere(original: &Graph, graph: &Graph, node: NodeId, known: &BTreeMap<&str, Outlet>) -> bool {
    fn read(graph: &Graph, node: NodeId) -> Vec<&str> {
        let values = graph.operands(node).into_iter().flatten().filter(|&value| graph.weight(value).is_none());
        values.map(|value| graph.name(value)).collect()
    }
    known.get(graph.name(node.out())).is_some_and(|value| read(original, value.node) != read(graph, node))
}

/// Where a rectifier that alone reads `value` cuts off above, if one does that is zero below zero.
fn rectified(graph: &Graph, value: Outlet) -> Option<f64> {
    let (node, _) = graph.sole_use(value)?;
    match graph.op(node)?.standard()? {
        "Relu" => Some(f64::INFINITY),
        "Clip" => {
            let op = graph.op(node)?;
            let limit = |name: &str, slot: u32| match graph.operand(node, slot) {
                Some(limit) => graph.constant(limit)?.f64s()?.first().copied(),
                None => op.float(name).map(f64::from),
            };
            (limit("min", 1)? == 0.0).then(|| limit("max", 2).unwrap_or(f64::INFINITY))
        }
        _ => None,
    }
}

/// Whether a layer is the original's, but for channels that it no longer makes.
fn is_as_before(original: &Model, graph: &Graph, linear: &Linear, known: &BTreeMap<&str, Outlet>, kept: &Kept) -> bool {
    let name = graph.name(linear.node.out());
    let before = known.get(name).and_then(|value| Linear::of(&original.graph, value.node));
    let Some(before) = before else { return false };
    let (Some(old), Some(new)) = (original.graph.constant(before.weight), graph.constant(linear.weight)) else {
        return false;
    };
    let axis = linear.output_axis();
    let channels = kept.left.get(name).and_then(|axes| axes.values().next());
    let old = channels.map_or(Some(old.clone()), |kept| old.select(axis, kept));
    old.is_some_and(|old| old.dims() == new.dims() && old.same(new))
}

/// The sum that `result` goes into and the other summand, if that is there before the layer is run.
fn partner(
    graph: &Graph,
    linear: &Linear,
    result: Outlet,
    order: &BTreeMap<NodeId, usize>,
) -> Option<(Outlet, Outlet)> {
    let (add, slot) = graph.sole_use(result)?;
    graph.op_of(add, "Add")?;
    let partner = graph.operand(add, 1 - slot)?;
    let is_before = match order.get(&partner.node) {
        Some(place) => place < &order[&linear.node],
        None => graph.constant(partner).is_none(),
    };
    is_before.then(|| (add.out(), partner))
}

/// What a layer reads and is to make at all positions of all samples, as columns: for each group d×n, and o·groups×n.
struct Rows {
    x: Vec<DMatrix<f64>>,
    y: DMatrix<f64>,
    /// What is added to what the layer makes before it is rectified.
    partner: Option<DMatrix<f64>>,
}

impl Rows {
    /// What one group of so many rows of W is to make, and what is added to it.
    fn of_group(&self, group: usize, rows: usize) -> (DMatrix<f64>, Option<DMatrix<f64>>) {
        let own = |all: &DMatrix<f64>| all.rows(group * rows, rows).into_owned();
        (own(&self.y), self.partner.as_ref().map(own))
    }

    /// `None` where shapes are not what they were in the original.
    fn cut(graph: &Graph, target: &Target, walk: &Walk<'_>, keys: &[u64]) -> Option<Self> {
        let (linear, name) = (&target.linear, graph.name(target.result));
        let cut = |((alive, rows), key): ((&walk::Alive, &DMatrix<f32>), &u64)| {
            let x = alive.get(&linear.input)?;
            let at = moments::positions(linear.positions(x), name, *key);
            let shape = (linear.rows * linear.groups, at.len());
            let partner = match target.partner {
                Some(partner) => Some(linear.results(alive.get(&partner)?, &at)),
                None => None,
            };
            let fits = rows.shape() == shape && partner.as_ref().is_none_or(|partner| partner.shape() == shape);
            fits.then(|| (linear.vectors(x, &at), rows.map(f64::from), partner))
        };
        let samples = walk.samples.par_iter().zip(&target.rows).zip(keys);
        let cut: Vec<_> = samples.map(cut).collect::<Option<_>>()?;
        let partners: Option<Vec<_>> = cut.iter().map(|sample| sample.2.as_ref()).collect();
        Some(Self {
            x: (0..linear.groups).map(|group| side_by_side(cut.iter().map(|sample| &sample.0[group]))).collect(),
            y: side_by_side(cut.iter().map(|sample| &sample.1)),
            partner: partners.filter(|p| !p.is_empty()).map(|partners| side_by_side(partners.into_iter())),
        })
    }
}

/// Fits one layer to its target; `None`, and nothing done, where that does not work out.
fn fit(graph: &mut Graph, target: &Target, kept: &Kept, walk: &Walk<'_>, keys: &[u64]) -> Option<()> {
    let (linear, mut fitted) = (&target.linear, graph.clone());
    let bias = Bias::of(graph, linear);
    let stored = graph.weight(linear.weight)?;
    let before = kept.before_coding(graph.name(linear.weight)).filter(|old| old.dims() == stored.value().dims());
    let before = before.unwrap_or(stored.value());
    let old = match &target.chain {
        Some(chain) => chain.matrices(graph)?,
        None => linear.matrices(&before.f64s()?),
    };
    bias.values(graph, linear)?;
    let rows = Rows::cut(graph, target, walk, keys)?;
    let norm = |matrices: &[DMatrix<f64>]| matrices.iter().map(DMatrix::norm_squared).sum::<f64>().sqrt();
    let is_sound = |matrices: &[DMatrix<f64>], biases: &[DVector<f64>]| {
        norm(matrices) <= MAX_GROWTH * norm(&old) && biases.iter().all(|bias| bias.iter().all(|v| v.is_finite()))
    };
    let values = |biases: &[DVector<f64>]| biases.iter().flat_map(|bias| bias.iter().copied()).collect::<Vec<f64>>();
    if let Some(chain) = &target.chain {
        let (stages, matrices, biases) = chain.fit(&rows, &old, target.rectified)?;
        is_sound(&matrices, &biases).then_some(())?;
        // The bias is stored as the weight is, which goes when another is set.
        bias.set(&mut fitted, linear, &values(&biases), NAME)?;
        chain.set(&mut fitted, &stages)?;
        *graph = fitted;
        return Some(());
    }
    let systems: Vec<_> = rows.x.par_iter().zip(&old).map(|(x, old)| System::new(x, old)).collect::<Option<_>>()?;
    let of_group = |(group, (x, old)): (usize, (&DMatrix<f64>, &DMatrix<f64>))| {
        let (wanted, partner) = rows.of_group(group, linear.rows);
        fit_group((x, &systems[group]), old, &wanted, partner.as_ref(), target.rectified)
    };
    let solved: Vec<_> = rows.x.par_iter().zip(&old).enumerate().map(of_group).collect();
    let (matrices, mut biases): (Vec<_>, Vec<_>) = solved.into_iter().unzip();
    is_sound(&matrices, &biases).then_some(())?;
    let metrics: Vec<_> = if stored.is_stored() { systems.iter().map(System::metric).collect() } else { Vec::new() };
    let weight = coding::fit_like(stored, linear, &matrices, &metrics)?;
    // What the codes lose of the mean of what is read, the bias makes up for.
    let made = linear.matrices(&weight.value().f64s()?);
    for (((bias, system), matrix), made) in biases.iter_mut().zip(&systems).zip(&matrices).zip(&made) {
        *bias += (matrix - made) * &system.mean;
    }
    bias.set(&mut fitted, linear, &values(&biases), NAME)?;
    set_weight(&mut fitted, linear, weight, NAME)?;
    *graph = fitted;
    Some(())
}

/// The matrix and bias of one group that make what is wanted of x (d×n), less what `partner` adds to it, before a rectifier
/// that cuts off at 0 and above `rectified`.
fn fit_group(
    (x, system): (&DMatrix<f64>, &System),
    old: &DMatrix<f64>,
    wanted: &DMatrix<f64>,
    partner: Option<&DMatrix<f64>>,
    rectified: Option<f64>,
) -> (DMatrix<f64>, DVector<f64>) {
    let of_layer = |sum: &DMatrix<f64>| partner.map_or_else(|| sum.clone(), |partner| sum - partner);
    let (mut matrix, mut bias) = system.solve(x, &of_layer(wanted), old);
    let Some(limit) = rectified else { return (matrix, bias) };
    for _ in 0..ROUNDS {
        let mut made = product(&matrix, x);
        made.column_iter_mut().for_each(|mut column| column += &bias);
        if let Some(partner) = partner {
            made += partner;
        }
        let eased = wanted.zip_map(&made, |wanted, made| eased(wanted, made, limit));
        (matrix, bias) = system.solve(x, &of_layer(&eased), old);
    }
    (matrix, bias)
}

/// What a layer before a rectifier that is flat below 0 and above `limit` should make where `wanted` is wanted and `made` is
/// made: on the flat parts, anything there is as good (Zhang 2015).
fn eased(wanted: f64, made: f64, limit: f64) -> f64 {
    if wanted <= 0.0 {
        made.min(0.0)
    } else if wanted >= limit {
        made.max(limit)
    } else {
        wanted
    }
}

/// The linear system of a layer.
struct System {
    mean: DVector<f64>,
    covariance: DMatrix<f64>,
    factor: Option<(Cholesky, f64)>,
}

impl System {
    /// For what is read, d×n.
    fn new(x: &DMatrix<f64>, old: &DMatrix<f64>) -> Option<Self> {
        let mut moments = moments::Moments::new(old.ncols());
        (x.ncols() > 0).then(|| moments.add(x))?;
        // Where what is read never varies, the mean is all there is to fit.
        let covariance = moments.covariance();
        let factor = Cholesky::ridged(&covariance, moments.ridge());
        Some(Self { mean: moments.mean(), covariance, factor })
    }

    /// How what is read varies, with the ridge.
    fn metric(&self) -> Metric {
        let mut spread = self.covariance.clone();
        let Some((_, ridge)) = &self.factor else { return Metric::Identity };
        (0..spread.nrows()).for_each(|i| spread[(i, i)] += ridge);
        Metric::Full(spread)
    }

    /// `W' = (C_yx + λW₀)·(C_xx + λI)⁻¹` and `b' = E y − W'·E x`: the affine map closest to what is wanted (o×n), with a ridge that
    /// pulls towards W₀ (algorithms.md §0.4).
    fn solve(&self, x: &DMatrix<f64>, y: &DMatrix<f64>, old: &DMatrix<f64>) -> (DMatrix<f64>, DVector<f64>) {
        let n = x.ncols() as f64;
        let mean = y.column_sum() / n;
        let matrix = match &self.factor {
            Some((factor, lambda)) => {
                let mut cross = DMatrix::zeros(y.nrows(), x.nrows());
                add_cross(&mut cross, y, x);
                cross /= n;
                cross.ger(-1.0, &mean, &self.mean, 1.0);
                factor.solve_right(&(cross + old * *lambda))
            }
            None => old.clone(),
        };
        let bias = mean - &matrix * &self.mean;
        (matrix, bias)
    }
}
