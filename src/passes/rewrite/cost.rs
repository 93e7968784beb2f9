//! What a layer costs of what is to be saved, and what a chain in its place would.

use super::site::{Readers, Site};
use crate::{
    analysis::{cost::Latency, linear::multiplies, shapes::Shapes},
    factor::{Form, Layout, Shape},
    ir::{Graph, NodeId},
    pass::Minimize,
};

/// Bytes of the node and the names that each further layer of a chain adds to the file, about.
const OVERHEAD: f64 = 200.0;

/// What the layers of one weight cost.
pub(super) struct Costs {
    minimize: Minimize,
    /// Bytes of an element of the weight.
    element: f64,
    readers: Vec<Places>,
    /// What they cost as they are.
    pub(super) whole: f64,
}

/// Where the vectors are that a layer multiplies.
struct Places {
    /// Samples, or rows of a plain matrix.
    count: f64,
    /// Along each axis of the kernel, the extent of what is read and of what is made.
    extents: Vec<(f64, f64)>,
    /// See [`Shape::spreads`](crate::factor::Shape::spreads).
    spreads: bool,
    /// Whether multiply-adds are counted: those of recurrences are not.
    counts: bool,
}

impl Costs {
    /// `None` where what is to be saved is not known.
    pub(super) fn of(graph: &Graph, shapes: &Shapes, site: &Site, minimize: Minimize) -> Option<Self> {
        let weight = site.stored(graph)?;
        let element = weight.stored_bytes() as f64 / weight.value().len().max(1) as f64;
        let places = |(node, read): (NodeId, u32)| Places::of(graph, shapes, site, node, read);
        let nodes: Vec<_> = match &site.readers {
            Readers::Dense(layers) => layers.iter().map(|layer| (layer.node, 1 - layer.slot)).collect(),
            Readers::Linear(layers) => layers.iter().map(|linear| (linear.node, 0)).collect(),
        };
        let readers = match minimize {
            Minimize::Bytes => Vec::new(),
            Minimize::Macs | Minimize::LatencyModel => nodes.into_iter().map(places).collect::<Option<_>>()?,
        };
        let mut costs = Self { minimize, element, readers, whole: 0.0 };
        costs.whole = costs.of_layers(&[Layout::of_whole(&site.shape)], Moves::default());
        Some(costs)
    }

    /// What a chain of this form costs in the place of each.
    pub(super) fn of_chain(&self, form: Form, shape: &Shape) -> f64 {
        self.of_layers(&form.layouts(shape), Moves::of(form, shape))
    }

    fn of_layers(&self, layouts: &[Layout], moves: Moves) -> f64 {
        if self.minimize == Minimize::Bytes {
            let elements: usize = layouts.iter().map(Layout::elements).sum();
            let nodes = layouts.len() + moves.nodes - 1;
            return elements as f64 * self.element + OVERHEAD * nodes as f64 + INDEX * moves.indices as f64;
        }
        self.readers.iter().map(|places| places.cost(layouts, moves, self.minimize)).sum()
    }
}

/// Bytes of an index.
const INDEX: f64 = 8.0;

/// What only moves values, or adds them, in a chain: nodes, indices that they hold, and values for each place.
#[derive(Clone, Copy, Debug, Default)]
struct Moves {
    nodes: usize,
    indices: usize,
    values: usize,
}

impl Moves {
    fn of(form: Form, shape: &Shape) -> Self {
        let (reads, makes) = (shape.groups * shape.reads, shape.groups * shape.makes);
        match form {
            // Of the channels that are read or made, those of one side come in their order from the weights around; a matrix is also
            // turned so that its rows are places, and back.
            Form::Grouped { bypass, .. } => {
                let (nodes, turned) = if shape.kernel.is_empty() { (5, reads + makes) } else { (1, 0) };
                // What is beside it is added.
                let sums = usize::from(bypass > 0);
                Self { nodes: nodes + sums, indices: reads, values: reads + turned + sums * makes }
            }
            Form::Kronecker { terms, .. } => Self { nodes: terms + 1, indices: 0, values: (terms - 1) * makes },
            _ => Self::default(),
        }
    }
}

impl Places {
    fn of(graph: &Graph, shapes: &Shapes, site: &Site, node: NodeId, slot: u32) -> Option<Self> {
        let read = shapes.known(graph.operand(node, slot)?)?;
        let made = shapes.known(node.out())?;
        let axes = site.shape.kernel.len();
        let (count, extents) = if axes == 0 {
            // Rows of x·M, or columns of M·x: for each, all elements of M are multiplied once.
            let recurrent = matches!(site.readers, Readers::Linear(_));
            let axis = if slot == 0 { made.len().checked_sub(1)? } else { made.len().checked_sub(2)? };
            let rows = if recurrent {
                read.iter().rev().skip(1).product::<usize>()
            } else {
                made.iter().product::<usize>() / (made[axis] * site.shape.groups).max(1)
            };
            (rows as f64, Vec::new())
        } else {
            let extent = |axis: usize| Some((*read.get(axis + 2)? as f64, *made.get(axis + 2)? as f64));
            (*read.first()? as f64, (0..axes).map(extent).collect::<Option<_>>()?)
        };
        let counts = multiplies(graph, node);
        Some(Self { count, extents, spreads: site.shape.spreads, counts })
    }

    fn cost(&self, layouts: &[Layout], moves: Moves, minimize: Minimize) -> f64 {
        let mut is_done = vec![false; self.extents.len()];
        let area = |is_done: &[bool]| {
            let extents = self.extents.iter().zip(is_done);
            self.count * extents.map(|((before, after), done)| if *done { after } else { before }).product::<f64>()
        };
        let mut sum = 0.0;
        if minimize == Minimize::LatencyModel {
            sum += moves.values as f64 * area(&is_done) * Latency::RESULT;
        }
        for (i, layout) in layouts.iter().enumerate() {
            let before = area(&is_done);
            is_done.iter_mut().zip(&layout.along).for_each(|(done, along)| *done |= along);
            let after = area(&is_done);
            let multiplied = if self.spreads && layout.reaches() { before } else { after };
            // The last layer of a chain for a recurrence is the recurrence itself.
            let counts = self.counts || i + 1 < layouts.len();
            let multiplied = multiplied * layout.repeats as f64;
            let products = if counts { layout.elements() as f64 * multiplied } else { 0.0 };
            if minimize == Minimize::Macs {
                sum += products;
                continue;
            }
            let made = if self.spreads && layout.reaches() { layout.dims[1] * layout.groups } else { layout.dims[0] };
            let read = if self.extents.is_empty() { layout.elements() as f64 * Latency::WEIGHT } else { 0.0 };
            sum += products * Latency::PRODUCT + made as f64 * after * layout.repeats as f64 * Latency::RESULT + read;
        }
        sum
    }
}
