"""The command that evaluates, on masks, with a model whose weights are random."""

import json

import numpy as np
import pytest
from PIL import Image

from vit_jax import evaluate
from vit_jax.checkpoints import flags
from vit_jax.errors import UserError

from .segmenters import random_segmenter


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    pretrained = random_segmenter(["sky", "road", "car"])
    monkeypatch.setattr(flags, "load", lambda args: pretrained)


@pytest.fixture
def streets(tmp_path):
    """Makes a folder of three images whose masks have each of so many classes."""

    def make(*names):
        folder = tmp_path / "streets"
        for kind in ("images", "masks"):
            (folder / "test" / kind).mkdir(parents=True, exist_ok=True)
        for index in range(3):
            mask = (np.arange(64).reshape(8, 8) + index) % len(names)
            pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"test/images/{index}.png")
            Image.fromarray(mask.astype(np.uint8)).save(folder / f"test/masks/{index}.png")
        (folder / "classes.txt").write_text("\n".join(names))
        return folder

    return make


def run(folder, *words):
    result = folder / "result.json"
    arguments = ["--checkpoint", "random", "--dataset", f"folder:{folder}"]
    assert evaluate.main([*arguments, "--json", str(result), *words]) == 0
    return json.loads(result.read_text())


def test_class_names_may_be_ignored_where_there_are_no_more_than_the_model_has(streets):
    named = run(streets("sky", "road", "car"))
    folder = streets("air", "street", "vehicle")
    with pytest.raises(UserError, match="class 0 of folder:.* is 'air', and random has 'sky'"):
        run(folder)
    assert run(folder, "--ignore_class_names") == named
    fewer = run(streets("air", "street"), "--ignore_class_names")
    assert fewer["examples"] == 3 and np.isfinite(fewer["loss"])


def test_more_classes_than_the_model_has_are_refused_whatever_they_are_called(streets):
    folder = streets("sky", "road", "car", "man")
    for words in ([], ["--ignore_class_names"]):
        with pytest.raises(UserError, match="folder:") as error:
            run(folder, *words)
        assert "not finite" not in str(error.value)
    assert "streets has 4 classes, and random 3: give masks without others" in str(error.value)


def test_a_few_images_go_at_a_time_unless_more_are_asked_for(streets, monkeypatch):
    sizes, original = [], evaluate._Checkpoint.batches

    def spy(self, source):
        sizes.append(self.batch_size)
        return original(self, source)

    monkeypatch.setattr(evaluate._Checkpoint, "batches", spy)
    folder = streets("sky", "road", "car")
    run(folder)
    run(folder, "--batch_size", "2")
    assert sizes == [8, 2]
