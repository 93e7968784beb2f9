//! Random values for what regions read.

use std::collections::BTreeMap;

use rand_core::{Rng, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;

use super::RUNS;
use crate::{
    ir::{DType, tensor::is_float},
    linalg::normal,
    verify::Value,
};

/// Random integers lie below this: they may be indices or extents.
const INTEGERS_BELOW: usize = 4;

/// What the floats of each run are scaled by: bounds that lie further out must show.
const SCALES: [f64; RUNS] = [1.0, 1.0, 16.0, 1.0];

/// Values by class: equal values are fed the same.
pub(super) struct Feeds {
    random: Xoshiro256PlusPlus,
    drawn: BTreeMap<usize, (DType, Vec<Value>)>,
}

impl Default for Feeds {
    fn default() -> Self {
        Self { random: Xoshiro256PlusPlus::seed_from_u64(0x5eed), drawn: BTreeMap::new() }
    }
}

impl Feeds {
    /// Values of this type and shape, one for each run; integers that are `known`, as extents are, are what they always are, and others lie
    /// below `table`, the extent that they index.
    pub(super) fn of(
        &mut self,
        class: usize,
        (dtype, dims): (DType, &[usize]),
        known: &[Option<i64>],
        table: Option<usize>,
    ) -> &[Value] {
        let random = &mut self.random;
        let below = if dtype == DType::Bool { 2 } else { table.unwrap_or(INTEGERS_BELOW).clamp(1, INTEGERS_BELOW) };
        let entry = self.drawn.entry(class).or_insert_with(|| {
            let is_float = is_float(dtype);
            let mut draw = || if is_float { normal(random) } else { (random.next_u64() % below as u64) as f64 };
            let count: usize = dims.iter().product();
            let mut element = |i: usize| {
                let drawn = draw();
                known.get(i).copied().flatten().map_or(drawn, |known| known as f64)
            };
            let mut one = |scale: f64| Value {
                dims: dims.to_vec(),
                values: (0..count).map(|i| if is_float { scale * element(i) } else { element(i) }).collect(),
                dtype,
            };
            (dtype, SCALES.iter().map(|&scale| one(scale)).collect())
        });
        &entry.1
    }

    /// The values of a class that have been drawn.
    pub(super) fn drawn(&self, class: usize) -> Option<(DType, &[Value])> {
        self.drawn.get(&class).map(|(dtype, values)| (*dtype, &values[..]))
    }
}
