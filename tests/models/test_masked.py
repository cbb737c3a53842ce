import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.analysis import flops
from vit_jax.errors import UserError
from vit_jax.models import create_model, masked
from vit_jax.models.masked import draw_corruption, predictor
from vit_jax.state import init_train_state
from vit_jax.steps import masked_patches, train_step

VIT = {"architecture": "vit", "patch_size": 4, "hidden_size": 16, "num_layers": 1, "mlp_dim": 32,
       "num_heads": 2, "num_classes": 0}  # fmt: skip
HYBRID = {**VIT, "architecture": "hybrid", "patch_size": 2, "resnet_layers": ()}
TRUNKS = {
    "token": VIT,
    "gap": {**VIT, "classifier": "gap"},
    "scan": {**VIT, "scan_layers": True},
    "2d": {**VIT, "position_embedding": "2d", "position_placement": "layers"},
    "hybrid": HYBRID,
}
# Not square, so that rows and columns cannot be mixed up.
IMAGES = np.random.default_rng(0).uniform(-1, 1, (3, 16, 24, 3)).astype(np.float32)


def random_params(model, images=IMAGES):
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), shapes)


def patches_of(image, size):
    """The patches of an image, by rows, from two loops."""
    rows, columns = image.shape[0] // size, image.shape[1] // size
    return [
        image[r * size : (r + 1) * size, c * size : (c + 1) * size]
        for r in range(rows)
        for c in range(columns)
    ]


def color_of(value):
    """8 levels of equal width from -1 to 1, a channel after the other."""
    edges = np.linspace(-1, 1, 9)[1:-1]
    red, green, blue = (int(np.sum(x >= edges)) for x in value)
    return 64 * red + 8 * green + blue


def test_the_mean_color_is_that_of_each_patch():
    expected = [[[color_of(p.mean((0, 1)))] for p in patches_of(x, 4)] for x in IMAGES]
    np.testing.assert_array_equal(masked.mean_color(IMAGES, 4), expected)


@pytest.mark.parametrize(
    ("value", "level"), [(-1, 0), (-0.7501, 0), (-0.75, 1), (0, 4), (0.7499, 6), (0.75, 7), (1, 7)]
)
def test_a_color_has_eight_levels_a_channel(value, level):
    pixel = np.array([[value, -1, 1]], np.float32)
    assert masked.colors(pixel).tolist() == [64 * level + 7]


def test_a_patch_is_downsized_by_the_means_of_its_parts():
    images = IMAGES[:, :, :16]
    expected = [
        [[color_of(part.mean((0, 1))) for part in patches_of(p, 2)] for p in patches_of(x, 8)]
        for x in images
    ]
    np.testing.assert_array_equal(masked.downsized(images, 8), expected)


def test_a_patch_of_another_size_is_downsized_by_parts_of_pixels():
    # 6 pixels to 4 are 2 to each 4/3: shares 1, 1/2 of two; as if every pixel were 2 x 2.
    images = IMAGES[:, :12, :18]
    doubled = np.repeat(np.repeat(images, 2, 1), 2, 2)
    np.testing.assert_array_equal(masked.downsized(images, 6), masked.downsized(doubled, 12))


def test_the_pixels_are_those_of_each_patch():
    expected = [[p.reshape(-1) for p in patches_of(x, 4)] for x in IMAGES]
    np.testing.assert_array_equal(masked.pixels(IMAGES, 4), expected)


@pytest.mark.parametrize(
    ("target", "outputs"), [("mean_color", 512), ("downsized", 16 * 512), ("pixels", 256 * 3)]
)
def test_the_outputs_are_those_of_the_paper_for_patches_of_16(target, outputs):
    assert masked.num_outputs(target, 16) == outputs


def test_the_shares_of_the_corruption_are_those_of_the_paper():
    batch, patches = 4000, 64
    drawn = draw_corruption(jax.random.key(0), batch, patches, 0.5)
    chosen, mask, source = map(np.asarray, drawn)
    moved = source != np.arange(patches)
    # Exactly half of each image's patches, each once.
    assert chosen.shape == (batch, 32)
    assert all(len(set(row)) == 32 for row in chosen)
    corrupted = np.zeros((batch, patches), bool)
    np.put_along_axis(corrupted, chosen, True, axis=1)
    assert not (mask & moved).any()
    assert not ((mask | moved) & ~corrupted).any()
    # 128,000 draws: a share is off by less than 4 standard deviations, sqrt(p (1 - p) / n).
    for found, share in ((mask, 0.8), (moved, 0.1)):
        assert found.sum() / corrupted.sum() == pytest.approx(share, abs=0.0045)
    # Every patch is as likely to be corrupted as any other, and to be the other one.
    assert corrupted.mean(0) == pytest.approx(np.full(patches, 0.5), abs=0.04)
    offsets = np.bincount((source - np.arange(patches))[moved] % patches, minlength=patches)
    assert offsets[0] == 0
    assert offsets[1:] == pytest.approx(np.full(63, moved.sum() / 63), rel=0.4)


@pytest.mark.parametrize(
    ("patches", "rate", "count"), [(196, 0.5, 98), (196, 0.15, 29), (64, 1.0, 64), (4, 0.3, 1)]
)
def test_the_rate_is_that_of_the_patches_rounded(patches, rate, count):
    corruption = jax.eval_shape(
        lambda key: draw_corruption(key, 2, patches, rate), jax.random.key(0)
    )
    assert corruption.chosen.shape == (2, count)


@pytest.mark.parametrize(("patches", "rate"), [(4, 0.1), (1, 1.0)])
def test_a_rate_that_leaves_nothing_to_predict_is_refused(patches, rate):
    with pytest.raises(UserError, match=f"masking.rate {rate} of {patches} patches leaves nothing"):
        draw_corruption(jax.random.key(0), 2, patches, rate)


def test_the_corruption_is_a_function_of_its_key():
    first, again, other = (draw_corruption(jax.random.key(i), 8, 16, 0.5) for i in (0, 0, 1))
    assert all(map(np.array_equal, first, again))
    assert not any(map(np.array_equal, first, other))


def test_a_mask_is_of_the_patches_that_a_corruption_chooses_and_moves_none():
    drawn = draw_corruption(jax.random.key(4), 5, 12, 0.3)
    chosen, mask, source = map(np.asarray, masked.draw_mask(jax.random.key(4), 5, 12, 0.3))
    np.testing.assert_array_equal(chosen, drawn.chosen)
    assert chosen.shape == (5, 4) and mask.shape == (5, 12)
    for row in range(5):
        assert set(np.flatnonzero(mask[row])) == set(chosen[row])
    np.testing.assert_array_equal(source, np.tile(np.arange(12), (5, 1)))


def test_embeddings_become_the_masks_or_another_patchs_or_stay():
    x = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
    corruption = masked.Corruption(
        chosen=np.array([[0, 1, 4], [2, 3, 0]]),
        masked=np.array([[1, 0, 0, 0, 0], [0, 0, 1, 1, 0]], bool),
        source=np.array([[0, 3, 2, 3, 4], [1, 1, 2, 3, 4]]),
    )
    expected = x.copy()
    expected[0, 0] = expected[1, 2] = expected[1, 3] = -7
    expected[0, 1] = x[0, 3]
    expected[1, 0] = x[1, 1]
    np.testing.assert_array_equal(masked.corrupt(x, np.full((1, 1, 3), -7.0), corruption), expected)


@pytest.mark.parametrize("name", TRUNKS)
def test_the_parameters_are_those_of_the_trunk_and_two_more(name):
    trunk = create_model(TRUNKS[name])
    model = predictor(trunk, "mean_color")
    # Not jitted: of ten initializations most operations are compiled already.
    init = [m.init(jax.random.key(3), IMAGES)["params"] for m in (trunk, model)]
    expected, found = (flatten_dict(tree, sep="/") for tree in init)
    added = {key: found.pop(key) for key in found.keys() - expected.keys()}
    assert {key: x.shape for key, x in added.items()} == {
        "mask_embedding": (1, 1, 16),
        "patch_head/kernel": (16, 512),
        "patch_head/bias": (512,),
    }
    assert {name.split("/")[0] for name in added} == set(masked.PARAMETERS)
    assert expected.keys() == found.keys()
    # Where a run begins does not depend on its objective either.
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)


@pytest.mark.parametrize("name", TRUNKS)
def test_nothing_but_the_corruption_differs_from_the_trunk(name):
    trunk = create_model(TRUNKS[name])
    model = predictor(trunk, "mean_color")
    params = random_params(model)
    patches = 24 if name != "hybrid" else 6
    predictions, state = jax.jit(
        lambda p: model.apply(
            {"params": p}, IMAGES, capture_intermediates=lambda m, _: m.name == "Transformer"
        )
    )(params)
    predictions = np.asarray(predictions)
    tokens = np.asarray(state["intermediates"]["Transformer"]["__call__"][0])[:, -patches:]
    assert predictions.shape == (3, patches, 512)
    head = params["patch_head"]
    np.testing.assert_allclose(predictions, tokens @ head["kernel"] + head["bias"], atol=1e-4)
    # Every one of the chosen patches is predicted, in their order.
    stays = masked.Corruption(
        chosen=np.array([[4, 1], [0, 2], [3, 5]]),
        masked=np.zeros((3, patches), bool),
        source=np.tile(np.arange(patches), (3, 1)),
    )
    some = jax.jit(model.apply)({"params": params}, IMAGES, stays)
    expected = np.take_along_axis(predictions, stays.chosen[..., None], axis=1)
    np.testing.assert_allclose(some, expected, atol=1e-5)
    if trunk.config.classifier == "gap":
        features = jax.jit(trunk.apply)({"params": params}, IMAGES)
        np.testing.assert_allclose(features, tokens.mean(1), atol=1e-5)


def test_a_masked_patch_is_not_seen():
    model = predictor(create_model(VIT), "mean_color")
    params = random_params(model)
    corruption = masked.Corruption(
        chosen=np.array([[7, 8, 9]]),
        masked=np.isin(np.arange(24), [7])[None],
        source=np.where(np.arange(24) == 8, 20, np.arange(24))[None],
    )

    apply = jax.jit(lambda params, image: model.apply({"params": params}, image, corruption))

    def predict(changed):
        image = IMAGES[:1].copy()
        row, column = divmod(changed, 6)
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.5
        return np.asarray(apply(params, image))

    plain = np.asarray(apply(params, IMAGES[:1]))
    np.testing.assert_array_equal(predict(7), plain)  # Became the mask.
    np.testing.assert_array_equal(predict(8), plain)  # Became patch 20.
    for seen in (9, 20, 0):
        assert np.abs(predict(seen) - plain).max() > 1e-3
    other_mask = {**params, "mask_embedding": -params["mask_embedding"]}
    assert np.abs(apply(other_mask, IMAGES[:1]) - plain).max() > 1e-3


def test_patches_are_joined_as_they_were_cut():
    patches = masked.cut_patches(IMAGES, 4)
    np.testing.assert_array_equal(patches[1], patches_of(IMAGES[1], 4))
    np.testing.assert_array_equal(masked.join_patches(patches, (4, 6)), IMAGES)


def test_the_middle_of_a_color_is_half_a_level_from_its_edges():
    levels = np.stack(np.unravel_index(np.arange(512), (8, 8, 8)), axis=-1)
    found = np.asarray(masked.middles(jnp.arange(512)))
    np.testing.assert_allclose(found, -1 + 0.25 * levels + 0.125, atol=1e-6)
    np.testing.assert_array_equal(masked.colors(found), np.arange(512))


def predicting(colors):
    """Logits in which each of these colors is the most probable."""
    logits = np.random.default_rng(3).uniform(-1, 1, (*np.shape(colors), 512))
    np.put_along_axis(logits, np.asarray(colors)[..., None], 2.0, axis=-1)
    return logits.reshape(*np.shape(colors)[:2], -1).astype(np.float32)


def test_the_patch_of_a_mean_color_is_of_that_color():
    colors = np.array([[[7], [448], [0b001_010_011]]])
    found = masked.to_patches(predicting(colors), "mean_color", 4)
    assert found.shape == (1, 3, 4, 4, 3)
    expected = [(-7, -7, 7), (7, -7, -7), (-5, -3, -1)]  # eighths
    for patch, color in zip(found[0], expected, strict=True):
        np.testing.assert_allclose(patch, np.tile(np.float32(color) / 8, (4, 4, 1)), atol=1e-6)


@pytest.mark.parametrize("size", [2, 4, 8, 6])
def test_a_downsized_patch_is_enlarged_by_what_its_parts_cover(size):
    colors = np.random.default_rng(4).integers(0, 512, (2, 3, 16))
    found = masked.to_patches(predicting(colors), "downsized", size)
    assert found.shape == (2, 3, size, size, 3)
    # Each part as 12 x 12 points, of which a pixel has those that lie in it.
    parts = np.asarray(masked.middles(jnp.asarray(colors))).reshape(2, 3, 4, 4, 3)
    fine = parts.repeat(12, axis=2).repeat(12, axis=3)
    step = 48 // size
    expected = fine.reshape(2, 3, size, step, size, step, 3).mean((3, 5))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    if size >= 4 and size % 4 == 0:  # What it was made of is found again.
        np.testing.assert_array_equal(masked.downsized(_tiled(found), size)[0], colors[0])


def _tiled(patches):
    return masked.join_patches(patches, (1, patches.shape[1]))


def test_restoring_replaces_the_chosen_patches_alone():
    rng = np.random.default_rng(5)
    chosen = np.array([[5, 0], [23, 7], [6, 1]])
    predictions = rng.uniform(-1, 1, (3, 2, 48)).astype(np.float32)
    expected = IMAGES.copy()
    for image, places, patches in zip(expected, chosen, predictions, strict=True):
        for place, patch in zip(places, patches, strict=True):
            row, column = 4 * (place // 6), 4 * (place % 6)
            image[row : row + 4, column : column + 4] = patch.reshape(4, 4, 3)
    found = masked.restore(jnp.asarray(IMAGES), predictions, chosen, "pixels", 4)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("target", masked.TARGETS)
@pytest.mark.parametrize("size", [2, 8, 14])
def test_the_outputs_tell_the_target(target, size):
    assert masked.target_of(masked.num_outputs(target, size), size) == target
    assert masked.target_of(masked.num_outputs(target, size) + 1, size) is None


def test_the_scores_of_colors():
    rng = np.random.default_rng(2)
    predictions = rng.standard_normal((2, 3, 2 * 512)).astype(np.float32)
    targets = rng.integers(0, 512, (2, 3, 2))
    logits = predictions.reshape(2, 3, 2, 512)
    targets[0, 0, 1] = logits[0, 0, 1].argmax()
    losses = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    losses -= np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    found = masked.scores(jnp.array(predictions), jnp.array(targets))
    np.testing.assert_allclose(found["loss"], losses.reshape(2, -1).mean(1), rtol=1e-5)
    hits = (logits.argmax(-1) == targets).reshape(2, -1).mean(1)
    assert hits[0] > 0
    np.testing.assert_allclose(found["correct"], hits, rtol=1e-6)


def test_the_scores_of_pixels_are_squared_errors():
    rng = np.random.default_rng(2)
    predictions, targets = rng.standard_normal((2, 2, 3, 12)).astype(np.float32)
    found = masked.scores(jnp.array(predictions), jnp.array(targets))
    assert found.keys() == {"loss"}
    expected = ((predictions - targets) ** 2).reshape(2, -1).mean(1)
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)


def test_models_without_patch_embeddings_are_refused():
    resnet = {"architecture": "resnet", "resnet_layers": (1,), "width_factor": 1,
              "group_norm_epsilon": 1e-5, "num_classes": 0}  # fmt: skip
    with pytest.raises(UserError, match="masked_patches is for ViTs and hybrids: a ResNet has no"):
        predictor(create_model(resnet), "mean_color")


def test_the_multiply_adds_with_the_head_are_those_that_xla_counts():
    config = {**VIT, "hidden_size": 192, "mlp_dim": 768, "num_heads": 3, "classifier": "token",
              "representation_size": 0}  # fmt: skip
    model = predictor(create_model(config), "mean_color")
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    corruption = jax.eval_shape(lambda key: draw_corruption(key, 2, 64, 0.5), jax.random.key(0))
    cost = jax.jit(model.apply).lower(variables, images, corruption).cost_analysis()
    trunk = flops.multiply_adds(config, 32, 0)
    assert masked.multiply_adds(model, 32, 0.5) == trunk + 32 * 192 * 512
    assert 2 * 2 * (trunk + 32 * 192 * 512) == pytest.approx(cost["flops"], rel=0.03)


@pytest.mark.parametrize(
    ("trunk", "target"),
    [(VIT, "mean_color"), (VIT, "downsized"), (VIT, "pixels"), (HYBRID, "mean_color")],
)
def test_training_moves_every_parameter_and_lowers_the_loss(trunk, target):
    model, optimizer = predictor(create_model(trunk), target), optax.adam(1e-2)
    state = init_train_state(model, optimizer, seed=0, image_size=16, average=False)
    start = jax.device_get(state.params)
    # Every image of one color, which its other patches tell.
    color = np.array([[-0.9, 0.1, 0.9], [0.9, -0.9, 0.1], [0.1, 0.9, -0.9]], np.float32)
    images = np.broadcast_to(color[:, None, None], (3, 16, 16, 3))
    batch = {"image": images, "label": np.full(3, -1)}
    objective = masked_patches(model, 0.5, target)
    step = jax.jit(lambda state: train_step(state, batch, objective=objective, optimizer=optimizer))
    losses = []
    for _ in range(12):
        state, metrics = step(state)
        losses.append(float(metrics["loss"]))
    assert ("accuracy" in metrics) == (target != "pixels")
    if target != "pixels":
        assert losses[0] == pytest.approx(np.log(512), rel=1e-5)  # The head starts at 0.
    assert losses[-1] < 0.8 * losses[0]
    moved = jax.tree.map(lambda old, new: not np.array_equal(old, new), start, state.params)
    assert all(jax.tree.leaves(moved)), moved
