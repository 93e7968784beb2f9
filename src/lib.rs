//! Makes trained ONNX models smaller and faster without their training code, and proves on real inputs that they still
//! compute the same thing.

pub mod analysis;
pub mod cli;
pub mod codec;
pub mod coding;
pub mod eval;
pub mod factor;
pub mod ir;
pub mod linalg;
pub mod pass;
pub mod passes;
pub mod pipeline;
pub mod proto;
pub mod refit;
pub mod shrink;
pub mod text;
pub mod verify;
