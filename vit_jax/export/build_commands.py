"""The commands that build an engine elsewhere: this project's own, trtexec and polygraphy."""

from typing import Any

from vit_jax.export.engine import ENGINE
from vit_jax.export.nvidia import numbers
from vit_jax.export.onnx_file import OnnxFile, Tensor
from vit_jax.export.profiles import Profile
from vit_jax.export.to_tensorrt import TIMING_CACHE

_HARDWARE = {"ampere_plus": "ampere+", "same_compute_capability": "sameComputeCapability"}
# What trtexec can switch on and off; cuBLAS and cuDNN are no longer asked from TensorRT 11 on.
_TACTIC_SOURCES = {
    True: ("CUBLAS", "CUBLAS_LT", "CUDNN", "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"),
    False: ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"),
}


def own_command(
    onnx: OnnxFile, description: dict[str, Any], profiles: tuple[Profile, ...]
) -> list[str]:
    """The command of `to_tensorrt` that builds an engine with these profiles.

    Args:
        onnx: the ONNX file.
        description: the engine.json of an engine to build again, or nothing for the defaults.
        profiles: the batch sizes.
    """
    batch = ",".join(f"{profile.min}:{profile.opt}:{profile.max}" for profile in profiles)
    words = ["python", "-m", "vit_jax.export.to_tensorrt", onnx.path.name, "--output", "."]
    words += ["--batch", batch]
    for option in ("version_compatible", "tf32"):
        words += [f"--{option}"] * bool(description.get(option))
    defaults = {"optimization_level": 3, "hardware_compatibility": "none"}
    for option in ("workspace_mib", "optimization_level", "hardware_compatibility"):
        value = description.get(option)
        if value not in (None, defaults.get(option)):
            words += [f"--{option}", str(value)]
    if description.get("tactic_sources"):
        words += ["--tactic_sources", description["tactic_sources"]]
    return words


def trtexec_command(
    version: str, onnx: OnnxFile, profiles: tuple[Profile, ...], options: dict[str, Any]
) -> list[str]:
    """The trtexec command that builds the engine that `to_tensorrt.build` builds.

    Args:
        version: of TensorRT: "8.6", "10.x", "11.4.0.106".
        onnx: the ONNX file.
        profiles: the batch sizes. trtexec of 8.6 knows one profile: it gets the first.
        options: entries of engine.json: workspace_mib, optimization_level, version_compatible,
            hardware_compatibility, tf32, tactic_sources.
    """
    major = numbers(version)[0]
    words = ["trtexec", f"--onnx={onnx.path.name}", f"--saveEngine={ENGINE}"]
    for index, profile in enumerate(profiles if major >= 10 else profiles[:1]):
        if len(profiles) > 1 and major >= 10:
            words.append(f"--profile={index}")
        for bound in ("min", "opt", "max"):
            shape = "x".join(map(str, input_shape(onnx.inputs[0], getattr(profile, bound))))
            words.append(f"--{bound}Shapes={onnx.inputs[0].name}:{shape}")
    words += {8: _weak_flags(onnx), 10: ["--stronglyTyped"]}.get(major, [])
    if not options.get("tf32"):
        words.append("--noTF32")
    if options.get("workspace_mib"):
        words.append(f"--memPoolSize=workspace:{options['workspace_mib']}")
    words.append(f"--builderOptimizationLevel={options.get('optimization_level', 3)}")
    if options.get("version_compatible"):
        words.append("--versionCompatible")
    level = options.get("hardware_compatibility", "none")
    if level != "none":
        words.append(f"--hardwareCompatibilityLevel={_HARDWARE[level]}")
    if options.get("tactic_sources"):
        chosen = _names(options["tactic_sources"])
        signs = [("+" if s in chosen else "-") + s for s in _TACTIC_SOURCES[major < 11]]
        words.append(f"--tacticSources={','.join(signs)}")
    return [
        *words,
        f"--timingCacheFile={TIMING_CACHE}",
        "--profilingVerbosity=detailed",
        "--skipInference",
    ]


def polygraphy_command(
    version: str, onnx: OnnxFile, profiles: tuple[Profile, ...], options: dict[str, Any]
) -> list[str]:
    """The polygraphy command that builds the same engine; arguments as of `trtexec_command`."""
    major = numbers(version)[0]
    words = ["polygraphy", "convert", onnx.path.name, "--convert-to", "trt", "--output", ENGINE]
    for profile in profiles:
        for bound in ("min", "opt", "max"):
            shape = ",".join(map(str, input_shape(onnx.inputs[0], getattr(profile, bound))))
            words += [f"--trt-{bound}-shapes", f"{onnx.inputs[0].name}:[{shape}]"]
    words += {8: _weak_flags(onnx), 10: ["--strongly-typed"]}.get(major, [])
    if options.get("tf32"):
        words.append("--tf32")
    if options.get("workspace_mib"):
        words += ["--pool-limit", f"workspace:{options['workspace_mib']}M"]
    words += ["--builder-optimization-level", str(options.get("optimization_level", 3))]
    if options.get("version_compatible"):
        words.append("--version-compatible")
    level = options.get("hardware_compatibility", "none")
    if level != "none":
        words += ["--hardware-compatibility-level", level.upper()]
    if options.get("tactic_sources"):
        words += ["--tactic-sources", *_names(options["tactic_sources"])]
    words += ["--load-timing-cache", TIMING_CACHE, "--save-timing-cache", TIMING_CACHE]
    return [*words, "--profiling-verbosity", "detailed"]


def input_shape(tensor: Tensor, batch: int) -> tuple[int, ...]:
    """The shape of an input with so many images."""
    return (batch, *tensor.shape[1:])


def _weak_flags(onnx: OnnxFile) -> list[str]:
    return [flag for precision in onnx.precisions for flag in precision.trtexec_flags]


def _names(sources: str) -> list[str]:
    return [source.strip().upper() for source in sources.split(",")]
