"""The batch sizes that an engine is built for."""

import dataclasses
import re

from vit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Profile:
    """The batch sizes that one optimization profile covers; kernels are chosen for `opt`."""

    min: int
    opt: int
    max: int


def parse_batch(spec: str) -> tuple[Profile, ...]:
    """Reads `--batch`: `8`, `1:8:64` (smallest:optimal:largest) or several, `1,8:32:64`.

    Raises:
        UserError: the specification is not of that form.
    """
    profiles = []
    for part in spec.split(","):
        sizes = part.split(":")
        if len(sizes) not in (1, 3) or not all(re.fullmatch(r"\s*[1-9]\d*\s*", s) for s in sizes):
            raise UserError(
                f"batch {spec!r} is not MIN:OPT:MAX or one size: use for example 1:8:64 or 1,8:32"
            )
        low, opt, high = map(int, sizes if len(sizes) == 3 else sizes * 3)
        if not low <= opt <= high:
            raise UserError(f"batch {part!r} is not MIN <= OPT <= MAX: use for example 1:8:64")
        profiles.append(Profile(low, opt, high))
    return tuple(profiles)
