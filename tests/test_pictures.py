"""Pictures show what a model is trained on, what it looks at, and change nothing."""

import io
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit_jax import pictures, steps, train
from vit_jax.analysis.attention import on_patches, rollout, to_mask
from vit_jax.analysis.intermediates import attention_weights
from vit_jax.data.source import Source
from vit_jax.errors import UserError
from vit_jax.models.vit import ViTConfig
from vit_jax.pictures import check_pictures, words
from vit_jax.preparation import prepare, train_batches
from vit_jax.program import batch_mix
from vit_jax.sharding import to_devices
from vit_jax.state import TrainState, init_params

from .runs import assert_same_run

ALL = "inputs,attention,confusion"


def read_pictures(workdir):
    events = EventAccumulator(str(workdir), size_guidance={"images": 0})
    events.Reload()
    return {tag: events.Images(tag) for tag in events.Tags()["images"]}


def test_a_run_with_pictures_is_the_same_run(tiny_config, tmp_path, finished):
    run = tmp_path / "run"
    train.train(tiny_config(log_images=ALL), run)
    assert_same_run(finished, run, 6)
    found = read_pictures(run)
    assert {tag: [x.step for x in shown] for tag, shown in found.items()} == {
        "train/inputs": [1],
        "eval/attention": [4, 6],
        "eval/confusion": [4, 6],
    }
    for shown in found.values():
        for each in shown:
            picture = Image.open(io.BytesIO(each.encoded_image_string))
            assert picture.format == "PNG" and picture.size == (each.width, each.height)
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20
    # It alters nothing, so that a run may go on with or without them.
    assert train.train(tiny_config(), run)["step"] == 6


def test_inputs_are_what_a_step_trains_on(tiny_config, tmp_path):
    prepared = prepare(tiny_config(augment="mixup(0.5)"), tmp_path, None)
    batch = next(to_devices(train_batches(prepared, 0), prepared.mesh))
    seen = {}

    def objective(params, batch, *, train, rng):
        seen.update(batch, train=train, rng=rng)
        return {"loss": jnp.broadcast_to(params["x"], len(batch["image"]))}

    optimizer, params = optax.sgd(0.1), {"x": jnp.zeros(())}
    state = TrainState(jnp.int32(3), params, optimizer.init(params), None, jax.random.key(7))
    mix = batch_mix(prepared.config, prepared.model.config.num_classes)
    steps.train_step(state, batch, objective=objective, optimizer=optimizer, mix=mix)
    images, shares = pictures._seeing(prepared)(state.rng, 3, batch)
    assert images.shape == (18, 8, 8, 3)
    np.testing.assert_allclose(images, seen["image"][:18], atol=1e-6)
    np.testing.assert_allclose(shares, seen["targets"][:18], atol=1e-6)
    # The images are mixed indeed.
    assert np.abs(images - steps.pixels_to_inputs(batch["image"][:18])).max() > 0.1


def test_masks_are_those_of_the_attention_to_all_images_at_once(tiny_config, tmp_path):
    prepared = prepare(tiny_config(), tmp_path, None)
    images, labels = pictures._watched(prepared)
    assert len(images) == len(labels) == 6
    params = init_params(prepared.model, seed=1, image_size=8)
    masks, logits = pictures._looking(prepared)(params, images)
    weights = attention_weights(prepared.model, params, images)
    expected = to_mask(on_patches(rollout(weights), (2, 2)), (8, 8))
    np.testing.assert_allclose(masks, expected, atol=1e-5)
    expected = jax.jit(prepared.model.apply)({"params": params}, images)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("label", "text"),
    [
        (1, "dog"),
        (-1, "no label"),
        (7, "class 7"),
        (np.array([0.3, 0.7, 0.0]), "dog 70%, cat 30%"),
        (np.array([1, 0, 1]), "cat, bird"),
        (np.array([0, 0, 0]), ""),
    ],
)
def test_a_label_in_words(label, text):
    assert words(label, ["cat", "dog", "bird"]) == text
    assert words(label, None) == ""


def labeled(*labels):
    return Source("own", "test", ("cat", "dog"), 0, [{"label": label} for label in labels])


@pytest.mark.parametrize(
    ("log_images", "changes", "message"),
    [
        ("attention", {"model": SimpleNamespace(config=None)}, "attention, but the model has no a"),
        ("inputs,confusion", {"class_names": None}, "confusion, but the objective predicts no cl"),
        (
            "confusion",
            {"train_source": SimpleNamespace(multi_label=True)},
            "config.log_images asks for confusion, but an image has several labels: leave conf",
        ),
        ("confusion", {"eval_source": labeled(0, -1)}, "confusion, but images of evaluation have"),
    ],
)
def test_a_picture_that_a_run_cannot_have_is_told_in_a_line(log_images, changes, message):
    run = {
        "config": SimpleNamespace(log_images=log_images),
        "model": SimpleNamespace(config=ViTConfig.__new__(ViTConfig)),
        "class_names": ["cat", "dog"],
        "train_source": SimpleNamespace(multi_label=False),
        "eval_source": labeled(0, 1),
    }
    assert check_pictures(SimpleNamespace(**run)) == set(log_images.split(","))
    with pytest.raises(UserError, match=message):
        check_pictures(SimpleNamespace(**run | changes))
