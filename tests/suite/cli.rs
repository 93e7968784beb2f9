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
    assert_eq!(run(&["passes", "nothing"]).status.code(), Some(1));
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
