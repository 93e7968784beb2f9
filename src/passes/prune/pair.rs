//! Channels that meet in a product of two computed values, as those of queries and keys: what is left makes up for what went.

use std::collections::{BTreeMap, BTreeSet};

use nalgebra::{DMatrix, DVector};

use super::{Group, compensate::readers_of};
use crate::{
    analysis::{
        channels::{Channels, Role, Side},
        linear::Linear,
        moments::{Table, together},
        shapes::Shapes,
    },
    eval,
    ir::{Graph, Inlet, NodeId, Outlet, Tensor},
    linalg::{Cholesky, product},
    refit::Bias,
};

/// The channels of a group as two vectors, q and k, for each head, of which nothing but their product is made.
pub(super) struct Pair {
    /// The layer that makes k.
    pub(super) second: Linear,
    pub(super) heads: Vec<Head>,
}

/// One head: q and k of as many channels as there are units.
pub(super) struct Head {
    /// The output channels of the second layer that are k, by unit.
    pub(super) places: Vec<usize>,
    /// E q·qᵀ and E k·kᵀ.
    seconds: [DMatrix<f64>; 2],
    /// The share of the mean of their diagonals that a ridge takes.
    ridge: f64,
}

/// What a layer makes: its matrix and bias, and the moments of what it reads.
struct Made {
    weight: DMatrix<f64>,
    bias: DVector<f64>,
    second: DMatrix<f64>,
    mean: DVector<f64>,
    ridge: f64,
}

impl Made {
    fn of(graph: &Graph, linear: &Linear, table: &Table) -> Option<Self> {
        let moments = together(table, graph, std::slice::from_ref(linear))?.pop()?;
        let weight = linear.matrices(&graph.constant(linear.weight)?.f64s()?).pop()?;
        let bias = DVector::from_vec(Bias::of(graph, linear).values(graph, linear)?);
        Some(Self { weight, bias, second: moments.second(), mean: moments.mean(), ridge: moments.ridge() })
    }

    /// E y·yᵀ of the output channels `rows`: `W·S·Wᵀ + W·μ·bᵀ + b·μᵀ·Wᵀ + b·bᵀ`.
    fn second_of(&self, rows: &[usize]) -> DMatrix<f64> {
        let (weight, bias) = (self.weight.select_rows(rows), self.bias.select_rows(rows));
        let mixed = &weight * &self.mean * bias.transpose();
        product(&product(&weight, &self.second), &weight.transpose())
            + &mixed
            + mixed.transpose()
            + &bias * bias.transpose()
    }
}

impl Pair {
    /// `None` where the channels of `group` do not meet so, or what their layers read is not known.
    pub(super) fn of(
        (graph, channels, shapes): (&Graph, &Channels, &Shapes),
        group: &Group,
        table: &Table,
    ) -> Option<Self> {
        let layer = |side: &Side| {
            let [linear] = <[Linear; 1]>::try_from(readers_of(graph, side.weight)).ok()?;
            let is_plain = linear.is_direct() && linear.groups == 1 && graph.uses(side.weight).len() == 1;
            (is_plain && linear.output_axis() == side.axis).then_some(linear)
        };
        let layers: Vec<_> = group.of_role(Role::Makes).filter_map(layer).collect();
        if table.is_empty() || group.units.len() != group.width {
            return None;
        }
        let mut paths = Paths { graph, shapes, meetings: BTreeMap::new(), others: BTreeSet::new() };
        for (i, linear) in layers.iter().enumerate() {
            paths.start(i, linear)?;
        }
        let ([first, second], heads) = paths.heads()?;
        let (first, second) = (&layers[first], &layers[second]);
        let (units, made) = (group.places(), [Made::of(graph, first, table)?, Made::of(graph, second, table)?]);
        let by_unit = |linear: &Linear, places: &[usize]| {
            let unit = |&place: &usize| {
                let classes = channels.classes(linear.weight, linear.output_axis(), place);
                Some((*classes.iter().find_map(|class| units.get(class))?, place))
            };
            let by_unit: BTreeMap<_, _> = places.iter().map(unit).collect::<Option<_>>()?;
            let order: Vec<_> = places.iter().filter_map(unit).map(|(unit, _)| unit).collect();
            (by_unit.len() == group.units.len()).then(|| (order, by_unit.into_values().collect::<Vec<_>>()))
        };
        let head = |[q, k]: [Vec<usize>; 2]| {
            let ((q_order, q), (k_order, k)) = (by_unit(first, &q)?, by_unit(second, &k)?);
            let seconds = [made[0].second_of(&q), made[1].second_of(&k)];
            (q_order == k_order).then(|| Head { places: k, seconds, ridge: made[0].ridge.max(made[1].ridge) })
        };
        let heads = heads.into_iter().map(head).collect::<Option<Vec<_>>>()?;
        Some(Self { second: second.clone(), heads })
    }
}

impl Head {
    /// `M = Aᵀ·B` on the units `kept`, where q is predicted as `A·q_K` and k as `B·k_K`: with `M·k_K` for `k_K`, the product of what is
    /// kept is closest to that of the whole (algorithms.md §2.8).
    pub(super) fn mix(&self, kept: &[usize]) -> Option<DMatrix<f64>> {
        let predicted = |second: &DMatrix<f64>| {
            let of_kept = second.select_columns(kept);
            let (factor, _) = Cholesky::ridged(&of_kept.select_rows(kept), self.ridge)?;
            Some(factor.solve_right(&of_kept))
        };
        Some(product(&predicted(&self.seconds[0])?.transpose(), &predicted(&self.seconds[1])?))
    }
}

/// The channels of q and of k in each head.
type Heads = BTreeSet<[Vec<usize>; 2]>;

/// One of two vectors whose elements go one after another, the others predicting what is gone.
struct Vector {
    /// A, by which what is kept predicts all elements; columns of elements that are gone are zero.
    map: DMatrix<f64>,
    /// `(S_KK + λI)⁻¹`, zero elsewhere.
    inverse: DMatrix<f64>,
    /// E of the prediction times its transpose: `A·S_K`.
    predicted: DMatrix<f64>,
}

impl Vector {
    fn of(second: &DMatrix<f64>, ridge: f64) -> Option<Self> {
        let (factor, _) = Cholesky::ridged(second, ridge)?;
        let inverse = factor.inverse(second.nrows());
        let map = product(second, &inverse);
        Some(Self { predicted: product(&map, second), map, inverse })
    }

    /// `Ŝ ← Ŝ − a·aᵀ/g`, `A ← A − a·gᵀ/g` and `G ← G − g·gᵀ/g` for the column a of A and g of the inverse, g its diagonal element.
    fn remove(&mut self, unit: usize) {
        let (column, own) = (self.map.column(unit).into_owned(), self.inverse.column(unit).into_owned());
        let diagonal = own[unit];
        self.predicted.ger(-1.0 / diagonal, &column, &column, 1.0);
        self.map.ger(-1.0 / diagonal, &column, &own, 1.0);
        self.inverse.ger(-1.0 / diagonal, &own, &own, 1.0);
        self.map.column_mut(unit).fill(0.0);
        self.inverse.column_mut(unit).fill(0.0);
        self.inverse.row_mut(unit).fill(0.0);
    }
}

/// The heads of a pair whose units go one after another.
pub(super) struct Elimination {
    heads: Vec<[Vector; 2]>,
    /// Σ E (qᵀ·k)² over heads, for q and k that know nothing of each other.
    whole: f64,
    /// The share of that which each unit costs next.
    costs: Vec<f64>,
}

impl Elimination {
    /// `None` where nothing varies.
    pub(super) fn of(pair: &Pair) -> Option<Self> {
        let vectors = |head: &Head| {
            let vector = |second| Vector::of(second, head.ridge);
            Some([vector(&head.seconds[0])?, vector(&head.seconds[1])?])
        };
        let heads = pair.heads.iter().map(vectors).collect::<Option<Vec<_>>>()?;
        let whole: f64 = pair.heads.iter().map(|head| head.seconds[0].dot(&head.seconds[1])).sum();
        let mut elimination = Self { heads, whole, costs: Vec::new() };
        elimination.price();
        (whole > 0.0 && whole.is_finite()).then_some(elimination)
    }

    /// The share of E (qᵀ·k)² that removing `unit` loses.
    pub(super) fn cost(&self, unit: usize) -> f64 {
        self.costs[unit]
    }

    /// Removes a unit.
    pub(super) fn remove(&mut self, unit: usize) {
        let vectors = self.heads.iter_mut().flatten().filter(|vector| vector.inverse[(unit, unit)] > 0.0);
        vectors.for_each(|vector| vector.remove(unit));
        self.price();
    }

    /// Finds what `tr(Ŝ_q·Ŝ_k)` loses with each unit.
    fn price(&mut self) {
        let count = self.heads.first().map_or(0, |[q, _]| q.map.ncols());
        let mut costs = vec![0.0; count];
        for [q, k] in &self.heads {
            let across = [product(&k.predicted, &q.map), product(&q.predicted, &k.map)];
            for (unit, cost) in costs.iter_mut().enumerate() {
                let (a, b) = (q.map.column(unit), k.map.column(unit));
                let (g, h) = (q.inverse[(unit, unit)], k.inverse[(unit, unit)]);
                if g > 0.0 && h > 0.0 {
                    *cost += a.dot(&across[0].column(unit)) / g + b.dot(&across[1].column(unit)) / h;
                    *cost -= a.dot(&b).powi(2) / (g * h);
                }
            }
        }
        self.costs = costs.into_iter().map(|cost| (cost / self.whole).max(0.0)).collect();
    }
}

/// Where the output channels of some layers go: each is followed as its index.
struct Paths<'a> {
    graph: &'a Graph,
    shapes: &'a Shapes,
    /// What each operand of a product is made of: the layer, and of which of its channels each element.
    meetings: BTreeMap<NodeId, [Option<(usize, Tensor)>; 2]>,
    /// Channels of which something else is made.
    others: BTreeSet<(usize, usize)>,
}

impl Paths<'_> {
    /// Follows the channels of layer `i`.
    fn start(&mut self, i: usize, linear: &Linear) -> Option<()> {
        let result = Bias::of(self.graph, linear).result(linear);
        let dims = self.shapes.known(result)?;
        let axis = linear.channel_axis(dims.len());
        let inner: usize = dims.get(axis + 1..)?.iter().product();
        let indices: Vec<_> =
            (0..dims.iter().product()).map(|at: usize| (at / inner.max(1) % dims[axis]) as i64).collect();
        self.follow(i, result, &Tensor::i64(&dims, &indices))
    }

    fn follow(&mut self, i: usize, value: Outlet, channels: &Tensor) -> Option<()> {
        let graph = self.graph;
        if graph.is_output(value) || graph.is_pinned(value) {
            self.end(i, channels)?;
        }
        for (node, inlet) in graph.uses(value) {
            let op = graph.op(node)?;
            let (Some(kind), Inlet::Slot(slot)) = (op.standard(), inlet) else {
                self.end(i, channels)?;
                continue;
            };
            let is_number = || {
                let constant = graph.operand(node, 1 - slot.min(1)).and_then(|other| graph.constant(other));
                constant.is_some_and(|constant| constant.len() == 1)
            };
            let moved = match kind {
                "MatMul" => {
                    let met = &mut self.meetings.entry(node).or_default()[slot as usize];
                    match met {
                        None => *met = Some((i, channels.clone())),
                        Some(_) => return None,
                    }
                    continue;
                }
                "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" | "Identity" if slot == 0 => {
                    self.reshaped(node, channels)
                }
                "Transpose" | "Split" | "Slice" | "Gather" if slot == 0 => self.moved(node, channels),
                "Mul" if is_number() => self.reshaped(node, channels),
                "Div" if slot == 0 && is_number() => self.reshaped(node, channels),
                _ => None,
            };
            match moved {
                Some(results) => {
                    for (slot, channels) in (0..).zip(results) {
                        self.follow(i, node.at(slot), &channels)?;
                    }
                }
                None => self.end(i, channels)?,
            }
        }
        Some(())
    }

    fn reshaped(&self, node: NodeId, channels: &Tensor) -> Option<Vec<Tensor>> {
        Some(vec![channels.reshape(&self.shapes.known(node.out())?)?])
    }

    fn moved(&self, node: NodeId, channels: &Tensor) -> Option<Vec<Tensor>> {
        let rest = self.graph.operands(node).into_iter().skip(1);
        let rest = rest.map(|value| value.map(|value| self.graph.constant(value).ok_or(())).transpose());
        let rest = rest.collect::<Result<Vec<_>, _>>().ok()?;
        let inputs: Vec<_> = std::iter::once(Some(channels)).chain(rest).collect();
        eval::evaluate(self.graph.op(node)?, self.graph.opset(), &inputs)
    }

    /// Notes that something that is not followed is made of `channels`.
    fn end(&mut self, i: usize, channels: &Tensor) -> Option<()> {
        self.others.extend(channels.i64s()?.into_iter().map(|channel| (i, channel as usize)));
        Some(())
    }

    /// The layers that make q and k of the one product where they meet, and their channels in each head.
    fn heads(mut self) -> Option<([usize; 2], Heads)> {
        let mut met = Vec::new();
        for both in std::mem::take(&mut self.meetings).into_values() {
            match both {
                [Some(q), Some(k)] => met.push((q, k)),
                [one, other] => {
                    let (i, channels) = one.or(other)?;
                    self.end(i, &channels)?;
                }
            }
        }
        let [((first, q), (second, k))] = <[_; 1]>::try_from(met).ok()?;
        let (q, k) = (rows(&q)?, rows(&transposed(&k)?)?);
        let heads: BTreeSet<_> = q.into_iter().zip(k).map(|(q, k)| [q, k]).collect();
        let mut seen = BTreeSet::new();
        let all = heads.iter().flat_map(|[q, k]| {
            q.iter().map(move |&channel| (first, channel)).chain(k.iter().map(move |&channel| (second, channel)))
        });
        let is_alone = |channel: (usize, usize)| seen.insert(channel) && !self.others.contains(&channel);
        let is_alone = all.into_iter().all(is_alone);
        is_alone.then_some(([first, second], heads))
    }
}

fn transposed(tensor: &Tensor) -> Option<Tensor> {
    let rank = tensor.dims().len();
    let mut perm: Vec<_> = (0..rank).collect();
    perm.swap(rank.checked_sub(2)?, rank - 1);
    tensor.permute(&perm)
}

/// The one row that all rows of each matrix of `tensor` are; `None` where they differ.
fn rows(tensor: &Tensor) -> Option<Vec<Vec<usize>>> {
    let [.., height, width] = *tensor.dims() else { return None };
    let values: Vec<_> = tensor.i64s()?.into_iter().map(|value| value as usize).collect();
    let matrices = values.chunks((height * width).max(1));
    matrices
        .map(|matrix| {
            let row = &matrix[..width];
            matrix.chunks(width.max(1)).all(|other| other == row).then(|| row.to_vec())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use rand_core::SeedableRng;
    use rand_xoshiro::Xoshiro256PlusPlus;

    use super::{super::curve::Curve, *};
    use crate::linalg::normal;

    fn head(count: usize, rank: usize) -> Head {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(5);
        let mut second = || {
            let mix = DMatrix::from_fn(count, rank, |_, _| normal(&mut random));
            product(&mix, &mix.transpose())
        };
        Head { places: (0..count).collect(), seconds: [second(), second()], ridge: 1e-12 }
    }

    /// The share of `E (qᵀ·k − q_Kᵀ·M·k_K)²` in `E (qᵀ·k)²`.
    fn error(head: &Head, kept: &[usize]) -> f64 {
        let mix = head.mix(kept).unwrap();
        let mut lost = DMatrix::identity(head.places.len(), head.places.len());
        for (i, &row) in kept.iter().enumerate() {
            for (j, &column) in kept.iter().enumerate() {
                lost[(row, column)] -= mix[(i, j)];
            }
        }
        let [q, k] = &head.seconds;
        (q * &lost * k * lost.transpose()).trace() / q.dot(k)
    }

    #[test]
    fn the_error_of_each_removal_is_that_of_the_mixed_products() {
        let head = head(6, 6);
        let curve = curve(self::head(6, 6));
        for gone in 1..=5 {
            let kept: Vec<_> = (0..6).filter(|unit| !curve.order[..gone].contains(unit)).collect();
            let (wanted, found) = (error(&head, &kept), curve.errors[gone - 1]);
            assert!((wanted - found).abs() < 1e-6, "{gone}: {wanted} {found}");
        }
        let alone = |unit: usize| error(&head, &(0..6).filter(|&other| other != unit).collect::<Vec<_>>());
        assert_eq!(curve.order[0], (0..6).min_by(|&a, &b| alone(a).total_cmp(&alone(b))).unwrap());
    }

    #[test]
    fn what_the_kept_channels_tell_is_free() {
        let curve = curve(head(6, 3));
        assert!(curve.errors[2] < 1e-6 && curve.errors[3] > 1e-3, "{:?}", curve.errors);
    }

    fn curve(head: Head) -> Curve {
        // Any layer: the curve does not ask for it.
        let text = "<ir_version: 8, opset_import: [\"\": 17]>\ng (float[N,2] x) => (float[N,2] y)\n\
                    <float[2,2] w = normal(1)>\n{\n y = MatMul (x, w)\n}\n";
        let model = crate::text::parse(text).unwrap();
        let second = Linear::all(&model.graph).remove(0);
        let pair = Pair { second, heads: vec![head] };
        Curve::greedy(Vec::new(), Elimination::of(&pair), 6)
    }
}
