"""Low-rank adaptation of a Transformer's kernels (LoRA; Hu et al., 2022, arXiv 2106.09685).

A kernel W becomes W + alpha / rank * A B, of which A and B alone are trained. They lie beside the
parameters of the model, under "lora", and are multiplied out before the model is applied: model,
analysis, export and every format of weights know nothing of them.
"""

import functools
import re
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.errors import UserError, brief

Params = dict[str, Any]

# Where A and B are in the parameters of a run.
ADAPTERS = "lora"
# The kernels of a layer that can be adapted, by the end of their names.
TARGETS = {
    **{name: rf"/{name}/kernel" for name in ("query", "key", "value", "out")},
    "mlp": r"/MlpBlock_3/.*/kernel",
}
# Beside A and B the head, and the pooling and hidden layer before it, are trained as usual.
FROZEN = rf"(?!{ADAPTERS}/|\w*head\w*/|MAPHead_0/|pre_logits/).*=0"


def parse_targets(text: str) -> tuple[str, ...]:
    """Reads "query,value": words of `TARGETS`.

    Raises:
        UserError: there is none, or one is unknown.
    """
    words = tuple(word.strip() for word in text.split(","))
    if unknown := [word for word in words if word not in TARGETS]:
        raise UserError(f"{brief(unknown[0])} is no kernel of a layer: use {','.join(TARGETS)}")
    return words


def adapted_kernels(names: Iterable[str], targets: str) -> list[str]:
    """The names of the kernels that get an A and a B.

    Args:
        names: of the parameters of a model, parts joined by "/".
        targets: see `parse_targets`.

    Raises:
        UserError: there are none: the model has no Transformer.
    """
    ends = "|".join(TARGETS[word] for word in parse_targets(targets))
    pattern = re.compile(rf"Transformer/encoderblock_\d+(?:/.*)?(?:{ends})")
    found = sorted(name for name in names if pattern.fullmatch(name))
    if not found:
        raise UserError(
            f"lora.targets is {brief(targets)}, but the model has no such kernels in layers of a "
            "Transformer: set --config.lora.rank=0"
        )
    return found


def with_adapters(params: Params, *, rank: int, targets: str, seed: int) -> Params:
    """The parameters of a model and, under "lora", an A and a B for each adapted kernel; traceable.

    A is drawn from a normal distribution and B is zero, so that nothing is changed at first. Not in
    the paper: A's standard deviation, 1 / rank as in PEFT. A has shape [inputs, rank], B [rank,
    outputs], all heads together; float32.

    Args:
        params: of a model.
        rank: of the change.
        targets: see `parse_targets`.
        seed: of the run.

    Raises:
        UserError: as `adapted_kernels` does.
    """
    kernels = flatten_dict(params, sep="/")
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(ADAPTERS.encode()))
    adapters = {}
    for index, name in enumerate(adapted_kernels(kernels, targets)):
        inputs, outputs = _sides(name, kernels[name].shape)
        layer = name.rpartition("/")[0]
        draw = jax.random.normal(jax.random.fold_in(key, index), (inputs, rank))
        adapters[f"{layer}/a"] = draw / rank
        adapters[f"{layer}/b"] = jnp.zeros((rank, outputs))
    return {**params, ADAPTERS: unflatten_dict(adapters, sep="/")}


def _sides(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Inputs and outputs of a kernel, all heads together."""
    inputs = len(shape) - 1 if name.endswith("/out/kernel") else 1
    return int(np.prod(shape[:inputs])), int(np.prod(shape[inputs:]))


def merge(params: Params, alpha: float) -> Params:
    """The parameters of the model itself; traceable. Without "lora" they are what is given.

    Of NumPy's arrays they are computed in 64 bits, and so are the same on every machine.

    Args:
        params: see `with_adapters`.
        alpha: of the run.

    Raises:
        ValueError: A and B are not those of a kernel.
    """
    if ADAPTERS not in params:
        return params
    merged = flatten_dict({k: x for k, x in params.items() if k != ADAPTERS}, sep="/")
    adapters = flatten_dict(params[ADAPTERS], sep="/")
    for layer in sorted({name.rpartition("/")[0] for name in adapters}):
        a, b = adapters[f"{layer}/a"], adapters[f"{layer}/b"]
        kernel = merged[f"{layer}/kernel"]
        sides = _sides(f"{layer}/kernel", kernel.shape)
        if a.ndim != 2 or b.shape != (a.shape[1], sides[1]) or a.shape[0] != sides[0]:
            raise ValueError(f"A {a.shape} and B {b.shape} of {layer} are not of its kernel")
        if isinstance(a, np.ndarray):
            change = a.astype(np.float64) @ b.astype(np.float64)
        else:
            change = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        updated = kernel + alpha / a.shape[1] * change.reshape(kernel.shape)
        merged[f"{layer}/kernel"] = updated.astype(kernel.dtype)
    return unflatten_dict(merged, sep="/")


def merging(objective: Callable[..., Any], alpha: float) -> Callable[..., Any]:
    """The same objective of parameters that have adapters, or of merged ones.

    Args:
        objective: a `steps.Objective`.
        alpha: of the run.
    """

    @functools.wraps(objective)
    def merged(params: Params, *args: Any, **options: Any) -> Any:
        return objective(merge(params, alpha), *args, **options)

    return merged
