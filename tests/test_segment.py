"""The command that writes masks: where it writes, and its exit codes."""

import dataclasses
import os

import numpy as np
import pytest
from PIL import Image

from vit_jax import segment
from vit_jax.checkpoints import flags
from vit_jax.errors import UserError

from .segmenters import random_segmenter


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    pretrained = random_segmenter(["dark", "bright"])
    monkeypatch.setattr(flags, "load", lambda args: pretrained)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.jpg"):
        pixels = np.random.default_rng(1).integers(0, 256, (10, 12, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def run(*words):
    return segment.main(["--checkpoint", "random", *map(str, words)])


def contents(folder):
    return {x.relative_to(folder): x.read_bytes() for x in folder.rglob("*") if x.is_file()}


@pytest.mark.usefixtures("photos")
def test_weights_without_a_decoder_leave_no_folder(monkeypatch):
    weights = dataclasses.replace(random_segmenter(["dark", "bright"]), segmentation=None)
    monkeypatch.setattr(flags, "load", lambda args: weights)
    with pytest.raises(UserError, match="random tells no pixels apart"):
        run("photos", "--output", "masks")
    assert not os.path.exists("masks")


@pytest.mark.parametrize(
    "words",
    [
        ("photos", "--output", "photos"),
        ("photos/", "--output", "./photos/"),
        ("photos", "--output", "photos/masks"),
        ("photos/a.png", "--output", "photos"),
        ("photos/b.jpg", "--output", "photos"),
        (".", "--output", "masks"),
        ("link", "--output", "photos/masks"),
        ("photos", "--output", "link"),
        ("linked/c.png", "--output", "photos"),
        ("linked", "--output", "photos"),
    ],
)
def test_an_output_among_the_images_is_refused_before_anything_is_written(photos, words):
    os.symlink(photos, "link")
    os.mkdir("linked")
    os.symlink(photos / "a.png", "linked/c.png")
    before = contents(photos)
    with pytest.raises(UserError, match=r"^--output \S+ has images in it or lies among them \("):
        run(*words)
    assert contents(photos) == before and not os.path.exists("masks")
    assert not (photos / "masks").exists()


def test_every_image_gets_its_files_of_its_own_size(photos, tmp_path):
    before = contents(photos)
    assert run("photos", "--output", "masks") == 0
    assert contents(photos) == before
    names = {"a.png", "a.overlay.jpg", "b.png", "b.overlay.jpg"}
    assert {x.name for x in (tmp_path / "masks").iterdir()} == names
    for name in names:
        with Image.open(tmp_path / "masks" / name) as image:
            assert image.size == (12, 10)
    assert run("photos", "--output", "masks") == 0  # Masks of before are replaced.


def test_the_exit_code_says_how_many_images_could_be_read(photos, capsys):
    (photos / "c.jpg").write_bytes(b"nothing")
    assert run("photos", "--output", "masks") == 1
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "c.jpg is not an image" in told.err
    assert told.out.count("\n") == 2
    assert run("photos/c.jpg", "--output", "masks") == 2
