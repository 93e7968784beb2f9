//! The constant that is added to what a layer makes, wherever it stands.

use crate::{
    analysis::linear::Linear,
    ir::{Graph, NodeId, Op, Outlet, Weight, tensor::is_float},
};

/// Where the bias of a layer stands.
pub(crate) enum Bias {
    /// In slot 2 of the layer itself, or nowhere yet.
    Own,
    /// In a slot of the `Add` after it.
    Added(NodeId, u32),
    /// Nowhere yet, and the layer can't hold one.
    Outside,
}

impl Bias {
    /// Of a layer that is no part of a recurrent one.
    pub(crate) fn of(graph: &Graph, linear: &Linear) -> Self {
        // A sum of products of matrices ends in a `Reshape`.
        if ["MatMul", "Reshape"].iter().all(|kind| graph.op_of(linear.node, kind).is_none()) {
            return Self::Own;
        }
        let added = graph.sole_use(linear.node.out()).and_then(|(add, slot)| {
            graph.op_of(add, "Add")?;
            let bias = graph.constant(graph.operand(add, 1 - slot)?)?;
            (bias.len() == linear.rows && bias.dims().last() == Some(&linear.rows)).then_some((add, 1 - slot))
        });
        added.map_or(Self::Outside, |(add, slot)| Self::Added(add, slot))
    }

    /// What the layer makes, with the bias.
    pub(crate) fn result(&self, linear: &Linear) -> Outlet {
        match self {
            Self::Own | Self::Outside => linear.node.out(),
            Self::Added(add, _) => add.out(),
        }
    }

    fn place(&self, linear: &Linear) -> Option<(NodeId, u32)> {
        match *self {
            Self::Own => Some((linear.node, 2)),
            Self::Added(add, slot) => Some((add, slot)),
            Self::Outside => None,
        }
    }

    /// One value for each output channel; `None` where it is no constant or of another form.
    pub(crate) fn values(&self, graph: &Graph, linear: &Linear) -> Option<Vec<f64>> {
        let count = linear.output_channels();
        let Some(bias) = self.place(linear).and_then(|(node, slot)| graph.operand(node, slot)) else {
            return Some(vec![0.0; count]);
        };
        let bias = graph.constant(bias)?;
        let values = bias.f64s()?;
        match values[..] {
            [one] => Some(vec![one; count]),
            _ => (values.len() == count && bias.dims().last() == Some(&count)).then_some(values),
        }
    }

    /// Has the layer add `values`; a new constant is named after `pass`.
    pub(crate) fn set(&self, graph: &mut Graph, linear: &Linear, values: &[f64], pass: &str) -> Option<()> {
        // The weight may be another by now, or stand elsewhere.
        let stored = graph.operand(linear.node, 1).and_then(|weight| graph.weight(weight));
        let stored = stored.filter(|weight| is_float(weight.value().dtype())).or_else(|| graph.weight(linear.weight));
        let like = stored?.clone();
        let Some((node, slot)) = self.place(linear) else {
            if values.iter().all(|&value| value == 0.0) {
                return Some(());
            }
            let name = format!("{}.{pass}", graph.name(linear.node.out()));
            let bias = like.plain(&[values.len()], values).filter(|weight| weight.value().is_finite())?;
            let bias = graph.add_const(bias, &format!("{name}.bias"));
            let result = linear.node.out();
            let add = graph.add_op(Op::new("Add"), &[None, Some(bias)], &[&name], linear.node);
            graph.replace_uses(result, add.out());
            graph.set_operand(add, 0, Some(result));
            return Some(());
        };
        let old = graph.operand(node, slot);
        let dims = old.and_then(|old| graph.constant(old)).map(|old| old.dims().to_vec());
        let dims = dims.filter(|dims| dims.iter().product::<usize>() == values.len()).unwrap_or(vec![values.len()]);
        let bias = like.plain(&dims, values).filter(|weight| weight.value().is_finite())?;
        let base = old.map_or_else(|| graph.name(linear.node.out()).to_owned(), |old| graph.name(old).to_owned());
        let new = graph.add_const(bias, &format!("{base}.{pass}"));
        graph.exchange_operand(node, slot, Some(new));
        Some(())
    }
}

/// Has `linear` compute with other matrices; a shared constant stays what it is for its other readers.
pub(crate) fn set_matrices(
    graph: &mut Graph,
    linear: &Linear,
    matrices: &[nalgebra::DMatrix<f64>],
    pass: &str,
) -> Option<()> {
    let old = graph.weight(linear.weight)?;
    let dims = old.value().dims().to_vec();
    let new = old.fit(&dims, &linear.elements(matrices)).filter(|weight| weight.value().is_finite())?;
    set_weight(graph, linear, new, pass)
}

/// Has `linear` multiply by another weight; a shared constant stays what it is for its other readers.
pub(super) fn set_weight(graph: &mut Graph, linear: &Linear, weight: Weight, pass: &str) -> Option<()> {
    weight.value().is_finite().then_some(())?;
    let new = graph.add_const(weight, &format!("{}.{pass}", graph.name(linear.weight)));
    graph.exchange_operand(linear.node, linear.slot(), Some(new));
    Some(())
}
