import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.utils.class_weight import compute_sample_weight

from vit_jax.errors import UserError
from vit_jax.mixing import mixup
from vit_jax.models import create_model, masked
from vit_jax.state import create_optimizer, create_state, init_train_state
from vit_jax.steps import (
    classification,
    classification_loss,
    eval_step,
    masked_patches,
    pixels_to_inputs,
    train_step,
)

TINY = {"architecture": "vit", "patch_size": 4, "hidden_size": 16, "num_layers": 1, "mlp_dim": 32,
        "num_heads": 2, "num_classes": 3}  # fmt: skip
SGD = {"name": "sgd", "momentum": 0.9, "weight_decay": 0.0, "decay": "all",
       "mu_dtype": "float32", "clip_norm": 1.0}  # fmt: skip
NOISE = np.random.default_rng(0)
BATCH = {
    "image": jnp.asarray(NOISE.uniform(-1, 1, (8, 8, 8, 3)), jnp.float32),
    "label": jnp.array([0, 1, 2, 0, 1, 2, 0, 1]),
}
OPTIMIZER = create_optimizer(SGD, lambda count: 0.1)
WIDTHS = {"hidden": (8 * 8 * 3, 16), "head": (16, 3)}
PARAMS = {name: np.float32(NOISE.normal(size=shape) * 0.2) for name, shape in WIDTHS.items()}


class Perceptron:
    """Stands for a model that takes longer to compile: a hidden layer, dropout, and logits."""

    def __init__(self, dropout_rate=0.0):
        self.dropout_rate = dropout_rate

    def apply(self, variables, images, *, train, rngs):
        hidden = jnp.tanh(images.reshape(len(images), -1) @ variables["params"]["hidden"])
        if train and self.dropout_rate:
            kept = jax.random.bernoulli(rngs["dropout"], 1 - self.dropout_rate, hidden.shape)
            hidden = jnp.where(kept, hidden / (1 - self.dropout_rate), 0)
        return hidden @ variables["params"]["head"]


# Of the images of BATCH.
PLAIN_LOGITS = (
    np.tanh(np.asarray(BATCH["image"]).reshape(8, -1) @ PARAMS["hidden"]) @ PARAMS["head"]
)


@functools.cache
def setup(dropout_rate=0.0, average=False, mixup_alpha=0.0, accumulate_steps=1):
    """A state, which no test changes, and its step, compiled once for all of them."""
    state = create_state(PARAMS, OPTIMIZER, seed=0, average=average)
    objective = classification(Perceptron(dropout_rate), "softmax")
    mix = functools.partial(mixup, alpha=mixup_alpha, num_classes=3) if mixup_alpha else None
    step = functools.partial(train_step, objective=objective, optimizer=OPTIMIZER, mix=mix)
    options = {"accumulate_steps": accumulate_steps, "ema_decay": 0.9 if average else 0.0}
    return state, jax.jit(functools.partial(step, **options))


def evaluate(params, batch, objective):
    return jax.jit(functools.partial(eval_step, objective=objective))(params, batch)


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def largest_difference(a, b):
    pairs = zip(*map(jax.tree.leaves, (a, b)), strict=True)
    return max(float(np.max(np.abs(np.asarray(x) - np.asarray(y)))) for x, y in pairs)


def follow(params, loss, *arguments):
    """The loss, the norm of its gradients, and the parameters after a step of clipped SGD."""
    value, grads = jax.device_get(jax.jit(jax.value_and_grad(loss))(params, *arguments))
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
    params = jax.device_get(params)
    return value, norm, jax.tree.map(lambda p, g: p - 0.1 * g / max(norm, 1.0), params, grads)


LOGITS = np.array([[2.0, -1.0, 0.5], [0.1, 0.2, -3.0]])
LABELS = np.array([0, 2])


def smoothed(smoothing):
    return np.eye(3)[LABELS] * (1 - smoothing) + smoothing / 3


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_softmax_loss(smoothing):
    expected = -(smoothed(smoothing) * log_softmax(LOGITS)).sum(-1)
    loss = classification_loss(jnp.array(LOGITS), jnp.array(LABELS), "softmax", smoothing)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_sigmoid_loss_is_summed_over_the_classes(smoothing):
    p, t = 1 / (1 + np.exp(-LOGITS)), smoothed(smoothing)
    expected = -(t * np.log(p) + (1 - t) * np.log(1 - p)).sum(-1)
    loss = classification_loss(jnp.array(LOGITS), jnp.array(LABELS), "sigmoid", smoothing)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_an_unknown_loss_is_refused():
    with pytest.raises(UserError, match="loss 'hinge' is unknown: use softmax or sigmoid"):
        classification_loss(jnp.array(LOGITS), jnp.array(LABELS), "hinge")


def test_a_step_follows_the_gradient_of_the_batch():
    model = create_model(TINY)
    init = functools.partial(init_train_state, model, OPTIMIZER, seed=0, image_size=8)
    state = jax.jit(functools.partial(init, average=False))()
    # Zeros hide the gradients of all that is below them.
    state.params["head"]["kernel"] = jnp.asarray(PARAMS["head"])
    step = functools.partial(
        train_step, objective=classification(model, "softmax"), optimizer=OPTIMIZER
    )

    def loss(params):
        logits = model.apply({"params": params}, BATCH["image"])
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(8), BATCH["label"]])

    value, norm, expected = follow(state.params, loss)
    after, metrics = jax.jit(step)(state, BATCH)
    assert largest_difference(after.params, expected) < 1e-6
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert int(after.step) == 1


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_gradients_equal_the_large_batch(parts):
    state, step = setup()
    _, accumulated = setup(accumulate_steps=parts)
    whole, metrics = step(state, BATCH)
    split, split_metrics = accumulated(state, BATCH)
    assert largest_difference(whole.params, split.params) < 1e-6
    assert largest_difference(whole.opt_state, split.opt_state) < 1e-6
    for key, value in metrics.items():
        np.testing.assert_allclose(split_metrics[key], value, rtol=1e-5)


def test_every_step_and_every_part_draws_its_own_dropout():
    state, step = setup(dropout_rate=0.5, accumulate_steps=2)
    image = np.asarray(BATCH["image"])[:1]
    same = {"image": image.repeat(8, 0), "label": np.zeros(8, np.int32)}
    first, _ = step(state, same)
    later, _ = step(state.replace(step=state.step + 1), same)
    again, _ = step(state, same)
    assert largest_difference(first.params, again.params) == 0
    assert largest_difference(first.params, later.params) > 0
    _, one_part = setup(dropout_rate=0.5)
    # Were both parts to draw the same mask, two parts of four rows would be one of four.
    half, _ = one_part(state, jax.tree.map(lambda x: x[:4], same))
    assert largest_difference(first.params, half.params) > 0
    # Were all parts to draw the same mask, the number of parts of one row each would not matter.
    losses = []
    for parts in (2, 4):
        _, step = setup(dropout_rate=0.5, accumulate_steps=parts)
        _, metrics = step(state, jax.tree.map(lambda x, parts=parts: x[:parts], same))
        losses.append(float(metrics["loss"]))
    assert abs(losses[0] - losses[1]) > 1e-3


def test_parts_are_interleaved_so_that_each_device_has_rows_of_every_part():
    def objective(params, batch, *_, **__):
        return {"loss": params["w"] * jnp.max(batch["label"]) * jnp.ones(len(batch["label"]))}

    state = create_state({"w": np.float32(1)}, OPTIMIZER, seed=0, average=False)
    batch = {"image": BATCH["image"], "label": np.arange(8)}
    options = {"objective": objective, "optimizer": OPTIMIZER, "accumulate_steps": 2}
    _, metrics = jax.jit(functools.partial(train_step, **options))(state, batch)
    # The largest of 0, 2, 4, 6 and of 1, 3, 5, 7; of 0 to 3 and of 4 to 7 it would be 5.
    assert float(metrics["loss"]) == 6.5


def test_polyak_average():
    state, step = setup(average=True)
    expected = jax.device_get(state.params)
    for _ in range(3):
        state, _ = step(state, BATCH)
        params = jax.device_get(state.params)
        expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, expected, params)
    assert largest_difference(state.ema_params, expected) < 1e-6
    assert largest_difference(state.ema_params, state.params) > 1e-3


WHOLE = BATCH | {"mask": np.ones(8, np.float32)}


def test_padding_counts_for_nothing_in_evaluation():
    objective = classification(Perceptron(), "softmax")
    sums = evaluate(PARAMS, WHOLE, objective)
    padded = {
        "image": np.concatenate([BATCH["image"], np.full((4, 8, 8, 3), np.nan, np.float32)]),
        "label": np.concatenate([BATCH["label"], np.zeros(4, np.int32)]),
        "mask": np.float32([1] * 8 + [0] * 4),
    }
    padded_sums = evaluate(PARAMS, padded, objective)
    assert int(sums["count"]) == int(padded_sums["count"]) == 8
    correct = np.argmax(PLAIN_LOGITS, -1) == BATCH["label"]
    assert int(padded_sums["correct"]) == np.sum(correct)
    np.testing.assert_allclose(padded_sums["loss"], sums["loss"], rtol=1e-6)


def test_evaluation_drops_nothing():
    # Of two layers: the first one's stochastic depth is 0.
    plain = create_model(TINY, num_layers=2)
    dropping = create_model(TINY, num_layers=2, dropout_rate=0.5, stochastic_depth=0.5)
    params = jax.jit(plain.init)(jax.random.key(0), BATCH["image"])["params"]
    params["head"]["kernel"] = PARAMS["head"]
    sums = evaluate(params, WHOLE, classification(dropping, "softmax"))
    logits = jax.jit(plain.apply)({"params": params}, BATCH["image"])
    expected = -log_softmax(np.asarray(logits))[np.arange(8), BATCH["label"]].sum()
    np.testing.assert_allclose(sums["loss"], expected, rtol=1e-5)


def test_labels_are_smoothed_in_training_only():
    objective = classification(Perceptron(), "softmax", label_smoothing=0.3)
    step = functools.partial(train_step, objective=objective, optimizer=OPTIMIZER)
    _, metrics = jax.jit(step)(create_state(PARAMS, OPTIMIZER, seed=0, average=False), BATCH)
    log_p, targets = log_softmax(PLAIN_LOGITS), np.eye(3)[BATCH["label"]]
    expected = -((0.7 * targets + 0.1) * log_p).sum(-1).mean()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    sums = evaluate(PARAMS, WHOLE, objective)
    np.testing.assert_allclose(sums["loss"], -(targets * log_p).sum(), rtol=1e-5)


class FixedPredictions:
    """Stands for a model: whatever it sees, it predicts the same for the chosen patches."""

    downsampling = 4

    def __init__(self):
        logits = np.random.default_rng(3).standard_normal((8, 4, 512))
        self.predictions = jnp.asarray(logits, jnp.float32)

    def apply(self, variables, images, corruption, *, train, rngs):
        del variables, images
        self.corruption, self.train, self.rngs = corruption, train, rngs
        return jnp.take_along_axis(self.predictions, corruption.chosen[..., None], axis=1)


def corrupted(model):
    """Scores as `masked_patches` of a rate of 0.5 in one program, which returns its corruption."""
    objective = masked_patches(model, 0.5, "mean_color")

    def scored(images, rng):
        batch = BATCH | {"image": images}
        return objective({}, batch, train=rng is not None, rng=rng), model.corruption

    return jax.jit(scored)


def test_the_loss_of_masked_patches_is_of_the_corrupted_ones_only():
    model = FixedPredictions()
    scored, key = corrupted(model), jax.random.key(5)
    found, corruption = scored(BATCH["image"], key)
    assert model.train and set(model.rngs) == {"dropout"}
    chosen = np.asarray(corruption.chosen)
    assert chosen.shape == (8, 2)  # Half of 2 x 2 patches.
    mean_color = jax.jit(masked.mean_color, static_argnums=1)
    colors = np.asarray(mean_color(BATCH["image"], 4))[..., 0]
    log_p = log_softmax(np.asarray(model.predictions))
    expected = [[-log_p[i, j, colors[i, j]] for j in row] for i, row in enumerate(chosen)]
    np.testing.assert_allclose(found["loss"], np.mean(expected, axis=1), rtol=1e-5)

    def brightened(patches):
        """The loss where one patch of each image is white."""
        images = np.array(BATCH["image"])
        for i, j in enumerate(patches):
            row, column = divmod(int(j), 2)
            images[i, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
        return scored(images, key)[0]["loss"]

    others = [next(j for j in range(4) if j not in row) for row in chosen]
    np.testing.assert_array_equal(brightened(others), found["loss"])
    assert np.all(brightened(chosen[:, 0]) != np.asarray(found["loss"]))


def test_training_draws_another_corruption_each_time_and_evaluation_always_the_same():
    model = FixedPredictions()
    scored = corrupted(model)

    def drawn(rng):
        return np.asarray(scored(BATCH["image"], rng)[1].masked)

    assert not np.array_equal(drawn(jax.random.key(1)), drawn(jax.random.key(2)))
    np.testing.assert_array_equal(drawn(jax.random.key(1)), drawn(jax.random.key(1)))
    np.testing.assert_array_equal(drawn(None), drawn(None))
    assert not model.train and not model.rngs
    assert len(np.unique(drawn(None), axis=0)) > 1  # Images are not corrupted alike.


class PatchPredictor:
    """Stands for a model of masked patches: its predictions are a product with each patch."""

    downsampling = 4

    def apply(self, variables, images, corruption, *, train, rngs):
        del train, rngs
        patches = images.reshape(-1, 2, 4, 2, 4, 3).swapaxes(2, 3).reshape(-1, 4, 48)
        predictions = patches @ variables["params"]
        return jnp.take_along_axis(predictions, corruption.chosen[..., None], axis=1)


def draw_patch_predictor(target):
    shape = (48, masked.num_outputs(target, 4))
    kernel = np.random.default_rng(1).normal(size=shape) * 0.1
    return np.float32(kernel), masked_patches(PatchPredictor(), 0.5, target)


def create_patch_predictor(target):
    """The parameters and the objective of a model proper."""
    model = masked.predictor(create_model(TINY, num_classes=0), target)
    params = jax.jit(model.init)(jax.random.key(0), BATCH["image"])["params"]
    kernel = np.random.default_rng(1).normal(size=params["patch_head"]["kernel"].shape)
    params["patch_head"]["kernel"] = np.float32(kernel)
    return params, masked_patches(model, 0.5, target)


@pytest.mark.parametrize(
    ("create", "target"),
    [
        (draw_patch_predictor, "mean_color"),
        (draw_patch_predictor, "pixels"),
        (create_patch_predictor, "pixels"),
    ],
)
def test_padding_counts_for_nothing_in_the_evaluation_of_masked_patches(create, target):
    params, objective = create(target)

    @jax.jit
    def scored(batch):
        each = objective(params, batch, train=False)
        return each, eval_step(params, batch, objective=objective)

    batch = BATCH | {"mask": np.float32([1] * 5 + [0] * 3)}
    each, sums = scored(batch)
    broken = np.array(BATCH["image"])
    broken[5:] = np.nan
    _, again = scored(batch | {"image": broken})
    assert int(sums["count"]) == 5
    assert sums.keys() == each.keys() | {"count"}
    for name, value in each.items():
        np.testing.assert_allclose(sums[name], np.asarray(value)[:5].sum(), rtol=1e-6)
        np.testing.assert_allclose(again[name], sums[name], rtol=1e-6)


PIXELS = np.random.default_rng(7).integers(0, 256, BATCH["image"].shape, dtype=np.uint8)
INPUTS = (PIXELS / 127.5 - 1).astype(np.float32)


def test_pixels_become_inputs_and_inputs_stay():
    pixels = jnp.arange(256, dtype=jnp.uint8)
    inputs = pixels_to_inputs(pixels)
    assert inputs.dtype == jnp.float32 and inputs[0] == -1 and inputs[255] == 1
    np.testing.assert_allclose(inputs, np.arange(256) / 127.5 - 1, atol=1e-7)
    for dtype in (jnp.float32, jnp.bfloat16):
        images = BATCH["image"].astype(dtype)
        assert pixels_to_inputs(images) is images


@pytest.mark.parametrize("options", [{}, {"mixup_alpha": 0.5}, {"accumulate_steps": 2}])
def test_a_step_takes_pixels_as_what_they_become(options):
    state, step = setup(**options)
    expected, metrics = step(state, BATCH | {"image": jnp.asarray(INPUTS)})
    found, found_metrics = step(state, BATCH | {"image": jnp.asarray(PIXELS)})
    assert largest_difference(found.params, expected.params) < 1e-6
    np.testing.assert_allclose(found_metrics["loss"], metrics["loss"], rtol=1e-5)


@pytest.mark.parametrize("target", masked.TARGETS)
def test_patches_of_pixels_are_predicted_as_of_what_they_become(target):
    params, objective = draw_patch_predictor(target)
    scored = jax.jit(lambda images: objective(params, BATCH | {"image": images}, train=False))
    expected, found = scored(INPUTS), scored(PIXELS)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)


def mixed_by_hand(share):
    """Every image and label with the one before it, the first with the last."""
    images, targets = np.asarray(BATCH["image"]), np.eye(3)[np.asarray(BATCH["label"])]
    before = [7, 0, 1, 2, 3, 4, 5, 6]
    return [share * x + (1 - share) * x[before] for x in (images, targets)]


@functools.cache
def jitted_mixup(alpha, num_classes=3):
    return jax.jit(functools.partial(mixup, alpha=alpha, num_classes=num_classes))


@pytest.mark.parametrize("alpha", [0.4, 0.5])
def test_mixup_is_a_blend_with_the_image_before(alpha):
    mixed = jitted_mixup(alpha)(jax.random.key(3), BATCH)
    np.testing.assert_array_equal(mixed["label"], BATCH["label"])
    # The second image has label 1 and the first 0.
    share = float(mixed["targets"][1, 1])
    assert 0.5 <= share <= 1
    images, targets = mixed_by_hand(share)
    np.testing.assert_allclose(mixed["image"], images, atol=1e-6)
    np.testing.assert_allclose(mixed["targets"], targets, atol=1e-6)


def test_the_share_of_mixup_is_the_larger_part_of_a_beta_distribution():
    keys = jax.random.split(jax.random.key(0), 4000)
    mixed = jax.jit(jax.vmap(lambda key: mixup(key, BATCH, 0.5, 3)["targets"][1, 1]))(keys)
    # Beta(0.5, 0.5) is the arcsine law: P(share < x) = 4 / pi * asin(sqrt(x)) - 1 from 0.5 to 1.
    for x in (0.6, 0.75, 0.9, 0.99):
        expected = 4 / np.pi * np.arcsin(np.sqrt(x)) - 1
        assert np.mean(np.asarray(mixed) < x) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_losses_of_shared_labels(smoothing):
    shares = np.array([[0.7, 0.3, 0.0], [0.0, 0.4, 0.6]])
    targets = shares * (1 - smoothing) + smoothing / 3
    log_p = log_softmax(LOGITS)
    p = 1 / (1 + np.exp(-LOGITS))
    expected = {
        "softmax": -(targets * log_p).sum(-1),
        "sigmoid": -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum(-1),
    }
    for loss, value in expected.items():
        found = classification_loss(jnp.array(LOGITS), jnp.array(shares), loss, smoothing)
        np.testing.assert_allclose(found, value, rtol=1e-5)


def test_a_step_with_mixup_follows_the_gradient_of_the_mixed_batch():
    model = Perceptron()
    state, step = setup(mixup_alpha=0.5)
    after, metrics = step(state, BATCH)

    def loss(params, share):
        images, targets = mixed_by_hand(share)
        logits = model.apply({"params": params}, jnp.float32(images), train=False, rngs={})
        log_p = jax.nn.log_softmax(logits)
        return -jnp.mean(jnp.sum(targets * log_p, -1))

    _, rng = jax.random.split(jax.random.fold_in(state.rng, 0))
    share = float(jitted_mixup(0.5)(rng, BATCH)["targets"][1, 1])
    assert 0.5 < share < 1
    value, _, expected = follow(state.params, loss, share)
    assert largest_difference(after.params, expected) < 1e-6
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)


@pytest.mark.parametrize("parts", [2, 8])
def test_the_batch_is_mixed_before_it_is_split(parts):
    state, step = setup(mixup_alpha=0.5)
    _, accumulated = setup(mixup_alpha=0.5, accumulate_steps=parts)
    whole, metrics = step(state, BATCH)
    split, split_metrics = accumulated(state, BATCH)
    assert largest_difference(whole.params, split.params) < 1e-6
    for key, value in metrics.items():
        np.testing.assert_allclose(split_metrics[key], value, rtol=1e-5)


def test_every_step_draws_its_own_share():
    state, step = setup(mixup_alpha=0.5)
    losses = {float(step(state.replace(step=jnp.int32(i)), BATCH)[1]["loss"]) for i in range(5)}
    assert len(losses) == 5


@pytest.mark.parametrize(
    "make",
    [
        lambda: classification(FixedPredictions(), "softmax"),
        lambda: masked_patches(FixedPredictions(), 0.5, "mean_color"),
    ],
)
def test_training_without_a_key_is_not_taken_for_evaluation(make):
    with pytest.raises(ValueError, match="train is True but rng is None"):
        make()({}, BATCH, train=True)


def test_evaluation_does_not_depend_on_a_key():
    model = FixedPredictions()
    objective = masked_patches(model, 0.5, "mean_color")
    without = objective({}, BATCH, train=False)
    given = objective({}, BATCH, train=False, rng=jax.random.key(7))
    np.testing.assert_array_equal(without["loss"], given["loss"])
    assert not model.train and not model.rngs


SEVERAL = np.random.default_rng(2).integers(0, 2, (8, 3)).astype(np.float32)


def log_sigmoid(x):
    return -np.logaddexp(0, -np.asarray(x, np.float64))


def test_the_loss_of_several_labels_is_the_sum_of_binary_cross_entropies():
    objective = classification(Perceptron(), "sigmoid")

    @jax.jit
    def scored(labels):
        return objective(PARAMS, BATCH | {"label": labels}, train=False)

    logits, found = PLAIN_LOGITS, scored(SEVERAL)
    assert found.keys() == {"loss"}  # What is right is told of a data set as a whole.
    each = SEVERAL * log_sigmoid(logits) + (1 - SEVERAL) * log_sigmoid(-logits)
    np.testing.assert_allclose(found["loss"], -each.sum(-1), rtol=1e-5)
    # A head may have classes that the data set has not.
    fewer, same = scored(SEVERAL[:, :2]), scored(SEVERAL * np.float32([1, 1, 0]))
    np.testing.assert_array_equal(fewer["loss"], same["loss"])


def test_several_labels_are_mixed_as_images_are():
    mixed = jitted_mixup(0.4, 4)(jax.random.key(3), BATCH | {"label": SEVERAL})
    before = [7, 0, 1, 2, 3, 4, 5, 6]
    share = float(jitted_mixup(0.4)(jax.random.key(3), BATCH)["targets"][1, 1])
    expected = share * SEVERAL + (1 - share) * SEVERAL[before]
    np.testing.assert_allclose(mixed["targets"][:, :3], expected, atol=1e-6)
    np.testing.assert_array_equal(mixed["targets"][:, 3], 0)
    np.testing.assert_array_equal(mixed["label"], SEVERAL)


WEIGHTS = np.array([0.5, 2.0, 3.0], np.float32)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_an_image_counts_by_the_weight_of_its_class_in_training_only(loss):
    model, rng = Perceptron(), jax.random.key(0)
    plain = classification(model, loss, 0.1)
    weighted = classification(model, loss, 0.1, class_weights=WEIGHTS)
    mixed = jitted_mixup(0.4)(jax.random.key(3), BATCH)

    @jax.jit
    def losses(params):
        def both(batch, **options):
            return [x(params, batch, **options)["loss"] for x in (plain, weighted)]

        training = {"train": True, "rng": rng}
        return both(BATCH, **training), both(mixed, **training), both(BATCH, train=False)

    of_batch, of_mixed, evaluated = jax.device_get(losses(PARAMS))
    # As with scikit-learn's weights of samples, and Keras's class_weight.
    weights = compute_sample_weight(dict(enumerate(WEIGHTS)), np.asarray(BATCH["label"]))
    np.testing.assert_allclose(of_batch[1], weights * of_batch[0], rtol=1e-5)
    np.testing.assert_array_equal(*evaluated)
    weights = np.asarray(mixed["targets"]) @ WEIGHTS
    np.testing.assert_allclose(of_mixed[1], weights * of_mixed[0], rtol=1e-5)


def test_of_several_labels_what_is_there_counts_by_the_weight_of_its_class():
    logits = PLAIN_LOGITS
    objective = classification(Perceptron(), "sigmoid", class_weights=WEIGHTS)
    scored = jax.jit(functools.partial(objective, train=True))
    batch = BATCH | {"label": SEVERAL}
    found = scored(PARAMS, batch, rng=jax.random.key(0))["loss"]
    # The formula of PyTorch's BCEWithLogitsLoss with pos_weight.
    each = WEIGHTS * SEVERAL * log_sigmoid(logits) + (1 - SEVERAL) * log_sigmoid(-logits)
    np.testing.assert_allclose(found, -each.sum(-1), rtol=1e-5)
