"""Learning rates that differ by parameter: as a text says, "head/.*=10,cls=0", and by layer."""

import difflib
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax

from vit_jax.errors import UserError, brief, brief_name, shortlist

Params = dict[str, Any]

# A pattern ends where a number does, so that it may have commas and "=" of its own.
_ENTRY = re.compile(r"(.+?)=\s*(\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)\s*(?:,|$)", re.ASCII)
# Far above any that trains; it still is a float32 when the learning rate is.
_LARGEST = 1e6


class Multiplier(NamedTuple):
    """A factor of the learning rate, for the parameters that a pattern names.

    Attributes:
        pattern: of whole names, such as "Transformer/encoder_norm/scale".
        factor: 0 freezes them.
    """

    pattern: re.Pattern[str]
    factor: float


def parse_multipliers(text: str) -> list[Multiplier]:
    """Reads "PATTERN=FACTOR,PATTERN=FACTOR"; "" has none.

    Raises:
        UserError: it is not of this form, a pattern is no regular expression, or a factor is above
            a million.
    """
    found, end = [], 0
    while end < len(text):
        match = _ENTRY.match(text, end)
        if not match or not (given := match[1].strip()):
            raise UserError(f"{brief(text[end:])} is not understood: use PATTERN=FACTOR,...")
        if not float(match[2]) <= _LARGEST:
            factor = brief_name(match[2])
            raise UserError(f"factor {factor} of {brief(given)} is above {_LARGEST:g}")
        try:
            pattern = re.compile(given)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"{brief(given)} is no regular expression: {error}") from error
        found.append(Multiplier(pattern, float(match[2])))
        end = match.end()
    return found


_BLOCK = re.compile(r"(?:.*/)?Transformer/encoderblock_(\d+)/.*")
# What comes after the last layer; all that is in neither of the two comes before the first.
_AFTER_LAYERS = re.compile(r"(?:.*/)?(?:encoder_norm|MAPHead_0|pre_logits|\w*head\w*)/.*")


def layer_scales(names: Sequence[str], decay: float) -> list[float]:
    """The share of the learning rate that each parameter gets by its layer.

    Of L layers the l-th has decay ** (L + 1 - l). The head, and the norm and pooling before it,
    have 1; all before the first layer, a ResNet below the Transformer too, has decay ** (L + 1).
    So it is in BEiT (Bao et al., 2022, arXiv 2106.08254) and MAE (He et al., 2022, arXiv
    2111.06377).

    Args:
        names: of the parameters, parts joined by "/".
        decay: above 0 and at most 1.

    Raises:
        UserError: there are no layers of a Transformer among them.
    """
    blocks = [_BLOCK.fullmatch(name) for name in names]
    last = 1 + max((int(block[1]) + 1 for block in blocks if block), default=0)
    if last == 1:
        raise UserError(
            f"optimizer.layer_decay is {decay:g}, but the model has no layers of a Transformer: "
            "set --config.optimizer.layer_decay=1"
        )
    return [
        decay ** (last - int(block[1]) - 1)
        if block
        else (1.0 if _AFTER_LAYERS.fullmatch(name) else decay**last)
        for name, block in zip(names, blocks, strict=True)
    ]


def multipliers(params: Params, text: str, layer_decay: float = 1.0) -> Params:
    """The multiplier of each parameter.

    Args:
        params: nested dicts of anything.
        text: see `parse_multipliers`; the first pattern that is a parameter's whole name counts, as
            in big_vision, and 1 where there is none.
        layer_decay: the factor by which the text's are multiplied, see `layer_scales`; 1 is off.

    Returns:
        A tree like `params`, of floats.

    Raises:
        UserError: a pattern is the name of no parameter, or only of those that an earlier one has;
            or nothing is left to train; or there are no layers whose rates could decay.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    scales = [1.0] * len(names) if layer_decay == 1 else layer_scales(names, layer_decay)
    factors = dict.fromkeys(names, math.nan)
    for pattern, factor in parse_multipliers(text):
        matched = [name for name in names if pattern.fullmatch(name)]
        left = [name for name in matched if math.isnan(factors[name])]
        if not left:
            raise UserError(_without_effect(pattern.pattern, names, is_known=bool(matched)))
        factors |= dict.fromkeys(left, factor)
    if names and not any(factors.values()):  # NaN is true.
        raise UserError(
            f"optimizer.lr_multipliers {brief(text)} freezes all ({shortlist(names)}): "
            "leave some to be trained"
        )
    found = [1.0 if math.isnan(factors[name]) else factors[name] for name in names]
    return tree.unflatten([x * scale for x, scale in zip(found, scales, strict=True)])


def _without_effect(pattern: str, names: list[str], *, is_known: bool) -> str:
    begin = f"optimizer.lr_multipliers has {brief(pattern)}, "
    if is_known:
        return begin + "which names only parameters of earlier patterns: put it before them"
    near = [name for name in names if re.search(pattern, name)]
    if not near and len(pattern) <= 200:  # The time that it takes is quadratic.
        near = difflib.get_close_matches(pattern, names, n=4, cutoff=0.4)
    near = near or names
    return begin + f"but no parameter has such a name, as a whole; near are {shortlist(near)}"


def freeze(params: Params, text: str) -> Params:
    """The same parameters, of which those whose multiplier is 0 have no gradient.

    What only they need of the backward pass is then not computed.
    """

    def held(factor: float, x: jax.Array) -> jax.Array:
        return x if factor else jax.lax.stop_gradient(x)

    return jax.tree.map(held, multipliers(params, text), params)


def with_multipliers(
    optimizer: optax.GradientTransformation, text: str, layer_decay: float = 1.0
) -> optax.GradientTransformation:
    """An optimizer whose learning rate is multiplied, by parameter.

    What it does in proportion to the learning rate is multiplied, weight decay too. A parameter
    whose multiplier is 0 stays as it is; the optimizer does not see it: it has no moments, and no
    part in the norm at which gradients are clipped.

    Args:
        optimizer: that returns what is added to the parameters.
        text: see `parse_multipliers`.
        layer_decay: see `layer_scales`. "" and 1 give the optimizer itself.
    """
    if not text and layer_decay == 1:
        return optimizer

    def is_trained(params: Params) -> Params:
        return jax.tree.map(bool, multipliers(params, text))

    def scale(updates: Any, params: Any) -> Any:
        del params
        factors = multipliers(updates, text, layer_decay)
        return jax.tree.map(lambda x, u: u * x if x else u * 0.0, factors, updates)

    return optax.chain(optax.masked(optimizer, is_trained), optax.stateless(scale))
