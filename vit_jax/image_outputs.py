"""The place of what a command makes of images: not among these, nor twice under one name."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vit_jax.errors import UserError
from vit_jax.printable import printable


def check_names(files: Sequence[str], what: str, do: str) -> None:
    """Refuses images that have the same name but for folder and suffix.

    Args:
        files: the images.
        what: is written of them, in a message: "masks".
        do: what is to be done with them in parts, likewise: "segment".

    Raises:
        UserError: two of them have.
    """
    counts = Counter(Path(file).stem for file in files)
    if twice := [file for file in files if counts[Path(file).stem] > 1]:
        raise UserError(
            f"{printable(twice[0])} and {printable(twice[1])} have {what} of one name: {do} them "
            "into folders of their own"
        )


def check_output(output: str, paths: Sequence[str], files: Sequence[str], what: str) -> None:
    """Refuses a folder where what is written would replace an image, or be one the next time.

    Args:
        output: the folder.
        paths: images and directories, as they were given.
        files: the images that these stand for.
        what: is written, in a message: "masks".

    Raises:
        UserError: an image lies in the folder, or the folder below a directory of images.
    """
    place = Path(os.path.realpath(output))
    around = {str(place), *map(str, place.parents)}
    for path in paths:
        if os.path.isdir(path) and os.path.realpath(path) in around:
            raise _mixed(output, path, what)
    for file in files:
        # Where it is, and where it lies if it is a link.
        directory = os.path.dirname(file)
        if str(place) in (os.path.realpath(directory), os.path.dirname(os.path.realpath(file))):
            raise _mixed(output, file, what)


def _mixed(output: str, path: str, what: str) -> UserError:
    return UserError(
        f"--output {printable(output)} has images in it or lies among them ({printable(path)}), "
        f"which {what} would replace or be taken for: name a folder elsewhere"
    )
