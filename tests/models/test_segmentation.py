"""The linear decoder: against OpenCV and PyTorch, and the loss against PyTorch and NumPy."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.models.dense import dense_features
from vit_jax.models.segmentation import (
    HEAD,
    multiply_adds,
    pixel_scores,
    segmenter,
    upsample,
)

TINY = {
    "architecture": "vit",
    "patch_size": 4,
    "hidden_size": 16,
    "num_layers": 1,
    "mlp_dim": 32,
    "num_heads": 2,
    "num_classes": 5,
}
SIZES = [((3, 4), (12, 16)), ((3, 5), (7, 11)), ((2, 2), (28, 28)), ((1, 4), (14, 4))]


@pytest.mark.parametrize(("grid", "size"), SIZES)
def test_logits_are_enlarged_as_by_opencv(grid, size):
    x = np.random.default_rng(0).normal(size=(2, *grid, 6)).astype(np.float32)
    found = np.asarray(upsample(jnp.asarray(x), size))
    for image, enlarged in zip(x, found, strict=True):
        for channel in range(6):
            expected = cv2.resize(image[..., channel], size[::-1], interpolation=cv2.INTER_LINEAR)
            np.testing.assert_allclose(enlarged[..., channel], expected, atol=2e-6)


@pytest.mark.parametrize(("grid", "size"), SIZES)
def test_logits_are_enlarged_as_by_pytorch(grid, size):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(2, *grid, 6)).astype(np.float32)
    given = torch.from_numpy(x).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        given, size=size, mode="bilinear", align_corners=False
    )
    found = np.asarray(upsample(jnp.asarray(x), size))
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1).numpy(), atol=2e-6)


@pytest.mark.parametrize("extra", [{}, {"classifier": "gap"}, {"num_registers": 2}])
def test_the_decoder_is_a_linear_layer_on_the_patches(extra):
    trunk = create_model({**TINY, **extra})
    model, rng = segmenter(trunk), np.random.default_rng(0)
    images = rng.normal(size=(2, 8, 12, 3)).astype(np.float32)
    params = jax.device_get(model.init(jax.random.key(0), images)["params"])
    params[HEAD] = {
        "kernel": rng.normal(size=(16, 5)).astype(np.float32),
        "bias": rng.normal(size=5).astype(np.float32),
    }
    of_trunk = {name: x for name, x in params.items() if name != HEAD}
    _, tokens, _ = dense_features(trunk.without_head(), of_trunk, images)
    patches = np.asarray(tokens)[:, -6:].reshape(2, 2, 3, 16)
    logits = patches @ params[HEAD]["kernel"] + params[HEAD]["bias"]
    expected = [cv2.resize(x, (12, 8), interpolation=cv2.INTER_LINEAR) for x in logits]
    found = model.apply({"params": params}, images)
    assert found.shape == (2, 8, 12, 5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_every_class_is_as_probable_before_training():
    model, images = segmenter(create_model(TINY)), np.ones((1, 8, 8, 3), np.float32)
    params = model.init(jax.random.key(0), images)["params"]
    assert not np.asarray(model.apply({"params": params}, images)).any()


def test_its_multiply_adds_are_those_that_xla_counts():
    wide = {"patch_size": 8, "hidden_size": 64, "mlp_dim": 256, "num_classes": 20}
    model = segmenter(create_model({**TINY, **wide}))
    images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    cost = jax.jit(model.apply).lower(variables, images).cost_analysis()
    counted = 2 * 2 * multiply_adds(model, "64x96", 3)
    assert counted == pytest.approx(cost["flops"], rel=0.08)


def test_a_hybrid_has_a_decoder_on_the_positions_of_its_features():
    hybrid = {"architecture": "hybrid", "patch_size": 2, "resnet_layers": ()}
    trunk = create_model({**TINY, **hybrid})
    model, rng = segmenter(trunk), np.random.default_rng(0)
    images = rng.normal(size=(1, 32, 48, 3)).astype(np.float32)
    params = jax.device_get(model.init(jax.random.key(0), images)["params"])
    kernel = rng.normal(size=(16, 5)).astype(np.float32)
    params[HEAD] = {"kernel": kernel, "bias": np.zeros(5, np.float32)}
    of_trunk = {name: x for name, x in params.items() if name != HEAD}
    _, tokens, _ = dense_features(trunk.without_head(), of_trunk, images)
    rows, columns = trunk.config.grid(32, 48)
    patches = np.asarray(tokens)[0, -rows * columns :].reshape(rows, columns, 16)
    expected = cv2.resize(patches @ kernel, (48, 32), interpolation=cv2.INTER_LINEAR)
    found = model.apply({"params": params}, images)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-4)


def drawn():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 6, 7, 5)).astype(np.float32)
    labels = rng.integers(0, 5, (3, 6, 7)).astype(np.uint8)
    labels[0, :3] = 255
    labels[2] = 255
    return logits, labels


def test_the_loss_is_the_mean_over_the_pixels_that_count():
    logits, labels = drawn()
    found = jax.device_get(pixel_scores(jnp.asarray(logits), jnp.asarray(labels)))
    for index in range(2):
        there = labels[index] != 255
        x, y = logits[index][there].astype(np.float64), labels[index][there]
        losses = np.log(np.exp(x).sum(-1)) - x[np.arange(len(y)), y]
        assert found["loss"][index] == pytest.approx(losses.mean(), rel=1e-5)
        assert found["correct"][index] == pytest.approx((x.argmax(-1) == y).mean(), rel=1e-6)
    assert found["loss"][2] == found["correct"][2] == 0


def test_the_loss_of_an_image_is_that_of_pytorch():
    torch = pytest.importorskip("torch")
    logits, labels = drawn()
    found = pixel_scores(jnp.asarray(logits), jnp.asarray(labels))["loss"]
    for index in range(2):
        expected = torch.nn.functional.cross_entropy(
            torch.from_numpy(logits[index : index + 1]).permute(0, 3, 1, 2),
            torch.from_numpy(labels[index : index + 1].astype(np.int64)),
            ignore_index=255,
        )
        assert found[index] == pytest.approx(expected.item(), rel=1e-5)


def test_pixels_that_are_ignored_have_no_gradient():
    logits, labels = drawn()
    gradient = jax.grad(lambda x: pixel_scores(x, jnp.asarray(labels))["loss"].sum())(logits)
    assert not np.asarray(gradient)[labels == 255].any()
    assert np.asarray(gradient)[labels != 255].any(-1).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"classifier": "map"}, "model.classifier is 'map', but objective segmentation has no poo"),
        ({"num_classes": 256}, "model.num_classes is 256: masks have from 1 to 255 classes"),
        ({"num_classes": 0}, "model.num_classes is 0: masks have"),
    ],
)
def test_a_model_that_cannot_segment_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        segmenter(create_model({**TINY, **config}))


def test_a_resnet_has_no_patches_to_segment():
    resnet = {"architecture": "resnet", "resnet_layers": (1,), "width_factor": 1}
    with pytest.raises(UserError, match="objective segmentation is for ViTs and hybrids: a ResNet"):
        segmenter(create_model({**resnet, "num_classes": 3}))
