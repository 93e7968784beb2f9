//! The command line: definitions alone.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::{
    codec::Runtime,
    pass::Minimize,
    shrink::MAX_GRAM_DIM,
    verify::{Engine, Request},
};

/// Make a trained ONNX model smaller and faster, and prove that it still computes the same.
///
///     onnx-shrink IN OUT                          clean up without changing any answer
///     onnx-shrink IN OUT --passes svd --data X    trade accuracy within a budget, measured on real inputs
///
/// Exit codes: 0 done, 1 failed, 2 usage, 3 not verified (nothing is written). `diff`: 0 same, 1 different, 2 trouble.
#[derive(Debug, Parser)]
#[command(
    name = "onnx-shrink",
    version,
    verbatim_doc_comment,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
pub struct Cli {
    /// The subcommand, if it is not the main job.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The main job.
    #[command(flatten)]
    pub shrink: Shrink,
}

/// What can be asked for besides the main job.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print what a model costs: nodes by operator, parameters, bytes, multiply-adds.
    Inspect {
        /// The model.
        model: PathBuf,
    },
    /// Check that two models compute the same, and say by how much they differ.
    Verify {
        /// The original.
        a: PathBuf,
        /// The other.
        b: PathBuf,
        /// What they are run on.
        #[command(flatten)]
        feeds: Feeds,
        /// The largest error over outputs.
        #[arg(long, value_name = "E")]
        max_error: Option<f64>,
    },
    /// Show what differs between two models: costs, then the changed lines of their texts.
    Diff {
        /// The one.
        a: PathBuf,
        /// The other.
        b: PathBuf,
    },
    /// List the passes, or explain one.
    Passes {
        /// The pass.
        name: Option<String>,
    },
}

/// What a model is run on.
#[derive(Args, Debug, Clone, Default)]
pub struct Feeds {
    /// Samples: an .npz file with one array for each input, samples along the first axis.
    #[arg(long, value_name = "FILE.npz")]
    pub data: Option<PathBuf>,
    /// An input that always has one value.
    #[arg(long = "input", value_name = "NAME=VALUE", value_parser = fixed)]
    pub inputs: Vec<(String, f64)>,
    /// The shape of an input, for instance x=1x3x224x224.
    #[arg(long = "shape", value_name = "NAME=DIMS", value_parser = shape)]
    pub shapes: Vec<(String, Vec<usize>)>,
    /// What runs the model; tract is built in.
    #[arg(long, value_enum, default_value_t = EngineName::Tract)]
    pub engine: EngineName,
    /// The shared library of ONNX Runtime, 1.17 or newer, for --engine onnxruntime.
    #[arg(long, value_name = "FILE", env = "ORT_DYLIB_PATH")]
    pub onnxruntime_lib: Option<PathBuf>,
    /// Bytes that running the model may take, with k, M or G for thousands, millions and billions; all of the machine's
    /// memory where it is not given.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub max_memory: Option<u64>,
}

/// The engines by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum EngineName {
    /// The engine inside this program.
    #[default]
    Tract,
    /// ONNX Runtime, from the library of `--onnxruntime-lib`.
    Onnxruntime,
}

/// The main job.
#[derive(Args, Debug)]
pub struct Shrink {
    /// The model to read; - is standard input.
    #[arg(value_name = "IN", required = true)]
    pub input: Option<PathBuf>,
    /// Where to write the result, which may be IN; - is standard output.
    #[arg(value_name = "OUT", required_unless_present = "dry_run")]
    pub output: Option<PathBuf>,
    /// What to do: NAME[:KEY=VALUE]…,NAME…; `onnx-shrink passes` lists the names. `simplify` stands for all passes that
    /// change no answer, `none` for nothing.
    #[arg(long, value_name = "LIST", default_value = "simplify")]
    pub passes: String,
    /// What the model is run on.
    #[command(flatten)]
    pub feeds: Feeds,
    /// Layers that lossy passes leave alone, by the name of a node or weight.
    #[arg(long, value_name = "GLOB")]
    pub keep: Vec<String>,
    /// The largest error of lossy passes over outputs; 0.05 with --data, 0.10 without.
    #[arg(long, value_name = "E", value_parser = positive)]
    pub max_error: Option<f64>,
    /// The largest share of samples whose top class may change.
    #[arg(long, value_name = "F", value_parser = share)]
    pub max_flips: Option<f64>,
    /// What passes that no option fixes are to save; what a target is of, where there is one.
    #[arg(long, value_enum, default_value_t = Minimize::Bytes, conflicts_with_all = ["target_size", "target_macs"])]
    pub minimize: Minimize,
    /// The share of the bytes that is to be left, instead of an error budget.
    #[arg(long, value_name = "R", value_parser = share, conflicts_with = "target_macs")]
    pub target_size: Option<f64>,
    /// The share of the multiply-adds that is to be left, instead of an error budget.
    #[arg(long, value_name = "R", value_parser = share)]
    pub target_macs: Option<f64>,
    /// Write results of 90, 80, … percent of the cost that is minimized into this folder, with a table of what each costs, how
    /// far it is off, and whether it is certain to change at most --max-flips of the top classes.
    #[arg(long, value_name = "DIR")]
    pub pareto: Option<PathBuf>,
    /// What layers read, saved before by --save-moments, possibly in parts, which add up; then --data is for the search and the
    /// final word alone.
    #[arg(long, value_name = "FILE")]
    pub moments: Vec<PathBuf>,
    /// Save what layers read over the samples.
    #[arg(long, value_name = "FILE", requires = "data")]
    pub save_moments: Option<PathBuf>,
    /// Convolutions that read patches of more elements are calibrated by their channels alone, and layers that read longer
    /// vectors even so not at all: a statistic takes 8 bytes for the square of that.
    #[arg(long, value_name = "D", default_value_t = MAX_GRAM_DIM)]
    pub max_gram_dim: usize,
    /// What is to run the result: how weights that are stored in fewer bytes are spelled.
    #[arg(long, value_enum, default_value_t = Runtime::Onnxruntime)]
    pub runtime: Runtime,
    /// Write what was done as JSON; - is standard output.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Do everything but write the result.
    #[arg(long)]
    pub dry_run: bool,
    /// Write the result without checking it.
    #[arg(long)]
    pub no_verify: bool,
    /// Refuse a file with fields that this program does not know, and changes that can't be verified, which otherwise are taken back.
    #[arg(long)]
    pub strict: bool,
    /// Write the result even if it is larger than the input.
    #[arg(long)]
    pub force: bool,
    /// Keep initializers that are listed as inputs listed.
    #[arg(long)]
    pub keep_initializer_inputs: bool,
    /// Say what was declined, and why.
    #[arg(short, long)]
    pub verbose: bool,
    /// Say nothing but errors.
    #[arg(short, long, conflicts_with = "verbose")]
    pub quiet: bool,
}

impl Feeds {
    /// The request for samples that these options make.
    ///
    /// # Errors
    ///
    /// When the engine can't be had, or an input is given twice.
    pub fn request(&self) -> Result<Request, String> {
        let engine = match (self.engine, &self.onnxruntime_lib) {
            (EngineName::Tract, _) => Engine::default(),
            (EngineName::Onnxruntime, Some(library)) => Engine::onnxruntime(library).map_err(|error| {
                format!("{}: is no library of ONNX Runtime 1.17 or newer: {error}", library.display())
            })?,
            (EngineName::Onnxruntime, None) => {
                return Err(
                    "--engine onnxruntime needs the library: give it with --onnxruntime-lib or ORT_DYLIB_PATH; \
                     the Python package keeps it as onnxruntime/capi/libonnxruntime.so.*"
                        .to_owned(),
                );
            }
        };
        let names = self.inputs.iter().map(|(name, _)| name).collect::<Vec<_>>();
        if let Some(name) = names.iter().enumerate().find(|(i, name)| names[..*i].contains(name)).map(|(_, name)| name)
        {
            return Err(format!("--input gives `{name}` twice"));
        }
        Ok(Request {
            data: self.data.clone(),
            fixed: self.inputs.iter().cloned().collect(),
            shapes: self.shapes.iter().cloned().collect(),
            engine: engine.with_max_memory(self.max_memory.unwrap_or_else(physical_memory)),
        })
    }
}

/// Bytes of memory that the machine has.
fn physical_memory() -> u64 {
    #[cfg(target_os = "linux")]
    {
        let info = rustix::system::sysinfo();
        (info.totalram as u64).saturating_mul(u64::from(info.mem_unit))
    }
    #[cfg(not(target_os = "linux"))]
    u64::MAX
}

fn bytes(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.char_indices().next_back() {
        Some((i, 'k' | 'K')) => (&text[..i], 1_000),
        Some((i, 'M')) => (&text[..i], 1_000_000),
        Some((i, 'G')) => (&text[..i], 1_000_000_000),
        _ => (text, 1),
    };
    let number = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit));
    number.ok_or_else(|| format!("`{text}` is no number of bytes; write for instance 2G"))
}

fn fixed(text: &str) -> Result<(String, f64), String> {
    let (name, value) = text.rsplit_once('=').ok_or("NAME=VALUE is wanted")?;
    Ok((name.to_owned(), value.parse().map_err(|_| format!("`{value}` is no number"))?))
}

fn shape(text: &str) -> Result<(String, Vec<usize>), String> {
    let (name, dims) = text.rsplit_once('=').ok_or("NAME=DIMS is wanted, for instance x=1x3x224x224")?;
    let extent = |d: &str| d.parse().map_err(|_| format!("`{d}` is no extent"));
    let dims = if dims.is_empty() { Vec::new() } else { dims.split('x').map(extent).collect::<Result<_, _>>()? };
    Ok((name.to_owned(), dims))
}

fn share(text: &str) -> Result<f64, String> {
    positive(text).ok().filter(|&share| share <= 1.0).ok_or_else(|| "a number between 0 and 1 is wanted".to_owned())
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if value >= 0.0 => Ok(value),
        _ => Err("a number that is not negative is wanted".to_owned()),
    }
}
