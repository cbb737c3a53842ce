"""The gradient of every part against finite differences, in float64.

The parts compute in float32 inside; here `jnp.float32` is float64 while they run, so that the very
same code is compared to nine digits, and not to the four that float32 leaves of a difference.

The error of a central difference D(h) is h^2 / 6 times a third derivative, of which D(h) - D(2 h)
is three times as much, and the rounding of two values divided by h. Their sum is the bound; that it
is a small part of the gradient itself is asserted as well, or the comparison could not fail.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import create_model, masked
from vit_jax.models.activations import GELU
from vit_jax.models.attention import attend, softmax
from vit_jax.models.dropout import Dropout
from vit_jax.models.encoder import StochasticDepth
from vit_jax.models.normalization import normalize
from vit_jax.models.resnet import GroupNorm, StdConv, standardize, standardize_bit
from vit_jax.steps import classification_loss

KEY = jax.random.key(0)
SIDE = 8
VIT = {
    "architecture": "vit",
    "patch_size": 4,
    "hidden_size": 8,
    "num_layers": 1,
    "mlp_dim": 12,
    "num_heads": 2,
    "num_classes": 3,
}
# Programs that run a hundred times on a few numbers.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# Roundings of a value: of sums over its terms, one after the other and at random.
ROUNDINGS = 30


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    with contextlib.ExitStack() as stack:
        before = jax.config.jax_enable_x64
        stack.callback(jax.config.update, "jax_enable_x64", before)
        jax.config.update("jax_enable_x64", True)
        monkeypatch.setattr(jnp, "float32", jnp.float64)
        yield


def normal(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape)


def assert_gradients(function, args, step=1e-5, at_least=1e-6):
    """Compares the gradients of sum(c * function(args)), c at random, leaf by leaf.

    Args:
        function: of a tree of float64 arrays to one.
        args: the tree.
        step: h; small where there are kinks, so that none lies in between.
        at_least: the largest bound that is still a comparison, as a part of the gradient.
    """
    shape = jax.eval_shape(function, args)
    assert shape.dtype == jnp.float64
    weights = normal(*shape.shape, seed=1)

    def loss(args):
        terms = weights * function(args)
        return terms.sum(), jnp.abs(terms).sum()

    # One program: the compiler is what takes time here.
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICKLY)
    (_, size), gradients = compiled(args)
    rounding = ROUNDINGS * np.finfo(float).eps * float(size) / step
    leaves, tree = jax.tree.flatten(args)
    for i, (leaf, gradient) in enumerate(zip(leaves, jax.tree.leaves(gradients), strict=True)):
        gradient = np.asarray(gradient)
        assert gradient.dtype == np.float64
        # A random direction shows a mistake of any element, the gradient's own one of its size.
        along = normal(*leaf.shape, seed=i + 2)
        along = along / np.linalg.norm(along) + gradient / (np.linalg.norm(gradient) or 1)

        def moved(distance, i=i, along=along):
            changed = [x + distance * along if i == j else x for j, x in enumerate(leaves)]
            return float(compiled(jax.tree.unflatten(tree, changed))[0][0])

        near = (moved(step) - moved(-step)) / (2 * step)
        far = (moved(2 * step) - moved(-2 * step)) / (4 * step)
        bound = abs(far - near) + rounding
        right = float(np.vdot(gradient, along))
        assert abs(right - near) <= bound, (i, leaf.shape, right, near, bound)
        size = float(np.linalg.norm(gradient))
        assert bound <= max(at_least * size, 2 * rounding), (i, leaf.shape, bound, size)


def params_of(module, *inputs, scale=0.5, **options):
    """Random parameters: fresh ones are zero where gradients would vanish."""
    shapes = jax.eval_shape(lambda: module.init(KEY, *inputs, **options))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    drawn = [normal(*x.shape, seed=10 + i, scale=scale) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(tree, drawn)


def double(module):
    """A model that computes in float64, of which a config knows nothing."""
    object.__setattr__(module.config, "dtype", "float64")
    return module


@pytest.mark.parametrize("form", GELU)
def test_gelu(form):
    assert_gradients(GELU[form], normal(4, 50, scale=2))


@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_softmax(spread):
    assert_gradients(softmax, normal(3, 4, 7, scale=spread))


def test_attention():
    assert_gradients(lambda x: attend(*x), [normal(2, 5, 3, 4, seed=i) for i in range(3)])


@pytest.mark.parametrize(("offset", "deviation"), [(0.5, 2.0), (100.0, 1.0), (0.0, 1e-2)])
def test_layer_norm(offset, deviation):
    x, scale, bias = offset + normal(2, 3, 16, scale=deviation), normal(16), normal(16, seed=1)
    step = 1e-5 * min(deviation, 1)
    float64 = jnp.dtype("float64")
    assert_gradients(lambda args: normalize(*args, 1e-6, float64), (x, scale, bias), step)


@pytest.mark.parametrize("batch_axes", [1, 2])
def test_group_norm(batch_axes):
    x = normal(2, 3, 4, 64)
    module = GroupNorm(1e-5, dtype=jnp.float64, batch_axes=batch_axes)
    params = params_of(module, x)
    assert_gradients(lambda args: module.apply({"params": args[0]}, args[1]), (params, x))


@pytest.mark.parametrize(
    ("form", "padding", "stride"), [(standardize, None, 2), (standardize_bit, 1, 1)]
)
def test_standardized_convolution(form, padding, stride):
    x = normal(2, 5, 5, 3)
    module = StdConv(4, 3, stride, jnp.float64, padding=padding, standardize=form)
    params = params_of(module, x)
    assert_gradients(lambda args: module.apply({"params": args[0]}, args[1]), (params, x))


def test_dropout_of_a_key():
    def dropped(x):
        return Dropout(0.3).apply({}, x, False, rngs={"dropout": KEY})

    assert_gradients(dropped, normal(8, 12))


def test_stochastic_depth_of_a_key():
    def left_out(x):
        return StochasticDepth().apply({}, x, 0.3, False, rngs={"dropout": KEY})

    assert 0 < np.sum(left_out(np.ones((12, 3, 2)))[:, 0, 0] == 0) < 12
    assert_gradients(left_out, normal(12, 3, 2))


@pytest.mark.parametrize("labels", ["classes", "shares"])
@pytest.mark.parametrize(("loss", "smoothing"), [("softmax", 0.1), ("sigmoid", 0.1)])
def test_losses(loss, smoothing, labels):
    targets = np.arange(4) % 3
    if labels == "shares":  # As mixup makes them.
        targets = 0.7 * np.eye(3)[targets] + 0.3 * np.eye(3)[np.roll(targets, 1)]
    assert_gradients(lambda x: classification_loss(x, targets, loss, smoothing), normal(4, 3))


MODELS = {
    "class token, learned positions, dropout": {"dropout_rate": 0.2, "attention_dropout_rate": 0.2},
    "mean, 2d positions in every layer, erf": {
        "classifier": "gap",
        "position_embedding": "2d",
        "position_placement": "layers",
        "gelu": "erf",
    },
    "hidden layer, relative positions, stochastic depth": {
        "representation_size": 5,
        "position_embedding": "relative",
        "stochastic_depth": 0.5,
        "num_layers": 2,
    },
    "shared sines, scanned, computed again": {
        "position_embedding": "sincos2d",
        "position_placement": "shared",
        "scan_layers": True,
        "num_layers": 2,
        "remat": "everything",
    },
    "features": {"num_classes": 0},
    "axial": {"architecture": "axial_vit", "classifier": "gap"},
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    module = double(create_model(VIT, **MODELS[name]))
    images = normal(3, SIDE, SIDE, 3)
    params = params_of(module, images)

    def logits(args):
        rngs = {"dropout": KEY}
        return module.apply({"params": args[0]}, args[1], train=True, rngs=rngs)

    assert_gradients(logits, (params, images))


# ReLU and the maximum of a pool have kinks, of which a small step finds none.
RESNETS = {
    "hybrid": {
        **VIT,
        "num_layers": 1,
        "architecture": "hybrid",
        "resnet_layers": (1,),
        "patch_size": 1,
    },
    "root": {
        **VIT,
        "num_layers": 1,
        "architecture": "hybrid",
        "resnet_layers": (),
        "patch_size": 2,
    },
    "resnet": {"architecture": "resnet", "resnet_layers": (1, 1), "num_classes": 3},
    "axial_resnet": {"architecture": "axial_resnet", "resnet_layers": (1, 1), "num_classes": 3},
}


@pytest.mark.parametrize("name", RESNETS)
def test_models_with_convolutions(name):
    module = double(create_model(RESNETS[name]))
    images = normal(1, SIDE, SIDE, 3)
    params = params_of(module, images)
    assert_gradients(
        lambda args: module.apply({"params": args[0]}, args[1]), (params, images), step=1e-7
    )


@pytest.mark.parametrize("target", ["mean_color", "pixels"])
def test_the_loss_of_masked_patches(target):
    module = double(masked.predictor(create_model(VIT), target))
    images = np.tanh(normal(2, SIDE, SIDE, 3))
    corruption = masked.draw_corruption(KEY, 2, 4, 0.5)
    params = params_of(module, images, corruption)
    targets = masked.TARGETS[target](images, module.downsampling)
    targets = jnp.take_along_axis(targets, corruption.chosen[..., None], axis=1)

    def loss(params):
        predictions = module.apply({"params": params}, images, corruption)
        return masked.scores(predictions, targets)["loss"]

    assert_gradients(loss, params)


def test_a_wrong_gradient_is_noticed():
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (square(x), x), lambda x, dy: (2 * x * dy * (1 + 1e-6),))
    with pytest.raises(AssertionError):
        assert_gradients(square, normal(5, 4))
