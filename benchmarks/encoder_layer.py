"""One encoder layer of our ONNX graph beside what stock converters make of the same layer.

    python benchmarks/encoder_layer.py --output docs/encoder_layer.png      # needs Graphviz's dot

Drawn is the second of three layers of a ViT: all nodes between two points of the residual stream.
"""

import argparse
import html
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import onnx
from onnx_cpu import ours, random_forward, stock_jax2onnx, stock_tf2onnx, timm_torch

# What a deployment engine looks for, and what multiplies weights.
COLORS = {
    "LayerNormalization": "#8dd3c7",
    "Softmax": "#fdb462",
    "Erf": "#bebada",
    "MatMul": "#80b1d3",
    "Gemm": "#80b1d3",
    "Einsum": "#80b1d3",
}
FLOATS = {onnx.TensorProto.FLOAT}


def middle_layer(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes of the second of three encoder layers, and what leads into them alone.

    The stream of a residual network is cut by exactly those tensors that every path from the images
    to the logits goes through; each layer ends in the second Add that it is cut at.
    """
    producer = {name: node for node in graph.node for name in node.output}
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    # Paths of numbers that depend on the images; shapes go their own ways.
    depends = {graph.input[0].name}
    for node in graph.node:
        if depends & {*node.input} and kinds.get(node.output[0]) in FLOATS:
            depends.add(node.output[0])
    residual = []
    for node in graph.node:
        two = sum(name in depends for name in node.input) == 2
        if node.op_type == "Add" and two and cuts(graph, depends, node.output[0]):
            residual.append(node)
    assert len(residual) == 6, f"{len(residual)} residual connections in three layers"
    start, end = residual[1].output[0], residual[3].output[0]
    inside = ancestors(producer, end) - ancestors(producer, start)
    return [node for node in graph.node if node.output[0] in inside]


def ancestors(producer: dict[str, onnx.NodeProto], name: str) -> set[str]:
    """The nodes that a tensor depends on, by their first outputs."""
    found: set[str] = set()
    stack = [name]
    while stack:
        node = producer.get(stack.pop())
        if node is not None and node.output[0] not in found:
            found.add(node.output[0])
            stack += node.input
    return found


def cuts(graph: onnx.GraphProto, depends: set[str], name: str) -> bool:
    """Whether every path of numbers from the images to the output goes through a tensor."""
    reached = {graph.input[0].name}
    for node in graph.node:
        if reached & {*node.input} - {name}:
            reached |= {*node.output} & depends
    return graph.output[0].name not in reached - {name}


def cluster(index: int, title: str, nodes: list[onnx.NodeProto]) -> list[str]:
    """The nodes as a subgraph in Graphviz' language."""
    lines = [f"subgraph cluster_{index} {{ label=<<b>{html.escape(title)}</b>>;"]
    names = {id(node): f"n{index}_{i}" for i, node in enumerate(nodes)}
    producer = {name: names[id(node)] for node in nodes for name in node.output}
    for node in nodes:
        color = COLORS.get(node.op_type, "#f4f4f4")
        lines.append(f'{names[id(node)]} [label="{node.op_type}" fillcolor="{color}"];')
    lines.append("}")
    for node in nodes:
        sources = dict.fromkeys(producer[name] for name in node.input if name in producer)
        lines += [f"{source} -> {names[id(node)]};" for source in sources]
    return lines


def main() -> None:
    """Exports three layers by every converter at hand, and draws the second."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="encoder_layer.png")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    forward = random_forward("ViT-B/16", num_layers=3)
    lines = [
        "digraph { rankdir=TB; ranksep=0.16; nodesep=0.12; fontname=Helvetica; fontsize=15;",
        'node [shape=box style="filled,rounded" fontname=Helvetica fontsize=10 height=0.24 '
        'margin="0.08,0.02"]; edge [arrowsize=0.5]; color=gray;',
    ]
    exports = {
        "vit_jax": lambda directory: ours(forward, directory),
        "jax2tf and tf2onnx": lambda directory: stock_tf2onnx(forward, directory),
        "jax2onnx": lambda directory: stock_jax2onnx(forward, directory),
        "timm, torch.onnx.export": lambda directory: timm_torch("ViT-B/16", directory, depth=3),
    }
    with tempfile.TemporaryDirectory() as temporary:
        for index, (title, export) in enumerate(exports.items()):
            path = export(Path(temporary))
            if path is None:
                continue
            model = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True)
            nodes = middle_layer(model.graph)
            print(f"{title}: {len(nodes)} nodes in a layer", flush=True)
            lines += cluster(index, f"{title}: {len(nodes)} nodes", nodes)
    command = ["dot", "-Tpng", "-Gdpi=72", "-o", args.output]
    subprocess.run(command, input="\n".join([*lines, "}"]), text=True, check=True)


if __name__ == "__main__":
    sys.exit(main())
