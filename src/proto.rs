//! The messages of `onnx.proto`, as prost generates them.
#![allow(missing_docs, clippy::all, clippy::pedantic, rust_2018_idioms, unused_qualifications)]

include!(concat!(env!("OUT_DIR"), "/onnx.rs"));
