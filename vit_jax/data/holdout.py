"""Images held out for evaluation where a data set has no splits of its own."""

import csv
import dataclasses
import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vit_jax.errors import UserError, brief, first_line
from vit_jax.files import atomic_write, of_run

FILE = "split.csv"
TRAIN, HELD_OUT, BROKEN = "train", "validation", "broken"
_COLUMNS = ("path", "class", "split", "bytes")
# A file's name may have bytes that are no text.
_TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}


class Row(NamedTuple):
    """The class of an image, `TRAIN`, `HELD_OUT` or `BROKEN`, and its size, 0 if it is broken.

    Several classes are joined by ";", and of an image with a mask a digest of that stands there.
    The size is in bytes.
    """

    class_name: str
    split: str
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Partition:
    """The division of the images of a data set.

    Attributes:
        rows: by the image's path, relative to the data set.
    """

    rows: Mapping[str, Row]

    def fits(self, sizes: Mapping[str, int]) -> bool:
        """Tells whether it is of a data set: at least half of its images are there, as large.

        Names alone do not tell: images of any data set may be 000.png and so on.

        Args:
            sizes: in bytes, by the image's path.
        """
        return self._has_half(sizes.get(name) == row.num_bytes for name, row in self._images())

    def fits_by_name(self, names: Collection[str]) -> bool:
        """Tells whether at least half of its images have a name among these."""
        return self._has_half(name in names for name, _ in self._images())

    def _images(self) -> list[tuple[str, Row]]:
        return [(name, row) for name, row in self.rows.items() if row.split != BROKEN]

    def _has_half(self, found: Iterable[bool]) -> bool:
        return 2 * sum(found) >= len(self._images()) > 0

    def write(self, workdir: Path) -> None:
        """Writes `split.csv`, whole or not at all.

        Raises:
            UserError: the disk refuses.
        """
        with atomic_write(workdir / FILE) as temporary, temporary.open("w", **_TEXT) as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            writer.writerows((name, *row) for name, row in sorted(self.rows.items()))


def read(path: Path) -> Partition:
    """The partition that a run has written.

    Raises:
        UserError: the file is missing or not one that `Partition.write` makes.
    """
    rows = {}
    try:
        with path.open(**_TEXT) as file:
            lines = csv.reader(file, strict=True)
            if tuple(next(lines, ())) != _COLUMNS:
                raise ValueError(f"its first line is not {','.join(_COLUMNS)}")
            for line in lines:
                if len(line) != len(_COLUMNS) or line[2] not in (TRAIN, HELD_OUT, BROKEN):
                    raise ValueError(f"line {lines.line_num} is {brief(line)}")
                rows[line[0]] = Row(line[1], line[2], int(line[3]))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read: {first_line(error)}; it says which images the run holds out: "
            "restore it, or start anew in another --workdir"
        ) from error
    return Partition(rows)


def of_checkpoint(checkpoint: str) -> Partition | None:
    """The partition of the run that a checkpoint belongs to, None if there is none.

    Args:
        checkpoint: as `files.of_run` takes it.

    Raises:
        UserError: as `read` does.
    """
    path = of_run(checkpoint, FILE)
    return None if path is None else read(path)


def record(partition: Partition | None, workdir: Path) -> None:
    """Writes down the partition of a run that begins; one of a failed start is replaced.

    Raises:
        UserError: the disk refuses.
    """
    if partition is None:
        (workdir / FILE).unlink(missing_ok=True)
    else:
        partition.write(workdir)


def draw(strata: Collection[Sequence[str]], share: float) -> set[str]:
    """The images to hold out: of each stratum that share of them, rounded.

    Of two or more at least one is held out and one is left. Which ones is a function of the names
    alone, the same on every machine: they are ranked by a hash, so what another share holds out has
    the smaller share's images among its own, and new images of a class hardly move the others.

    Args:
        strata: the names of the images of each class.
        share: above 0 and below 1.
    """
    held_out = set()
    for names in strata:
        held_out.update(sorted(names, key=_rank)[: number(len(names), share)])
    return held_out


def number(images: int, share: float) -> int:
    """The number of images to hold out: that share, but of two or more neither none nor all."""
    return min(max(round(share * images), 1), images - 1)


def _rank(name: str) -> bytes:
    # With a key of its own: slices such as "train[:90%]" go by another hash.
    encoded = name.encode(errors="surrogateescape")
    return hashlib.blake2b(encoded, digest_size=16, key=b"held out").digest()
