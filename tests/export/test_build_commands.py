import pathlib
import re

import pytest

from vit_jax.export.build_commands import polygraphy_command, trtexec_command
from vit_jax.export.onnx_file import OnnxFile, Tensor
from vit_jax.export.profiles import parse_batch

from . import fake_tensorrt

FP16 = OnnxFile(
    path=pathlib.Path("model.onnx"),
    sha256={},
    precision="fp16",
    weight_types=frozenset({"fp16"}),
    softmaxes=1,
    inputs=(Tensor("images", "FLOAT", (-1, 4, 4, 3)),),
    outputs=(Tensor("logits", "FLOAT", (-1, 3)),),
    metadata={},
)
OPTIONS = {
    "workspace_mib": 2048,
    "optimization_level": 5,
    "version_compatible": True,
    "hardware_compatibility": "ampere_plus",
    "tactic_sources": "jit_convolutions",
}


def test_trtexec_of_each_version():
    model = FP16
    profiles = parse_batch("1,2:4:8")
    common = [
        "trtexec",
        "--onnx=model.onnx",
        "--saveEngine=model.engine",
        "--noTF32",
        "--memPoolSize=workspace:2048",
        "--builderOptimizationLevel=5",
        "--versionCompatible",
        "--hardwareCompatibilityLevel=ampere+",
        "--timingCacheFile=timing.cache",
        "--profilingVerbosity=detailed",
        "--skipInference",
    ]
    first = [f"--{bound}Shapes=images:1x4x4x3" for bound in ("min", "opt", "max")]
    second = [
        f"--{bound}Shapes=images:{n}x4x4x3" for bound, n in [("min", 2), ("opt", 4), ("max", 8)]
    ]
    both = ["--profile=0", *first, "--profile=1", *second]
    old_sources = "-CUBLAS,-CUBLAS_LT,-CUDNN,-EDGE_MASK_CONVOLUTIONS,+JIT_CONVOLUTIONS"
    wanted = {
        "8.6.0": [*first, "--fp16", f"--tacticSources={old_sources}"],
        "10.16.1.11": [*both, "--stronglyTyped", f"--tacticSources={old_sources}"],
        # 11 has neither precision flags nor another typing.
        "11.4.0.106": [*both, "--tacticSources=-EDGE_MASK_CONVOLUTIONS,+JIT_CONVOLUTIONS"],
    }
    for version, flags in wanted.items():
        words = trtexec_command(version, model, profiles, OPTIONS)
        assert sorted(words) == sorted(common + flags)
        shapes = [word for word in words if "rofile=" in word or "Shapes" in word]
        assert shapes == flags[: len(shapes)]


@pytest.mark.parametrize("version", ["8.6.0", "10.16.1.11", "11.4.0.106"])
def test_the_commands_name_only_what_the_bindings_of_their_version_have(version):
    model = FP16
    names = fake_tensorrt.NAMES[version]
    flags = {word.partition("=")[0] for word in names["BuilderFlag"].split()}
    words = polygraphy_command(version, model, parse_batch("1:2:8"), OPTIONS)
    assert ("--fp16" in words) == (version == "8.6.0")
    assert ("--fp16" in words) <= ("FP16" in flags)
    typed = "STRONGLY_TYPED" in names["NetworkDefinitionCreationFlag"]
    # 11 accepts the flag, and needs it no more than it needs --stronglyTyped.
    assert ("--strongly-typed" in words) == (typed and version.startswith("10"))
    sources = {word.partition("=")[0] for word in names["TacticSource"].split()}
    words = trtexec_command(version, model, parse_batch("1:2:8"), OPTIONS)
    (given,) = [word for word in words if word.startswith("--tacticSources=")]
    assert set(re.findall(r"[+-]([A-Z_]+)", given)) == sources
