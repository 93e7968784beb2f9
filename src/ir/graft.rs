//! Copying what computes a value from one graph into another.

use std::collections::{BTreeMap, BTreeSet};

use super::{Graph, Inlet, Kind, NodeId, Outlet};

impl Graph {
    /// Adds to this graph, beside `near`, the nodes of `other` that compute `value` from the values of `known`, which maps values of
    /// `other` to those of this graph. Answers the copy of `value`, and notes in `known` what else was copied. `None`, and nothing
    /// done, where `value` depends on an input or a captured value that is not known here.
    pub(crate) fn graft(
        &mut self,
        other: &Self,
        value: Outlet,
        known: &mut BTreeMap<Outlet, Outlet>,
        near: NodeId,
    ) -> Option<Outlet> {
        let cut: BTreeSet<_> = known.keys().copied().collect();
        let cone = other.cone(&cut, &[value]);
        if cone.iter().any(|&id| matches!(other.kind(id), Kind::Input | Kind::Capture(_))) {
            return known.get(&value).copied();
        }
        let taken: BTreeSet<String> = self.values().into_keys().map(str::to_owned).collect();
        for id in other.order().into_iter().filter(|id| cone.contains(id)) {
            let own = (0..other.output_count(id)).map(|slot| other.name(id.at(slot)));
            // A name that nothing has any longer is free for what had it.
            let names = own.map(|own| match own {
                "" => String::new(),
                own if taken.contains(own) || self.is_output_name(own) => self.fresh_name(own),
                own => own.to_owned(),
            });
            let names: Vec<_> = names.collect();
            let mut kind = other.kind(id).clone();
            if let Kind::Const(constant) = &mut kind {
                constant.overridable = false;
            }
            let position = if other.is_listed_apart(id) { u64::MAX } else { self.dag[near.0].position };
            let copy = self.add_node(kind, names, position);
            for (slot, operand) in (0..).zip(other.operands(id)) {
                if let Some(operand) = operand {
                    self.wire(known[&operand], copy, Inlet::Slot(slot));
                }
            }
            for (i, captured) in other.captures(id) {
                self.wire(known[&captured], copy, Inlet::Captured(i));
            }
            for slot in 0..other.output_count(id) {
                known.entry(id.at(slot)).or_insert(copy.at(slot));
            }
            self.edits += 1;
        }
        known.get(&value).copied()
    }

    fn is_output_name(&self, name: &str) -> bool {
        self.outputs.iter().any(|output| output.info.name() == name)
    }
}
