//! The ONNX backend suite and chains of passes, judged by ONNX Runtime.

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
        let mut command = script(&self.python, "backend_suite.py", self.program.as_ref())?;
        command.args(["--only", &self.only]);
        if self.sample {
            command.arg("--sample").arg(fixtures().join("backend"));
        }
        judge(command)
    }
}

/// Run passes one after another, each on what the one before wrote, and have ONNX Runtime load and run every file.
///
/// Prints what crashed, and which files are refused, larger, invalid or wrong, of which there must be none.
#[derive(Debug, clap::Args)]
pub(crate) struct Chains {
    /// A Python with the `onnx` and `onnxruntime` packages.
    #[arg(long, default_value = "python3")]
    python: PathBuf,
    /// The program; the release build beside this one where it is not given.
    #[arg(long)]
    program: Option<PathBuf>,
    /// What models, passes and runtimes are drawn from.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How many chains there are.
    #[arg(long, default_value_t = 300)]
    count: u64,
}

impl Chains {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let mut command = script(&self.python, "chains.py", self.program.as_ref())?;
        command.arg(fixtures().join("models")).arg(fixtures().join("quantized"));
        command.args(["--seed", &self.seed.to_string(), "--count", &self.count.to_string()]);
        judge(command)
    }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures")
}

/// What runs the script `name` of this folder on the program.
fn script(python: &Path, name: &str, program: Option<&PathBuf>) -> anyhow::Result<Command> {
    let mut command = Command::new(python);
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(name)).arg(crate::program(program)?);
    Ok(command)
}

fn judge(mut command: Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| command.get_program().display().to_string())?;
    ensure!(status.success(), "some models are wrong or crashed, or this Python lacks a package");
    Ok(())
}
