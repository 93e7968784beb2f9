//! See [`ExactGroups`].

use std::collections::BTreeSet;

use nalgebra::DMatrix;

use super::{
    reorder::settle,
    rewrite::{Replacement, Site, Statistics},
};
use crate::{
    analysis::linear::multiplies,
    factor::{Components, Family, Form, Orders, Shape},
    ir::{DType, Graph, Tensor},
    pass::{Context, Declare, Fidelity, Pass},
};

/// Put layers in groups where channels are read by some only.
///
/// Where the weights of a `Conv`, `ConvTranspose`, `Gemm` or `MatMul` are zero between all channels of one part and those of another,
/// in whatever order they stand, the layer becomes a convolution in as many groups as a greedy packing finds parts of equal size. The
/// layers around hold their channels in the order of the groups; a `Gather` remains where they can't.
///
/// Applies when: the weight has at least 1 024 elements of 32 bits, only layers of one kind read it, and more is saved than nodes that
/// move channels would take. In the bodies of control flow, nothing is looked for.
///
/// Fidelity: rounding.
#[derive(Debug, clap::Parser)]
#[command(name = "exact-groups")]
pub(super) struct ExactGroups {}

impl Declare for ExactGroups {
    const NAME: &'static str = "exact-groups";
    const FIDELITY: Fidelity = Fidelity::Rounding;
}

/// Elements that a weight must have for the nodes around it to be worth it.
const LEAST: usize = 1024;
/// Bytes of a node in the file with names of 100 letters, about.
const NODE: usize = 400;

impl Pass for ExactGroups {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        let weights: BTreeSet<_> = graph
            .ops()
            .into_iter()
            .filter(|&id| multiplies(graph, id))
            .filter_map(|id| graph.operand(id, 1))
            // What is stored otherwise has few values, which parts of it may not have.
            .filter(|&weight| {
                graph.weight(weight).is_some_and(|weight| !weight.is_stored() && is_suspect(weight.value()))
            })
            .collect();
        if weights.is_empty() {
            return Ok(());
        }
        let (shapes, statistics, mut gathers, mut grouped) =
            (cx.shapes(graph), Statistics::default(), BTreeSet::new(), 0);
        for weight in weights {
            let Ok(mut site) = Site::of(graph, weight, (&statistics, cx), false) else { continue };
            site.look_up_rank(graph, &shapes);
            if site.is_stack() || !site.fits(graph, Family::Grouped { bypass: 0 }) {
                continue;
            }
            let Some((form, chain)) = exact(graph, &site, &statistics) else { continue };
            if let Some(regrouped) = site.replace(graph, form, &chain, Self::NAME) {
                gathers.extend(regrouped.into_iter().flat_map(|regrouped| regrouped.gathers));
                grouped += site.readers();
            }
        }
        // What holds channels in another order is no longer what it was called, by which models are compared part by part.
        for value in settle(graph, &gathers, cx, Self::NAME) {
            let name = graph.name_after(value, Self::NAME);
            graph.call(value, &name);
        }
        cx.add("layers put in groups", grouped);
        Ok(())
    }
}

/// Whether the first slice of a weight along its first axis, and that along its second, are half zeros at least, as those of any
/// weight in groups are.
fn is_suspect(tensor: &Tensor) -> bool {
    let [rows, columns, kernel @ ..] = tensor.dims() else { return false };
    if tensor.dtype() != DType::Float || tensor.len() < LEAST {
        return false;
    }
    let taps: usize = kernel.iter().product();
    let is_sparse = |count: usize, step: usize| {
        let values = tensor.floats_at((0..count).map(|i| i * step));
        values.is_some_and(|values| values.iter().filter(|value| **value == 0.0).count() * 2 >= count)
    };
    is_sparse(*columns, taps) && is_sparse(*rows, columns * taps)
}

/// The layer in groups that computes the same, if there is one.
fn exact(graph: &Graph, site: &Site, statistics: &Statistics) -> Option<(Form, Replacement)> {
    let target = site.target(graph, statistics)?;
    let shape = &target.shape;
    let found: Vec<_> = target.matrices.iter().map(|matrix| Components::of(&presence(matrix, shape))).collect();
    let most = found.iter().map(Components::count).min()?;
    let packed = |parts: usize| found.iter().map(|found| found.packed(parts)).collect::<Option<Vec<_>>>();
    let (parts, all) = (2..=most).rev().find_map(|parts| Some((parts, packed(parts)?)))?;
    let (mut stage, mut orders) = (Vec::new(), Orders::default());
    for (place, (matrix, own)) in target.matrices.iter().zip(&all).enumerate() {
        stage.extend(own.weight(matrix, shape, parts));
        orders.append(own, shape, place);
    }
    let form = Form::Grouped { parts, bypass: 0 };
    // Both sides may have to be gathered, by names as long as they come.
    let saved = (shape.elements() - stage.len()) * 4;
    let indices = 8 * (orders.reads.len() + orders.makes.len());
    let nodes = if shape.kernel.is_empty() { 6 } else { 2 };
    (saved > indices + nodes * NODE)
        .then_some((form, Replacement { stages: vec![stage], lost: None, orders: Some(orders), error: 0.0 }))
}

/// Which channels are made of which: 1 where some weight is not zero.
fn presence(matrix: &DMatrix<f64>, shape: &Shape) -> DMatrix<f64> {
    let (rows, columns) = shape.extents();
    DMatrix::from_fn(shape.makes, shape.reads, |made, read| {
        let block = matrix.view((made * rows, read * columns), (rows, columns));
        f64::from(u8::from(block.iter().any(|&value| value != 0.0)))
    })
}
