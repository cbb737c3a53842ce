"""Graphs for images of any height and width: position embeddings are interpolated in the graph.

The layers are converted from z_0, the tokens before the first of them (Eq. 1), so that all that
depends on height and width is what is put in front here: the patches, and the position embeddings,
which one Resize fits to the grid (Section 3.2). Sides need be no multiples of the patch size: see
`models.dense.dense_features`.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx_ir as ir
from flax.traverse_util import flatten_dict, unflatten_dict
from onnx_ir.passes import common as passes

from vit_jax import models
from vit_jax.data.protocols import Preprocessing
from vit_jax.export.forward import Forward, normalization, tokens_of
from vit_jax.export.graph import Writer
from vit_jax.export.stages import DENSE
from vit_jax.image_size import MAX_IMAGE_SIZE
from vit_jax.models.base import Grid
from vit_jax.models.encoder import Encoder
from vit_jax.models.positions import sincos2d
from vit_jax.models.vit import POSITIONS, VisionTransformer, ViTConfig

# The parameters that z_0 is made of.
_STEM = ("embedding", "cls", "dist", "register")
_POSITIONS = tuple(POSITIONS.split("/")[:2])


def on_tokens(forward: Forward, tokens: int) -> Forward:
    """The function of z_0, [batch, tokens, hidden_size], in place of images.

    Of the output "grid" it gives the tokens, from which `add_stem` takes the patches.
    """
    config, name = _config(forward), forward.output_name
    apply = forward.apply
    if name in DENSE:
        name, layer = "tokens", json.loads(forward.metadata["layer"])
        module = models.create_model(json.loads(forward.metadata["model"]), remat="nothing")
        apply = functools.partial(tokens_of, module, layer=layer)

    def of_tokens(params: Any, tokens: jax.Array) -> jax.Array:
        patches = tokens.shape[1] - config.num_prefix_tokens
        # Only their shape matters.
        height, width = config.patch_size, config.patch_size * patches
        images = jnp.zeros((1, height, width, forward.image_shape[-1]))
        with nn.intercept_methods(_in_place_of_stem(tokens)):
            return apply(params, images)

    kept = {
        path: x
        for path, x in flatten_dict(forward.params).items()
        if path[0] not in _STEM and path[: len(_POSITIONS)] != _POSITIONS
    }
    return dataclasses.replace(
        forward,
        apply=of_tokens,
        params=unflatten_dict(kept),
        image_shape=(tokens, config.hidden_size),
        image_dtype="float32",
        output_name=name,
    )


def _in_place_of_stem(tokens: jax.Array) -> Callable[..., Any]:
    """Has a Vision Transformer compute on given tokens, whatever its image."""

    def intercept(function: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        match context.module, context.method_name:
            case VisionTransformer(), "_embed" | "_prefix":
                return None
            case Encoder(), "_tokens":
                return tokens, None
        return function(*args, **kwargs)

    return intercept


def _config(forward: Forward) -> ViTConfig:
    config: Any = models.describe(json.loads(forward.metadata["model"]))
    return config


def add_stem(model: ir.Model, forward: Forward) -> None:
    """Puts in front of a graph of `on_tokens` what makes tokens of images, in place."""
    graph, config = model.graph, _config(forward)
    (tokens,) = graph.inputs
    kind = ir.DataType.UINT8 if forward.image_dtype == "uint8" else ir.DataType.FLOAT
    images = ir.Value(
        name="images",
        type=ir.TensorType(kind),
        shape=ir.Shape(("batch", "height", "width", forward.image_shape[-1])),
    )
    stem = _Stem(config, forward.params, config.grid(*forward.image_shape[:2]))
    x = stem.normalized(images, forward) if forward.image_dtype == "uint8" else images
    grid = stem.grid(images)
    z = stem.tokens(stem.patches(x, grid), stem.positions(grid))
    tokens.replace_all_uses_with(z)
    graph.inputs[:] = [images]
    stem.put_in_front(graph)
    if forward.output_name == "grid":
        graph.outputs[:] = [stem.on_grid(graph.outputs[0], grid)]
        graph.extend(stem.nodes)
    for value in stem.weights:
        graph.register_initializer(value)
    passes.ShapeInferencePass()(model)


class _Stem(Writer):
    """Writes the nodes from images to z_0."""

    def __init__(self, config: ViTConfig, params: Mapping[str, Any], own: Grid):
        """Takes the rows and columns of patches that the position embeddings are of."""
        super().__init__("stem")
        self._config = config
        self._params = params
        self._own = own
        self._width = config.hidden_size

    def normalized(self, images: ir.Value, forward: Forward) -> ir.Value:
        """Mean and std applied to uint8 pixels."""
        scale, offset = normalization(
            Preprocessing(**json.loads(forward.metadata["preprocessing"]))
        )
        x = self.op("Cast", [images], to=ir.DataType.FLOAT)
        x = self.op("Mul", [x, self.constant("scale", scale)])
        return self.op("Sub", [x, self.constant("offset", offset)])

    def grid(self, images: ir.Value) -> ir.Value:
        """The numbers of rows and columns of whole patches, [2]."""
        sides = self.op("Slice", [self.op("Shape", [images]), *self.ints([1], [3])])
        return self.op("Div", [sides, *self.ints([self._config.patch_size] * 2)])

    def patches(self, x: ir.Value, grid: ir.Value) -> ir.Value:
        """x_p E of Eq. 1, [batch, patches, hidden_size].

        By Reshapes with one unknown axis each: a column of patches first, then a row.
        """
        size, embedding = self._config.patch_size, self._params["embedding"]
        row = size * np.shape(embedding["kernel"])[2]  # of a patch's pixels
        ends = self.op("Mul", [grid, *self.ints([size] * 2)])
        x = self.op("Slice", [x, *self.ints([0, 0]), ends, *self.ints([1, 2])])
        x = self.op("Reshape", [x, *self.ints([0, 0, -1, row])])
        x = self.op("Transpose", [x], perm=[0, 2, 1, 3])  # [batch, columns, height, ...]
        x = self.op("Reshape", [x, *self.ints([0, 0, -1, size * row])])
        x = self.op("Transpose", [x], perm=[0, 2, 1, 3])  # [batch, rows, columns, ...]
        x = self.op("Reshape", [x, *self.ints([0, -1, size * row])])
        kernel = np.asarray(embedding["kernel"]).reshape(-1, self._width)
        x = self.op("MatMul", [x, self.constant("embedding/kernel", kernel)])
        return self.op("Add", [x, self.constant("embedding/bias", embedding["bias"])])

    def positions(self, grid: ir.Value) -> ir.Value:
        """E_pos of the patches, [1, patches, hidden_size]."""
        if self._config.position_embedding == "sincos2d":
            x = self._computed(grid)
        elif self._config.position_embedding == "2d":
            of = self._of_positions()
            half = ((0, 0), (0, self._width // 2), (0, 0), (0, 0))
            x = np.pad(of["pos_embedding_x"][0].T[None, :, None, :], half)
            y = np.pad(
                of["pos_embedding_y"][0].T[None, :, :, None], [*half[:1], half[1][::-1], *half[2:]]
            )
            rows, columns = self._rows_and_columns(grid)
            one = self.ints([1])
            x = self._resized("pos_embedding_x", x, [*one, columns])
            y = self._resized("pos_embedding_y", y, [rows, *one])
            x = self.op("Add", [y, x])
        else:
            x = self._resized("pos_embedding", self._learned(), [grid])
        x = self.op("Reshape", [x, *self.ints([1, self._width, -1])])
        return self.op("Transpose", [x], perm=[0, 2, 1])

    def tokens(self, x: ir.Value, positions: ir.Value) -> ir.Value:
        """z_0 of Eq. 1."""
        prefix = self._prefix()
        if prefix.shape[1]:
            # As in `encoder.Encoder`: a token is not repeated for each image.
            x = self.op("Pad", [x, *self.ints([0, prefix.shape[1], 0, 0, 0, 0])])
            tokens = self.constant("prefix", prefix)
            positions = self.op("Concat", [tokens, positions], axis=1)
        return self.op("Add", [x, positions])

    def on_grid(self, tokens: ir.Value, grid: ir.Value) -> ir.Value:
        """The patches of tokens, [batch, rows, columns, hidden_size], the output `grid`."""
        first, end = self._config.num_prefix_tokens, np.iinfo(np.int64).max
        x = self.op("Slice", [tokens, *self.ints([first], [end], [1])])
        batch, width = self.ints([0], [self._width])
        x = self.op("Reshape", [x, self.op("Concat", [batch, grid, width], axis=0)])
        tokens.name = "tokens"
        x.name, x.type = "grid", ir.TensorType(ir.DataType.FLOAT)
        x.shape = ir.Shape(("batch", "rows", "columns", self._width))
        return x

    def _computed(self, grid: ir.Value) -> ir.Value:
        """The embeddings of "sincos2d", [1, hidden_size, rows, columns], from tables of a side."""
        sides, half = MAX_IMAGE_SIZE // self._config.patch_size, self._width // 2
        x, y = np.zeros((2, 1, self._width, sides), np.float32)
        x[0, :half] = sincos2d((1, sides), self._width)[:, :half].T
        y[0, half:] = sincos2d((sides, 1), self._width)[:, half:].T
        rows, columns = self._rows_and_columns(grid)
        first, row_axis, column_axis = self.ints([0], [2], [3])
        x, y = self.constant("columns", x[:, :, None, :]), self.constant("rows", y[..., None])
        x = self.op("Slice", [x, first, columns, column_axis])
        return self.op("Add", [self.op("Slice", [y, first, rows, row_axis]), x])

    def _rows_and_columns(self, grid: ir.Value) -> list[ir.Value]:
        return [self.op("Slice", [grid, *self.ints([i], [i + 1])]) for i in range(2)]

    def _resized(self, name: str, table: np.ndarray, size: list[ir.Value]) -> ir.Value:
        """A table [1, hidden_size, rows, columns] for another grid, the corners kept in place."""
        sizes = self.op("Concat", [*self.ints([1, self._width]), *size], axis=0)
        value = self.constant(f"{'/'.join(_POSITIONS)}/{name}", table)
        return self.op(
            "Resize",
            [value, None, None, sizes],
            mode="linear",
            coordinate_transformation_mode="align_corners",
        )

    def _of_positions(self) -> Mapping[str, np.ndarray]:
        return self._params["Transformer"]["posembed_input"]

    def _learned(self) -> np.ndarray:
        """The embeddings of patches, [1, hidden_size, rows, columns]; of none a zero for all."""
        if self._config.position_embedding == "none":
            return np.zeros((1, self._width, 1, 1), np.float32)
        patches = self._of_positions()["pos_embedding"][0, self._config.num_class_tokens :]
        return patches.reshape(*self._own, -1).transpose(2, 0, 1)[None]

    def _prefix(self) -> np.ndarray:
        """The tokens before the patches, with their positions, [1, tokens, hidden_size]."""
        config, count = self._config, self._config.num_class_tokens
        tokens = [np.asarray(self._params[x]) for x in _STEM[1:] if x in self._params]
        if not tokens or not config.has_class:
            return np.zeros((1, 0, self._width), np.float32)
        prefix = np.concatenate(tokens, axis=1)
        if config.position_embedding == "learned":
            prefix[:, :count] += self._of_positions()["pos_embedding"][:, :count]
        return prefix
