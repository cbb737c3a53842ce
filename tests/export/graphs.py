"""Small graphs for the tests of what is done to them, and how to run them."""

import numpy as np
import pytest

from vit_jax.export.precisions import PRECISIONS

REASON = "needs the export extra: pip install -e '.[export]'"
onnx = pytest.importorskip("onnx", reason=REASON)
ir = pytest.importorskip("onnx_ir", reason=REASON)
onnxruntime = pytest.importorskip("onnxruntime", reason=REASON)
to_onnx = pytest.importorskip("vit_jax.export.to_onnx", reason=REASON, exc_type=ImportError)

HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def run(model: ir.Model, images: np.ndarray, optimize: bool = True) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"images": images})[0]


def images(batch: int = 8) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((batch, 16, 16, 3), dtype=np.float32)


def half_model(forward, converter, kind):
    model = to_onnx.to_model(forward, converter)
    PRECISIONS[kind].apply(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model
