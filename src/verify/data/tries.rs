//! Shapes to try for inputs whose axes are open.

use std::collections::BTreeMap;

use super::{Request, Slot};
use crate::verify::Bound;

/// Lengths that open axes beyond the batch are tried as.
const LENGTHS: &[usize] = &[224, 64, 32, 16, 1];
/// Axes of different names are tried as lengths that differ by so much: convolutional networks halve images up to five times.
const STEP: usize = 32;
/// At most so many mixtures of lengths are tried, where one length does not suit all inputs.
const MAX_MIXTURES: usize = 125;
/// Where there are more groups of open axes, sums of two of them are not tried.
const MAX_SUMMED: usize = 6;

/// The open axes of some inputs, in groups that have one length: those of one name, and each axis without a name by itself.
pub(super) struct OpenAxes {
    /// The group of each axis of each input; `None` where the axis is not open or is a batch.
    groups: Vec<Vec<Option<usize>>>,
    count: usize,
}

impl OpenAxes {
    /// The open axes of `slots` that `request` gives no shape for.
    pub(super) fn of(slots: &[Slot], request: &Request) -> Self {
        let mut named: BTreeMap<&str, usize> = BTreeMap::new();
        let mut count = 0;
        let mut groups = Vec::new();
        for slot in slots {
            let dims = slot.fact.extents().unwrap_or_default();
            let is_given = request.shapes.contains_key(&slot.name);
            let mut own = Vec::new();
            for (axis, extent) in dims.iter().enumerate() {
                let is_open = extent.is_none() && !is_given && !slot.batches.contains(&axis);
                let name = slot.axes.get(axis).map_or("", String::as_str);
                let known = named.get(name).copied().filter(|_| !name.is_empty());
                own.push(is_open.then(|| known.unwrap_or(count)));
                if is_open && known.is_none() {
                    named.insert(name, count);
                    count += 1;
                }
            }
            groups.push(own);
        }
        Self { groups, count }
    }

    /// Lengths to try, for each axis of each input: of their own for each group, alike, sums of two others, and all mixtures of lengths
    /// by input. Any length will do for an axis that is not open.
    pub(super) fn tries(&self) -> Vec<Vec<Vec<usize>>> {
        if self.count == 0 {
            return vec![self.by_group(&[])];
        }
        let mut tries = Vec::new();
        let mut add = |lengths: Vec<Vec<usize>>| {
            if !tries.contains(&lengths) {
                tries.push(lengths);
            }
        };
        for &length in LENGTHS {
            let step = if length < STEP { length / 2 } else { STEP };
            add(self.by_group(&(0..self.count).map(|group| length + step * (group % 4)).collect::<Vec<_>>()));
            add(self.by_group(&vec![length; self.count]));
        }
        self.sums().iter().for_each(|lengths| add(self.by_group(lengths)));
        let open: Vec<_> = (0..self.groups.len()).filter(|&i| self.groups[i].iter().any(Option::is_some)).collect();
        for number in 0..LENGTHS.len().saturating_pow(open.len() as u32).min(MAX_MIXTURES) {
            let mut lengths = self.by_group(&vec![LENGTHS[0]; self.count]);
            let mut rest = number;
            for &i in open.iter().rev() {
                lengths[i].fill(LENGTHS[rest % LENGTHS.len()]);
                rest /= LENGTHS.len();
            }
            add(lengths);
        }
        tries
    }

    /// Lengths of the groups where one is the sum of two others or one more than another, as with caches of keys and values.
    fn sums(&self) -> Vec<Vec<usize>> {
        let mut sums = Vec::new();
        if self.count > MAX_SUMMED {
            return sums;
        }
        let apart: Vec<_> = (0..self.count).map(|group| 16 + 8 * group).collect();
        for total in 0..self.count {
            for one in (0..self.count).filter(|&one| one != total) {
                let mut lengths = apart.clone();
                lengths[total] = apart[one] + 1;
                sums.push(lengths);
                for other in (one + 1..self.count).filter(|&other| other != total) {
                    let mut lengths = apart.clone();
                    lengths[total] = apart[one] + apart[other];
                    sums.insert(0, lengths);
                }
            }
        }
        sums
    }

    fn by_group(&self, lengths: &[usize]) -> Vec<Vec<usize>> {
        let of = |group: &Option<usize>| group.and_then(|group| lengths.get(group).copied()).unwrap_or(1);
        self.groups.iter().map(|axes| axes.iter().map(of).collect()).collect()
    }

    /// Shapes to try besides those of `lengths`: a batch of 2, and other lengths. One open axis doubles, and short ones do; where there
    /// are more, which multiply, they shrink.
    pub(super) fn others(&self, slots: &[Slot], request: &Request, lengths: &[Vec<usize>]) -> Vec<Bound> {
        let multiply = self.groups.iter().any(|axes| axes.iter().flatten().count() > 1) || self.count > 1;
        let other = |length: usize| {
            if !multiply || length < 2 * STEP {
                2 * length
            } else {
                (length * 3 / 4).next_multiple_of(STEP).min(length)
            }
        };
        let changed: Vec<Vec<_>> =
            lengths.iter().map(|axes| axes.iter().map(|&length| other(length)).collect()).collect();
        let main = bound(slots, request, 1, lengths);
        let mut bounds = vec![
            bound(slots, request, 2, &changed),
            bound(slots, request, 1, &changed),
            bound(slots, request, 2, lengths),
        ];
        bounds.retain(|bound| *bound != main);
        bounds.dedup();
        bounds
    }
}

/// The shape of each input, with open axes of these lengths.
pub(super) fn bound(slots: &[Slot], request: &Request, batch: usize, lengths: &[Vec<usize>]) -> Bound {
    let shape = |(slot, lengths): (&Slot, &Vec<usize>)| (slot.name.clone(), slot.shape(request, batch, lengths));
    slots.iter().zip(lengths).map(shape).collect()
}
