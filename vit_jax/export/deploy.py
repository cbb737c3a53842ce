"""Files for deployment: a Triton model repository, and the commands that build the engine.

    python -m vit_jax.export.deploy DIR

DIR holds `model.onnx` and, once `vit_jax.export.to_tensorrt` ran, `model.engine`. Writes
`DIR/deploy`; needs neither TensorRT nor a GPU. An engine is a program that the server will run: put
none there that somebody else built.
"""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax import command
from vit_jax.errors import UserError, first_line
from vit_jax.export import triton
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

if TYPE_CHECKING:  # Only what decodes images needs NumPy here.
    from vit_jax.data.protocols import Preprocessing


def write_deploy(
    directory: str | os.PathLike[str],
    *,
    batch: str = "1:8:64",
    name: str = "vit",
    instances: int = 1,
    cpu_instances: int = 0,
    decoders: int = 2,
    queue_delay_us: int = 1000,
) -> Path:
    """Writes `directory/deploy`, replacing one that is there.

    In it are README.md, and models/, a Triton model repository with `NAME_onnx` and, if there is an
    engine, `NAME_tensorrt`; where images are gray or RGB also `NAME_decode`, which decodes and
    prepares them, `NAME`, the ensemble of both, and client.py, which asks that. The model files are
    hard links where that is possible.

    Args:
        directory: with model.onnx and, if it was built, model.engine, which is left out where
            engine.json says that it was built from another file. Without the engine.json that
            `to_tensorrt` writes beside it, `batch` is what it was built for.
        batch: the batch sizes to serve, see `to_tensorrt.parse_batch`; engine.json has its own.
        name: of the model in Triton.
        instances: copies of the model that each GPU runs at the same time; 0 on a machine that has
            none, where an engine is left out.
        cpu_instances: copies of the ONNX model that the CPU runs.
        decoders: processes that decode images.
        queue_delay_us: how long a request may wait for others to share its batch, in microseconds.

    Returns:
        The directory that was written.

    Raises:
        UserError: there is no ONNX file, it is no model of images, its metadata or engine.json is
            damaged, a value is out of range, or the disk is full.
    """
    if instances < 0 or queue_delay_us < 0:
        raise UserError(f"instances {instances} or queue_delay_us {queue_delay_us} is too small")
    if cpu_instances < 0 or decoders < 1 or instances + cpu_instances < 1:
        raise UserError(
            f"instances {instances} and cpu_instances {cpu_instances} must be one at least, and "
            f"so must decoders {decoders}"
        )
    if not name or set(name) & set("/\\") or name.startswith("."):
        raise UserError(f"name {name!r} is not a directory name: use for example vit")
    directory = Path(directory)
    onnx = read_onnx(directory / "model.onnx")
    preprocessing = _check_served(onnx)
    engine = directory / ENGINE
    has_engine = engine.is_file()
    description = read_description(engine) if has_engine else {}
    if onnx.is_stale(description):
        print(printable(_stale_engine(engine)), file=sys.stderr)
        has_engine, description = False, {}
    built = tuple(Profile(p["min"], p["opt"], p["max"]) for p in description.get("profiles", ()))
    if description and not built:
        raise UserError(f"{engine} has no profiles in its engine.json: build the engine again")
    asked = triton.fixed_batch(onnx) or parse_batch(batch)
    if has_engine and not description:
        print(printable(_unknown_engine(engine, asked)), file=sys.stderr)
    target = directory / "deploy"
    queue = {"instances": instances, "queue_delay_us": queue_delay_us}
    with atomic_folder(target, replace=True) as new:
        models = new / "models"
        files = [directory / file for file in onnx.sha256]
        chosen, shapes = f"{name}_onnx", asked
        config = triton.triton_config(
            chosen, "onnxruntime_onnx", onnx, asked, cpu_instances=cpu_instances, **queue
        )
        triton.write_model(models / chosen, config, onnx, files)
        if has_engine and instances:
            chosen, shapes = f"{name}_tensorrt", built or asked
            config = triton.triton_config(chosen, "tensorrt_plan", onnx, shapes, **queue)
            triton.write_model(models / chosen, config, onnx, [engine], "model.plan")
        decodes = preprocessing is not None and triton.can_decode(onnx, preprocessing)
        if preprocessing is not None and decodes:
            largest = max(profile.max for profile in shapes)
            _write_ensemble(new, name, chosen, onnx, preprocessing, largest, decoders)
        text = _readme(onnx, description, built or asked, name, chosen if decodes else None)
        (new / "README.md").write_text(text, encoding="utf-8")
    return target


def _write_ensemble(
    folder: Path,
    name: str,
    model: str,
    onnx: OnnxFile,
    preprocessing: "Preprocessing",
    largest: int,
    decoders: int,
) -> None:
    """Writes what decodes images, the ensemble of it and a model, and the client of that."""
    decoder = folder / "models" / f"{name}_decode"
    config = triton.decoder_config(decoder.name, onnx, largest, decoders)
    triton.write_model(decoder, config, onnx, [])
    code = triton.decoder_code(onnx, preprocessing)
    (decoder / "1" / "model.py").write_text(code, encoding="utf-8")
    config = triton.ensemble_config(name, model, decoder.name, onnx, largest)
    triton.write_model(folder / "models" / name, config, onnx, [])
    (folder / "client.py").write_text(triton.client(name, onnx), encoding="utf-8")


def _stale_engine(engine: Path) -> str:
    """Says that an engine is of an earlier export."""
    return (
        f"{engine} was built from another file than model.onnx beside it, and is left out: build "
        "it again by a command of deploy/README.md"
    )


def _unknown_engine(engine: Path, asked: tuple[Profile, ...]) -> str:
    """Says what is taken for granted of an engine that trtexec or polygraphy has built."""
    text = ",".join(f"{profile.min}:{profile.opt}:{profile.max}" for profile in asked)
    return (
        f"{engine} has no {DESCRIPTION} beside it, as another builder leaves it: it is served for "
        f"batches of {text}, for which it must have been built; else say which by --batch"
    )


def _check_served(onnx: OnnxFile) -> "Preprocessing | None":
    """The preprocessing of a file, if it has any.

    Raises:
        UserError: it is no model of images, or what it says of them is damaged.
    """
    from vit_jax.export.client_code import preprocessing_of

    if not onnx.inputs or not onnx.outputs or len(onnx.inputs[0].shape) != 4:
        raise UserError(f"{onnx.path} is no model of [batch, height, width, channels]: use another")
    if onnx.inputs[0].shape[0] == 0 or not onnx.outputs[0].shape:
        raise UserError(f"{onnx.path} takes or gives nothing: use another")
    try:
        if "class_names" in onnx.metadata and read_class_names(onnx.metadata) is None:
            raise ValueError("class_names is null")
        return preprocessing_of(onnx)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = first_line(error)
        raise UserError(
            f"the metadata of {onnx.path} is damaged ({reason}): export it again"
        ) from error


def _readme(
    onnx: OnnxFile,
    description: dict[str, Any],
    profiles: tuple[Profile, ...],
    name: str,
    decoded: str | None,
) -> str:
    """The page; `decoded` is the model of the ensemble, where there is one."""
    image = onnx.inputs[0]
    preprocessing = json.loads(onnx.metadata.get("preprocessing", "null"))
    versions = [description["tensorrt"]] if description else ["11", "10", "8.6"]
    shape = "x".join(map(str, input_shape(image, profiles[0].opt)))
    lines = [
        f"# {name}",
        "",
        f"`{_named(image)}` {image.type} {list(image.shape)} -> `{_named(onnx.outputs[0])}` "
        f"{list(onnx.outputs[0].shape)}, {onnx.precision}; -1 is free, the batch first.",
    ]
    if (prefix := onnx.metadata.get("prefix", "[]")) != "[]":
        lines += ["", f"Features of every patch, row by row; tokens before them: `{_code(prefix)}`"]
    if pixel_classes := onnx.metadata.get("pixel_classes"):
        lines += ["", f"Logits of every pixel, of the classes: `{_code(pixel_classes)}`"]
    if box_classes := onnx.metadata.get("box_classes"):
        lines += ["", f"Of every cell a score of each class, `{_code(box_classes)}`, and its box:"]
        lines[-1] += " left, top, right and bottom in shares of the image that the model sees."
    if preprocessing:
        lines += ["", f"Preprocessing: `{json.dumps(preprocessing)}`"]
        lines += ["README.md beside model.onnx explains each field, and has the Python for it."]
        if onnx.is_raw:
            lines += ["All of it is in the graph: it takes decoded pixels of any size."]
        elif image.type == "UINT8":
            lines += ["mean and std are in the graph: it takes cropped and resized pixels."]
    lines += ["", "## Serve", "", "    tritonserver --model-repository=models"]
    if decoded:
        lines += _served(name, decoded, onnx.is_raw)
    if onnx.is_raw:
        lines += [
            "",
            "TensorRT has neither an antialiased Resize nor 64-bit floats: export without "
            "--preprocessing in_graph to build an engine, and let the ensemble prepare images.",
        ]
        return "\n".join(lines) + "\n"
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


def _served(name: str, model: str, is_raw: bool) -> list[str]:
    """The part on the ensemble: what it is, and how it is asked."""
    work = "decodes" if is_raw else "decodes and prepares"
    same = " Images of one request must have one size." if is_raw else ""
    return [
        "",
        f"`{name}` takes the bytes of image files, `encoded` BYTES [batch, 1]: `{name}_decode`, a "
        f"model of Triton's Python backend, {work} them for `{model}`.{same} Its model.py needs "
        "what its first lines import, in the server's Python. Ask it by",
        "",
        "    pip install tritonclient[http]",
        "    python client.py photo.jpg",
        "",
        "No server has run these files yet.",
    ]


def _named(tensor: Tensor) -> str:
    return _code(tensor.name)


def _code(text: str) -> str:
    """A text for a page in Markdown, where it stands between backticks."""
    return printable(text).replace("`", "'")


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
    parser.add_argument("--instances", type=int, default=1, help="copies on each GPU (1)")
    parser.add_argument("--cpu_instances", type=int, default=0, help="copies on the CPU (0)")
    parser.add_argument(
        "--decoders", type=command.positive, default=2, help="processes that decode images (2)"
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
