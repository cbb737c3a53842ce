import itertools
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from flax.traverse_util import flatten_dict

from vit_jax.checkpoints.layouts import POSITIONS
from vit_jax.checkpoints.transfer import Row, print_report, transfer
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.models.positions import resize_grid

WIDTH = 8


def tree(tokens, *, classes, cls=True, pre_logits=False, layers=2, seed=0):
    """The official names; every value is random, that of the head too."""
    rng = np.random.default_rng(seed)

    def array(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    params = {
        "embedding": {"kernel": array(2, 2, 3, WIDTH), "bias": array(WIDTH)},
        "Transformer": {
            "posembed_input": {"pos_embedding": array(1, tokens, WIDTH)},
            **{
                f"encoderblock_{i}": {"LayerNorm_0": {"scale": array(WIDTH)}} for i in range(layers)
            },
            "encoder_norm": {"scale": array(WIDTH), "bias": array(WIDTH)},
        },
        "head": {"kernel": array(WIDTH, classes), "bias": array(classes)},
    }
    if cls:
        params["cls"] = array(1, 1, WIDTH)
    if pre_logits:
        params["pre_logits"] = {"kernel": array(WIDTH, WIDTH), "bias": array(WIDTH)}
    return params


def positions(params):
    return params["Transformer"]["posembed_input"]["pos_embedding"]


def zoomed(grid, target):
    factors = (target[0] / grid.shape[0], target[1] / grid.shape[1], 1)
    return scipy.ndimage.zoom(grid, factors, order=1)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((14, 14), (24, 24)),
        ((7, 7), (12, 12)),
        ((24, 24), (14, 14)),
        ((14, 14), (20, 9)),
        ((5, 9), (6, 3)),
        ((3, 3), (1, 4)),
    ],
)
def test_resized_grid_equals_scipy_zoom(old, new):
    grid = np.random.default_rng(0).standard_normal((*old, 16)).astype(np.float32)
    resized = resize_grid(grid, new)
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, zoomed(grid, new), rtol=0, atol=1e-6)


def test_resized_sides_are_bilinear_and_scipys_where_it_does_not_step_over_the_edge():
    beyond = []
    for old, new in itertools.product(range(1, 41), repeat=2):
        line = np.random.default_rng(0).uniform(1, 2, (old, 3))
        resized = resize_grid(line[:, None], (new, 1))[:, 0]
        columns = resize_grid(line[None], (1, new))[0]
        np.testing.assert_array_equal(columns, resized)
        exact = [Fraction(i * (old - 1), max(new - 1, 1)) for i in range(new)]
        lower = [min(int(x), max(old - 2, 0)) for x in exact]
        upper = [min(i + 1, old - 1) for i in lower]
        share = np.array([float(x - i) for x, i in zip(exact, lower, strict=True)])[:, None]
        expected = (1 - share) * line[lower] + share * line[upper]
        np.testing.assert_allclose(resized, expected, rtol=0, atol=1e-12)
        found = scipy.ndimage.zoom(line, (new / old, 1), order=1)
        if new > 1 and (new - 1) * ((old - 1) / (new - 1)) > old - 1:  # In float64.
            beyond.append((old, new))
            assert not found[-1].any() and (resized[-1] >= 1).all()
            found, resized = found[:-1], resized[:-1]
        np.testing.assert_allclose(resized, found, rtol=0, atol=1e-12)
    assert (28, 14) in beyond and len(beyond) == 22


def test_fine_tuning_takes_the_body_and_a_fresh_head():
    pretrained = tree(1 + 4 * 4, classes=7, pre_logits=True, seed=1)
    init = tree(1 + 6 * 6, classes=3, seed=2)
    init["head"] = jax.tree.map(np.zeros_like, init["head"])
    params, report = transfer(init, pretrained)

    assert jax.tree.structure(params) == jax.tree.structure(init)
    assert not params["head"]["kernel"].any() and params["head"]["kernel"].shape == (WIDTH, 3)
    np.testing.assert_array_equal(params["cls"], pretrained["cls"])
    np.testing.assert_array_equal(params["embedding"]["kernel"], pretrained["embedding"]["kernel"])
    np.testing.assert_array_equal(positions(params)[:, 0], positions(pretrained)[:, 0])
    grid = positions(pretrained)[0, 1:].reshape(4, 4, WIDTH)
    np.testing.assert_allclose(
        positions(params)[0, 1:], zoomed(grid, (6, 6)).reshape(36, WIDTH), atol=1e-6
    )
    assert sorted(report) == sorted(
        [
            Row("cls", (1, 1, WIDTH), "loaded"),
            Row("embedding/kernel", (2, 2, 3, WIDTH), "loaded"),
            Row("embedding/bias", (WIDTH,), "loaded"),
            Row(POSITIONS, (1, 37, WIDTH), "resized"),
            Row("Transformer/encoderblock_0/LayerNorm_0/scale", (WIDTH,), "loaded"),
            Row("Transformer/encoderblock_1/LayerNorm_0/scale", (WIDTH,), "loaded"),
            Row("Transformer/encoder_norm/scale", (WIDTH,), "loaded"),
            Row("Transformer/encoder_norm/bias", (WIDTH,), "loaded"),
            Row("head/kernel", (WIDTH, 3), "new"),
            Row("head/bias", (3,), "new"),
            Row("head/kernel", (WIDTH, 7), "dropped"),
            Row("head/bias", (7,), "dropped"),
            Row("pre_logits/kernel", (WIDTH, WIDTH), "dropped"),
            Row("pre_logits/bias", (WIDTH,), "dropped"),
        ]
    )


def test_the_head_is_fresh_even_with_as_many_classes():
    pretrained, init = tree(17, classes=5, seed=1), tree(17, classes=5, seed=2)
    params, _ = transfer(init, pretrained)
    np.testing.assert_array_equal(params["head"]["kernel"], init["head"]["kernel"])


def test_keep_head_loads_every_value_as_it_is():
    pretrained = tree(17, classes=5, pre_logits=True, seed=1)
    params, report = transfer(tree(17, classes=5, pre_logits=True), pretrained, keep_head=True)
    jax.tree.map(np.testing.assert_array_equal, params, pretrained)
    assert {row.action for row in report} == {"loaded"}


def test_keep_head_does_not_drop_pre_logits():
    with pytest.raises(UserError, match="pre_logits/bias is not in the model"):
        transfer(tree(17, classes=5), tree(17, classes=5, pre_logits=True), keep_head=True)


def test_loaded_arrays_take_the_dtype_of_the_model():
    init = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree(17, classes=5))
    params, _ = transfer(init, tree(26, classes=5))
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}


def test_weights_that_are_jax_arrays_are_loaded_not_resized():
    pretrained = jax.tree.map(jnp.asarray, tree(17, classes=5))
    _, report = transfer(tree(17, classes=5), pretrained)
    assert Row(POSITIONS, (1, 17, WIDTH), "loaded") in report


def test_gap_weights_are_resized_without_a_class_position():
    pretrained = tree(16, classes=5, cls=False, seed=1)
    params, report = transfer(tree(25, classes=5, cls=False), pretrained)
    grid = positions(pretrained)[0].reshape(4, 4, WIDTH)
    expected = zoomed(grid, (5, 5)).reshape(1, 25, WIDTH)
    np.testing.assert_allclose(positions(params), expected, atol=1e-6)
    assert Row(POSITIONS, (1, 25, WIDTH), "resized") in report


def test_a_gap_model_drops_the_class_token_and_its_position():
    pretrained = tree(17, classes=5, seed=1)
    params, report = transfer(tree(16, classes=5, cls=False), pretrained)
    np.testing.assert_array_equal(positions(params), positions(pretrained)[:, 1:])
    assert Row("cls", (1, 1, WIDTH), "dropped") in report
    assert "cls" not in params


def test_a_token_model_keeps_its_own_class_token_where_the_weights_have_none():
    pretrained, init = tree(16, classes=5, cls=False, seed=1), tree(17, classes=5, seed=2)
    params, report = transfer(init, pretrained)
    np.testing.assert_array_equal(positions(params)[:, 0], positions(init)[:, 0])
    np.testing.assert_array_equal(positions(params)[:, 1:], positions(pretrained))
    np.testing.assert_array_equal(params["cls"], init["cls"])
    assert Row("cls", (1, 1, WIDTH), "new") in report


def test_attention_pooling_is_kept_dropped_or_new_as_the_two_models_have_it():
    probe = {"MAPHead_0": {"probe": np.full((1, 1, WIDTH), 2.0, np.float32)}}
    plain = tree(16, classes=5, cls=False, seed=1)
    fresh = plain | {"MAPHead_0": {"probe": np.zeros((1, 1, WIDTH), np.float32)}}
    for init, pretrained, action, value in (
        (fresh, plain | probe, "loaded", 2.0),
        (fresh, plain, "new", 0.0),
        (plain, plain | probe, "dropped", None),
    ):
        params, report = transfer(init, pretrained)
        assert Row("MAPHead_0/probe", (1, 1, WIDTH), action) in report
        found = params.get("MAPHead_0", {}).get("probe")
        assert value is None if found is None else (found == value).all()
    with pytest.raises(UserError, match="MAPHead_0/probe is missing"):
        transfer(fresh, plain, keep_head=True)


def test_grids_that_are_no_squares_can_be_given():
    pretrained = tree(1 + 2 * 8, classes=5, seed=1)
    params, report = transfer(
        tree(1 + 4 * 4, classes=5), pretrained, pretrained_grid=(2, 8), grid=(4, 4)
    )
    grid = positions(pretrained)[0, 1:].reshape(2, 8, WIDTH)
    expected = zoomed(grid, (4, 4)).reshape(16, WIDTH)
    np.testing.assert_allclose(positions(params)[0, 1:], expected, atol=1e-6)
    assert Row(POSITIONS, (1, 17, WIDTH), "resized") in report


def test_a_grid_of_the_same_shape_that_is_no_square_needs_no_grid():
    pretrained = tree(1 + 2 * 3, classes=5, seed=1)
    params, _ = transfer(tree(7, classes=5), pretrained)
    np.testing.assert_array_equal(positions(params), positions(pretrained))


def test_a_number_of_patches_that_is_no_grid_is_refused():
    with pytest.raises(UserError, match="6 position embeddings are no grid of 2 x 2"):
        transfer(tree(17, classes=5), tree(7, classes=5))
    with pytest.raises(UserError, match="16 position embeddings are no grid of 3 x 5"):
        transfer(tree(17, classes=5), tree(10, classes=5), grid=(3, 5))


def test_missing_surplus_and_misshapen_parameters_are_all_listed_in_one_line():
    pretrained = tree(17, classes=5, layers=3)
    pretrained["embedding"]["kernel"] = np.zeros((4, 4, 3, WIDTH), np.float32)
    del pretrained["Transformer"]["encoder_norm"]["bias"]
    with pytest.raises(UserError) as caught:
        transfer(tree(17, classes=5), pretrained)
    message = str(caught.value)
    assert "in 3 places" in message and "\n" not in message
    assert "embedding/kernel has shape (4, 4, 3, 8), the model (2, 2, 3, 8)" in message
    assert "Transformer/encoder_norm/bias is missing" in message
    assert "Transformer/encoderblock_2/LayerNorm_0/scale is not in the model" in message


def test_a_long_list_of_misfits_is_cut_and_counted():
    with pytest.raises(UserError, match=r"in 20 places: .*; and 16 more; choose"):
        transfer(tree(17, classes=5, layers=22), tree(17, classes=5, layers=2))


def test_another_width_misshapes_every_parameter_positions_included():
    pretrained = jax.tree.map(lambda x: np.repeat(x, 2, axis=-1), tree(26, classes=5))
    with pytest.raises(UserError, match="in 8 places"):
        transfer(tree(17, classes=5), pretrained)


def test_the_printed_report_joins_equal_layers_and_names_every_action(capsys):
    _, report = transfer(tree(37, classes=3), tree(17, classes=7, pre_logits=True))
    print_report(report)
    printed = capsys.readouterr().out
    assert "Transformer/encoderblock_*/LayerNorm_0/scale x2\n" in printed
    assert "encoderblock_1" not in printed
    assert all(action in printed for action in ("loaded", "resized", "dropped", "new"))


def test_a_real_model_is_fine_tuned_at_a_higher_resolution():
    def init(size, **kwargs):
        sizes = {"patch_size": 8, "hidden_size": 16, "mlp_dim": 32, "num_heads": 2, "num_layers": 2}
        model = create_model({"architecture": "vit", **sizes, **kwargs})
        return model, model.init(jax.random.key(size), jnp.zeros((1, size, size, 3)))["params"]

    _, pretrained = init(32, num_classes=11, representation_size=16)
    model, fresh = init(48, num_classes=3)
    params, report = transfer(fresh, jax.device_get(pretrained))
    dropped = {row.name for row in report if row.action == "dropped"}
    assert dropped == {"head/kernel", "head/bias", "pre_logits/kernel", "pre_logits/bias"}
    kept = {row.name for row in report if row.action != "dropped"}
    assert kept == set(flatten_dict(fresh, sep="/"))
    logits = model.apply({"params": params}, jnp.ones((1, 48, 48, 3)))
    np.testing.assert_array_equal(logits, np.zeros((1, 3)))


def test_a_hybrid_is_fine_tuned_at_a_higher_resolution():
    def init(size, num_classes):
        sizes = {"patch_size": 1, "hidden_size": 16, "mlp_dim": 32, "num_heads": 2, "num_layers": 1}
        layers = {"architecture": "hybrid", "resnet_layers": (2, 1)}
        model = create_model({**layers, **sizes}, num_classes=num_classes)
        images = jnp.zeros((1, size, size, 3))
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
        rng = np.random.default_rng(size)
        return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)

    pretrained, fresh = init(32, 11), init(48, 3)
    params, report = transfer(fresh, pretrained)
    assert Row(POSITIONS, (1, 1 + 6 * 6, 16), "resized") in report
    stem = [row.name for row in report if re.match("conv_root|gn_root|block|embedding", row.name)]
    assert len(stem) == 3 + 3 * 9 + 2 * 3 + 2
    old, new = flatten_dict(pretrained, sep="/"), flatten_dict(params, sep="/")
    for name in stem:
        np.testing.assert_array_equal(new[name], old[name])


def positioned(size, seed, kind, placement="stem"):
    sizes = {"patch_size": 2, "hidden_size": 8, "mlp_dim": 8, "num_heads": 2, "num_layers": 2}
    model = create_model(
        {"architecture": "vit", "num_classes": 3, **sizes},
        position_embedding=kind,
        position_placement=placement,
    )
    images = jnp.zeros((1, *size, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def test_2d_positions_are_resized_each_along_its_axis():
    old, fresh = positioned((4, 6), 1, "2d"), positioned((10, 6), 2, "2d")
    params, report = transfer(fresh, old)
    x, y = (params["Transformer"]["posembed_input"][f"pos_embedding_{a}"] for a in "xy")
    before = old["Transformer"]["posembed_input"]
    np.testing.assert_array_equal(x, before["pos_embedding_x"])
    for feature in range(4):
        expected = np.interp(np.linspace(0, 1, 5), [0, 1], before["pos_embedding_y"][0, :, feature])
        np.testing.assert_allclose(y[0, :, feature], expected, atol=1e-6)
    resized = [row.name for row in report if row.action == "resized"]
    assert resized == ["Transformer/posembed_input/pos_embedding_y"]


def test_positions_in_every_layer_are_each_resized():
    old, fresh = (positioned((n, n), n, "learned", "layers") for n in (6, 10))
    params, _ = transfer(fresh, old)
    for i in range(2):
        before, now = (
            tree["Transformer"][f"encoderblock_{i}"]["posembed"]["pos_embedding"]
            for tree in (old, params)
        )
        expected = zoomed(before[0, 1:].reshape(3, 3, 8), (5, 5)).reshape(25, 8)
        np.testing.assert_allclose(now[0, 1:], expected, atol=1e-6)
        np.testing.assert_array_equal(now[0, 0], before[0, 0])


def test_relative_positions_are_of_one_number_of_patches():
    old = positioned((4, 6), 1, "relative")
    params, _ = transfer(positioned((4, 6), 2, "relative"), old)
    name = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/relative/rel_embedding"
    np.testing.assert_array_equal(*(flatten_dict(tree, sep="/")[name] for tree in (params, old)))
    message = "relative position embeddings of 6 patches cannot be those of 12: .* use the image"
    with pytest.raises(UserError, match=message):
        transfer(positioned((4, 12), 2, "relative"), old)
    other = positioned((6, 4), 2, "relative")
    with pytest.raises(UserError, match="of 2 x 3 patches cannot be those of 3 x 2"):
        transfer(other, old, pretrained_grid=(2, 3), grid=(3, 2))


@pytest.mark.parametrize("kind", ["none", "sincos2d"])
def test_positions_that_are_not_learned_need_no_resizing(kind):
    _, report = transfer(positioned((8, 8), 2, kind), positioned((4, 4), 1, kind))
    assert not [row for row in report if row.action == "resized"]


def masked(params):
    rng = np.random.default_rng(9)
    head = {"kernel": rng.normal(size=(WIDTH, 512)), "bias": rng.normal(size=512)}
    others = {name: x for name, x in params.items() if name != "head"}
    return {**others, "mask_embedding": rng.normal(size=(1, 1, WIDTH)), "patch_head": head}


def not_loaded(report):
    return {(row.name, row.action) for row in report if row.action != "loaded"}


def test_what_only_masked_patch_prediction_has_is_dropped_and_the_head_is_new():
    old, fresh = masked(tree(5, classes=3, seed=1)), tree(5, classes=3, seed=2)
    params, report = transfer(fresh, old)
    assert not_loaded(report) == {
        ("mask_embedding", "dropped"),
        ("patch_head/bias", "dropped"),
        ("patch_head/kernel", "dropped"),
        ("head/bias", "new"),
        ("head/kernel", "new"),
    }
    assert params.keys() == fresh.keys()
    np.testing.assert_array_equal(params["head"]["kernel"], fresh["head"]["kernel"])
    np.testing.assert_array_equal(params["cls"], old["cls"])


def test_masked_patch_prediction_goes_on_from_any_trunk():
    old, fresh = tree(5, classes=3, seed=1), masked(tree(5, classes=3, seed=2))
    _, report = transfer(fresh, old)
    assert not_loaded(report) == {
        ("mask_embedding", "new"),
        ("patch_head/bias", "new"),
        ("patch_head/kernel", "new"),
        ("head/bias", "dropped"),
        ("head/kernel", "dropped"),
    }
    # From its own kind the mask embedding goes on; the head is as new as any.
    before = masked(old)
    before["mask_embedding"] = before["mask_embedding"] + 1
    params, report = transfer(fresh, before)
    np.testing.assert_array_equal(params["mask_embedding"], before["mask_embedding"])
    assert ("patch_head/kernel", "new") in not_loaded(report)


def test_the_printed_report_joins_equal_units(capsys):
    print_report([Row(f"block1/unit{u}/gn1/scale", (64,), "loaded") for u in (1, 2, 10)])
    assert capsys.readouterr().out.split() == ["loaded", "(64,)", "block*/unit*/gn1/scale", "x3"]
