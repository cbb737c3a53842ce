"""Image files on disk, found and read in batches as evaluation sees them, without TensorFlow."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vit_jax.data import array_images
from vit_jax.data.headers import measure
from vit_jax.data.images import SUFFIXES, open_image, preprocess
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError


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
