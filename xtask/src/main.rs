//! The project's own chores.
#![allow(clippy::print_stdout)]

mod backend;
mod bench;
mod fixtures;
mod fuzz;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use onnx_shrink::{pass::table, passes::PASSES};

/// The project's own chores.
#[derive(Debug, Parser)]
enum Task {
    /// Write the README's table of passes.
    Codegen {
        /// Only say whether it is out of date.
        #[arg(long)]
        check: bool,
    },
    /// Print how fast and how lean the program is, beside the peers.
    Bench(bench::Bench),
    /// Simplify the ONNX backend suite, and compare what the models compute in ONNX Runtime.
    BackendSuite(backend::BackendSuite),
    /// Run passes one after another, and have ONNX Runtime load and run every file.
    Chains(backend::Chains),
    /// Feed damaged models to the program for a while.
    Fuzz(fuzz::Fuzz),
    /// Write the models of `fixtures/roundtrip`, which show every part of the format, and what the standard operators are.
    Fixtures(fixtures::Fixtures),
}

const BEGIN: &str = "<!-- passes: begin -->\n";
const END: &str = "<!-- passes: end -->";

fn main() -> anyhow::Result<()> {
    match Task::parse() {
        Task::Codegen { check } => codegen(check),
        Task::Bench(bench) => bench.run(),
        Task::BackendSuite(suite) => suite.run(),
        Task::Chains(chains) => chains.run(),
        Task::Fuzz(fuzz) => fuzz.run(),
        Task::Fixtures(fixtures) => fixtures.run(),
    }
}

/// The program to try: the one given, or the build beside this one.
fn program(given: Option<&PathBuf>) -> anyhow::Result<PathBuf> {
    let beside = || anyhow::Ok(std::env::current_exe()?.with_file_name("onnx-shrink"));
    let program = given.cloned().map_or_else(beside, Ok)?;
    ensure!(program.exists(), "{} is missing: run `cargo build --release`", program.display());
    Ok(program)
}

fn codegen(check: bool) -> anyhow::Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let readme = fs::read_to_string(&path).context("README.md")?;
    let (head, rest) = readme.split_once(BEGIN).context("README.md has no mark where the table begins")?;
    let (_, tail) = rest.split_once(END).context("README.md has no mark where the table ends")?;
    let wanted = format!("{head}{BEGIN}{}{END}{tail}", table(PASSES));
    if wanted == readme {
        println!("README.md is up to date");
    } else if check {
        bail!("README.md is out of date: run `cargo xtask codegen`");
    } else {
        fs::write(&path, wanted).context("README.md")?;
        println!("README.md is written");
    }
    Ok(())
}
