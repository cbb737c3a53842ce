"""Graphs for images of any height and width, and of every patch's features, against Flax."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.checkpoints.pretrained import Pretrained, load_pretrained
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.export import runtime
from vit_jax.export.__main__ import main
from vit_jax.export.onnx_file import read_onnx
from vit_jax.export.parity import load_report
from vit_jax.export.pipeline import Export
from vit_jax.models.positions import resize_grid, sincos2d

from .graphs import ir, onnx, onnxruntime
from .test_to_onnx import TENSORRT_8_6

free_size = pytest.importorskip("vit_jax.export.free_size", exc_type=ImportError)
POSITIONS = ("Transformer", "posembed_input", "pos_embedding")


def at(forward, height, width):
    """The same function in Flax for images of this height and width."""
    params = flatten_dict(forward.params)
    positions, grid = params[POSITIONS][0], (height // 8, width // 8)
    patches = resize_grid(positions[1:].reshape(2, 2, -1), grid).reshape(-1, positions.shape[1])
    params[POSITIONS] = np.concatenate([positions[:1], patches])[None]
    return dataclasses.replace(forward, params=unflatten_dict(params)).jitted()


def images(height, width, kind=np.float32, channels=3):
    x = np.random.default_rng(1).normal(size=(2, height, width, channels))
    return (x.clip(-2, 2) * 60 + 120).astype(kind) if kind == np.uint8 else x.astype(kind)


def test_tokens_equal_flax_at_any_height_and_width(converter, make_forward, tmp_path):
    forward = make_forward(outputs="tokens", num_layers=1)
    model = json.loads(forward.metadata["model"])
    pretrained = Pretrained(forward.params, model, Preprocessing(16), None, "softmax", "random")
    export = Export(tmp_path, batch="1:1:2", latency_seconds=0)
    export.convert(pretrained, converter=converter, outputs="tokens", free_size=True)
    assert not export.failures
    stages = load_report(tmp_path)
    assert {stage["precision"] for stage in stages} == {"fp32 tokens"}
    names = [stage["name"] for stage in stages]
    assert names[0] == "ONNX fp32"
    assert names[1:] == [f"ONNX fp32, {size}" for size in ("8 x 8", "24 x 32", "32 x 16")]

    path = tmp_path / "model.onnx"
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert operators <= TENSORRT_8_6 | {"Shape", "Resize"}
    metadata = read_onnx(path).metadata
    assert (metadata["output"], metadata["prefix"], metadata["layer"]) == (
        *("tokens", '["class"]'),
        "null",
    )
    with runtime.load(path) as loaded:
        assert loaded.image_shape == (-1, -1, 3)
        for height, width in ((8, 40), (21, 34)):  # Of patches of 8; some is left over.
            x = images(height, width)
            expected = at(forward, height, width)(x)
            assert expected.shape == (2, 1 + (height // 8) * (width // 8), 32)
            np.testing.assert_allclose(loaded.predict(x), expected, atol=1e-5 * expected.max())
        with pytest.raises(UserError, match=r"pass \[batch, height, width, 3\]"):
            loaded.predict(images(16, 16)[..., :2])
        for x in (images(7, 16), np.zeros((1, 8, 10_001, 3), np.float32)):
            with pytest.raises(UserError, match="of 8 to 10000 pixels a free side"):
                loaded.predict(x)
    with pytest.raises(UserError, match="is an exported model, not weights: run it by"):
        load_pretrained(path)
    readme = (tmp_path / "deploy" / "README.md").read_text()
    assert "An engine is built for one size of images" in readme
    assert '; tokens before them: `["class"]`' in readme
    assert "trtexec" not in readme


def run_stem(forward, x):
    """What the stem makes of images, before a graph of nothing."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    tokens = ir.Value(name="tokens_in", type=kind, shape=ir.Shape(("batch", "tokens", 32)))
    nothing = ir.node("Identity", [tokens])
    nothing.outputs[0].type = kind
    graph = ir.Graph([tokens], nothing.outputs, nodes=[nothing], opset_imports={"": 17})
    model = ir.Model(graph, ir_version=8)
    free_size.add_stem(model, forward)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return session.run(None, {"images": x})[0]


def test_the_grid_is_that_of_a_layers_patches_of_pixels(make_forward):
    options = {"layer": 1, "include_preprocessing": True, "free_size": True}
    grid, tokens = (make_forward(outputs=outputs, **options) for outputs in ("grid", "tokens"))
    x = images(24, 16, np.uint8)
    assert "prefix" in tokens.metadata and "prefix" not in grid.metadata
    expected, z = at(grid, 24, 16)(x), run_stem(tokens, x)
    assert (expected.shape, z.shape) == ((2, 3, 2, 32), (2, 1 + 3 * 2, 32))
    np.testing.assert_array_equal(run_stem(grid, x), z[:, 1:].reshape(expected.shape))
    layers = free_size.on_tokens(grid, 7)
    found = np.asarray(jax.jit(layers.apply)(layers.params, z))
    found = found[:, 1:].reshape(expected.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("kind", "channels"), [("learned", 3), ("2d", 3), ("sincos2d", 4), ("none", 1)]
)
def test_position_embeddings_are_fitted_in_the_graph(make_forward, kind, channels):
    forward = make_forward(
        channels=channels,
        outputs="tokens",
        free_size=True,
        position_embedding=kind,
        num_registers=2,
        distillation_token=True,
    )
    params = flatten_dict(forward.params, sep="/")
    prefix = np.concatenate([params[name] for name in ("cls", "dist", "register")], axis=1)[0]
    name = "/".join(POSITIONS)
    for rows, columns in ((2, 2), (1, 5), (3, 1), (7, 4)):
        x = images(rows * 8, columns * 8, channels=channels)
        patches = (
            x.reshape(2, rows, 8, columns, 8, channels)
            .swapaxes(2, 3)
            .reshape(2, rows * columns, -1)
        )
        z = patches @ params["embedding/kernel"].reshape(-1, 32) + params["embedding/bias"]
        z = np.concatenate([np.broadcast_to(prefix, (2, 4, 32)), z], axis=1)
        if kind == "learned":
            z[:, :2] += params[name][:, :2]
            grid = params[name][0, 2:].reshape(2, 2, 32)
            z[:, 4:] += resize_grid(grid, (rows, columns)).reshape(-1, 32)
        elif kind == "2d":
            across = resize_grid(params[f"{name}_x"], (1, columns))
            down = resize_grid(params[f"{name}_y"].swapaxes(0, 1), (rows, 1))
            whole = (rows, columns, 16)
            z[:, 4:] += np.concatenate(
                [np.broadcast_to(across, whole), np.broadcast_to(down, whole)], axis=-1
            ).reshape(-1, 32)
        elif kind == "sincos2d":
            z[:, 4:] += sincos2d((rows, columns), 32)
        np.testing.assert_allclose(run_stem(forward, x), z, atol=2e-5)


@pytest.mark.parametrize("num_classes", [97, 101])
def test_a_head_of_as_many_classes_as_are_traced_is_exported(make_forward, num_classes):
    to_onnx = pytest.importorskip("vit_jax.export.to_onnx", exc_type=ImportError)
    pytest.importorskip("jax2onnx", reason="see docs/deployment.md", exc_type=ImportError)
    for is_free in (False, True):
        forward = make_forward(num_layers=1, num_classes=num_classes, free_size=is_free)
        model = to_onnx.to_model(forward, "jax2onnx")
        assert [str(x) for x in model.graph.outputs[0].shape] == ["batch", str(num_classes)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"architecture": "hybrid", "resnet_layers": (1,), "patch_size": 1},
            "a hybrid, an axial model or a ResNet",
        ),
        ({"position_embedding": "relative"}, "relative or in every layer"),
        ({"position_placement": "shared"}, "relative or in every layer"),
    ],
)
def test_a_model_for_one_size_is_refused(make_forward, config, message):
    with pytest.raises(UserError, match=message):
        make_forward(free_size=True, image_size=32, **config)


def test_flags_that_do_not_go_together_are_refused(make_forward):
    with pytest.raises(UserError, match="layer 1 goes with tokens and grid, not with logits"):
        make_forward(layer=1)
    with pytest.raises(UserError, match="use --stages onnx"):
        main(["--checkpoint=x", "--output=x", "--free_size", "--stages=tf,onnx"])
