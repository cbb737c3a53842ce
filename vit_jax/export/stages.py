"""The stages that an export runs here, and its converter to ONNX. Imports nothing heavy."""

import importlib.util
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

from vit_jax.errors import UserError

STAGES = ("tf", "onnx", "tensorrt")
CONVERTERS = ("jax2tf", "jax2onnx")
# Of every token, with a class token or registers first; or of the patches, in rows and columns.
DENSE = ("tokens", "grid")
# The logits of every pixel, of a run of segmentation.
PIXELS = "pixels"
# The score of every class and the box of every cell, of a run of detection.
BOXES = "boxes"
OUTPUTS = ("logits", "probabilities", "features", *DENSE, PIXELS, BOXES)
_MAKES = {"tf": "SavedModel", "onnx": "ONNX file"}
_ONNX_PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")
# What installs the export's packages: with JAX 0.7.1, or for the newest JAX.
INSTALL_PINNED = "pip install -e '.[export]'"
INSTALL_NEWEST = "pip install -e '.[export-newest]' && pip install --no-deps jax2onnx"
PACKAGES = ("tensorflow", "tf2onnx", "jax2onnx", *_ONNX_PACKAGES)


class Obstacle(NamedTuple):
    """The reason that a stage or a converter is unavailable here, and the way out."""

    problem: str
    way_out: str


class Resolution(NamedTuple):
    """The plan: the stages before TensorRT, the converter of stage onnx, and what is left out.

    `left_out` is a line for each stage that would belong to the default and cannot be had here.
    """

    stages: tuple[str, ...]
    converter: str
    left_out: tuple[str, ...]


def missing_packages() -> set[str]:
    """Returns those of `PACKAGES` that are not installed."""
    return {name for name in PACKAGES if importlib.util.find_spec(name) is None}


def obstacles(
    jax_version: str, can_serialize_graphs: bool, missing: Container[str]
) -> dict[str, Obstacle]:
    """Returns the obstacles to stages and converters; one that is available is absent.

    Args:
        jax_version: of the JAX that is installed.
        can_serialize_graphs: whether it emits TensorFlow graphs, as JAX 0.7.1 does.
        missing: the names of packages that are not installed.

    Returns:
        Obstacles by "tf", "onnx" (whatever the converter), "jax2tf" and "jax2onnx".
    """
    install = INSTALL_PINNED if can_serialize_graphs else INSTALL_NEWEST

    def first_missing(packages: Sequence[str], way_out: str) -> Obstacle | None:
        names = (name for name in packages if name in missing)
        return next((Obstacle(f"{name} is not installed", way_out) for name in names), None)

    graphs = None
    if not can_serialize_graphs:
        graphs = Obstacle(
            f"JAX {jax_version} emits no TensorFlow graph",
            f"{INSTALL_PINNED} (jax==0.7.1)",
        )
    tf = graphs or first_missing(["tensorflow"], install)
    found = {
        "tf": tf,
        "onnx": first_missing(_ONNX_PACKAGES, install),
        "jax2tf": tf or first_missing(["tf2onnx"], install),
        "jax2onnx": first_missing(["jax2onnx"], INSTALL_NEWEST),
    }
    return {name: obstacle for name, obstacle in found.items() if obstacle}


def resolve(
    stages: Sequence[str] | None,
    converter: str | None,
    obstacles: Mapping[str, Obstacle],
    *,
    needs_onnx: bool = False,
) -> Resolution:
    """Chooses the stages and the converter: what was asked for, or else all that can be had.

    Args:
        stages: those that were asked for, or None: tf and onnx, with converter "jax2onnx" onnx.
        converter: the one that was asked for, or None: jax2tf if it can be had, else jax2onnx.
        obstacles: from the function of this name.
        needs_onnx: whether another flag asks for the ONNX file, such as a precision.

    Raises:
        UserError: what was asked for cannot be had here, or nothing can.
    """
    usable = [name for name in CONVERTERS if name not in obstacles]
    # Without either, the one that is nearer: jax2tf where JAX emits graphs.
    nearest = usable or ["jax2onnx" if "tf" in obstacles else "jax2tf"]
    chosen = converter or nearest[0]
    problems = {stage: obstacles[stage] for stage in ("tf", "onnx") if stage in obstacles}
    if chosen in obstacles:
        problems.setdefault("onnx", obstacles[chosen])
    default = ("onnx",) if converter == "jax2onnx" else ("tf", "onnx")
    wanted = default if stages is None else tuple(s for s in stages if s != "tensorrt")
    possible = tuple(stage for stage in wanted if stage not in problems)
    refused = wanted if stages else ("onnx",) if converter or needs_onnx or not possible else ()
    for stage in refused:
        if stage in problems:
            problem, way_out = problems[stage]
            another = _another(stage, converter, usable, problems)
            raise UserError(f"stage {stage}: {problem}: {way_out}{another}")
    left_out = (
        f"left out: the {_MAKES[stage]}, since {problems[stage].problem}; to have it "
        f"{problems[stage].way_out}"
        for stage in wanted
        if stage in problems
    )
    return Resolution(possible, chosen, tuple(left_out))


def _another(
    stage: str, converter: str | None, usable: Sequence[str], problems: Container[str]
) -> str:
    """The flag with which as much as can be had here is made."""
    if stage == "onnx" and converter and usable:
        return f", or use --converter {usable[0]}"
    if stage == "tf" and "onnx" not in problems:
        return ", or use --stages onnx"
    return ""
