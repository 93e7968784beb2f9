//! Matrices as sums of Kronecker products: `W ≈ Σ A_t⊗B_t` (Van Loan and Pitsianis 1993).

use nalgebra::DMatrix;

use super::{Form, Metric, Shape, features::COLLINEAR};
use crate::linalg::{Cholesky, Spectrum, by_rows, product};

/// The extents of A, the left factor; B has those of W divided by them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Split {
    pub(super) rows: usize,
    pub(super) columns: usize,
}

/// A sum of Kronecker products with what it keeps of the energy of W·x.
#[derive(Debug)]
pub(super) struct Products {
    pub(super) split: Split,
    /// A and B of each term.
    pub(super) terms: Vec<[DMatrix<f64>; 2]>,
    /// tr(W·C·Wᵀ) but for what it lacks.
    pub(super) energy: f64,
}

/// Elements of a matrix that is looked at: 128 MB, held a few times over.
const MAX_ELEMENTS: usize = 1 << 24;
/// Sums of more terms are worth no more than a low rank.
const MAX_TERMS: usize = 8;
/// Rounds of fitting all B to all A, and all A to all B.
const ROUNDS: usize = 4;

impl Split {
    /// Of a matrix of this shape, the one whose factors have the fewest elements together; none where one would be a vector, or W is too large.
    pub(super) fn of(shape: &Shape) -> Option<Self> {
        (shape.elements() <= MAX_ELEMENTS).then_some(())?;
        let divisors = |size: usize| (2..size).filter(move |part| size.is_multiple_of(*part));
        let splits = divisors(shape.makes).flat_map(|rows| divisors(shape.reads).map(move |columns| (rows, columns)));
        let size = |&(rows, columns): &(usize, usize)| rows * columns + shape.elements() / (rows * columns);
        splits.min_by_key(size).map(|(rows, columns)| Self { rows, columns })
    }
}

impl Products {
    /// Sums of 1, 2, 4, … terms, or of as many as is said, closest to W·x.
    pub(super) fn all(
        matrix: &DMatrix<f64>,
        metric: &Metric,
        shape: &Shape,
        terms: Option<usize>,
    ) -> Option<Vec<Self>> {
        let split = Split::of(shape)?;
        let arranged = split.arranged(matrix);
        let most = arranged.nrows().min(arranged.ncols());
        let counts: Vec<_> = match terms {
            Some(terms) => vec![terms.min(most)],
            None => (0..).map(|power| 1 << power).take_while(|&count| count <= most.min(MAX_TERMS)).collect(),
        };
        let spectrum = Spectrum::of(&arranged, counts.last().copied())?;
        let spread = metric.times(matrix);
        counts
            .into_iter()
            .map(|count| Self::fit(matrix, (metric, &spread), split, (&spectrum, &arranged), count))
            .collect()
    }

    /// Starts from the closest sum where all of x varies alike, and fits each side to the other in turn.
    fn fit(
        matrix: &DMatrix<f64>,
        (metric, spread): (&Metric, &DMatrix<f64>),
        split: Split,
        (spectrum, arranged): (&Spectrum, &DMatrix<f64>),
        count: usize,
    ) -> Option<Self> {
        let (left, right) = spectrum.factors(arranged, count.min(spectrum.basis.ncols()));
        let (rows, columns) = (matrix.nrows() / split.rows, matrix.ncols() / split.columns);
        let term = |t: usize| {
            let a = DMatrix::from_fn(split.rows, split.columns, |i, j| left[(i * split.columns + j, t)]);
            let b = DMatrix::from_fn(rows, columns, |i, j| right[(t, i * columns + j)]);
            [a, b]
        };
        let mut terms: Vec<_> = (0..left.ncols()).map(term).collect();
        if let Metric::Full(covariance) = metric {
            // Turned about, A is the right factor.
            let turned = Turned { covariance: split.turned_about(covariance), spread: split.exchanged(spread) };
            for _ in 0..ROUNDS {
                refit(&mut terms, [0, 1], covariance, spread)?;
                refit(&mut terms, [1, 0], &turned.covariance, &turned.spread)?;
            }
        }
        let mut products = Self { split, terms, energy: 0.0 };
        products.energy = spread.dot(matrix) - metric.energy(&(matrix - products.whole()));
        Some(products)
    }

    /// Σ A⊗B.
    pub(super) fn whole(&self) -> DMatrix<f64> {
        let sum = self.terms.iter().map(|[a, b]| a.kronecker(b)).reduce(|sum, term| sum + term);
        sum.unwrap_or_default()
    }

    /// The elements of B and A of each term, row by row.
    pub(super) fn stages(&self) -> Vec<Vec<f64>> {
        self.terms.iter().flat_map(|[a, b]| [by_rows(b), by_rows(a)]).collect()
    }

    pub(super) fn form(&self) -> Form {
        Form::Kronecker { rows: self.split.rows, columns: self.split.columns, terms: self.terms.len() }
    }
}

/// What fitting A takes, which stands on the other side.
struct Turned {
    covariance: DMatrix<f64>,
    spread: DMatrix<f64>,
}

impl Split {
    /// W with the blocks that B multiplies as rows: a Kronecker product is of rank 1 so.
    fn arranged(self, matrix: &DMatrix<f64>) -> DMatrix<f64> {
        let (rows, columns) = (matrix.nrows() / self.rows, matrix.ncols() / self.columns);
        DMatrix::from_fn(self.rows * self.columns, rows * columns, |block, place| {
            let (i, j) = (block / self.columns, block % self.columns);
            matrix[(i * rows + place / columns, j * columns + place % columns)]
        })
    }

    /// Where element `place` of `count`, the first index varying slowest, stands when the second does.
    fn moved(place: usize, outer: usize, count: usize) -> usize {
        let inner = count / outer;
        place % outer * inner + place / outer
    }

    /// Rows and columns in the order in which the second index of each varies slowest.
    fn exchanged(self, matrix: &DMatrix<f64>) -> DMatrix<f64> {
        let (rows, columns) = matrix.shape();
        DMatrix::from_fn(rows, columns, |i, j| {
            matrix[(Self::moved(i, self.rows, rows), Self::moved(j, self.columns, columns))]
        })
    }

    /// The same of how x varies.
    fn turned_about(self, covariance: &DMatrix<f64>) -> DMatrix<f64> {
        let size = covariance.nrows();
        let at = |i: usize| Self::moved(i, self.columns, size);
        DMatrix::from_fn(size, size, |i, j| covariance[(at(i), at(j))])
    }
}

/// Fits the second factor of all terms to the first, `[first, second]` saying which is which: with F the first and S the second,
/// the least squares `Σ (F_tᵀ·F_u)_jk S_u·C_kj = Σ F_t[i,j] (W·C)_ij` in blocks.
fn refit(
    terms: &mut [[DMatrix<f64>; 2]],
    [first, second]: [usize; 2],
    covariance: &DMatrix<f64>,
    spread: &DMatrix<f64>,
) -> Option<()> {
    let (outer_rows, outer) = terms[0][first].shape();
    let (rows, columns) = terms[0][second].shape();
    let size = terms.len() * columns;
    let pairs: Vec<_> = (0..terms.len()).flat_map(|t| (0..terms.len()).map(move |u| (t, u))).collect();
    let grams: Vec<_> = pairs.iter().map(|&(t, u)| product(&terms[t][first].transpose(), &terms[u][first])).collect();
    let mut normal = DMatrix::zeros(size, size);
    for (k, column) in (0..outer).flat_map(|k| (0..columns).map(move |column| (k, column))) {
        let varied = covariance.column(k * columns + column);
        for (&(t, u), gram) in pairs.iter().zip(&grams) {
            let mut own = normal.column_mut(u * columns + column);
            let mut own = own.rows_mut(t * columns, columns);
            (0..outer).for_each(|j| own.axpy(gram[(j, k)], &varied.rows(j * columns, columns), 1.0));
        }
    }
    let mut wanted = DMatrix::zeros(rows, size);
    for (j, column) in (0..outer).flat_map(|j| (0..columns).map(move |column| (j, column))) {
        let made = spread.column(j * columns + column);
        for (t, term) in terms.iter().enumerate() {
            let mut own = wanted.column_mut(t * columns + column);
            (0..outer_rows).for_each(|i| own.axpy(term[first][(i, j)], &made.rows(i * rows, rows), 1.0));
        }
    }
    let (factor, _) = Cholesky::ridged(&normal, COLLINEAR)?;
    let solved = factor.solve_right(&wanted);
    for (t, term) in terms.iter_mut().enumerate() {
        term[second] = solved.columns(t * columns, columns).into_owned();
    }
    Some(())
}
