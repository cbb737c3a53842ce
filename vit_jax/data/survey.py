"""Faults and oddities that opening a data set of files finds, told at once."""

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from vit_jax.data import array_images
from vit_jax.data.images import SUFFIXES
from vit_jax.errors import UserError, brief_name

_NAMED = 10  # of each kind in a message; the rest are counted


class Broken(NamedTuple):
    """A file that should be an image and is not: its fault in a sentence, and its class."""

    fault: str
    class_name: str


@dataclasses.dataclass
class Survey:
    """Faults and oddities of a data set, collected while it is opened.

    Attributes:
        what: the data set, as messages name it.
        skip: leave broken files out, and tell of them in a note.
        skip_flag: by which a user asks for that, "" where a run goes on, which needs them all.
        channels: of the images, see `headers.measure`.
        empty: classes without an image.
        unknown: classes to evaluate on that are not trained.
        broken: files that should be images, by their name in the data set.
        others: whatever else is wrong, a sentence each.
        passed_over: files that are no images, counted by the ends of their names.
        outside: images that are in no class.
        links: links to directories, which are not followed below a class.
        remarks: whatever else a user should know, a sentence each.
    """

    what: str
    skip: bool = False
    skip_flag: str = "dataset.broken=skip"
    channels: int = 3
    empty: list[str] = dataclasses.field(default_factory=list)
    unknown: list[str] = dataclasses.field(default_factory=list)
    broken: dict[str, Broken] = dataclasses.field(default_factory=dict)
    others: list[str] = dataclasses.field(default_factory=list)
    passed_over: Counter[str] = dataclasses.field(default_factory=Counter)
    outside: int = 0
    links: int = 0
    remarks: list[str] = dataclasses.field(default_factory=list)

    @property
    def suffixes(self) -> frozenset[str]:
        """The suffixes of images."""
        return SUFFIXES | {array_images.SUFFIX} if self.channels != 3 else SUFFIXES

    def pass_over(self, name: str) -> None:
        """Counts a file that lies in no class, or in one but is no image."""
        suffix = os.path.splitext(name)[1].lower()
        if suffix in self.suffixes:
            self.outside += 1
        else:
            self.passed_over[suffix or name] += 1

    def check(self) -> None:
        """Raises a UserError with all that is wrong, in one line."""
        found = self._problems()
        if len(found) == 1:
            raise UserError(found[0])
        if found:
            numbered = (f"({i}) {problem}" for i, problem in enumerate(found, 1))
            raise UserError(f"{self.what} has {len(found)} problems: {'; '.join(numbered)}")

    def _problems(self) -> list[str]:
        found = []
        if self.empty:
            are = "is" if len(self.empty) == 1 else "are"
            found.append(f"{_classes(self.empty)} {are} empty: add images or remove what is empty")
        if self.unknown:
            are = "is" if len(self.unknown) == 1 else "are"
            found.append(f"{_classes(self.unknown)} {are} not in train: add or remove what is not")
        if self.broken and not self.skip:
            found.append(self._broken_ones())
        return found + self.others

    def _broken_ones(self) -> str:
        they = "it" if len(self.broken) == 1 else "them"
        restore = f"the run began with {they}: restore {they}, or begin in another --workdir"
        leave_out = f"or leave {they} out by {self.skip_flag}"
        if len(self.broken) == 1:
            (only,) = self.broken.values()
            return f"{only.fault}, {leave_out}" if self.skip_flag else f"{only.fault}; {restore}"
        way_out = f"mend or remove them, {leave_out}" if self.skip_flag else restore
        named = listed([*self.broken])
        return f"{len(self.broken):,} files are no images or are cut off ({named}): {way_out}"

    def notes(self) -> tuple[str, ...]:
        """The lines to tell a user who goes on."""
        found = list(self.remarks)
        if self.passed_over:
            count = sum(self.passed_over.values())
            ends = [end for end, _ in self.passed_over.most_common()]
            found.append(f"{count:,} passed over that are no images ({listed(ends, 4)})")
        if self.outside:
            found.append(f"{self.outside:,} passed over that are images by name but in no class")
        if self.links:
            found.append(f"{self.links:,} passed over that are links to directories")
        if self.broken:
            found.append(f"{len(self.broken):,} left out that are broken: {listed([*self.broken])}")
        return tuple(f"{self.what}: {line}" for line in found)


def _classes(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"class {names[0]}"
    return f"{len(names):,} classes ({listed(names, 4)})"


def listed(names: Sequence[str], most: int = _NAMED) -> str:
    """The first names in one line, long ones cut, and how many more there are."""
    shown = ", ".join(brief_name(name) for name in names[:most])
    return shown + (f" and {len(names) - most:,} more" if len(names) > most else "")
