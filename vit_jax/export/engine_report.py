"""A report of a model's engine: layers, tensors, and whether attention was fused."""

import json
import re
from collections.abc import Mapping
from typing import Any

from vit_jax.export.nvidia import device_name
from vit_jax.printable import printable


def inspect(trt: Any, engine: Any) -> list[Any]:
    """The layers of an engine that was built with detailed verbosity; dicts, or mere names."""
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        return json.loads(text)["Layers"]
    except (ValueError, KeyError):  # The engine is good even where this account of it is not.
        return text.splitlines()


def tensors(trt: Any, engine: Any) -> list[dict[str, Any]]:
    """Name, direction, type and shape of every input and output; -1 is the batch."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    return [
        {
            "name": name,
            "mode": "input" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "output",
            "type": engine.get_tensor_dtype(name).name,
            "shape": list(engine.get_tensor_shape(name)),
        }
        for name in names
    ]


def report(
    layers: list[Any], tensors: list[dict[str, Any]], softmaxes: int, metadata: Mapping[str, str]
) -> dict[str, Any]:
    """The entries of engine.json about the inside of an engine.

    Args:
        layers: from `inspect`.
        tensors: from `tensors`.
        softmaxes: the number of Softmax nodes in the ONNX file.
        metadata: of the ONNX file.
    """
    makes_probabilities = any(tensor["name"] == "probabilities" for tensor in tensors)
    heads = int(makes_probabilities and metadata.get("loss") != "sigmoid") + _poolings(metadata)
    return {
        "tensors": tensors,
        "layers": len(layers),
        "attention": attention_report(layers, softmaxes, heads),
    }


def _poolings(metadata: Mapping[str, str]) -> int:
    """The Softmax nodes of attention pooling, whose single query engines need not fuse."""
    try:
        model = json.loads(metadata.get("model", "{}"))
    except (ValueError, RecursionError):  # It may be a stranger's.
        return 0
    return int(isinstance(model, dict) and model.get("classifier") == "map")


def attention_report(layers: list[Any], softmaxes: int, heads: int = 0) -> dict[str, Any]:
    """Says from the engine inspector's layers whether attention was fused.

    Fused attention runs in kernels that TensorRT calls `_gemm_mha_v2` or the like; attention that
    was not fused leaves softmax kernels. TensorRT 8.6 hides both in one layer ("ForeignNode").

    Args:
        layers: of the inspector's JSON, built with detailed verbosity; dicts, or mere names.
        softmaxes: the number of Softmax nodes in the ONNX file.
        heads: how many of them are not of a layer's attention: they make probabilities of logits,
            or pool.

    Returns:
        `fused` (True, False, or None if the layers do not tell), and the numbers of
        `fused_kernels`, of `softmax_kernels` and of `softmax_nodes`, all without those of heads. Of
        a fused pooling the kernel counts.
    """
    fused = unfused = 0
    for layer in layers:
        layer = layer if isinstance(layer, dict) else {"Name": layer}
        kernel = f"{layer.get('TacticName', '')} {layer.get('LayerType', '')}"
        # The rest of a name quotes ONNX nodes, which may well be called "attention" or "Softmax".
        name = str(layer.get("Name", "")).split("/")[0]
        if re.search(r"mha(_|\b)|fmha|flash_?att", f"{kernel} {name}", re.I):
            fused += 1
        elif re.search(r"softmax", kernel, re.I) or re.match(r"__myl_\w*Max\w*Exp\w*Sum", name):
            unfused += 1
    nodes, unfused = softmaxes - heads, max(0, unfused - heads)
    told = unfused > 0 or 0 < nodes <= fused
    return {
        "fused": unfused == 0 if told else None,
        "fused_kernels": fused,
        "softmax_kernels": unfused,
        "softmax_nodes": nodes,
    }


def summary(description: dict[str, Any]) -> str:
    """The lines that tell what was built, from the contents of engine.json."""
    profiles = ", ".join("{min}:{opt}:{max}".format(**p) for p in description["profiles"])
    attention = description["attention"]
    verdict = {
        True: f"fused into {attention['fused_kernels']} kernels",
        False: f"NOT fused: {attention['softmax_kernels']} softmax kernels, "
        f"{attention['fused_kernels']} fused ones",
        None: "not told by the engine inspector of this version"
        if attention["softmax_nodes"]
        else "none in this model",
    }[attention["fused"]]
    typing = "strongly typed" if description["strongly_typed"] else "weakly typed"
    return (
        f"TensorRT {description['tensorrt']} on {printable(device_name(description['device']))}: "
        f"{description['precision']} ({typing}), batch {profiles}\n"
        f"{description['engine']['bytes'] / 2**20:.1f} MiB in {description['layers']} layers, "
        f"built in {description['build_seconds']} s\n"
        f"attention ({attention['softmax_nodes']} softmax nodes): {verdict}"
    )
