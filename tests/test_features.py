"""Features of every patch from Python and by the command, against the model run by hand."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image
from safetensors import safe_open
from scipy.ndimage import zoom

import vit_jax
from vit_jax import features
from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.data.images import preprocess, read_image
from vit_jax.errors import UserError
from vit_jax.models import create_model

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
    """An official .npz of a ViT for images of 16 pixels, every parameter random."""
    rng = np.random.default_rng(0)
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)
    shapes = jax.eval_shape(create_model(MODEL).init, jax.random.key(0), images)["params"]
    flat = flatten_dict(shapes, sep="/")
    path = tmp_path_factory.mktemp("weights") / "tiny.npz"
    np.savez(path, **{name: rng.normal(0, 0.5, x.shape) for name, x in flat.items()})
    return path


@pytest.fixture(scope="module")
def vit(path):
    return vit_jax.load(path, batch_size=2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of three photographs of noise, of 24 x 36 pixels, and a file that is none."""
    rng, folder = np.random.default_rng(1), tmp_path_factory.mktemp("photos")
    for index in range(3):
        pixels = rng.integers(0, 256, (24, 36, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "none.png").write_text("no image")
    return folder


def files(photos):
    return [str(photos / f"{index}.png") for index in range(3)]


def test_features_at_a_height_and_a_width_are_those_of_the_model_by_hand(vit, path, photos):
    found = vit.dense_features(files(photos), layers=[1], image_size="13x20")
    assert found.grid.shape == found.on_grid(found.layers[1]).shape == (3, 3, 5, 12)
    assert (found.prefix, found.shape, found.pooled.shape) == (("class",), (3, 5), (3, 12))

    pretrained = load_pretrained(path)
    view = dataclasses.replace(pretrained.preprocessing, image_size="13x20")
    images = np.stack([preprocess(read_image(x), view) for x in files(photos)])
    params = flatten_dict(pretrained.params)
    name = ("Transformer", "posembed_input", "pos_embedding")
    of_class, patches = params[name][:, :1], params[name][0, 1:].reshape(4, 4, 12)
    patches = zoom(patches, (3 / 4, 5 / 4, 1), order=1).reshape(1, 15, 12)
    params[name] = np.concatenate([of_class, patches], axis=1)
    model = create_model(pretrained.model, num_classes=0)
    expected = jax.jit(model.apply)({"params": unflatten_dict(params)}, images[:, :12])
    np.testing.assert_allclose(found.pooled, expected, atol=1e-5)
    np.testing.assert_allclose(found.tokens[:, 0], expected, atol=1e-5)
    # Floats are taken as they are, of the same size.
    again = vit.dense_features(images, layers=[1], image_size="13x20")
    np.testing.assert_allclose(again.tokens, found.tokens, atol=1e-5)
    with pytest.raises(UserError, match=r"float32 \[n, 13, 20, 3\]"):
        vit.dense_features(images[:, :12], layers=[1], image_size="13x20")


def test_what_is_set_for_training_does_not_hide_the_layers(vit, path):
    images = np.zeros((1, 16, 16, 3), np.float32)
    scanned = vit_jax.load(path, scan_layers=True, remat="block")
    expected = vit.dense_features(images, layers=[1]).layers[1]
    np.testing.assert_array_equal(scanned.dense_features(images, [1]).layers[1], expected)
    with pytest.raises(UserError, match="layers is 1: give a list of numbers"):
        vit.dense_features(images, layers=1)


def test_the_weights_are_on_the_device_once_and_once_for_another_size(path):
    vit = vit_jax.load(path)
    own = [vit._extractor((n,), None)._params for n in (1, 2)]
    for size in (20, 24):
        last = vit._extractor((), size)
    kernels = [x["embedding"]["kernel"] for x in (vit._device_params, *own)]
    assert len({x.unsafe_buffer_pointer() for x in kernels}) == 1
    assert [x for x in vit._extractors.values() if not x.is_own_size] == [last]
    assert vit._extractor((1,), None)._params is own[0]


def test_at_a_side_the_pooled_features_are_those_of_evaluation(vit, path, photos):
    larger = vit_jax.load(path, image_size=24).features(files(photos))
    found = vit.dense_features(files(photos), image_size=24)
    np.testing.assert_allclose(found.pooled, larger, atol=1e-5)
    with pytest.raises(UserError, match="image_size is 0: it must be a whole number"):
        vit.dense_features(files(photos), image_size=0)


@pytest.mark.parametrize("suffix", features.SUFFIXES)
def test_the_command_writes_all_that_could_be_read(vit, path, photos, tmp_path, capsys, suffix):
    output = tmp_path / f"features{suffix}"
    flags = ["--checkpoint", str(path), "--output", str(output), "--layers", "1,2"]
    assert features.main([str(photos), *flags, "--image_size", "13x20", "--batch_size", "2"]) == 1
    assert "none.png is not an image" in capsys.readouterr().err
    if suffix == ".npz":
        arrays = dict(np.load(output))
        names = [arrays.pop(name).tolist() for name in ("files", "prefix_names")]
    else:
        with safe_open(output, "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            names = [json.loads(file.metadata()[name]) for name in ("files", "prefix_names")]
    expected = vit.dense_features(files(photos), layers=[1, 2], image_size="13x20")
    assert names == [files(photos), ["class"]]
    assert arrays.keys() == {
        *("pooled", "grid", "prefix"),
        *(f"layer_{n}/{part}" for n in (1, 2) for part in ("grid", "prefix")),
    }
    np.testing.assert_allclose(arrays["pooled"], expected.pooled, atol=1e-5)
    np.testing.assert_allclose(arrays["grid"], expected.grid, atol=1e-5)
    second = expected.layers[2]
    np.testing.assert_allclose(arrays["layer_2/grid"], expected.on_grid(second), atol=1e-5)
    np.testing.assert_allclose(arrays["layer_2/prefix"], second[:, :1], atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "x.csv"], "x.csv is no file that ends in .npz or .safetensors"),
        (["--output", "none/x.npz"], "none/x.npz is not in a folder that exists"),
        (
            ["--output", "x.npz", "--image_size", "3by4"],
            "'3by4': it must be a whole number from 1 to 10000, or two",
        ),
        (["--output", "x.npz", "--image_size", "2x16"], "2x16 is less than a patch: use 4 or more"),
        (["--output", "x.npz", "--layers", "3"], "layer 3 does not exist: name one from 1 to 2"),
        (["--output", "x.npz", "--layers", "0"], "'0' is not a whole number of at least 1"),
    ],
)
def test_a_mistake_is_told_before_any_image_is_read(path, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        features.main(["photo.jpg", "--checkpoint", str(path), *flags])
    assert not list(tmp_path.iterdir())
