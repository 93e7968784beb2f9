//! What the values of a compressed model are of those of the original.

use std::collections::BTreeMap;

use nalgebra::DMatrix;

use crate::{
    analysis::linear::Linear,
    factor::{Form, Shape},
    ir::Tensor,
};

/// Which channels are left of values, by the name of the value and the axis.
pub type Left = BTreeMap<String, BTreeMap<usize, Vec<usize>>>;

/// What the values of a compressed model are of those of the original.
#[derive(Clone, Debug, Default)]
pub struct Kept {
    pub(super) left: Left,
    mixed: BTreeMap<String, Mixed>,
    pub(super) factored: BTreeMap<String, Factored>,
    pub(super) moved: BTreeMap<String, Moved>,
    /// What weights were before they were made codes, by name.
    coded: BTreeMap<String, Tensor>,
}

/// That a value holds what a layer makes in the original.
#[derive(Clone, Debug)]
pub struct Moved {
    /// The value of the original.
    pub original: String,
    /// The layer as it was.
    pub linear: Linear,
}

/// That a chain of layers makes a value in place of one.
#[derive(Clone, Debug)]
pub struct Factored {
    /// The layer as it was.
    pub linear: Linear,
    /// What the chain is.
    pub form: Form,
    /// The axes of the layer's weight.
    pub shape: Shape,
}

/// That a value holds `matrix`·y of the channels `left`, y, of a value of the original.
#[derive(Clone, Debug)]
struct Mixed {
    axis: usize,
    left: Vec<usize>,
    matrix: DMatrix<f64>,
}

impl Kept {
    /// Forgets all.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Notes which channels are left of those that there were.
    pub fn narrow(&mut self, left: Left) {
        for (name, axes) in left {
            let known = self.left.entry(name.clone()).or_default();
            for (axis, left) in axes {
                if let Some(mixed) = self.mixed.get_mut(&name).filter(|mixed| mixed.axis == axis) {
                    mixed.matrix = mixed.matrix.select_rows(&left);
                }
                let all = match known.remove(&axis) {
                    Some(before) => left.iter().map(|&i| before[i]).collect(),
                    None => left,
                };
                known.insert(axis, all);
            }
        }
    }

    /// Notes that the value `name` now holds `matrix` times its channels along `axis`.
    pub fn mix(&mut self, name: &str, axis: usize, matrix: &DMatrix<f64>) {
        let left = self.left.get(name).and_then(|axes| axes.get(&axis)).cloned();
        let left = left.unwrap_or_else(|| (0..matrix.ncols()).collect());
        let mixed = self.mixed.entry(name.to_owned());
        let mixed = mixed.or_insert_with(|| Mixed { axis, matrix: DMatrix::identity(left.len(), left.len()), left });
        mixed.matrix = matrix * &mixed.matrix;
    }

    /// Notes that the weight `name` was `before` until it was made codes.
    pub fn code(&mut self, name: String, before: Tensor) {
        self.coded.insert(name, before);
    }

    /// Notes that the weight `old` is now `new`, a matrix whose axes are exchanged if it `is_turned`.
    pub fn turn_coded(&mut self, old: &str, new: &str, is_turned: bool) {
        let before = self.coded.remove(old);
        let turned = before.and_then(|before| if is_turned { before.permute(&[1, 0]) } else { Some(before) });
        self.coded.extend(turned.map(|turned| (new.to_owned(), turned)));
    }

    /// What the weight `name` was before it was made codes, if it was.
    pub(super) fn before_coding(&self, name: &str) -> Option<&Tensor> {
        self.coded.get(name)
    }

    /// Notes that the value `name` is now made by a chain.
    pub fn replace(&mut self, name: String, factored: Factored) {
        self.factored.insert(name, factored);
    }

    /// Notes that the value `name` holds, along axis 1, the channels that another held, in this order.
    pub fn reorder(&mut self, name: String, mut moved: Moved, order: &[usize]) {
        let before = self.left.get(&moved.original).and_then(|axes| axes.values().next());
        let left = order.iter().map(|&channel| before.map_or(channel, |before| before[channel])).collect();
        if let Some(mixed) = self.mixed.get(&moved.original) {
            let matrix = mixed.matrix.select_rows(order);
            self.mixed.insert(name.clone(), Mixed { axis: 1, left: mixed.left.clone(), matrix });
        }
        self.left.insert(name.clone(), BTreeMap::from([(1, left)]));
        // What was moved before is known by the first of its names.
        if let Some(before) = self.moved.get(&moved.original) {
            moved = before.clone();
        }
        self.moved.insert(name, moved);
    }

    /// Notes that what was called `old` is now `new`, where it was moved.
    pub fn rename(&mut self, old: &str, new: &str) {
        let Some(moved) = self.moved.remove(old) else { return };
        if let Some(left) = self.left.remove(old) {
            self.left.insert(new.to_owned(), left);
        }
        if let Some(mixed) = self.mixed.remove(old) {
            self.mixed.insert(new.to_owned(), mixed);
        }
        if moved.original != new {
            self.moved.insert(new.to_owned(), moved);
        }
    }

    /// The name of the value of the original that the value `name` stands for.
    pub(super) fn original<'a>(&'a self, name: &'a str) -> &'a str {
        self.moved.get(name).map_or(name, |moved| &moved.original)
    }

    /// The channels of the value `name` along `axis` that are left, where some are not.
    #[must_use]
    pub fn left(&self, name: &str, axis: usize) -> Option<&[usize]> {
        self.left.get(name)?.get(&axis).map(Vec::as_slice)
    }

    /// The channels of the value `name` that are left, along whichever axis: none but all where none went, and `None` where
    /// some went along several axes, or where it holds mixtures of them.
    #[must_use]
    pub fn channels_of(&self, name: &str) -> Option<Option<&[usize]>> {
        if self.mixed.contains_key(name) {
            return None;
        }
        let Some(axes) = self.left.get(name) else { return Some(None) };
        let mut axes = axes.values();
        let only = axes.next().map(Vec::as_slice);
        axes.next().is_none().then_some(only)
    }

    pub(super) fn touches(&self, name: &str) -> bool {
        self.left.contains_key(name)
    }

    /// What the compressed model is to make of `rows`, the channels of the value `name` of the original along `axis`.
    pub(super) fn of_original(&self, name: &str, axis: usize, rows: &DMatrix<f32>) -> DMatrix<f32> {
        match (self.mixed.get(name), self.left(name, axis)) {
            (Some(mixed), _) => mixed.matrix.map(|v| v as f32) * rows.select_rows(&mixed.left),
            (None, Some(left)) => rows.select_rows(left),
            (None, None) => rows.clone(),
        }
    }
}
