//! The ONNX backend suite, judged by ONNX Runtime.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, ensure};

/// Simplify every model of the ONNX backend suite, and compare what they compute in ONNX Runtime.
///
/// Prints how many ran, stayed unchanged, were simplified or declined, and how many are wrong or crashed, of which there must
/// be none.
#[derive(Debug, clap::Args)]
pub(crate) struct BackendSuite {
    /// A Python with the `onnx` and `onnxruntime` packages.
    #[arg(long, default_value = "python3")]
    python: PathBuf,
    /// The program; the release build beside this one where it is not given.
    #[arg(long)]
    program: Option<PathBuf>,
    /// Only the cases whose names hold this.
    #[arg(long, default_value = "")]
    only: String,
    /// Write the smallest model of each operator, at its oldest and newest opset, to `fixtures/backend`.
    #[arg(long)]
    sample: bool,
}

impl BackendSuite {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        let program = crate::program(self.program.as_ref())?;
        let mut command = Command::new(&self.python);
        command.arg(folder.join("src/backend_suite.py")).arg(program).args(["--only", &self.only]);
        if self.sample {
            command.arg("--sample").arg(folder.join("../fixtures/backend"));
        }
        let status = command.status().with_context(|| self.python.display().to_string())?;
        ensure!(status.success(), "some models are wrong or crashed, or this Python lacks a package");
        Ok(())
    }
}
