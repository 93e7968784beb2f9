//! Operators that move elements: channels change their places, or axes become one.

use std::ops::Range;

use super::{Count, Role, Rule};
use crate::{
    analysis::channels::{
        Axis,
        entries::{Entry, escapes, length, source},
    },
    eval::{axis, slice_indices},
    ir::{Outlet, Tensor},
};

impl Rule<'_> {
    /// Ties the axes that are not padded.
    pub(super) fn pad(&mut self, x: Outlet, y: Outlet) -> Option<()> {
        let pads = match self.operand(1) {
            Some(pads) => self.graph.constant(pads)?.i64s()?,
            None => self.op.ints("pads")?.to_vec(),
        };
        let rank = self.rank(x)?;
        if pads.len() != 2 * rank || self.operand(3).is_some() {
            return None;
        }
        (0..rank).filter(|&a| pads[a] == 0 && pads[a + rank] == 0).try_for_each(|a| self.tie((x, a), (y, a)))
    }

    /// Ties what is taken, forwards and without gaps, to what becomes of it.
    pub(super) fn slice(&mut self, x: Outlet, y: Outlet) -> Option<()> {
        let rank = self.rank(x)?;
        // What is given, but not as a constant, is not known.
        let bounds = |slot: u32, name: &str| match self.operand(slot) {
            Some(list) => self.graph.constant(list)?.i64s().map(Some),
            None => Some(self.op.ints(name).map(<[i64]>::to_vec)),
        };
        let (starts, ends) = (bounds(1, "starts")??, bounds(2, "ends")??);
        let axes = bounds(3, "axes")?.unwrap_or_else(|| (0..starts.len() as i64).collect());
        let steps = bounds(4, "steps")?.unwrap_or_else(|| vec![1; starts.len()]);
        if [ends.len(), axes.len(), steps.len()] != [starts.len(); 3] {
            return None;
        }
        let mut cut = Vec::new();
        for (entry, &a) in axes.iter().enumerate() {
            let a = axis(a, rank)?;
            cut.push(a);
            let extent = self.channels.extent(x, a)?;
            let taken = slice_indices(extent, starts[entry], ends[entry], steps[entry])?;
            let range = taken.clone().next()?..taken.clone().last()? + 1;
            if steps[entry] != 1 || range.is_empty() {
                self.channels.pin_axis(x, a, "a Slice names positions along it");
                continue;
            }
            if self.channels.extent(y, a)? != range.len() {
                return None;
            }
            self.channels.tie_by((y, a), (x, a), |i| range.start + i)?;
            self.seen.extend([(x, a), (y, a)]);
            // An end beyond every extent means the same after channels went.
            if range != (0..extent) || ends[entry] < i64::from(i32::MAX) {
                self.channels.counts.push(Count::Slice(self.node, entry, a, range));
            }
        }
        (0..rank).filter(|a| !cut.contains(a)).try_for_each(|a| self.tie((x, a), (y, a)))
    }

    /// Ties the axes beside the one along which slices are taken, and that one too where constants say which.
    pub(super) fn gather(&mut self, x: Outlet, y: Outlet) -> Option<()> {
        let (indices, rank) = (self.operand(1)?, self.rank(x)?);
        let at = axis(self.op.int("axis").unwrap_or(0), rank)?;
        let rows = self.rank(indices)?;
        for a in (0..rank).filter(|&a| a != at) {
            self.tie((x, a), (y, if a < at { a } else { a + rows - 1 }))?;
            self.side(x, a, Role::Makes);
        }
        let list = self.graph.constant(indices).filter(|_| rows == 1).and_then(Tensor::i64s);
        if let Some(list) = list {
            if self.channels.apart.contains(&self.node) {
                self.seen.extend([(x, at), (y, at), (indices, 0)]);
                return Some(());
            }
            let extent = self.channels.extent(x, at)?;
            let wrap = |i: &i64| usize::try_from(if *i < 0 { i + extent as i64 } else { *i }).ok();
            let list: Vec<_> = list.iter().map(wrap).collect::<Option<_>>()?;
            self.channels.tie_by((y, at), (x, at), |i| list[i])?;
            self.seen.extend([(x, at), (y, at), (indices, 0)]);
            self.channels.counts.push(Count::Gather(self.node, at, list));
        }
        Some(())
    }

    /// Ties each channel to the block of pixels that it becomes, or that becomes it.
    pub(super) fn blocks_of_space(&mut self, x: Outlet, y: Outlet) -> Option<()> {
        self.tie((x, 0), (y, 0))?;
        let (before, after) = (self.channels.extent(x, 1)?, self.channels.extent(y, 1)?);
        let (many, few) = if before > after { (x, y) } else { (y, x) };
        let (all, channels) = (before.max(after), before.min(after));
        let block = (all / channels.max(1)).max(1);
        let is_outer = self.op.is("DepthToSpace") && self.op.string("mode") == Some("CRD");
        self.channels.tie_by((many, 1), (few, 1), |i| if is_outer { i / block } else { i % channels })?;
        self.seen.extend([(x, 1), (y, 1)]);
        Some(())
    }

    pub(super) fn concat(&mut self, y: Outlet) -> Option<()> {
        let at = axis(self.op.int("axis")?, self.rank(y)?)?;
        let mut offset = 0;
        for part in self.graph.operands(self.node) {
            let part = part?;
            self.same(part, y, &[at])?;
            self.channels.tie_by((part, at), (y, at), |i| offset + i)?;
            self.seen.extend([(part, at), (y, at)]);
            offset += self.channels.extent(part, at)?;
        }
        Some(())
    }

    pub(super) fn split(&mut self, x: Outlet) -> Option<()> {
        let at = axis(self.op.int("axis").unwrap_or(0), self.rank(x)?)?;
        let spelled =
            self.op.ints("split").is_some() || self.operand(1).is_some_and(|s| self.graph.constant(s).is_some());
        let mut offset = 0;
        for slot in 0..self.graph.output_count(self.node) {
            let part = self.node.at(slot);
            self.same(part, x, &[at])?;
            if spelled {
                self.channels.tie_by((part, at), (x, at), |i| offset + i)?;
                self.seen.extend([(part, at), (x, at)]);
            }
            offset += self.channels.extent(part, at)?;
        }
        if spelled {
            self.channels.counts.push(Count::Split(self.node, at));
            self.seen.extend(self.operand(1).map(|split| (split, 0)));
        }
        Some(())
    }

    /// Ties an extent of the result to what spells it: entry `at` of the shape that is read in `slot`.
    pub(super) fn spelled(&mut self, slot: u32, at: usize, of: Axis) -> Option<()> {
        self.seen.insert((self.operand(slot)?, 0));
        let extent = self.channels.extent(of.0, of.1).map(|extent| extent as i64);
        match source(self.graph, self.shapes, self.node, slot, at) {
            // Of what is copied, or inferred, or broadcast to more, nothing is spelled.
            Some(Entry::Constant { value, .. }) if Some(value) != extent => Some(()),
            Some(Entry::Constant { reader, slot, at, .. }) => {
                let same = |count: &Count| match *count {
                    Count::Entry { reader: r, slot: s, at: a, of } => ((r, s, a) == (reader, slot, at)).then_some(of),
                    _ => None,
                };
                if let Some(other) = self.channels.counts.iter().find_map(same) {
                    return self.channels.tie(other, of);
                }
                self.channels.counts.push(Count::Entry { reader, slot, at, of });
                Some(())
            }
            Some(Entry::Extent(read)) if self.channels.tie(read, of).is_some() => Some(()),
            entry => {
                const WHY: &str = "its extent is computed";
                self.channels.pin_axis(of.0, of.1, WHY);
                if let Some(Entry::Extent((value, axis))) = entry {
                    self.channels.pin_axis(value, axis, WHY);
                }
                Some(())
            }
        }
    }

    pub(super) fn transpose(&mut self, x: Outlet, y: Outlet) -> Option<()> {
        let rank = self.rank(x)?;
        let perm: Vec<_> = match self.op.ints("perm") {
            Some(perm) => perm.iter().map(|&p| axis(p, rank)).collect::<Option<_>>()?,
            None => (0..rank).rev().collect(),
        };
        perm.iter().enumerate().try_for_each(|(k, &p)| self.tie((x, p), (y, k)))
    }

    pub(super) fn expand(&mut self, x: Outlet, y: Outlet) -> Option<()> {
        self.broadcast(x, y)?;
        let spelled = length(self.shapes, self.operand(1)?)?;
        let shift = self.rank(y)?.checked_sub(spelled)?;
        (0..spelled).try_for_each(|a| self.spelled(1, a, (y, a + shift)))
    }

    pub(super) fn resize(&mut self, x: Outlet, y: Outlet) -> Option<()> {
        self.tie((x, 0), (y, 0))?;
        self.tie((x, 1), (y, 1))?;
        match self.operand(3) {
            Some(_) if self.op.attribute("axes").is_some() => None,
            Some(_) => (0..self.rank(y)?).try_for_each(|a| self.spelled(3, a, (y, a))),
            None => Some(()),
        }
    }

    pub(super) fn reshape(&mut self, x: Outlet, y: Outlet) -> Option<()> {
        self.regroup(x, y)?;
        let zero_copies = self.op.int("allowzero") != Some(1);
        for k in 0..self.rank(y)? {
            let entry = source(self.graph, self.shapes, self.node, 1, k);
            if zero_copies && matches!(entry, Some(Entry::Constant { value: 0, .. })) {
                self.channels.tie((x, k), (y, k))?;
            }
            self.spelled(1, k, (y, k))?;
        }
        Some(())
    }

    /// The extents that are read must stay where something is computed of them.
    pub(super) fn shape(&mut self, x: Outlet, y: Outlet) -> Option<()> {
        let rank = self.rank(x)?;
        let bound = |name: &str, default: usize| match self.op.int(name) {
            Some(i) if i < 0 => (i + rank as i64).clamp(0, rank as i64) as usize,
            Some(i) => (i as usize).min(rank),
            None => default,
        };
        let (start, end) = (bound("start", 0), bound("end", rank));
        self.seen.extend((0..rank).map(|a| (x, a)));
        for a in start..end {
            if escapes(self.graph, self.shapes, y, a - start) {
                self.channels.pin_axis(x, a, "something is computed of its extent");
            }
        }
        Some(())
    }

    /// Ties the axes of two shapes of the same elements, in their common factors: an axis of several is their product.
    pub(super) fn regroup(&mut self, x: Outlet, y: Outlet) -> Option<()> {
        let (from, to) = (self.shapes.known(x)?, self.shapes.known(y)?);
        let wide = |dims: &[usize]| (0..dims.len()).filter(|&a| dims[a] != 1).collect::<Vec<_>>();
        let (mut left, mut right) = (wide(&from).into_iter().peekable(), wide(&to).into_iter().peekable());
        self.seen.extend((0..from.len()).filter(|&a| from[a] == 1).map(|a| (x, a)));
        self.seen.extend((0..to.len()).filter(|&a| to[a] == 1).map(|a| (y, a)));
        while let (Some(a), Some(b)) = (left.next(), right.next()) {
            let (mut group, mut other) = (vec![a], vec![b]);
            let (mut p, mut q) = (from[a], to[b]);
            while p != q {
                if p < q {
                    let next = left.next()?;
                    p = p.checked_mul(from[next])?;
                    group.push(next);
                } else {
                    let next = right.next()?;
                    q = q.checked_mul(to[next])?;
                    other.push(next);
                }
            }
            let axes = |value: Outlet, axes: &[usize]| axes.iter().map(|&a| (value, a)).collect::<Vec<_>>();
            self.factor(&axes(x, &group), &axes(y, &other));
        }
        Some(())
    }

    /// Ties two lists of axes of the same elements; where they have no common factors, they stay unseen. An open axis has none
    /// but those that stand on the other side as axes, and one that is given has no open one: at other lengths, the factors
    /// would be others.
    fn factor(&mut self, left: &[Axis], right: &[Axis]) -> Option<()> {
        let extents = |axes: &[Axis]| {
            axes.iter().map(|&(value, axis)| self.channels.extent(value, axis)).collect::<Option<Vec<_>>>()
        };
        let (from, to) = (extents(left)?, extents(right)?);
        let factors = common_factors(&from, &to)?;
        // The factors that an axis is made of, by the product of the extents before it.
        let parts = |extents: &[usize]| {
            let (mut next, mut parts) = (0, Vec::new());
            for &extent in extents {
                let (first, mut product) = (next, 1);
                while product < extent {
                    product *= factors[next];
                    next += 1;
                }
                parts.push(first..next);
            }
            parts
        };
        let (left_parts, right_parts) = (parts(&from), parts(&to));
        let whole = |axes: &[Axis], parts: &[Range<usize>], factor: usize| {
            parts.iter().position(|part| *part == (factor..factor + 1)).map(|at| axes[at])
        };
        let is_by_chance = |(axes, parts): (&[Axis], &[Range<usize>]),
                            (others, other_parts): (&[Axis], &[Range<usize>])| {
            axes.iter().zip(parts).any(|(&(value, axis), part)| {
                let is_open = self.shapes.is_open(value, axis);
                part.clone().any(|factor| match whole(others, other_parts, factor) {
                    Some((value, axis)) if part.len() == 1 || !is_open => self.shapes.is_open(value, axis) != is_open,
                    Some(_) => false,
                    None => is_open && part.len() > 1,
                })
            })
        };
        let (a, b) = ((left, &left_parts[..]), (right, &right_parts[..]));
        if is_by_chance(a, b) || is_by_chance(b, a) {
            return None;
        }
        let mut axes = Vec::new();
        for (factor, &extent) in factors.iter().enumerate() {
            let (a, b) = (whole(left, &left_parts, factor), whole(right, &right_parts, factor));
            axes.push(match (a, b) {
                (Some(a), Some(b)) => {
                    self.tie(a, b)?;
                    a
                }
                (Some(axis), None) | (None, Some(axis)) => axis,
                (None, None) => self.inner(extent)?,
            });
        }
        self.seen.extend(axes.iter().copied());
        for (axis, part) in left.iter().zip(left_parts).chain(right.iter().zip(right_parts)) {
            if part.len() > 1 {
                self.multiply(*axis, &axes[part])?;
            }
        }
        Some(())
    }
}

/// The coarsest extents of which both lists of extents are products of neighbours; their products are equal.
fn common_factors(left: &[usize], right: &[usize]) -> Option<Vec<usize>> {
    let cuts = |extents: &[usize]| {
        extents
            .iter()
            .scan(1_usize, |product, &extent| {
                *product = product.saturating_mul(extent);
                Some(*product)
            })
            .collect::<Vec<_>>()
    };
    let mut all = cuts(left);
    all.extend(cuts(right));
    all.sort_unstable();
    all.dedup();
    let mut before = 1;
    let factor = |cut: usize| {
        let factor = cut.is_multiple_of(before).then_some(cut / before);
        before = cut;
        factor
    };
    all.into_iter().map(factor).collect()
}
