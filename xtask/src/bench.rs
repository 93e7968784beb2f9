//! Speed and memory, beside the peers in the same run. Nothing here passes or fails: it prints.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::AtomicBool,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use nalgebra::DMatrix;
use onnx_shrink::{
    analysis::moments,
    codec::{self, Model},
    coding::{self, Plane, Scheme, Tiling},
    factor::Metric,
    ir::{DType, Tensor, Weight},
    linalg::Spectrum,
    pass::{self, Price},
    pipeline::{self, Item},
    shrink::MAX_GRAM_DIM,
    text,
    verify::{Engine, Request, Samples, Split},
};

/// How often each command is timed; the median counts.
const RUNS: usize = 5;

/// Print how fast and how lean the program is.
#[derive(Debug, clap::Args)]
pub(crate) struct Bench {
    /// Models to simplify without verification, each beside onnxslim.
    models: Vec<PathBuf>,
    /// A model and its samples: the time of whole runs of `--passes svd,prune` and `--passes factor` with them, and of learning what the
    /// layers read.
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
        self.coding(&program)?;
        self.factorization(&program)
    }

    /// The time of storing the weight of a `MatMul` of noise in four bits, over samples whose elements vary together: coding alone, and
    /// whole runs.
    fn coding(&self, program: &Path) -> anyhow::Result<()> {
        const SIZE: usize = 4096;
        println!("\n| a MatMul of {SIZE} x {SIZE}, 4 bits | s | anonymous memory, MB |\n|---|---|---|");
        coding_alone(SIZE)?;
        let folder = std::env::temp_dir().join(format!("onnx-shrink-bench-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let (path, data, out) = (folder.join("large.onnx"), folder.join("x.npz"), folder.join("out.onnx"));
        let text = format!(
            "<ir_version: 8, opset_import: [\"\": 17]>\ng (float[N,{SIZE}] x) => (float[N,{SIZE}] y)\n<float[1] w = {{0.0}}>\n{{\n y = MatMul (x, w)\n}}\n"
        );
        save_with(&text, (SIZE, SIZE), &path)?;
        let script = format!(
            "import numpy as np, sys; r = np.random.default_rng(0); \
             x = r.standard_normal((512, 256)) @ r.standard_normal((256, {SIZE})) + r.standard_normal((512, {SIZE})); \
             np.savez(sys.argv[1], x=x.astype('f4'))"
        );
        let made = Command::new(&self.python).args(["-c", &script]).arg(&data).status()?;
        ensure!(made.success(), "numpy can't be run");
        for passes in ["quantize:bits=4", "codebook:bits=4"] {
            for has_samples in [true, false] {
                let mut command = Command::new(program);
                let command = command.arg(&path).arg(&out).args(["--passes", passes, "-q"]);
                let (time, peak) = if has_samples {
                    measure(command.args(["--max-error", "2", "--data"]).arg(&data))?
                } else {
                    measure(command.arg("--no-verify"))?
                };
                let how = if has_samples { "512 samples, verified" } else { "no samples, not verified" };
                println!("| {passes}, {how} | {:.1} | {:.0} |", time.as_secs_f64(), peak as f64 / 1e6);
            }
        }
        fs::remove_dir_all(&folder)?;
        Ok(())
    }

    fn calibration(&self, program: &Path) -> anyhow::Result<()> {
        println!(
            "\n| model | passes | samples fitted | moments, s | whole run, s | anonymous memory, MB |\n|---|---|---|---|---|---|"
        );
        let out = std::env::temp_dir().join(format!("onnx-shrink-bench-{}.onnx", std::process::id()));
        for pair in &self.calibrated {
            let (path, data) = pair.split_once('=').context("--calibrated takes MODEL=FILE.npz")?;
            let mut model = Model::open(Path::new(path))?;
            let request = Request { data: Some(data.into()), ..Request::default() };
            let samples = Samples::gather(&model, &request)?;
            let mut cx = pass::Context::at(samples.bound.clone());
            pipeline::run(&[Item::Simplify { is_last: true }], &mut model, &mut cx, Price::default())?;
            let fit = samples.part(Split::Fit);
            let start = Instant::now();
            moments::collect(&Engine::default(), &model, &fit, MAX_GRAM_DIM, &mut |_| {})?;
            let learned = start.elapsed().as_secs_f64();
            for passes in ["svd,prune", "factor"] {
                let mut command = Command::new(program);
                let command = command.arg(path).arg(&out).args(["--passes", passes, "--data", data, "-q"]);
                let (time, peak) = measure(command)?;
                println!(
                    "| {} | {passes} | {} | {learned:.1} | {:.0} | {:.0} |",
                    Path::new(path).file_stem().unwrap_or_default().to_string_lossy(),
                    fit.len(),
                    time.as_secs_f64(),
                    peak as f64 / 1e6
                );
            }
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

    fn factorization(&self, program: &Path) -> anyhow::Result<()> {
        println!("\n| factorization | ours, s | other, s | times faster |\n|---|---|---|---|");
        let row = |what: &str, ours: f64, other: f64| {
            println!("| {what} | {ours:.2} | {other:.2} | {:.1} |", other / ours);
        };
        let small = DMatrix::from_fn(1024, 1024, noise);
        let ours = timed(|| drop(Spectrum::of(&small, None).map(|spectrum| spectrum.factors(&small, 256))));
        row("1024 x 1024, whole spectrum, beside nalgebra's SVD", ours, timed(|| drop(small.clone().svd(true, true))));
        let large = DMatrix::from_fn(4096, 4096, noise);
        let ours = timed(|| drop(Spectrum::of(&large, Some(512)).map(|spectrum| spectrum.factors(&large, 512))));
        row("4096 x 4096, rank 512, beside numpy's SVD", ours, self.lapack(4096, 4096)?);
        let (time, peak) = splitting(program)?;
        let what = format!(
            "a Gemm of 4096 x 25088, rank 256, a whole run in {:.0} MB of anonymous memory, beside numpy's SVD alone",
            peak as f64 / 1e6
        );
        row(&what, time.as_secs_f64(), self.lapack(4096, 25_088)?);
        Ok(())
    }

    /// Seconds that numpy takes for the singular values and vectors of a matrix of noise, by LAPACK.
    fn lapack(&self, rows: usize, columns: usize) -> anyhow::Result<f64> {
        let script = format!(
            "import numpy as np, time; a = np.random.default_rng(0).standard_normal(({rows}, {columns})); \
             t = time.time(); np.linalg.svd(a, full_matrices=False); print(time.time() - t)"
        );
        let output = Command::new(&self.python).args(["-c", &script]).stderr(Stdio::inherit()).output()?;
        String::from_utf8_lossy(&output.stdout).trim().parse().context("numpy can't be timed")
    }
}

/// The time and the anonymous memory of splitting the largest layer of VGG-16 (Simonyan 2015), of noise, by the program.
fn splitting(program: &Path) -> anyhow::Result<(Duration, u64)> {
    let (rows, columns) = (4096, 25_088);
    let folder = std::env::temp_dir().join(format!("onnx-shrink-bench-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let (path, out) = (folder.join("large.onnx"), folder.join("out.onnx"));
    let text = format!(
        "<ir_version: 8, opset_import: [\"\": 17]>\ng (float[N,{columns}] x) => (float[N,{rows}] y)\n<float[1] w = {{0.0}}>\n{{\n y = Gemm <transB = 1> (x, w)\n}}\n"
    );
    save_with(&text, (rows, columns), &path)?;
    let mut command = Command::new(program);
    let measured = measure(command.arg(&path).arg(&out).args(["--passes", "svd:rank=256", "--max-error", "2", "-q"]));
    fs::remove_dir_all(&folder)?;
    measured
}

/// The time of coding a square matrix of noise in four bits for a covariance that is known, by both schemes.
fn coding_alone(size: usize) -> anyhow::Result<()> {
    let dims = [size, size];
    let values: Vec<f64> = (0..size * size).map(|i| noise(i / size, i % size)).collect();
    let mixed = DMatrix::from_fn(size, 256, noise);
    let covariance = &mixed * mixed.transpose() + DMatrix::identity(size, size);
    let (plane, metrics) = (Plane::new(&dims, None), [Metric::Full(covariance)]);
    for (what, scheme, tiling) in
        [("GPTQ", Scheme::Symmetric, Tiling::Rows), ("a table", Scheme::Table, Tiling::Tensor)]
    {
        let tile = plane.tile(tiling).context("tiles")?;
        let mut stored = None;
        let time =
            timed(|| stored = coding::fit((&plane, (scheme, 4, &tile)), (DType::Float, &dims), &values, &metrics));
        stored.context("codes")?;
        println!("| {what}, coding alone | {time:.1} | |");
    }
    Ok(())
}

/// Saves the model of one layer that `text` is, with a weight of noise.
fn save_with(text: &str, (rows, columns): (usize, usize), path: &Path) -> anyhow::Result<()> {
    let mut model = text::parse(text)?;
    let (node, scale) = (model.graph.ops()[0], (columns as f64).sqrt().recip());
    let values: Vec<f64> = (0..rows * columns).map(|i| noise(i / columns, i % columns) * scale).collect();
    let weight = Tensor::floats(DType::Float, &[rows, columns], &values).context("floats")?;
    let value = model.graph.operand(node, 1).context("a weight")?;
    model.graph.set_weight(value, Weight::dense(weight));
    codec::save(&model, path, &AtomicBool::new(false))?;
    Ok(())
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
