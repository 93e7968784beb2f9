//! What passes need to know about a graph.

pub mod channels;
pub mod cost;
pub mod linear;
pub mod moments;
pub mod numbering;
pub mod shapes;
pub mod validity;

/// Operators of several operands, broadcast to one shape, that compute each element of the result from the elements of the
/// same place.
const BROADCASTING: &[&str] = &[
    "Add",
    "And",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
    "Div",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Max",
    "Mean",
    "Min",
    "Mod",
    "Mul",
    "Or",
    "PRelu",
    "Pow",
    "Sub",
    "Sum",
    "Where",
    "Xor",
];

/// Whether an operator computes each element of its result from the elements of the same place of its operands, which are
/// broadcast.
#[must_use]
pub fn is_broadcasting(op_type: &str) -> bool {
    BROADCASTING.contains(&op_type)
}

/// Whether an operator computes each element of its result from the same element of its first operand.
#[must_use]
pub fn is_elementwise(op_type: &str) -> bool {
    ELEMENTWISE.contains(&op_type)
}

/// Whether no element of an operator's result is below zero.
#[must_use]
pub fn never_negative(op_type: &str) -> bool {
    matches!(op_type, "Relu" | "Abs" | "Sigmoid" | "HardSigmoid" | "Softmax" | "Exp" | "Softplus")
}

/// Operators of one operand that compute each element of the result from the same element of it.
pub(crate) const ELEMENTWISE: &[&str] = &[
    "Abs",
    "Acos",
    "Acosh",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "Ceil",
    "Celu",
    "Clip",
    "Cos",
    "Cosh",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "LeakyRelu",
    "Log",
    "Mish",
    "Neg",
    "Not",
    "Reciprocal",
    "Relu",
    "Round",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
];
