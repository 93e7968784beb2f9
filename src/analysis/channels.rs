//! Which channels stand or fall together (Fang 2023 calls these dependency groups; here they are found on ONNX itself).
//!
//! Every index along every axis of every value is a unit; operators that pass channel i on as channel i make the units
//! one class by union-find. A class is what can be removed: from all weights that hold a unit of it, at once. An
//! operator that can't be seen through pins what it touches, and so do the inputs and outputs of the graph.

mod rules;

use std::collections::BTreeMap;

use super::shapes::Shapes;
use crate::ir::{Graph, Kind, NodeId, Outlet};

/// What the slice of a weight along an axis is to its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It makes a channel: a row of a Gemm, a filter.
    Makes,
    /// It reads a channel.
    Reads,
}

/// A weight's axis that makes or reads channels.
#[derive(Clone, Copy, Debug)]
pub struct Side {
    /// The constant.
    pub weight: Outlet,
    /// The axis.
    pub axis: usize,
    /// What its slices do.
    pub role: Role,
}

/// Something beside the weights that spells a count of channels.
#[derive(Clone, Debug)]
pub enum Count {
    /// `group` of a depthwise convolution: the channels of its input.
    Group(NodeId),
    /// Entry `axis` of the constant shape of a `Reshape`.
    Shape(NodeId, usize),
    /// The parts of a `Split`.
    Split(NodeId, usize),
}

/// The classes of a graph.
#[derive(Debug, Default)]
pub struct Channels {
    /// First unit and extent of each axis.
    axes: BTreeMap<(Outlet, usize), (usize, usize)>,
    parent: Vec<usize>,
    /// Why a unit must stay: an index into `reasons`, plus one; 0 if it need not.
    pin: Vec<usize>,
    reasons: Vec<String>,
    /// The weights of layers.
    pub sides: Vec<Side>,
    /// What else spells counts of channels.
    pub counts: Vec<Count>,
}

/// Longer axes are no channels.
const MAX_UNITS: usize = 1 << 22;

impl Channels {
    /// Finds the classes of `graph` at known `shapes`.
    #[must_use]
    pub fn of(graph: &Graph, shapes: &Shapes) -> Self {
        let mut channels = Self::default();
        for id in graph.order() {
            for value in (0..graph.output_count(id)).map(|slot| id.at(slot)) {
                let dims = shapes.known(value).unwrap_or_default();
                for (axis, extent) in dims.into_iter().enumerate().filter(|&(_, extent)| extent <= MAX_UNITS) {
                    channels.axes.insert((value, axis), (channels.parent.len(), extent));
                    channels.parent.extend(channels.parent.len()..channels.parent.len() + extent);
                }
            }
        }
        channels.pin = vec![0; channels.parent.len()];
        let axes: Vec<_> = channels.axes.iter().map(|(&key, &(_, extent))| (key, extent)).collect();
        for ((value, axis), extent) in axes {
            // The last channel of an axis can't go.
            if extent == 1 {
                channels.pin_axis(value, axis, "it is the only one");
            }
        }
        for id in graph.node_ids() {
            let overridable = matches!(graph.kind(id), Kind::Const(_)) && graph.constant(id.out()).is_none();
            if overridable || matches!(graph.kind(id), Kind::Input | Kind::Capture(_) | Kind::Sparse(_)) {
                channels.pin_value(id.out(), "it is an input of the graph");
            }
        }
        for output in graph.outputs() {
            channels.pin_value(output.value, "it is an output of the graph");
        }
        for id in graph.ops() {
            rules::apply(&mut channels, graph, shapes, id);
        }
        channels
    }

    /// The extent of an axis, if it is known.
    #[must_use]
    pub fn extent(&self, value: Outlet, axis: usize) -> Option<usize> {
        self.axes.get(&(value, axis)).map(|&(_, extent)| extent)
    }

    /// The axes that have units, each with its value and extent.
    pub fn axes(&self) -> impl Iterator<Item = (Outlet, usize, usize)> {
        self.axes.iter().map(|(&(value, axis), &(_, extent))| (value, axis, extent))
    }

    /// The class of a unit.
    #[must_use]
    pub fn class(&self, value: Outlet, axis: usize, index: usize) -> Option<usize> {
        let &(first, extent) = self.axes.get(&(value, axis))?;
        (index < extent).then(|| self.find(first + index))
    }

    /// Why a class must stay, if it must.
    #[must_use]
    pub fn pinned(&self, class: usize) -> Option<&str> {
        self.pin[class].checked_sub(1).map(|reason| self.reasons[reason].as_str())
    }

    fn find(&self, mut unit: usize) -> usize {
        while self.parent[unit] != unit {
            unit = self.parent[unit];
        }
        unit
    }

    fn union(&mut self, a: usize, b: usize) {
        let (a, b) = (self.root(a), self.root(b));
        // The smaller number is the root, so that classes do not depend on the order of unions.
        let (root, other) = (a.min(b), a.max(b));
        self.parent[other] = root;
        if self.pin[root] == 0 {
            self.pin[root] = self.pin[other];
        }
    }

    /// As [`find`](Self::find), and shortens the way there for the next search.
    fn root(&mut self, mut unit: usize) -> usize {
        while self.parent[unit] != unit {
            self.parent[unit] = self.parent[self.parent[unit]];
            unit = self.parent[unit];
        }
        unit
    }

    /// Makes unit `i` of one axis and unit `f(i)` of another one class.
    fn tie_by(&mut self, a: (Outlet, usize), b: (Outlet, usize), f: impl Fn(usize) -> usize) -> Option<()> {
        let (&(first, extent), &(other, limit)) = (self.axes.get(&a)?, self.axes.get(&b)?);
        for i in 0..extent {
            if f(i) >= limit {
                return None;
            }
            self.union(first + i, other + f(i));
        }
        Some(())
    }

    /// Makes equal units of two axes of one extent one class.
    fn tie(&mut self, a: (Outlet, usize), b: (Outlet, usize)) -> Option<()> {
        if self.extent(a.0, a.1)? != self.extent(b.0, b.1)? {
            return None;
        }
        self.tie_by(a, b, |i| i)
    }

    fn pin_axis(&mut self, value: Outlet, axis: usize, why: &str) {
        let Some(&(first, extent)) = self.axes.get(&(value, axis)) else { return };
        let reason = self.reasons.iter().position(|r| r == why).unwrap_or_else(|| {
            self.reasons.push(why.to_owned());
            self.reasons.len() - 1
        });
        for unit in first..first + extent {
            let root = self.find(unit);
            if self.pin[root] == 0 {
                self.pin[root] = reason + 1;
            }
        }
    }

    fn pin_value(&mut self, value: Outlet, why: &str) {
        let axes: Vec<_> = self.axes.range((value, 0)..=(value, usize::MAX)).map(|(&(_, axis), _)| axis).collect();
        for axis in axes {
            self.pin_axis(value, axis, why);
        }
    }
}
