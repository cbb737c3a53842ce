"""Image files on disk, found and read in batches as evaluation sees them, without TensorFlow."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vit_jax.data import array_images
from vit_jax.data.headers import measure
from vit_jax.data.images import SUFFIXES, open_image, preprocess
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.printable import printable


def find_images(paths: Iterable[str], channels: int = 3) -> list[str]:
    """Lists the images that paths name, in their order.

    A directory stands for the files below it whose names end like an image's, sorted; hidden ones
    are left out, links to directories not followed. One that has none stands for itself.

    Args:
        paths: of images and directories.
        channels: of the images. Where they are not 3, arrays in directories are images too.
    """
    files = []
    for path in paths:
        found = []
        for directory, subdirectories, names in os.walk(path):
            subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
            visible = (os.path.join(directory, x) for x in names if not x.startswith("."))
            found += [file for file in visible if _is_image(file, channels)]
        files += sorted(found) or [path]
    return files


def check_names(files: Sequence[str], results: str) -> None:
    """Refuses images whose results would have one name.

    Args:
        files: image files.
        results: what is written of each, under its name without the ending, such as "masks".

    Raises:
        UserError: two are called alike.
    """
    counts = Counter(Path(file).stem for file in files)
    if twice := [file for file in files if counts[Path(file).stem] > 1]:
        raise UserError(
            f"{printable(twice[0])} and {printable(twice[1])} have {results} of one name: write "
            "them into folders of their own"
        )


def check_output(output: str, paths: Sequence[str], files: Sequence[str], results: str) -> None:
    """Refuses a folder where results would replace images, or be taken for some the next time.

    Args:
        output: the folder that gets them.
        paths: images and directories, as they were given.
        files: the images that these stand for.
        results: what is written, such as "masks".

    Raises:
        UserError: an image lies in the folder, or the folder below a directory of images.
    """
    place = Path(os.path.realpath(output))
    around = {str(place), *map(str, place.parents)}
    for path in paths:
        if os.path.isdir(path) and os.path.realpath(path) in around:
            raise _mixed(output, path, results)
    for file in files:
        # Where it is, and where it lies if it is a link.
        directory = os.path.dirname(file)
        if str(place) in (os.path.realpath(directory), os.path.dirname(os.path.realpath(file))):
            raise _mixed(output, file, results)


def _mixed(output: str, path: str, results: str) -> UserError:
    return UserError(
        f"--output {printable(output)} has images in it or lies among them ({printable(path)}), "
        f"which {results} would replace or be taken for: name a folder elsewhere"
    )


def _is_image(path: str, channels: int) -> bool:
    suffix = os.path.splitext(path)[1].lower()
    if suffix != array_images.SUFFIX or channels == 3:
        return suffix in SUFFIXES
    try:
        return measure(path, channels) is not None
    except OSError:  # Who reads it says so.
        return True


def read_view(path: str, preprocessing: Preprocessing, encoded: bytes | None = None) -> np.ndarray:
    """Reads what evaluation sees of an image, float32 [height, width, channels].

    Args:
        path: of the image; only a name where `encoded` is given.
        preprocessing: of the model.
        encoded: the content, where it has been read already.

    Raises:
        UserError: as `images.read_image` does.
    """
    dct, channels = preprocessing.jpeg_dct, preprocessing.channels
    with open_image(path, encoded, jpeg_dct=dct, channels=channels) as image:
        return preprocess(image, preprocessing)


def read_batches(
    files: Sequence[str],
    preprocessing: Preprocessing,
    batch_size: int,
    report: Callable[[UserError], None],
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yields images as evaluation sees them, in batches of one shape.

    Args:
        files: image files.
        preprocessing: of the model.
        batch_size: how many files are read at a time, at most.
        report: is called for every image that cannot be read; unless it raises, the others follow.

    Yields:
        The files that could be read, at least one, and [batch_size, height, width, channels] in
        float32, whose rows beyond these files are 0.
    """
    batch_size = min(batch_size, len(files))

    def read(file: str) -> np.ndarray | UserError:
        try:
            if os.path.isdir(file):
                raise UserError(f"{file} holds no image")
            return read_view(file, preprocessing)
        except UserError as error:
            return error

    parts = [files[begin : begin + batch_size] for begin in range(0, len(files), batch_size)]
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    try:
        ahead = [(file, pool.submit(read, file)) for file in parts[0]]
        for following in [*parts[1:], []]:
            # Read while the caller computes on the present one.
            present, ahead = ahead, [(file, pool.submit(read, file)) for file in following]
            found = []
            for file, reading in present:
                if isinstance(image := reading.result(), UserError):
                    report(image)
                else:
                    found.append((file, image))
            if found:
                batch = np.zeros((batch_size, *found[0][1].shape), np.float32)
                batch[: len(found)] = [image for _, image in found]
                yield [file for file, _ in found], batch
    finally:
        pool.shutdown(cancel_futures=True)
