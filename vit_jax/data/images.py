"""Evaluation's view of an image in NumPy and PIL, for programs that need no TensorFlow.

`read_image` decodes what `vit_jax.data.preprocess` decodes to the same pixels, and a few formats
more; `preprocess` resamples as its `eval_view` does. Of JPEG, PIL has the accurate transform only.
"""

import io
import math
import os
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vit_jax.data.protocols import Preprocessing, eval_box, whole_pixels
from vit_jax.errors import UserError

# Only these of PIL's readers: others start programs (EPS runs Ghostscript). First those that are
# imported at once; one beyond them makes PIL import every reader it has.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000")

# What a directory is searched for. HEIF cannot be read: it is reported then, not passed over.
SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".ppm", ".pgm"]
    + [".pbm", ".pnm", ".webp", ".tif", ".tiff", ".avif", ".jp2", ".j2k", ".heic", ".heif"]
)

# PIL's own limit, which it only has while nobody moves Image.MAX_IMAGE_PIXELS.
MAX_PIXELS = 178_956_970

# What may lie between two passes of a resize, in pixels.
_MAX_BETWEEN = 2**26

_ORIENTATION = 0x0112  # the EXIF tag


def read_image(path: str | os.PathLike[str], encoded: bytes | None = None) -> np.ndarray:
    """Returns an image as it is meant to be seen, uint8 [height, width, 3], RGB.

    Gray becomes RGB, palettes and CMYK are converted, of 16 bits the high byte is kept, of an
    animation the first frame. Transparency is dropped and the color beneath it shown, as
    TensorFlow does; in a GIF there is none beneath, and black is shown. The image is turned as its
    EXIF orientation says, which TensorFlow does not do.

    Args:
        path: of a file in one of `FORMATS`, recognized by its content.
        encoded: the content, where it has been read already.

    Raises:
        UserError: there is no such file, it is no image of these formats, is damaged or truncated,
            has more than `MAX_PIXELS` pixels or values of unknown range (floats, 32-bit integers).
    """
    # A named pipe would be waited for, forever.
    if encoded is None and os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is not a file: give an image file")
    Image.preinit()
    try:
        file = path if encoded is None else io.BytesIO(encoded)
        with Image.open(file, formats=FORMATS) as image:
            return _to_rgb(image, path)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        rule = f"has more than {MAX_PIXELS:,} pixels"
        raise UserError(f"{path} {rule}: make it smaller") from error
    except UnidentifiedImageError as error:
        size = os.path.getsize(path) if encoded is None else len(encoded)
        found = "is an empty file" if size == 0 else "is not an image"
        raise UserError(f"{path} {found}: give one of {', '.join(FORMATS)}") from error
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"{path} cannot be opened: {error.strerror}") from error
    except Exception as error:  # PIL's readers have no class for damage: anything may come out
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path} is damaged ({reason}): fetch it again") from error


def preprocess(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Returns what evaluation sees of an image, float32 [image_size, image_size, 3].

    Args:
        image: uint8 [height, width, 3].
        preprocessing: of the model.
    """
    resize = _sample_box if preprocessing.resize == "box" else resize_and_crop
    mean, std = (
        np.array([255 * x for x in values], np.float32)
        for values in (preprocessing.mean, preprocessing.std)
    )
    return (resize(image, preprocessing) - mean) / std


def resize_and_crop(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Returns what evaluation sees by a rule of whole pixels, uint8 [image_size, image_size, 3].

    Args:
        image: uint8 [height, width, 3].
        preprocessing: of the model; its resize is not box.
    """
    resized = whole_pixels(preprocessing, *image.shape[:2])
    if preprocessing.resize == "big_vision":
        return _area(image, resized, preprocessing.image_size)
    return _resize_with_pil(image, resized, preprocessing)


def _resize_with_pil(
    image: np.ndarray, resized: tuple[int, int, int, int], preprocessing: Preprocessing
) -> np.ndarray:
    height, width, top, left = resized
    size = preprocessing.image_size
    kernel = Image.Resampling[preprocessing.interpolation.upper()]
    if height * width > _MAX_BETWEEN:
        # Of a long strip only what is kept, which PIL may round otherwise here and there.
        y, x = image.shape[0] / height, image.shape[1] / width
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        return np.asarray(Image.fromarray(image).resize((size, size), kernel, box))
    if image.shape[0] * width > _MAX_BETWEEN:  # A tall one: columns first, likewise.
        turned = image.swapaxes(0, 1)
        return _resize_with_pil(turned, (width, height, left, top), preprocessing).swapaxes(0, 1)
    pixels = np.asarray(Image.fromarray(image).resize((width, height), kernel))
    return pixels[top : top + size, left : left + size]


def _area(image: np.ndarray, resized: tuple[int, int, int, int], size: int) -> np.ndarray:
    """TensorFlow's ResizeArea and a crop, cut down to 8 bits, in the order of its operations.

    A mean of equal values may be one place of a float short of them, and is cut down to one less:
    so the order matters.
    """
    height, width, top, left = resized
    rows, of_rows, row_scale = _areas(image.shape[0], height, top, size)
    columns, of_columns, column_scale = _areas(image.shape[1], width, left, size)
    output = np.empty((size, size, 3), np.float32)
    # Of a tall strip what lies in between would be huge.
    parts = 1 + (rows[-1, -1] - rows[0, 0]) // 4096
    for part in np.array_split(np.arange(size), min(parts, size)):
        first = rows[part[0], 0]
        source = image[first : rows[part[-1], -1] + 1]
        between = source[:, columns[:, 0]] * of_columns[:, 0, None]
        for tap in range(1, columns.shape[1]):
            between += source[:, columns[:, tap]] * of_columns[:, tap, None]
        for row in part:
            terms = between[rows[row] - first] * of_rows[row, :, None, None]
            output[row] = np.add.reduce(terms, 0)
    scale = np.float32(1) / (row_scale * column_scale)
    return (output * scale).astype(np.uint8)


def _areas(
    length: int, resized: int, first: int, size: int
) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Source pixels of `size` output pixels of one axis, and their shares, both [size, taps]."""
    # Beyond 2^24 a float tells pixels no longer apart; TensorFlow could not hold such an image.
    kind = np.float32 if resized < 2**24 else np.float64
    scale = kind(length) / kind(resized)
    position = np.arange(first, first + size + 1).astype(kind)
    begin, end = position[:-1, None] * scale, position[1:, None] * scale
    start = np.floor(begin).astype(int)
    source = start + np.arange((np.ceil(end).astype(int) - start).max())
    at = source.astype(kind)
    shares = np.where(
        at < begin,
        np.where(at + 1 > end, scale, at + 1 - begin),
        np.where(at + 1 > end, end - at, 1),
    )
    shares = np.where(source < np.ceil(end), shares, 0).astype(np.float32)
    return np.clip(source, 0, length - 1), shares, np.float32(scale)


def _sample_box(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Samples the box with half-pixel centers, float32 [image_size, image_size, 3].

    The kernel is separable, its weights normalized where it reaches beyond the image: TensorFlow's
    ScaleAndTranslate, and with `antialias` PIL's resize without its rounding.
    """
    size = preprocessing.image_size
    y, x, height, width = eval_box(preprocessing, *image.shape[:2])
    rows = _taps(y, height, image.shape[0], preprocessing)
    columns = _taps(x, width, image.shape[1], preprocessing)
    # Rows first, as they lie in memory; but of a long strip what lies in between would be huge.
    if width > 8 * height:
        pixels = _resample(image.swapaxes(0, 1), columns, rows).swapaxes(0, 1)
    else:
        pixels = _resample(image, rows, columns)
    return pixels.reshape(size, size, 3)


def _to_rgb(image: Image.Image, path: str | os.PathLike[str]) -> np.ndarray:
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    if image.mode in ("F", "I"):
        raise UserError(f"{path} has pixels of 32 bits, whose range is unknown: save it with 8")
    image.load()
    # Of TIFF and AVIF PIL turns some by itself as it loads, and then the tag is gone.
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, -1)
    if image.format == "GIF" and "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"))
        return np.where(rgba[..., 3:] > 0, rgba[..., :3], np.uint8(0))
    return np.asarray(image.convert("RGB"))


def is_upright(path: str | os.PathLike[str]) -> bool:
    """Tells whether a JPEG is stored as it is to be seen; True also for what PIL cannot open."""
    try:
        with Image.open(path, formats=("JPEG",)) as image:
            return _orientation(image) == 1
    except Exception:  # as in `read_image`
        return True


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata, of which anything may come too; the pixels are sound
        return 1


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(0, 1 - x)


def _keys_cubic(x: np.ndarray) -> np.ndarray:
    # Keys, "Cubic convolution interpolation for digital image processing", 1981, Eq. 15.
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


# The kernels, and how far they reach in pixels of the coarser grid.
_KERNELS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
    "bilinear": (_triangle, 1),
    "bicubic": (_keys_cubic, 2),
}


def _taps(
    begin: float, extent: float, length: int, preprocessing: Preprocessing
) -> list[tuple[slice, np.ndarray]]:
    """For every output pixel of one axis: the source pixels that it reads, and their weights."""
    size = preprocessing.image_size
    kernel, radius = _KERNELS[preprocessing.interpolation]
    scale = max(extent / size, 1.0) if preprocessing.antialias else 1.0
    reach = radius * scale
    # In 32 bits and from where its window begins, as TensorFlow: between two pixels of a sharp
    # edge the rounding of a large image's coordinates can be seen.
    origin = max(math.floor(begin) - math.ceil(reach), 0)
    step, offset = np.float32(extent / size), np.float32(begin - origin)
    taps = []
    for center in (np.arange(size, dtype=np.float32) + np.float32(0.5)) * step + offset:
        center = origin + float(center)
        # Source pixel i has its center at i + 0.5.
        first = max(math.ceil(center - reach - 0.5), 0)
        last = min(math.floor(center + reach - 0.5), length - 1)
        weights = kernel(np.abs(np.arange(first, last + 1) + 0.5 - center) / scale)
        taps.append((slice(first, last + 1), (weights / weights.sum()).astype(np.float32)))
    return taps


def _resample(
    image: np.ndarray,
    rows: list[tuple[slice, np.ndarray]],
    columns: list[tuple[slice, np.ndarray]],
) -> np.ndarray:
    """Resamples [height, width, 3], rows first, to float32 [len(rows), len(columns), 3]."""
    left = columns[0][0].start
    window = image[:, left : columns[-1][0].stop]
    result = np.empty((len(rows), window.shape[1], 3), np.float32)
    for row, (source, weights) in zip(result, rows, strict=True):
        np.einsum("hwc,h->wc", window[source].astype(np.float32), weights, out=row)
    output = np.empty((len(rows), len(columns), 3), np.float32)
    for index, (source, weights) in enumerate(columns):
        part = result[:, source.start - left : source.stop - left]
        np.einsum("hwc,w->hc", part, weights, out=output[:, index])
    return output
