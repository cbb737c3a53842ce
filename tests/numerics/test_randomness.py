"""What is random has its rates and keeps its means, and is a function of seed and place alone.

More of this lies where each part is tested: the bits of dropout in tests/models/test_dropout.py,
the rates of stochastic depth over the layers in test_stochastic_depth.py, the shares of masked
patches in test_masked.py, mixup's share in tests/test_steps.py, the crops' distribution in
tests/data/test_preprocess.py. That losses are the same over 1, 2, 4 and 8 devices and 1 and 2
processes is in tests/test_train_devices.py, that a run which stopped goes on with the same bits in
tests/test_train.py.
"""

import collections
import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest

from vit_jax.data.pipeline import train_batches
from vit_jax.mixing import mixup
from vit_jax.models import create_model
from vit_jax.models.dropout import Dropout
from vit_jax.models.masked import draw_corruption

from ..sources import tiny_source


def is_share(found, rate, count):
    """Whether a share of so many draws is within four standard errors of its rate."""
    return abs(found - rate) <= 4 * np.sqrt(rate * (1 - rate) / count)


def test_every_dropout_of_a_model_has_its_rate_and_keeps_the_mean():
    model = create_model(
        {
            "architecture": "vit", "patch_size": 2, "hidden_size": 64, "num_layers": 2,
            "mlp_dim": 128, "num_heads": 4, "num_classes": 5, "remat": "nothing",
        },
        dropout_rate=0.3, attention_dropout_rate=0.2,
    )  # fmt: skip
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (8, 16, 16, 3)).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)

    @jax.jit
    def dropouts(params, key):
        """What goes into every dropout and comes out of it, by their rates."""
        found = collections.defaultdict(list)

        def record(call, args, kwargs, context):
            y = call(*args, **kwargs)
            if isinstance(context.module, Dropout) and context.method_name == "__call__":
                found[context.module.rate].append((args[0], y))
            return y

        with nn.intercept_methods(record):
            model.apply(params, images, train=True, rngs={"dropout": key})
        return dict(found)

    found = jax.device_get(dropouts(params, jax.random.key(2)))
    # After the positions; in each layer after the attention, in the MLP and after it; the weights.
    assert {rate: len(calls) for rate, calls in found.items()} == {0.3: 1 + 2 * 3, 0.2: 2}
    for rate, calls in found.items():
        for x, y in calls:
            kept = y != 0
            assert is_share(1 - kept.mean(), rate, x.size)
            np.testing.assert_allclose(y[kept], x[kept] / (1 - rate), rtol=1e-4)
            # The mean of y is that of x, with the error that the draws leave.
            error = np.sqrt(rate / (1 - rate) * np.square(x, dtype=np.float64).sum())
            assert abs(float((y - x).sum(dtype=np.float64))) <= 4 * error


@pytest.mark.parametrize("rate", [0.15, 0.5])
def test_every_patch_is_corrupted_at_the_rate(rate):
    batch, patches = 4000, 60
    corruption = draw_corruption(jax.random.key(3), batch, patches, rate)
    times = np.bincount(np.asarray(corruption.chosen).ravel(), minlength=patches)
    assert times.sum() == batch * round(rate * patches)
    assert all(is_share(count / batch, rate, batch) for count in times)


def test_mixup_keeps_the_mean_of_images_and_of_classes():
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.uniform(-1, 1, (32, 4, 4, 3)).astype(np.float32),
        "label": rng.integers(0, 5, 32).astype(np.int32),
    }
    mix = jax.jit(lambda key: mixup(key, batch, 0.5, 5))
    for seed in range(5):
        mixed = jax.device_get(mix(jax.random.key(seed)))
        assert np.abs(mixed["image"] - batch["image"]).max() > 1e-3
        np.testing.assert_allclose(mixed["image"].mean(0), batch["image"].mean(0), atol=1e-6)
        shares = np.bincount(batch["label"], minlength=5) / 32
        np.testing.assert_allclose(mixed["targets"].mean(0), shares, atol=1e-6)
        again = mix(jax.random.key(seed))
        np.testing.assert_array_equal(again["image"], mixed["image"])


COUNT, BATCH = 20, 8  # An epoch is two batches and a half.
OPTIONS = {
    "batch_size": BATCH,
    "image_size": 12,
    "protocol": "inception",
    "random_crop": True,
    "random_flip": True,
    "num_operations": 2,
    "magnitude": 15,
}


@pytest.fixture(scope="module")
def source():
    return tiny_source([1] * COUNT, size=24)[0]  # The label is the image's number.


def views(source, seed=0, first_step=0, steps=8, processes=1, workers=0):
    """The view of every image in every epoch that some batches have."""
    found = {}
    for process in range(processes):
        batches = train_batches(
            source, seed=seed, first_step=first_step, workers=workers,
            process_index=process, process_count=processes, **OPTIONS,
        )  # fmt: skip
        for step, batch in enumerate(itertools.islice(batches, steps - first_step), first_step):
            rows = BATCH // processes
            for row in range(rows):
                epoch = (step * BATCH + process * rows + row) // COUNT
                found[epoch, int(batch["label"][row])] = batch["image"][row].tobytes()
        batches.close()
    return found


@pytest.fixture(scope="module")
def alone(source):
    return views(source)


@pytest.mark.parametrize(
    ("processes", "workers", "first_step"),
    [(1, 0, 3), (2, 0, 0), (2, 0, 3), (4, 0, 3), (1, 2, 3), (2, 1, 0)],
)
def test_a_view_is_a_function_of_seed_epoch_and_image(
    source, alone, processes, workers, first_step
):
    found = views(source, 0, first_step, 8, processes, workers)
    assert len(found) == (8 - first_step) * BATCH
    assert found.items() <= alone.items()


def test_every_epoch_and_every_seed_has_other_views(source, alone):
    of_image = collections.defaultdict(list)
    for (_, image), view in alone.items():
        of_image[image].append(view)
    assert all(len(set(seen)) == len(seen) >= 3 for seen in of_image.values())
    other = views(source, seed=1)
    common = alone.keys() & other.keys()
    assert len(common) > 40 and all(alone[key] != other[key] for key in common)
