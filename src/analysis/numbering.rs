//! Numbers for values, equal only where the values are: the same constants, and the same operators on the same operands.

use std::collections::{BTreeMap, HashMap};

use crate::ir::{Graph, Kind, Outlet, Tensor};

/// The numbers given so far, to the values of any number of graphs that capture the same values.
#[derive(Debug, Default)]
pub struct Numbering {
    next: usize,
    captures: HashMap<u32, usize>,
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
            if let (Some(_), [Some(copied)]) = (graph.op_of(id, "Identity"), &operands[..]) {
                numbers.insert(id.out(), *copied);
                continue;
            }
            let count = graph.output_count(id);
            let first = match graph.kind(id) {
                Kind::Capture(i) => *self.captures.entry(*i).or_insert(self.next),
                Kind::Const(_) => match graph.constant(id.out()) {
                    Some(tensor) => {
                        let alike = self.constants.entry(tensor.sketch()).or_default();
                        let twin = alike.iter().find(|(other, _)| other.same(tensor)).map(|(_, number)| *number);
                        twin.unwrap_or_else(|| {
                            alike.push((tensor.clone(), self.next));
                            self.next
                        })
                    }
                    None => self.next,
                },
                Kind::Op(op) => match op.signature() {
                    Some(signature) => *self.operators.entry((signature, operands, count)).or_insert(self.next),
                    None => self.next,
                },
                Kind::Input | Kind::Sparse(_) => self.next,
            };
            if first == self.next {
                self.next += count as usize;
            }
            numbers.extend((0..count).map(|slot| (id.at(slot), first + slot as usize)));
        }
        numbers
    }
}
