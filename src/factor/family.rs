//! What chains of each kind make of a layer at every strength, and fitting one of them.

use nalgebra::DMatrix;

use super::{Fitted, Form, Shape, Target, blocks, fit::Group, kronecker::Split};
use crate::linalg::product;

/// A kind of chain, of any strength.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// [`Form::Ranks`] with what comes after the kernel.
    After,
    /// [`Form::Ranks`] with what comes before the kernel.
    Before,
    /// [`Form::Ranks`] with both.
    Both,
    /// [`Form::Spatial`].
    Spatial {
        /// The axis that comes first.
        first: usize,
    },
    /// [`Form::Separate`].
    Separate,
    /// [`Form::Mixed`].
    Mixed,
    /// [`Form::Grouped`].
    Grouped {
        /// The rank of what is beside it, or 0.
        bypass: usize,
    },
    /// [`Form::Kronecker`].
    Kronecker,
}

/// What is found out about a layer once for all members of a family.
#[derive(Debug)]
pub struct Prepared {
    family: Family,
    groups: Vec<Group>,
    shape: Shape,
    /// tr(W·C·Wᵀ) of all groups.
    total: f64,
}

impl Family {
    /// Whether a layer of this `shape` can be replaced so.
    #[must_use]
    pub fn fits(self, shape: &Shape) -> bool {
        let taps = shape.taps();
        match self {
            Self::After => true,
            Self::Before => taps > 1,
            Self::Both => taps > 1 && !shape.spreads,
            Self::Spatial { first } => {
                let along = shape.kernel.get(first).copied().unwrap_or(1);
                !shape.spreads && along > 1 && taps > along
            }
            Self::Separate => !shape.spreads && taps > 1 && shape.reads > 1,
            // What is mixed first pays where fewer channels are made than read (algorithms.md §4.1).
            Self::Mixed => !shape.spreads && taps > 1 && shape.makes < shape.reads,
            Self::Grouped { bypass } => blocks::counts(shape).next().is_some() && !(bypass > 0 && shape.spreads),
            Self::Kronecker => shape.kernel.is_empty() && shape.groups == 1 && Split::of(shape).is_some(),
        }
    }

    /// Whether it has a member of this rank; told of groups alone, which must divide the channels.
    #[must_use]
    pub fn has(self, shape: &Shape, rank: usize) -> bool {
        !matches!(self, Self::Grouped { .. }) || blocks::counts(shape).any(|parts| parts == rank)
    }

    /// Its member of this rank, for a layer of this `shape`; of those with two, where both are that.
    #[must_use]
    pub fn member(self, shape: &Shape, rank: usize) -> Form {
        match self {
            Self::After => Form::Ranks { before: None, after: Some(rank) },
            Self::Before => Form::Ranks { before: Some(rank), after: None },
            Self::Both => Form::Ranks { before: Some(rank), after: Some(rank) },
            Self::Spatial { first } => Form::Spatial { rank, first },
            Self::Separate => Form::Separate { multiplier: rank },
            Self::Mixed => Form::Mixed { multiplier: rank },
            Self::Grouped { bypass } => Form::Grouped { parts: rank, bypass },
            Self::Kronecker => {
                let Split { rows, columns } = Split::of(shape).unwrap_or(Split { rows: 1, columns: 1 });
                Form::Kronecker { rows, columns, terms: rank }
            }
        }
    }

    /// Finds out what there is to know about `target`: of matrices alone up to `rank`, of groups and of sums of so many alone, where
    /// that is given and less work.
    #[must_use]
    pub fn prepare(self, target: &Target, rank: Option<usize>) -> Option<Prepared> {
        let of_group = |(matrix, metric)| Group::of(self, (matrix, metric), &target.shape, rank);
        let groups = target.matrices.iter().zip(&target.metrics).map(of_group).collect::<Option<_>>()?;
        Some(Prepared { family: self, groups, shape: target.shape.clone(), total: target.energy() })
    }
}

impl Prepared {
    /// The members of the family with their relative squared errors, weakest saving last; of those with two ranks, the ones
    /// where both are multiples of `step`.
    #[must_use]
    pub fn curve(&self, step: usize) -> Vec<(Form, f64)> {
        if self.family == Family::Both {
            return self.surface(step);
        }
        let all: Vec<_> = self.groups.iter().map(|group| group.members(self.family, &self.shape)).collect();
        let count = all.iter().map(Vec::len).min().unwrap_or(0);
        let member = |i: usize| (all[0][i].0, self.lost(all.iter().map(|members| members[i].1).sum()));
        (0..count).map(member).collect()
    }

    /// The relative squared error of one member.
    #[must_use]
    pub fn error(&self, form: Form) -> f64 {
        let errors = self.curve(1);
        errors.into_iter().find(|(member, _)| *member == form).map_or(f64::INFINITY, |(_, error)| error)
    }

    /// What is lost where so much energy is told.
    fn lost(&self, told: f64) -> f64 {
        if self.total > 0.0 { (1.0 - told / self.total).max(0.0) } else { 0.0 }
    }

    fn surface(&self, step: usize) -> Vec<(Form, f64)> {
        let mut sum: Option<DMatrix<f64>> = None;
        for group in &self.groups {
            let Group::Turned(features, told, turn) = group else { return Vec::new() };
            let (turned, blocks) = (product(&told.crossed, turn), features.blocks.len());
            let mut table = DMatrix::zeros(features.rows(), turned.ncols());
            for (i, row) in turned.row_iter().enumerate() {
                for (j, value) in row.iter().enumerate() {
                    table[(i / blocks, j)] += value * value;
                }
            }
            for i in 0..table.nrows() {
                for j in 0..table.ncols() {
                    let above = if i > 0 { table[(i - 1, j)] } else { 0.0 };
                    let left = if j > 0 { table[(i, j - 1)] } else { 0.0 };
                    let corner = if i > 0 && j > 0 { table[(i - 1, j - 1)] } else { 0.0 };
                    table[(i, j)] += above + left - corner;
                }
            }
            sum = Some(match sum {
                Some(sum) => sum + table,
                None => table,
            });
        }
        let Some(table) = sum else { return Vec::new() };
        let ranks = |count: usize| (step..=count).step_by(step);
        let member = |(before, after): (usize, usize)| {
            let form = Form::Ranks { before: Some(before), after: Some(after) };
            (form, self.lost(table[(before - 1, after - 1)]))
        };
        // Of so many features, no more directions are told.
        let blocks = self.groups.iter().map(Group::blocks).min().unwrap_or(1);
        let pairs = ranks(table.nrows()).flat_map(|i| ranks(table.ncols()).map(move |j| (i, j)));
        pairs.filter(|(before, after)| *after <= before * blocks).map(member).collect()
    }

    /// The chain of this form that is closest to `target`, which all this was found out about; `None` where there is none.
    #[must_use]
    pub fn fit(&self, target: &Target, form: Form) -> Option<Fitted> {
        let shape = &target.shape;
        let layouts = form.layouts(shape);
        let mut fitted = Fitted { stages: vec![Vec::new(); layouts.len()], whole: Vec::new(), orders: None };
        let known = target.matrices.iter().zip(&target.metrics);
        for (place, (group, known)) in self.groups.iter().zip(known).enumerate() {
            let (weights, made) = group.fit(known, shape, form)?;
            fitted.stages.iter_mut().zip(weights).for_each(|(stage, own)| stage.extend(own));
            fitted.whole.push(made);
            if let Some(orders) = group.orders(form) {
                fitted.orders.get_or_insert_default().append(orders, shape, place);
            }
        }
        let fits = fitted.stages.iter().zip(&layouts).all(|(stage, layout)| stage.len() == layout.elements());
        let is_finite = fitted.stages.iter().flatten().all(|value| value.is_finite());
        (fits && is_finite).then_some(fitted)
    }
}
