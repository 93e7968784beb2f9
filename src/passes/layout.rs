//! See [`Layout`].

mod cut;
mod turn;

use std::collections::{BTreeMap, BTreeSet};

use self::{
    cut::cheapest,
    turn::{Turn, absorbs, turn},
};
use crate::{
    analysis::shapes::Shapes,
    ir::{Graph, Inlet, NodeId, Op, Outlet},
    pass::{Context, Declare, Fidelity, Infer, Pass, everywhere_inferring},
};

/// Compute what does not care for the order of axes in the order that takes the fewest `Transpose`s.
///
/// Element-wise operators, reductions, `Concat`, `Split`, `Slice`, `Pad` and `Softmax` are turned together with their
/// constants where fewer `Transpose`s are left in the whole graph; which ones is a minimum cut.
///
/// Applies when: axes, pads and constant operands are constants.
///
/// Fidelity: exact.
#[derive(Debug, clap::Parser)]
#[command(name = "layout")]
pub(super) struct Layout {}

impl Declare for Layout {
    const NAME: &'static str = "layout";
    const FIDELITY: Fidelity = Fidelity::Exact;
}

impl Pass for Layout {
    fn run(&self, graph: &mut Graph, cx: &mut Context) -> anyhow::Result<()> {
        let declared = |graph: &Graph| Shapes::infer(graph, &BTreeMap::new());
        cx.add("operators turned", everywhere_inferring(graph, &declared, &improve));
        Ok(())
    }
}

/// The order of axes that the `Transpose` at `node` gives: axis k of the result is axis `perm[k]` of the operand.
fn permutation(graph: &Graph, node: NodeId) -> Option<Vec<usize>> {
    let perm = graph.op_of(node, "Transpose")?.ints("perm")?;
    let perm: Vec<usize> = perm.iter().map(|&axis| usize::try_from(axis).ok()).collect::<Option<_>>()?;
    let mut sorted = perm.clone();
    sorted.sort_unstable();
    sorted.into_iter().eq(0..perm.len()).then_some(perm)
}

fn transposes(graph: &Graph) -> usize {
    graph.node_ids().filter(|&id| graph.op_of(id, "Transpose").is_some()).count()
}

fn inverse(perm: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; perm.len()];
    perm.iter().enumerate().for_each(|(k, &axis)| inverse[axis] = k);
    inverse
}

/// Orders that are tried on one graph in a run of the pass.
const MAX_STEPS: usize = 64;

/// Turns operators until no order leaves fewer `Transpose`s; says how many were turned.
fn improve(graph: &mut Graph, infer: &Infer<'_>) -> usize {
    let step = |_| Some(turn_some(graph, &infer(graph))).filter(|&turned| turned > 0);
    (0..MAX_STEPS).map_while(step).sum()
}

/// Turns operators by the first order that leaves fewer `Transpose`s; says how many.
fn turn_some(graph: &mut Graph, shapes: &Shapes) -> usize {
    let perms: BTreeSet<_> = graph.ops().into_iter().filter_map(|id| permutation(graph, id)).collect();
    for perm in perms {
        let perm = &perm;
        let turns: BTreeMap<_, _> =
            graph.ops().into_iter().filter_map(|id| Some((id, turn(graph, shapes, id, perm)?))).collect();
        let chosen = cheapest(graph, shapes, perm, &turns);
        if chosen.is_empty() {
            continue;
        }
        let mut next = graph.clone();
        let turned = Turner::new(&mut next, perm, &turns, chosen).run();
        // A `Transpose` of what is turned itself may cost one more than the cut knows of.
        if transposes(&next) < transposes(graph) {
            *graph = next;
            // What is turned is known by other shapes.
            return turned;
        }
    }
    0
}

/// Rewrites a graph so that some operators compute in another order of axes.
struct Turner<'a> {
    graph: &'a mut Graph,
    perm: &'a [usize],
    turns: &'a BTreeMap<NodeId, Turn>,
    chosen: BTreeSet<NodeId>,
    /// Values in the other order: each is a `Transpose` by the permutation away from what it stands for.
    turned: BTreeMap<Outlet, Outlet>,
}

impl<'a> Turner<'a> {
    fn new(
        graph: &'a mut Graph,
        perm: &'a [usize],
        turns: &'a BTreeMap<NodeId, Turn>,
        chosen: BTreeSet<NodeId>,
    ) -> Self {
        Self { graph, perm, turns, chosen, turned: BTreeMap::new() }
    }

    fn run(mut self) -> usize {
        let order: Vec<_> = self.graph.ops().into_iter().filter(|id| self.chosen.contains(id)).collect();
        let names: Vec<_> = order.iter().map(|&id| self.graph.op(id).map_or("", Op::name).to_owned()).collect();
        let new: Vec<_> = order.iter().map(|&id| self.rebuild(id)).collect();
        for &id in &order {
            for slot in 0..self.graph.output_count(id) {
                self.hand_over(id.at(slot));
            }
        }
        order.iter().rev().for_each(|&id| _ = self.graph.sweep(id));
        for (id, name) in new.into_iter().zip(names) {
            self.graph.edit_op(id, |op| *op = std::mem::take(op).named(&name));
        }
        order.len()
    }

    /// Adds the operator at `id` in the other order.
    fn rebuild(&mut self, id: NodeId) -> NodeId {
        let turn = self.turns[&id].clone();
        let mut operands = self.graph.operands(id);
        operands.resize(operands.len().max(turn.given.keys().map(|&slot| slot as usize + 1).max().unwrap_or(0)), None);
        for (slot, operand) in (0..).zip(&mut operands) {
            if let Some(given) = turn.given.get(&slot) {
                let name = self.graph.name_after(operand.unwrap_or(id.out()), Layout::NAME);
                *operand = Some(self.graph.add_const(given.clone(), &name));
            } else if let Some(value) = operand.filter(|_| turn.turned.contains(&slot)) {
                *operand = Some(self.in_other_order(value, id));
            }
        }
        let outputs: Vec<_> = (0..self.graph.output_count(id)).map(|slot| id.at(slot)).collect();
        let names: Vec<_> = outputs.iter().map(|&value| self.graph.name_after(value, Layout::NAME)).collect();
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        let new = self.graph.add_op(turn.op.named(""), &operands, &names, id);
        self.turned.extend(outputs.into_iter().map(|value| (value, new.at(value.slot))));
        new
    }

    /// `value` in the other order, for an operator near `near`.
    fn in_other_order(&mut self, value: Outlet, near: NodeId) -> Outlet {
        if let Some(&turned) = self.turned.get(&value) {
            return turned;
        }
        let back = inverse(self.perm);
        let made = if permutation(self.graph, value.node).as_deref() == Some(self.perm) {
            self.graph.operand(value.node, 0)
        } else if let Some(weight) = self.graph.weight(value).and_then(|weight| weight.permute(&back)) {
            let name = self.graph.name_after(value, Layout::NAME);
            Some(self.graph.add_const(weight, &name))
        } else {
            turned_back(self.graph, value, &back)
        };
        let made = made.unwrap_or_else(|| self.transpose(value, &back, near));
        self.turned.insert(value, made);
        made
    }

    fn transpose(&mut self, value: Outlet, perm: &[usize], near: NodeId) -> Outlet {
        let perm: Vec<_> = perm.iter().map(|&axis| axis as i64).collect();
        let name = self.graph.name_after(value, "transposed");
        self.graph.add_op(Op::new("Transpose").with_ints("perm", &perm), &[Some(value)], &[&name], near).out()
    }

    /// Has everything that is not turned and reads `value` read what its turned form makes of it.
    fn hand_over(&mut self, value: Outlet) {
        let turned = self.turned[&value];
        for (reader, inlet) in self.graph.uses(value) {
            if self.chosen.contains(&reader) || inlet != Inlet::Slot(0) {
                continue;
            }
            if let Some(after) = permutation(self.graph, reader) {
                let both: Vec<_> = after.iter().map(|&axis| self.perm[axis]).collect();
                if both.iter().copied().eq(0..both.len()) && !self.graph.is_output(reader.out()) {
                    self.graph.replace_uses(reader.out(), turned);
                    self.graph.sweep(reader);
                } else {
                    let both: Vec<_> = both.into_iter().map(|axis| axis as i64).collect();
                    self.graph.set_operand(reader, 0, Some(turned));
                    self.graph.edit_op(reader, |op| *op = std::mem::take(op).with_ints("perm", &both));
                }
            } else if let Some(absorbed) = absorbs(self.graph, reader, self.perm) {
                self.graph.set_operand(reader, 0, Some(turned));
                for (slot, given) in absorbed.given {
                    let name = self.graph.name_after(reader.out(), Layout::NAME);
                    let given = self.graph.add_const(given, &name);
                    self.graph.exchange_operand(reader, slot, Some(given));
                }
                self.graph.edit_op(reader, |op| *op = absorbed.op);
            }
        }
        let rest = self.graph.uses(value).iter().any(|(reader, _)| !self.chosen.contains(reader));
        if rest || self.graph.is_output(value) {
            let plain = self.transpose(turned, self.perm, value.node);
            self.graph.replace_uses(value, plain);
        }
    }
}

/// The result of a `Transpose` by `back` that reads `value`, if there is one.
fn turned_back(graph: &Graph, value: Outlet, back: &[usize]) -> Option<Outlet> {
    let uses = graph.uses(value);
    let found = uses.into_iter().find(|&(reader, _)| permutation(graph, reader).as_deref() == Some(back));
    found.map(|(reader, _)| reader.out())
}
