//! Runs a model in tract: the one place that knows its interface, what it can't do, and what it gets wrong.

use std::sync::Arc;

use prost::Message;
use tract_onnx::{prelude::*, tract_core::internal::TractError};

use super::{Cannot, Prepared, Run, Value, guarded, legalize::legalize};
use crate::ir::{DType, Graph, Op};

/// A model that tract has planned.
pub(super) struct Plan {
    plan: Arc<TypedRunnableModel>,
    types: Vec<DType>,
}

impl Plan {
    /// Prepares a model for inputs shaped like `sample`: optimized, or as it is where the optimizer fails.
    pub(super) fn new(prepared: &Prepared<'_>, sample: &[Value]) -> Result<Self, Cannot> {
        preflight(&prepared.model.graph)?;
        let mut model = prepared.model.clone();
        legalize(&mut model.graph);
        let bytes = model.encode_twin();
        let wide = |&dtype: &DType| if dtype == DType::Bfloat16 { DType::Float } else { dtype };
        let types: Vec<_> = prepared.types.iter().map(wide).collect();
        let shapes: Vec<_> = sample.iter().map(|value| value.dims.clone()).collect();
        let attempt = |optimize: bool| {
            guarded("tract", || {
                let plan = load(&bytes, &types, &shapes, optimize)?;
                let plan = Self { plan, types: types.clone() };
                plan.evaluate(sample)?;
                TractResult::Ok(plan)
            })
        };
        // The optimizer may never end on a Scan.
        if prepared.model.graph.node_ids().any(|id| prepared.model.graph.op_of(id, "Scan").is_some()) {
            return attempt(false);
        }
        attempt(true).or_else(|_| attempt(false))
    }

    fn evaluate(&self, sample: &[Value]) -> TractResult<Vec<Value>> {
        let inputs = sample.iter().zip(&self.types).map(|(value, &dtype)| Ok(tensor(value, dtype)?.into_tvalue()));
        let outputs = self.plan.run(inputs.collect::<TractResult<_>>()?)?;
        outputs.iter().map(|output| from_tensor(output)).collect()
    }
}

impl Run for Plan {
    fn run(&self, sample: &[Value]) -> Result<Vec<Value>, Cannot> {
        guarded("tract", || self.evaluate(sample))
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
        DType::Uint32 => u32::datum_type(),
        DType::Uint64 => u64::datum_type(),
        DType::Bool => bool::datum_type(),
        _ => return None,
    })
}

/// The type of a tensor that tract makes; symbols of dimensions count as integers.
fn dtype(datum: DatumType) -> DType {
    const KNOWN: &[DType] = &[
        DType::Float,
        DType::Double,
        DType::Float16,
        DType::Int32,
        DType::Int16,
        DType::Int8,
        DType::Uint8,
        DType::Uint16,
        DType::Uint32,
        DType::Uint64,
        DType::Bool,
    ];
    KNOWN.iter().copied().find(|&dtype| self::datum(dtype) == Some(datum)).unwrap_or(DType::Int64)
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
    let dtype = dtype(tensor.datum_type());
    let cast = tensor.cast_to::<f64>()?;
    let values = cast.to_plain_array_view::<f64>()?.iter().copied().collect();
    Ok(Value { dims: tensor.shape().to_vec(), values, dtype })
}

/// Refuses what tract 0.23 is known to compute wrongly without saying so.
fn preflight(graph: &Graph) -> Result<(), Cannot> {
    for id in graph.node_ids() {
        let Some(op) = graph.op(id) else { continue };
        let shifts = op.is("BitShift") && graph.operand(id, 1).is_none_or(|by| graph.constant(by).is_none());
        if let Some(why) = unsound(op).or(shifts.then_some("tract computes some shifts by amounts that vary wrongly")) {
            let op = if op.domain().is_empty() {
                op.op_type().to_owned()
            } else {
                format!("{}.{}", op.domain(), op.op_type())
            };
            return Err(Cannot::Unsound { node: graph.label(id).to_owned(), op, why });
        }
        for body in &op.bodies {
            preflight(&body.graph)?;
        }
    }
    Ok(())
}

fn unsound(op: &Op) -> Option<&'static str> {
    let Some(kind) = op.standard() else {
        return Some("tract knows no operators of this domain");
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
