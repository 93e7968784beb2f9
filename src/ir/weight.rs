//! Constants: a value, which passes see, and a storage form, which is how the file keeps it.

use crate::{
    ir::Tensor,
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

/// How the file keeps a weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Storage {
    /// Each element in the tensor's own type.
    #[default]
    Dense,
}

/// A tensor and the form it is stored in. Passes read values and never spellings; whoever computes new values
/// calls [`Weight::fit`], which answers in the same form.
#[derive(Clone, Debug)]
pub struct Weight {
    value: Tensor,
    storage: Storage,
}

impl Weight {
    /// A weight stored element by element.
    #[must_use]
    pub fn dense(value: Tensor) -> Self {
        Self { value, storage: Storage::Dense }
    }

    /// The value.
    #[must_use]
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Bytes of the elements as written.
    #[must_use]
    pub fn stored_bytes(&self) -> usize {
        match self.storage {
            Storage::Dense => self.value.byte_len(),
        }
    }

    /// A weight of shape `dims` that holds `values` as well as this one's storage form and element type can;
    /// `None` where the element type is not a floating-point one.
    #[must_use]
    pub fn fit(&self, dims: &[usize], values: &[f64]) -> Option<Self> {
        match self.storage {
            Storage::Dense => Tensor::floats(self.value.dtype(), dims, values).map(Self::dense),
        }
    }

    /// The slices `indices` along `axis`; exact in every storage form.
    #[must_use]
    pub fn select(&self, axis: usize, indices: &[usize]) -> Option<Self> {
        match self.storage {
            Storage::Dense => self.value.select(axis, indices).map(Self::dense),
        }
    }

    /// The same elements in another shape; exact in every storage form.
    #[must_use]
    pub fn reshape(&self, dims: &[usize]) -> Option<Self> {
        match self.storage {
            Storage::Dense => self.value.reshape(dims).map(Self::dense),
        }
    }

    /// Axis `k` of the result is axis `perm[k]` of this; exact in every storage form.
    #[must_use]
    pub fn permute(&self, perm: &[usize]) -> Option<Self> {
        match self.storage {
            Storage::Dense => self.value.permute(perm).map(Self::dense),
        }
    }
}
