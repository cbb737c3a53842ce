"""The precisions of an export, one row each: all that differs between them is here.

Everything else looks up the row. A new precision is one row of `PRECISIONS`, and the function in
`casts` that gives a float32 graph its types; `--precision`, the comparison with Flax, the builder
and the commands of `deploy` then know it. Say, fp8 by QuantizeLinear nodes for the tensor cores of
Hopper:

    Precision(
        "fp8",
        cast=_to_fp8,
        tolerance=Tolerance(relative_difference=0.3, cosine=0.98, top1_agreement=0.9),
        operators=frozenset({"QuantizeLinear", "DequantizeLinear"}),  # its metadata says which
        calibration_images=64,  # `_to_fp8(model, images)` takes its scales from them
        runs_on_cpu=False,  # onnxruntime has no such products
        builder_flags=None,  # TensorRT 8.6 does not know it
    )

Imports the standard library only: the TensorRT stage needs no more.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """The limits beyond which the command fails.

    Attributes:
        relative_difference: the largest difference relative to the largest output, at most.
        cosine: the smallest cosine of an image's outputs with Flax's, at least.
        top1_agreement: the share of images with the same first class, at least.
    """

    relative_difference: float
    cosine: float
    top1_agreement: float


@dataclasses.dataclass(frozen=True)
class Precision:
    """A way to compute an exported model.

    Attributes:
        name: of the flag `--precision`, in the file's metadata and in reports.
        tolerance: how far from Flax in float32 it may be.
        cast: gives a float32 graph its types, perhaps in place, and returns it; its second
            argument are the calibration images. None: the graph stays as it is.
        engine_tolerance: like `tolerance`, of an engine, where that is another.
        tokens_tolerance: likewise of every token. Of ViT-Ti/16 at 336 x 448 pixels Flax in float32
            is 4e-5 from float64 at one.
        dtype: NumPy's name of the type that most weights have; None if that does not identify it.
        onnx_type: the number of `dtype` in TensorProto.DataType.
        operators: operators that identify it in a file, whatever its weights are.
        largest: the largest number of `dtype`, where activations may be beyond it.
        wider: the precision to use where a number is beyond `largest`.
        calibration_images: how many images the cast takes its scales from.
        emulated: whether `emulation` rounds what is of `dtype`.
        runs_on_cpu: whether onnxruntime computes it on a CPU.
        builder_flags: the names of the BuilderFlags where the network is weakly typed, that is, in
            TensorRT 8.6; None where 8.6 does not know the type.
        trtexec_flags: the same for trtexec and polygraphy.
        constrained: whether 8.6 must be given, layer by layer, what stays in float32.
    """

    name: str
    tolerance: Tolerance
    cast: "Callable[[ir.Model, np.ndarray | None], ir.Model] | None" = None
    engine_tolerance: Tolerance | None = None
    tokens_tolerance: Tolerance | None = None
    dtype: str | None = None
    onnx_type: int | None = None
    operators: frozenset[str] = frozenset()
    largest: float | None = None
    wider: str | None = None
    calibration_images: int = 0
    emulated: bool = False
    runs_on_cpu: bool = True
    builder_flags: tuple[str, ...] | None = ()
    trtexec_flags: tuple[str, ...] = ()
    constrained: bool = False

    @property
    def converts(self) -> bool:
        """Tells whether the float32 graph is changed for this precision."""
        return self.cast is not None

    def apply(self, model: "ir.Model", images: "np.ndarray | None" = None) -> "ir.Model":
        """Gives a float32 graph the types of this precision, and says so in its metadata.

        Args:
            model: from `to_onnx.to_model`; it may be changed in place.
            images: `calibration_images` or more, as the model takes them.

        Raises:
            UserError: the model has a weight, or lacks a layer, such that it cannot be done.
        """
        if self.cast is not None:
            model = self.cast(model, images)
        model.metadata_props["precision"] = self.name
        return model

    def limits(self, of: str = "") -> str:
        """The name of its tolerance among `thresholds`, of an "engine" or of "tokens"."""
        return f"{self.name} {of}" if of in self._others() else self.name

    def tolerances(self) -> dict[str, Tolerance]:
        """Its tolerances by their names among `thresholds`."""
        others = {self.limits(of): tolerance for of, tolerance in self._others().items()}
        return {self.name: self.tolerance} | others

    def _others(self) -> dict[str, Tolerance]:
        others = {"engine": self.engine_tolerance, "tokens": self.tokens_tolerance}
        return {of: tolerance for of, tolerance in others.items() if tolerance}


_LARGEST_FP16 = 65504


def _to_fp16(model: "ir.Model", _images: Any) -> "ir.Model":
    from vit_jax.export import casts

    overflow = f"above {_LARGEST_FP16}, the largest number of fp16: use --precision bf16"
    return casts.to_half(model, onnx_type=10, overflow=overflow)


def _to_bf16(model: "ir.Model", _images: Any) -> "ir.Model":
    from vit_jax.export import casts

    return casts.to_half(model, onnx_type=16)


def _to_int8(model: "ir.Model", images: "np.ndarray | None") -> "ir.Model":
    from vit_jax.export import casts

    if images is None:
        raise ValueError("int8 takes its scales from images: pass some")
    return casts.to_int8(model, images)


_ROWS = (
    Precision(
        "fp32",
        tolerance=Tolerance(relative_difference=1e-5, cosine=0.99999, top1_agreement=0.999),
        engine_tolerance=Tolerance(relative_difference=1e-4, cosine=0.9999, top1_agreement=0.999),
        tokens_tolerance=Tolerance(relative_difference=1e-4, cosine=0.9999, top1_agreement=0.999),
        dtype="float32",
        onnx_type=1,
    ),
    Precision(
        "fp16",
        cast=_to_fp16,
        tolerance=Tolerance(relative_difference=1e-2, cosine=0.999, top1_agreement=0.995),
        dtype="float16",
        onnx_type=10,
        largest=_LARGEST_FP16,
        wider="bf16",
        emulated=True,
        # The second is for what is constrained.
        builder_flags=("FP16", "OBEY_PRECISION_CONSTRAINTS"),
        trtexec_flags=("--fp16",),
        constrained=True,
    ),
    Precision(
        "bf16",
        cast=_to_bf16,
        tolerance=Tolerance(relative_difference=1e-1, cosine=0.99, top1_agreement=0.97),
        dtype="bfloat16",
        onnx_type=16,
        emulated=True,
        runs_on_cpu=False,
        builder_flags=None,
    ),
    Precision(
        "int8",
        cast=_to_int8,
        tolerance=Tolerance(relative_difference=1.0, cosine=0.9, top1_agreement=0.8),
        operators=frozenset({"QuantizeLinear", "DequantizeLinear"}),
        calibration_images=64,
        builder_flags=("INT8",),
        trtexec_flags=("--int8",),
        # Not constrained: between QuantizeLinear and DequantizeLinear float32 only stands for what
        # is fused to int8.
    ),
)
PRECISIONS: dict[str, Precision] = {row.name: row for row in _ROWS}


def thresholds() -> dict[str, dict[str, float]]:
    """The tolerances by the name that `Precision.limits` gives, as parity.json tells them."""
    return {
        name: dataclasses.asdict(tolerance)
        for row in PRECISIONS.values()
        for name, tolerance in row.tolerances().items()
    }


def detect(stated: str | None, weights: Mapping[str, int], operators: Iterable[str]) -> str:
    """The name of the precision of a file: what its operators tell, or else its weights.

    What the metadata states decides only between precisions with the same operators, and for one
    that neither operators nor weights tell: a file may have been quantized after its export.

    Args:
        stated: the `precision` in the metadata, if there is one.
        weights: the number of elements of its floating-point weights, by the name of the row.
        operators: the names of its operators.
    """
    present = set(operators)
    told = [row.name for row in PRECISIONS.values() if row.operators & present]
    if told:
        return stated if stated in told else told[0]
    row = PRECISIONS.get(stated or "")
    if row and not row.operators and row.onnx_type is None:
        return row.name
    return max(weights, key=weights.__getitem__, default="fp32")
