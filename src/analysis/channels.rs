//! Which channels stand or fall together (Fang 2023 calls these dependency groups; here they are found on ONNX itself).
//!
//! Every index along every axis of every value is a unit; operators that pass channel i on as channel i make the units
//! one class by union-find. A class is what can be removed: from all weights that hold a unit of it, at once. An
//! operator that can't be seen through pins what it touches, and so do the inputs and outputs of the graph.
//!
//! Where axes are merged into one, or one is split (a flattening, attention heads, the groups of a convolution), an index of
//! the whole is one index of each factor: it can't go by itself, but goes when any of its factors' indices does.

mod entries;
mod rules;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use super::shapes::Shapes;
use crate::ir::{Graph, Kind, NodeId, Outlet};

/// An axis of a value. Axes beyond the rank are those of what is inside an operator: its groups, and the channels of a group.
pub type Axis = (Outlet, usize);

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

/// Something beside the weights that spells a count or places of channels.
#[derive(Clone, Debug)]
pub enum Count {
    /// An attribute, as `group` or `hidden_size`, that spells the extent of an axis.
    Attribute(NodeId, &'static str, Axis),
    /// Entry `at` of the constant list that a node reads in a slot spells the extent of an axis.
    Entry {
        /// The node.
        reader: NodeId,
        /// The slot.
        slot: u32,
        /// The entry.
        at: usize,
        /// The axis.
        of: Axis,
    },
    /// The parts of a `Split`.
    Split(NodeId, usize),
    /// The constant indices that a `Gather` takes along an axis.
    Gather(NodeId, usize, Vec<usize>),
    /// The entry for an axis among the bounds of a `Slice`: entry, axis, and what is taken.
    Slice(NodeId, usize, usize, Range<usize>),
}

impl Count {
    /// The axis whose channels it spells.
    #[must_use]
    pub fn axis(&self, graph: &Graph) -> Option<Axis> {
        match *self {
            Self::Attribute(_, _, of) | Self::Entry { of, .. } => Some(of),
            Self::Split(node, axis) | Self::Gather(node, axis, _) | Self::Slice(node, _, axis, _) => {
                Some((graph.operand(node, 0)?, axis))
            }
        }
    }
}

/// An axis that is the product of others, the first of which varies slowest.
#[derive(Clone, Debug)]
struct Product {
    whole: Axis,
    factors: Vec<Axis>,
}

/// The classes of a graph.
#[derive(Debug, Default)]
pub struct Channels {
    /// First unit and extent of each axis.
    axes: BTreeMap<Axis, (usize, usize)>,
    parent: Vec<usize>,
    /// Why a unit must stay: an index into `reasons`, plus one; 0 if it need not.
    pin: Vec<usize>,
    reasons: Vec<String>,
    products: Vec<Product>,
    /// The first unit of the axes that are inside operators.
    inner: usize,
    /// For each class of a product, which can't go by itself, the classes that it goes with.
    drivers: BTreeMap<usize, Vec<usize>>,
    /// The weights of layers.
    pub sides: Vec<Side>,
    /// The axes that are summed over with what is no constant: they are read whatever the weights are.
    pub summed: Vec<Axis>,
    /// Entries of constants that something reads which was not followed.
    fixed: BTreeSet<(NodeId, u32, usize)>,
    /// What else spells counts of channels.
    pub counts: Vec<Count>,
    /// `Gather`s that may take channels from wherever they are.
    apart: BTreeSet<NodeId>,
}

/// Longer axes are no channels.
const MAX_UNITS: usize = 1 << 20;
/// Axes beyond so many units in all are none either: 16 bytes each, and more where axes are products.
const MAX_ALL_UNITS: usize = 1 << 24;
/// Why the last channel of an axis can't go.
const ONLY_ONE: &str = "it is the only one";

impl Channels {
    /// Finds the classes of `graph` at known `shapes`.
    #[must_use]
    pub fn of(graph: &Graph, shapes: &Shapes) -> Self {
        Self::apart(graph, shapes, &BTreeSet::new())
    }

    /// The same where the channels before and after each of `gathers`, `Gather`s of constant indices, are not one class: whoever moves
    /// them changes the indices.
    #[must_use]
    pub fn apart(graph: &Graph, shapes: &Shapes, gathers: &BTreeSet<NodeId>) -> Self {
        let mut channels = Self { apart: gathers.clone(), ..Self::default() };
        for id in graph.order() {
            for value in (0..graph.output_count(id)).map(|slot| id.at(slot)) {
                let dims = shapes.known(value).unwrap_or_default();
                for (axis, extent) in dims.into_iter().enumerate() {
                    if extent > MAX_UNITS || channels.parent.len() + extent > MAX_ALL_UNITS {
                        continue;
                    }
                    channels.axes.insert((value, axis), (channels.parent.len(), extent));
                    channels.parent.extend(channels.parent.len()..channels.parent.len() + extent);
                }
            }
        }
        channels.inner = channels.parent.len();
        channels.pin = vec![0; channels.inner];
        let narrow: Vec<_> = channels.axes().filter(|&(_, _, extent)| extent == 1).collect();
        for (value, axis, _) in narrow {
            channels.pin_axis(value, axis, ONLY_ONE);
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
        channels.keep_fixed();
        while channels.join_products() {}
        for unit in 0..channels.parent.len() {
            channels.parent[unit] = channels.find(unit);
        }
        channels.settle_products();
        channels
    }

    /// The extent of an axis, if it is known.
    #[must_use]
    pub fn extent(&self, value: Outlet, axis: usize) -> Option<usize> {
        self.axes.get(&(value, axis)).map(|&(_, extent)| extent)
    }

    /// The axes of `value` that are known.
    pub fn axes_of(&self, value: Outlet) -> impl Iterator<Item = usize> + '_ {
        self.axes.range((value, 0)..=(value, usize::MAX)).map(|((_, axis), _)| *axis)
    }

    /// The axes that have units, each with its value and extent.
    pub fn axes(&self) -> impl Iterator<Item = (Outlet, usize, usize)> {
        self.axes.iter().map(|(&(value, axis), &(_, extent))| (value, axis, extent))
    }

    /// The classes of which any takes a unit along when it goes: its own, or one for each factor of a product.
    #[must_use]
    pub fn classes(&self, value: Outlet, axis: usize, index: usize) -> &[usize] {
        self.units((value, axis)).nth(index).map_or(&[], |unit| self.drivers_of(unit))
    }

    /// The units of an axis; none if it is not known.
    fn units(&self, axis: Axis) -> Range<usize> {
        self.axes.get(&axis).map_or(0..0, |&(first, extent)| first..first + extent)
    }

    /// The classes with any of which a unit goes, once products are settled.
    fn drivers_of(&self, unit: usize) -> &[usize] {
        let class = &self.parent[unit];
        self.drivers.get(class).map_or(std::slice::from_ref(class), Vec::as_slice)
    }

    /// Whether an index of an axis is one of several factors, and can't go by itself.
    #[must_use]
    pub fn is_product(&self, value: Outlet, axis: usize) -> bool {
        self.units((value, axis)).any(|unit| self.drivers.contains_key(&self.parent[unit]))
    }

    /// Whether an axis is inside an operator, beyond the rank of its result.
    #[must_use]
    pub fn is_inner(&self, value: Outlet, axis: usize) -> bool {
        self.axes.get(&(value, axis)).is_some_and(|&(first, _)| first >= self.inner)
    }

    /// The axes whose products others are.
    pub fn factors(&self) -> impl Iterator<Item = Axis> {
        self.products.iter().flat_map(|product| product.factors.iter().copied())
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
        self.pin_class(root, self.pin[other]);
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

    /// Adds an axis that is inside an operator, beyond the rank of its result.
    fn add_axis(&mut self, axis: Axis, extent: usize) {
        self.axes.insert(axis, (self.parent.len(), extent));
        self.parent.extend(self.parent.len()..self.parent.len() + extent);
        self.pin.resize(self.parent.len(), 0);
        if extent == 1 {
            self.pin_axis(axis.0, axis.1, ONLY_ONE);
        }
    }

    /// Makes an axis the product of others; `None` where extents do not agree.
    fn multiply(&mut self, whole: Axis, factors: &[Axis]) -> Option<()> {
        if let [factor] = factors {
            return self.tie(whole, *factor);
        }
        let extents = factors.iter().map(|&(value, axis)| self.extent(value, axis)).collect::<Option<Vec<_>>>()?;
        if extents.iter().product::<usize>() != self.extent(whole.0, whole.1)? {
            return None;
        }
        self.products.push(Product { whole, factors: factors.to_vec() });
        Some(())
    }

    /// Pins what is spelled by entries that must stay.
    fn keep_fixed(&mut self) {
        let fixed = std::mem::take(&mut self.fixed);
        let is_fixed = |count: &Count| match *count {
            Count::Entry { reader, slot, at, of } => fixed.contains(&(reader, slot, at)).then_some(of),
            _ => None,
        };
        for (value, axis) in self.counts.iter().filter_map(is_fixed).collect::<Vec<_>>() {
            self.pin_axis(value, axis, "its extent is also read by something that can't be seen through");
        }
    }

    /// Ties the factors of products of equal factors whose wholes are one, as those of two convolutions in a row that are grouped
    /// alike; says whether there were any that were not one yet.
    fn join_products(&mut self) -> bool {
        let products = self.products.clone();
        let roots =
            |channels: &Self, axis: Axis| channels.units(axis).map(|unit| channels.find(unit)).collect::<Vec<_>>();
        let mut known: BTreeMap<(Option<usize>, Vec<usize>), Vec<&Product>> = BTreeMap::new();
        let mut joined = false;
        for product in &products {
            let extents = product.factors.iter().map(|&factor| self.units(factor).len()).collect();
            let whole = roots(self, product.whole);
            let alike = known.entry((whole.first().copied(), extents)).or_default();
            if let Some(other) = alike.iter().find(|other| roots(self, other.whole) == whole) {
                for (&a, &b) in product.factors.iter().zip(&other.factors) {
                    if roots(self, a) != roots(self, b) {
                        joined |= self.tie(a, b).is_some();
                    }
                }
            } else {
                alike.push(product);
            }
        }
        joined
    }

    /// For each index of a product, its unit and the units of its factors.
    fn digits(&self, product: &Product) -> impl Iterator<Item = (usize, Vec<usize>)> {
        let digits = |(mut rest, whole): (usize, usize)| {
            let digits = product.factors.iter().rev().map(|&factor| {
                let units = self.units(factor);
                let digit = units.start + rest % units.len();
                rest /= units.len();
                digit
            });
            (whole, digits.collect())
        };
        self.units(product.whole).enumerate().map(digits)
    }

    /// Finds what the classes of products go with, once all classes are known: what is pinned of a product pins its factors,
    /// and so does a product that a factor of another would take to pieces.
    fn settle_products(&mut self) {
        self.shut_products();
        let mut edges: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (whole, factors) in self.products.iter().flat_map(|product| self.digits(product)) {
            let classes = edges.entry(self.parent[whole]).or_default();
            classes.extend(factors.iter().map(|&unit| self.parent[unit]));
            classes.sort_unstable();
            classes.dedup();
        }
        let wholes: Vec<usize> = edges.keys().copied().collect();
        for &whole in &wholes {
            let found = reach(whole, &edges);
            if self.pin[whole] != 0 {
                for &class in &found {
                    self.pin_class(class, self.pin[whole]);
                }
            }
            self.drivers.insert(whole, found);
        }
        self.pin_what_breaks();
    }

    /// Drops the products of which no factor can lose anything, and pins what they are.
    fn shut_products(&mut self) {
        loop {
            let pins = |&axis: &Axis| self.units(axis).map(|unit| self.pin[self.parent[unit]]);
            let is_shut = |product: &Product| product.factors.iter().flat_map(pins).all(|pin| pin != 0);
            let Some(at) = self.products.iter().position(is_shut) else { break };
            let reason = pins(&self.products[at].factors[0]).max().unwrap_or(0);
            let product = self.products.remove(at);
            self.units(product.whole).for_each(|unit| self.pin_class(self.parent[unit], reason));
        }
    }

    /// Pins the classes that take an index of a product along without taking all that share a factor's index with it.
    fn pin_what_breaks(&mut self) {
        let reason = self.reason("a Reshape arranges it in another way");
        let mut broken = BTreeSet::new();
        for (whole, factors) in self.products.iter().flat_map(|product| self.digits(product)) {
            let of_factors: Vec<_> = factors.iter().flat_map(|&unit| self.drivers_of(unit)).collect();
            broken.extend(self.drivers_of(whole).iter().copied().filter(|class| !of_factors.contains(&class)));
        }
        for class in broken {
            self.pin_class(class, reason);
        }
    }

    /// The number of a reason, as it stands in `pin`.
    fn reason(&mut self, why: &str) -> usize {
        let known = self.reasons.iter().position(|reason| reason == why);
        1 + known.unwrap_or_else(|| {
            self.reasons.push(why.to_owned());
            self.reasons.len() - 1
        })
    }

    /// Pins a class for the reason of this number, if it is not pinned yet.
    fn pin_class(&mut self, class: usize, reason: usize) {
        if self.pin[class] == 0 {
            self.pin[class] = reason;
        }
    }

    fn pin_axis(&mut self, value: Outlet, axis: usize, why: &str) {
        let reason = self.reason(why);
        self.units((value, axis)).for_each(|unit| self.pin_class(self.find(unit), reason));
    }

    fn pin_value(&mut self, value: Outlet, why: &str) {
        let axes: Vec<_> = self.axes.range((value, 0)..=(value, usize::MAX)).map(|(&(_, axis), _)| axis).collect();
        for axis in axes {
            self.pin_axis(value, axis, why);
        }
    }
}

/// The classes that can be reached along `edges` from `start` and lead nowhere further.
fn reach(start: usize, edges: &BTreeMap<usize, Vec<usize>>) -> Vec<usize> {
    let (mut seen, mut open, mut ends) = (BTreeSet::from([start]), vec![start], Vec::new());
    while let Some(class) = open.pop() {
        match edges.get(&class) {
            Some(next) => open.extend(next.iter().copied().filter(|&next| seen.insert(next))),
            None => ends.push(class),
        }
    }
    ends.sort_unstable();
    ends
}
