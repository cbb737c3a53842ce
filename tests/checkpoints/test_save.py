import dataclasses
import json
import os
import pickle
import resource
import subprocess
import sys
import unittest.mock

import jax
import numpy as np
import pytest

from vit_jax.checkpoints import save
from vit_jax.checkpoints.pretrained import Pretrained, load_pretrained
from vit_jax.checkpoints.save import save_pretrained
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.models import create_model

MODEL = {
    "architecture": "vit",
    "patch_size": 8,
    "hidden_size": 16,
    "num_layers": 2,
    "mlp_dim": 32,
    "num_heads": 4,
    "num_classes": 3,
    "classifier": "token",
    "representation_size": 0,
    "gelu": "erf",
    "layer_norm_epsilon": 1e-5,
    "position_embedding": "learned",
    "position_placement": "stem",
    "layer_scale": 0.0,
    "num_registers": 0,
    "mlp": "gelu",
    "distillation_token": False,
}


def make(preprocessing=Preprocessing(16, 0.875, "bicubic", True, (0.4,) * 3, (0.2,) * 3), **model):  # noqa: B008
    model = {**MODEL, **model}
    images = np.zeros((1, 16, 16, 3), np.float32)
    shapes = jax.eval_shape(create_model(model).init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)
    return Pretrained(params, model, preprocessing, ("a", "b", "c"), "sigmoid", "test")


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual.params, expected.params)
    assert dataclasses.replace(actual, params={}, source="") == dataclasses.replace(
        expected, params={}, source=""
    )


FORMATS = [
    ("official", "a.npz"),
    ("timm", "a.npz"),
    ("timm", "a.safetensors"),
    ("timm", "folder"),
    ("torchvision", "a.safetensors"),
    ("huggingface", "folder"),
]


@pytest.mark.parametrize(
    ("kind", "placement"), [("2d", "stem"), ("none", "stem"), ("relative", "stem"),
                            ("sincos2d", "layers"), ("learned", "shared")]
)  # fmt: skip
def test_other_positions_come_back_and_are_written_in_no_format_of_others(
    tmp_path, kind, placement
):
    pretrained = make(position_embedding=kind, position_placement=placement)
    save_pretrained(pretrained, tmp_path / "a.npz", "official")
    assert_same(load_pretrained(tmp_path / "a.npz"), pretrained)
    for format in ("timm", "torchvision", "huggingface"):
        with pytest.raises(UserError, match=f"the {format} format has learned position embeddings"):
            name = "b.safetensors" if format == "torchvision" else "b"
            save_pretrained(pretrained, tmp_path / name, format)


@pytest.mark.parametrize(("format", "name"), FORMATS)
def test_all_that_travels_with_the_weights_comes_back(tmp_path, format, name):
    pretrained = make()
    save_pretrained(pretrained, tmp_path / name, format)
    assert_same(load_pretrained(tmp_path / name), pretrained)


@pytest.mark.parametrize(("format", "name"), FORMATS)
def test_what_exists_is_not_replaced(tmp_path, format, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} exists already: remove it"):
        save_pretrained(make(), tmp_path / name, format)
    assert (tmp_path / name).read_text() == "mine"


def test_a_chain_of_formats_ends_with_the_same_bits(tmp_path):
    first = last = make()
    for format, name in [*FORMATS, *FORMATS[::-1]]:
        path = tmp_path / format / str(len(list(tmp_path.rglob("*")))) / name
        path.parent.mkdir(parents=True)
        save_pretrained(last, path, format)
        last = load_pretrained(path)
    assert_same(last, first)


@pytest.mark.parametrize(
    ("format", "name", "message"),
    [
        ("official", "a.safetensors", "a path in the official format ends in .npz"),
        ("official", "folder", "a path in the official format ends in .npz"),
        ("huggingface", "a.npz", "ends in no suffix, for a folder"),
        ("torchvision", "a.pth", "a path in the torchvision format ends in .safetensors"),
        ("torchvision", "a.npz", "a path in the torchvision format ends in .safetensors"),
    ],
)
def test_a_path_of_another_kind_is_refused(tmp_path, format, name, message):
    with pytest.raises(UserError, match=message):
        save_pretrained(make(), tmp_path / name, format)
    assert not list(tmp_path.iterdir())


# Transformers makes the gated width of two thirds of the other, rounded up to a multiple of 8:
# of 2 x 19 that is 25 of 25.3, of 4 x 18 it is 48 as it stands.
@pytest.mark.parametrize(("hidden_size", "mlp_dim", "ratio"), [(19, 32, 2), (18, 48, 4)])
def test_the_gated_width_of_dinov2_is_written_as_transformers_makes_it(
    tmp_path, hidden_size, mlp_dim, ratio
):
    sizes = {"hidden_size": hidden_size, "mlp_dim": mlp_dim, "num_heads": 1, "mlp": "swiglu"}
    pretrained = make(Preprocessing(16), **sizes, layer_scale=1.0, num_registers=2, num_classes=0)
    pretrained = dataclasses.replace(pretrained, class_names=None)
    save_pretrained(pretrained, tmp_path / "a", "huggingface")
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert (config["mlp_ratio"], config["use_swiglu_ffn"]) == (ratio, True)
    assert_same(load_pretrained(tmp_path / "a"), pretrained)


@pytest.mark.parametrize(
    ("format", "name", "options", "message"),
    [
        ("timm", "a.npz", {"representation_size": 8}, "timm's ViT has no hidden layer"),
        ("huggingface", "a", {"representation_size": 8}, "no hidden layer .pre_logits. before"),
        ("huggingface", "a", {"classifier": "gap"}, "has a class token: use --format"),
    ],
)
def test_what_a_format_has_no_place_for_is_refused_before_writing(
    tmp_path, format, name, options, message
):
    with pytest.raises(UserError, match=message):
        save_pretrained(make(**options), tmp_path / name, format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "only", "value"),
    [
        ("architecture", "'vit'", "hybrid"),
        ("classifier", "'token'", "gap"),
        ("classifier", "'token'", "map"),
        ("distillation_token", "False", True),
        ("layer_scale", "0.0", 0.1),
        ("mlp", "'gelu'", "swiglu"),
        ("num_registers", "0", 4),
    ],
)
def test_parts_that_torchvisions_vit_has_not_are_refused_before_writing(tmp_path, key, only, value):
    pretrained = make()
    pretrained = dataclasses.replace(pretrained, model=pretrained.model | {key: value})
    message = f"torchvision's ViT has {key} {only} alone, this model {value!r}: use another --form"
    with pytest.raises(UserError, match=message):
        save_pretrained(pretrained, tmp_path / "a.safetensors", "torchvision")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("view", "told"),
    [
        (Preprocessing("16x32", 0.875), "16 x 32 of 3"),
        (Preprocessing(16, 0.875).with_channels(1), "16 x 16 of 1"),
    ],
)
def test_images_that_torchvisions_vit_does_not_take_are_refused(tmp_path, view, told):
    with pytest.raises(UserError, match=f"square images of 3 channels, this model {told}: use"):
        save_pretrained(make(view), tmp_path / "a.safetensors", "torchvision")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("format", "name"), FORMATS)
def test_a_missing_folder_is_one_line_and_leaves_nothing(tmp_path, format, name):
    with pytest.raises(UserError, match="cannot be written"):
        save_pretrained(make(), tmp_path / "none" / name, format)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_there_before_it_is_whole(tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("disk full")

    monkeypatch.setattr("vit_jax.checkpoints.save.write_safetensors", fail)
    with pytest.raises(UserError, match="disk full"):
        save_pretrained(make(), tmp_path / "folder", "huggingface")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cause", ["disk", "interrupt"])
@pytest.mark.parametrize(("format", "name"), FORMATS)
def test_weights_that_cannot_be_written_leave_no_file_that_describes_others(
    tmp_path, monkeypatch, format, name, cause
):
    path = tmp_path / name
    if cause == "interrupt":
        stop = unittest.mock.Mock(side_effect=KeyboardInterrupt)
        monkeypatch.setattr(save, "write_safetensors", stop)
        monkeypatch.setattr(save, "_WRITERS", {".npz": stop, ".safetensors": stop})
        with pytest.raises(KeyboardInterrupt):
            save_pretrained(make(), path, format)
    else:
        _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, hard))  # The info file fits in.
        try:
            with pytest.raises(UserError) as error:
                save_pretrained(make(), path, format)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert str(error.value).startswith(f"{path}")
        assert ".tmp" not in str(error.value) and "cannot be written: " in str(error.value)
    assert not list(tmp_path.iterdir())


# Each format in a fork of one process, which has imported everything and computed nothing.
KILL = """
import os, pickle, signal, sys
import numpy as np, safetensors.numpy
from vit_jax.checkpoints.save import save_pretrained

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

np.lib.format.write_array = safetensors.numpy.save_file = kill
pretrained = pickle.load(sys.stdin.buffer)
for argument in sys.argv[1:]:
    format, path = argument.split("=")
    if not (child := os.fork()):
        save_pretrained(pretrained, path, format)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


def test_a_killed_writer_leaves_nothing_that_the_next_does_not_remove(tmp_path):
    pretrained = make()
    paths = {format: tmp_path / format / name for format, name in (FORMATS[0], FORMATS[-1])}
    for path in paths.values():
        path.parent.mkdir()
    arguments = [f"{format}={path}" for format, path in paths.items()]
    command = [sys.executable, "-c", KILL, *arguments]
    subprocess.run(command, input=pickle.dumps(pretrained), check=True)
    for format, path in paths.items():
        assert all(left.name.startswith(".") for left in path.parent.iterdir())
        save_pretrained(pretrained, path, format)
        assert_same(load_pretrained(path), pretrained)
        files = [path.name] + [f"{path.name}.json"] * ("." in path.name)
        assert sorted(os.listdir(path.parent)) == files


def test_an_info_file_of_other_weights_is_neither_used_nor_replaced(tmp_path):
    (tmp_path / "a.npz.json").write_text("{}")
    with pytest.raises(UserError, match="a.npz.json exists, of other weights: remove it"):
        save_pretrained(make(), tmp_path / "a.npz", "official")
    assert os.listdir(tmp_path) == ["a.npz.json"]
