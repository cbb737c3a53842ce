"""A Vision Transformer in NumPy and 64 bits: Eqs. 1 to 4, and their derivatives by hand.

What JAX computes is held against it. Every operation returns its result and a function from the
derivative of the loss by that result to those by its arguments.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray
Params = Mapping[str, Any]


def softmax(x: Array) -> Array:
    """Softmax over the last axis."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def gelu(x: Array) -> tuple[Array, Callable[[Array], Array]]:
    """GELU in its tanh form."""
    slope = np.sqrt(2 / np.pi)
    tanh = np.tanh(slope * (x + 0.044715 * x * x * x))

    def backward(dy: Array) -> Array:
        inner = slope * (1 + 3 * 0.044715 * x**2)
        return dy * (0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * inner)

    return 0.5 * x * (1 + tanh), backward


def normalize(x: Array, axis: int | tuple[int, ...], epsilon: float) -> tuple[Array, Array]:
    """(x - mean) / sqrt(variance + epsilon) over some axes, and 1 / sqrt(variance + epsilon)."""
    centered = x - x.mean(axis, keepdims=True)
    scale = 1 / np.sqrt((centered**2).mean(axis, keepdims=True) + epsilon)
    return centered * scale, scale


def layer_norm(x: Array, params: Params) -> tuple[Array, Callable[[Array], tuple[Array, Params]]]:
    """LayerNorm over the last axis, with the epsilon of the paper's code."""
    normal, scale = normalize(x, -1, epsilon=1e-6)

    def backward(dy: Array) -> tuple[Array, Params]:
        dn = dy * params["scale"]
        along = normal * (dn * normal).mean(-1, keepdims=True)
        dx = scale * (dn - dn.mean(-1, keepdims=True) - along)
        return dx, {"scale": _rows(dy * normal).sum(0), "bias": _rows(dy).sum(0)}

    return normal * params["scale"] + params["bias"], backward


def dense(x: Array, params: Params) -> tuple[Array, Callable[[Array], tuple[Array, Params]]]:
    """A linear layer whose kernel maps the last axis of x, however it is shaped."""
    # Of rows: NumPy multiplies an array of more axes a few tokens at a time, which is slow.
    rows, kernel = _rows(x), params["kernel"].reshape(x.shape[-1], -1)

    def backward(dy: Array) -> tuple[Array, Params]:
        d_rows = _rows(dy)
        grads = {"kernel": rows.T @ d_rows, "bias": d_rows.sum(0)}
        dx = (d_rows @ kernel.T).reshape(x.shape)
        return dx, {name: x.reshape(params[name].shape) for name, x in grads.items()}

    y = rows @ kernel + params["bias"].reshape(-1)
    return y.reshape(*x.shape[:-1], -1), backward


def attention(x: Array, params: Params) -> tuple[Array, Callable[[Array], tuple[Array, Params]]]:
    """MSA (Eqs. 5 to 8) of x [batch, tokens, hidden_size]."""
    heads = params["query"]["kernel"].shape[1]
    projected = {name: dense(x, params[name]) for name in ("query", "key", "value")}
    q, k, v = (_split(y, heads) for y, _ in projected.values())
    root = q.shape[-1] ** -0.5
    weights = softmax(q @ k.swapaxes(-1, -2) * root)
    y, out_backward = dense(_join(weights @ v), params["out"])

    def backward(dy: Array) -> tuple[Array, Params]:
        dy, out = out_backward(dy)
        dy = _split(dy, heads)
        dweights = dy @ v.swapaxes(-1, -2)
        dlogits = weights * (dweights - (dweights * weights).sum(-1, keepdims=True)) * root
        derivatives = (dlogits @ k, dlogits.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ dy)
        dx, grads = np.zeros_like(x), {"out": out}
        for (name, (_, project)), derivative in zip(projected.items(), derivatives, strict=True):
            part, grads[name] = project(_join(derivative))
            dx += part
        return dx, grads

    return y, backward


def block(z: Array, params: Params) -> tuple[Array, Callable[[Array], tuple[Array, Params]]]:
    """Computes one Transformer layer (Eqs. 2 and 3)."""
    x, norm_0 = layer_norm(z, params["LayerNorm_0"])
    x, attend = attention(x, params["MultiHeadDotProductAttention_1"])
    z = z + x
    x, norm_2 = layer_norm(z, params["LayerNorm_2"])
    x, dense_0 = dense(x, params["MlpBlock_3"]["Dense_0"])
    x, activate = gelu(x)
    x, dense_1 = dense(x, params["MlpBlock_3"]["Dense_1"])

    def backward(dz: Array) -> tuple[Array, Params]:
        dx, of_dense_1 = dense_1(dz)
        dx, of_dense_0 = dense_0(activate(dx))
        dx, of_norm_2 = norm_2(dx)
        dz = dz + dx
        dx, of_attention = attend(dz)
        dx, of_norm_0 = norm_0(dx)
        return dz + dx, {
            "LayerNorm_0": of_norm_0,
            "LayerNorm_2": of_norm_2,
            "MlpBlock_3": {"Dense_0": of_dense_0, "Dense_1": of_dense_1},
            "MultiHeadDotProductAttention_1": of_attention,
        }

    return z + x, backward


def logits(params: Params, images: Array) -> tuple[Array, Callable[[Array], Params]]:
    """The logits of a ViT with a class token, learned positions, tanh GELU and a linear head.

    Args:
        params: the official tree, of float64.
        images: [batch, height, width, 3] float64.

    Returns:
        [batch, num_classes], and a function from the loss's derivative by them to that by params.
    """
    encoder = params["Transformer"]
    patches = _patches(images, params["embedding"]["kernel"].shape[0])
    x, embed = dense(patches, params["embedding"])
    cls = np.broadcast_to(params["cls"], (len(x), 1, x.shape[-1]))
    z = np.concatenate([cls, x], axis=1) + encoder["posembed_input"]["pos_embedding"]  # Eq. 1
    layers = []
    while f"encoderblock_{len(layers)}" in encoder:
        z, backward = block(z, encoder[f"encoderblock_{len(layers)}"])
        layers.append(backward)
    y, norm = layer_norm(z, encoder["encoder_norm"])  # Eq. 4
    result, head = dense(y[:, 0], params["head"])

    def derivatives(dlogits: Array) -> Params:
        dy = np.zeros_like(y)
        dy[:, 0], of_head = head(dlogits)
        dz, of_norm = norm(dy)
        of_layers = {}
        for i in reversed(range(len(layers))):
            dz, of_layers[f"encoderblock_{i}"] = layers[i](dz)
        of_positions = {"pos_embedding": dz.sum(0, keepdims=True)}
        transformer = {**of_layers, "encoder_norm": of_norm, "posembed_input": of_positions}
        return {
            "Transformer": transformer,
            "cls": dz[:, :1].sum(0, keepdims=True),
            "embedding": embed(dz[:, 1:])[1],
            "head": of_head,
        }

    return result, derivatives


def loss(params: Params, images: Array, labels: Array) -> tuple[float, Callable[[], Params]]:
    """Mean softmax cross-entropy in nats, and a function that returns its gradients."""
    scores, derivatives = logits(params, images)
    shares = softmax(scores)
    rows = np.arange(len(labels))

    def gradients() -> Params:
        dlogits = shares.copy()
        dlogits[rows, labels] -= 1
        return derivatives(dlogits / len(labels))

    return float(-np.log(shares[rows, labels]).mean()), gradients


def _patches(images: Array, size: int) -> Array:
    batch, height, width, channels = images.shape
    x = images.reshape(batch, height // size, size, width // size, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _split(x: Array, heads: int) -> Array:
    return x.reshape(*x.shape[:-1], heads, -1).swapaxes(-2, -3)


def _join(x: Array) -> Array:
    x = x.swapaxes(-2, -3)
    return x.reshape(*x.shape[:-2], -1)
