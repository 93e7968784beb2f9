//! Fixtures that the `onnx` package for Python makes.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, ensure};

/// Write the models of `fixtures/roundtrip`.
#[derive(Debug, clap::Args)]
pub(crate) struct Fixtures {
    /// A Python with the `onnx` package.
    #[arg(long, default_value = "python3")]
    python: PathBuf,
}

impl Fixtures {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let status = Command::new(&self.python)
            .arg(folder.join("src/roundtrip.py"))
            .arg(folder.join("../fixtures/roundtrip"))
            .status()
            .with_context(|| self.python.display().to_string())?;
        ensure!(status.success(), "roundtrip.py failed; does this Python have the onnx package?");
        Ok(())
    }
}
