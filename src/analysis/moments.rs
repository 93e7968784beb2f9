//! Mean and covariance of what layers read: the one statistic behind every error that is predicted and every weight that is
//! refitted. For y = W·x + b and a change of both, E‖Δy‖² = tr(ΔW·C·ΔWᵀ) + ‖ΔW·μ + Δb‖².

pub mod file;
pub mod prior;

use std::collections::BTreeMap;

use nalgebra::{DMatrix, DVector};
use rand_core::{Rng, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;
use rayon::prelude::*;
use xxhash_rust::xxh3::Xxh3;

use super::linear::Linear;
use crate::{
    codec::Model,
    ir::{Graph, Outlet},
    linalg::add_gram,
    refit::Kept,
    verify::{Cannot, Engine, Value},
};

/// Vectors of each sample that a layer contributes.
pub const POSITIONS: usize = 32;
/// Of convolutions that read longer patches, channels are chosen by what is known of pixels alone: the work for each grows with
/// the square of the length (algorithms.md §2.3).
pub const MAX_CHOSEN_BY: usize = 2048;
/// Samples that are run before their vectors are added.
const CHUNK: usize = 16;

/// Sums over vectors x: n, Σx, Σx·xᵀ and how often each element is zero.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// How many vectors.
    pub count: u64,
    /// Σx.
    pub sum: DVector<f64>,
    /// Σx·xᵀ, its lower triangle.
    pub products: DMatrix<f64>,
    /// How many of each element are zero.
    pub zeros: DVector<f64>,
}

impl Moments {
    /// Of no vectors of `size` elements.
    #[must_use]
    pub fn new(size: usize) -> Self {
        Self { count: 0, sum: DVector::zeros(size), products: DMatrix::zeros(size, size), zeros: DVector::zeros(size) }
    }

    /// Adds the columns of `vectors`.
    pub fn add(&mut self, vectors: &DMatrix<f64>) {
        self.count += vectors.ncols() as u64;
        self.sum += vectors.column_sum();
        for column in vectors.column_iter() {
            self.zeros.zip_apply(&column, |zeros, x| *zeros += f64::from(u8::from(x == 0.0)));
        }
        add_gram(&mut self.products, vectors);
    }

    /// Adds those of `other`.
    pub fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.sum += &other.sum;
        self.products += &other.products;
        self.zeros += &other.zeros;
    }

    /// Those of some elements of the vectors alone.
    #[must_use]
    pub fn select(&self, elements: &[usize]) -> Self {
        // Of the products, the lower triangle is there.
        let product = |i: usize, j: usize| self.products[(i.max(j), i.min(j))];
        Self {
            count: self.count,
            sum: self.sum.select_rows(elements),
            products: DMatrix::from_fn(elements.len(), elements.len(), |i, j| product(elements[i], elements[j])),
            zeros: self.zeros.select_rows(elements),
        }
    }

    /// μ.
    #[must_use]
    pub fn mean(&self) -> DVector<f64> {
        &self.sum / self.count.max(1) as f64
    }

    /// C = E[(x − μ)(x − μ)ᵀ].
    #[must_use]
    pub fn covariance(&self) -> DMatrix<f64> {
        let mean = self.mean();
        self.spread(&mean)
    }

    /// S = E[x·xᵀ].
    #[must_use]
    pub fn second(&self) -> DMatrix<f64> {
        self.spread(&DVector::zeros(self.sum.len()))
    }

    /// E[x·xᵀ] − m·mᵀ.
    fn spread(&self, center: &DVector<f64>) -> DMatrix<f64> {
        let n = self.count.max(1) as f64;
        let mut spread = &self.products / n;
        spread.ger(-1.0, center, center, 1.0);
        spread.fill_upper_triangle_with_lower_triangle();
        spread
    }

    /// The share of the mean variance that a ridge takes: 10⁻³, and 10⁻² below five vectors for each dimension
    /// (algorithms.md §0.5). Below one it grows with the square of what is lacking: directions that no sample shows are not
    /// free (with 128 samples of 784 pixels, `mnist_lenet300` shrinks to 45 % instead of 59 % within one budget).
    #[must_use]
    pub fn ridge(&self) -> f64 {
        let scarcity = self.sum.len() as f64 / self.count.max(1) as f64;
        if scarcity > 0.2 { 1e-2 * scarcity.powi(2).max(1.0) } else { 1e-3 }
    }
}

/// Moments by [source](Linear::source), for each group of the layers that read it.
pub type Table = BTreeMap<String, Vec<Moments>>;

/// What `layers` read, taken together: all vectors that the one weight of theirs multiplies, for each of their groups. `None`
/// where that is not known of each of them.
#[must_use]
pub fn together(table: &Table, graph: &Graph, layers: &[Linear]) -> Option<Vec<Moments>> {
    merged(layers, |layer| table.get(&layer.source(graph)).cloned())
}

/// The same in a model of whose channels `kept` are left since the moments were collected.
#[must_use]
pub fn together_of_kept(table: &Table, kept: &Kept, graph: &Graph, layers: &[Linear]) -> Option<Vec<Moments>> {
    merged(layers, |layer| {
        let before_groups = || {
            // A layer that was put in groups read all channels alike before.
            let mut one = layer.clone();
            one.groups = 1;
            table.get(&one.source(graph))
        };
        let whole = table.get(&layer.source(graph)).or_else(before_groups)?;
        let all: Vec<usize>;
        let left = match kept.channels_of(graph.name(layer.input))? {
            Some(left) => left,
            None if whole.len() == layer.groups => return Some(whole.clone()),
            None => {
                all = (0..layer.groups * layer.columns / layer.taps).collect();
                &all
            }
        };
        let (channels, before) = (layer.columns / layer.taps, whole.first()?.sum.len() / layer.taps);
        (left.len() == layer.groups * channels).then_some(())?;
        let of_group = |group: usize| {
            let own = left.get(group * channels..(group + 1) * channels)?;
            let from = own.first()? / before;
            let places: Vec<_> = own.iter().filter(|&&channel| channel / before == from).map(|c| c % before).collect();
            let elements = places.iter().flat_map(|place| (0..layer.taps).map(move |tap| place * layer.taps + tap));
            (places.len() == channels).then(|| Some(whole.get(from)?.select(&elements.collect::<Vec<_>>())))?
        };
        (0..layer.groups).map(of_group).collect()
    })
}

/// What `of` says that each of `layers` reads, taken together.
fn merged(layers: &[Linear], of: impl Fn(&Linear) -> Option<Vec<Moments>>) -> Option<Vec<Moments>> {
    let (first, others) = layers.split_first()?;
    let mut moments = of(first)?;
    for layer in others {
        let own = of(layer)?;
        let fits = own.len() == moments.len() && own.iter().zip(&moments).all(|(a, b)| a.sum.len() == b.sum.len());
        fits.then(|| moments.iter_mut().zip(&own).for_each(|(moments, own)| moments.merge(own)))?;
    }
    let is_whole = moments.iter().all(|group| group.count > 0 && group.sum.len() == first.columns);
    (is_whole && moments.len() == first.groups).then_some(moments)
}

/// The hash of a sample: it, and not its place, decides where it is looked at.
#[must_use]
pub fn hash(sample: &[Value]) -> u64 {
    let mut hasher = Xxh3::new();
    for value in sample {
        value.values.iter().for_each(|v| hasher.update(&v.to_le_bytes()));
    }
    hasher.digest()
}

/// At most [`POSITIONS`] of `count` positions, ascending, drawn without replacement (Floyd, in Bentley 1987) from a seed of
/// the layer's source and the sample.
#[must_use]
pub fn positions(count: usize, source: &str, sample: u64) -> Vec<usize> {
    if count <= POSITIONS {
        return (0..count).collect();
    }
    let mut random = Xoshiro256PlusPlus::seed_from_u64(xxhash_rust::xxh3::xxh3_64(source.as_bytes()) ^ sample);
    let mut drawn = std::collections::BTreeSet::new();
    for last in count - POSITIONS..count {
        let draw = (random.next_u64() % (last as u64 + 1)) as usize;
        drawn.insert(if drawn.contains(&draw) { last } else { draw });
    }
    drawn.into_iter().collect()
}

/// What the layers of `model` read, over `samples`; a `Conv` that reads patches of more than `max_size` elements is looked at by
/// pixels, and layers whose vectors are longer even so are left out.
///
/// # Errors
///
/// When the engine can't run the model.
pub fn collect(
    engine: &Engine,
    model: &Model,
    samples: &[Vec<Value>],
    max_size: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Table, Cannot> {
    let mut sources: BTreeMap<String, Linear> = BTreeMap::new();
    let layers = Linear::all(&model.graph).into_iter();
    let views = layers.flat_map(|linear| {
        let coarse = linear.clone().at_most(MAX_CHOSEN_BY.min(max_size));
        [linear.at_most(max_size), coarse].into_iter().flatten()
    });
    for linear in views {
        sources.entry(linear.source(&model.graph)).or_insert(linear);
    }
    let mut inputs: Vec<Outlet> = sources.values().map(|linear| linear.input).collect();
    inputs.sort_unstable();
    inputs.dedup();
    let Some(first) = samples.first().filter(|_| !inputs.is_empty()) else { return Ok(Table::new()) };
    let probe = engine.probe(model, &inputs, first)?;
    let mut table: Vec<_> = sources
        .iter()
        .map(|(source, linear)| (source.clone(), linear, vec![Moments::new(linear.columns); linear.groups]))
        .collect();
    for (i, chunk) in samples.chunks(CHUNK).enumerate() {
        progress(i * CHUNK);
        let vectors = chunk.par_iter().map(|sample| {
            let (key, values) = (hash(sample), probe.run(sample)?);
            let cut = |(source, linear): (&String, &Linear)| {
                let place = inputs.binary_search(&linear.input).unwrap_or_default();
                let at = positions(linear.positions(&values[place]), source, key);
                linear.vectors(&values[place], &at)
            };
            Ok(sources.iter().map(cut).collect::<Vec<_>>())
        });
        let vectors: Vec<_> = vectors.collect::<Result<_, Cannot>>()?;
        table.par_iter_mut().enumerate().for_each(|(layer, (_, _, moments))| {
            for (group, moments) in moments.iter_mut().enumerate() {
                moments.add(&side_by_side(vectors.iter().map(|sample| &sample[layer][group])));
            }
        });
    }
    Ok(table.into_iter().map(|(source, _, moments)| (source, moments)).collect())
}

/// Matrices of equally many rows as one.
pub fn side_by_side<'a>(parts: impl Iterator<Item = &'a DMatrix<f64>> + Clone) -> DMatrix<f64> {
    let rows = parts.clone().next().map_or(0, DMatrix::nrows);
    let elements: Vec<f64> = parts.flat_map(|part| part.as_slice().iter().copied()).collect();
    DMatrix::from_vec(rows, elements.len() / rows.max(1), elements)
}
