"""ViT-B/16 in float32 on the CPU: our ONNX file beside what else one would deploy.

    python benchmarks/onnx_cpu.py --output onnx_cpu.json

Candidates, where their packages are installed, all under onnxruntime but the last: ours; the same
Flax model by jax2tf and tf2onnx as they come, with a free batch dimension; timm's model by
`torch.onnx.export`; the same Flax model by jax2onnx as it comes; Flax itself under jax.jit. Weights
are random: times do not depend on them. The candidates take turns call by call, so that whatever
else the machine does falls on all of them alike.
"""

import argparse
import collections
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import resource
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

with contextlib.suppress(ImportError):
    # timm imports it, which ends the process where TensorFlow has been loaded before.
    import triton  # noqa: F401

import jax
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from vit_jax import models, tensorflow_env
from vit_jax.checkpoints.pretrained import Pretrained, abstract_params
from vit_jax.data.protocols import Preprocessing
from vit_jax.export import to_onnx
from vit_jax.export.forward import Forward, make_forward
from vit_jax.export.to_tf import can_serialize_graphs, tf_function

Predict = Callable[[np.ndarray], np.ndarray]


def random_forward(name: str, **overrides: Any) -> Forward:
    """A model of the paper with random weights, ready to be exported."""
    config = {**models.model_config(name), "num_classes": 1000, "gelu": "erf", **overrides}
    generator = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: generator.standard_normal(leaf.shape, dtype=np.float32) * np.float32(0.02),
        abstract_params(config, 224),
    )
    pretrained = Pretrained(params, config, Preprocessing(224), None, "softmax", "random weights")
    return make_forward(pretrained)


def ours(forward: Forward, directory: Path) -> Path:
    """This project's file, by the converter that this JAX can use."""
    converter = "jax2tf" if can_serialize_graphs() else "jax2onnx"
    return to_onnx.save(to_onnx.to_model(forward, converter), directory)


def stock_tf2onnx(forward: Forward, directory: Path) -> Path | None:
    """The batch free, and what tf2onnx makes of it.

    The weights are bound to the graph afterwards, and what is computed of them alone is folded:
    with the weights as constants tf2onnx takes more than 18 GB of memory for ViT-B/16.
    """
    if not can_serialize_graphs():
        return None
    import tensorflow as tf
    import tf2onnx

    weights = forward.flat_params()
    proto, _ = tf2onnx.convert.from_function(
        tf.function(tf_function(forward, free_batch=True), autograph=False),
        input_signature=[
            tf.TensorSpec((None, *forward.image_shape), tf.float32, name="images"),
            *(tf.TensorSpec(weight.shape, tf.float32) for weight in weights.values()),
        ],
        opset=to_onnx.OPSET,
    )
    model = ir.from_proto(proto)
    for value, weight in zip(list(model.graph.inputs)[1:], weights.values(), strict=True):
        model.graph.inputs.remove(value)
        value.const_value = ir.Tensor(weight, name=value.name)
        model.graph.register_initializer(value)
    optimizer.fold_constants(model, input_size_limit=sys.maxsize, output_size_limit=sys.maxsize)
    passes.RemoveUnusedNodesPass()(model)
    path = directory / "tf2onnx.onnx"
    ir.save(model, path)
    return path


def stock_jax2onnx(forward: Forward, directory: Path) -> Path | None:
    """The weights as constants, the batch free, and what jax2onnx makes of it."""
    try:
        import jax2onnx
    except ImportError:
        return None
    path = directory / "jax2onnx.onnx"
    model = jax2onnx.to_onnx(
        lambda images: forward.apply(forward.params, images),
        [("batch", *forward.image_shape)],
        opset=to_onnx.OPSET,
    )
    onnx.save(model, path)
    return path


def timm_torch(name: str, directory: Path, **options: Any) -> Path | None:
    """The model of timm, its attention written out (the smaller graph), by torch.onnx.export."""
    try:
        import timm
        import torch
    except ImportError:
        return None
    timm.layers.set_fused_attn(False)
    size, patch = name.removeprefix("ViT-").split("/")
    names = {"Ti": "tiny", "S": "small", "B": "base", "L": "large"}
    model = timm.create_model(f"vit_{names[size]}_patch{patch}_224", **options).eval()
    path = directory / "timm.onnx"
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            model,
            (torch.zeros(2, 3, 224, 224),),
            path,
            dynamo=True,
            opset_version=18,  # Later ones have a Gelu operator, which TensorRT 8.6 does not know.
            input_names=["images"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    return path


def session(path: Path) -> Predict:
    """Loads a file with the defaults of onnxruntime; NCHW images for the model that wants them."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    loaded = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (images,) = loaded.get_inputs()
    channels_first = images.shape[1] == 3

    def predict(x: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if channels_first else x
        return loaded.run(None, {images.name: x})[0]

    return predict


def check_agreement(candidates: dict[str, Predict], images: np.ndarray) -> None:
    """Raises AssertionError if a candidate with Flax's weights has other logits than Flax."""
    expected = candidates["Flax, jax.jit"](images)
    for name, predict in candidates.items():
        if not name.startswith("timm"):
            error = np.abs(predict(images) - expected).max() / np.abs(expected).max()
            assert error < 1e-4, f"{name}: logits differ by {error:.1e} relative"


def time_in_turns(
    candidates: dict[str, Predict], images: np.ndarray, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each call; every candidate is called twice before."""
    for predict in candidates.values():
        predict(images)
        predict(images)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, predict in candidates.items():
            start = time.perf_counter()
            predict(images)
            times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Exports, times and prints."""
    tensorflow_env.quiet()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B/16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15, help="calls of each, per batch size")
    parser.add_argument("--output", help="where to write the numbers as JSON")
    args = parser.parse_args()

    warnings.simplefilter("ignore")
    forward = random_forward(args.model)
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "model": args.model,
        "rounds": args.rounds,
        "candidates": {},
    }
    predict: dict[str, Predict] = {}
    with tempfile.TemporaryDirectory() as temporary:
        exports = {
            "ours": lambda directory: ours(forward, directory),
            "stock tf2onnx": lambda directory: stock_tf2onnx(forward, directory),
            "stock jax2onnx": lambda directory: stock_jax2onnx(forward, directory),
            "timm, torch.onnx.export": lambda directory: timm_torch(args.model, directory),
        }
        for name, export in exports.items():
            start = time.perf_counter()
            path = export(Path(temporary))
            if path is None:
                continue
            seconds = time.perf_counter() - start
            nodes = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            report["candidates"][name] = {
                "nodes": len(nodes),
                "operators": dict(collections.Counter(nodes).most_common()),
                "export_seconds": seconds,
                "peak_gib_so_far": peak,
            }
            print(f"{name}: {len(nodes)} nodes, exported in {seconds:.0f} s", flush=True)
            predict[name] = session(path)
        predict["Flax, jax.jit"] = forward.jitted()
        report["candidates"]["Flax, jax.jit"] = {}
        generator = np.random.default_rng(1)
        for batch in args.batch:
            images = generator.standard_normal((batch, 224, 224, 3), dtype=np.float32)
            check_agreement(predict, images)
            for name, times in time_in_turns(predict, images, args.rounds).items():
                report["candidates"][name][f"batch {batch}"] = {
                    "median_ms": 1e3 * float(np.median(times)),
                    "min_ms": 1e3 * min(times),
                }
    print(table(report, args.batch))
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """What the numbers were taken with."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    packages = ("jax", "flax", "onnxruntime", "tf2onnx", "jax2onnx", "timm", "torch")
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"cpu": name or platform.machine(), "cores": os.cpu_count(), "versions": versions}


def table(report: dict[str, Any], batches: list[int]) -> str:
    """Nodes, median times and how many times slower than ours, in Markdown."""
    lines = ["| | nodes | " + " | ".join(f"batch {b}, ms | ratio" for b in batches) + " |"]
    lines.append("|-|-|" + "-|-|" * len(batches))
    for name, row in report["candidates"].items():
        cells = [name, str(row.get("nodes", ""))]
        for batch in batches:
            times = [
                each[f"batch {batch}"]["median_ms"] for each in (row, report["candidates"]["ours"])
            ]
            cells += [f"{times[0]:.0f}", f"{times[0] / times[1]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
