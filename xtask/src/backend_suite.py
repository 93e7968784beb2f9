"""Simplifies every model of the ONNX backend suite that ONNX Runtime runs, and compares what they compute.

usage: backend_suite.py PROGRAM [--only SUBSTRING] [--sample FOLDER]

Each model is tried at its own opset and at the oldest one at which it is valid and runs: as it is, with every input but the first made an initializer, and with all of them made initializers
and a copy before each output, so that everything may fold. Counts go to stdout.
"""

import argparse
import collections
import glob
import os
import subprocess
import sys
import tempfile

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.loader import load_model_tests

ort.set_default_logger_severity(4)


def parse(path, kind):
    data = open(path, "rb").read()
    field = kind.WhichOneof("value")
    if field == "sequence_type":
        return numpy_helper.to_list(onnx.SequenceProto.FromString(data))
    if field == "optional_type":
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
    return numpy_helper.to_array(onnx.TensorProto.FromString(data))


def cases():
    for case in collect_testcases(None):
        if case.model is not None and case.data_sets and not draws(case.model):
            yield case.name, case.model, list(case.data_sets[0][0]), case.rtol, case.atol
    for kind in ("simple", "pytorch-converted", "pytorch-operator"):
        for case in load_model_tests(kind=kind):
            model = onnx.load(os.path.join(case.model_dir, "model.onnx"))
            initializers = {tensor.name for tensor in model.graph.initializer}
            fed = [value for value in model.graph.input if value.name not in initializers]
            files = sorted(glob.glob(os.path.join(case.model_dir, "test_data_set_0", "input_*.pb")))
            try:
                inputs = [parse(path, value.type) for path, value in zip(files, fed)]
            except Exception:
                continue
            yield case.name, model, inputs, case.rtol, case.atol


RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}


def draws(model):
    """Whether what the model computes is random."""
    return any(node.op_type in RANDOM for node in model.graph.node)


def fed_names(model):
    initializers = {tensor.name for tensor in model.graph.initializer}
    return [value.name for value in model.graph.input if value.name not in initializers]


def with_constants(model, inputs, first):
    """The model with all inputs from `first` on as initializers, or None where one can't be."""
    names = fed_names(model)
    if len(names) != len(inputs) or len(names) <= first:
        return None
    constant = onnx.ModelProto()
    constant.CopyFrom(model)
    for name, value in list(zip(names, inputs))[first:]:
        if not isinstance(value, np.ndarray):
            return None
        constant.graph.initializer.append(numpy_helper.from_array(value, name))
    kept = [value for value in model.graph.input if value.name in names[:first]]
    del constant.graph.input[:]
    constant.graph.input.extend(kept)
    return constant


def with_copies(model):
    """The model with an Identity before each output, or None where there can't be one."""
    if model is None or any(value.type.WhichOneof("value") != "tensor_type" for value in model.graph.output):
        return None
    renamed = {value.name: value.name + "_before" for value in model.graph.output}
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for name, before in renamed.items():
        model.graph.node.append(onnx.helper.make_node("Identity", [before], [name]))
    return model


def versions():
    """The opsets at which any standard operator changed."""
    return sorted({schema.since_version for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""})


VERSIONS = versions()


def at_oldest(model, inputs):
    """The model at the oldest opset at which it is valid and runs, or None where that is its own."""
    own = [opset for opset in model.opset_import if opset.domain == ""]
    if len(own) != 1 or len(model.opset_import) != 1 or model.functions:
        return None
    for version in VERSIONS:
        if version >= own[0].version:
            return None
        old = onnx.ModelProto()
        old.CopyFrom(model)
        old.opset_import[0].version = version
        old.ir_version = min(model.ir_version, 8)
        try:
            onnx.checker.check_model(old, full_check=False)
            run(old.SerializeToString(), inputs)
            return old
        except Exception:
            continue


def run(path, inputs, precise=False):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if precise:
        # With kernels of integers that can't overflow, for which the runtime rewrites constants.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {name: value for name, value in zip(names, inputs) if value is not None})


def runs_precisely(path, inputs):
    try:
        run(path, inputs, precise=True)
        return True
    except Exception:
        return False


def agree(a, b, rtol, atol):
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(agree(x, y, rtol, atol) for x, y in zip(a, b))
    if a is None or b is None:
        return a is None and b is None
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.kind in "fc":
        return np.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
    if a.dtype.kind == "V":
        return a.tobytes() == b.tobytes()
    return bool(np.all(a == b))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--only", default="")
    parser.add_argument("--sample", help="write the smallest model of each operator, at either age, to this folder")
    arguments = parser.parse_args()
    counts = collections.Counter()
    sample = {}
    with tempfile.TemporaryDirectory() as folder:
        before, after = os.path.join(folder, "a.onnx"), os.path.join(folder, "b.onnx")
        for name, model, inputs, rtol, atol in cases():
            if arguments.only not in name:
                continue
            forms = []
            for age, model in (("newest", model), ("oldest", at_oldest(model, inputs))):
                if model is not None:
                    forms += [
                        (f"{age}, as it is", model, inputs),
                        (f"{age}, with constants", with_constants(model, inputs, 1), inputs[:1]),
                        (f"{age}, of constants", with_copies(with_constants(model, inputs, 0)), []),
                    ]
            for form, model, fed in forms:
                if model is None:
                    continue
                onnx.save(model, before)
                try:
                    wanted = run(before, fed)
                    again = run(before, fed)
                except Exception:
                    continue
                if not agree(wanted, again, rtol, atol):
                    continue
                counts["run"] += 1
                if os.path.exists(after):
                    os.remove(after)
                command = [arguments.program, before, after, "--no-verify", "-q"]
                done = subprocess.run(command, capture_output=True, text=True, timeout=60)
                verdict, why = None, ""
                if done.returncode == 1 and "panicked" not in done.stderr:
                    verdict, why = "declined", done.stderr.strip()
                elif done.returncode != 0:
                    verdict, why = "crashed", f"exit {done.returncode}: {done.stderr.strip()[-300:]}"
                elif open(before, "rb").read() == open(after, "rb").read():
                    verdict = "unchanged"
                else:
                    try:
                        onnx.checker.check_model(onnx.load(before), full_check=False)
                        valid = True
                    except Exception:
                        valid = False
                    try:
                        if valid:
                            onnx.checker.check_model(onnx.load(after), full_check=False)
                        found = run(after, fed)
                        verdict = "simplified" if agree(wanted, found, rtol, atol) else "wrong"
                        if runs_precisely(before, fed):
                            run(after, fed, precise=True)
                    except Exception as error:
                        verdict, why = "wrong", f"it does not load: {str(error)[-300:]}"
                counts[verdict] += 1
                if verdict in ("unchanged", "simplified"):
                    data = model.SerializeToString()
                    for kind in {node.op_type for node in model.graph.node} - {"Constant", "Identity"}:
                        # What was simplified says more.
                        rank = (verdict == "unchanged", len(data), name)
                        best = sample.setdefault((kind, form.split(",")[0]), (rank, data))
                        if rank < best[0]:
                            sample[kind, form.split(",")[0]] = (rank, data)
                if verdict in ("declined", "wrong", "crashed"):
                    print(f"{verdict}: {name}, {form}: {why}", flush=True)
    if arguments.sample:
        os.makedirs(arguments.sample, exist_ok=True)
        for (kind, age), (_, data) in sorted(sample.items()):
            with open(os.path.join(arguments.sample, f"{kind}.{age}.onnx"), "wb") as file:
                file.write(data)
    for verdict in ("run", "unchanged", "simplified", "declined", "wrong", "crashed"):
        print(f"{verdict:<12}{counts[verdict]:>6}")
    sys.exit(1 if counts["wrong"] or counts["crashed"] or not counts["run"] else 0)


main()
