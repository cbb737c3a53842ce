"""ONNX to a TensorRT engine, with TensorRT 8.6, 10 or 11.

    python -m vit_jax.export.to_tensorrt model.onnx --output DIR --batch 1:8:64

Needs the ONNX file, the `tensorrt` package and a GPU, and nothing else: no JAX, no TensorFlow, no
`onnx`. It runs on Python 3.10 too, the last that TensorRT 8.6 knows. What it writes:

    DIR/model.engine   the engine
    DIR/engine.json    what it was built from, by what, for what; `vit_jax.export.engine` reads it
    DIR/layers.json    the engine inspector's account of its layers
    DIR/timing.cache   measured kernel times, which make the next build shorter
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vit_jax import command
from vit_jax.errors import UserError
from vit_jax.export.engine import DESCRIPTION, ENGINE, HARDWARE_COMPATIBILITY, deserialize
from vit_jax.export.engine_report import inspect, report, summary, tensors
from vit_jax.export.nvidia import create, find_device, import_tensorrt, make_logger
from vit_jax.export.onnx_file import OnnxFile, read_onnx
from vit_jax.export.precisions import PRECISIONS
from vit_jax.export.profiles import Profile, parse_batch
from vit_jax.files import atomic_files
from vit_jax.printable import printable

LAYERS, TIMING_CACHE = "layers.json", "timing.cache"


def build(
    onnx_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    batch: str = "1:8:64",
    workspace_mib: int | None = None,
    optimization_level: int = 3,
    version_compatible: bool = False,
    hardware_compatibility: str = "none",
    tf32: bool = False,
    tactic_sources: str | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Builds an engine for the GPU of this machine and writes it to a directory.

    The precision is what the ONNX file says. Nothing is written before the engine is there.

    Args:
        onnx_path: the ONNX file; it is not changed.
        output: the directory, see above for what it gets.
        batch: the optimization profiles, see `parse_batch`. Narrow ones give faster engines.
        workspace_mib: upper limit of the scratch memory of a layer, in MiB; None: the GPU's memory.
        optimization_level: 0 to 5; higher builds take longer and may give faster engines.
        version_compatible: the engine also runs with later versions of TensorRT.
        hardware_compatibility: "ampere_plus" for any GPU from Ampere on,
            "same_compute_capability" (from TensorRT 10.9 on), or "none": this GPU's kind only.
        tf32: let float32 products run with 10 bits of mantissa; errors grow to about 1e-3.
        tactic_sources: names of `tensorrt.TacticSource` separated by commas; None: the default.
        verbose: print everything that TensorRT says.

    Returns:
        The contents of engine.json.

    Raises:
        UserError: no TensorRT, no GPU, a value is out of range, or TensorRT cannot read the file or
            build the engine.
    """
    profiles = parse_batch(batch)
    if not 0 <= optimization_level <= 5:
        raise UserError(f"optimization_level {optimization_level} is not from 0 to 5")
    if workspace_mib is not None and workspace_mib < 1:
        raise UserError(f"workspace_mib {workspace_mib} is not positive: give it in MiB")
    onnx = read_onnx(onnx_path)
    check_prepared(onnx)
    trt = import_tensorrt()
    device = find_device()
    output = Path(output)
    options = {
        "version_compatible": version_compatible,
        "hardware_compatibility": hardware_compatibility,
        "tf32": tf32,
        "optimization_level": optimization_level,
        "workspace_mib": workspace_mib,
        "tactic_sources": tactic_sources,
    }
    logger = make_logger(trt, verbose)
    built = _build(trt, logger, onnx, profiles, batch, options, output / TIMING_CACHE)
    _runtime, engine = deserialize(trt, built.plan, logger, version_compatible)
    layers = inspect(trt, engine)
    description = {
        "tensorrt": trt.__version__,
        "device": device,
        "precision": onnx.precision,
        "strongly_typed": strongly_typed(trt),
        **options,
        "profiles": [dataclasses.asdict(profile) for profile in profiles],
        "onnx": {"file": onnx.path.name, "sha256": onnx.sha256},
        "engine": {"file": ENGINE, "bytes": built.plan.nbytes},
        **report(layers, tensors(trt, engine), onnx.softmaxes, onnx.metadata),
        "build_seconds": round(built.seconds, 1),
        "metadata": onnx.metadata,
    }
    with atomic_files(output) as temporary:
        (temporary / ENGINE).write_bytes(built.plan)
        (temporary / DESCRIPTION).write_bytes(_json(description))
        (temporary / LAYERS).write_bytes(_json(layers))
        (temporary / TIMING_CACHE).write_bytes(built.timing_cache)
    return description


def check_prepared(onnx: OnnxFile) -> None:
    """Checks that a file is one of prepared images.

    Raises:
        UserError: its preprocessing is in the graph.
    """
    if onnx.is_raw:
        raise UserError(
            f"{onnx.path} prepares images of any size itself, for which TensorRT has neither an "
            "antialiased Resize nor 64-bit floats: export without --preprocessing in_graph, and "
            "have Triton's ensemble in deploy/ prepare them"
        )


class _Built(NamedTuple):
    plan: memoryview
    timing_cache: memoryview
    seconds: float


def _build(
    trt: Any,
    logger: Any,
    onnx: OnnxFile,
    profiles: tuple[Profile, ...],
    batch: str,
    options: dict[str, Any],
    timing_cache_path: Path,
) -> _Built:
    trt.init_libnvinfer_plugins(logger, "")
    builder = create(trt.Builder, logger)
    config = builder.create_builder_config()
    network = _create_network(trt, builder, config, onnx)
    # The network refers to memory of the parser, as the configuration does to the timing cache.
    parser = trt.OnnxParser(network, logger)
    _parse(trt, parser, network, onnx)
    _add_profiles(builder, config, network, profiles, batch)
    _configure(trt, config, **options)
    timing_cache = _load_timing_cache(config, timing_cache_path)
    progress = _watch(trt, config)
    start = time.monotonic()
    plan = builder.build_serialized_network(network, config)
    if progress is not None and progress.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise UserError(f"TensorRT {trt.__version__} built no engine: {logger.last_error()}")
    seconds = time.monotonic() - start
    return _Built(memoryview(plan), memoryview(timing_cache.serialize()), seconds)


def strongly_typed(trt: Any) -> bool:
    """Tells whether this version of TensorRT takes the types of a network from the ONNX file."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def _create_network(trt: Any, builder: Any, config: Any, onnx: OnnxFile) -> Any:
    """An empty network, and the flags that make the engine compute in the ONNX file's types.

    All that differs between the versions is here, in `_constrain` and in `_watch`.
    """
    if strongly_typed(trt):
        # In 11 this is the only kind of network. EXPLICIT_BATCH is implied from 10 on.
        return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    for precision in onnx.precisions:
        if precision.builder_flags is None:
            raise UserError(
                f"{onnx.path} has {precision.dtype or precision.name} weights, which TensorRT "
                f"{trt.__version__} does not know: use --precision fp16, or TensorRT 10 or later"
            )
        for flag in precision.builder_flags:
            config.set_flag(getattr(trt.BuilderFlag, flag))
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))


def _constrain(trt: Any, network: Any) -> None:
    """Keeps what the ONNX file computes in float32 in float32, where the typing is weak (8.6).

    With the FP16 flag TensorRT would be free to run, say, a residual sum in float16.
    """
    shapes = {trt.LayerType.CONSTANT, trt.LayerType.SHAPE, trt.LayerType.CAST}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        types = {layer.get_output(i).dtype for i in range(layer.num_outputs)}
        if layer.type not in shapes and types == {trt.DataType.FLOAT}:
            layer.precision = trt.DataType.FLOAT
            for i in range(layer.num_outputs):
                layer.set_output_type(i, trt.DataType.FLOAT)


def _watch(trt: Any, config: Any) -> Any:
    """Shows the build's progress on a terminal, and lets Ctrl-C end it; from TensorRT 10 on."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Progress(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self.phases = {}

        def phase_start(self, phase_name, _parent_phase, num_steps):
            self.phases[phase_name] = num_steps
            self._show(phase_name, 0)

        def step_complete(self, phase_name, step):
            self._show(phase_name, step + 1)
            return not self.interrupted

        def phase_finish(self, phase_name):
            steps = self.phases.pop(phase_name, 0)
            self._show(phase_name if self.phases else "", steps)

        def _show(self, phase_name, step):
            # An exception must not travel through TensorRT.
            try:
                if sys.stderr.isatty():
                    line = f"{phase_name}: {step}/{self.phases.get(phase_name, step)}"
                    line = line[:78] if phase_name else ""
                    print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
            except KeyboardInterrupt:
                self.interrupted = True

    progress = Progress()
    config.progress_monitor = progress
    return progress


def _parse(trt: Any, parser: Any, network: Any, onnx: OnnxFile) -> None:
    if not parser.parse_from_file(str(onnx.path)):
        for index in range(parser.num_errors):
            print(printable(f"parser: {parser.get_error(index)}"), file=sys.stderr)
        raise UserError(
            f"TensorRT {trt.__version__} cannot read {onnx.path}: its parser's "
            f"{parser.num_errors} errors stand above"
        )
    if not strongly_typed(trt) and PRECISIONS[onnx.precision].constrained:
        _constrain(trt, network)


def _configure(
    trt: Any,
    config: Any,
    *,
    version_compatible: bool,
    hardware_compatibility: str,
    tf32: bool,
    optimization_level: int,
    workspace_mib: int | None,
    tactic_sources: str | None,
) -> None:
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = optimization_level
    if workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    if not tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    config.hardware_compatibility_level = _member(
        trt.HardwareCompatibilityLevel, hardware_compatibility, "hardware_compatibility", trt
    )
    if tactic_sources is not None:
        sources = [
            _member(trt.TacticSource, name.strip(), "tactic_sources", trt)
            for name in tactic_sources.split(",")
        ]
        config.set_tactic_sources(sum(1 << int(source) for source in set(sources)))


def _add_profiles(
    builder: Any, config: Any, network: Any, profiles: tuple[Profile, ...], batch: str
) -> None:
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            size, *rest = tuple(tensor.shape)
            if -1 in rest:
                raise UserError(
                    f"input {tensor.name!r} of shape {(size, *rest)} is free in more than the "
                    "batch: export the model at one image size, without --free_size"
                )
            if size != -1 and (size, size, size) != dataclasses.astuple(profile):
                raise UserError(
                    f"batch {batch!r} does not fit the ONNX file, whose batch is fixed at {size}: "
                    f"use --batch {size}"
                )
            shapes.set_shape(
                tensor.name,
                (profile.min, *rest),
                (profile.opt, *rest),
                (profile.max, *rest),
            )
        if config.add_optimization_profile(shapes) < 0:
            raise UserError(f"TensorRT does not accept the profile {profile}: change --batch")


def _member(enum: Any, name: str, option: str, trt: Any) -> Any:
    """The member of a TensorRT enumeration, whose members depend on the version."""
    try:
        return enum.__members__[name.upper()]
    except KeyError:
        known = ", ".join(member.lower() for member in enum.__members__)
        raise UserError(
            f"{option} {name!r} is unknown to TensorRT {trt.__version__}: use {known}"
        ) from None


def _load_timing_cache(config: Any, path: Path) -> Any:
    """Attaches the cache of earlier builds, or a new one where there is none that fits."""
    if path.is_file():
        cache = config.create_timing_cache(path.read_bytes())
        # False: a cache of another GPU or version must not be used.
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
        print(printable(f"{path} is of another GPU or TensorRT and starts anew"), file=sys.stderr)
    cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, False)
    return cache


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def build_parser(prog: str = "python -m vit_jax.export.to_tensorrt") -> command.Parser:
    """The flags of the command; `prog` is what its help calls it."""
    parser = command.Parser(
        prog=prog,
        description="Builds a TensorRT engine for this machine's GPU from an ONNX file.",
    )
    parser.add_argument("onnx_path", metavar="model.onnx")
    parser.add_argument("--output", required=True, help="directory of the engine")
    parser.add_argument(
        "--batch", default="1:8:64", help="profiles: MIN:OPT:MAX or SIZE, several with commas"
    )
    parser.add_argument(
        "--workspace_mib", type=command.positive, help="limit of scratch memory, in MiB"
    )
    parser.add_argument("--optimization_level", type=int, default=3, help="0 to 5 (3)")
    parser.add_argument(
        "--version_compatible", action="store_true", help="also for later versions of TensorRT"
    )
    parser.add_argument("--hardware_compatibility", choices=HARDWARE_COMPATIBILITY, default="none")
    parser.add_argument("--tf32", action="store_true", help="faster, coarser float32 products")
    parser.add_argument("--tactic_sources", help="names of tensorrt.TacticSource, with commas")
    parser.add_argument("--verbose", action="store_true", help="print all that TensorRT says")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    print(summary(build(**vars(build_parser().parse_args(argv)))))
    return 0


if __name__ == "__main__":
    command.run(main)
