//! Constants: a value, which passes see, and a storage form, which is how the file keeps it.

use std::sync::Arc;

use super::{DType, Graph, Storage, Tensor};
use crate::{
    coding,
    proto::{AttributeProto, NodeProto, attribute_proto::AttributeType},
};

/// A constant node's content.
#[derive(Clone, Debug)]
pub struct Const {
    /// Value and storage form.
    pub weight: Weight,
    /// How the file spells it.
    pub(crate) origin: Origin,
    /// Whether it is listed as a graph input, so that a caller may feed something else.
    pub(crate) overridable: bool,
}

/// Where a constant stands in the file.
#[derive(Clone, Debug, Default)]
pub(crate) enum Origin {
    /// Among the initializers of its graph.
    #[default]
    Initializer,
    /// A `Constant` node; `payload` is the attribute that holds the value, its tensor taken out.
    Node { proto: Box<NodeProto>, payload: Box<AttributeProto> },
}

impl Origin {
    /// Has a `Constant` node that spells its value as numbers spell it as a tensor.
    pub(crate) fn hold_tensor(&mut self) {
        if let Self::Node { payload, .. } = self {
            **payload = AttributeProto {
                name: Some("value".to_owned()),
                r#type: Some(AttributeType::Tensor as i32),
                ..AttributeProto::default()
            };
        }
    }
}

/// A tensor and the form it is stored in. Passes read values and never spellings; whoever computes new values
/// calls [`Weight::fit`], which answers in the same form.
///
/// A weight whose form is not [`Storage::Dense`] owns its codes: the value is what they stand for, and slices, other shapes and other
/// orders of axes act on them.
#[derive(Clone, Debug)]
pub struct Weight {
    value: Tensor,
    storage: Arc<Storage>,
    /// What the file has for it.
    spelling: Option<Spelling>,
}

/// What a file has for a weight.
#[derive(Clone, Debug)]
pub(crate) struct Spelling {
    /// The nodes, as a graph without inputs.
    pub(crate) nodes: Arc<Graph>,
    /// Whether rectifiers of products with it are written as the larger of these and zero.
    pub(crate) is_apart: bool,
}

impl Weight {
    /// A weight stored element by element.
    #[must_use]
    pub fn dense(value: Tensor) -> Self {
        Self { value, storage: Arc::default(), spelling: None }
    }

    /// A weight stored in half precision; `None` where that does not hold each element.
    #[must_use]
    pub fn half(value: Tensor) -> Option<Self> {
        let is_wider = matches!(value.dtype(), DType::Float | DType::Double);
        let halves = Tensor::floats(DType::Float16, value.dims(), &value.f64s().filter(|_| is_wider)?)?;
        let back = Tensor::floats(value.dtype(), value.dims(), &halves.f64s()?)?;
        back.same(&value).then_some(Self { value, storage: Arc::new(Storage::Half), spelling: None })
    }

    /// A weight of what `storage`, which is made of codes, stands for.
    #[must_use]
    pub fn stored(storage: Storage) -> Option<Self> {
        Some(Self { value: storage.decode()?, storage: Arc::new(storage), spelling: None })
    }

    /// The same as the file spells it.
    pub(crate) fn spelled(self, nodes: Graph) -> Self {
        Self { spelling: Some(Spelling { nodes: Arc::new(nodes), is_apart: false }), ..self }
    }

    /// The same with rectifiers of products with it written otherwise.
    pub(crate) fn apart(self) -> Self {
        Self { spelling: self.spelling.map(|spelling| Spelling { is_apart: true, ..spelling }), ..self }
    }

    /// What the file has for it, where nothing has been done to it since.
    pub(crate) fn spelling(&self) -> Option<&Spelling> {
        self.spelling.as_ref()
    }

    /// The value.
    #[must_use]
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// The form.
    #[must_use]
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Whether the file keeps it in another form than its own type.
    #[must_use]
    pub fn is_stored(&self) -> bool {
        !matches!(*self.storage, Storage::Dense)
    }

    /// Bytes of the elements, or of the codes and what they stand for, as written.
    #[must_use]
    pub fn stored_bytes(&self) -> usize {
        self.storage.bytes(&self.value)
    }

    /// A weight of shape `dims` that holds `values` as well as this one's storage form and element type can;
    /// `None` where the element type is not a floating-point one.
    #[must_use]
    pub fn fit(&self, dims: &[usize], values: &[f64]) -> Option<Self> {
        let value = Tensor::floats(self.value.dtype(), dims, values)?;
        if self.storage.codes().is_some_and(|codes| codes.dims() == dims) {
            if value.same(&self.value) {
                return Some(self.clone());
            }
            if let Some(storage) = self.storage.scaled(&self.value.f64s()?, values) {
                return Self::stored(storage);
            }
        }
        coding::like(&self.storage, &value)
    }

    /// A weight of shape `dims` and of this one's element type that holds `values` element by element: a bias of the layer whose
    /// weight this is.
    #[must_use]
    pub fn plain(&self, dims: &[usize], values: &[f64]) -> Option<Self> {
        Tensor::floats(self.value.dtype(), dims, values).map(Self::dense)
    }

    /// The slices `indices` along `axis`; exact in every storage form.
    #[must_use]
    pub fn select(&self, axis: usize, indices: &[usize]) -> Option<Self> {
        Some(Self {
            value: self.value.select(axis, indices)?,
            storage: Arc::new(self.storage.select(axis, indices).filter(Storage::is_shared).unwrap_or_default()),
            spelling: None,
        })
    }

    /// The same elements in another shape; exact in every storage form.
    #[must_use]
    pub fn reshape(&self, dims: &[usize]) -> Option<Self> {
        Some(Self {
            value: self.value.reshape(dims)?,
            storage: Arc::new(self.storage.reshape(dims).unwrap_or_default()),
            spelling: None,
        })
    }

    /// Axis `k` of the result is axis `perm[k]` of this; exact in every storage form.
    #[must_use]
    pub fn permute(&self, perm: &[usize]) -> Option<Self> {
        Some(Self {
            value: self.value.permute(perm)?,
            storage: Arc::new(self.storage.permute(perm).unwrap_or_default()),
            spelling: None,
        })
    }
}
