use std::{
    io::Write,
    path::Path,
    process::{Command, Output, Stdio},
};

use crate::{fixture, fixtures};

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_onnx-shrink")).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).replace(&fixture("").display().to_string(), "")
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Writes one array as numpy's savez does.
fn write_npz(file: &Path, name: &str, dims: &[u64], values: &[f32]) {
    use npyz::WriterBuilder;
    let mut bytes = Vec::new();
    let mut writer = npyz::WriteOptions::new().default_dtype().shape(dims).writer(&mut bytes).begin_nd().unwrap();
    writer.extend(values.iter().copied()).unwrap();
    writer.finish().unwrap();
    let mut archive = zip::ZipWriter::new(std::fs::File::create(file).unwrap());
    archive.start_file(format!("{name}.npy"), zip::write::SimpleFileOptions::default()).unwrap();
    archive.write_all(&bytes).unwrap();
    archive.finish().unwrap();
}

#[test]
fn bad_files_get_one_clear_error_each_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.onnx");
    let mut messages = String::new();
    for file in fixtures("invalid") {
        let output = run(&[path(&file), path(&out)]);
        assert_eq!(output.status.code(), Some(1), "{}", file.display());
        assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none());
        messages += &text(&output.stderr);
    }
    insta::assert_snapshot!(messages);
}

#[test]
fn wrong_usage_exits_with_two() {
    let input = fixture("models/mnist_lenet300.onnx");
    for args in [&[path(&input)][..], &[path(&input), "x.onnx", "--passes", "sdv"], &["--nonsense"]] {
        assert_eq!(run(args).status.code(), Some(2), "{args:?}");
    }
    // What no pass of the list does anything with is not passed over.
    for (passes, option) in
        [("simplify", "--max-error=0.1"), ("simplify", "--pareto=x"), ("svd:rank=8", "--target-size=0.5")]
    {
        let output = run(&[path(&input), "x.onnx", "--passes", passes, option]);
        assert_eq!(output.status.code(), Some(2), "{passes} {option}");
        assert!(text(&output.stderr).contains(option.split('=').next().unwrap()), "{}", text(&output.stderr));
    }
}

#[test]
fn a_missing_input_exits_with_one() {
    let output = run(&["nowhere.onnx", "out.onnx"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("nowhere.onnx"), "{}", text(&output.stderr));
}

#[test]
fn what_can_not_be_verified_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.onnx");
    let input = fixture("roundtrip/functions_and_domains.onnx");

    let output = run(&[path(&input), path(&out), "--passes", "svd:rank=1"]);
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert!(!out.exists());
    let output = run(&[path(&input), path(&out), "--passes", "svd:rank=1", "--no-verify"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

#[test]
fn verify_refuses_a_model_that_computes_something_else() {
    let (a, b) = (fixture("models/mnist_lenet300.onnx"), fixture("models/fmnist_vgg.onnx"));
    assert_eq!(run(&["verify", path(&a), path(&a)]).status.code(), Some(0));
    assert_eq!(run(&["verify", path(&a), path(&b)]).status.code(), Some(3));
}

#[test]
fn streams_and_in_place_give_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (folder.path().join("m.onnx"), folder.path().join("out.onnx"));
    std::fs::copy(fixture("models/ppocr_cls.onnx"), &file).unwrap();
    assert!(run(&[path(&file), path(&out)]).status.success());
    let mut child = Command::new(env!("CARGO_BIN_EXE_onnx-shrink"))
        .args(["-", "-", "-q"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&std::fs::read(&file).unwrap()).unwrap();
    let streamed = child.wait_with_output().unwrap().stdout;
    assert!(run(&[path(&file), path(&file)]).status.success());
    let wanted = std::fs::read(&out).unwrap();
    assert!(streamed == wanted);
    assert!(std::fs::read(&file).unwrap() == wanted);
}

#[test]
fn none_writes_the_input_byte_for_byte_and_dry_run_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.onnx");
    let input = fixture("models/ppocr_cls.onnx");
    assert!(run(&[path(&input), path(&out), "--dry-run"]).status.success());
    assert!(!out.exists());
    assert!(run(&[path(&input), path(&out), "--passes", "none"]).status.success());
    assert!(std::fs::read(&out).unwrap() == std::fs::read(&input).unwrap());
}

#[test]
fn passes_are_listed_and_explained() {
    let list = text(&run(&["passes"]).stdout);
    assert!(list.contains("svd              lossy"), "{list}");
    let help = text(&run(&["passes", "svd"]).stdout);
    assert!(help.contains(":rank=") && help.contains("Applies when"), "{help}");
    assert_eq!(run(&["passes", "nothing"]).status.code(), Some(2));
}

#[test]
fn the_report_says_what_each_pass_removed() {
    let (model, data) = (fixture("models/mnist_lenet300.onnx"), fixture("data/mnist.npz"));
    let output = run(&[path(&model), "--dry-run", "-q", "--passes", "svd", "--data", path(&data), "--report", "-"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let svd = report["passes"].as_array().unwrap().iter().find(|pass| pass["pass"] == "svd").unwrap();
    assert!(svd["bytes_removed"].as_i64().unwrap() > 400_000, "{svd}");
    assert!(report["difference"]["error"].as_f64().unwrap() <= 0.05);
}

#[test]
fn diff_tells_same_from_different_from_trouble() {
    let (a, b) = (fixture("models/mnist_lenet300.onnx"), fixture("models/ppocr_cls.onnx"));
    let same = run(&["diff", path(&a), path(&a)]);
    assert_eq!((same.status.code(), text(&same.stdout).as_str()), (Some(0), ""));
    let different = run(&["diff", path(&a), path(&b)]);
    assert_eq!(different.status.code(), Some(1));
    assert!(text(&different.stdout).contains("@@"), "{}", text(&different.stdout));
    let trouble = run(&["diff", path(&a), "nowhere.onnx"]);
    assert_eq!(trouble.status.code(), Some(2));
    assert!(text(&trouble.stderr).contains("nowhere.onnx"));
}

#[test]
fn what_takes_too_much_memory_is_not_run() {
    let input = fixture("models/fmnist_vgg.onnx");
    for more in [&["--max-memory", "1M"][..], &["--shape", "input=1000000000x1x28x28"]] {
        let output = run(&[&[path(&input), "out.onnx", "--passes", "svd", "--dry-run"], more].concat());
        assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains("--max-memory"), "{}", text(&output.stderr));
    }
}

#[test]
fn an_engine_that_is_not_there_is_named_with_what_to_do() {
    let input = fixture("models/mnist_lenet300.onnx");
    let args = [path(&input), "out.onnx", "--dry-run", "--engine", "onnxruntime"];
    let output =
        Command::new(env!("CARGO_BIN_EXE_onnx-shrink")).args(args).env_remove("ORT_DYLIB_PATH").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("--onnxruntime-lib"), "{}", text(&output.stderr));
    let output = run(&[&args[..], &["--onnxruntime-lib", path(&input)]].concat());
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("is no library of ONNX Runtime"), "{}", text(&output.stderr));
}

#[cfg(unix)]
#[test]
fn an_interrupt_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (fixture("models/fmnist_vgg.onnx"), fixture("data/fashion.npz"));
    let child = Command::new(env!("CARGO_BIN_EXE_onnx-shrink"))
        .args([path(&model), path(&folder.path().join("out.onnx")), "--passes", "svd,prune", "--data", path(&data)])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It searches for seconds; after half of one it is in the middle.
    std::thread::sleep(std::time::Duration::from_millis(500));
    let interrupted = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(interrupted.success());
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(130));
    assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none());
}

#[test]
fn what_is_asked_for_and_can_not_be_is_told_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("m.onnx");
    std::fs::copy(fixture("models/mnist_lenet300.onnx"), &file).unwrap();
    let (model, out, nowhere) = (path(&file), folder.path().join("o.onnx"), folder.path().join("no/o.onnx"));
    let (stranger, damaged) = (folder.path().join("stranger.npz"), folder.path().join("damaged.npz"));
    write_npz(&stranger, "other", &[9, 1, 28, 28], &vec![0.0; 9 * 784]);
    let mut values = vec![0.0; 9 * 784];
    values[9 * 784 - 1] = f32::NAN;
    write_npz(&damaged, "input", &[9, 1, 28, 28], &values);
    for (args, code, word) in [
        (&[model, path(&out), "--report", model][..], 2, "is IN already"),
        (&[model, path(&out), "--report", path(&out)], 2, "is OUT already"),
        (&[model, path(&nowhere)], 1, "there is no folder"),
        (&[model, path(folder.path())], 1, "it is a folder"),
        (&[model, path(&out), "--keep", "nothing*"], 2, "matches no node"),
        (&[model, path(&out), "--passes", "svd,,prune"], 2, "a name is missing"),
        (&[model, path(&out), "--passes", "svd", "--no-verify"], 2, "found by measuring"),
        (&[model, path(&out), "--shape", "input=1x3x28x28"], 2, "is declared as ?x1x28x28"),
        (&[model, path(&out), "--input", "nope=1"], 2, "no input `nope`"),
        (&[model, path(&out), "--max-flips", "3"], 2, "between 0 and 1"),
        (&[model, path(&out), "--data", path(&stranger)], 1, "it has `other`, and the inputs are `input`"),
        (&[model, path(&out), "--data", path(&damaged)], 1, "`input` holds NaN in sample 8"),
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains(word), "{args:?}: {}", text(&output.stderr));
    }
    assert!(!out.exists());
    assert!(std::fs::read(&file).unwrap() == std::fs::read(fixture("models/mnist_lenet300.onnx")).unwrap());
}

#[cfg(unix)]
#[test]
fn links_are_followed_and_devices_are_written_into() {
    let folder = tempfile::tempdir().unwrap();
    let (file, link) = (folder.path().join("m.onnx"), folder.path().join("link.onnx"));
    let input = fixture("models/ppocr_cls.onnx");
    std::fs::copy(&input, &file).unwrap();
    std::os::unix::fs::symlink("m.onnx", &link).unwrap();
    assert!(run(&[path(&link), path(&link)]).status.success());
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    assert!(std::fs::read(&file).unwrap().len() < std::fs::read(&input).unwrap().len());
    // A pipe stands for any file that can't be replaced.
    let pipe = folder.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let reader = std::thread::spawn({
        let pipe = pipe.clone();
        move || std::fs::read(pipe).unwrap()
    });
    assert!(run(&[path(&input), path(&pipe)]).status.success());
    assert!(reader.join().unwrap() == std::fs::read(&file).unwrap());
}

#[test]
fn moments_are_saved_and_read_and_a_chain_of_results_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (model, data) = (fixture("models/mnist_lenet300.onnx"), fixture("data/mnist.npz"));
    let common = [path(&model), "--passes", "prune", "--data", path(&data), "--target-macs", "0.5"];
    let run = |more: &[&str]| {
        let output = run(&[&common[..], more].concat());
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        text(&output.stderr)
    };
    let (out, again, moments, chain) = (at("out.onnx"), at("again.onnx"), at("m.bin"), at("chain"));
    let report = run(&[path(&out), "--save-moments", path(&moments), "--pareto", path(&chain), "--max-flips", "0.5"]);
    assert!(report.contains("no certificate: ") && report.contains("certified"), "{report}");
    let report = run(&[path(&again), "--moments", path(&moments)]);
    assert!(std::fs::read(&out).unwrap() == std::fs::read(&again).unwrap());
    assert!(report.contains("certificate: the top class changed on"), "{report}");
    let table = std::fs::read_to_string(chain.join("table.tsv")).unwrap();
    let rows: Vec<Vec<_>> = table.lines().skip(1).map(|line| line.split('\t').collect()).collect();
    assert!(rows.len() >= 8, "{table}");
    for row in &rows {
        let (asked, macs): (f64, f64) = (row[0].trim_end_matches(".onnx").parse().unwrap(), row[4].parse().unwrap());
        assert!(macs <= asked / 100.0 && macs >= asked / 100.0 * 0.98, "{table}");
        assert!(chain.join(row[0]).exists());
    }
    // Another model's moments are refused.
    let other = fixture("models/fmnist_vgg.onnx");
    let output = self::run(&[path(&other), path(&at("x.onnx")), "--passes", "prune", "--moments", path(&moments)]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("made from another model"), "{}", text(&output.stderr));
}

#[test]
fn pruning_a_convolutional_net_to_chance_level_is_said_beforehand() {
    let model = fixture("models/fmnist_resnet14.onnx");
    let warned = |more: &[&str]| {
        let output = run(&[&[path(&model), "out.onnx", "--dry-run"], more].concat());
        text(&output.stderr).contains("warning: pruning leaves")
    };
    assert!(warned(&["--passes", "prune:ratio=0.5"]));
    assert!(warned(&["--passes", "prune", "--target-macs", "0.5"]));
    assert!(!warned(&["--passes", "prune:ratio=0.1"]));
    let data = fixture("data/fashion.npz");
    assert!(!warned(&["--passes", "prune:ratio=0.5", "--data", path(&data)]));
}

#[test]
fn a_target_that_can_not_be_reached_is_refused_with_what_can() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (fixture("models/mnist_lenet300.onnx"), folder.path().join("o.onnx"));
    let output = run(&[path(&model), path(&out), "--passes", "prune", "--target-size", "0.0001"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("when all that may go is gone"), "{}", text(&output.stderr));
    assert!(!out.exists());
}
