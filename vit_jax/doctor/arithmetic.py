"""Computations of JAX on a device, held against NumPy in 64 bits."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from vit_jax.doctor import reference
from vit_jax.models import create_model, describe, model_config
from vit_jax.models.activations import gelu_tanh
from vit_jax.models.encoder import EncoderConfig, MultiHeadSelfAttention, layer_norm
from vit_jax.models.resnet import NUM_GROUPS, GroupNorm
from vit_jax.state import TrainState, adam
from vit_jax.steps import classification, train_step

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
# Of errors relative to the largest value, of gradients to the norm of all: several times what right
# arithmetic shows, and less than what weights of a step before do.
LIMITS = {"float32": 2e-5, "bfloat16": 5e-2}
# Smaller ones do not show every fault: XNNPACK leaves small products alone.
_MODEL = {**model_config("ViT-Ti/16"), "num_layers": 1, "num_classes": 1000}
_IMAGES = (64, 32, 32, 3)
_HEADS = 3
_WIDTH = 192
_STEPS = 3
_ADAM = {"b1": 0.9, "b2": 0.999, "weight_decay": 0.1, "learning_rate": 1e-3}
_ADAM_EPSILON = 1e-8


class Result(NamedTuple):
    """The distance of one computation from the reference.

    Attributes:
        check: what was computed.
        dtype: of the computation, "float32" or "bfloat16".
        jitted: whether it was compiled as a whole, or operation by operation.
        error: relative; NaN if what was computed is.
    """

    check: str
    dtype: str
    jitted: bool
    error: float

    @property
    def passed(self) -> bool:
        """Tells whether the error is within the limit of the dtype."""
        return self.error <= LIMITS[self.dtype]


def check_device(device: jax.Device) -> Iterator[Result]:
    """Yields a result for every check, dtype and way to run it.

    Products of 32-bit numbers are asked for in full: see `default_product_error`.
    """
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        for dtype in DTYPES:
            for jitted in (True, False):
                wrap = jax.jit if jitted else lambda function: function
                for check, error in (*_operations(dtype, wrap), *_model(dtype, wrap)):
                    yield Result(check, dtype, jitted, error)


def default_product_error(device: jax.Device) -> float:
    """The error of a product of 32-bit numbers as JAX computes it when nothing is asked for.

    Accelerators round the factors, to TF32 or bfloat16, which is far from a fault.
    """
    a, w = _normal((64, 768), seed=1), _normal((768, 1000), seed=2)
    with jax.default_device(device):
        return _error(jax.jit(jnp.matmul)(a, w), a.astype(float) @ w.astype(float))


def _normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _error(found: Any, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest value that is expected."""
    found = np.asarray(found).astype(np.float64)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _operations(dtype: str, wrap: Callable) -> Iterator[tuple[str, float]]:
    """Single operations, each on inputs that are rounded to the dtype beforehand."""
    for name, (function, inputs, expected) in _cases(jnp.dtype(dtype)).items():
        inputs = [x.astype(DTYPES[dtype]) for x in inputs]
        exact = expected(*(x.astype(np.float64) for x in inputs))
        yield name, _error(wrap(function)(*map(jnp.asarray, inputs)), exact)
    yield "product, its weights updated in place", _updated_product(dtype, wrap)


def _cases(dtype: Any) -> dict[str, tuple[Callable, list[np.ndarray], Callable]]:
    """For each operation: as the models compute it, its inputs, and the reference."""
    tokens = _normal((8, 5, _WIDTH), seed=3) + 4  # Variances that are taken carelessly cancel.
    maps = _normal((2, 14, 14, 64), seed=4) + 4
    attend = _attention_params()
    scale, bias = 1 + _normal((_WIDTH,), seed=5) / 10, _normal((_WIDTH,), seed=6)
    config = cast(EncoderConfig, describe(_MODEL, dtype=str(dtype)))
    norm = layer_norm(config)
    group_norm = GroupNorm(1e-6, dtype=dtype)
    attention = MultiHeadSelfAttention(config)
    return {
        "product": (
            jnp.matmul,
            [_normal((64, 768), seed=1), _normal((768, 1000), seed=2)],
            np.matmul,
        ),
        "convolution": (
            lambda x, w: jax.lax.conv_general_dilated(
                x, w, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            ),
            [maps, _normal((3, 3, 64, 64), seed=7)],
            _convolution,
        ),
        "softmax": (
            lambda x: jax.nn.softmax(x.astype(jnp.float32)),
            [3 * _normal((64, 1000), seed=8)],
            reference.softmax,
        ),
        "LayerNorm": (
            lambda x: norm.apply({"params": {"scale": scale, "bias": bias}}, x),
            [tokens],
            lambda x: reference.layer_norm(x, {"scale": scale, "bias": bias})[0],
        ),
        "GroupNorm": (
            lambda x: group_norm.apply(
                {"params": {"scale": jnp.ones(64), "bias": jnp.zeros(64)}}, x
            ),
            [maps],
            _group_norm,
        ),
        "GELU": (gelu_tanh, [3 * _normal((64, 1000), seed=9)], lambda x: reference.gelu(x)[0]),
        "attention": (
            lambda x: attention.apply({"params": attend}, x, deterministic=True),
            [_normal((8, 5, _WIDTH), seed=10)],
            lambda x: reference.attention(x, attend)[0],
        ),
    }


def _attention_params() -> dict[str, Any]:
    heads = (_HEADS, _WIDTH // _HEADS)
    projection, out = ((_WIDTH, *heads), heads), ((*heads, _WIDTH), (_WIDTH,))
    shapes = {"query": projection, "key": projection, "value": projection, "out": out}
    return {
        name: {
            "kernel": _normal(kernel, seed) * _WIDTH**-0.5,
            "bias": _normal(bias, seed + 10) / 10,
        }
        for seed, (name, (kernel, bias)) in enumerate(shapes.items(), start=20)
    }


def _convolution(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = x.shape[1] // 2, x.shape[2] // 2
    taps = [
        padded[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2] @ kernel[i, j]
        for i in range(3)
        for j in range(3)
    ]
    return sum(taps)


def _group_norm(x: np.ndarray) -> np.ndarray:
    grouped = x.reshape(*x.shape[:3], NUM_GROUPS, -1)
    return reference.normalize(grouped, (1, 2, 4), epsilon=1e-6)[0].reshape(x.shape)


def _updated_product(dtype: str, wrap: Callable) -> float:
    """The worst error of a product whose weights get other values where they lie in memory."""
    product = wrap(jnp.matmul)
    a = jnp.asarray(_normal((64, 768), seed=1), dtype)
    w = jnp.asarray(_normal((768, 1000), seed=2), dtype)
    update = jax.jit(lambda w, x: w + x, donate_argnums=0)
    errors = []
    for step in range(_STEPS + 1):
        exact = np.asarray(a).astype(float) @ np.asarray(w).astype(float)
        errors.append(_error(product(a, w), exact))
        w = update(w, jnp.asarray(_normal(w.shape, seed=30 + step), dtype))
    return max(errors)


def _model(dtype: str, wrap: Callable) -> Iterator[tuple[str, float]]:
    """Some training steps of one layer of ViT-Ti/16: images of 2 x 2 patches."""
    model = create_model(_MODEL, dtype=dtype)
    images = _normal(_IMAGES, seed=40)
    labels = np.random.default_rng(41).integers(1000, size=len(images)).astype(np.int32)
    optimizer, state = _create_state(model)
    step_fn = functools.partial(
        train_step, objective=classification(model, "softmax"), optimizer=optimizer
    )
    if wrap is jax.jit:
        step_fn = jax.jit(step_fn, donate_argnums=0)
    apply = wrap(lambda params, images: model.apply({"params": params}, images))
    batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels)}
    in_64_bits = images.astype(np.float64)

    before = _to_64_bits(state.params)
    exact, _ = reference.logits(before, in_64_bits)
    yield "ViT, logits", _error(apply(state.params, batch["image"]), exact)
    losses = []
    for step in range(_STEPS):
        loss, gradients = reference.loss(before, in_64_bits, labels)
        state, metrics = step_fn(state, batch)
        losses.append(abs(float(metrics["loss"]) - loss) / loss)
        after = _to_64_bits(state.params)
        if step == 0:
            moments = _to_64_bits(_moments(state))
            yield "ViT, gradients", _gradient_error(moments, gradients())
            yield "ViT, update by AdamW", _update_error(before, after, moments)
        before = after
    yield f"ViT, losses of {_STEPS} steps", float(np.max(losses))
    exact, _ = reference.logits(before, in_64_bits)
    yield "ViT, logits after them", _error(apply(state.params, batch["image"]), exact)


def _create_state(model: Any) -> tuple[Any, TrainState]:
    optimizer = adam(
        lambda step: jnp.asarray(_ADAM["learning_rate"]),  # noqa: ARG005
        b1=_ADAM["b1"],
        b2=_ADAM["b2"],
        weight_decay=_ADAM["weight_decay"],
        decay="all",
        mu_dtype="float32",
        clip_norm=0.0,
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(_IMAGES))["params"]
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    params = tree.unflatten(
        [jnp.asarray(_draw(path[-1].key, x.shape, seed)) for seed, (path, x) in enumerate(leaves)]
    )
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema_params=None,
        rng=jax.random.key(0),
    )
    return optimizer, state


def _draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A parameter of a size that it could have in a trained model; none is 0."""
    if name == "kernel":
        return _normal(shape, seed) * math.prod(shape[:-1]) ** -0.5
    return (name == "scale") + _normal(shape, seed) / 10


def _to_64_bits(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), tree)


def _moments(state: TrainState) -> tuple[Any, Any]:
    (found,) = (x for x in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(x))
    return found.mu, found.nu


def _is_adam(x: Any) -> bool:
    return hasattr(x, "mu")


def _gradient_error(moments: tuple[Any, Any], expected: Any) -> float:
    """The error of the gradients, which the first moment holds after one step."""
    found = jax.tree.map(lambda m: m / (1 - _ADAM["b1"]), moments[0])
    return _norm(jax.tree.map(np.subtract, found, expected)) / _norm(expected)


def _update_error(before: Any, after: Any, moments: tuple[Any, Any]) -> float:
    """The error of the new parameters, relative to their change, about the learning rate."""

    def exact(p: np.ndarray, m: np.ndarray, v: np.ndarray) -> np.ndarray:
        m, v = m / (1 - _ADAM["b1"]), v / (1 - _ADAM["b2"])
        step = m / (np.sqrt(v) + _ADAM_EPSILON) + _ADAM["weight_decay"] * p
        return p - _ADAM["learning_rate"] * step

    expected = jax.tree.map(exact, before, *moments)
    difference = jax.tree.map(np.subtract, after, expected)
    change = jax.tree.map(np.subtract, expected, before)
    return _norm(difference) / _norm(change)


def _norm(tree: Any) -> float:
    return math.sqrt(sum((x**2).sum() for x in jax.tree.leaves(tree)))
