"""What is exported of a run: the model that it evaluated, under its name."""

import re

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from vit_jax import models, train
from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.export.__main__ import main
from vit_jax.export.onnx_file import read_metadata

from ..runs import read_arrays

REASON = "needs the export extra: pip install -e '.[export]'"
onnxruntime = pytest.importorskip("onnxruntime", reason=REASON)


def test_a_run_with_adapters_is_exported_merged_and_named(
    tiny_config, tmp_path, finished, converter
):
    lora = {"lora.rank": 2, "lora.alpha": 6.0, "lora.targets": "query,value,mlp"}
    config = tiny_config(init_from=str(finished), duration="3 steps", **lora)
    train.train(config, tmp_path / "flowers")
    step, out = tmp_path / "flowers/checkpoints/3", tmp_path / "out"
    flags = ["--checkpoint", str(step), "--output", str(out), "--latency_seconds", "0.01"]
    assert main([*flags, "--stages", "onnx", "--converter", converter]) == 0
    path = out / "model.onnx"
    assert read_metadata(path)["source"] == "flowers/checkpoints/3"

    saved = read_arrays(tmp_path / "flowers", 3)
    arrays = {tuple(re.findall(r"'([^']+)'", name))[1:]: x
              for name, x in saved.items() if name.startswith("['ema_params']")}  # fmt: skip
    plain = {name: x for name, x in arrays.items() if name[0] != "lora"}
    merged = dict(plain)
    for _, *layer, part in arrays.keys() - plain.keys():
        if part == "a":
            a, b = arrays["lora", *layer, "a"], arrays["lora", *layer, "b"]
            merged[*layer, "kernel"] = plain[*layer, "kernel"] + (6 / 2 * a @ b).reshape(
                plain[*layer, "kernel"].shape
            )
    images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)
    apply = jax.jit(models.create_model(load_pretrained(step).model).apply)
    expected, other = (
        np.asarray(apply({"params": unflatten_dict(x)}, images)) for x in (merged, plain)
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(other - expected).max() > 1e-3
