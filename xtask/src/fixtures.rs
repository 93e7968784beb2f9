//! What the `onnx` package for Python makes.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, ensure};

/// Write the models of `fixtures/roundtrip`, and what the standard operators are.
#[derive(Debug, clap::Args)]
pub(crate) struct Fixtures {
    /// A Python with the `onnx` package.
    #[arg(long, default_value = "python3")]
    python: PathBuf,
}

impl Fixtures {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        for (script, made) in
            [("roundtrip.py", "../fixtures/roundtrip"), ("operators.py", "../src/analysis/operators.txt")]
        {
            let mut command = Command::new(&self.python);
            command.arg(folder.join("src").join(script)).arg(folder.join(made));
            let status = command.status().with_context(|| self.python.display().to_string())?;
            ensure!(status.success(), "{script} failed; does this Python have the onnx package?");
        }
        Ok(())
    }
}
