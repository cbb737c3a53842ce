import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from vit_jax import models
from vit_jax.checkpoints.pretrained import Pretrained
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.export import to_tensorrt
from vit_jax.export.__main__ import build_parser
from vit_jax.export.build_commands import trtexec_command
from vit_jax.export.onnx_file import read_onnx
from vit_jax.export.precisions import PRECISIONS, Precision, Tolerance, detect, thresholds
from vit_jax.export.profiles import parse_batch

from . import fake_tensorrt


def test_the_thresholds_are_those_that_reports_have_always_had():
    assert thresholds() == {
        "fp32": {"relative_difference": 1e-5, "cosine": 0.99999, "top1_agreement": 0.999},
        "fp32 engine": {"relative_difference": 1e-4, "cosine": 0.9999, "top1_agreement": 0.999},
        "fp32 tokens": {"relative_difference": 1e-4, "cosine": 0.9999, "top1_agreement": 0.999},
        "fp16": {"relative_difference": 1e-2, "cosine": 0.999, "top1_agreement": 0.995},
        "bf16": {"relative_difference": 1e-1, "cosine": 0.99, "top1_agreement": 0.97},
        "int8": {"relative_difference": 1.0, "cosine": 0.9, "top1_agreement": 0.8},
    }
    for row in PRECISIONS.values():
        assert {row.limits(of) for of in ("", "engine", "tokens")} <= thresholds().keys()


def test_the_largest_number_of_fp16_is_numpys():
    assert PRECISIONS["fp16"].largest == np.finfo("float16").max
    onnx = pytest.importorskip("onnx", reason="needs the export extra", exc_type=ImportError)
    for row in PRECISIONS.values():
        if row.dtype:
            number = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}[row.dtype]
            assert row.onnx_type == onnx.TensorProto.DataType.Value(number)


@pytest.mark.parametrize(
    "stated, weights, operators, found",
    [
        (None, {}, [], "fp32"),
        (None, {"fp32": 3, "fp16": 5}, [], "fp16"),
        ("fp16", {"fp32": 5, "fp16": 3}, [], "fp32"),  # By the weights, whatever it says.
        ("fp32", {"fp32": 5}, ["QuantizeLinear"], "int8"),  # It was quantized after its export.
        ("toy", {"fp32": 5}, ["MatMul"], "toy"),
        ("toy", {"fp32": 5}, ["DequantizeLinear"], "int8"),
        ("q4", {"fp32": 5}, ["DequantizeLinear"], "q4"),
        ("unheard of", {"fp32": 5}, [], "fp32"),
    ],
)
def test_a_files_precision_is_told_by_operators_then_weights(
    monkeypatch, stated, weights, operators, found
):
    loose = Tolerance(1.0, 0.5, 0.5)
    monkeypatch.setitem(PRECISIONS, "toy", Precision("toy", loose))
    quantized = PRECISIONS["int8"].operators
    monkeypatch.setitem(PRECISIONS, "q4", Precision("q4", loose, operators=quantized))
    assert detect(stated, weights, operators) == found


def test_the_table_needs_nothing_but_the_standard_library():
    code = (
        "import sys, vit_jax.export.precisions\n"
        "names = 'jax tensorflow onnx onnx_ir numpy tensorrt'.split()\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def to_toy(model, _images):
    """Weights with 10 bits of mantissa, as tf32 has them, in float32."""
    import onnx_ir as ir

    for value in model.graph.initializers.values():
        array = value.const_value.numpy()
        if array.dtype == np.float32:
            bits = array.view(np.uint32) + np.uint32(1 << 12) & np.uint32(~0x1FFF & 0xFFFFFFFF)
            value.const_value = ir.Tensor(bits.view(np.float32), name=value.name)
    return model


TINY = {
    "architecture": "vit",
    "patch_size": 8,
    "hidden_size": 32,
    "num_layers": 1,
    "mlp_dim": 64,
    "num_heads": 2,
    "num_classes": 5,
}
TOY = Precision(
    "toy",
    cast=to_toy,
    tolerance=Tolerance(relative_difference=5e-3, cosine=0.9999, top1_agreement=0.99),
    builder_flags=("TF32",),
    trtexec_flags=("--best",),
)


def test_one_row_is_all_that_a_new_precision_needs(converter, monkeypatch, tmp_path):
    """From the flag to the file, the comparison, the builder and the commands of deploy."""
    monkeypatch.setitem(PRECISIONS, "toy", TOY)
    flags = ["--output", str(tmp_path), "--precision", "toy"]
    assert build_parser().parse_args(flags).precision == "toy"

    from vit_jax.export.pipeline import Export

    images = np.zeros((1, 16, 16, 3), np.float32)
    params = jax.jit(models.create_model(TINY).init)(jax.random.key(0), images)["params"]
    params["head"]["kernel"] = np.random.default_rng(0).normal(size=(32, 5)).astype(np.float32)
    preprocessing = Preprocessing(image_size=16)
    export = Export(tmp_path, precision=PRECISIONS["toy"], batch="1:2:4", latency_seconds=0)
    export.convert(
        Pretrained(params, TINY, preprocessing, None, "softmax", "random"),
        stages=["onnx"],
        converter=converter,
    )
    assert export.failures == []
    report = json.loads((tmp_path / "parity.json").read_text())
    (stage,) = report["hops"]
    assert (stage["name"], stage["precision"]) == ("ONNX toy", "toy")
    # 10 bits of mantissa were kept, not 24.
    assert 1e-6 < stage["relative_difference"] < 5e-3
    assert report["thresholds"]["toy"] == dataclasses.asdict(TOY.tolerance)

    onnx = read_onnx(tmp_path / "model.onnx")
    assert onnx.precision == onnx.metadata["precision"] == "toy"
    assert "--best" in trtexec_command("8.6.0", onnx, parse_batch("1"), {})
    trt = fake_tensorrt.install(monkeypatch, "8.6.0")
    assert to_tensorrt.build(onnx.path, tmp_path / "engine", tf32=True)["precision"] == "toy"
    (flags,) = [call[1] for call in trt.calls if call[0] == "Builder.flags"]
    assert flags == {"TF32"}


def test_a_precision_that_is_not_in_the_table_is_refused(tmp_path):
    with pytest.raises(UserError, match="invalid choice: 'toy'.*fp32.*fp16.*bf16.*int8"):
        build_parser().parse_args(["--output", str(tmp_path), "--precision", "toy"])
