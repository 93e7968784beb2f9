//! Numbers that may not be known, told apart by what they are.

use xxhash_rust::xxh3::xxh3_64;

/// An extent, or an element of a small integer tensor: a number, or a number times a quotient of products of unknown ones.
///
/// An unknown number stands as the hash of what makes it, a product as the sum of its factors' hashes and a quotient as the
/// difference, so that equal terms are equal numbers: but for a chance of one in 2⁶⁴.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Term {
    factor: i64,
    unknown: u64,
    /// Whether no unknown factor is below zero: extents never are.
    not_negative: bool,
}

impl Term {
    /// One.
    pub const ONE: Self = Self::number(1);

    /// A number.
    #[must_use]
    pub const fn number(number: i64) -> Self {
        Self { factor: number, unknown: 0, not_negative: true }
    }

    /// An unknown number: two are the same if `what` they are is.
    pub(super) fn unknown(what: &[u8], is_extent: bool) -> Self {
        Self { factor: 1, unknown: xxh3_64(what).max(1), not_negative: is_extent }
    }

    /// What some operation that these `numbers` describe makes of `terms`, which are not all known.
    pub(super) fn derived(operation: &str, numbers: &[i64], terms: &[Self], is_extent: bool) -> Self {
        let mut what = operation.as_bytes().to_vec();
        let words = numbers.iter().copied().chain(terms.iter().flat_map(|term| [term.factor, term.unknown as i64]));
        what.extend(words.flat_map(i64::to_le_bytes));
        Self::unknown(&what, is_extent)
    }

    /// The number, if it is known.
    #[must_use]
    pub fn known(self) -> Option<i64> {
        (self.unknown == 0).then_some(self.factor)
    }

    /// The number, if it is known and can be an extent.
    #[must_use]
    pub fn extent(self) -> Option<usize> {
        usize::try_from(self.known()?).ok()
    }

    /// Whether it is no multiple.
    pub(super) fn is_plain(self) -> bool {
        self.factor == 1
    }

    /// Whether it is known not to be below zero.
    pub(super) fn is_extent(self) -> bool {
        self.not_negative && self.factor >= 0
    }

    pub(super) fn times(self, other: Self) -> Option<Self> {
        let factor = self.factor.checked_mul(other.factor)?;
        let unknown = if factor == 0 { 0 } else { self.unknown.wrapping_add(other.unknown) };
        Some(Self { factor, unknown, not_negative: self.not_negative && other.not_negative })
    }

    /// The quotient by a divisor that is not zero and leaves no remainder.
    pub(super) fn over(self, divisor: Self) -> Option<Self> {
        let exact = divisor.factor != 0 && self.factor % divisor.factor == 0;
        let factor = exact.then(|| self.factor / divisor.factor)?;
        let unknown = if factor == 0 { 0 } else { self.unknown.wrapping_sub(divisor.unknown) };
        Some(Self { factor, unknown, not_negative: self.not_negative && divisor.not_negative })
    }

    pub(super) fn plus(self, other: Self) -> Option<Self> {
        match (self.known(), other.known()) {
            (Some(a), Some(b)) => a.checked_add(b).map(Self::number),
            (Some(0), _) => Some(other),
            (_, Some(0)) => Some(self),
            _ if self.unknown == other.unknown => {
                let factor = self.factor.checked_add(other.factor)?;
                Some(Self { factor, unknown: if factor == 0 { 0 } else { self.unknown }, ..self })
            }
            _ => {
                let mut terms = [self, other];
                terms.sort_by_key(|term| (term.unknown, term.factor));
                Some(Self::derived("sum", &[], &terms, self.is_extent() && other.is_extent()))
            }
        }
    }

    pub(super) fn minus(self, other: Self) -> Option<Self> {
        self.plus(Self { factor: other.factor.checked_neg()?, ..other })
    }

    /// Whether both are the same number, where that is settled.
    pub(super) fn equals(self, other: Self) -> Option<bool> {
        match (self.known(), other.known()) {
            (Some(a), Some(b)) => Some(a == b),
            (Some(number), None) if number < 0 && other.is_extent() => Some(false),
            (None, Some(number)) if number < 0 && self.is_extent() => Some(false),
            _ if self == other => Some(true),
            _ => None,
        }
    }
}

impl From<usize> for Term {
    fn from(extent: usize) -> Self {
        i64::try_from(extent).map_or_else(|_| Self::derived("extent", &[extent as i64], &[], true), Self::number)
    }
}
