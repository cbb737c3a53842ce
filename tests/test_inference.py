"""A loaded model, compared with `load_pretrained` and `create_model` by hand."""

import re
import subprocess
import sys
import traceback

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

import vit_jax
from vit_jax.analysis.attention import rollout
from vit_jax.analysis.intermediates import attention_weights
from vit_jax.checkpoints.pretrained import abstract_params, load_pretrained
from vit_jax.data.images import preprocess, read_image
from vit_jax.errors import UserError
from vit_jax.models import create_model

SIZE = 16
MODEL = {
    "architecture": "vit",
    "patch_size": 4,
    "hidden_size": 12,
    "num_layers": 2,
    "mlp_dim": 16,
    "num_heads": 3,
    "num_classes": 7,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """An official .npz, every parameter random."""
    rng = np.random.default_rng(0)
    flat = {
        name: rng.normal(0, 0.5, x.shape).astype(np.float32)
        for name, x in flatten_dict(abstract_params(MODEL, SIZE), sep="/").items()
    }
    path = tmp_path_factory.mktemp("weights") / "tiny.npz"
    np.savez(path, **flat)
    return path


@pytest.fixture(scope="module")
def vit(path):
    return vit_jax.load(path, batch_size=4)


@pytest.fixture(scope="module")
def pixels():
    """Nine photographs of noise, uint8 [9, 20, 30, 3], smooth so that they differ."""
    rng = np.random.default_rng(1)
    small = rng.integers(0, 256, (9, 3, 3, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((30, 20))) for x in small])


@pytest.fixture
def folder(tmp_path, pixels):
    """The same as files in a folder, in this order."""
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    return tmp_path


def by_hand(path, pixels, **overrides):
    """What evaluation sees of the images, and the model with its parameters."""
    pretrained = load_pretrained(path)
    model = create_model({**pretrained.model, **overrides})
    images = np.stack([preprocess(image, pretrained.preprocessing) for image in pixels])
    return images, model, pretrained.params


def test_logits_are_those_of_the_model_by_hand(vit, path, pixels):
    images, model, params = by_hand(path, pixels)
    expected = jax.jit(model.apply)({"params": params}, images)
    logits = vit.logits(pixels)
    assert (logits.shape, logits.dtype) == ((9, 7), np.float32)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_every_form_of_an_image_gives_the_same(vit, path, pixels, folder):
    images, _, _ = by_hand(path, pixels)
    expected = vit.logits(pixels)
    files = [folder / f"{index}.png" for index in range(9)]
    pil = [Image.fromarray(image) for image in pixels]
    mixed = [files[0], pil[1], pixels[2], str(files[3]), *pil[4:]]
    for given in (
        folder,
        str(folder),
        files,
        pil,
        list(pixels),
        mixed,
        images,
        jax.numpy.array(images),
    ):
        np.testing.assert_allclose(vit.logits(given), expected, atol=1e-5)
    for given in (files[2], str(files[2]), pil[2], pixels[2], images[2:3]):
        np.testing.assert_allclose(vit.logits(given), expected[2:3], atol=1e-5)


def test_pil_images_are_seen_as_their_files_are(vit, tmp_path, pixels):
    modes = {"L": "png", "P": "png", "RGBA": "png", "1": "png", "CMYK": "jpg"}
    for mode, suffix in modes.items():
        file = tmp_path / f"{mode}.{suffix}"
        Image.fromarray(pixels[0]).convert(mode).save(file)
        np.testing.assert_allclose(vit.logits(Image.open(file)), vit.logits(file), atol=1e-5)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(pixels[0]).save(tmp_path / "turned.jpg", exif=exif)
    turned = Image.open(tmp_path / "turned.jpg")
    expected = vit.logits(read_image(tmp_path / "turned.jpg"))
    np.testing.assert_allclose(vit.logits(turned), expected, atol=1e-5)


def test_predictions_are_the_most_probable_classes(vit, pixels):
    logits = vit.logits(pixels).astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    predictions = vit.predict(pixels, topk=3)
    assert len(predictions) == 9
    for found, expected in zip(predictions, probabilities, strict=True):
        assert [each["index"] for each in found] == np.argsort(-expected)[:3].tolist()
        values = [each["probability"] for each in found]
        np.testing.assert_allclose(values, np.sort(expected)[:-4:-1], rtol=1e-6)
    assert [len(vit.predict(pixels[0], topk=k)[0]) for k in (1, 7, 99)] == [1, 7, 7]


def test_features_are_what_the_head_is_applied_to(vit, path, pixels):
    _, _, params = by_hand(path, pixels)
    features = vit.features(pixels)
    assert features.shape == (9, 12)
    logits = features @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(logits, vit.logits(pixels), atol=1e-4)


def test_attention_is_rollout_at_the_size_of_the_image(vit, path, pixels):
    images, model, params = by_hand(path, pixels)
    weights = rollout(attention_weights(model, params, images))
    maps = np.asarray(weights)[:, 0, 1:].reshape(9, 4, 4)
    maps = maps / maps.max((1, 2), keepdims=True)
    found = vit.attention(pixels)
    assert (found.shape, found.dtype) == ((9, SIZE, SIZE), np.float32)
    assert found.min() >= 0 and found.max() <= 1
    # Bilinear: in the corners, beyond the centers of the outer patches, there is one patch alone.
    for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        np.testing.assert_allclose(found[:, y, x], maps[:, y, x], atol=1e-5)
    # And midway between the centers of four patches, their mean.
    middle = found[:, 7:9, 7:9].mean((1, 2))
    np.testing.assert_allclose(middle, maps[:, 1:3, 1:3].mean((1, 2)), atol=1e-5)


def test_few_shapes_are_compiled(path, pixels):
    model = vit_jax.load(path, batch_size=4)
    for count in (1, 2, 3, 4, 5, 6, 7, 9):
        assert model.logits(pixels[:count]).shape == (count, 7)
    assert model._logits._cache_size() == 3  # batches of 1, 2 and 4


def test_overrides_are_those_of_load_pretrained(path, pixels):
    model = vit_jax.load(path, image_size=24, gelu="erf")
    assert model.preprocessing.image_size == 24
    assert model.config["gelu"] == "erf"
    assert model.attention(pixels[0]).shape == (1, 24, 24)
    model = vit_jax.load(path, image_size="16x24")
    assert model.attention(pixels[0]).shape == (1, 16, 24)
    images = np.stack([preprocess(image, model.preprocessing) for image in pixels[:1]])
    np.testing.assert_allclose(model.logits(images), model.logits(pixels[0]), atol=1e-5)
    assert "images of 16 x 24" in repr(model)
    with pytest.raises(UserError, match=r"preprocessed already as float32 \[n, 16, 24, 3\]"):
        model.logits(images.swapaxes(1, 2))


@pytest.mark.parametrize(
    ("name", "format"), [("a.npz", "official"), ("a", "timm"), ("b", "huggingface")]
)
def test_what_is_saved_is_loaded_again(vit, pixels, tmp_path, name, format):
    vit.save(tmp_path / name, format)
    again = vit_jax.load(tmp_path / name)
    np.testing.assert_array_equal(
        again.logits(pixels), vit_jax.load(tmp_path / name).logits(pixels)
    )
    np.testing.assert_allclose(again.logits(pixels), vit.logits(pixels), atol=1e-5)


def test_what_cannot_be_saved_is_one_line(vit, tmp_path):
    with pytest.raises(UserError, match="format 'keras' is unknown: use official, timm, torchv"):
        vit.save(tmp_path / "a", "keras")
    vit.save(tmp_path / "a.npz")
    with pytest.raises(UserError, match="exists already"):
        vit.save(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "there are no images: give a path"),
        (np.zeros((0, 20, 30, 3), np.uint8), "there are no images"),
        (np.zeros((20, 30), np.uint8), "an image is uint8 [20, 30]: give"),
        (np.zeros((3, 20, 30), np.uint8), "an image is uint8 [3, 20, 30]: give"),
        (np.zeros((20, 30, 4), np.uint8), "an image is uint8 [20, 30, 4]"),
        (np.zeros((20, 30, 3), np.int32), "an image is int32 [20, 30, 3]"),
        (np.zeros((SIZE, SIZE, 3), np.float32), "images are float32 [16, 16, 3]: give"),
        (np.zeros((1, 20, 30, 3), np.float32), "images are float32 [1, 20, 30, 3]"),
        (np.full((1, SIZE, SIZE, 3), 255.0), "images have values from 255 to 255, preprocessed"),
        (np.full((1, SIZE, SIZE, 3), np.nan), "images have values from nan to nan"),
        ([np.zeros((SIZE, SIZE, 3), np.float32)], "an image is float32 [16, 16, 3]"),
        ([np.zeros((2, 20, 30, 3), np.uint8)], "an image is uint8 [2, 20, 30, 3]"),
        ([3], "an image is of type int"),
        (3, "images are of type int"),
        ("absent.png", "absent.png cannot be opened"),
        (Image.new("F", (8, 8)), "a PIL image has mode F"),
        (Image.new("La", (8, 8)), "a PIL image has mode La: convert it to RGB"),
    ],
)
def test_what_could_be_misread_is_refused(vit, images, message):
    with pytest.raises(UserError, match=re.escape(message)):
        vit.predict(images)


def test_a_damaged_file_raises_and_an_empty_folder_too(vit, folder, tmp_path):
    (folder / "4.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="4.png is not an image"):
        vit.predict(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no image"):
        vit.logits(tmp_path / "empty")


def test_a_mistake_in_loading_is_shown_without_what_led_to_it(tmp_path):
    (tmp_path / "model.npz").write_bytes(b"PK no archive")
    with pytest.raises(UserError) as error:
        vit_jax.load(tmp_path / "model.npz")
    shown = "".join(traceback.format_exception(error.value))
    assert shown.count("Traceback") == 1 and "model.npz" in shown.splitlines()[-1]


def test_wrong_numbers_are_refused(vit, path, pixels):
    with pytest.raises(UserError, match="topk is 0: it must be at least 1"):
        vit.predict(pixels, topk=0)
    with pytest.raises(UserError, match="batch_size is 0: it must be at least 1"):
        vit_jax.load(path, batch_size=0)


def test_without_a_head_there_are_features_but_no_classes(path, pixels, tmp_path):
    with np.load(path) as flat:
        kept = {name: flat[name] for name in flat.files if not name.startswith("head/")}
    np.savez(tmp_path / "headless.npz", **kept)
    model = vit_jax.load(tmp_path / "headless.npz")
    assert model.features(pixels[0]).shape == (1, 12)
    with pytest.raises(UserError, match="has no head, so it knows no classes"):
        model.predict(pixels[0])


def test_it_says_what_it_is(vit, path):
    text = repr(vit)
    assert str(path) in text and "num_layers=2" in text and "images of 16 x 16" in text
    assert "\n" not in text
    assert vit.config["hidden_size"] == 12
    assert vit.class_names is None
    assert set(vit.params) >= {"embedding", "Transformer", "head"}


def test_the_package_has_the_few_names_that_a_user_needs():
    assert set(vit_jax.__all__) <= set(dir(vit_jax))
    assert vit_jax.create_model is create_model
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        vit_jax.laod  # noqa: B018


def test_it_imports_no_tensorflow_and_the_package_no_jax(path, folder):
    code = (
        "import sys, vit_jax; assert 'jax' not in sys.modules\n"
        f"assert len(vit_jax.load({str(path)!r}).predict({str(folder)!r})) == 9\n"
        "sys.exit(', '.join({'tensorflow', 'orbax', 'torch'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_attention_weights_of_a_single_image_ask_for_a_batch(vit):
    model = create_model(vit.config)
    with pytest.raises(UserError, match=r"images are \[16, 16, 3\]: give \[batch, "):
        attention_weights(model, vit.params, np.zeros((SIZE, SIZE, 3), np.float32))
