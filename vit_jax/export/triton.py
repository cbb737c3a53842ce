"""A model repository for NVIDIA Triton: the model, what decodes images for it, and both at once."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vit_jax.data import imagenet
from vit_jax.errors import UserError
from vit_jax.export.onnx_file import OnnxFile, Tensor, read_class_names
from vit_jax.export.profiles import Profile
from vit_jax.printable import printable

if TYPE_CHECKING:  # Only what decodes images needs NumPy here.
    from vit_jax.data.protocols import Preprocessing

_TRITON = {"FLOAT": "FP32", "HALF": "FP16", "BF16": "BF16", "UINT8": "UINT8"}
_NUMPY = {"FLOAT": "float32", "HALF": "float16", "UINT8": "uint8"}
# The precisions that Triton knows of TensorRT in onnxruntime; int8 wants a calibration table there.
_PRECISION_MODES = {"fp32": "FP32", "fp16": "FP16"}
ENCODED = "encoded"  # The ensemble's input: the bytes of a file.

_DECODER = '''

class TritonPythonModel:
    """Decodes the images of requests, and prepares them for the model."""

    def initialize(self, args):
        pass

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        files = pb_utils.get_input_tensor_by_name(request, {encoded}).as_numpy().ravel()
        try:
            images = np.stack([prepare(bytes(file)) for file in files])
        except Exception as error:  # Readers of images have no class for damage.
            text = f"an image cannot be read: {{type(error).__name__}}: {{error}}"[:300]
            return pb_utils.InferenceResponse([], pb_utils.TritonError(ascii(text)))
        return pb_utils.InferenceResponse([pb_utils.Tensor({images}, images)])
'''

_CLIENT = '''"""Asks the ensemble about image files: python client.py photo.jpg..."""

import sys

import numpy as np
import tritonclient.http as triton

client = triton.InferenceServerClient("localhost:8000")
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        data = np.array([[file.read()]], dtype=np.object_)
    encoded = triton.InferInput({encoded}, data.shape, "BYTES")
    encoded.set_data_from_numpy(data)
    wanted = triton.InferRequestedOutput({output}{classes})
    print(path, client.infer({name}, [encoded], outputs=[wanted]).as_numpy({output}))
'''


def can_decode(onnx: OnnxFile, preprocessing: "Preprocessing | None") -> bool:
    """Tells whether there is an ensemble for a model: of gray or RGB images, and any batch."""
    return (
        preprocessing is not None
        and preprocessing.channels in (1, 3)
        and onnx.inputs[0].type in _NUMPY
        and fixed_batch(onnx) is None
    )


def fixed_batch(onnx: OnnxFile) -> tuple[Profile, ...] | None:
    """The one profile of a file whose batch is fixed; None if it is free."""
    size = onnx.inputs[0].shape[0]
    return None if size == -1 else (Profile(size, size, size),)


def triton_config(
    name: str,
    platform: str,
    onnx: OnnxFile,
    profiles: tuple[Profile, ...],
    *,
    instances: int = 1,
    cpu_instances: int = 0,
    queue_delay_us: int = 1000,
) -> str:
    """The config.pbtxt of a model for NVIDIA Triton.

    Args:
        name: of the model, and of its directory.
        platform: "onnxruntime_onnx" or "tensorrt_plan".
        onnx: the ONNX file that the model is, or was built from.
        profiles: the batch sizes to serve.
        instances: see `write_deploy`.
        cpu_instances: likewise; an engine has none.
        queue_delay_us: see `write_deploy`.
    """
    fixed = fixed_batch(onnx) is not None
    lines = [
        f"name: {json.dumps(name)}",
        f'platform: "{platform}"',
        # 0: the batch is a dimension like any other, and requests cannot share one.
        f"max_batch_size: {0 if fixed else max(profile.max for profile in profiles)}",
        f"input [ {{ {_tensor(onnx.inputs[0], fixed)} }} ]",
        f"output [ {{ {_tensor(onnx.outputs[0], fixed)}{_labels(onnx)} }} ]",
    ]
    groups = [f"count: {instances} kind: KIND_GPU"] * (instances > 0)
    if platform == "tensorrt_plan":
        # Triton loads the first profile only unless it is told of the others.
        profile = ", ".join(json.dumps(str(i)) for i in range(len(profiles)))
        groups = [f"{group} profile: [ {profile} ]" for group in groups]
        lines.append("optimization { cuda { graphs: true } }")
    else:
        groups += [f"count: {cpu_instances} kind: KIND_CPU"] * (cpu_instances > 0)
        if instances and not onnx.is_raw and onnx.precision in _PRECISION_MODES:
            lines.append(_accelerator(_PRECISION_MODES[onnx.precision]))
    lines.append(f"instance_group [ {', '.join(f'{{ {group} }}' for group in groups)} ]")
    if not fixed:
        preferred = sorted({profile.opt for profile in profiles} | {p.max for p in profiles})
        lines.append(
            f"dynamic_batching {{ preferred_batch_size: {preferred} "
            f"max_queue_delay_microseconds: {queue_delay_us} }}"
        )
    return "\n".join(lines) + "\n"


def _accelerator(precision: str) -> str:
    """Has onnxruntime run on a GPU by TensorRT, which builds engines at the first requests."""
    parameters = {"precision_mode": precision, "max_workspace_size_bytes": str(1 << 30)}
    given = " ".join(
        f'parameters {{ key: "{key}" value: "{value}" }}' for key, value in parameters.items()
    )
    return (
        "optimization { execution_accelerators { gpu_execution_accelerator : [ "
        f'{{ name: "tensorrt" {given} }} ] }} }}'
    )


def decoder_config(name: str, onnx: OnnxFile, largest: int, instances: int) -> str:
    """The config.pbtxt of the model that decodes: from files to images for the other model.

    Args:
        name: of the model.
        onnx: the ONNX file of the other.
        largest: batch to serve.
        instances: processes, each on a core of its own.
    """
    return "\n".join(
        [
            f"name: {json.dumps(name)}",
            'backend: "python"',
            f"max_batch_size: {largest}",
            f"input [ {{ {_encoded()} }} ]",
            f"output [ {{ {_tensor(onnx.inputs[0], False)} }} ]",
            f"instance_group [ {{ count: {instances} kind: KIND_CPU }} ]",
            "",
        ]
    )


def decoder_code(onnx: OnnxFile, preprocessing: "Preprocessing") -> str:
    """The model.py of the model that decodes; it needs what its first lines import."""
    from vit_jax.export import client_code

    image = onnx.inputs[0]
    code = client_code.source(preprocessing, _NUMPY[image.type], onnx.is_raw)
    imports, _, functions = code.partition("\n\n\n")
    text = _DECODER.format(encoded=json.dumps(ENCODED), images=json.dumps(image.name))
    return f"{imports}\nimport triton_python_backend_utils as pb_utils\n\n\n{functions}{text}"


def ensemble_config(name: str, model: str, decoder: str, onnx: OnnxFile, largest: int) -> str:
    """The config.pbtxt of both together: from the bytes of files to the model's output.

    Args:
        name: of the ensemble.
        model: the name of the model itself.
        decoder: of what decodes.
        onnx: the ONNX file.
        largest: batch to serve.
    """
    image, output = onnx.inputs[0].name, onnx.outputs[0].name
    steps = [
        (decoder, {ENCODED: ENCODED}, {image: "prepared"}),
        (model, {image: "prepared"}, {output: output}),
    ]
    described = ", ".join(
        f"{{ model_name: {json.dumps(each)} model_version: -1 "
        f"{_map('input_map', inputs)} {_map('output_map', outputs)} }}"
        for each, inputs, outputs in steps
    )
    return "\n".join(
        [
            f"name: {json.dumps(name)}",
            'platform: "ensemble"',
            f"max_batch_size: {largest}",
            f"input [ {{ {_encoded()} }} ]",
            f"output [ {{ {_tensor(onnx.outputs[0], False)}{_labels(onnx)} }} ]",
            f"ensemble_scheduling {{ step [ {described} ] }}",
            "",
        ]
    )


def client(name: str, onnx: OnnxFile) -> str:
    """A Python file that asks the ensemble of a name for the classes of image files."""
    output = onnx.outputs[0]
    classes = ", class_count=5" if output.name in ("logits", "probabilities") else ""
    return _CLIENT.format(
        encoded=json.dumps(ENCODED),
        output=json.dumps(output.name),
        classes=classes,
        name=json.dumps(name),
    )


def write_model(
    directory: Path,
    config: str,
    onnx: OnnxFile,
    files: list[Path],
    name: str | None = None,
) -> None:
    """Writes a model of a Triton repository, in its version 1.

    Args:
        directory: of the model.
        config: its config.pbtxt.
        onnx: the ONNX file, which has the names of the classes.
        files: of the version, linked where that is possible.
        name: of the one file there; None: its own.
    """
    (directory / "1").mkdir(parents=True)
    (directory / "config.pbtxt").write_text(config, encoding="utf-8")
    labels = read_class_names(onnx.metadata)
    if labels is not None and "label_filename" in config:
        # A name that goes on in the next line would move those of all classes after it.
        text = "".join(f"{printable(imagenet.readable(label))}\n" for label in labels)
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


def _map(kind: str, names: Mapping[str, str]) -> str:
    return " ".join(
        f"{kind} {{ key: {json.dumps(key)} value: {json.dumps(value)} }}"
        for key, value in names.items()
    )


def _encoded() -> str:
    return f'name: "{ENCODED}" data_type: TYPE_STRING dims: [1]'


def _labels(onnx: OnnxFile) -> str:
    return ' label_filename: "labels.txt"' if "class_names" in onnx.metadata else ""


def _tensor(tensor: Tensor, fixed: bool) -> str:
    if tensor.type not in _TRITON:
        raise UserError(f"{tensor.name} is {tensor.type}: use one of {', '.join(_TRITON)}")
    dims = list(tensor.shape if fixed else tensor.shape[1:])
    return f"name: {json.dumps(tensor.name)} data_type: TYPE_{_TRITON[tensor.type]} dims: {dims}"
