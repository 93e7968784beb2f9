"""Runs passes one after another, each on what the one before wrote, and has ONNX Runtime load and run every file.

usage: chains.py PROGRAM FOLDER... [--seed N] [--count N]

Each chain starts with a model of the folders, perhaps at another opset, and takes up to three lists of passes; between them, types of
values may be declared, and any file may be written for either runtime. What fails is printed and counted: a crash, a file that is refused,
larger or invalid, a list of exact passes that changes what is computed, a verified list of others that does so beyond the error that it
told, and a file that computes something else with optimizations than without.
"""

import argparse
import glob
import os
import random
import re
import subprocess
import sys
import tempfile

import numpy as np
import onnx
import onnxruntime as ort

ort.set_default_logger_severity(4)
EXACT = ["none", "simplify", "identity", "fold-constants", "exact-storage"]
LOSSY = [
    "quantize:bits=8", "quantize:bits=4", "quantize:bits=2", "quantize:bits=4:block=32", "quantize:bits=2:block=16",
    "codebook:bits=8", "codebook:bits=4:tables=rows", "codebook:bits=3", "codebook:bits=1", "codebook:bits=4:vector=2",
    "half:all", "prune:ratio=0.3", "svd:energy=0.9", "prune:ratio=0.25,quantize:bits=4",
]  # fmt: skip
OPSETS = [8, 9, 10, 11, 13, 15, 17, 18, 19, 21, 22]
TYPES = {
    "tensor(float)": "f4", "tensor(float16)": "f2", "tensor(double)": "f8", "tensor(int64)": "i8", "tensor(int32)": "i4",
    "tensor(uint8)": "u1", "tensor(int8)": "i1", "tensor(bool)": "?",
}  # fmt: skip


def outputs(path, optimized, feeds, precise=False):
    options = ort.SessionOptions()
    if precise:
        # Kernels of integers that can't overflow, for which the runtime rewrites constants.
        options.add_session_config_entry("session.x64quantprecision", "1")
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options)
    if not feeds:
        numbers = np.random.RandomState(0)
        for value in session.get_inputs():
            shape = [extent if isinstance(extent, int) else 1 for extent in value.shape]
            dtype = TYPES[value.type]
            made = numbers.randn(*shape) if dtype[0] == "f" else numbers.randint(0, 2, shape)
            feeds[value.name] = np.asarray(made).astype(dtype)
    return [np.asarray(value, "f8") for value in session.run(None, feeds)]


def loads_precisely(path, feeds):
    try:
        outputs(path, True, feeds, precise=True)
        return True
    except Exception:
        return False


def convert(path, opset):
    """The model at another opset, `None` where there is no way to it."""
    try:
        model = onnx.version_converter.convert_version(onnx.load(path), opset)
        model.ir_version = 10
        return model
    except Exception:
        return None


def distance(wanted, found):
    """The largest ‖y−z‖ / ‖y−ȳ‖ over outputs, infinite where there are others."""
    if len(wanted) != len(found) or any(a.shape != b.shape for a, b in zip(wanted, found)):
        return float("inf")
    off = 0.0
    for a, b in zip(wanted, found):
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        if not same.all():
            lost = np.linalg.norm(np.where(same, 0.0, a - b))
            off = np.maximum(off, lost / max(np.linalg.norm(a - a.mean()), 1e-3 * np.sqrt(a.size)))
    return off


def declare(path):
    try:
        onnx.save(onnx.shape_inference.infer_shapes(onnx.load(path)), path)
    except Exception:
        pass


def shrink(program, source, target, choose):
    """The list of passes that was run and what came of it."""
    passes, runtime = choose(EXACT + LOSSY), choose(["onnxruntime", "generic"])
    verified = choose([True, False, False])
    budget = ["--max-error", "9"] if passes not in EXACT else []
    options = ["--passes", passes, "--runtime", runtime] + (budget if verified else ["--no-verify"])
    done = subprocess.run([program, source, target] + options, capture_output=True, text=True, timeout=600)
    told = re.search(r"^error ([0-9.e+-]+)", done.stderr, re.M) if verified else None
    return passes, f"{passes} {runtime}" + (" verified" if verified else ""), done, told and float(told.group(1))


def failure(source, target, passes, told, feeds):
    """What is wrong with `target`, which was made of `source` with an error of `told`, if that is known."""
    count = lambda path: len(onnx.load(path, load_external_data=False).graph.node)
    # A known value in the place of what computes it may take a few bytes more.
    if os.path.getsize(target) > os.path.getsize(source) + 64 * max(0, count(source) - count(target)):
        return "larger"
    try:
        plain, optimized = outputs(target, False, feeds), outputs(target, True, feeds)
        if loads_precisely(source, feeds):
            outputs(target, True, feeds, precise=True)
        onnx.checker.check_model(target, full_check=True)
    except Exception as error:
        return f"refused: {str(error)[:300]}"
    off = distance(outputs(source, False, feeds), plain)
    # Inputs here are others than those that the error was told for.
    most = 1e-3 if passes in EXACT else float("inf") if told is None else 5 * told + 0.05
    if not off <= most:
        return f"wrong: off by {off}, where {most} would be right"
    # Kernels of integers round otherwise, and one step of eight bits makes others.
    apart = distance(plain, optimized)
    return None if apart <= 0.3 else f"wrong with optimizations: off by {apart}"


def chain(program, model, choose, folder):
    """What the chain was, `None` where its model does not run; and what is wrong with it, if anything is."""
    source, target, feeds = f"{folder}/a.onnx", f"{folder}/b.onnx", {}
    opset = choose(OPSETS + [None] * 16)
    converted = convert(model, opset) if opset else None
    onnx.save(converted or onnx.load(model), source)
    told = [os.path.basename(model)] + ([f"opset {opset}"] if converted else [])
    try:
        outputs(source, False, feeds)
    except Exception:
        return None, None
    for _ in range(choose([1, 2, 3])):
        if choose([True, False]):
            declare(source)
            told.append("declared")
        passes, words, done, error = shrink(program, source, target, choose)
        told.append(words)
        if done.returncode not in (0, 3) or "a mistake in this program" in done.stderr:
            return told, f"exit {done.returncode}: {done.stderr[-300:]}"
        if done.returncode == 3:
            continue
        wrong = failure(source, target, passes, error, feeds)
        if wrong:
            return told, wrong
        os.replace(target, source)
    return told, None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    asked = parser.parse_args()
    models = sorted(path for folder in asked.folders for path in glob.glob(f"{folder}/*.onnx"))
    choose = random.Random(asked.seed).choice
    ran, failed = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(asked.count):
            told, wrong = chain(asked.program, choose(models), choose, folder)
            ran += told is not None
            if wrong:
                failed += 1
                print(", then ".join(told) + f": {wrong}", flush=True)
    print(f"{ran} chains, {failed} failed")
    sys.exit(failed > 0 or ran == 0)


if __name__ == "__main__":
    main()
