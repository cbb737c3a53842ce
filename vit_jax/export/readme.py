"""The README.md of an export's folder, for somebody who knows neither JAX nor this package."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_jax.data.protocols import Preprocessing, resized_sides
from vit_jax.export import client_code, parity
from vit_jax.export.engine import ENGINE, read_description
from vit_jax.export.onnx_file import OnnxFile
from vit_jax.export.precisions import PRECISIONS
from vit_jax.image_size import sides
from vit_jax.printable import printable

README, PREPROCESS, CLASSES, PICTURE = "README.md", "preprocess.json", "classes.txt", "parity.png"
MARK = "<!-- Written by vit_jax.export, which will replace it. -->"
DTYPES = {"FLOAT": "float32", "HALF": "float16", "UINT8": "uint8"}

# What there may be, in the order in which it is listed.
_CONTENTS = {
    "model.onnx": "the model",
    ENGINE: "the same, built by TensorRT for one kind of GPU, and described in engine.json",
    "saved_model": "the same for TensorFlow",
    CLASSES: "the names of the classes, one a line, in the order of the outputs",
    PREPROCESS: "how an image is prepared for the model, in a form for programs",
    "parity.json": "how far each form of the model is from Flax, and its speed",
    PICTURE: "parity.json as a picture",
    "parity_reference.npz": "images and the outputs of Flax for them, to check an engine elsewhere",
    "deploy": "a repository for NVIDIA Triton, and the commands that build an engine",
}


_TO_EVEN = "to the nearest whole number, halves to the even one"
# What looks alike and is another.
_OPENCV = {
    "bilinear": "OpenCV's INTER_LINEAR does not antialias.",
    "bicubic": "OpenCV's INTER_CUBIC has a = -0.75 and does not antialias.",
}


def readme(
    onnx: OnnxFile,
    preprocessing: Preprocessing,
    described: dict[str, Any],
    directory: Path,
    stages: list[dict[str, Any]],
) -> str:
    """The page.

    Args:
        onnx: the model.
        preprocessing: of it.
        described: the contents of preprocess.json.
        directory: the folder, with all else that is listed.
        stages: of parity.json.
    """
    metadata = onnx.metadata
    source = printable(metadata.get("source", "a model")).replace("`", "'")
    lines = [
        f"# {source}",
        "",
        MARK,
        "",
        f"`{printable(metadata.get('architecture', ''))}`, {onnx.precision}, written by vit_jax. "
        "All that is needed to run it stands here.",
        "",
        "| | |",
        "|-|-|",
    ]
    engine = directory / ENGINE
    contents = dict(_CONTENTS)
    if onnx.is_raw or -1 in onnx.inputs[0].shape[1:]:
        contents["deploy"] = "a repository for NVIDIA Triton"
    if engine.is_file() and onnx.is_stale(read_description(engine)):
        contents[ENGINE] = "**of an earlier model.onnx**: build it again"
    lines += [
        f"| `{name}` | {text} |"
        for name, text in contents.items()
        if name == "deploy" or (directory / name).exists()
    ]
    lines += ["", "## In and out", "", *_in_and_out(onnx, described, preprocessing)]
    code = client_code.source(preprocessing, described["input"]["dtype"], onnx.is_raw)
    if PRECISIONS[onnx.precision].runs_on_cpu:
        lines += ["", "## Python and onnxruntime", "", *_packages(code, "onnxruntime")]
        lines += ["```python", *_with_onnxruntime(onnx, code, directory).splitlines(), "```"]
    else:
        lines += ["", "## Python", "", f"onnxruntime does not compute {onnx.precision} on a CPU: "]
        lines[-1] += "the model is for a GPU. An image is prepared by:"
        lines += ["", *_packages(code), "```python", *code.rstrip().splitlines(), "", ""]
        lines += [*_images(onnx), "```"]
    lines += ["", *_keys()]
    if onnx.is_raw:
        lines += ["", "## TensorRT", "", "TensorRT has neither an antialiased Resize nor 64-bit "]
        lines[-1] += "floats: export without `--preprocessing in_graph` to build an engine."
    else:
        lines += ["", *_with_tensorrt(onnx)]
    lines += ["", *_parity(stages, directory)]
    return "\n".join(lines) + "\n"


def _in_and_out(onnx: OnnxFile, described: dict[str, Any], rule: Preprocessing) -> list[str]:
    image, output = described["input"], described["output"]
    channels = image["channels"] if isinstance(image["channels"], str) else "all channels"
    shape = ", ".join("any" if size == -1 else str(size) for size in image["shape"])
    values = (
        "whole numbers from 0 to 255"
        if image["dtype"] == "uint8"
        else f"(pixel / 255 - mean) / std with mean {_of_channels(rule.mean)} and std "
        f"{_of_channels(rule.std)} of pixels from 0 to 255"
    )
    lines = [
        f"- **In**: `{image['name']}`, {image['dtype']} [{shape}]: batch, height, width, channels; "
        f"channels in the order {channels}.",
        "- **Upright**: an image is turned as its EXIF orientation says before all else.",
    ]
    if onnx.is_raw:
        lines.append(
            "- **Size**: any. All that follows is in the graph: give the pixels as they are "
            "decoded. Images of one batch have one size."
        )
    elif -1 in onnx.inputs[0].shape[1:]:
        lines.append(
            "- **Other sizes**: height and width are free, of one patch at least. What follows is "
            "the size that the model was trained at."
        )
    lines += [
        f"- **Size and crop**: {_size_rule(rule)}",
        f"- **Resize**: {_kernel(rule)}",
        f"- **Values**, after all this: {values}.",
    ]
    sizes = ", ".join("any" if size == -1 else str(size) for size in output["shape"])
    meaning = _meaning(output, onnx.metadata)
    lines.append(f"- **Out**: `{output['name']}`, float32 [{sizes}]: {meaning}.")
    return lines


def _of_channels(values: tuple[float, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else str(list(values))


def _meaning(output: dict[str, Any], metadata: Mapping[str, str]) -> str:
    prefix = ", ".join(json.loads(metadata.get("prefix", "[]")))
    function = "sigmoid" if output["loss"] == "sigmoid" else "softmax"
    several = ", of which several may hold" if function == "sigmoid" else ""
    return {
        "logits": f"a score for each class; {function} makes probabilities of them{several}",
        "probabilities": f"a probability for each class, by {function}{several}",
        "features": "what the head would be applied to",
        "tokens": "features of every patch, row by row"
        + f", after those of other tokens: {printable(prefix)}" * bool(prefix),
        "grid": "features of every patch, in rows and columns",
        "pixels": "a score for each class of every pixel of what the model sees, in rows and "
        "columns; the largest is the pixel's class",
        "boxes": "of every cell a score of each class, then left, top, right and bottom of its box "
        "in shares of the width and height of the image that goes in; many tell the same object",
    }.get(output["name"], "what the model was exported to give")


def _size_rule(rule: Preprocessing) -> str:
    height, width = sides(rule.image_size)
    size, crop = f"{height} x {width} (height x width)", rule.center_crop
    if rule.resize == "letterbox":
        return (
            f"the whole image is resized until it just fits into {size}, its aspect ratio kept, "
            "and lies at the top left; the rest is black."
        )
    if crop is None:
        return (
            f"the whole image is resized to {size}; its aspect ratio is given up and nothing is "
            "cut off. This is what `center_crop: null` means."
        )
    tall, wide = resized_sides(rule)
    if rule.resize != "box":
        if rule.squash:
            how = f"the whole image is resized to {tall} x {wide}, its aspect ratio given up"
        else:
            even = rule.resize == "big_vision" or (rule.resize == "timm" and tall != wide)
            how = f"height and width are both multiplied by the larger of {tall} / height and "
            how += f"{wide} / width, and rounded {_TO_EVEN if even else 'down'}"
        halved = _TO_EVEN if rule.resize == "timm" else "down"
        return (
            f"{how}; then the central {size} is cut out, above and left of which lies half of what "
            f"is left over, rounded {halved}."
        )
    if rule.squash:
        return f"of each side the central {crop} is resized to {size}, in fractions of pixels."
    box = "square" if height == width else "box of the input's aspect ratio"
    return (
        f"the central {box} of {crop} times the largest that fits in is resized to {size}, once, "
        "in fractions of pixels."
    )


def _kernel(rule: Preprocessing) -> str:
    if rule.resize == "big_vision":
        return "the mean over the area that a pixel covers, cut down to whole numbers."
    kernel = {"bilinear": "bilinear", "bicubic": "bicubic (Keys, a = -0.5)"}[rule.interpolation]
    if rule.resize != "box":
        return (
            f"{kernel} and antialiased, as Pillow does on 8 bits: one axis after the other, each "
            f"rounded to whole numbers from 0 to 255. {_OPENCV[rule.interpolation]}"
        )
    if rule.antialias:
        return (
            f"{kernel} and antialiased: the kernel widens where the image shrinks. Half-pixel "
            "centers, no rounding."
        )
    return (
        f"{kernel} **without** antialiasing, half-pixel centers, no rounding. Pillow's and "
        "torchvision's own resize antialias: an image that shrinks looks otherwise then, and its "
        "logits change."
    )


def _packages(code: str, *more: str) -> list[str]:
    names = {"PIL": "pillow", "cv2": "opencv-python-headless", "simplejpeg": "simplejpeg"}
    found = [package for module, package in names.items() if module in code]
    return [f"    pip install {' '.join(('numpy', *more, *found))}", ""]


def _images(onnx: OnnxFile) -> list[str]:
    """Lines that prepare the batch `images` of one photograph."""
    batch = onnx.inputs[0].shape[0]
    repeated = "" if batch in (-1, 1) else f".repeat({batch}, axis=0)"
    return [
        'with open("photo.jpg", "rb") as file:',
        f"    images = prepare(file.read())[None]{repeated}",
    ]


def _with_onnxruntime(onnx: OnnxFile, code: str, directory: Path) -> str:
    image, output = onnx.inputs[0].name, onnx.outputs[0].name
    imports, _, functions = code.partition("\n\n\n")
    lines = [
        imports.replace("import numpy as np", "import numpy as np\nimport onnxruntime"),
        "",
        "",
        functions.rstrip(),
        "",
        "",
        'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])',
        *_images(onnx),
        f"({output},) = session.run(None, {{{json.dumps(image)}: images}})",
    ]
    if output == "boxes":
        lines[0] = lines[0].replace("import io\n", "import io\nimport json\n")
        return "\n".join([*lines, "", "", *client_code.objects(client_code.preprocessing_of(onnx))])
    named = (directory / CLASSES).is_file()
    names = [f'names = open("{CLASSES}", encoding="utf-8").read().split("\\n")'] * named
    name = "names[i]" if named else "i"
    if output == "pixels":
        lines += ["classes = pixels[0].argmax(-1)  # [height, width]", *names]
        lines += ["for i in np.unique(classes):"]
        lines += [f'    print(f"{{(classes == i).mean():.2%}} {{{name}}}")']
        return "\n".join(lines)
    if output not in ("logits", "probabilities"):
        return "\n".join([*lines, f"print({output}.shape)"])
    lines.append(f"scores = {output}[0]")
    if output == "logits":
        if onnx.metadata.get("loss") == "sigmoid":
            lines.append("scores = 1 / (1 + np.exp(-scores))")
        else:
            lines.append(
                "scores = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()"
            )
    lines += [
        *names,
        "for i in scores.argsort()[::-1][:5]:",
        f'    print(f"{{scores[i]:.2%}} {{{name}}}")',
    ]
    return "\n".join(lines)


def _with_tensorrt(onnx: OnnxFile) -> list[str]:
    image, output = onnx.inputs[0], onnx.outputs[0]
    if -1 in (*image.shape[1:], *output.shape[1:]):
        return ["## TensorRT", "", "An engine is built for one size of images."]
    shape = ", ".join(["len(images)", *map(str, output.shape[1:])])
    kind = DTYPES[output.type]
    return [
        "## Python and TensorRT",
        "",
        f"Build `{ENGINE}` on the GPU that will run it, by a command of `deploy/README.md`. An "
        "engine is a program: run none that somebody else built. After `prepare` above, with "
        "TensorRT 10 or 11 and `pip install cuda-python`:",
        "",
        "```python",
        "import tensorrt as trt",
        "from cuda.bindings import runtime as cudart",
        "",
        "",
        "def done(result):",
        '    """The value that a call of CUDA returns beside its status."""',
        "    status, *values = result",
        "    assert int(status) == 0, cudart.cudaGetErrorString(status)[1].decode()",
        "    return values[0] if values else None",
        "",
        "",
        "logger = trt.Logger(trt.Logger.WARNING)",
        "runtime = trt.Runtime(logger)",
        f'with open("{ENGINE}", "rb") as file:',
        "    engine = runtime.deserialize_cuda_engine(file.read())",
        'assert engine, "TensorRT says above why it does not take the engine"',
        "context = engine.create_execution_context()",
        f'least = engine.get_tensor_profile_shape("{image.name}", 0)[0][0]',
        "number = len(images)  # The engine may take no fewer than some: the last one again.",
        "filled = np.concatenate([images, *[images[-1:]] * (least - number)])",
        "images = np.ascontiguousarray(filled)",
        f"outputs = np.empty(({shape}), np.{kind})",
        "stream = int(done(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking)))",
        "context.set_optimization_profile_async(0, stream)",
        "place = int(done(cudart.cudaMalloc(images.nbytes)))",
        "result = int(done(cudart.cudaMalloc(outputs.nbytes)))",
        f'fits = context.set_input_shape("{image.name}", images.shape)',
        'assert fits, "the engine was built for other batches or sizes"',
        f'context.set_tensor_address("{image.name}", place)',
        f'context.set_tensor_address("{output.name}", result)',
        "to, back = (cudart.cudaMemcpyKind.cudaMemcpyHostToDevice,",
        "            cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost)",
        "done(cudart.cudaMemcpyAsync(place, images.ctypes.data, images.nbytes, to, stream))",
        "is_started = context.execute_async_v3(stream)",
        'assert is_started, "TensorRT says above what failed"',
        "done(cudart.cudaMemcpyAsync(outputs.ctypes.data, result, outputs.nbytes, back, stream))",
        "done(cudart.cudaStreamSynchronize(stream))",
        "outputs = outputs[:number]",
        "```",
    ]


def _keys() -> list[str]:
    return [
        f"## {PREPROCESS}",
        "",
        "| key | |",
        "|-|-|",
        "| `input`, `output` | name, dtype and shape, -1 is free; `loss` is what it was trained "
        "with, softmax or sigmoid |",
        "| `left_to_the_client` | what is not in the graph, in this order |",
        "| `image_size` | height and width that the model sees |",
        "| `resized` | height and width that the image is resized to or covers before the center "
        "is cut out in whole pixels; null: it is not |",
        "| `center_crop` | null: the whole image; f: its center, of about f times the shorter "
        "side; the rule is above |",
        "| `squash` | the aspect ratio is given up before the center is cut out |",
        "| `interpolation` | bilinear, bicubic (a = -0.5) or area |",
        "| `antialias` | whether the kernel widens where the image shrinks |",
        "| `resize` | box: fractions of pixels, not rounded; big_vision, timm, huggingface: the "
        "8-bit image of these libraries, then a crop in whole pixels |",
        "| `mean`, `std` | of each channel, of pixels in [0, 1] |",
        "| `jpeg_dct` | libjpeg's transform: accurate (islow, which is usual) or fast (ifast) |",
    ]


def _parity(stages: list[dict[str, Any]], directory: Path) -> list[str]:
    if not stages:
        return []
    lines = ["## Parity", "", "Against the Flax model in float32, on images of `parity.json`:", ""]
    lines += parity.table([{k: v for k, v in x.items() if k != "latency"} for x in stages]).split(
        "\n"
    )
    if (directory / PICTURE).is_file():
        lines += ["", f"![The difference of each form of the model from Flax]({PICTURE})"]
    return lines
