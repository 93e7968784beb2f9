//! Speed and memory, beside the peers in the same run. Nothing here passes or fails: it prints.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use nalgebra::DMatrix;
use onnx_shrink::{
    analysis::moments,
    codec::Model,
    linalg::Spectrum,
    pass::{self, Price},
    pipeline::{self, Item},
    shrink::MAX_GRAM_DIM,
    verify::{Engine, Request, Samples, Split},
};

/// How often each command is timed; the median counts.
const RUNS: usize = 5;

/// Print how fast and how lean the program is.
#[derive(Debug, clap::Args)]
pub(crate) struct Bench {
    /// Models to simplify without verification, each beside onnxslim.
    models: Vec<PathBuf>,
    /// A model and its samples: the time of a whole `--passes svd,prune` with them, and of what the layers read.
    #[arg(long, value_name = "MODEL=FILE.npz")]
    calibrated: Vec<String>,
    /// A Python with onnxslim and numpy.
    #[arg(long, default_value = "python3")]
    python: PathBuf,
    /// The program; the release build beside this one where it is not given.
    #[arg(long)]
    program: Option<PathBuf>,
}

impl Bench {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let program = crate::program(self.program.as_ref())?;
        if !self.models.is_empty() {
            self.simplification(&program)?;
        }
        if !self.calibrated.is_empty() {
            self.calibration(&program)?;
        }
        self.factorization()
    }

    fn calibration(&self, program: &Path) -> anyhow::Result<()> {
        println!(
            "\n| model | samples fitted | moments, s | whole run, s | anonymous memory, MB |\n|---|---|---|---|---|"
        );
        let out = std::env::temp_dir().join(format!("onnx-shrink-bench-{}.onnx", std::process::id()));
        for pair in &self.calibrated {
            let (path, data) = pair.split_once('=').context("--calibrated takes MODEL=FILE.npz")?;
            let mut model = Model::open(Path::new(path))?;
            let request = Request { data: Some(data.into()), ..Request::default() };
            let samples = Samples::gather(&model, &request)?;
            let mut cx = pass::Context::at(samples.bound.clone());
            pipeline::run(&[Item::Simplify], &mut model, &mut cx, Price::default())?;
            let fit = samples.part(Split::Fit);
            let start = Instant::now();
            moments::collect(&Engine::default(), &model, &fit, MAX_GRAM_DIM, &mut |_| {})?;
            let learned = start.elapsed().as_secs_f64();
            let mut command = Command::new(program);
            let command = command.arg(path).arg(&out).args(["--passes", "svd,prune", "--data", data, "-q"]);
            let (time, peak) = measure(command)?;
            println!(
                "| {} | {} | {learned:.1} | {:.0} | {:.0} |",
                Path::new(path).file_stem().unwrap_or_default().to_string_lossy(),
                fit.len(),
                time.as_secs_f64(),
                peak as f64 / 1e6
            );
        }
        if out.exists() {
            fs::remove_file(out)?;
        }
        Ok(())
    }

    fn simplification(&self, program: &Path) -> anyhow::Result<()> {
        let folder = std::env::temp_dir().join(format!("onnx-shrink-bench-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let out = folder.join("out.onnx");
        println!("| model | ours, ms | onnxslim, ms | ratio | anonymous memory, MB | 1.2 x file + 32 MB |");
        println!("|---|---|---|---|---|---|");
        for model in &self.models {
            let mut peak = 0;
            let ours = median(|| {
                let (time, memory) = measure(Command::new(program).arg(model).arg(&out).args(["--no-verify", "-q"]))?;
                peak = peak.max(memory);
                Ok(time)
            })?;
            let theirs = median(|| {
                let mut command = Command::new(&self.python);
                command.args(["-c", "import sys; from onnxslim.cli import main; sys.exit(main())"]);
                Ok(measure(command.arg(model).arg(&out))?.0)
            })?;
            let ms = |time: Duration| time.as_secs_f64() * 1e3;
            println!(
                "| {} | {:.0} | {:.0} | {:.3} | {:.1} | {:.1} |",
                model.file_stem().unwrap_or_default().to_string_lossy(),
                ms(ours),
                ms(theirs),
                ms(ours) / ms(theirs),
                peak as f64 / 1e6,
                fs::metadata(model)?.len() as f64 * 1.2 / 1e6 + 32.0
            );
        }
        fs::remove_dir_all(&folder)?;
        Ok(())
    }

    fn factorization(&self) -> anyhow::Result<()> {
        println!("\n| factorization | ours, s | other, s | times faster |\n|---|---|---|---|");
        let row = |what: &str, ours: f64, other: f64| {
            println!("| {what} | {ours:.2} | {other:.2} | {:.1} |", other / ours);
        };
        let small = DMatrix::from_fn(1024, 1024, noise);
        let ours = timed(|| drop(Spectrum::of(&small, None).map(|spectrum| spectrum.factors(&small, 256))));
        row("1024 x 1024, whole spectrum, beside nalgebra's SVD", ours, timed(|| drop(small.clone().svd(true, true))));
        let large = DMatrix::from_fn(4096, 4096, noise);
        let ours = timed(|| drop(Spectrum::of(&large, Some(512)).map(|spectrum| spectrum.factors(&large, 512))));
        let script = "import numpy as np, time; a = np.random.default_rng(0).standard_normal((4096, 4096)); \
                      t = time.time(); np.linalg.svd(a); print(time.time() - t)";
        let output = Command::new(&self.python).args(["-c", script]).stderr(Stdio::inherit()).output()?;
        let other = String::from_utf8_lossy(&output.stdout).trim().parse().context("numpy can't be timed")?;
        row("4096 x 4096, rank 512, beside numpy's SVD", ours, other);
        Ok(())
    }
}

/// A number between -1 and 1 that looks random.
fn noise(row: usize, column: usize) -> f64 {
    let mixed = (row as u64 * 4_294_967_291 + column as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
}

fn timed(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

fn median(mut f: impl FnMut() -> anyhow::Result<Duration>) -> anyhow::Result<Duration> {
    let mut times = (0..RUNS).map(|_| f()).collect::<anyhow::Result<Vec<_>>>()?;
    times.sort_unstable();
    Ok(times[RUNS / 2])
}

/// Runs `command`: its wall time, and the most anonymous memory it was seen to hold.
fn measure(command: &mut Command) -> anyhow::Result<(Duration, u64)> {
    let start = Instant::now();
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().context("can't be started")?;
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    let code = loop {
        if let Some(code) = child.try_wait()? {
            break code;
        }
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        peak = peak.max(kilobytes.unwrap_or(0) * 1024);
        std::thread::sleep(Duration::from_micros(200));
    };
    ensure!(code.success(), "{command:?} failed");
    Ok((start.elapsed(), peak))
}
