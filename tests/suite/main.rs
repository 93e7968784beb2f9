//! All integration tests in one binary: the engine is linked once.
#![allow(missing_docs, clippy::unwrap_used)]

mod backend;
mod calibration;
mod cli;
mod codec;
mod factor;
mod models;
mod passes;
mod proof;
mod properties;
mod readme;
mod storage;
mod validity;

use std::path::{Path, PathBuf};

/// The file `path` below `fixtures`.
fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)
}

/// The files of the folder `path` below `fixtures`, sorted.
fn fixtures(path: &str) -> Vec<PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(fixture(path)).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// The models below `fixtures/models`.
fn models() -> Vec<PathBuf> {
    fixtures("models").into_iter().filter(|path| path.extension().is_some_and(|e| e == "onnx")).collect()
}
