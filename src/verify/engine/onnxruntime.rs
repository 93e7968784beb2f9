//! Runs a model in ONNX Runtime, which is looked for when it is asked for and linked by nobody.

use std::{
    fmt,
    path::Path,
    sync::{Mutex, PoisonError},
};

use half::{bf16, f16};
use ort::{
    environment::Environment,
    logging::LogLevel,
    session::{Session, SessionInputValue, builder::GraphOptimizationLevel},
    value::{DynValue, Tensor, TensorElementType, ValueType},
};

use super::{Cannot, Given, Prepared, Run, Value, guarded};
use crate::ir::DType;

const NAME: &str = "onnxruntime";

/// The loaded library.
#[derive(Clone)]
pub(super) struct Library(Environment);

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Library")
    }
}

impl Library {
    /// Loads the library at `path`, or takes the one that the process has loaded already: there can be only one.
    pub(super) fn load(path: &Path) -> Result<Self, Cannot> {
        static LOADED: Mutex<Option<Library>> = Mutex::new(None);
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(library) = loaded.as_ref() {
            return Ok(library.clone());
        }
        let environment = || anyhow::Ok(ort::init_from(path)?.with_telemetry(false).build()?);
        let library = Self(guarded(NAME, environment)?);
        *loaded = Some(library.clone());
        Ok(library)
    }

    /// Loads what is `given` of a model, and runs it once: one thread, so that the answer is the same each time.
    pub(super) fn session(&self, prepared: &Prepared<'_>, sample: &[Value], given: Given) -> Result<Loaded, Cannot> {
        let bytes = if given == Given::Twin { prepared.model.encode_twin() } else { prepared.model.encode() };
        let level = match given {
            Given::Twin | Given::Written => GraphOptimizationLevel::Disable,
            Given::Optimized => GraphOptimizationLevel::All,
        };
        let session = guarded(NAME, || -> ort::Result<Session> {
            Session::builder(&self.0)?
                .with_optimization_level(level)?
                .with_intra_threads(1)?
                // Without it, products of 8-bit integers saturate on processors that lack VNNI.
                .with_precise_qmm()?
                .with_log_level(LogLevel::Fatal)?
                .commit_from_memory(&bytes)
        })?;
        let names = prepared.model.graph.fed_inputs().map(|input| input.info.name().to_owned()).collect();
        let outputs = prepared.model.graph.outputs().iter().map(|output| output.info.name().to_owned()).collect();
        let loaded = Loaded { session: Mutex::new(session), names, outputs, types: prepared.types.clone() };
        loaded.run(sample)?;
        Ok(loaded)
    }
}

/// A model that ONNX Runtime has loaded.
pub(super) struct Loaded {
    session: Mutex<Session>,
    names: Vec<String>,
    outputs: Vec<String>,
    types: Vec<DType>,
}

impl Run for Loaded {
    fn run(&self, sample: &[Value]) -> Result<Vec<Value>, Cannot> {
        guarded(NAME, || {
            let feeds = self.names.iter().zip(sample).zip(&self.types);
            let feeds = feeds.map(|((name, value), &dtype)| anyhow::Ok((name.as_str(), input(value, dtype)?)));
            let feeds = feeds.collect::<anyhow::Result<Vec<_>>>()?;
            let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
            let found = session.run(feeds)?;
            let get = |name: &String| found.get(name).ok_or_else(|| anyhow::anyhow!("output `{name}` is missing"));
            self.outputs.iter().map(|name| output(get(name)?)).collect::<anyhow::Result<_>>()
        })
    }
}

fn input(value: &Value, dtype: DType) -> anyhow::Result<SessionInputValue<'static>> {
    macro_rules! tensor {
        ($convert:expr) => {
            Tensor::from_array((value.dims.clone(), value.values.iter().copied().map($convert).collect::<Vec<_>>()))?
                .into()
        };
    }
    Ok(match dtype {
        DType::Float => tensor!(|v| v as f32),
        DType::Double => tensor!(|v| v),
        DType::Float16 => tensor!(f16::from_f64),
        DType::Int64 => tensor!(|v| v as i64),
        DType::Int32 => tensor!(|v| v as i32),
        DType::Int16 => tensor!(|v| v as i16),
        DType::Int8 => tensor!(|v| v as i8),
        DType::Uint8 => tensor!(|v| v as u8),
        DType::Uint16 => tensor!(|v| v as u16),
        DType::Uint32 => tensor!(|v| v as u32),
        DType::Uint64 => tensor!(|v| v as u64),
        DType::Bfloat16 => tensor!(bf16::from_f64),
        DType::Bool => tensor!(|v| v != 0.0),
        _ => anyhow::bail!("{dtype:?} can't be fed"),
    })
}

fn output(value: &DynValue) -> anyhow::Result<Value> {
    let ValueType::Tensor { ty, .. } = value.dtype() else { anyhow::bail!("an output is not a tensor") };
    macro_rules! read {
        ($t:ty, $dtype:expr, $convert:expr) => {{
            let (shape, values) = value.try_extract_tensor::<$t>()?;
            let dims = shape.iter().map(|&d| d as usize).collect();
            Value { dims, values: values.iter().copied().map($convert).collect(), dtype: $dtype }
        }};
    }
    Ok(match ty {
        TensorElementType::Float32 => read!(f32, DType::Float, f64::from),
        TensorElementType::Float64 => read!(f64, DType::Double, |v| v),
        TensorElementType::Float16 => read!(f16, DType::Float16, f16::to_f64),
        TensorElementType::Bfloat16 => read!(bf16, DType::Bfloat16, bf16::to_f64),
        TensorElementType::Int64 => read!(i64, DType::Int64, |v| v as f64),
        TensorElementType::Uint64 => read!(u64, DType::Uint64, |v| v as f64),
        TensorElementType::Int32 => read!(i32, DType::Int32, f64::from),
        TensorElementType::Uint32 => read!(u32, DType::Uint32, f64::from),
        TensorElementType::Int16 => read!(i16, DType::Int16, f64::from),
        TensorElementType::Uint16 => read!(u16, DType::Uint16, f64::from),
        TensorElementType::Int8 => read!(i8, DType::Int8, f64::from),
        TensorElementType::Uint8 => read!(u8, DType::Uint8, f64::from),
        TensorElementType::Bool => read!(bool, DType::Bool, |v| f64::from(u8::from(v))),
        other => anyhow::bail!("an output is of {other:?}, which can't be compared"),
    })
}
