//! Layers: what makes channels and what reads them.

use super::{Count, Role, Rule, Side};
use crate::ir::{Outlet, tensor::is_float};

impl Rule<'_> {
    fn is_weight(&self, value: Outlet) -> bool {
        self.graph.constant(value).is_some_and(|tensor| is_float(tensor.dtype()))
    }

    /// Declares what the axis of a weight does. One that no constant holds is tied all the same, and what it reads is read.
    pub(super) fn side(&mut self, weight: Outlet, axis: usize, role: Role) {
        if self.is_weight(weight) {
            self.channels.sides.push(Side { weight, axis, role });
        } else if role == Role::Reads {
            self.channels.summed.push((weight, axis));
        }
    }

    pub(super) fn conv(&mut self, x: Outlet, y: Outlet) -> Option<()> {
        let weight = self.operand(1)?;
        let dims = self.shapes.known(weight).filter(|dims| dims.len() > 1)?;
        let group = usize::try_from(self.op.int("group").unwrap_or(1)).ok()?;
        self.tie((x, 0), (y, 0))?;
        if let Some(bias) = self.operand(2) {
            self.tie((bias, 0), (weight, 0))?;
        }
        self.tie((weight, 0), (y, 1))?;
        if group == 1 {
            self.tie((x, 1), (weight, 1))?;
            self.side(weight, 1, Role::Reads);
            self.side(weight, 0, Role::Makes);
            return Some(());
        }
        if group == 0 || !dims[0].is_multiple_of(group) {
            return None;
        }
        // Either whole groups go, or as many channels of each.
        let (groups, made) = (self.inner(group)?, self.inner(dims[0] / group)?);
        self.multiply((x, 1), &[groups, (weight, 1)])?;
        self.multiply((weight, 0), &[groups, made])?;
        self.channels.counts.push(Count::Attribute(self.node, "group", groups));
        if dims[1] > 1 {
            self.side(weight, 1, Role::Reads);
            self.side(weight, 0, Role::Makes);
        }
        Some(())
    }

    pub(super) fn conv_transpose(&mut self, x: Outlet, y: Outlet) -> Option<()> {
        let weight = self.operand(1)?;
        let dims = self.shapes.known(weight).filter(|dims| dims.len() > 1)?;
        let group = usize::try_from(self.op.int("group").unwrap_or(1)).ok()?;
        self.tie((x, 0), (y, 0))?;
        self.tie((x, 1), (weight, 0))?;
        if let Some(bias) = self.operand(2) {
            self.tie((bias, 0), (y, 1))?;
        }
        if group == 1 {
            self.side(weight, 0, Role::Reads);
            self.side(weight, 1, Role::Makes);
            return self.tie((weight, 1), (y, 1));
        }
        if group == 0 || !dims[0].is_multiple_of(group) {
            return None;
        }
        let (groups, read) = (self.inner(group)?, self.inner(dims[0] / group)?);
        self.multiply((weight, 0), &[groups, read])?;
        self.multiply((y, 1), &[groups, (weight, 1)])?;
        self.channels.counts.push(Count::Attribute(self.node, "group", groups));
        if dims[0] > group {
            self.side(weight, 0, Role::Reads);
            self.side(weight, 1, Role::Makes);
        }
        Some(())
    }

    /// `LSTM`, `GRU` and `RNN`: a hidden unit is one row of each gate, and one column of what reads it a step later.
    pub(super) fn recurrent(&mut self, x: Outlet) -> Option<()> {
        let (weight, recurrence) = (self.operand(1)?, self.operand(2)?);
        let hidden = (recurrence, 2);
        let units = self.channels.extent(recurrence, 2)?;
        let last = |rule: &Self, value: Outlet| Some((value, rule.rank(value)?.checked_sub(1)?));
        let from = last(self, x)?;
        self.tie(from, (weight, 2))?;
        // Biases of both weights, and peepholes, are as many blocks of a number for each unit.
        for list in [Some(weight), Some(recurrence), self.operand(3), self.operand(7)].into_iter().flatten() {
            self.channels.tie_by((list, 1), hidden, |i| i % units)?;
            self.seen.insert((list, 1));
        }
        let node = self.node;
        let states = (0..self.graph.output_count(node)).map(|slot| node.at(slot));
        let given = [self.operand(5), self.operand(6)].into_iter().flatten();
        for state in states.chain(given).collect::<Vec<_>>() {
            let is_read = self.graph.is_output(state) || !self.graph.uses(state).is_empty();
            let tied = last(self, state).and_then(|of_state| self.tie(of_state, hidden));
            if is_read && tied.is_none() {
                return None;
            }
        }
        self.side(weight, 2, Role::Reads);
        self.side(weight, 1, Role::Makes);
        self.side(recurrence, 2, Role::Reads);
        self.side(recurrence, 1, Role::Makes);
        self.channels.counts.push(Count::Attribute(self.node, "hidden_size", hidden));
        Some(())
    }

    pub(super) fn gemm(&mut self, y: Outlet) -> Option<()> {
        let (a, b) = (self.operand(0)?, self.operand(1)?);
        let flag = |name: &str| usize::from(self.op.int(name) == Some(1));
        let (m, k) = (flag("transA"), 1 - flag("transA"));
        let (inner, n) = (flag("transB"), 1 - flag("transB"));
        self.product((a, m, k), (b, inner, n), (y, 0, 1))?;
        match self.operand(2) {
            Some(c) => self.broadcast(c, y),
            None => Some(()),
        }
    }

    pub(super) fn matmul(&mut self, y: Outlet) -> Option<()> {
        let (a, b) = (self.operand(0)?, self.operand(1)?);
        let (ra, rb, ry) = (self.rank(a)?, self.rank(b)?, self.rank(y)?);
        if ra < 2 || rb < 2 {
            return None;
        }
        for (x, rank) in [(a, ra), (b, rb)] {
            for axis in 0..rank - 2 {
                if self.channels.extent(x, axis)? == 1 {
                    self.seen.insert((x, axis));
                } else {
                    self.tie((x, axis), (y, axis + ry - rank))?;
                }
            }
        }
        self.seen.extend((0..ry - 2).map(|axis| (y, axis)));
        self.product((a, ra - 2, ra - 1), (b, rb - 2, rb - 1), (y, ry - 2, ry - 1))
    }

    /// Ties the axes of a matrix product: (A, m, k) times (B, k, n) is (Y, m, n).
    fn product(
        &mut self,
        (a, m, k): (Outlet, usize, usize),
        (b, inner, n): (Outlet, usize, usize),
        (y, rows, columns): (Outlet, usize, usize),
    ) -> Option<()> {
        self.tie((a, k), (b, inner))?;
        self.tie((a, m), (y, rows))?;
        self.tie((b, n), (y, columns))?;
        // One of both is what reads the other.
        let weights = [(b, inner, n), (a, k, m)].into_iter().filter(|&(value, _, _)| self.is_weight(value));
        let weights: Vec<_> = weights.collect();
        if weights.is_empty() {
            self.channels.summed.push((a, k));
        }
        for (value, read, made) in weights {
            self.side(value, read, Role::Reads);
            self.side(value, made, Role::Makes);
        }
        Some(())
    }
}
