//! See [`Svd`].

use std::sync::Arc;

use nalgebra::{DMatrix, DVector};
use xxhash_rust::xxh3::Xxh3;

use crate::{
    analysis::{cost::latency, linear::Linear, moments::together, shapes::Shapes},
    ir::{Graph, Inlet, NodeId, Op, Outlet},
    linalg::{Cholesky, Spectrum, product},
    pass::{Context, Declare, Fidelity, Minimize, Pass, open_to_loss},
    refit::Bias,
};

/// Split the weights of `Gemm` and `MatMul` into two factors of low rank.
///
/// W (o×d) becomes B·A, B o×r and A r×d, the best approximation of its rank (Eckart & Young 1936; Xue 2013); one layer
/// becomes two, and the bias stays with the second. That saves parameters where r < o·d / (o + d).
///
/// With samples, it is the best approximation of what the layer makes of what it reads: B holds the first eigenvectors of
/// W·C·Wᵀ, C the covariance of what is read, and A is Bᵀ·W (Zhang 2015; Chen 2021). The bias takes the mean of what is lost,
/// and the layers after the first one that is split are fitted to the original, one after another.
///
/// Applies when: one operand is a constant matrix, transposed or behind `Identity` or `Transpose` or not. A weight with
/// several readers is split for all of them or for none.
///
/// Fidelity: lossy. Without `rank` or `energy`, the error budget sets the rank of each layer.
#[derive(Debug, clap::Parser)]
#[command(name = "svd")]
pub(super) struct Svd {
    /// The rank of every layer, at least 1.
    #[arg(long, value_parser = super::positive, conflicts_with = "energy")]
    rank: Option<usize>,
    /// The least rank that keeps this share of a weight's squared norm, between 0 and 1.
    #[arg(long, value_parser = super::share)]
    energy: Option<f64>,
}

impl Declare for Svd {
    const NAME: &'static str = "svd";
    const FIDELITY: Fidelity = Fidelity::Lossy;
}

/// Bytes of the nodes and names that a split adds to the file, about.
const OVERHEAD: f64 = 200.0;

impl Pass for Svd {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        let shapes = cx.shapes(graph);
        self.split_graph(graph, &shapes, cx);
        Ok(())
    }

    fn is_fixed(&self) -> bool {
        self.rank.is_some() || self.energy.is_some()
    }
}

/// A `Gemm` or `MatMul` with a constant matrix, seen as y = x·M, or y = M·x.
struct Layer {
    node: NodeId,
    /// The constant itself, before any `Identity` or `Transpose`.
    weight: Outlet,
    /// The slot that the constant, or what is made of it, enters.
    slot: u32,
    /// Whether the product reads the transposed constant.
    transposed: bool,
}

impl Layer {
    fn of(graph: &Graph, node: NodeId) -> Option<Self> {
        let op = graph.op(node)?;
        let gemm = match op.standard()? {
            "Gemm" => true,
            "MatMul" => false,
            _ => return None,
        };
        [1, 0].into_iter().find_map(|slot| {
            let (weight, flipped) = source(graph, graph.operand(node, slot)?)?;
            let flag = gemm && op.int(if slot == 0 { "transA" } else { "transB" }) == Some(1);
            let transposed = flipped != flag;
            Some(Self { node, weight, slot, transposed })
        })
    }
}

/// The constant matrix that `value` is, and whether transposed on the way.
fn source(graph: &Graph, mut value: Outlet) -> Option<(Outlet, bool)> {
    let mut flipped = false;
    loop {
        if let Some(weight) = graph.weight(value) {
            let fits = weight.value().dims().len() == 2 && crate::ir::tensor::is_float(weight.value().dtype());
            return fits.then_some((value, flipped));
        }
        flipped ^= flips(graph.op(value.node)?)?;
        value = graph.operand(value.node, 0)?;
    }
}

/// Whether an operator transposes a matrix or passes it on as it is; `None` for any other operator.
fn flips(op: &Op) -> Option<bool> {
    match (op.standard()?, op.ints("perm")) {
        ("Identity", _) | ("Transpose", Some([0, 1])) => Some(false),
        ("Transpose", None | Some([1, 0])) => Some(true),
        _ => None,
    }
}

impl Svd {
    /// Splits the weights of `graph`, then those of the bodies in it.
    fn split_graph(&self, graph: &mut Graph, shapes: &Shapes, cx: &mut Context) {
        let nodes = graph.ops();
        let mut weights: Vec<Outlet> = nodes.iter().filter_map(|&node| Some(Layer::of(graph, node)?.weight)).collect();
        weights.sort_unstable();
        weights.dedup();
        weights.retain(|&w| graph.contains(w.node));
        for weight in weights {
            self.split_all(graph, shapes, weight, cx);
        }
        for id in open_to_loss(graph, self.is_fixed(), cx) {
            let bodies = graph.op(id).map_or(&[][..], |op| &op.bodies);
            let inside: Vec<_> = bodies.iter().map(|body| shapes.inside(graph, id, &body.graph)).collect();
            for (body, shapes) in graph.bodies_mut(id).iter_mut().zip(&inside) {
                self.split_graph(&mut body.graph, shapes, cx);
            }
        }
    }

    /// Splits `weight` for everything that reads it, or leaves it alone and says why.
    fn split_all(&self, graph: &mut Graph, shapes: &Shapes, weight: Outlet, cx: &mut Context) -> Option<()> {
        let name = graph.name(weight).to_owned();
        let mut layers = Vec::new();
        if !collect(graph, weight, &mut layers) {
            cx.decline(&name, "is also read by something that svd can't split");
            return None;
        }
        let labels: Vec<_> = layers.iter().map(|layer| graph.label(layer.node)).collect();
        if cx.is_kept(&[&name]) || cx.is_kept(&labels) {
            cx.decline(&name, "kept by --keep");
            return None;
        }
        if graph.is_pinned(weight) {
            cx.decline(&name, "is named by an annotation or by training information");
            return None;
        }
        let stored = graph.weight(weight)?.clone();
        let [rows, columns] = stored.value().dims() else { return None };
        let (rows, columns) = (*rows, *columns);
        let values = stored.value().f64s()?;
        if !values.iter().all(|v| v.is_finite()) {
            cx.decline(&name, "holds values that are not finite");
            return None;
        }
        let break_even = (rows * columns).checked_div(rows + columns)?;
        if break_even < 2 || self.rank.is_some_and(|rank| rank * (rows + columns) >= rows * columns) {
            cx.decline(&name, &format!("pays only below rank {break_even}"));
            return None;
        }
        let metric = Metric::of(graph, weight, &layers, cx);
        // What vectors are multiplied by, o×d.
        let flip = metric.as_ref().is_some_and(|metric| metric.transposed);
        let turned = |matrix: DMatrix<f64>| if flip { matrix.transpose() } else { matrix };
        let matrix = turned(DMatrix::from_row_slice(rows, columns, &values));
        let read = metric.as_ref().and_then(|metric| metric.read.as_ref().as_ref());
        let key =
            stored.value().hash() ^ self.rank.unwrap_or(0) as u64 ^ metric.as_ref().map_or(0, |metric| metric.key);
        let spectrum = cx.remember(key, || match read {
            Some(read) => Spectrum::of(&product(&matrix, &read.root), self.rank),
            None => Spectrum::of(&matrix, self.rank),
        });
        let spectrum = spectrum.as_ref().as_ref()?;
        let costs = Costs::of(graph, shapes, &layers, cx.minimize)?;
        let Some(rank) = self.choose(spectrum, (rows, columns), costs, cx) else {
            cx.decline(&name, &format!("no rank below break-even {break_even} is worth its error"));
            return None;
        };
        cx.predicted += spectrum.tail(rank) / spectrum.total.max(f64::MIN_POSITIVE) * layers.len() as f64;
        let (left, right) = spectrum.factors(&matrix, rank);
        if let (Some(metric), Some(read)) = (&metric, read) {
            let lost = (&matrix - product(&left, &right)) * &read.mean;
            for linear in &metric.layers {
                let bias = Bias::of(graph, linear);
                let values = bias.values(graph, linear)?;
                let values: Vec<_> = values.iter().zip(lost.iter()).map(|(bias, lost)| bias + lost).collect();
                bias.set(graph, linear, &values, Self::NAME)?;
            }
            cx.refit = true;
        }
        let (left, right) = if flip { (right.transpose(), left.transpose()) } else { (left, right) };
        let flat = |m: &DMatrix<f64>| m.transpose().as_slice().to_vec();
        let left = stored.fit(&[rows, rank], &flat(&left))?;
        let right = stored.fit(&[rank, columns], &flat(&right))?;
        let left = graph.add_const(left, &format!("{name}.svd.left"));
        let right = graph.add_const(right, &format!("{name}.svd.right"));
        for layer in &layers {
            split(graph, layer, left, right)?;
        }
        // Where every reader wants them transposed, nobody reads the factors themselves.
        graph.sweep(left.node);
        graph.sweep(right.node);
        cx.add("layers split", layers.len());
        Some(())
    }

    /// The rank for a weight, or `None` to leave it whole.
    fn choose(
        &self,
        spectrum: &Spectrum,
        (rows, columns): (usize, usize),
        costs: Costs,
        cx: &Context,
    ) -> Option<usize> {
        let (sides, whole) = (rows + columns, rows * columns);
        if let Some(rank) = self.rank {
            return Some(rank.max(1)).filter(|r| *r <= spectrum.basis.ncols());
        }
        let most = (whole - 1) / sides;
        if let Some(energy) = self.energy {
            return (1..=most.min(spectrum.energies.len()))
                .find(|&r| spectrum.tail(r) <= (1.0 - energy) * spectrum.total);
        }
        // The least of error + price · cost; leaving the weight whole costs no error. Just below break-even, ranks save
        // little and never win on price: a ceiling on the error is what reaches them, at any price.
        let price = cx.price.per_byte;
        let error = |rank: usize| spectrum.tail(rank) / spectrum.total;
        let split = |rank: usize| {
            costs.elements * (rank * sides) as f64 / whole as f64 + costs.split + costs.rank * rank as f64
        };
        let cost = |rank: usize| error(rank) + price * split(rank);
        let mut options = (1..=most).filter(|&rank| error(rank) <= cx.price.ceiling && split(rank) < costs.elements);
        if price.is_infinite() {
            return options.next();
        }
        let best = options.map(|rank| (cost(rank), rank)).min_by(|a, b| a.0.total_cmp(&b.0))?;
        (cx.price.ceiling.is_finite() || best.0 < price * costs.elements).then_some(best.1)
    }
}

/// What is to be saved, as a weight costs it.
#[derive(Clone, Copy, Debug, Default)]
struct Costs {
    /// For its elements, whole.
    elements: f64,
    /// For being split, beside the elements of the factors.
    split: f64,
    /// For each unit of the rank: the result of the first factor.
    rank: f64,
}

impl Costs {
    /// What `layers`, which multiply by one weight, cost of it.
    fn of(graph: &Graph, shapes: &Shapes, layers: &[Layer], minimize: Minimize) -> Option<Self> {
        let weight = graph.weight(layers.first()?.weight)?;
        if minimize == Minimize::Bytes {
            return Some(Self { elements: weight.stored_bytes() as f64, split: OVERHEAD, rank: 0.0 });
        }
        let mut costs = Self::default();
        for layer in layers {
            if minimize == Minimize::Macs {
                costs.elements += minimize.of_node(graph, shapes, layer.node).unwrap_or(0.0);
            } else if let Some(latency) = latency(graph, shapes, layer.node) {
                let made = weight.value().dims()[usize::from((layer.slot == 1) != layer.transposed)];
                costs.elements += latency.total() - latency.results;
                costs.rank += latency.results / made.max(1) as f64;
            }
        }
        Some(costs)
    }
}

/// What the layers of a weight read, where samples tell.
struct Metric {
    layers: Vec<Linear>,
    /// Whether the constant holds Wᵀ.
    transposed: bool,
    /// A hash of where it comes from.
    key: u64,
    read: Arc<Option<Read>>,
}

/// L with L·Lᵀ = C, the covariance of what is read, and its mean.
struct Read {
    root: DMatrix<f64>,
    mean: DVector<f64>,
}

impl Metric {
    fn of(graph: &Graph, weight: Outlet, layers: &[Layer], cx: &mut Context) -> Option<Self> {
        let linear = |layer: &Layer| Linear::of(graph, layer.node).filter(|linear| linear.weight == weight);
        let layers = layers.iter().map(linear).collect::<Option<Vec<_>>>()?;
        let transposed = layers.first()?.output_axis() == 1;
        let mut hasher = Xxh3::new();
        for linear in &layers {
            hasher.update(format!("{} {}", linear.columns, linear.source(graph)).as_bytes());
            Bias::of(graph, linear).values(graph, linear)?;
            if (linear.output_axis() == 1) != transposed {
                return None;
            }
        }
        let (key, table) = (hasher.digest(), cx.statistics());
        let read = cx.remember(key, || {
            let moments = together(&table, graph, &layers)?.into_iter().next()?;
            // Directions that few samples do not show are no free ones.
            let (factor, _) = Cholesky::ridged(&moments.covariance(), moments.ridge())?;
            Some(Read { root: factor.root(), mean: moments.mean() })
        });
        read.is_some().then_some(Self { layers, transposed, key, read })
    }
}

/// Collects the layers that read `value`, directly or through `Identity` and `Transpose`; `false` if anything else does.
fn collect(graph: &Graph, value: Outlet, layers: &mut Vec<Layer>) -> bool {
    if graph.is_output(value) {
        return false;
    }
    graph.uses(value).into_iter().all(|(node, inlet)| {
        let Inlet::Slot(slot) = inlet else { return false };
        let Some(op) = graph.op(node) else { return false };
        match op.standard() {
            _ if flips(op).is_some() => collect(graph, node.out(), layers),
            Some("Gemm" | "MatMul") => match Layer::of(graph, node) {
                Some(layer) if layer.slot == slot => {
                    layers.push(layer);
                    true
                }
                _ => false,
            },
            _ => false,
        }
    })
}

/// `op` with the flag `name` set, or without it: absent means zero.
fn flagged(op: Op, name: &str, set: bool) -> Op {
    if set { op.with_int(name, 1) } else { op.without(name) }
}

/// Has `layer` multiply by the factors of its weight, left·right, one after the other.
fn split(graph: &mut Graph, layer: &Layer, left: Outlet, right: Outlet) -> Option<()> {
    let op = graph.op(layer.node)?.clone();
    let gemm = op.is("Gemm");
    let x = graph.operand(layer.node, 1 - layer.slot)?;
    let whole = graph.operand(layer.node, layer.slot)?;
    // What the product reads is left·right, or rightᵀ·leftᵀ.
    let (first, second) = if layer.transposed { (right, left) } else { (left, right) };
    let (inner, outer) = if layer.slot == 1 { (first, second) } else { (second, first) };
    let name = format!("{}.svd", graph.name(layer.node.out()));
    let node_name = if op.name().is_empty() { String::new() } else { format!("{}.svd", op.name()) };
    let (inner, outer) = if layer.transposed && !gemm {
        let mut turned = |value: Outlet| {
            let turned = format!("{}.transposed", graph.name(value));
            let weight = graph.weight(value)?.permute(&[1, 0])?;
            Some(graph.add_const(weight, &turned))
        };
        (turned(inner)?, turned(outer)?)
    } else {
        (inner, outer)
    };
    let (mut reduce, place) = (Op::new(op.op_type()).named(&node_name), layer.slot as usize);
    if gemm {
        let flag = if layer.slot == 0 { "transA" } else { "transB" };
        let other = if layer.slot == 0 { "transB" } else { "transA" };
        // The factors are plain constants: the flags say all of the transposition, and x is turned in the first product.
        let turned = op.int(other) == Some(1);
        reduce = flagged(flagged(reduce, flag, layer.transposed), other, turned);
        graph.edit_op(layer.node, |op| {
            *op = flagged(flagged(std::mem::take(op), flag, layer.transposed), other, false);
        });
    }
    let mut operands = [Some(x), Some(x)];
    operands[place] = Some(inner);
    let reduced = graph.add_op(reduce, &operands, &[&name], layer.node).out();
    graph.set_operand(layer.node, layer.slot, Some(outer));
    graph.set_operand(layer.node, 1 - layer.slot, Some(reduced));
    graph.sweep(whole.node);
    Some(())
}
