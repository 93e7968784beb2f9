//! Runs a model in tract: the one place that knows its interface, what it can't do, and what it gets wrong.

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use prost::Message;
use tract_onnx::{prelude::*, tract_core::internal::TractError};

use crate::{
    codec::Model,
    ir::{DType, Graph, Op},
};

/// A tensor that a model is fed or makes; the values of every type fit `f64` but for integers beyond 2⁵³.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// The shape.
    pub dims: Vec<usize>,
    /// The elements.
    pub values: Vec<f64>,
    /// Whether the elements are floating-point numbers, which are compared by distance and not by equality.
    pub is_float: bool,
}

/// Why a model could not be run.
#[derive(Debug, thiserror::Error)]
pub enum Cannot {
    /// The engine computes an operator wrongly, so that its word is worth nothing.
    #[error("node `{node}` ({op}): {why}")]
    Unsound {
        /// The node.
        node: String,
        /// Its operator.
        op: String,
        /// What is wrong.
        why: &'static str,
    },
    /// The engine refuses the model.
    #[error("tract can't run it: {0}")]
    Engine(String),
    /// A region that changed can't be run.
    #[error("what computes `{value}` changed, and {why}")]
    Region {
        /// The value that the region makes.
        value: String,
        /// Why it can't be run.
        why: String,
    },
    /// The element type of an input is none that can be fed.
    #[error("input `{0}` is of a type that can't be fed")]
    InputType(String),
    /// There is nothing to feed.
    #[error("there are no samples")]
    NoSamples,
}

/// A model ready to be run on inputs of one set of shapes.
pub struct Runner {
    plan: Arc<TypedRunnableModel>,
    types: Vec<DType>,
}

impl Runner {
    /// Prepares `model` for inputs shaped like `sample`, one value for each input that must be fed.
    ///
    /// # Errors
    ///
    /// When the engine can't run the model, or is known to run it wrongly.
    pub fn new(model: &Model, sample: &[Value]) -> Result<Self, Cannot> {
        preflight(&model.graph)?;
        let types: Vec<_> = model
            .graph
            .fed_inputs()
            .map(|input| {
                let fact = crate::analysis::shapes::Fact::declared(&input.info);
                fact.dtype
                    .filter(|&t| datum(t).is_some())
                    .ok_or_else(|| Cannot::InputType(input.info.name().to_owned()))
            })
            .collect::<Result<_, _>>()?;
        // Listed constants would be taken for inputs that nobody feeds.
        let mut plain = model.clone();
        plain.graph.unlist_default_values();
        plain.graph.inline_external();
        let bytes = plain.encode();
        let shapes: Vec<_> = sample.iter().map(|value| value.dims.clone()).collect();
        let attempt = |optimize: bool| {
            guarded(|| {
                let plan = load(&bytes, &types, &shapes, optimize)?;
                let runner = Self { plan, types: types.clone() };
                runner.evaluate(sample)?;
                Ok(runner)
            })
        };
        attempt(true).or_else(|_| attempt(false))
    }

    /// The outputs for one sample.
    ///
    /// # Errors
    ///
    /// When the engine fails on it.
    pub fn run(&self, sample: &[Value]) -> Result<Vec<Value>, Cannot> {
        guarded(|| self.evaluate(sample))
    }

    fn evaluate(&self, sample: &[Value]) -> TractResult<Vec<Value>> {
        let inputs = sample.iter().zip(&self.types).map(|(value, &dtype)| Ok(tensor(value, dtype)?.into_tvalue()));
        let outputs = self.plan.run(inputs.collect::<TractResult<_>>()?)?;
        outputs.iter().map(|output| from_tensor(output)).collect()
    }
}

thread_local! {
    static GUARDING: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is running the engine, whose panics are caught and told as errors: a panic hook need not print.
#[must_use]
pub fn catches_panics() -> bool {
    GUARDING.get()
}

/// Runs `f`, turning errors and panics of the engine into a [`Cannot`].
fn guarded<T>(f: impl FnOnce() -> TractResult<T>) -> Result<T, Cannot> {
    GUARDING.set(true);
    let result = catch_unwind(AssertUnwindSafe(f));
    GUARDING.set(false);
    match result {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Cannot::Engine(format!("{error:#}"))),
        Err(_) => Err(Cannot::Engine("it panicked".to_owned())),
    }
}

fn load(bytes: &[u8], types: &[DType], shapes: &[Vec<usize>], optimize: bool) -> TractResult<Arc<TypedRunnableModel>> {
    // Declared shapes of values may be symbolic, and then contradict the pinned shapes of the inputs.
    let framework = onnx().with_ignore_value_info(true);
    let proto = tract_onnx::pb::ModelProto::decode(bytes)?;
    let parsed = framework.parse(&proto, None)?;
    drop(proto);
    if !parsed.unresolved_inputs.is_empty() {
        return Err(TractError::msg(format!("unresolved inputs {:?}", parsed.unresolved_inputs)));
    }
    let mut model = parsed.model;
    for (i, (&dtype, shape)) in types.iter().zip(shapes).enumerate() {
        let datum = datum(dtype).ok_or_else(|| TractError::msg(format!("unsupported type {dtype:?}")))?;
        model.set_input_fact(i, InferenceFact::dt_shape(datum, shape))?;
    }
    let model = model.into_typed()?;
    let model = if optimize { model.into_optimized()? } else { model };
    model.into_runnable()
}

fn datum(dtype: DType) -> Option<DatumType> {
    Some(match dtype {
        DType::Float => f32::datum_type(),
        DType::Double => f64::datum_type(),
        DType::Float16 => f16::datum_type(),
        DType::Int64 => i64::datum_type(),
        DType::Int32 => i32::datum_type(),
        DType::Int16 => i16::datum_type(),
        DType::Int8 => i8::datum_type(),
        DType::Uint8 => u8::datum_type(),
        DType::Uint16 => u16::datum_type(),
        DType::Bool => bool::datum_type(),
        _ => return None,
    })
}

fn tensor(value: &Value, dtype: DType) -> TractResult<Tensor> {
    if dtype == DType::Bool {
        let values: Vec<bool> = value.values.iter().map(|&v| v != 0.0).collect();
        return Tensor::from_shape(&value.dims, &values);
    }
    let datum = datum(dtype).ok_or_else(|| TractError::msg(format!("unsupported type {dtype:?}")))?;
    if datum.is_integer() {
        let values: Vec<i64> = value.values.iter().map(|&v| v as i64).collect();
        return Ok(Tensor::from_shape(&value.dims, &values)?.cast_to_dt(datum)?.into_owned());
    }
    Ok(Tensor::from_shape(&value.dims, &value.values)?.cast_to_dt(datum)?.into_owned())
}

fn from_tensor(tensor: &Tensor) -> TractResult<Value> {
    let is_float = tensor.datum_type().is_float();
    let cast = tensor.cast_to::<f64>()?;
    let values = cast.to_plain_array_view::<f64>()?.iter().copied().collect();
    Ok(Value { dims: tensor.shape().to_vec(), values, is_float })
}

/// Refuses what tract 0.23 is known to compute wrongly without saying so.
fn preflight(graph: &Graph) -> Result<(), Cannot> {
    for id in graph.node_ids() {
        let Some(op) = graph.op(id) else { continue };
        if let Some(why) = unsound(op) {
            return Err(Cannot::Unsound { node: graph.label(id).to_owned(), op: op.op_type().to_owned(), why });
        }
        for body in &op.bodies {
            preflight(&body.graph)?;
        }
    }
    Ok(())
}

fn unsound(op: &Op) -> Option<&'static str> {
    let Some(kind) = op.standard() else {
        return Some("tract ignores the domain of an operator and would run the standard one of that name");
    };
    match kind {
        "LSTM" | "GRU" | "RNN" if op.string("direction") == Some("reverse") => {
            Some("tract ignores the reverse direction")
        }
        "QuantizeLinear" if op.int("output_dtype").is_some() => Some("tract ignores output_dtype"),
        "ConvTranspose" if op.ints("output_shape").is_some() => Some("tract crops the wrong end for output_shape"),
        "Celu" | "Swish" if op.float("alpha").is_some() => Some("tract ignores alpha"),
        "DepthToSpace" | "SpaceToDepth" if op.string("mode") == Some("CRD") => Some("tract ignores the mode"),
        "Attention" => Some("tract computes some masks wrongly"),
        _ => None,
    }
}
