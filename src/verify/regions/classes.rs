//! Classes of equal values, over an old graph and a new one.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::{
    analysis::{ELEMENTWISE, numbering::Numbering},
    ir::{Graph, Kind, NodeId, Op, Outlet, Tensor},
};

/// What a captured value is in the graph around a body.
#[derive(Clone, Debug)]
pub(super) struct Outer {
    class: usize,
    constant: Option<Tensor>,
}

/// The classes of the values of both graphs.
pub(super) struct Classes {
    numbering: Numbering,
    /// The classes of captured values, by their classes in the graph around.
    captured: HashMap<usize, usize>,
    outer: BTreeMap<u32, Outer>,
    old: BTreeMap<Outlet, usize>,
    new: BTreeMap<Outlet, usize>,
    /// The first value of each class.
    old_of: BTreeMap<usize, Outlet>,
    new_of: BTreeMap<usize, Outlet>,
    /// Classes of the new graph that were proven to be old ones.
    proven: BTreeMap<usize, usize>,
    /// Places of the nodes of the old graph in its order.
    places: BTreeMap<NodeId, usize>,
    /// The nodes of the old graph by the names of their values.
    names: HashMap<String, NodeId>,
}

/// Where both forms of a region are cut: values with their classes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Cut {
    pub(super) old: BTreeSet<(usize, Outlet)>,
    pub(super) new: BTreeSet<(usize, Outlet)>,
}

impl Outer {
    /// The captured value, if it is a constant.
    pub(super) fn constant(&self) -> Option<&Tensor> {
        self.constant.as_ref()
    }
}

impl Classes {
    /// The classes of the values of `a`, which captures these.
    pub(super) fn new(a: &Graph, captured: BTreeMap<u32, Outer>) -> Self {
        let mut classes = Self {
            numbering: Numbering::default(),
            captured: HashMap::new(),
            names: HashMap::new(),
            outer: captured,
            old: BTreeMap::new(),
            new: BTreeMap::new(),
            old_of: BTreeMap::new(),
            new_of: BTreeMap::new(),
            proven: BTreeMap::new(),
            places: BTreeMap::new(),
        };
        for (place, id) in a.order().into_iter().enumerate() {
            classes.places.insert(id, place);
            let operands = a.operands(id).into_iter().map(|v| v.and_then(|v| classes.of_old(v))).collect();
            let first = classes.first(a, id, operands);
            for value in (0..a.output_count(id)).map(|slot| id.at(slot)) {
                let class = first + value.slot as usize;
                classes.old.insert(value, class);
                classes.old_of.entry(class).or_insert(value);
                classes.names.insert(a.name(value).to_owned(), id);
            }
        }
        classes
    }

    /// Has captured values be these from now on: those of the new graph.
    pub(super) fn bind(&mut self, captured: BTreeMap<u32, Outer>) {
        self.outer = captured;
    }

    /// The class of the first value of `id`.
    fn first(&mut self, graph: &Graph, id: NodeId, operands: Vec<Option<usize>>) -> usize {
        let Kind::Capture(number) = graph.kind(id) else { return self.numbering.node(graph, id, operands) };
        match self.outer.get(number).cloned() {
            Some(Outer { constant: Some(tensor), .. }) => self.numbering.constant(&tensor),
            Some(Outer { class, .. }) => {
                let fresh = self.numbering.fresh();
                *self.captured.entry(class).or_insert(fresh)
            }
            None => self.numbering.fresh(),
        }
    }

    /// The node of `a` that `id` of `b` is by its name, operator, attributes and operands, where both hold bodies.
    pub(super) fn same_but_for_bodies(&self, a: &Graph, b: &Graph, id: NodeId) -> Option<NodeId> {
        let op = b.op(id).filter(|op| !op.bodies.is_empty())?;
        self.namesake(a, b, id, op)
    }

    /// The operands in which the operator at `id` of `b` differs from the one of its name and kind in `a`; none where a
    /// constant is another.
    pub(super) fn other_operands(&self, a: &Graph, b: &Graph, id: NodeId) -> Vec<(Outlet, Outlet)> {
        let found = || {
            let op = b.op(id)?;
            let name = (0..b.output_count(id)).map(|slot| b.name(id.at(slot))).find(|name| !name.is_empty())?;
            let was = *self.names.get(name)?;
            let old = a.op(was)?;
            let is_same =
                (old.op_type(), old.domain()) == (op.op_type(), op.domain()) && old.attributes() == op.attributes();
            let (before, after) = (a.operands(was), b.operands(id));
            if !is_same || before.len() != after.len() {
                return None;
            }
            let pairs = before.into_iter().zip(after).filter_map(|(x, y)| Some((x?, y?)));
            let other: Vec<_> = pairs.filter(|&(x, y)| !self.are_equal(x, y)).collect();
            let are_constants = |&(x, y): &(Outlet, Outlet)| a.constant(x).is_some() || b.constant(y).is_some();
            (!other.iter().any(are_constants)).then_some(other)
        };
        found().unwrap_or_default()
    }

    /// The node of `a` whose values are called like those of `id`, with the same operator, attributes and operands.
    fn namesake(&self, a: &Graph, b: &Graph, id: NodeId, op: &Op) -> Option<NodeId> {
        let name = (0..b.output_count(id)).map(|slot| b.name(id.at(slot))).find(|name| !name.is_empty())?;
        let was = *self.names.get(name)?;
        let old = a.op(was)?;
        let of_old = a.operands(was).into_iter().map(|v| v.and_then(|v| self.of_old(v)));
        let of_new = b.operands(id).into_iter().map(|v| v.and_then(|v| self.of_new(v)));
        let names = |graph: &Graph, id: NodeId| {
            (0..graph.output_count(id)).map(|slot| graph.name(id.at(slot)).to_owned()).collect::<Vec<_>>()
        };
        let is_left_out = |(old, new): (&String, &String)| new.is_empty() || old == new;
        let (before, after) = (names(a, was), names(b, id));
        let same_results = before.len() == after.len() && before.iter().zip(&after).all(is_left_out);
        let same_bodies = old.bodies.len() == op.bodies.len()
            && old.bodies.iter().zip(&op.bodies).all(|(x, y)| {
                x.attribute == y.attribute
                    && x.graph.inputs().len() == y.graph.inputs().len()
                    && x.graph.outputs().len() == y.graph.outputs().len()
            });
        let same = same_results
            && same_bodies
            && (old.op_type(), old.domain()) == (op.op_type(), op.domain())
            && old.attributes() == op.attributes()
            && trimmed(of_old.collect()) == trimmed(of_new.collect());
        same.then_some(was)
    }

    /// Puts the values of `id` of `b` into their classes; `are_bodies_equal` counts where the operator holds bodies.
    pub(super) fn number(&mut self, a: &Graph, b: &Graph, id: NodeId, are_bodies_equal: bool) {
        let operands = b.operands(id).into_iter().map(|v| v.and_then(|v| self.of_new(v))).collect();
        let first = self.first(b, id, trimmed(operands));
        // Operands may be equal by proof, and nothing but its place tells an operator that may keep a state from others.
        let is_known = (0..b.output_count(id)).all(|slot| self.old_of.contains_key(&(first + slot as usize)));
        let was = b.op(id).filter(|_| !is_known).and_then(|op| {
            let was = self.namesake(a, b, id, op);
            was.filter(|_| op.bodies.is_empty() || are_bodies_equal)
        });
        for value in (0..b.output_count(id)).map(|slot| id.at(slot)) {
            let class = match was {
                Some(was) => self.old.get(&was.at(value.slot)).copied().unwrap_or(first + value.slot as usize),
                None => first + value.slot as usize,
            };
            self.put(value, class);
        }
    }

    fn put(&mut self, value: Outlet, class: usize) {
        let class = self.canonical(class);
        self.new.insert(value, class);
        self.new_of.entry(class).or_insert(value);
    }

    /// The class of a value of the old graph.
    pub(super) fn of_old(&self, value: Outlet) -> Option<usize> {
        Some(self.canonical(*self.old.get(&value)?))
    }

    /// The class of a value of the new graph.
    pub(super) fn of_new(&self, value: Outlet) -> Option<usize> {
        Some(self.canonical(*self.new.get(&value)?))
    }

    /// The class that `class` was proven to be.
    fn canonical(&self, mut class: usize) -> usize {
        while let Some(&proven) = self.proven.get(&class) {
            class = proven;
        }
        class
    }

    /// Whether a value of the old graph and one of the new graph are in one class.
    pub(super) fn are_equal(&self, x: Outlet, y: Outlet) -> bool {
        self.of_old(x).is_some() && self.of_old(x) == self.of_new(y)
    }

    /// Has `y` of the new graph and `x` of the old one be in one class.
    pub(super) fn unite(&mut self, x: Outlet, y: Outlet) {
        let (Some(of_x), Some(of_y)) = (self.of_old(x), self.of_new(y)) else { return };
        if of_x == of_y {
            return;
        }
        if self.old_of.contains_key(&of_y) {
            // Two values of the old graph are equal that were not known to be.
            self.proven.insert(of_x, of_y);
        } else {
            self.proven.insert(of_y, of_x);
            self.new_of.entry(of_x).or_insert(y);
        }
    }

    /// Notes that `new` of the new graph is a copy of `old`.
    pub(super) fn adopt(&mut self, old: Outlet, new: Outlet) {
        if let Some(class) = self.of_old(old) {
            self.new.insert(new, class);
            self.new_of.insert(class, new);
        }
    }

    /// What the values that a node captures are, by number.
    pub(super) fn outer(graph: &Graph, node: NodeId, class: &dyn Fn(Outlet) -> Option<usize>) -> BTreeMap<u32, Outer> {
        let outer = |(number, value): (u32, Outlet)| {
            let constant = graph.constant(value).cloned();
            Some((number, Outer { class: class(value)?, constant }))
        };
        graph.captures(node).into_iter().filter_map(outer).collect()
    }

    /// The values of the old graph besides `x` that the new one has as well, each with one of that which does not depend on `y`.
    pub(super) fn shared(&self, b: &Graph, (x, y): (Outlet, Outlet)) -> BTreeMap<Outlet, Outlet> {
        let (mut after, mut stack) = (BTreeSet::from([y.node]), vec![y.node]);
        while let Some(node) = stack.pop() {
            let values = (0..b.output_count(node)).map(|slot| node.at(slot));
            let readers = values.flat_map(|value| b.uses(value)).map(|(reader, _)| reader);
            stack.extend(readers.filter(|&reader| after.insert(reader)));
        }
        let alive = self.new.iter().filter(|(value, _)| b.contains(value.node) && !after.contains(&value.node));
        let alive: BTreeMap<usize, Outlet> =
            alive.map(|(&value, &class)| (self.canonical(class), value)).rev().collect();
        let values = self.old.iter().filter(|(value, _)| **value != x);
        values.filter_map(|(&value, &class)| Some((value, *alive.get(&self.canonical(class))?))).collect()
    }

    /// Where both forms of the region that ends at `x` and `y` are cut: at the nearest values that both graphs have and of which enough
    /// `is_known`, or, where they are not to be `apart`, those of them that depend on no other.
    pub(super) fn cut(
        &self,
        (a, x): (&Graph, Outlet),
        (b, y): (&Graph, Outlet),
        (apart, passed): (bool, &BTreeSet<usize>),
        is_known: &dyn Fn(Outlet) -> bool,
    ) -> Cut {
        let mut passed = passed.clone();
        loop {
            let cut = self.nearest((a, x), (b, y), &passed, is_known);
            let (old, new) = (classes_of(&cut.old), classes_of(&cut.new));
            if apart && new.is_subset(&old) {
                return cut;
            }
            let all: BTreeSet<usize> = old.union(&new).copied().collect();
            let dependent: Vec<_> = all.iter().copied().filter(|&class| self.depends(a, class, &all)).collect();
            if dependent.is_empty() {
                return cut;
            }
            passed.extend(dependent);
        }
    }

    /// The nearest values that both graphs have, other than those of the classes `passed`.
    fn nearest(
        &self,
        (a, x): (&Graph, Outlet),
        (b, y): (&Graph, Outlet),
        passed: &BTreeSet<usize>,
        is_known: &dyn Fn(Outlet) -> bool,
    ) -> Cut {
        let stops = |class: usize| {
            let (old, new) = (self.old_of.get(&class), self.new_of.get(&class));
            old.zip(new).is_some_and(|(&old, _)| !passed.contains(&class) && is_known(old))
        };
        let walk = |graph: &Graph, end: Outlet, classes: &BTreeMap<Outlet, usize>| {
            let (mut found, mut seen, mut stack) = (BTreeSet::new(), BTreeSet::new(), vec![end]);
            while let Some(value) = stack.pop() {
                if matches!(graph.kind(value.node), Kind::Const(_) | Kind::Sparse(_)) {
                    continue;
                }
                let class = classes.get(&value).map(|&class| self.canonical(class));
                let is_source = graph.op(value.node).is_none();
                if let Some(class) = class.filter(|&class| is_source || value != end && stops(class)) {
                    found.insert((class, value));
                } else if seen.insert(value.node) {
                    stack.extend(graph.operands(value.node).into_iter().flatten());
                    stack.extend(graph.captures(value.node).into_values());
                }
            }
            found
        };
        Cut { old: walk(a, x, &self.old), new: walk(b, y, &self.new) }
    }

    /// Whether the value of a class depends on that of another one of `others` in the old graph.
    fn depends(&self, a: &Graph, class: usize, others: &BTreeSet<usize>) -> bool {
        let Some(&value) = self.old_of.get(&class) else { return false };
        let place = |value: Outlet| self.places.get(&value.node).copied().unwrap_or(0);
        let first = others.iter().filter_map(|other| self.old_of.get(other)).map(|&value| place(value)).min();
        let first = first.unwrap_or(0);
        let (mut seen, mut stack) = (BTreeSet::from([value.node]), vec![value]);
        while let Some(value) = stack.pop() {
            let operands = a.operands(value.node).into_iter().flatten().chain(a.captures(value.node).into_values());
            for operand in operands.filter(|&operand| place(operand) >= first) {
                let is_other = self.of_old(operand).is_some_and(|found| found != class && others.contains(&found));
                if is_other {
                    return true;
                }
                if seen.insert(operand.node) {
                    stack.push(operand);
                }
            }
        }
        false
    }
}

impl Cut {
    /// The classes of the values that element-wise operators of `a` make, whose range may not be all numbers.
    pub(super) fn elementwise(&self, a: &Graph) -> BTreeSet<usize> {
        let is_elementwise = |value: Outlet| a.op(value.node)?.standard().map(|kind| ELEMENTWISE.contains(&kind));
        let made = self.old.iter().filter(|(_, value)| is_elementwise(*value) == Some(true));
        made.map(|(class, _)| *class).collect()
    }
}

fn classes_of(values: &BTreeSet<(usize, Outlet)>) -> BTreeSet<usize> {
    values.iter().map(|(class, _)| *class).collect()
}

/// Without operands left out at the end.
fn trimmed(mut operands: Vec<Option<usize>>) -> Vec<Option<usize>> {
    while operands.last() == Some(&None) {
        operands.pop();
    }
    operands
}
