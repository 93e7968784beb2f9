//! Forms in which a file keeps a weight other than element by element: integers of few bits, and what they stand for.

use half::f16;

use super::{
    Codes, Vectors,
    tensor::{DType, Tensor},
};

/// Codes q that stand for s·(q − z), with a scale s and perhaps a zero point z for each tile.
#[derive(Clone, Debug)]
pub struct Affine {
    codes: Codes,
    /// Whether the codes are two's complement.
    signed: bool,
    /// The scale of each tile: a tensor of the weight's element type and as many axes.
    scales: Tensor,
    /// The zero point of each tile, `INT32`, where there are any.
    zeros: Option<Tensor>,
    /// Whether a runtime that can is to multiply by the codes, and not to make floats of them once.
    multiplied: bool,
}

impl Affine {
    /// A form of these codes; `None` where scales or zero points are not one for each tile, or of another type than they may be.
    #[must_use]
    pub fn new(codes: Codes, signed: bool, scales: Tensor, zeros: Option<Tensor>) -> Option<Self> {
        let grid = codes.grid();
        let is_float = matches!(scales.dtype(), DType::Float | DType::Float16 | DType::Double);
        let are_zeros = zeros.as_ref().is_none_or(|zeros| zeros.dtype() == DType::Int32 && zeros.dims() == grid);
        let form = (is_float && scales.dims() == grid && are_zeros).then_some(Self {
            codes,
            signed,
            scales,
            zeros,
            multiplied: false,
        })?;
        Some(form.plain())
    }

    /// The same form of other codes, scales and zero points.
    fn with(&self, codes: Codes, scales: Tensor, zeros: Option<Tensor>) -> Option<Self> {
        Some(Self { multiplied: self.multiplied, ..Self::new(codes, self.signed, scales, zeros)? })
    }

    /// The same codes, by which a runtime that can is to multiply as they are.
    #[must_use]
    pub fn to_multiply_by(self) -> Self {
        Self { multiplied: true, ..self }
    }

    /// Whether a runtime that can is to multiply by the codes, and not to make floats of them once.
    #[must_use]
    pub fn is_multiplied_by(&self) -> bool {
        self.multiplied
    }

    /// The one of equal forms that is told from their files: no zero points that are zero, and of codes of less than a byte signed ones
    /// without, and unsigned ones with zero points.
    fn plain(self) -> Self {
        let Some(zeros) = self.zeros.as_ref().and_then(Tensor::i64s) else { return self };
        let half = 1_i64 << (self.codes.bits() - 1);
        let is_packed = self.codes.bits() < 8;
        let are_all = |wanted: i64| zeros.iter().all(|&zero| zero == wanted);
        if are_all(0) {
            return Self { zeros: None, ..self };
        }
        if !is_packed || !self.signed && !are_all(half) {
            return self;
        }
        let shift = if self.signed { half } else { -half };
        let bytes: Vec<u8> = self.codes.bytes().iter().map(|byte| byte.wrapping_add(shift as u8)).collect();
        let moved: Vec<_> = zeros.iter().map(|zero| zero + shift).collect();
        let zeros = if self.signed { Tensor::integers(DType::Int32, self.scales.dims(), &moved) } else { None };
        Self { codes: self.codes.with_bytes(bytes), signed: !self.signed, zeros, ..self }
    }

    /// The codes.
    #[must_use]
    pub fn codes(&self) -> &Codes {
        &self.codes
    }

    /// Whether the codes are two's complement.
    #[must_use]
    pub fn is_signed(&self) -> bool {
        self.signed
    }

    /// The scale of each tile.
    #[must_use]
    pub fn scales(&self) -> &Tensor {
        &self.scales
    }

    /// The zero point of each tile, if there are any.
    #[must_use]
    pub fn zeros(&self) -> Option<&Tensor> {
        self.zeros.as_ref()
    }

    /// The values.
    fn decode(&self) -> Option<Tensor> {
        let (scales, zeros) = (self.scales.f64s()?, self.zeros.as_ref().and_then(Tensor::i64s));
        let dtype = self.scales.dtype();
        let code = |byte: u8| if self.signed { i32::from(byte as i8) } else { i32::from(byte) };
        let shifted = |byte: u8, tile: usize| code(byte) - zeros.as_ref().map_or(0, |zeros| zeros[tile] as i32);
        let places = self.codes.bytes().iter().zip(self.codes.tiles());
        if dtype == DType::Float {
            let scales: Vec<f32> = scales.iter().map(|&scale| scale as f32).collect();
            let values: Vec<f32> = places.map(|(&byte, tile)| shifted(byte, tile) as f32 * scales[tile]).collect();
            return Some(Tensor::f32(self.codes.dims(), &values));
        }
        // Products of eight bits with the eleven of half precision are exact, and rounded once.
        let values: Vec<f64> = places.map(|(&byte, tile)| f64::from(shifted(byte, tile)) * scales[tile]).collect();
        Tensor::floats(dtype, self.codes.dims(), &values)
    }

    /// The same with tiles of `size` along `axis`, which divides those that there are or their last.
    pub(crate) fn cut(&self, axis: usize, size: usize) -> Option<Self> {
        let (codes, old) = (self.codes.clone().cut(axis, size), self.codes.tile()[axis]);
        let taken: Vec<_> = (0..codes.dims()[axis]).step_by(size.max(1)).map(|index| index / old).collect();
        let scales = self.scales.select(axis, &taken)?;
        let zeros = match &self.zeros {
            Some(zeros) => Some(zeros.select(axis, &taken)?),
            None => None,
        };
        self.with(codes, scales, zeros)
    }

    /// The same in codes of as many bits as those of `other`; in bytes that have a sign if those do, by which kernels of integers tell weights
    /// apart; and by which a runtime that can is to multiply if it is to by those.
    fn like(self, other: &Self) -> Self {
        let form = Self { multiplied: other.multiplied, ..self };
        let (bits, wanted) = (form.codes.bits(), other.codes.bits());
        if wanted != 8 || form.signed == other.signed {
            return Self { codes: form.codes.with_bits(wanted), ..form };
        }
        // The middle of bytes is zero for symmetric codes, which have a sign, and half of their own range for others.
        let shift = if form.signed { 1_i64 << (wanted - 1) } else { -(1_i64 << (bits - 1)) };
        let bytes = form.codes.bytes().iter().map(|byte| byte.wrapping_add(shift as u8)).collect();
        let before = form.zeros.as_ref().and_then(Tensor::i64s).unwrap_or_else(|| vec![0; form.scales.len()]);
        let zeros: Vec<_> = before.iter().map(|zero| zero + shift).collect();
        let zeros = Tensor::integers(DType::Int32, form.scales.dims(), &zeros);
        let codes = form.codes.with_bytes(bytes).with_bits(wanted);
        Self { codes, signed: other.signed, zeros, ..form }.plain()
    }

    /// The same codes with each slice along `axis` multiplied by a factor, unless each element then had a scale.
    fn scaled(&self, axis: usize, factors: &[f64]) -> Option<Self> {
        let Self { codes, scales, zeros, .. } = self.cut(axis, 1)?;
        (scales.len() < codes.bytes().len()).then_some(())?;
        let inner: usize = scales.dims()[axis + 1..].iter().product();
        let own = |i: usize| factors[i / inner.max(1) % factors.len()];
        let values: Vec<_> = scales.f64s()?.iter().enumerate().map(|(i, scale)| scale * own(i)).collect();
        self.with(codes, Tensor::floats(scales.dtype(), scales.dims(), &values)?, zeros)
    }
}

/// Codes that stand for the entries of a table, one for each tile.
#[derive(Clone, Debug)]
pub struct Codebook {
    codes: Codes,
    /// The entries: a tensor of the weight's element type, whose last axis is that of one table.
    tables: Tensor,
}

impl Codebook {
    /// A form of these codes; `None` where the tables are not one for each tile, or a code is beyond them.
    #[must_use]
    pub fn new(codes: Codes, tables: Tensor) -> Option<Self> {
        let (entries, grid) = tables.dims().split_last()?;
        let fits = grid == codes.grid() && codes.bytes().iter().all(|&code| usize::from(code) < *entries);
        let is_float = super::tensor::is_float(tables.dtype());
        (fits && is_float).then_some(Self { codes, tables })
    }

    /// The codes.
    #[must_use]
    pub fn codes(&self) -> &Codes {
        &self.codes
    }

    /// The tables.
    #[must_use]
    pub fn tables(&self) -> &Tensor {
        &self.tables
    }

    /// How many entries a table has.
    #[must_use]
    pub fn entries(&self) -> usize {
        self.tables.dims().last().copied().unwrap_or(0)
    }

    /// The values.
    fn decode(&self) -> Option<Tensor> {
        let (table, entries, size) = (self.tables.bytes(), self.entries(), self.tables.element_size()?);
        let mut bytes = Vec::with_capacity(self.codes.bytes().len() * size);
        for (&code, tile) in self.codes.bytes().iter().zip(self.codes.tiles()) {
            bytes.extend_from_slice(&table[(tile * entries + usize::from(code)) * size..][..size]);
        }
        Some(Tensor::made(self.tables.dtype(), self.codes.dims(), bytes.into()))
    }
}

/// How the file keeps a weight.
#[derive(Clone, Debug, Default)]
pub enum Storage {
    /// Each element in the tensor's own type.
    #[default]
    Dense,
    /// Each element in half precision, which holds it.
    Half,
    /// Integers and scales.
    Affine(Affine),
    /// Integers and tables.
    Codebook(Codebook),
    /// Integers and a table of vectors.
    Vectors(Vectors),
}

impl Storage {
    /// What it stands for, where it does not take the values from elsewhere.
    pub(super) fn decode(&self) -> Option<Tensor> {
        match self {
            Self::Dense | Self::Half => None,
            Self::Affine(affine) => affine.decode(),
            Self::Codebook(codebook) => codebook.decode(),
            Self::Vectors(vectors) => vectors.decode(),
        }
    }

    /// The codes of elements, if there are any.
    #[must_use]
    pub fn codes(&self) -> Option<&Codes> {
        match self {
            Self::Dense | Self::Half | Self::Vectors(_) => None,
            Self::Affine(affine) => Some(&affine.codes),
            Self::Codebook(codebook) => Some(&codebook.codes),
        }
    }

    /// The same as it is kept in `other`, where both are integers and scales.
    pub(crate) fn like(self, other: &Self) -> Self {
        match (self, other) {
            (Self::Affine(affine), Self::Affine(other)) => Self::Affine(affine.like(other)),
            (own, _) => own,
        }
    }

    /// Whether scales and tables are for more than one element each: else the elements themselves take no more.
    pub(super) fn is_shared(&self) -> bool {
        self.codes().is_none_or(|codes| codes.bytes().len() < 2 || codes.tile().iter().any(|&tile| tile > 1))
    }

    /// Bytes of codes, scales and tables for `value`, as written.
    pub(super) fn bytes(&self, value: &Tensor) -> usize {
        let packed = |codes: &Codes| (codes.bytes().len() * codes.bits() as usize).div_ceil(8);
        match self {
            Self::Dense => value.stored_len(),
            Self::Half => value.len() * size_of::<f16>(),
            Self::Affine(Affine { codes, scales, zeros, .. }) => {
                packed(codes) + scales.byte_len() + zeros.as_ref().map_or(0, Tensor::len)
            }
            Self::Codebook(codebook) => packed(&codebook.codes) + codebook.tables.byte_len(),
            Self::Vectors(vectors) => packed(vectors.codes()) + vectors.table().byte_len(),
        }
    }

    /// That of the slices `indices` along `axis`.
    pub(super) fn select(&self, axis: usize, indices: &[usize]) -> Option<Self> {
        Some(match self {
            Self::Dense | Self::Half => self.clone(),
            Self::Vectors(vectors) => Self::Vectors(vectors.select(axis, indices)?),
            Self::Affine(affine) => {
                let (codes, taken) = affine.codes.select(axis, indices)?;
                let zeros = match &affine.zeros {
                    Some(zeros) => Some(zeros.select(axis, &taken)?),
                    None => None,
                };
                Self::Affine(affine.with(codes, affine.scales.select(axis, &taken)?, zeros)?)
            }
            Self::Codebook(codebook) => {
                let (codes, taken) = codebook.codes.select(axis, indices)?;
                Self::Codebook(Codebook::new(codes, codebook.tables.select(axis, &taken)?)?)
            }
        })
    }

    /// That of the axes in the order of `perm`.
    pub(super) fn permute(&self, perm: &[usize]) -> Option<Self> {
        Some(match self {
            Self::Dense | Self::Half => self.clone(),
            Self::Vectors(vectors) => Self::Vectors(vectors.permute(perm)?),
            Self::Affine(affine) => {
                let zeros = match &affine.zeros {
                    Some(zeros) => Some(zeros.permute(perm)?),
                    None => None,
                };
                let codes = affine.codes.permute(perm)?;
                Self::Affine(affine.with(codes, affine.scales.permute(perm)?, zeros)?)
            }
            Self::Codebook(codebook) => {
                let entries: Vec<_> = perm.iter().copied().chain([perm.len()]).collect();
                Self::Codebook(Codebook::new(codebook.codes.permute(perm)?, codebook.tables.permute(&entries)?)?)
            }
        })
    }

    /// That of another shape; `None` where its tiles can't be the same.
    pub(super) fn reshape(&self, dims: &[usize]) -> Option<Self> {
        Some(match self {
            Self::Dense | Self::Half => self.clone(),
            Self::Vectors(vectors) => Self::Vectors(vectors.reshape(dims)?),
            Self::Affine(affine) => {
                let codes = affine.codes.reshape(dims)?;
                let grid = codes.grid();
                let zeros = match &affine.zeros {
                    Some(zeros) => Some(zeros.reshape(&grid)?),
                    None => None,
                };
                Self::Affine(affine.with(codes, affine.scales.reshape(&grid)?, zeros)?)
            }
            Self::Codebook(codebook) => {
                let codes = codebook.codes.reshape(dims)?;
                let shape: Vec<_> = codes.grid().into_iter().chain([codebook.entries()]).collect();
                Self::Codebook(Codebook::new(codes, codebook.tables.reshape(&shape)?)?)
            }
        })
    }

    /// The same codes for `values` in place of `old`, where those are slices of these along one axis, each multiplied by a factor.
    pub(super) fn scaled(&self, old: &[f64], values: &[f64]) -> Option<Self> {
        /// What is left over is rounding of single precision.
        const ROUNDING: f64 = 1e-6;
        let Self::Affine(affine) = self else { return None };
        let dims = affine.codes.dims();
        let along = |axis: usize| {
            let (count, inner): (_, usize) = (dims[axis], dims[axis + 1..].iter().product());
            let mut largest = vec![(0.0_f64, 1.0); count];
            let slice = |i: usize| i / inner.max(1) % count;
            for (i, (&old, &value)) in old.iter().zip(values).enumerate() {
                let (size, factor) = &mut largest[slice(i)];
                if old.abs() > *size {
                    (*size, *factor) = (old.abs(), value / old);
                }
            }
            let mut places = old.iter().zip(values).enumerate();
            let holds = places.all(|(i, (&old, &value))| {
                let (size, factor) = largest[slice(i)];
                (value - old * factor).abs() <= ROUNDING * size * factor.abs()
            });
            holds.then(|| affine.scaled(axis, &largest.iter().map(|(_, factor)| *factor).collect::<Vec<_>>()))?
        };
        (0..dims.len()).find_map(along).map(Self::Affine)
    }
}
