import flax.linen as nn
import jax
import numpy as np
import pytest

from vit_jax.models import create_model
from vit_jax.models.encoder import StochasticDepth

TINY = {
    "architecture": "vit",
    "patch_size": 4,
    "hidden_size": 24,
    "num_layers": 3,
    "mlp_dim": 40,
    "num_heads": 3,
    "num_classes": 5,
}
IMAGES = np.random.default_rng(1).uniform(-1, 1, (4, 8, 12, 3)).astype(np.float32)


def random_params(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def applied(model, params, images=IMAGES):
    """The logits in training as a function of the seed."""

    @jax.jit
    def apply(params, key):
        return model.apply({"params": params}, images, train=True, rngs={"dropout": key})

    return lambda seed: np.asarray(apply(params, jax.random.key(seed)))


def test_a_branch_is_left_out_for_whole_examples_and_keeps_its_expectation():
    x = np.random.default_rng(0).normal(2, 1, (20_000, 3, 2)).astype(np.float32)
    y = np.asarray(StochasticDepth().apply({}, x, 0.3, False, rngs={"dropout": jax.random.key(0)}))
    factor = y / x
    out = factor[:, 0, 0] == 0
    assert not np.any(factor[out])
    np.testing.assert_allclose(factor[~out], 1 / 0.7, rtol=1e-5)
    assert out.mean() == pytest.approx(0.3, abs=0.013)  # Four standard deviations.
    np.testing.assert_allclose(y.mean(0), x.mean(0), rtol=0.03)


def test_rates_grow_linearly_over_the_layers_and_are_those_of_both_branches():
    # Rematerialized layers are traced: their rates are no numbers.
    model, found = create_model(TINY, stochastic_depth=0.4, remat="nothing"), []
    params = random_params(model)

    def record(call, args, kwargs, context):
        if isinstance(context.module, StochasticDepth):
            found.append((context.module.path[1], float(args[1])))
        return call(*args, **kwargs)

    def apply(key):
        return model.apply({"params": params}, IMAGES, train=True, rngs={"dropout": key})

    with nn.intercept_methods(record):
        jax.eval_shape(apply, jax.random.key(0))
    assert [name for name, _ in found] == [f"encoderblock_{i}" for i in (0, 0, 1, 1, 2, 2)]
    np.testing.assert_allclose([rate for _, rate in found], [0, 0, 0.2, 0.2, 0.4, 0.4], rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"scan_layers": True}, {"remat": "dots"}])
def test_a_layer_that_is_always_left_out_is_not_there(options):
    # The first of two layers always stays, the second never does.
    sizes = TINY | {"num_layers": 2}
    model = create_model(sizes, stochastic_depth=1 - 1e-6, **options)
    params = random_params(model)
    one = create_model(sizes | {"num_layers": 1})
    encoder = {k: x for k, x in params["Transformer"].items() if k != "encoderblock_1"}
    expected = jax.jit(one.apply)({"params": params | {"Transformer": encoder}}, IMAGES)
    np.testing.assert_allclose(applied(model, params)(0), expected, rtol=1e-4, atol=1e-5)


def test_the_rng_decides_and_evaluation_is_without():
    model, plain = create_model(TINY, stochastic_depth=0.5), create_model(TINY)
    params = random_params(plain)
    assert jax.tree.structure(params) == jax.tree.structure(random_params(model))
    logits = applied(model, params)
    first = logits(0)
    np.testing.assert_array_equal(logits(0), first)
    assert not np.allclose(logits(1), first)
    evaluated = (jax.jit(m.apply)({"params": params}, IMAGES) for m in (model, plain))
    np.testing.assert_array_equal(*evaluated)


def test_each_image_has_its_own_draw():
    model = create_model(TINY, stochastic_depth=0.5)
    logits = applied(model, random_params(model), np.repeat(IMAGES[:1], 16, axis=0))
    assert len(np.unique(logits(0)[:, 0].round(4))) > 3
