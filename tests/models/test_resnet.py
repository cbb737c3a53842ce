import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import describe, resnet

RNG = np.random.default_rng(0)
HYBRID = {
    "architecture": "hybrid",
    "patch_size": 1,
    "hidden_size": 8,
    "num_layers": 1,
    "mlp_dim": 8,
    "num_heads": 1,
    "num_classes": 0,
    "group_norm_epsilon": 1e-3,
}


def conv_reference(x, kernel, stride):
    """SAME padding, one window at a time; the kernel standardized over all but its outputs."""
    kernel = np.asarray(kernel, np.float64)
    flat = kernel.reshape(-1, kernel.shape[-1])
    kernel = ((flat - flat.mean(0)) / (flat.std(0) + 1e-5)).reshape(kernel.shape)
    windows = same_windows(x, len(kernel), stride, 0.0)
    return np.einsum("bhwyxc,yxco->bhwo", windows, kernel)


def same_windows(x, size, stride, fill):
    """[batch, rows, columns, size, size, channels]: as TensorFlow pads, more after than before."""
    outputs = [-(-side // stride) for side in x.shape[1:3]]
    needed = [max((n - 1) * stride + size - side, 0)
              for n, side in zip(outputs, x.shape[1:3], strict=True)]  # fmt: skip
    pads = [(n // 2, n - n // 2) for n in needed]
    x = np.pad(x.astype(np.float64), ((0, 0), *pads, (0, 0)), constant_values=fill)
    rows, columns = (range(0, n * stride, stride) for n in outputs)
    return np.stack(
        [np.stack([x[:, r : r + size, c : c + size] for c in columns], 1) for r in rows], 1
    )


def group_norm_reference(x, params, epsilon):
    batch, height, width, channels = x.shape
    groups = x.reshape(batch, height, width, 32, channels // 32)
    mean = groups.mean(axis=(1, 2, 4), keepdims=True)
    variance = groups.var(axis=(1, 2, 4), keepdims=True)
    x = ((groups - mean) / np.sqrt(variance + epsilon)).reshape(x.shape)
    return x * np.asarray(params["scale"]) + np.asarray(params["bias"])


def unit_reference(x, params, stride, epsilon):
    def block(x, name, stride=1):
        x = conv_reference(x, params[f"conv{name}"]["kernel"], stride)
        return group_norm_reference(x, params[f"gn{name}"], epsilon)

    shortcut = block(x, "_proj", stride) if "conv_proj" in params else x
    y = np.maximum(block(x, "1"), 0)
    y = np.maximum(block(y, "2", stride), 0)
    return np.maximum(shortcut + block(y, "3"), 0)


def random_params(module, x):
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    return jax.tree.map(lambda x: RNG.normal(0.3, 1, x.shape).astype(np.float32), shapes)


def apply(module, params, x):
    return jax.jit(module.apply)({"params": params}, x)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
def test_a_convolution_is_standardized_and_padded_to_the_same_size(size, stride):
    module = resnet.StdConv(5, size, stride)
    x = RNG.standard_normal((2, 8, 11, 3)).astype(np.float32)  # Even and odd sides.
    # So small that it matters where epsilon is added.
    params = {"kernel": np.float32(1e-4) * random_params(module, x)["kernel"]}
    actual = apply(module, params, x)
    assert_close(actual, conv_reference(x, params["kernel"], stride))


def test_a_constant_kernel_becomes_zero():
    np.testing.assert_array_equal(resnet.standardize(jnp.full((3, 3, 4, 2), 0.5)), 0)


def test_group_norm_is_that_of_flax():
    module, flax = resnet.GroupNorm(1e-3), nn.GroupNorm(32, epsilon=1e-3, use_fast_variance=False)
    x = RNG.normal(3, 0.1, (2, 4, 6, 64)).astype(np.float32)
    params = random_params(module, x)
    actual = apply(module, params, x)
    assert_close(actual, apply(flax, params, x))
    assert_close(actual, group_norm_reference(x, params, 1e-3))


def test_group_norm_in_16_bits_takes_its_statistics_in_32():
    # Relative to its mean, the spread is below the precision of bfloat16: only float32 keeps it.
    x = jnp.asarray(RNG.normal(100, 1, (1, 8, 8, 32)), jnp.bfloat16)
    y = resnet.GroupNorm(1e-6, dtype=jnp.bfloat16)
    actual, _ = jax.jit(y.init_with_output)(jax.random.key(0), x)
    expected = group_norm_reference(
        np.asarray(x, np.float64), {"scale": np.ones(32), "bias": np.zeros(32)}, 1e-6
    )
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, atol=0.01, rtol=0.01)


@pytest.mark.parametrize(
    ("channels", "stride", "projects"), [(64, 1, True), (128, 1, False), (128, 2, True)]
)
def test_a_unit_is_the_post_activation_bottleneck(channels, stride, projects):
    module = resnet.BottleneckUnit(describe(HYBRID), 32, stride)
    x = RNG.standard_normal((2, 4, 6, channels)).astype(np.float32)
    params = random_params(module, x)
    assert ("conv_proj" in params, "gn_proj" in params) == (projects, projects)
    actual = apply(module, params, x)
    assert_close(actual, unit_reference(x, params, stride, 1e-3))


def test_a_fresh_unit_passes_its_input_on():
    module = resnet.BottleneckUnit(describe(HYBRID), 32)
    x = RNG.uniform(0, 1, (1, 4, 4, 128)).astype(np.float32)
    y, _ = jax.jit(module.init_with_output)(jax.random.key(0), x)
    np.testing.assert_array_equal(y, x)


class Features(nn.Module):
    layers: tuple

    @nn.compact
    def __call__(self, images):
        return resnet.resnet_features(images, describe(HYBRID, resnet_layers=self.layers))


def test_the_root_convolves_normalizes_and_pools():
    module = Features(())
    images = RNG.standard_normal((2, 12, 16, 3)).astype(np.float32)
    params = random_params(module, images)
    x = conv_reference(images, params["conv_root"]["kernel"], 2)
    x = np.maximum(group_norm_reference(x, params["gn_root"], 1e-3), 0)
    expected = same_windows(x, 3, 2, -np.inf).max(axis=(3, 4))
    assert_close(apply(module, params, images), expected)


@pytest.mark.parametrize(
    ("layers", "factor", "channels"),
    [((), 4, 64), ((2,), 4, 256), ((3, 4, 9), 16, 1024), ((3, 4, 6, 3), 32, 2048)],
)
def test_the_feature_map_is_smaller_by_the_downsampling(layers, factor, channels):
    module, images = Features(layers), jnp.zeros((1, 224, 160, 3))
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    features = jax.eval_shape(module.apply, variables, images)
    assert resnet.downsampling(layers) == factor
    assert features.shape == (1, 224 // factor, 160 // factor, channels)
    names = {f"block{s + 1}": {f"unit{u + 1}" for u in range(n)} for s, n in enumerate(layers)}
    params = variables["params"]
    assert {s: set(params[s]) for s in params if s.startswith("block")} == names
