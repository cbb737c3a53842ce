"""The page that gathers the pictures, and where attention lies in an image as the model sees it."""

import hashlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vit_jax
from vit_jax.analysis import __main__ as command_line
from vit_jax.analysis import captions, intermediates
from vit_jax.analysis.curves import Curve, Panel
from vit_jax.analysis.output import Output
from vit_jax.errors import UserError

from ..webpages import HOSTILE, Page
from .test_main import MODEL, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Weights that say how an image becomes their 32 x 32 pixels: the central square of it."""
    path = write_checkpoint(tmp_path_factory.mktemp("weights") / "tiny.npz", MODEL, image_size=32)
    info = {"model": {"num_heads": 3}, "preprocessing": {"image_size": 32, "center_crop": 1.0}}
    path.with_name("tiny.npz.json").write_text(json.dumps(info))
    return path


@pytest.fixture
def photo(tmp_path):
    """A white square on black, whose place in the model's image is known to the pixel.

    Of 96 x 64 pixels the central 64 x 64 are shown in 32 x 32: x 48 to 64 becomes 16 to 24.
    """
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[16:32, 48:64] = 255
    path = tmp_path / "<img src=x onerror=alert(1)>.png"
    Image.fromarray(pixels).save(path)
    return path


def analyze(name, output, *arguments):
    flags = [name, "--output", output, "--dpi", "60", *arguments]
    return command_line.main(list(map(str, flags)))


def test_attention_lies_where_it_was_drawn_after_resize_and_crop(
    checkpoint, photo, tmp_path, monkeypatch
):
    def look_at_bright_patches(_model, _params, images):
        bright = images.mean(-1).reshape(-1, 4, 8, 4, 8).mean((2, 4)).reshape(-1, 16)
        bright = bright - bright.min(axis=-1, keepdims=True)
        bright = bright / bright.sum(axis=-1, keepdims=True)
        weights = jnp.tile(jnp.eye(17), (len(images), 1, 1)).at[:, 0, 0].set(0)
        weights = weights.at[:, 0, 1:].set(bright)
        return jnp.zeros((len(images), 7)), weights[:, None, None]

    figures = {}
    save = Output.save

    def keep(self, name, figure, **arrays):
        figures[name] = figure
        save(self, name, figure, **arrays)

    monkeypatch.setattr(intermediates, "logits_and_attention", look_at_bright_patches)
    monkeypatch.setattr(Output, "save", keep)
    flags = ("--checkpoint", checkpoint, "--images", photo)
    assert analyze("rollout", tmp_path / "out", *flags) == 0
    white = np.zeros((32, 32), bool)
    white[8:16, 16:24] = True  # Row 1, column 2 of the patches of 8 pixels.
    panels = [np.asarray(axes.images[0].get_array()) for axes in figures["rollout"].axes[:3]]
    pixels, heat, masked = panels
    np.testing.assert_array_equal(pixels.min(axis=-1) > 0.99, white)
    np.testing.assert_array_equal(pixels.max(axis=-1) > 0.01, white)
    np.testing.assert_array_equal(heat[..., 1] > 0.5, white)
    np.testing.assert_array_equal(masked.max(axis=-1) > 0, white)
    with np.load(tmp_path / "out/rollout.npz") as found:
        shares = np.zeros((4, 4))
        shares[1, 2] = 0.5  # The other half is the class token's own, by the residual connection.
        np.testing.assert_allclose(found["rollout"][0], shares, atol=1e-6)


def test_the_page_has_the_model_every_picture_and_the_predictions(checkpoint, photo, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": 5, "loss": 1.5, "learning_rate": 0.1}, {"step": 5, "eval_accuracy": 0.75}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    flags = ("--checkpoint", checkpoint, "--images", photo, "--run", run, "--html")
    assert analyze("all", tmp_path / "out", *flags) == 0
    path = tmp_path / "out/index.html"
    page, source = Page(path), path.read_text()
    vit = vit_jax.load(checkpoint)
    expected = vit.predict(str(photo))[0]
    for each in expected:
        assert f"class {each['index']} {each['probability']:.1%}" in page.text
    with np.load(checkpoint) as arrays:
        count = sum(x.size for x in arrays.values())
    for fact in (
        "tiny.npz: what it looks at and what it has learned",
        f"Parameters {count:,}",
        f"SHA-256 {hashlib.sha256(checkpoint.read_bytes()).hexdigest()}",
        "32 x 32 pixels",
        "accuracy 0.75",
        str(photo),
    ):
        assert fact in page.text
    # Rollout, heads, layers; filters, positions, distance, curves.
    assert len(page.all("svg")) == len(page.all("figcaption")) == 7
    assert page.text.count("Figure") >= 6
    assert not (page.all("script") + page.all("img") + page.all("link"))
    assert "http://" not in source.replace("http://www.w3.org/", "") and "https://" not in source
    assert "prefers-color-scheme: dark" in source


def test_more_images_than_have_a_place_are_counted(checkpoint, photo, tmp_path, monkeypatch):
    from vit_jax.analysis import page

    monkeypatch.setattr(page, "MOST_IMAGES", 1)
    flags = ("--checkpoint", checkpoint, "--images", photo, photo, photo, "--html")
    assert analyze("rollout", tmp_path / "out", *flags) == 0
    read = Page(tmp_path / "out/index.html")
    assert len(read.all("article")) == 1
    assert "2 more images have no place here" in read.text


def test_curves_need_no_weights_and_say_what_lacks(tmp_path):
    run = tmp_path / HOSTILE.replace("/", "")
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 5, "loss": 1.5}\n')
    assert analyze("curves", tmp_path / "out", "--run", run, "--html") == 0
    assert {x.name for x in (tmp_path / "out").iterdir()} == {
        *("curves.png", "curves.npz", "index.html")
    }
    with np.load(tmp_path / "out/curves.npz") as found:
        np.testing.assert_array_equal(found["loss_training"], [[5], [1.5]])
    assert not Page(tmp_path / "out/index.html").all("script")
    for name, flags, message in (
        ("curves", (), "curves are of a run: give its workdir with --run"),
        ("filters", (), "filters looks at a model: give it with --checkpoint"),
        ("curves", ("--run", run, "--smoothing", 1), "'1' is not a number from 0 to below 1"),
    ):
        with pytest.raises(UserError, match=message):
            analyze(name, tmp_path / "out", *flags)


def test_captions_have_the_numbers_of_their_pictures():
    attention = np.ones((4, 5))
    attention[2, 1] = attention[0, 4] = 9  # Two of 20 patches have half of 36.
    assert "the 2 patches of 16 x 16 pixels that are looked at most, of 20, have 50%" in (
        captions.of_rollout(attention, 16)
    )
    said = captions.of_distances(np.array([[4.0, 60.0], [70.0, 90.0]]), 80.0)
    assert "4 to 60 pixels in the first layer, 70 to 90 in the last; 1 of 4 heads" in said
    similarity = np.zeros((1, 3, 1, 3))
    similarity[0, 0, 0, 2] = similarity[0, 2, 0, 0] = 1
    # Four pairs of neighbors are unlike, and of the six pairs in the row two are the same.
    assert "0.00 of neighbors, 0.33 within a row or column" in captions.of_positions(similarity)
    panels = [Panel("accuracy", None, Curve(np.array([5.0, 9.0]), np.array([0.5, 0.75])))]
    assert "to step 9 with, in evaluation, accuracy 0.75; nothing" in captions.of_curves(panels, 0)
