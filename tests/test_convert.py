import dataclasses
import math
import sys

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax import convert as command
from vit_jax.checkpoints import timm_config
from vit_jax.checkpoints.conversion import convert, reader_notes
from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.checkpoints.save import FORMATS
from vit_jax.data.protocols import evaluation, resized_sides
from vit_jax.errors import UserError
from vit_jax.image_size import of_sides
from vit_jax.train import train


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def finished(tiny_config, workdir):
    """A run of the digits, fine-tuned from another, so that its head is not zero."""
    if not (workdir / "metrics.json").exists():
        train(tiny_config(**{"model.representation_size": 0}), workdir)
    return load_pretrained(workdir)


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("official", "a.npz"),
        ("timm", "a"),
        ("torchvision", "a.safetensors"),
        ("huggingface", "a"),
    ],
)
def test_a_trained_run_goes_out_and_comes_back_with_its_head(tmp_path, finished, format, name):
    assert convert(finished, str(tmp_path / name), format) == (0.0, 0.0)
    again = load_pretrained(tmp_path / name)
    assert again.class_names == tuple("0123456789") and np.any(again.params["head"]["kernel"])
    for key, x in flatten_dict(finished.params).items():
        np.testing.assert_array_equal(flatten_dict(again.params)[key], x)


@pytest.mark.parametrize("protocol", ["big_vision", "transfer"])
def test_timm_is_told_to_resize_as_the_weights_saw_it(protocol):
    for size in [(x, y) for x in range(16, 513, 16) for y in range(16, 513, 32)]:
        view = evaluation(protocol, of_sides(*size))
        crop_pct = timm_config._pretrained_cfg(view, 10)["crop_pct"]
        by_timm = tuple(math.floor(x / crop_pct) for x in size)  # timm.data.create_transform
        assert timm_config.written_sides(view) == by_timm
        # A fraction that gives both sides is found by trying them all, if there is one.
        expected = tuple(round(x / view.center_crop) for x in size)
        tried = np.floor(np.array(size)[:, None] / np.linspace(0.7, 0.95, 4000)).T
        assert by_timm == expected or not (tried == expected).all(1).any()
    for size in ("96x128", "384x512", "384x640"):
        view = evaluation(protocol, size)
        assert timm_config.written_sides(view) == resized_sides(view)


def test_a_resize_that_timm_cannot_be_told_is_noted(finished):
    shown = dataclasses.replace(finished, preprocessing=evaluation("transfer", "16x32"))
    notes = [x for x in reader_notes(shown, "timm") if "crop_pct" in x]
    assert notes[0].startswith("timm resizes to 18 x 37 before it crops, these weights saw 19 x 37")


def test_what_torchvision_must_be_told_is_noted(finished):
    as_theirs = {"gelu": "erf", "layer_norm_epsilon": 1e-6}
    view = timm_config.torchvision_info({}, 224).preprocessing
    model = {**finished.model, **as_theirs}
    shown = dataclasses.replace(finished, model=model, preprocessing=view)
    assert reader_notes(shown, "torchvision") == []
    model = {"gelu": "tanh", "layer_norm_epsilon": 1e-5, "num_classes": 0}
    model, view = {**finished.model, **model}, evaluation("bit", 16)
    other = dataclasses.replace(finished, model=model, preprocessing=view)
    notes = reader_notes(other, "torchvision")
    told = ["GELU('tanh')", "eps=1e-05", "Identity", "(0.5, 0.5, 0.5)", "with PIL"]
    for note, part in zip(notes, told, strict=True):
        assert part in note and "torchvision" in note


def test_a_result_that_differs_is_not_called_converted(tmp_path, finished, monkeypatch):
    def forget_names(pretrained, path, format):
        import vit_jax.checkpoints.save as save

        save.save_pretrained(pretrained, path, format)
        (tmp_path / "a.npz.json").unlink()

    monkeypatch.setattr("vit_jax.checkpoints.conversion.save_pretrained", forget_names)
    with pytest.raises(UserError, match="is not what was converted .* do not use it"):
        convert(finished, str(tmp_path / "a.npz"), "official")


def test_the_command_proves_itself(tmp_path, finished, run):
    arguments = ["--from", finished.source, "--to", str(tmp_path / "hf"), "--format", "huggingface"]
    code, output = run([sys.executable, "-m", "vit_jax.convert", *arguments])
    assert code == 0
    assert "largest difference of any parameter: 0\n" in output
    assert "largest difference of the logits on 2 random images: 0\n" in output
    with pytest.raises(UserError, match="^[^\n]*exists already[^\n]*$"):
        command.main(arguments)


def test_the_command_offers_every_format():
    assert command.FORMATS == FORMATS
