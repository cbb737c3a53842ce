import json
import re
import sys

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.export.__main__ import main
from vit_jax.export.to_tf import can_serialize_graphs

for module in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(module, reason="needs the export extra: pip install -e '.[export]'")

TINY = {
    "architecture": "vit",
    "patch_size": 8,
    "hidden_size": 64,
    "num_layers": 1,
    "mlp_dim": 32,
    "num_heads": 1,
    "num_classes": 3,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An official .npz of a model of seconds."""
    import jax

    images = np.zeros((1, 16, 16, 3), np.float32)
    params = jax.jit(models.create_model(TINY).init)(jax.random.key(0), images)["params"]
    params["head"]["kernel"] = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    path = tmp_path_factory.mktemp("weights") / "tiny.npz"
    np.savez(path, **flatten_dict(params, sep="/"))
    return path


@pytest.fixture
def flags(checkpoint, tmp_path):
    fixed = ["--checkpoint", str(checkpoint), "--num_heads", "1", "--latency_seconds", "0.01"]
    return [*fixed, "--output", str(tmp_path / "out"), "--batch", "1:2:3"]


@pytest.fixture
def export(run, flags):
    """Runs the command on it."""
    return lambda *arguments: run([sys.executable, "-m", "vit_jax.export", *flags, *arguments])


@pytest.mark.usefixtures("need_jax2tf")
def test_every_stage_is_written_compared_and_timed(export, tmp_path):
    code, output = export("--precision", "fp16")
    assert code == 0, output
    out = tmp_path / "out"
    assert (out / "saved_model" / "saved_model.pb").is_file()
    assert (out / "model.onnx").is_file()
    assert (out / "deploy").is_dir()
    report = json.loads((out / "parity.json").read_text())
    names = [stage["name"] for stage in report["hops"]]
    assert names == ["SavedModel", "ONNX fp16", "ONNX fp16, emulated"]
    assert report["hops"][0]["relative_difference"] < 1e-5
    assert 1e-6 < report["hops"][1]["relative_difference"] < 1e-2
    assert [row["batch"] for row in report["hops"][1]["latency"]] == [1, 2, 3]
    assert 1e-6 < report["hops"][2]["relative_difference"] < 1e-2
    assert 0 < report["hops"][2]["largest"] < 65504 and "latency" not in report["hops"][2]
    assert "| ONNX fp16 |" in output


@pytest.mark.usefixtures("converter")
def test_without_flags_it_makes_what_this_environment_can(export, tmp_path):
    code, output = export()
    assert code == 0, output
    assert (tmp_path / "out" / "model.onnx").is_file()
    made = (tmp_path / "out" / "saved_model").exists()
    lines = [line for line in output.splitlines() if line.startswith("left out: the SavedModel")]
    assert made == can_serialize_graphs() and len(lines) == (not made)


def test_onnx_alone_goes_by_either_converter(flags, converter, tmp_path):
    arguments = ["--stages", "onnx", "--converter", converter, "--precision", "bf16"]
    arguments += ["--include_preprocessing", "--outputs", "probabilities"]
    assert main([*flags, *arguments]) == 0
    (stage,) = json.loads((tmp_path / "out" / "parity.json").read_text())["hops"]
    assert stage["name"] == "ONNX bf16, emulated"
    assert not (tmp_path / "out" / "saved_model").exists()


def test_accuracy_is_told_on_a_data_set_of_the_models_classes(flags, converter, tmp_path):
    for name in ("a", "b", "c"):
        for split in ("train", "test"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    arguments = [*flags, "--stages", "onnx", "--converter", converter]
    arguments += ["--dataset", f"folder:{tmp_path / 'data'}"]
    assert main(arguments) == 0
    (stage,) = json.loads((tmp_path / "out" / "parity.json").read_text())["hops"]
    # The same two photographs in every class: one of three is right.
    assert stage["accuracy"] == stage["reference_accuracy"] == pytest.approx(1 / 3)

    for split in ("train", "test"):
        (tmp_path / "data" / split / "c").rename(tmp_path / f"no longer in {split}")
    with pytest.raises(UserError, match="has 3 classes and the data set 2: use --data"):
        main(arguments)


def test_int8_takes_its_scales_from_other_photographs_than_it_is_compared_on(
    flags, converter, tmp_path
):
    (tmp_path / "photos").mkdir()
    for i in range(9):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    arguments = ["--stages", "onnx", "--converter", converter, "--precision", "int8"]
    assert main([*flags, *arguments, "--data", str(tmp_path / "photos")]) == 0
    (stage,) = json.loads((tmp_path / "out" / "parity.json").read_text())["hops"]
    assert stage["images"] == 5
    assert 1e-5 < stage["relative_difference"] < 0.3


def test_without_tensorrt_or_a_gpu_the_onnx_file_stays(flags, converter, tmp_path):
    try:
        main([*flags, "--stages", "onnx,tensorrt", "--converter", converter])
    except UserError as error:
        assert "TensorRT" in str(error) or "GPU" in str(error)
        assert "\n" not in str(error)
    else:
        pytest.skip("there are TensorRT and a GPU")
    assert (tmp_path / "out" / "model.onnx").is_file()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stages", "tf,trt"], "'trt' is none of tf, onnx, tensorrt"),
        (["--precision", "fp8"], "invalid choice: 'fp8'"),
        (["--batch", "8:1:2"], "batch '8:1:2' is not MIN <= OPT <= MAX"),
        (["--precision", "int8"], "add --data DIR"),
        (["--data", "/nowhere"], "--data /nowhere is not a directory"),
        (["--data", "/a", "--dataset", "digits"], "--data /a and --dataset digits: give one"),
        (["--dataset", "digits", "--outputs", "features"], "features have no accuracy"),
        (["--checkpoint", "/nowhere.npz"], "/nowhere.npz does not exist"),
        (["--image_size", "17"], "17 is not a multiple of"),
    ],
)
def test_a_mistake_is_told_in_one_line(flags, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        main([*flags, *arguments])
    assert "\n" not in str(error.value)


def test_the_checkpoint_is_asked_for(run, tmp_path):
    code, output = run([sys.executable, "-m", "vit_jax.export", "--output", str(tmp_path)])
    assert code == 2
    assert output == "error: --checkpoint is missing: only --stages tensorrt goes without\n"
