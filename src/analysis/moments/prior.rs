//! What layers read where nobody gives samples: what batch normalizations say of their results (Nagel 2019).

use std::collections::BTreeMap;

use nalgebra::{DMatrix, DVector};

use super::{MAX_CHOSEN_BY, Moments, Table};
use crate::{
    analysis::{is_elementwise, linear::Linear},
    codec::Model,
    eval,
    ir::{DType, Graph, Outlet, Tensor},
};

/// Points from −5 to 5 deviations that stand, by their densities, for a normal distribution: what operators make of them stands
/// for the distribution of what they make.
const POINTS: usize = 61;
/// As many vectors as such a table is taken to be of, so that little is added to its variances.
const COUNT: u64 = 1 << 20;

/// For each channel of a value, what has become of the points.
type Spread = Vec<[f64; POINTS]>;

/// The moments that the batch normalizations of `original` say the layers of `model` read, which was made from it by exact
/// and rounding passes: of channels that know nothing of each other. A normalization makes means β and deviations |γ|; what
/// follows it is followed through element-wise operators, pools and concatenations.
#[must_use]
pub fn of_normalizations(original: &Model, model: &Model) -> Table {
    let known = model.graph.values();
    let mut spreads: BTreeMap<Outlet, Spread> = BTreeMap::new();
    for node in original.graph.ops() {
        let Some(spread) = normalized(&original.graph, node) else { continue };
        // Where the normalization went into the layer before it, that makes its result.
        let names = [Some(node.out()), original.graph.operand(node, 0)].into_iter().flatten();
        let mut names = names.map(|value| original.graph.name(value));
        if let Some(&value) = names.find_map(|name| known.get(name)) {
            spreads.insert(value, spread);
        }
    }
    let mut table = Table::new();
    for node in model.graph.ops() {
        if !spreads.contains_key(&node.out())
            && let Some(spread) = passed_on(&model.graph, node.out(), &spreads)
        {
            spreads.insert(node.out(), spread);
        }
    }
    for linear in Linear::all(&model.graph) {
        let Some(spread) = spreads.get(&linear.input) else { continue };
        if let (Some(linear), false) = (linear.at_most(MAX_CHOSEN_BY), spread.is_empty()) {
            let moments = (0..linear.groups).map(|group| of_spread(spread, &linear, group)).collect::<Option<Vec<_>>>();
            table.extend(moments.map(|moments| (linear.source(&model.graph), moments)));
        }
    }
    table
}

/// What a batch normalization makes.
fn normalized(graph: &Graph, node: crate::ir::NodeId) -> Option<Spread> {
    graph.op_of(node, "BatchNormalization")?;
    // Exporters hand equal constants on through identities.
    let resolved = |mut value: Outlet| {
        while graph.op_of(value.node, "Identity").is_some() {
            value = graph.operand(value.node, 0)?;
        }
        graph.constant(value)?.f64s()
    };
    let constant = |slot: u32| resolved(graph.operand(node, slot)?);
    let (scale, shift) = (constant(1)?, constant(2)?);
    let channel = |(scale, shift): (&f64, &f64)| std::array::from_fn(|i| shift + scale * deviation(i));
    let spread: Spread = scale.iter().zip(&shift).map(channel).collect();
    spread.iter().flatten().all(|value| value.is_finite()).then_some(spread)
}

/// Point `i` of a normal distribution of mean 0 and deviation 1.
fn deviation(i: usize) -> f64 {
    (2.0 * i as f64 / (POINTS - 1) as f64 - 1.0) * 5.0
}

fn mean_and_variance(values: &[f64; POINTS]) -> (f64, f64) {
    let density = |i: usize| libm::exp(-deviation(i).powi(2) / 2.0);
    let whole: f64 = (0..POINTS).map(density).sum();
    let weighed = |of: &dyn Fn(f64) -> f64| (0..POINTS).map(|i| density(i) * of(values[i])).sum::<f64>() / whole;
    let mean = weighed(&|value| value);
    (mean, weighed(&|value| (value - mean).powi(2)))
}

/// What the operator that makes `value` makes of what it reads.
fn passed_on(graph: &Graph, value: Outlet, spreads: &BTreeMap<Outlet, Spread>) -> Option<Spread> {
    let op = graph.op(value.node)?;
    let kind = op.standard()?;
    let first = || spreads.get(&graph.operand(value.node, 0)?);
    match kind {
        "Concat" if op.int("axis") == Some(1) => {
            let parts = graph.operands(value.node).into_iter().map(|part| spreads.get(&part?));
            Some(parts.collect::<Option<Vec<_>>>()?.into_iter().flatten().copied().collect())
        }
        // The mean of a sum is that of its summands, and so is the variance if they know nothing of each other.
        "Add" => {
            let (a, b) = (first()?, spreads.get(&graph.operand(value.node, 1)?)?);
            let sum = |(a, b): (&[f64; POINTS], &[f64; POINTS])| {
                let ((m, v), (n, w)) = (mean_and_variance(a), mean_and_variance(b));
                std::array::from_fn(|i| m + n + (v + w).sqrt() * deviation(i))
            };
            (a.len() == b.len()).then(|| a.iter().zip(b).map(sum).collect())
        }
        "Identity" | "Dropout" | "Flatten" | "MaxPool" | "AveragePool" | "GlobalAveragePool" | "GlobalMaxPool" => {
            first().cloned()
        }
        _ if is_elementwise(kind) => {
            let flat: Vec<f64> = first()?.iter().flatten().copied().collect();
            let tensor = Tensor::floats(DType::Float, &[flat.len()], &flat)?;
            let rest = graph.operands(value.node).into_iter().skip(1);
            let rest = rest.map(|v| v.map(|v| graph.constant(v).ok_or(())).transpose()).collect::<Result<Vec<_>, _>>();
            let inputs: Vec<_> = std::iter::once(Some(&tensor)).chain(rest.ok()?).collect();
            let made = eval::evaluate(op, graph.opset(), &inputs)?.pop()?.f64s()?;
            (made.len() == flat.len()).then(|| made.as_chunks().0.to_vec())
        }
        _ => None,
    }
}

/// The moments of what a group of `linear` reads of channels of this `spread`, each of which it reads in as many elements.
fn of_spread(spread: &Spread, linear: &Linear, group: usize) -> Option<Moments> {
    let channels = spread.len() / linear.groups;
    let each = linear.columns.checked_div(channels).filter(|each| each * channels == linear.columns && *each > 0)?;
    let own = spread[group * channels..(group + 1) * channels].iter().map(mean_and_variance);
    let own: Vec<_> = own.flat_map(|moments| std::iter::repeat_n(moments, each)).collect();
    let mean = DVector::from_iterator(own.len(), own.iter().map(|(mean, _)| *mean));
    let variances = DVector::from_iterator(own.len(), own.iter().map(|(_, variance)| *variance));
    let n = COUNT as f64;
    let products = (DMatrix::from_diagonal(&variances) + &mean * mean.transpose()) * n;
    Some(Moments { count: COUNT, sum: mean * n, products, zeros: DVector::zeros(own.len()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rectified_normalization_has_the_moments_of_a_rectified_normal_distribution() {
        let text = "<ir_version: 8, opset_import: [\"\": 17]>\ng (float[N,2,4,4] x) => (float[N,3,4,4] y)\n\
            <float[2,2,1,1] w = normal(1), float[2] scale = {2, 0.5}, float[2] shift = {1, -1}, float[2] m = {0, 3},\n\
             float[2] v = {1, 4}, float[3,2,1,1] u = normal(2)>\n\
            {\n a = Conv (x, w)\n b = BatchNormalization (a, scale, shift, m, v)\n c = Relu (b)\n y = Conv (c, u)\n}\n";
        let model = crate::text::parse(text).unwrap();
        let table = of_normalizations(&model, &model);
        let moments = &table.values().next().unwrap()[0];
        assert_eq!(table.len(), 1);
        for (i, (scale, shift)) in [(2.0_f64, 1.0_f64), (0.5, -1.0)].into_iter().enumerate() {
            // E = γ·(a·Φ(a) + φ(a)) and E² = γ²·((a² + 1)·Φ(a) + a·φ(a)) for a = β/γ.
            let a = shift / scale;
            let (below, density) = (
                0.5 * libm::erfc(-a / std::f64::consts::SQRT_2),
                (-a * a / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt(),
            );
            let mean = scale * (a * below + density);
            let variance = scale * scale * ((a * a + 1.0) * below + a * density) - mean * mean;
            assert!((moments.mean()[i] - mean).abs() < 0.002 * scale, "{} {mean}", moments.mean()[i]);
            let found = moments.covariance()[(i, i)];
            assert!((found / variance - 1.0).abs() < 0.02, "{found} {variance}");
        }
        assert!(moments.covariance()[(0, 1)].abs() < 1e-6);
    }
}
