//! Numbers for values, equal only where the values are: the same constants, and the same operators on the same operands.

use std::collections::{BTreeMap, HashMap};

use crate::ir::{Graph, Kind, NodeId, Outlet, Tensor};

/// The numbers given so far, to the values of any number of graphs that have the same inputs and capture the same values.
#[derive(Debug, Default)]
pub struct Numbering {
    next: usize,
    captures: HashMap<u32, usize>,
    inputs: HashMap<String, usize>,
    constants: HashMap<u64, Vec<(Tensor, usize)>>,
    operators: HashMap<Key, usize>,
}

/// What makes two operators compute the same: type, domain, attributes, operands, number of results.
type Key = (Vec<u8>, Vec<Option<usize>>, u32);

impl Numbering {
    /// Numbers the values of `graph`.
    pub fn number(&mut self, graph: &Graph) -> BTreeMap<Outlet, usize> {
        let mut numbers = BTreeMap::new();
        for id in graph.order() {
            let operands: Vec<_> =
                graph.operands(id).iter().map(|v| v.and_then(|v| numbers.get(&v).copied())).collect();
            let first = self.node(graph, id, operands);
            numbers.extend((0..graph.output_count(id)).map(|slot| (id.at(slot), first + slot as usize)));
        }
        numbers
    }

    /// The number of the first value of `id`, whose operands have the numbers `operands`; its other values have those that follow.
    pub fn node(&mut self, graph: &Graph, id: NodeId, operands: Vec<Option<usize>>) -> usize {
        if let (Some(_), [Some(copied)]) = (graph.op_of(id, "Identity"), &operands[..]) {
            return *copied;
        }
        let count = graph.output_count(id);
        let first = match graph.kind(id) {
            Kind::Capture(i) => *self.captures.entry(*i).or_insert(self.next),
            Kind::Const(_) => match graph.constant(id.out()) {
                Some(tensor) => return self.constant(tensor),
                // A caller may feed something else.
                None => *self.inputs.entry(graph.name(id.out()).to_owned()).or_insert(self.next),
            },
            Kind::Op(op) => match op.signature() {
                Some(signature) => *self.operators.entry((signature, operands, count)).or_insert(self.next),
                None => self.next,
            },
            Kind::Input => *self.inputs.entry(graph.name(id.out()).to_owned()).or_insert(self.next),
            Kind::Sparse(_) => self.next,
        };
        if first == self.next {
            self.next += count as usize;
        }
        first
    }

    /// The number of a constant.
    pub fn constant(&mut self, tensor: &Tensor) -> usize {
        let alike = self.constants.entry(tensor.sketch()).or_default();
        if let Some((_, number)) = alike.iter().find(|(other, _)| other.same(tensor)) {
            return *number;
        }
        alike.push((tensor.clone(), self.next));
        self.fresh()
    }

    /// A number that no value has.
    pub fn fresh(&mut self) -> usize {
        self.next += 1;
        self.next - 1
    }
}
