"""The preprocessing of evaluation as nodes in front of a graph: raw pixels of any size in.

What `data.resampling` and `data.protocols` compute is computed here once more, as ONNX: the sizes
and the box in 64 bits or whatever the protocol has, the weights of the source pixels of each axis,
and one loop over these weights for each axis, which adds the products in the same order. ONNX's
own Resize knows neither a box of fractions of pixels nor means over areas. PIL's resize is that of
Pillow 13, to the bit.
"""

import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from vit_jax.data.protocols import Preprocessing, resized_sides
from vit_jax.errors import UserError
from vit_jax.export.forward import normalization
from vit_jax.export.graph import Writer, known
from vit_jax.export.onnx_file import RAW
from vit_jax.image_size import sides

_ROWS, _COLUMNS = 1, 2  # Axes of images.
_PIL_BITS = 22  # of the weights in PIL's resize of 8 bits

_Pair = tuple[ir.Value, ir.Value]


class _Taps(NamedTuple):
    """Source pixels that the output pixels of one axis read, and their weights, [size, taps]."""

    source: ir.Value
    weights: ir.Value


def add_preprocessing(model: ir.Model) -> None:
    """Has a graph of prepared images take raw ones, in place.

    Args:
        model: takes `images`, float32 [batch, height, width, channels], prepared as its metadata
            say; then uint8 [batch, height, width, channels], decoded and turned upright, of any
            height and width.

    Raises:
        UserError: the graph is one of pixels, or of images of any size, or as `check_rule`.
    """
    preprocessing = Preprocessing(**json.loads(model.metadata_props["preprocessing"]))
    check_rule(preprocessing)
    graph = model.graph
    (prepared,) = graph.inputs
    batch, *image_shape = known(prepared.shape)
    if prepared.dtype != ir.DataType.FLOAT or tuple(image_shape) != preprocessing.image_shape:
        raise UserError(
            "preprocessing in the graph goes without --free_size and --include_preprocessing"
        )
    images = ir.Value(
        name="images",
        type=ir.TensorType(ir.DataType.UINT8),
        shape=ir.Shape((batch, "height", "width", preprocessing.channels)),
    )
    front = _Front(preprocessing)
    x = front.normalized(front.resized(images))
    x.shape, x.type = ir.Shape((batch, *preprocessing.image_shape)), prepared.type
    prepared.replace_all_uses_with(x)
    graph.inputs[:] = [images]
    front.put_in_front(graph)
    passes.ShapeInferencePass()(model)
    model.metadata_props["pixels"] = RAW


def check_rule(preprocessing: Preprocessing) -> None:
    """Raises a UserError if images are prepared in a way that no graph is written for."""
    if preprocessing.resize == "letterbox":
        raise UserError(
            "images are letterboxed, which is not done in the graph: leave --preprocessing "
            "in_graph out"
        )


class _Front(Writer):
    """Writes the nodes from raw pixels to prepared images."""

    def __init__(self, preprocessing: Preprocessing):
        super().__init__("preprocessing")
        self._rule = preprocessing
        self._view = sides(preprocessing.image_size)

    def resized(self, images: ir.Value) -> ir.Value:
        """The view of evaluation, float32 [batch, height, width, channels], up to 255."""
        shape = self.op("Shape", [images])
        height, width = (
            self.op("Gather", [shape, self._int(axis)], axis=0) for axis in (_ROWS, _COLUMNS)
        )
        if self._rule.resize == "box":
            return self._of_box(images, height, width)
        tall, wide, top, left = self._whole_pixels(height, width)
        if self._rule.resize == "big_vision":
            rows, row_scale = self._areas(height, tall, top, self._view[0])
            columns, column_scale = self._areas(width, wide, left, self._view[1])
            total = self._sum(self._sum(images, columns, _COLUMNS), rows, _ROWS)
            area = self._on("Mul", row_scale, column_scale)
            # onnxruntime makes a division of a product with 1 / x, and would round otherwise.
            inverse = self._on("Div", self._float(2), self._on("Mul", area, self._float(2)))
            total = self._on("Mul", total, inverse)
            return self.op("Floor", [total])
        rows = self._pil_taps(height, tall, top, self._view[0])
        columns = self._pil_taps(width, wide, left, self._view[1])
        lost_rows, lost_columns = self._on("Sub", height, tall), self._on("Sub", width, wide)
        is_tall = self._on("Greater", lost_rows, self._on("Mul", lost_columns, self._int(2)))
        turned = self._on("And", is_tall, self._on("Greater", lost_rows, self._int(0)))
        return self._of_pil(images, rows, columns, turned)

    def normalized(self, pixels: ir.Value) -> ir.Value:
        """Mean and std applied to pixels."""
        scale, offset = normalization(self._rule)
        x = self.op("Mul", [pixels, self.constant("scale", scale)])
        return self.op("Sub", [x, self.constant("offset", offset)])

    def _of_box(self, images: ir.Value, height: ir.Value, width: ir.Value) -> ir.Value:
        """`resampling.sample_box` of `protocols.eval_box`."""
        boxes = self._eval_box(self._cast(height, "DOUBLE"), self._cast(width, "DOUBLE"))
        # Rows first, which lie in one piece; the order matters to the last digit only.
        for axis, length in ((_ROWS, height), (_COLUMNS, width)):
            begin, extent = boxes[axis - 1]
            taps = self._box_taps(begin, extent, length, self._view[axis - 1])
            images = self._sum(images, taps, axis)
        return images

    def _eval_box(self, height: ir.Value, width: ir.Value) -> tuple[_Pair, _Pair]:
        """Begin and extent of the box, in rows and in columns."""
        crop = self._rule.center_crop
        if crop is None:
            zero = self._double(0)
            return (zero, height), (zero, width)
        if self._rule.squash:
            margin, share = self._double((1 - crop) / 2), self._double(crop)
            begins = [self._on("Mul", x, margin) for x in (height, width)]
            extents = [self._on("Mul", x, share) for x in (height, width)]
        else:
            aspect, share = self._double(self._view[1] / self._view[0]), self._double(crop)
            tall = self.op("Min", [height, self._on("Div", width, aspect)])
            wide = self.op("Min", [width, self._on("Mul", height, aspect)])
            extents = [self._on("Mul", x, share) for x in (tall, wide)]
            begins = [
                self._on("Div", self._on("Sub", x, extent), self._double(2))
                for x, extent in zip((height, width), extents, strict=True)
            ]
        rows, columns = zip(begins, extents, strict=True)
        return rows, columns

    def _box_taps(self, begin: ir.Value, extent: ir.Value, length: ir.Value, size: int) -> _Taps:
        """`resampling._taps`."""
        kernel, radius = _KERNELS[self._rule.interpolation]
        step = self._on("Div", extent, self._double(size))
        scale = self._double(1)
        if self._rule.antialias:
            scale = self.op("Max", [step, scale])
        reach = self._on("Mul", scale, self._double(radius))
        origin = self._on("Sub", self.op("Floor", [begin]), self.op("Ceil", [reach]))
        origin = self.op("Max", [origin, self._double(0)])
        # Centers are in 32 bits there.
        offset = self._cast(self._on("Sub", begin, origin), "FLOAT")
        places = self.constant("places", np.arange(size, dtype=np.float32)[:, None] + 0.5)
        centers = self._on("Mul", places, self._cast(step, "FLOAT"))
        centers = self._cast(self._on("Add", centers, offset), "DOUBLE")
        centers = self._on("Add", centers, origin)
        first = self._on("Sub", self._on("Sub", centers, reach), self._double(0.5))
        first = self.op("Ceil", [first])
        taps = self._on("Add", self.op("Floor", [self._twice(reach)]), self._double(1))
        source = self._on("Add", first, self._range(taps))
        distance = self._on("Sub", self._on("Add", source, self._double(0.5)), centers)
        distance = self._on("Div", self.op("Abs", [distance]), scale)
        weights = self._normalized_weights(kernel(self, distance), source, length)
        return self._taps(source, length, self._cast(weights, "FLOAT"))

    def _pil_taps(self, length: ir.Value, size: ir.Value, first: ir.Value, count: int) -> _Taps:
        """The weights of PIL's `precompute_coeffs` and `normalize_coeffs_8bpc` (Resample.c)."""
        kernel, radius = _KERNELS[self._rule.interpolation]
        step = self._on("Div", self._cast(length, "DOUBLE"), self._cast(size, "DOUBLE"))
        scale = self.op("Max", [step, self._double(1)])
        reach = self._on("Mul", scale, self._double(radius))
        places = self.constant("places", np.arange(count, dtype=np.float64)[:, None] + 0.5)
        places = self._on("Add", places, self._cast(first, "DOUBLE"))
        centers = self._on("Mul", places, step)
        begin, end = (
            self.op("Floor", [self._on("Add", x, self._double(0.5))])
            for x in (self._on("Sub", centers, reach), self._on("Add", centers, reach))
        )
        begin = self.op("Max", [begin, self._double(0)])
        taps = self._on("Add", self.op("Ceil", [self._twice(reach)]), self._double(1))
        source = self._on("Add", begin, self._range(taps))
        distance = self._on("Sub", source, centers)
        distance = self._on("Add", distance, self._double(0.5))
        inverse = self._on("Div", self._double(1), scale)
        distance = self.op("Abs", [self._on("Mul", distance, inverse)])
        weights = kernel(self, distance)
        is_tap = self._on("Less", source, end)
        weights = self.op("Where", [is_tap, weights, self._double(0)])
        weights = self._normalized_weights(weights, source, length)
        weights = self._on("Mul", weights, self._double(1 << _PIL_BITS))
        is_negative = self._on("Less", weights, self._double(0))
        half = self.op("Where", [is_negative, self._double(-0.5), self._double(0.5)])
        weights = self._cast(self._on("Add", weights, half), "INT32")
        return self._taps(source, length, weights)

    def _of_pil(self, images: ir.Value, rows: _Taps, columns: _Taps, turned: ir.Value) -> ir.Value:
        """The two passes of PIL's `ImagingResampleInner` (Resample.c), rounded each.

        Columns go first, but for an image that loses more than twice as many rows as columns: it
        is `turned`, so that its rows do.
        """
        images = self._where(turned, images, images, turn=True)
        for axis, then, otherwise in ((_COLUMNS, rows, columns), (_ROWS, columns, rows)):
            pairs = zip(then, otherwise, strict=True)
            taps = _Taps(*(self._where(turned, *pair) for pair in pairs))
            images = self._pil_rounded(self._sum(images, taps, axis, ir.DataType.INT32))
        return self._cast(self._where(turned, images, images, turn=True), "FLOAT")

    def _where(
        self, condition: ir.Value, then: ir.Value, otherwise: ir.Value, turn: bool = False
    ) -> ir.Value:
        """One of two values of any shapes; the first, if asked for, with its axes exchanged."""
        branches = []
        for kind, value in (("Transpose" if turn else "Identity", then), ("Identity", otherwise)):
            name = self._unique("preprocessing/branch")
            settings = [ir.AttrInt64s("perm", [0, 2, 1, 3])] * (kind == "Transpose")
            node = ir.Node("", kind, [value], settings, name=f"{name}/{kind}")
            node.outputs[0].name = f"{name}:0"
            branches.append(ir.Graph([], node.outputs, nodes=[node], name=name))
        then_branch, else_branch = branches
        return self.op("If", [condition], then_branch=then_branch, else_branch=else_branch)

    def _pil_rounded(self, total: ir.Value) -> ir.Value:
        """Sums with weights of `_PIL_BITS` bits as pixels."""
        half = self.constant("half", np.array(1 << (_PIL_BITS - 1), np.int32))
        unit = self.constant("unit", np.array(1 << _PIL_BITS, np.int32))
        bounds = [self.constant("bound", np.array(x, np.int32)) for x in (0, 255)]
        return self.op("Clip", [self._on("Div", self._on("Add", total, half), unit), *bounds])

    def _areas(
        self, length: ir.Value, size: ir.Value, first: ir.Value, count: int
    ) -> tuple[_Taps, ir.Value]:
        """`resampling._areas`."""
        scale = self._on("Div", self._cast(length, "FLOAT"), self._cast(size, "FLOAT"))
        places = self.constant("places", np.arange(count + 1, dtype=np.int64)[:, None])
        position = self._cast(self._on("Add", places, first), "FLOAT")
        edges = self._on("Mul", position, scale)
        begin = self.op("Slice", [edges, *self.ints([0], [count], [0])])
        end = self.op("Slice", [edges, *self.ints([1], [count + 1], [0])])
        start, stop = self.op("Floor", [begin]), self.op("Ceil", [end])
        taps = self.op("ReduceMax", [self._on("Sub", stop, start)], keepdims=0)
        at = self._on("Add", start, self._cast(self._range(taps), "FLOAT"))
        after = self._on("Add", at, self._float(1))
        is_last = self._on("Greater", after, end)
        within = self.op("Where", [is_last, self._on("Sub", end, at), self._float(1)])
        begun = self.op("Where", [is_last, scale, self._on("Sub", after, begin)])
        shares = self.op("Where", [self._on("Less", at, begin), begun, within])
        shares = self.op("Where", [self._on("Less", at, stop), shares, self._float(0)])
        return self._taps(at, length, shares), scale

    def _whole_pixels(
        self, height: ir.Value, width: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """`protocols.whole_pixels`."""
        covered = resized_sides(self._rule)
        if self._rule.squash or self._rule.center_crop is None:
            resized = [self._int(x) for x in covered]
        else:
            resized = self._covering(height, width, covered)
        corner = []
        for size, view in zip(resized, self._view, strict=True):
            margin = self._on("Sub", size, self._int(view))
            if self._rule.resize == "timm":  # Half to even, as in Python.
                half = self._on("Div", self._cast(margin, "DOUBLE"), self._double(2))
                corner.append(self._cast(self.op("Round", [half]), "INT64"))
            else:
                corner.append(self._on("Div", margin, self._int(2)))
        return resized[0], resized[1], corner[0], corner[1]

    def _covering(
        self, height: ir.Value, width: ir.Value, covered: tuple[int, int]
    ) -> list[ir.Value]:
        """`protocols._covering`."""
        tall, wide = (self._int(x) for x in covered)
        by_height = self._on(
            "GreaterOrEqual", self._on("Mul", tall, width), self._on("Mul", wide, height)
        )
        new = self.op("Where", [by_height, tall, wide])
        old = self.op("Where", [by_height, height, width])
        if self._rule.resize == "big_vision":
            factor = self._on("Div", self._cast(new, "FLOAT"), self._cast(old, "FLOAT"))
            exact = [self._on("Mul", self._cast(x, "FLOAT"), factor) for x in (height, width)]
        elif self._rule.resize == "timm" and covered[0] != covered[1]:
            factor = self._on("Div", self._cast(old, "DOUBLE"), self._cast(new, "DOUBLE"))
            exact = [self._on("Div", self._cast(x, "DOUBLE"), factor) for x in (height, width)]
        else:
            return [self._on("Div", self._on("Mul", new, x), old) for x in (height, width)]
        return [self._cast(self.op("Round", [x]), "INT64") for x in exact]

    def _normalized_weights(
        self, weights: ir.Value, source: ir.Value, length: ir.Value
    ) -> ir.Value:
        """Weights that add up to 1, 0 of those beyond the image."""
        is_after = self._on("GreaterOrEqual", source, self._cast(length, "DOUBLE"))
        is_before = self._on("Less", source, self._double(0))
        outside = self._on("Or", is_before, is_after)
        weights = self.op("Where", [outside, self._double(0), weights])
        total = self.op("ReduceSum", [weights, *self.ints([1])], keepdims=1)
        return self._on("Div", weights, total)

    def _taps(self, source: ir.Value, length: ir.Value, weights: ir.Value) -> _Taps:
        last = self._on("Sub", length, self._int(1))
        inside = self.op("Max", [self._cast(source, "INT64"), self._int(0)])
        return _Taps(self.op("Min", [inside, last]), weights)

    def _sum(
        self, images: ir.Value, taps: _Taps, axis: int, kind: ir.DataType = ir.DataType.FLOAT
    ) -> ir.Value:
        """Sums over an axis of [batch, rows, columns, channels], one tap after the other."""
        trailing = [2, 3] if axis == _ROWS else [2]
        source = self.op("Transpose", [taps.source], perm=[1, 0])
        weights = self.op("Transpose", [taps.weights], perm=[1, 0])
        weights = self._on("Unsqueeze", weights, *self.ints(trailing))
        count = self.op("Gather", [self._on("Shape", source), self._int(0)], axis=0)
        going, zero = (
            self.constant("going", np.array(True)),
            self.constant("zero", np.zeros((1, 1, 1, 1), kind.numpy())),
        )
        body = self._add_product(images, source, weights, axis, kind)
        return self.op("Loop", [count, going, zero], body=body)

    def _add_product(
        self, images: ir.Value, source: ir.Value, weights: ir.Value, axis: int, kind: ir.DataType
    ) -> ir.Graph:
        """The body of a loop over taps: adds what one of them contributes."""
        name = self._unique("preprocessing/loop")
        scalar = ir.Shape([])
        tap = ir.Value(name=f"{name}/tap", type=ir.TensorType(ir.DataType.INT64), shape=scalar)
        going = ir.Value(name=f"{name}/going", type=ir.TensorType(ir.DataType.BOOL), shape=scalar)
        total = ir.Value(name=f"{name}/total", type=ir.TensorType(kind))
        nodes: list[ir.Node] = []

        def op(kind: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
            settings = [ir.AttrInt64(key, value) for key, value in attributes.items()]
            node = ir.Node("", kind, inputs, settings, name=f"{name}/{kind}_{len(nodes)}")
            node.outputs[0].name = f"{node.name}:0"
            nodes.append(node)
            return node.outputs[0]

        pixels = op("Gather", [images, op("Gather", [source, tap], axis=0)], axis=axis)
        weight = op("Gather", [weights, tap], axis=0)
        product = op("Mul", [op("Cast", [pixels], to=kind), weight])
        following, still = op("Add", [total, product]), op("Identity", [going])
        following.type, still.type, still.shape = total.type, going.type, scalar
        return ir.Graph([tap, going, total], [still, following], nodes=nodes, name=name)

    def _range(self, count: ir.Value) -> ir.Value:
        """0, 1, ... in 64 bits, [count]."""
        numbers = self._on("Range", self._int(0), self._cast(count, "INT64"), self._int(1))
        return self._cast(numbers, "DOUBLE")

    def _twice(self, x: ir.Value) -> ir.Value:
        return self._on("Mul", x, self._double(2))

    def _cast(self, x: ir.Value, kind: str) -> ir.Value:
        return self.op("Cast", [x], to=ir.DataType[kind])

    def _int(self, x: int) -> ir.Value:
        return self.constant("int", np.array(x, np.int64))

    def _float(self, x: float) -> ir.Value:
        return self.constant("float", np.array(x, np.float32))

    def _double(self, x: float) -> ir.Value:
        return self.constant("double", np.array(x, np.float64))

    def _on(self, kind: str, *inputs: ir.Value) -> ir.Value:
        return self.op(kind, inputs)

    def triangle(self, x: ir.Value) -> ir.Value:
        """`resampling._triangle`."""
        return self._on("Max", self._on("Sub", self._double(1), x), self._double(0))

    def keys_cubic(self, x: ir.Value) -> ir.Value:
        """`resampling._keys_cubic`."""
        near, far = self._polynomial(x, 1.5, -2.5, 0, 1), self._polynomial(x, -0.5, 2.5, -4, 2)
        far = self._on("Where", self._on("Less", x, self._double(2)), far, self._double(0))
        return self._on("Where", self._on("Less", x, self._double(1)), near, far)

    def _polynomial(self, x: ir.Value, *coefficients: float) -> ir.Value:
        """By Horner's rule, the highest power first."""
        total = self._double(coefficients[0])
        for coefficient in coefficients[1:]:
            total = self._on("Add", self._on("Mul", total, x), self._double(coefficient))
        return total


# The kernels, and how far they reach in pixels of the coarser grid.
_KERNELS: dict[str, tuple[Callable[[_Front, ir.Value], ir.Value], int]] = {
    "bilinear": (_Front.triangle, 1),
    "bicubic": (_Front.keys_cubic, 2),
}
