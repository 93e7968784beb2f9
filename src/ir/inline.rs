//! Putting the body of a node in the node's place.

use std::collections::{BTreeMap, HashSet};

use super::{Graph, Inlet, Kind, NodeId, Outlet};

impl Graph {
    /// Has the nodes of body `index` of `node`, which has no inputs of its own, compute in this graph what the node computes,
    /// and removes the node. Values and operators keep their names where those are free. `None`, and nothing done, where
    /// the body has inputs or fewer results than the node, or annotations mention a result.
    pub fn inline(&mut self, node: NodeId, index: usize) -> Option<()> {
        let body = self.op(node)?.bodies.get(index)?.graph.clone();
        let results = self.output_count(node);
        let annotated =
            !body.rest.quantization_annotation.is_empty() || (0..results).any(|slot| self.is_pinned(node.at(slot)));
        if annotated || !body.inputs.is_empty() || body.outputs.len() < results as usize {
            return None;
        }
        let mut kept = HashSet::new();
        let captured = self.captures(node);
        let mut copies: BTreeMap<Outlet, Outlet> = BTreeMap::new();
        for id in body.order() {
            if let Kind::Capture(i) = body.kind(id) {
                copies.insert(id.out(), *captured.get(i)?);
                continue;
            }
            let mut names = Vec::new();
            for old in (0..body.output_count(id)).map(|slot| body.name(id.at(slot))) {
                let name = if old.is_empty() { String::new() } else { self.fresh_name(old) };
                kept.extend((name == old).then(|| name.clone()));
                names.push(name);
            }
            let position = if body.is_listed_apart(id) { u64::MAX } else { self.dag[node.0].position };
            let copy = self.add_node(body.kind(id).clone(), names, position);
            for (slot, operand) in (0..).zip(body.operands(id)) {
                if let Some(operand) = operand {
                    self.wire(copies[&operand], copy, Inlet::Slot(slot));
                }
            }
            for (i, value) in body.captures(id) {
                self.wire(copies[&value], copy, Inlet::Captured(i));
            }
            copies.extend((0..body.output_count(id)).map(|slot| (id.at(slot), copy.at(slot))));
        }
        self.edits += 1;
        self.value_info.extend(body.value_info.iter().filter(|info| kept.contains(info.name())).cloned());
        for slot in (0..results).filter(|&slot| !self.name(node.at(slot)).is_empty()).collect::<Vec<_>>() {
            self.replace_uses(node.at(slot), copies[&body.outputs[slot as usize].value]);
        }
        // What the other bodies captured may be dead now.
        self.sweep(node);
        Some(())
    }
}
