//! The project's own chores.
#![allow(clippy::print_stdout)]

mod bench;
mod fixtures;

use std::{fs, path::Path};

use anyhow::{Context, bail};
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
    /// Write the models of `fixtures/roundtrip`, which show every part of the format.
    Fixtures(fixtures::Fixtures),
}

const BEGIN: &str = "<!-- passes: begin -->\n";
const END: &str = "<!-- passes: end -->";

fn main() -> anyhow::Result<()> {
    match Task::parse() {
        Task::Codegen { check } => codegen(check),
        Task::Bench(bench) => bench.run(),
        Task::Fixtures(fixtures) => fixtures.run(),
    }
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
