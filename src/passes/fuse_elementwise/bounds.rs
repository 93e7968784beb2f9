//! Operators that keep values within bounds.

use crate::{
    analysis::shapes::Shapes,
    ir::{Graph, NodeId, Op, Outlet, Tensor, Weight, tensor::is_float},
};

/// Integers beyond it are not followed, since they are no numbers in double precision.
const MAX_INTEGER: f64 = 9_007_199_254_740_992.0;

/// What an operator does that lets no value below `low` and none above `high` through.
struct Bounded {
    source: Outlet,
    low: f64,
    high: f64,
}

impl Bounded {
    /// What the `Clip`, the `Relu`, or the `Min` or `Max` with a number at `node` does.
    fn of(graph: &Graph, shapes: &Shapes, node: NodeId) -> Option<Self> {
        let op = graph.op(node)?;
        match op.standard()? {
            "Relu" => Some(Self { source: graph.operand(node, 0)?, low: 0.0, high: f64::INFINITY }),
            "Clip" => {
                let bound = |slot: u32, attribute: &str, open: f64| match graph.operand(node, slot) {
                    Some(bound) => number(graph, bound),
                    None => Some(op.float(attribute).map_or(open, f64::from)),
                };
                let (low, high) = (bound(1, "min", f64::NEG_INFINITY)?, bound(2, "max", f64::INFINITY)?);
                Some(Self { source: graph.operand(node, 0)?, low, high })
            }
            kind @ ("Min" | "Max") => {
                let [Some(a), Some(b)] = graph.operands(node)[..] else { return None };
                let (source, given) = if graph.constant(b).is_some() { (a, b) } else { (b, a) };
                // The number must not give the result more axes.
                if graph.constant(given)?.dims().len() > shapes.rank(source)? {
                    return None;
                }
                let bound = number(graph, given)?;
                let (low, high) = if kind == "Max" { (bound, f64::INFINITY) } else { (f64::NEG_INFINITY, bound) };
                Some(Self { source, low, high })
            }
            _ => None,
        }
    }
}

/// The one number that `value` is, if it is a constant.
fn number(graph: &Graph, value: Outlet) -> Option<f64> {
    let constant = graph.constant(value)?;
    let number = match (constant.f64s(), constant.i64s()) {
        (Some(values), _) => *values.first().filter(|_| values.len() == 1)?,
        (None, Some(values)) => {
            let value = *values.first().filter(|_| values.len() == 1)?;
            Some(value as f64).filter(|value| value.abs() < MAX_INTEGER)?
        }
        _ => return None,
    };
    (!number.is_nan()).then_some(number)
}

/// Makes the operator at `node` that bounds what another one bounds the only one of them.
pub(super) fn merge(graph: &mut Graph, shapes: &Shapes, node: NodeId) -> Option<()> {
    let Bounded { source: middle, low: after_low, high: after_high } = Bounded::of(graph, shapes, node)?;
    let Bounded { source, low, high } = Bounded::of(graph, shapes, middle.node)?;
    // Written so that NaN is no bound.
    if !(low <= high && after_low <= after_high) {
        return None;
    }
    if after_low <= low && after_high >= high {
        return graph.bypass(node, middle);
    }
    graph.sole_use(middle).filter(|_| !graph.is_pinned(middle))?;
    let (least, most) = (low.clamp(after_low, after_high), high.clamp(after_low, after_high));
    let dtype = shapes.fact(source)?.dtype?;
    let holds = |bound: f64| !bound.is_finite() || is_float(dtype) || bound.abs() < MAX_INTEGER;
    let has_clip = graph.opset() >= 12 || is_float(dtype) && graph.opset() >= 6;
    // A bound that lets nothing finite through is no open one.
    let is_open = least < f64::INFINITY && most > f64::NEG_INFINITY;
    if !has_clip || !is_open || !holds(least) || !holds(most) {
        return None;
    }
    let mut clip = Op::new("Clip").in_place_of(graph.op(node)?);
    let mut tensors = Vec::new();
    for (what, bound) in [("min", least), ("max", most)] {
        let mut made = None;
        if bound.is_finite() && graph.opset() < 11 {
            let single = bound as f32;
            if f64::from(single) != bound {
                return None;
            }
            clip = clip.with_float(what, single);
        } else if bound.is_finite() {
            let tensor = if is_float(dtype) {
                Tensor::floats(dtype, &[], &[bound])?
            } else {
                Tensor::integers(dtype, &[], &[bound as i64])?
            };
            made = Some((tensor, format!("{}.{what}", graph.name(node.out()))));
        }
        tensors.push(made);
    }
    graph.replace_op(node, clip, &[source]);
    for (slot, made) in (1..).zip(tensors) {
        if let Some((tensor, name)) = made {
            let bound = graph.add_const(Weight::dense(tensor), &name);
            graph.exchange_operand(node, slot, Some(bound));
        }
    }
    Some(())
}

/// Takes up the operands of those operands of the `Min` or `Max` at `node` that are made by the same operator.
pub(super) fn flatten(graph: &mut Graph, node: NodeId) -> Option<()> {
    // Before, all operands are of one shape.
    let kind = graph.op(node)?.standard().filter(|_| graph.opset() >= 8)?.to_owned();
    let (mut all, mut taken) = (Vec::new(), Vec::new());
    for value in graph.operands(node).into_iter().collect::<Option<Vec<_>>>()? {
        let is_alone = graph.sole_use(value).is_some() && !graph.is_pinned(value);
        match graph.op_of(value.node, &kind).filter(|_| is_alone) {
            Some(_) => {
                all.extend(graph.operands(value.node).into_iter().collect::<Option<Vec<_>>>()?);
                taken.push(value.node);
            }
            None => all.push(value),
        }
    }
    if taken.is_empty() {
        return None;
    }
    graph.set_operands(node, &all);
    for inner in taken {
        graph.sweep(inner);
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::text;

    #[test]
    fn a_bound_that_lets_nothing_finite_through_stays() {
        let of = |bound: f64| {
            let text = "<ir_version: 8, opset_import: [\"\": 17]>\ng (float[4] x) => (float[4] y)\n<float k = {1}>\n\
                        {\n t = Relu (x)\n y = Min (t, k)\n}\n";
            let mut graph = text::parse(text).unwrap().graph;
            let (k, node) = (graph.values()["k"], graph.values()["y"].node);
            graph.set_weight(k, Weight::dense(Tensor::f32(&[], &[bound as f32])));
            let shapes = Shapes::infer(&graph, &BTreeMap::new());
            merge(&mut graph, &shapes, node)
        };
        assert_eq!(of(2.0), Some(()));
        assert_eq!(of(f64::NEG_INFINITY), None);
    }
}
