//! What needs ONNX Runtime: `ORT_DYLIB_PATH=… cargo test --release --package xtask`. The project's own tests do without.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use onnx_shrink::{
    codec::{Model, Runtime},
    ir::{Affine, Codes, DType, Storage, Tensor, Weight},
    pipeline,
    shrink::{Job, shrink},
    text,
    verify::{Engine, Reference, Request, Samples, Split, error_when_optimized, runs_as_written},
};

/// Engines may differ by this, relative to the size of an output.
const BETWEEN_ENGINES: f64 = 1e-4;
/// Where weights are of half precision, in which one of them may sum.
const OF_HALVES: f64 = 1e-2;

fn engine() -> Engine {
    let library = std::env::var("ORT_DYLIB_PATH").expect("ORT_DYLIB_PATH must name the library of ONNX Runtime");
    Engine::onnxruntime(Path::new(&library)).unwrap()
}

fn request() -> Request {
    Request { engine: engine(), ..Request::default() }
}

fn fixtures(folder: &str) -> Vec<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(folder);
    let mut files: Vec<_> = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

fn models(folder: &str) -> Vec<(PathBuf, Model)> {
    let files = fixtures(folder).into_iter().filter(|path| path.extension().is_some_and(|e| e == "onnx"));
    files.map(|path| (path.clone(), Model::open(&path).unwrap())).collect()
}

#[test]
fn both_engines_agree_on_every_model_and_pass_fixture() {
    let texts = fixtures("passes")
        .into_iter()
        .flat_map(|pass| fixtures(&format!("passes/{}", pass.file_name().unwrap().to_str().unwrap())));
    let texts = texts.filter(|path| path.extension().is_some_and(|e| e == "onnxtxt"));
    let claims = texts.map(|path| (path.clone(), text::parse(&std::fs::read_to_string(path).unwrap()).unwrap()));
    // It has no kernels for older operator sets.
    let claims = claims.filter(|(_, model)| model.graph.opset() >= 7);
    for (path, model) in models("models").into_iter().chain(claims) {
        let samples = Samples::gather(&model, &request()).unwrap();
        assert_eq!(samples.unrunnable, None, "{}", path.display());
        let mut constants = model.graph.values().into_values().filter_map(|value| model.graph.constant(value));
        let most = if constants.any(|tensor| tensor.dtype() == DType::Float16) { OF_HALVES } else { BETWEEN_ENGINES };
        for sample in &samples.part(Split::Last) {
            // Samples come in two shapes, and a plan is for one.
            let runner = Engine::default().prepare(&model, sample).unwrap();
            let other = engine().prepare(&model, sample).unwrap();
            for (a, b) in runner.run(sample).unwrap().iter().zip(&other.run(sample).unwrap()) {
                assert_eq!((&a.dims, a.is_float()), (&b.dims, b.is_float()), "{}", path.display());
                // Infinite values that are the same have no distance.
                let off = a.values.iter().zip(&b.values).filter(|(x, y)| x != y && !(x.is_nan() && y.is_nan()));
                let distance: f64 = off.map(|(x, y)| (x - y).powi(2)).sum();
                let size: f64 = a.values.iter().filter(|x| x.is_finite()).map(|x| x * x).sum();
                assert!(distance.sqrt() <= most * size.sqrt().max(1e-3), "{}", path.display());
            }
        }
    }
}

#[test]
fn lossy_passes_are_searched_and_checked_in_onnxruntime() {
    for (path, model) in models("models") {
        let job = Job { items: pipeline::parse("svd,prune").unwrap(), request: request(), ..Job::default() };
        let (small, report) = shrink(&model, &job, &mut |_| {}).unwrap();
        assert!(report.difference.unwrap().error <= report.budget.unwrap(), "{}", path.display());
        assert!(small.encode().len() <= model.encode().len(), "{}", path.display());
    }
}

#[test]
fn stored_weights_run_as_written() {
    // It sums half precision in single precision, and rounds less of what it makes of codes than they say.
    let half = "<ir_version: 8, opset_import: [\"\": 17]>\ng (float16[N,64] x) => (float16[N,48] y)\n\
                <float16[64,48] w = normal(1)>\n{\n y = MatMul (x, w)\n}\n";
    let half = (PathBuf::from("half"), text::parse(half).unwrap());
    for (path, model) in models("models").into_iter().chain(models("quantized")).chain([half]) {
        for runtime in [Runtime::Onnxruntime, Runtime::Generic] {
            for passes in [
                "quantize:bits=8",
                "quantize:bits=2:block=32",
                "codebook:bits=3:tables=rows",
                "codebook:bits=8:vector=4",
                "half",
            ] {
                let (items, max_error) = (pipeline::parse(passes).unwrap(), Some(f64::MAX));
                let job = Job { items, max_error, runtime, request: request(), ..Job::default() };
                let (small, _) = shrink(&model, &job, &mut |_| {}).unwrap();
                let samples = Samples::gather(&model, &request()).unwrap();
                let runs = runs_as_written(&engine(), &small, &samples.part(Split::Last));
                assert_eq!(runs.unwrap(), Some(true), "{} {passes} {runtime:?}", path.display());
            }
        }
    }
}

#[test]
fn rounding_is_simulated_as_onnxruntime_rounds() {
    const COLUMNS: usize = 512;
    for (width, opset, bits, block) in [
        (512, 13, 8, 512),
        (500, 13, 8, 500),
        (512, 21, 8, 64),
        (512, 21, 4, 512),
        (500, 13, 4, 500),
        (512, 21, 4, 128),
    ] {
        // Channels of very different sizes, so that which of them share a scale matters.
        let text = format!(
            "<ir_version: 10, opset_import: [\"\": {opset}]>\ng (float[1,{width}] x) => (float[1,{COLUMNS}] y)\n\
             <float[{width},{COLUMNS}] w = normal(1), float[{width}] size = normal(3)>\n\
             {{\n a = Mul (size, size)\n b = Mul (a, x)\n y = MatMul (b, w)\n}}\n"
        );
        let mut model = text::parse(&text).unwrap();
        let value = model.graph.values()["w"];
        let codes: Vec<u8> = (0..width * COLUMNS).map(|i| (i * i / 7 % (1 << bits)) as u8).collect();
        let codes = Codes::new(&[width, COLUMNS], bits, &[block, 1], codes.into()).unwrap();
        let grid = codes.grid();
        let scales = vec![0.125; grid.iter().product()];
        let zeros = vec![1_i64 << (bits - 1); scales.len()];
        let scales = Tensor::floats(DType::Float, &grid, &scales).unwrap();
        let form = Affine::new(codes, false, scales, Tensor::integers(DType::Int32, &grid, &zeros)).unwrap();
        let stored = Weight::stored(Storage::Affine(form.to_multiply_by())).unwrap();
        model.graph.set_weight(value, Weight::dense(stored.value().clone()));
        let mut small = model.clone();
        small.graph.set_weight(value, stored);
        let inputs = Samples::gather(&model, &request()).unwrap().part(Split::Last);
        let simulated = Reference::before_squashing(&engine(), &model, inputs.clone()).unwrap();
        let simulated = simulated.compare(&small).unwrap().error;
        let found =
            Reference::new(&engine().optimized().unwrap(), &model, inputs).unwrap().compare(&small).unwrap().error;
        assert!(found > 1e-3, "{width} {opset} {bits} {block}: nothing was rounded");
        assert!((simulated / found - 1.0).abs() < 0.05, "{width} {opset} {bits} {block}: {simulated} for {found}");
    }
}

#[test]
fn zeroed_weights_are_refused_in_onnxruntime() {
    for (path, model) in models("models") {
        let samples = Samples::gather(&model, &request()).unwrap();
        let reference = Reference::new(&engine(), &model, samples.part(Split::Last)).unwrap();
        assert!(reference.compare(&model).unwrap().error < BETWEEN_ENGINES);
        let mut zeroed = model.clone();
        for value in model.graph.values().into_values() {
            let Some(tensor) = model.graph.constant(value) else { continue };
            if tensor.f64s().is_some() {
                let zero = Tensor::floats(tensor.dtype(), tensor.dims(), &vec![0.0; tensor.len()]).unwrap();
                zeroed.graph.set_weight(value, Weight::dense(zero));
            }
        }
        let difference = reference.compare(&zeroed).unwrap();
        assert!(difference.error.is_nan() || difference.error > 0.5, "{}: {difference:?}", path.display());
        let optimized = |result| {
            let samples = Samples::gather(&model, &request()).unwrap().part(Split::Last);
            error_when_optimized(&engine(), (&model, result), &samples).unwrap().unwrap()
        };
        let (same, off) = (optimized(&model), optimized(&zeroed));
        assert!(same < BETWEEN_ENGINES && (off.is_nan() || off > 0.5), "{}: {same} {off}", path.display());
    }
}
