"""The files that make an export's folder enough: README.md, preprocess.json and so on.

It is written of the ONNX file and of parity.json, and needs neither JAX nor TensorFlow.
"""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

from vit_jax.data import imagenet
from vit_jax.data.protocols import Preprocessing, resized_sides
from vit_jax.errors import UserError
from vit_jax.export import client_code, parity
from vit_jax.export.onnx_file import RAW, OnnxFile, read_class_names, read_onnx
from vit_jax.export.readme import CLASSES, DTYPES, MARK, PICTURE, PREPROCESS, README, readme
from vit_jax.files import atomic_write, storage_errors, write_json
from vit_jax.image_size import sides
from vit_jax.printable import printable

_COLORS = {1: "gray", 3: "RGB"}


def check_folder(directory: Path) -> None:
    """Checks that a README.md in a folder, if there is one, is an export's own.

    Raises:
        UserError: it is another's, or cannot be read.
    """
    path = directory / README
    with storage_errors(lambda reason: f"{path} cannot be read: {reason}; name another folder"):
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else MARK
    if MARK not in text.splitlines():
        raise UserError(
            f"{path} is not an export's, and would be overwritten: name another folder by "
            "--output, or move it away"
        )


def write_folder(directory: Path) -> None:
    """Writes README.md, preprocess.json, classes.txt and parity.png beside `model.onnx`.

    Where there is no ONNX file, those of an earlier one are removed. A classes.txt is taken for an
    export's own where README.md is.

    Raises:
        UserError: README.md is not an export's, the ONNX file is damaged, or the disk refuses.
    """
    check_folder(directory)
    if not (directory / "model.onnx").exists():
        if (directory / README).exists():
            for name in (README, PREPROCESS, CLASSES, PICTURE):
                (directory / name).unlink(missing_ok=True)
        return
    onnx = read_onnx(directory / "model.onnx")
    described = describe(onnx)
    write_json(directory / PREPROCESS, described)
    of_pixels = "pixel_classes" in onnx.metadata
    names = read_class_names(onnx.metadata, "pixel_classes" if of_pixels else "class_names")
    if names is None:
        (directory / CLASSES).unlink(missing_ok=True)
    else:
        lines = (printable(imagenet.readable(name)) for name in names)
        _write(directory / CLASSES, "".join(f"{line}\n" for line in lines))
    stages = parity.load_report(directory)
    if stages and importlib.util.find_spec("matplotlib"):
        from vit_jax.export.parity_picture import draw

        with atomic_write(directory / PICTURE) as temporary:
            draw(stages, temporary)
    else:
        (directory / PICTURE).unlink(missing_ok=True)
    page = readme(onnx, _known_preprocessing(onnx), described, directory, stages)
    _write(directory / README, page)


def describe(onnx: OnnxFile) -> dict[str, Any]:
    """The contents of preprocess.json; the README says what its entries mean."""
    preprocessing = _known_preprocessing(onnx)
    image, output = onnx.inputs[0], onnx.outputs[0]
    pixels = onnx.metadata.get("pixels", "preprocessed")
    is_cut = preprocessing.resize in ("big_vision", "timm", "huggingface")
    rule = dataclasses.asdict(preprocessing) | {
        "image_size": list(sides(preprocessing.image_size)),
        "resized": list(resized_sides(preprocessing)) if is_cut else None,
    }
    return {
        "input": {
            "name": image.name,
            "dtype": DTYPES[image.type],
            "shape": list(image.shape),
            "layout": "NHWC",
            "channels": _COLORS.get(preprocessing.channels, preprocessing.channels),
        },
        "output": {
            "name": output.name,
            "shape": list(output.shape),
            "loss": onnx.metadata.get("loss", "softmax"),
        },
        "left_to_the_client": {
            RAW: ["decode", "turn upright"],
            "uint8": ["decode", "turn upright", "resize", "crop"],
        }.get(pixels, ["decode", "turn upright", "resize", "crop", "normalize"]),
        **rule,
    }


def _known_preprocessing(onnx: OnnxFile) -> Preprocessing:
    """The preprocessing of a file that an export wrote.

    Raises:
        UserError: it has none.
    """
    found = client_code.preprocessing_of(onnx)
    if found is None:
        raise UserError(f"{onnx.path} does not say how images are prepared: export it again")
    return found


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
