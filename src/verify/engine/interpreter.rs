//! Runs a model operator by operator in the evaluator of constants: what an engine does not run may be shape arithmetic that it knows.

use std::collections::BTreeMap;

use super::{Cannot, Prepared, Run, Value};
use crate::{
    eval,
    ir::{DType, Graph, Kind, Outlet, Tensor, tensor::is_float},
};

const NAME: &str = "the evaluator";

/// A model whose every operator the evaluator knows.
pub(super) struct Interpreter {
    graph: Graph,
    types: Vec<DType>,
}

impl Interpreter {
    /// Prepares a model, and runs it on `sample`.
    pub(super) fn new(prepared: &Prepared<'_>, sample: &[Value]) -> Result<Self, Cannot> {
        let interpreter = Self { graph: prepared.model.graph.clone(), types: prepared.types.clone() };
        interpreter.run(sample)?;
        Ok(interpreter)
    }

    fn values(&self, sample: &[Value]) -> Result<BTreeMap<Outlet, Tensor>, Cannot> {
        let graph = &self.graph;
        let mut values = BTreeMap::new();
        for ((input, value), &dtype) in graph.fed_inputs().zip(sample).zip(&self.types) {
            let fed = tensor(value, dtype).ok_or_else(|| Cannot::InputType(input.info.name().to_owned()))?;
            values.insert(input.node.out(), fed);
        }
        for id in graph.order() {
            match graph.kind(id) {
                Kind::Const(constant) => _ = values.insert(id.out(), constant.weight.value().clone()),
                Kind::Op(op) => {
                    let operands = graph.operands(id);
                    let inputs: Vec<_> = operands.iter().map(|operand| operand.and_then(|v| values.get(&v))).collect();
                    let is_fed =
                        operands.iter().zip(&inputs).all(|(operand, input)| operand.is_some() == input.is_some());
                    let made = eval::evaluate(op, graph.opset(), &inputs).filter(|_| is_fed && op.bodies.is_empty());
                    let why = || format!("it does not know `{}` ({})", graph.label(id), op.op_type());
                    let made = made.ok_or_else(|| Cannot::Engine { engine: NAME, why: why() })?;
                    values.extend((0..).map(|slot| id.at(slot)).zip(made));
                }
                Kind::Input | Kind::Capture(_) | Kind::Sparse(_) => {}
            }
        }
        Ok(values)
    }
}

impl Run for Interpreter {
    fn run(&self, sample: &[Value]) -> Result<Vec<Value>, Cannot> {
        let values = self.values(sample)?;
        let output = |output: &crate::ir::Output| {
            let why = || format!("it does not know output `{}`", output.info.name());
            values.get(&output.value).and_then(value).ok_or_else(|| Cannot::Engine { engine: NAME, why: why() })
        };
        self.graph.outputs().iter().map(output).collect()
    }
}

fn tensor(value: &Value, dtype: DType) -> Option<Tensor> {
    if is_float(dtype) {
        return Tensor::floats(dtype, &value.dims, &value.values);
    }
    let integers: Vec<i64> = value.values.iter().map(|&v| v as i64).collect();
    Tensor::integers(dtype, &value.dims, &integers)
}

fn value(tensor: &Tensor) -> Option<Value> {
    let is_float = is_float(tensor.dtype());
    let values = if is_float { tensor.f64s()? } else { tensor.i64s()?.into_iter().map(|v| v as f64).collect() };
    Some(Value { dims: tensor.dims().to_vec(), values, dtype: tensor.dtype() })
}
