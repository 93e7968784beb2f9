//! Cutting a segment out of a graph.

use std::collections::{BTreeMap, BTreeSet};

use super::{DType, Graph, Inlet, Kind, NodeId, Outlet};
use crate::proto::{
    TensorShapeProto, TypeProto, ValueInfoProto,
    tensor_shape_proto::{Dimension, dimension},
    type_proto,
};

impl Graph {
    /// The part of the graph that computes `outputs` from `inputs`, as a graph of its own; each input comes with its
    /// type and shape. `None` where an output depends on an input of the graph that is not among them.
    #[must_use]
    pub fn extract(&self, inputs: &[(Outlet, DType, Vec<usize>)], outputs: &[Outlet]) -> Option<Self> {
        let cut: BTreeSet<_> = inputs.iter().map(|input| input.0).collect();
        let mut part = Self::new(self.opset());
        let mut copies: BTreeMap<Outlet, Outlet> = BTreeMap::new();
        for (position, (value, dtype, dims)) in (0..).zip(inputs) {
            let info = declaration(self.name(*value), Some((*dtype, dims)));
            let node = part.add_node(Kind::Input, vec![info.name().to_owned()], position);
            part.push_input(node, info);
            copies.insert(*value, node.out());
        }
        let cone = self.cone(&cut, outputs);
        for (position, id) in (0..).zip(self.order().into_iter().filter(|id| cone.contains(id))) {
            if matches!(self.kind(id), Kind::Input | Kind::Capture(_)) {
                return None;
            }
            let outlets = || (0..self.output_count(id)).map(move |slot| id.at(slot));
            // A result that is also cut keeps its place under another name.
            let name = |value: Outlet| {
                let own = self.name(value);
                if copies.contains_key(&value) { part.fresh_name(own) } else { own.to_owned() }
            };
            let names: Vec<_> = outlets().map(name).collect();
            let mut kind = self.kind(id).clone();
            if let Kind::Const(constant) = &mut kind {
                constant.overridable = false;
            }
            let copy = part.add_node(kind, names, position);
            for (slot, operand) in (0..).zip(self.operands(id)) {
                if let Some(operand) = operand {
                    part.wire(*copies.get(&operand)?, copy, Inlet::Slot(slot));
                }
            }
            for (i, value) in self.captures(id) {
                part.wire(*copies.get(&value)?, copy, Inlet::Captured(i));
            }
            for value in outlets() {
                copies.entry(value).or_insert(copy.at(value.slot));
            }
        }
        for output in outputs {
            let value = *copies.get(output)?;
            let info = declaration(part.name(value), None);
            part.push_output(value, info);
        }
        Some(part)
    }

    /// The graph with `values` as its outputs, all inputs kept.
    #[must_use]
    pub(crate) fn computing(&self, values: &[Outlet]) -> Self {
        let mut graph = self.clone();
        graph.outputs.clear();
        for &value in values {
            graph.push_output(value, declaration(self.name(value), None));
        }
        for id in self.order().into_iter().rev() {
            if graph.contains(id) {
                graph.sweep(id);
            }
        }
        graph
    }

    /// The nodes that `outputs` depend on, back to the values of `cut`.
    pub(crate) fn cone(&self, cut: &BTreeSet<Outlet>, outputs: &[Outlet]) -> BTreeSet<NodeId> {
        let mut cone = BTreeSet::new();
        let mut stack: Vec<_> = outputs.to_vec();
        while let Some(value) = stack.pop() {
            if !cut.contains(&value) && cone.insert(value.node) {
                stack.extend(self.operands(value.node).into_iter().flatten());
                stack.extend(self.captures(value.node).into_values());
            }
        }
        cone
    }
}

/// A declaration of `name`, typed if its type is known.
fn declaration(name: &str, fact: Option<(DType, &Vec<usize>)>) -> ValueInfoProto {
    let tensor = fact.map(|(dtype, dims)| {
        let dim = |&d: &usize| Dimension { value: Some(dimension::Value::DimValue(d as i64)), denotation: None };
        let shape = TensorShapeProto { dim: dims.iter().map(dim).collect() };
        type_proto::Tensor { elem_type: Some(dtype as i32), shape: Some(shape) }
    });
    let r#type = tensor.map(|t| TypeProto { value: Some(type_proto::Value::TensorType(t)), ..TypeProto::default() });
    ValueInfoProto { name: Some(name.to_owned()), r#type, ..ValueInfoProto::default() }
}
