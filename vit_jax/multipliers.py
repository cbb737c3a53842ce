"""Learning rates that differ by parameter, as the text of a config says: "head/.*=10,cls=0"."""

import difflib
import math
import re
from typing import Any, NamedTuple

import jax
import optax

from vit_jax.errors import UserError, brief_name, shortlist

Params = dict[str, Any]

# A pattern ends where a number does, so that it may have commas and "=" of its own.
_ENTRY = re.compile(r"\s*(.+?)\s*=\s*(\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)\s*(?:,|$)", re.ASCII)
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
        if not match:
            raise UserError(f"{brief_name(text[end:])!r} is not understood: use PATTERN=FACTOR,...")
        if not float(match[2]) <= _LARGEST:
            raise UserError(f"factor {match[2]} of {match[1]!r} is above {_LARGEST:g}")
        try:
            pattern = re.compile(match[1])
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"{match[1]!r} is no regular expression: {error}") from error
        found.append(Multiplier(pattern, float(match[2])))
        end = match.end()
    return found


def multipliers(params: Params, text: str) -> Params:
    """The multiplier of each parameter.

    Args:
        params: nested dicts of anything.
        text: see `parse_multipliers`; the first pattern that is a parameter's whole name counts, as
            in big_vision, and 1 where there is none.

    Returns:
        A tree like `params`, of floats.

    Raises:
        UserError: a pattern is the name of no parameter, or only of those that an earlier one has;
            or nothing is left to train.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    factors = dict.fromkeys(names, math.nan)
    for pattern, factor in parse_multipliers(text):
        matched = [name for name in names if pattern.fullmatch(name)]
        left = [name for name in matched if math.isnan(factors[name])]
        if not left:
            raise UserError(_without_effect(pattern.pattern, names, is_known=bool(matched)))
        factors |= dict.fromkeys(left, factor)
    if names and not any(factors.values()):  # NaN is true.
        raise UserError(f"optimizer.lr_multipliers {text!r} freezes all: leave some to be trained")
    return tree.unflatten([1.0 if math.isnan(factors[name]) else factors[name] for name in names])


def _without_effect(pattern: str, names: list[str], *, is_known: bool) -> str:
    begin = f"optimizer.lr_multipliers has {pattern!r}, "
    if is_known:
        return begin + "which names only parameters of earlier patterns: put it before them"
    near = [name for name in names if re.search(pattern, name)]
    near = near or difflib.get_close_matches(pattern, names, n=4, cutoff=0.4) or names
    return begin + f"but no parameter has such a name, as a whole; near are {shortlist(near)}"


def freeze(params: Params, text: str) -> Params:
    """The same parameters, of which those whose multiplier is 0 have no gradient.

    What only they need of the backward pass is then not computed.
    """

    def held(factor: float, x: jax.Array) -> jax.Array:
        return x if factor else jax.lax.stop_gradient(x)

    return jax.tree.map(held, multipliers(params, text), params)


def with_multipliers(
    optimizer: optax.GradientTransformation, text: str
) -> optax.GradientTransformation:
    """An optimizer whose learning rate is multiplied, by parameter.

    What it does in proportion to the learning rate is multiplied, weight decay too. A parameter
    whose multiplier is 0 stays as it is; the optimizer does not see it: it has no moments, and no
    part in the norm at which gradients are clipped.

    Args:
        optimizer: that returns what is added to the parameters.
        text: see `parse_multipliers`; "" gives the optimizer itself.
    """
    if not text:
        return optimizer

    def is_trained(params: Params) -> Params:
        return jax.tree.map(bool, multipliers(params, text))

    def scale(updates: Any, params: Any) -> Any:
        del params
        factors = multipliers(updates, text)
        return jax.tree.map(lambda x, u: u * x if x else u * 0.0, factors, updates)

    return optax.chain(optax.masked(optimizer, is_trained), optax.stateless(scale))
