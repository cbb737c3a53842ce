"""The Python that prepares an image elsewhere: written out for one model, without this package.

It stands in the README of an export and in the decoder of its Triton repository. What it computes
is `data.resampling` and `data.protocols` again, for one rule, by NumPy, Pillow and OpenCV alone.
"""

import json

from vit_jax.data.protocols import Preprocessing, resized_sides
from vit_jax.export.onnx_file import OnnxFile
from vit_jax.image_size import sides

# What a server decodes. Of PIL's other readers some start programs.
_FORMATS = ["JPEG", "PNG", "BMP", "GIF", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF"]
_MODES = {1: "L", 3: "RGB"}

_WEIGHTS = '''
def weights(begin, extent, length, size):
    """The pixels of an axis that each of `size` outputs reads, and their weights."""
    scale = {scale}
    centers = begin + (np.arange(size)[:, None] + 0.5) * extent / size
    source = np.ceil(centers - {radius} * scale - 0.5) + np.arange(int({taps} * scale) + 1)
    x = np.abs(source + 0.5 - centers) / scale
    w = {kernel}
    w = np.where((source < 0) | (source >= length), 0, w)
    w = (w / w.sum(1, keepdims=True)).astype(np.float32)
    return source.clip(0, length - 1).astype(int), w
'''
_KERNELS = {
    "bilinear": (1, "np.maximum(0, 1 - x)"),
    "bicubic": (
        2,
        "np.where(x < 1, (1.5 * x - 2.5) * x * x + 1,\n"
        "                 np.where(x < 2, ((2.5 - 0.5 * x) * x - 4) * x + 2, 0))",
    ),
}
_AREAS = '''
def areas(length, resized, first, size):
    """The pixels of an axis that each of `size` outputs covers, their shares, and its extent."""
    scale = np.float32(length) / np.float32(resized)
    edges = np.arange(first, first + size + 1, dtype=np.float32)[:, None] * scale
    begin, end = edges[:-1], edges[1:]
    start, stop = np.floor(begin), np.ceil(end)
    at = start + np.arange((stop - start).max(), dtype=np.float32)
    after = at + np.float32(1)
    within = np.where(after > end, end - at, np.float32(1))
    shares = np.where(at < begin, np.where(after > end, scale, after - begin), within)
    shares = np.where(at < stop, shares, 0).astype(np.float32)
    return at.clip(0, length - 1).astype(int), shares, scale
'''
_RESAMPLE = '''
def resample(x, source, w):
    """Sums over the first axis, one pixel after the other."""
    return sum(w[:, k, None, None] * x[source[:, k]] for k in range(w.shape[1]))
'''


_OBJECTS = '''
def overlap(a, b):
    """The intersection over union of two boxes."""
    width, height = (np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return width * height / max(sum(areas) - width * height, 1e-12)


def objects(boxes, least=0.5, most_overlap=0.6):
    """Class, score and box of each object, the most probable first: many cells tell the same."""
    scores, corners = boxes[:, :-4], boxes[:, -4:]
    cells, labels = (scores >= least).nonzero()
    order = scores[cells, labels].argsort(kind="stable")[::-1]
    found = []
    for cell, label in zip(cells[order], labels[order]):
        box = corners[cell]
        if all(label != other or overlap(box, kept) <= most_overlap for other, _, kept in found):
            found.append((label, scores[cell, label], box))
    return found
'''


def preprocessing_of(onnx: OnnxFile) -> Preprocessing | None:
    """The preprocessing in the metadata of an ONNX file; None if there is none.

    Raises:
        ValueError, TypeError, KeyError: what is there is none.
    """
    fields = json.loads(onnx.metadata.get("preprocessing", "null"))
    if fields is None:
        return None
    return Preprocessing(**fields | {name: tuple(fields[name]) for name in ("mean", "std")})


def source(preprocessing: Preprocessing, kind: str, is_raw: bool = False) -> str:
    """The source of `prepare(encoded)`: from a file's bytes to one image for the model.

    Args:
        preprocessing: of the model.
        kind: of the model's input, "float32", "float16" or "uint8".
        is_raw: whether the model prepares images itself.

    Returns:
        Imports and functions, as they stand in a module.
    """
    imports = {"import io", "import numpy as np"}
    helpers: list[str] = []
    body = _decoding(preprocessing, imports)
    if is_raw:
        body.append("return pixels")
    else:
        helpers, lines = _resizing(preprocessing, imports)
        body += lines
        if kind == "uint8":
            body.append("return np.rint(x).astype(np.uint8)")
        else:
            mean, std = (_numbers(x) for x in (preprocessing.mean, preprocessing.std))
            body.append(f"return ((x / 255 - {mean}) / {std}).astype(np.{kind})")
    order = sorted(imports, key=lambda x: (x != "import io", x.startswith("from"), x))
    parts = [helper.strip("\n") for helper in helpers]
    prepare = "\n".join(["def prepare(encoded):", *(f"    {line}" for line in body)])
    return "\n\n\n".join(["\n".join([order[0], "", *order[1:]]), *parts, prepare]) + "\n"


def objects(preprocessing: Preprocessing | None) -> list[str]:
    """Lines that find the objects in the output `boxes`, and print them in pixels of `photo.jpg`.

    Args:
        preprocessing: of the model; None where it is not known, and for a central crop: then boxes
            are shares of what the model sees.
    """
    lines = [*_OBJECTS.strip("\n").splitlines(), "", ""]
    rule = preprocessing
    if rule is not None and rule.channels in _MODES and rule.center_crop is None:
        lines.append('width, height = ImageOps.exif_transpose(Image.open("photo.jpg")).size')
        if rule.resize == "letterbox":
            tall, wide = sides(rule.image_size)
            lines += _whole_pixels(rule)
            lines.append(
                f"scale = np.array([{wide} * width / new_width, {tall} * height / new_height] * 2)"
            )
        else:
            lines.append("scale = np.array([width, height] * 2)")
    else:
        lines.append("scale = width = height = 1  # Shares of what the model sees.")
    return [
        *lines,
        'names = json.loads(session.get_modelmeta().custom_metadata_map["box_classes"])',
        "for label, score, box in objects(boxes[0]):",
        "    box = (box * scale).clip(0, [width, height] * 2)  # left, top, right, bottom",
        "    if (box[2:] > box[:2]).all():",
        '        print(names[label], f"{score:.2f}", box)',
    ]


def _numbers(values: tuple[float, ...]) -> str:
    """Numbers of each channel as an expression; where they are equal, one for all."""
    if len(set(values)) == 1:
        return repr(float(values[0]))
    return f"np.array({[float(x) for x in values]}, np.float32)"


def _decoding(preprocessing: Preprocessing, imports: set[str]) -> list[str]:
    """Lines that make `pixels`, uint8 [height, width, channels], of `encoded`."""
    if preprocessing.channels not in _MODES:
        return ["pixels = np.load(io.BytesIO(encoded))  # uint8 [height, width, channels]"]
    imports.add("from PIL import Image, ImageOps")
    mode = _MODES[preprocessing.channels]
    shape = "" if mode == "RGB" else "[..., None]"
    lines = [f"image = Image.open(io.BytesIO(encoded), formats={json.dumps(_FORMATS)})"]
    if preprocessing.jpeg_dct == "fast":
        imports.add("import simplejpeg")
        lines += [
            'if image.format in ("JPEG", "MPO") and image.mode != "CMYK":',
            "    orientation = image.getexif().get(0x112, 1)",
            "    image = Image.fromarray(simplejpeg.decode_jpeg(encoded, fastdct=True))",
            "    image.getexif()[0x112] = orientation",
        ]
    return [
        *lines,
        "kind, image = image.format, ImageOps.exif_transpose(image)",
        'if image.mode in ("I", "F"):',
        '    raise ValueError("pixels of 32 bits, whose range is unknown")',
        'if image.mode.startswith("I;16"):  # The high byte.',
        "    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))",
        'elif kind == "GIF" and "transparency" in image.info:  # Black where nothing is.',
        '    image = image.convert("RGBA")',
        '    image = Image.composite(image, Image.new("RGBA", image.size), image.getchannel("A"))',
        f'pixels = np.asarray(image.convert("{mode}")){shape}',
    ]


def _resizing(preprocessing: Preprocessing, imports: set[str]) -> tuple[list[str], list[str]]:
    """Helpers, and lines that make `x`, what the model sees up to 255, of `pixels`."""
    if preprocessing.resize == "box":
        return _of_box(preprocessing, imports)
    tall, wide = sides(preprocessing.image_size)
    lines = ["height, width = pixels.shape[:2]", *_whole_pixels(preprocessing)]
    if preprocessing.resize == "big_vision":
        return [_AREAS, _RESAMPLE], [
            *lines,
            f"rows, row_share, row = areas(height, new_height, top, {tall})",
            f"columns, column_share, column = areas(width, new_width, left, {wide})",
            "x = resample(pixels.swapaxes(0, 1), columns, column_share).swapaxes(0, 1)",
            "x = resample(x, rows, row_share)",
            "x = np.floor(x * (np.float32(1) / (row * column)))",
        ]
    imports.add("from PIL import Image, ImageOps")
    is_letterbox = preprocessing.resize == "letterbox"
    kernel = f"Image.Resampling.{preprocessing.interpolation.upper()}"
    if preprocessing.channels == 3:
        resized = f"np.asarray(Image.fromarray(pixels).resize((new_width, new_height), {kernel}))"
    else:
        resized = f"np.stack([Image.fromarray(x).resize((new_width, new_height), {kernel})"
        resized += "\n                  for x in np.moveaxis(pixels, -1, 0)], axis=-1)"
    if is_letterbox:
        return [], [
            *lines,
            f"x = np.zeros(({tall}, {wide}, {preprocessing.channels}), np.uint8)  # Black beyond.",
            f"x[:new_height, :new_width] = {resized}",
        ]
    return [], [*lines, f"x = {resized}", f"x = x[top:top + {tall}, left:left + {wide}]"]


def _of_box(preprocessing: Preprocessing, imports: set[str]) -> tuple[list[str], list[str]]:
    """`resampling.sample_box` of `protocols.eval_box`."""
    tall, wide = sides(preprocessing.image_size)
    crop, is_bilinear = preprocessing.center_crop, preprocessing.interpolation == "bilinear"
    if crop is None and is_bilinear and not preprocessing.antialias:
        imports.add("import cv2")
        size = f"({wide}, {tall}), interpolation=cv2.INTER_LINEAR"
        resized = f"x = cv2.resize(pixels.astype(np.float32), {size})"
        lines = ["# Bilinear with half-pixel centers, without antialiasing: what OpenCV does."]
        if preprocessing.channels == 1:
            return [], [*lines, f"{resized}[..., None]"]
        return [], [*lines, resized]
    radius, kernel = _KERNELS[preprocessing.interpolation]
    scale = "max(extent / size, 1)" if preprocessing.antialias else "1"
    taps = _WEIGHTS.format(radius=radius, taps=2 * radius, scale=scale, kernel=kernel)
    lines = ["height, width = pixels.shape[:2]"]
    if crop is None:
        lines.append("top, left, tall, wide = 0, 0, height, width")
    elif preprocessing.squash:
        margin = (1 - crop) / 2
        lines.append(f"top, left, tall, wide = (x * y for x in ({margin!r}, {crop!r})")
        lines.append("                         for y in (height, width))")
    else:
        lines += [
            f"tall = {crop!r} * min(height, width * {tall} / {wide})",
            f"wide = {crop!r} * min(width, height * {wide} / {tall})",
            "top, left = (height - tall) / 2, (width - wide) / 2",
        ]
    return [taps, _RESAMPLE], [
        *lines,
        f"x = resample(pixels, *weights(top, tall, height, {tall}))",
        f"x = resample(x.swapaxes(0, 1), *weights(left, wide, width, {wide})).swapaxes(0, 1)",
    ]


def _whole_pixels(preprocessing: Preprocessing) -> list[str]:
    """`protocols.whole_pixels`."""
    view, covered = sides(preprocessing.image_size), resized_sides(preprocessing)
    resize = preprocessing.resize
    if resize == "letterbox":
        return [
            f"factor = min({view[0]} / height, {view[1]} / width)",
            "new_height, new_width = (max(round(x * factor), 1) for x in (height, width))",
        ]
    if preprocessing.squash or preprocessing.center_crop is None:
        lines = [f"new_height, new_width = {covered[0]}, {covered[1]}"]
    else:
        if covered[0] == covered[1]:
            lines = [f"new, old = {covered[0]}, min(height, width)"]
        else:
            by_height = f"{covered[0]} * width >= {covered[1]} * height"
            pairs = f"({covered[0]}, height) if {by_height} else ({covered[1]}, width)"
            lines = [f"new, old = {pairs}"]
        if resize == "big_vision":
            lines.append("factor = np.float32(new) / np.float32(old)")
            size = "int(np.round(np.float32(x) * factor))"
        elif resize == "timm" and covered[0] != covered[1]:
            size = "round(x / (old / new))"
        else:
            size = "new * x // old"
        lines.append(f"new_height, new_width = ({size} for x in (height, width))")
    if resize == "timm":
        corner = f"round((new_height - {view[0]}) / 2), round((new_width - {view[1]}) / 2)"
    else:
        corner = f"(new_height - {view[0]}) // 2, (new_width - {view[1]}) // 2"
    return [*lines, f"top, left = {corner}"]
