"""A run on gray images, and what is for RGB alone."""

import io
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

import vit_jax
from vit_jax import initialization, train
from vit_jax.analysis import embeddings
from vit_jax.checkpoints.heads import replace_head
from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.config import check_config
from vit_jax.data import digits
from vit_jax.errors import UserError
from vit_jax.export.forward import make_forward
from vit_jax.models import create_model, describe, model_config
from vit_jax.preparation import prepare
from vit_jax.teacher import load_teacher


@pytest.fixture(scope="module")
def rgb(tmp_path_factory):
    """Random weights of a small ViT for RGB images of 8 x 8, as an official file."""
    rng = np.random.default_rng(0)
    model = {**model_config("ViT-Ti/4"), "hidden_size": 16, "num_layers": 1, "mlp_dim": 32}
    module = create_model({**model, "num_heads": 2, "num_classes": 10})
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)
    path = tmp_path_factory.mktemp("weights") / "rgb.npz"
    np.savez(path, **flatten_dict(params, sep="/"))
    return path


@pytest.fixture
def gray_config(tiny_config, rgb):
    def make(**overrides):
        options = {"init_from": str(rgb), "dataset.channels": 1, "model.representation_size": 0}
        return tiny_config(**{**options, "duration": "1 step", **overrides})

    return make


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "gray"


def test_a_run_on_gray_images_sees_them_as_they_are(gray_config, workdir, capsys):
    config = gray_config(**{"schedule.warmup": "0 steps", "ema_decay": 0.0})
    train.train(config, workdir)
    assert "the RGB channels of embedding/kernel" in capsys.readouterr().out
    vit = vit_jax.load(workdir)
    assert vit.preprocessing.channels == 1
    assert vit.params["embedding"]["kernel"].shape == (4, 4, 1, 16)
    pixels, _ = digits.load()
    model = create_model(vit.config)
    inputs = np.float32(pixels[:2, ..., None]) / 127.5 - 1
    expected = jax.jit(model.apply)({"params": vit.params}, inputs)
    np.testing.assert_allclose(vit.logits(pixels[:2, ..., None]), expected, atol=1e-5)
    buffer = io.BytesIO()
    Image.fromarray(pixels[0]).convert("RGB").save(buffer, "PNG")
    np.testing.assert_allclose(vit.logits(Image.open(buffer)), expected[:1], atol=1e-5)
    with pytest.raises(
        UserError, match=r"give a path, a PIL image, uint8 pixels .height, width, 1"
    ):
        vit.logits(np.repeat(pixels[:2, ..., None], 3, -1))
    assert embeddings.rgb_filters(vit.params).shape == (4, 4, 3, 16)
    forward = make_forward(vit.pretrained)
    assert forward.image_shape == (8, 8, 1)
    assert json.loads(forward.metadata["preprocessing"])["mean"] == [0.5]
    head = np.ones((16, 3), np.float32)
    probed = replace_head(vit.pretrained, head, np.zeros(3, np.float32), ("a", "b", "c"))
    np.testing.assert_array_equal(probed.params["head"]["kernel"], head)
    with pytest.raises(UserError, match="trained with 1: set --config.dataset.channels=1"):
        initialization.read_weights(
            gray_config(**{"init_from": str(workdir), "dataset.channels": 4})
        )


@pytest.mark.parametrize("channels", [1, 4])
def test_weights_of_rgb_are_summed_or_repeated(gray_config, rgb, channels, capsys):
    _, weights = initialization.read_weights(gray_config(**{"dataset.channels": channels}))
    kernel = load_pretrained(rgb).params["embedding"]["kernel"]
    expected = kernel.sum(2, keepdims=True)
    if channels == 4:
        expected = 0.75 * np.concatenate([kernel, kernel[:, :, :1]], axis=2)
    np.testing.assert_allclose(weights.params["embedding"]["kernel"], expected, rtol=1e-6)
    change = {1: "summed to 1", 4: "repeated to 4 and scaled by 3/4"}[channels]
    assert capsys.readouterr().out.startswith(
        f"the RGB channels of embedding/kernel of {rgb} are {change}"
    )


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"augment": "medium1"}, "RandAugment's operations are of RGB images"),
        (
            {"objective": "masked_patches", "model.representation_size": 0},
            "masked_patches predicts the colors of RGB images",
        ),
    ],
)
def test_what_is_of_rgb_is_refused_for_other_channels(tiny_config, overrides, message):
    check_config(tiny_config(augment="mixup(0.2)", **{"dataset.channels": 4}))
    with pytest.raises(UserError, match=message):
        check_config(tiny_config(**{"dataset.channels": 4}, **overrides))


@pytest.mark.parametrize("name", ["ViT-Ti/16", "R26+ViT-S/32", "R50x1", "AxialResNet50"])
def test_only_the_first_product_depends_on_the_channels(name):
    model = describe({**model_config(name), "num_classes": 10})
    one, three, four = (model.multiply_adds(224, channels) for channels in (1, 3, 4))
    assert three == model.multiply_adds(224)
    assert three - one == 2 * (four - three) > 0
    if name == "ViT-Ti/16":
        assert four - three == 14**2 * 16**2 * 192


def test_a_teacher_sees_images_of_the_same_channels(rgb):
    options = {"class_names": [], "image_size": 8, "dtype": "float32", "kind": "hard", "mesh": None}
    with pytest.raises(UserError, match="is for images of 3 channels and dataset.channels is 1"):
        load_teacher(str(rgb), channels=1, **options)


@pytest.fixture
def images(tmp_path):
    """Saves a folder of images of two classes, and returns its name."""

    def save(**modes):
        for split, mode in modes.items():
            for name in ("a", "b"):
                directory = tmp_path / "_".join(modes.values()) / split / name
                directory.mkdir(parents=True)
                for index in range(2):
                    Image.new(mode, (8, 8)).save(directory / f"{index}.png")
        return f"folder:{tmp_path}/{'_'.join(modes.values())}"

    return save


def test_a_folder_of_other_channels_is_refused_before_anything_is_computed(
    tiny_config, images, tmp_path
):
    four, other = images(train="RGBA", val="RGBA"), images(train="RGBA", val="RGB")
    for overrides, message in [
        ({"dataset.name": images(train="RGB", val="RGB")}, "^[^ ]*/train/./.*png has 3 channels"),
        ({"dataset.name": other}, r"config\.evals\.val: .*/val/./.*png has 3 channels, and 4 are"),
        ({"dataset.name": four, "evals.fewshot.dataset": other}, r"evals\.fewshot: .*/val/./"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare(tiny_config(**{"dataset.channels": 4, **overrides}), tmp_path / "run", None)
