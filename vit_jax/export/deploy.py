"""Files for deployment: a Triton model repository, and the commands that build the engine.

    python -m vit_jax.export.deploy DIR

DIR holds `model.onnx` and, once `vit_jax.export.to_tensorrt` ran, `model.engine`. Writes
`DIR/deploy`; needs neither TensorRT nor a GPU. An engine is a program that the server will run: put
none there that somebody else built.
"""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_jax import command
from vit_jax.errors import UserError, first_line
from vit_jax.export.build_commands import (
    input_shape,
    own_command,
    polygraphy_command,
    trtexec_command,
)
from vit_jax.export.engine import DESCRIPTION, ENGINE, read_description
from vit_jax.export.nvidia import numbers
from vit_jax.export.onnx_file import OnnxFile, Tensor, read_class_names, read_onnx
from vit_jax.export.precisions import PRECISIONS
from vit_jax.export.profiles import Profile, parse_batch
from vit_jax.files import atomic_folder
from vit_jax.printable import printable

_TRITON = {"FLOAT": "FP32", "HALF": "FP16", "BF16": "BF16", "UINT8": "UINT8"}


def write_deploy(
    directory: str | os.PathLike[str],
    *,
    batch: str = "1:8:64",
    name: str = "vit",
    instances: int = 1,
    queue_delay_us: int = 1000,
) -> Path:
    """Writes `directory/deploy`, replacing one that is there.

    In it are README.md, and models/, a Triton model repository with `NAME_onnx` and, if there is an
    engine, `NAME_tensorrt`. The model files are hard links where that is possible.

    Args:
        directory: with model.onnx and, if it was built, model.engine. Without the engine.json that
            `to_tensorrt` writes beside it, `batch` is what it was built for.
        batch: the batch sizes to serve, see `to_tensorrt.parse_batch`; engine.json has its own.
        name: of the model in Triton.
        instances: copies of the model that each GPU runs at the same time.
        queue_delay_us: how long a request may wait for others to share its batch, in microseconds.

    Returns:
        The directory that was written.

    Raises:
        UserError: there is no ONNX file, it is no model of images, its metadata or engine.json is
            damaged, a value is out of range, or the disk is full.
    """
    if instances < 1 or queue_delay_us < 0:
        raise UserError(f"instances {instances} or queue_delay_us {queue_delay_us} is too small")
    if not name or set(name) & set("/\\") or name.startswith("."):
        raise UserError(f"name {name!r} is not a directory name: use for example vit")
    directory = Path(directory)
    onnx = read_onnx(directory / "model.onnx")
    _check_served(onnx)
    engine = directory / ENGINE
    has_engine = engine.is_file()
    description = read_description(engine) if has_engine else {}
    built = tuple(Profile(p["min"], p["opt"], p["max"]) for p in description.get("profiles", ()))
    if description and not built:
        raise UserError(f"{engine} has no profiles in its engine.json: build the engine again")
    asked = _fixed_batch(onnx) or parse_batch(batch)
    if has_engine and not description:
        print(printable(_unknown_engine(engine, asked)), file=sys.stderr)
    target = directory / "deploy"
    queue = {"instances": instances, "queue_delay_us": queue_delay_us}
    with atomic_folder(target, replace=True) as new:
        models = new / "models"
        files = [directory / file for file in onnx.sha256]
        config = triton_config(f"{name}_onnx", "onnxruntime_onnx", onnx, asked, **queue)
        _write_model(models / f"{name}_onnx", config, onnx, files)
        if has_engine:
            shapes = built or asked
            config = triton_config(f"{name}_tensorrt", "tensorrt_plan", onnx, shapes, **queue)
            _write_model(models / f"{name}_tensorrt", config, onnx, [engine], "model.plan")
        text = _readme(onnx, description, built or asked, name)
        (new / "README.md").write_text(text, encoding="utf-8")
    return target


def _unknown_engine(engine: Path, asked: tuple[Profile, ...]) -> str:
    """Says what is taken for granted of an engine that trtexec or polygraphy has built."""
    text = ",".join(f"{profile.min}:{profile.opt}:{profile.max}" for profile in asked)
    return (
        f"{engine} has no {DESCRIPTION} beside it, as another builder leaves it: it is served for "
        f"batches of {text}, for which it must have been built; else say which by --batch"
    )


def _check_served(onnx: OnnxFile) -> None:
    """Raises a UserError if a file is no model of images, or what it says of them is damaged."""
    if not onnx.inputs or not onnx.outputs or len(onnx.inputs[0].shape) != 4:
        raise UserError(f"{onnx.path} is no model of [batch, height, width, channels]: use another")
    if onnx.inputs[0].shape[0] == 0 or not onnx.outputs[0].shape:
        raise UserError(f"{onnx.path} takes or gives nothing: use another")
    try:
        if "class_names" in onnx.metadata and read_class_names(onnx.metadata) is None:
            raise ValueError("class_names is null")
        json.loads(onnx.metadata.get("preprocessing", "null"))
    except (ValueError, RecursionError) as error:
        reason = first_line(error)
        raise UserError(
            f"the metadata of {onnx.path} is damaged ({reason}): export it again"
        ) from error


def triton_config(
    name: str,
    platform: str,
    onnx: OnnxFile,
    profiles: tuple[Profile, ...],
    *,
    instances: int = 1,
    queue_delay_us: int = 1000,
) -> str:
    """The config.pbtxt of a model for NVIDIA Triton.

    Args:
        name: of the model, and of its directory.
        platform: "onnxruntime_onnx" or "tensorrt_plan".
        onnx: the ONNX file that the model is, or was built from.
        profiles: the batch sizes to serve.
        instances: see `write_deploy`.
        queue_delay_us: see `write_deploy`.
    """
    fixed = _fixed_batch(onnx) is not None
    labels = "class_names" in onnx.metadata
    lines = [
        f"name: {json.dumps(name)}",
        f'platform: "{platform}"',
        # 0: the batch is a dimension like any other, and requests cannot share one.
        f"max_batch_size: {0 if fixed else max(profile.max for profile in profiles)}",
        f"input [ {{ {_tensor(onnx.inputs[0], fixed)} }} ]",
    ]
    label = ' label_filename: "labels.txt"' if labels else ""
    lines.append(f"output [ {{ {_tensor(onnx.outputs[0], fixed)}{label} }} ]")
    group = f"count: {instances} kind: KIND_GPU"
    if platform == "tensorrt_plan":
        # Triton loads the first profile only unless it is told of the others.
        group += f" profile: [ {', '.join(json.dumps(str(i)) for i in range(len(profiles)))} ]"
        lines.append("optimization { cuda { graphs: true } }")
    lines.append(f"instance_group [ {{ {group} }} ]")
    if not fixed:
        preferred = sorted({profile.opt for profile in profiles} | {p.max for p in profiles})
        lines.append(
            f"dynamic_batching {{ preferred_batch_size: {preferred} "
            f"max_queue_delay_microseconds: {queue_delay_us} }}"
        )
    return "\n".join(lines) + "\n"


def _readme(
    onnx: OnnxFile, description: dict[str, Any], profiles: tuple[Profile, ...], name: str
) -> str:
    image = onnx.inputs[0]
    preprocessing = json.loads(onnx.metadata.get("preprocessing", "null"))
    versions = [description["tensorrt"]] if description else ["11", "10", "8.6"]
    input_type = _TRITON.get(image.type, image.type)
    shape = "x".join(map(str, input_shape(image, profiles[0].opt)))
    lines = [
        f"# {name}",
        "",
        f"`{_named(image)}` {input_type} {list(image.shape)} -> `{_named(onnx.outputs[0])}` "
        f"{list(onnx.outputs[0].shape)}, {onnx.precision}; -1 is free, the batch first.",
    ]
    if (prefix := onnx.metadata.get("prefix", "[]")) != "[]":
        lines += ["", f"Features of every patch, row by row; tokens before them: `{_code(prefix)}`"]
    if pixel_classes := onnx.metadata.get("pixel_classes"):
        lines += ["", f"Logits of every pixel, of the classes: `{_code(pixel_classes)}`"]
    if preprocessing:
        lines += ["", f"Preprocessing: `{json.dumps(preprocessing)}`"]
        lines += ["Each field is explained in `vit_jax/data/protocols.py`, resize's rules on top."]
        if image.type == "UINT8":
            lines += ["mean and std are in the graph: it takes cropped and resized pixels."]
    lines += ["", "## Serve", "", "    tritonserver --model-repository=models"]
    if -1 in image.shape[1:]:
        lines += ["", "An engine is built for one size of images: export without --free_size."]
        return "\n".join(lines) + "\n"
    lines += [
        "",
        "## Build the engine",
        "",
        "Run beside `model.onnx`, on the GPU that will serve. This project's own builder needs only"
        " TensorRT, and checks what it built:",
        "",
        _indented(own_command(onnx, description, profiles)),
    ]
    for version in versions:
        lines += ["", f"### TensorRT {version}", ""]
        if numbers(version)[0] == 8:
            if len(profiles) > 1:
                lines += ["trtexec of this version builds one profile: the first.", ""]
            if PRECISIONS[onnx.precision].constrained:
                lines += [
                    "Neither command holds what the file keeps in float32 in float32, as "
                    "`to_tensorrt` does.",
                    "",
                ]
        lines.append(_indented(trtexec_command(version, onnx, profiles, description)))
        lines += ["", _indented(polygraphy_command(version, onnx, profiles, description))]
    lines += [
        "",
        "## Measure",
        "",
        f"    trtexec --loadEngine={ENGINE} --shapes={image.name}:{shape} --useCudaGraph",
    ]
    return "\n".join(lines) + "\n"


def _write_model(
    directory: Path, config: str, onnx: OnnxFile, files: list[Path], name: str | None = None
) -> None:
    """Writes a model of a Triton repository, in its version 1."""
    (directory / "1").mkdir(parents=True)
    (directory / "config.pbtxt").write_text(config, encoding="utf-8")
    labels = read_class_names(onnx.metadata)
    if labels is not None:
        # A name that goes on in the next line would move those of all classes after it.
        text = "".join(f"{printable(label)}\n" for label in labels)
        (directory / "labels.txt").write_text(text, encoding="utf-8")
    for file in files:
        target = directory / "1" / (name or file.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # ONNX refuses external data that has a second name, as it may stem from elsewhere.
            if len(files) > 1:
                raise OSError
            os.link(file, target)
        except OSError:  # Also a file system without links.
            shutil.copyfile(file, target)


def _tensor(tensor: Tensor, fixed: bool) -> str:
    if tensor.type not in _TRITON:
        raise UserError(f"{tensor.name} is {tensor.type}: use one of {', '.join(_TRITON)}")
    dims = list(tensor.shape if fixed else tensor.shape[1:])
    return f"name: {json.dumps(tensor.name)} data_type: TYPE_{_TRITON[tensor.type]} dims: {dims}"


def _named(tensor: Tensor) -> str:
    return _code(tensor.name)


def _code(text: str) -> str:
    """A text for a page in Markdown, where it stands between backticks."""
    return printable(text).replace("`", "'")


def _fixed_batch(onnx: OnnxFile) -> tuple[Profile, ...] | None:
    """The one profile of a file whose batch is fixed; None if it is free."""
    size = onnx.inputs[0].shape[0]
    return None if size == -1 else (Profile(size, size, size),)


def _indented(words: list[str]) -> str:
    """A command as a Markdown block; no line parts an option from its values."""
    options = []
    for word in map(shlex.quote, map(printable, words)):
        if word.startswith("-") or not options:
            options.append(word)
        else:
            options[-1] += f" {word}"
    lines = [options[0]]
    for option in options[1:]:
        if len(lines[-1]) + len(option) > 90:
            lines.append(f"  {option}")
        else:
            lines[-1] += f" {option}"
    return " \\\n".join(f"    {line}" for line in lines)


def build_parser(prog: str = "python -m vit_jax.export.deploy") -> command.Parser:
    """The flags of the command; `prog` is what its help calls it."""
    parser = command.Parser(
        prog=prog,
        description="Writes a Triton model repository and build commands beside a model. An "
        "engine is a program that the server runs: give none that somebody else built.",
    )
    parser.add_argument("directory", help="with model.onnx and perhaps model.engine")
    parser.add_argument("--batch", default="1:8:64", help="batch sizes where no engine has its own")
    parser.add_argument("--name", default="vit", help="of the model in Triton")
    parser.add_argument(
        "--instances", type=command.positive, default=1, help="copies on each GPU (1)"
    )
    parser.add_argument(
        "--queue_delay_us", type=int, default=1000, help="wait for a fuller batch, microseconds"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    print(printable(str(write_deploy(**vars(build_parser().parse_args(argv))))))
    return 0


if __name__ == "__main__":
    command.run(main)
