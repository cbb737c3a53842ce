import ast
import ctypes
import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from vit_jax import command
from vit_jax.errors import UserError
from vit_jax.export import nvidia, runtime
from vit_jax.export.precisions import PRECISIONS
from vit_jax.export.to_tensorrt import build, main

from . import fake_tensorrt, tensorrt_names

ROOT = pathlib.Path(__file__).parents[2]
STRONG = [version for version in fake_tensorrt.VERSIONS if not version.startswith("8")]


def run(path, output):
    """The command's exit code."""
    with pytest.raises(SystemExit) as caught:
        command.run(lambda: main([str(path), "--output", str(output)]))
    return caught.value.code


def called(trt, name):
    return [call[1:] for call in trt.calls if call[0] == name]


@pytest.mark.parametrize("version", STRONG)
def test_from_10_on_the_network_is_strongly_typed(fake, onnx_file, tmp_path, version):
    trt = fake(version)
    assert build(onnx_file("float16"), tmp_path / "out")["strongly_typed"]
    # The value of the flag is not the same in 10 and 11.
    assert called(trt, "Builder.create_network") == [(2 if version.startswith("10") else 1,)]
    assert called(trt, "Builder.flags") == [(set(),)]


@pytest.mark.parametrize(
    "dtype, quantized, flags",
    [
        ("float32", False, set()),
        ("float16", False, {"FP16", "OBEY_PRECISION_CONSTRAINTS"}),
        ("float32", True, {"INT8"}),
        ("float16", True, {"FP16", "OBEY_PRECISION_CONSTRAINTS", "INT8"}),
    ],
)
def test_8_6_gets_the_precision_by_flags(fake, onnx_file, tmp_path, dtype, quantized, flags):
    trt = fake("8.6.0")
    assert not build(onnx_file(dtype, quantized), tmp_path / "out")["strongly_typed"]
    assert called(trt, "Builder.create_network") == [(1,)]  # EXPLICIT_BATCH
    assert called(trt, "Builder.flags") == [(flags,)]


def test_8_6_keeps_float32_what_the_file_keeps_float32(fake, onnx_file, tmp_path):
    layers = [("FLOAT", "ELEMENTWISE"), ("HALF", "SOFTMAX"), ("FLOAT", "CONSTANT")]
    trt = fake("8.6.0", layers=layers)
    build(onnx_file("float16"), tmp_path / "out")
    assert called(trt, "ILayer.precision") == [(trt.DataType.FLOAT,)]
    (call,) = called(trt, "ILayer.set_output_type")
    assert call == (trt.LayerType.ELEMENTWISE, 0, trt.DataType.FLOAT)


def test_8_6_says_that_it_does_not_know_bfloat16(fake, onnx_file, tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    path = onnx_file(ml_dtypes.bfloat16)
    fake("8.6.0")
    with pytest.raises(UserError, match=r"bfloat16.*8\.6\.0.*fp16"):
        build(path, tmp_path / "out")
    fake("10.0.1")
    assert build(path, tmp_path / "out")["precision"] == "bf16"


@pytest.mark.parametrize("version", fake_tensorrt.VERSIONS)
def test_every_option_reaches_the_builder(fake, onnx_file, tmp_path, version):
    trt = fake(version)
    description = build(
        onnx_file(),
        tmp_path / "out",
        batch="1,2:4:8",
        workspace_mib=512,
        optimization_level=5,
        version_compatible=True,
        hardware_compatibility="ampere_plus",
        tf32=True,
        tactic_sources="jit_convolutions, edge_mask_convolutions",
    )
    assert called(trt, "Builder.flags") == [({"TF32", "VERSION_COMPATIBLE"},)]
    limit = (trt.MemoryPoolType.WORKSPACE, 512 * 1024 * 1024)
    assert called(trt, "IBuilderConfig.set_memory_pool_limit") == [limit]
    assert called(trt, "IBuilderConfig.builder_optimization_level") == [(5,)]
    level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert called(trt, "IBuilderConfig.hardware_compatibility_level") == [(level,)]
    verbosity = (trt.ProfilingVerbosity.DETAILED,)
    assert called(trt, "IBuilderConfig.profiling_verbosity") == [verbosity]
    sources = [trt.TacticSource.JIT_CONVOLUTIONS, trt.TacticSource.EDGE_MASK_CONVOLUTIONS]
    bits = sum(1 << int(source) for source in sources)
    assert called(trt, "IBuilderConfig.set_tactic_sources") == [(bits,)]
    assert called(trt, "Runtime.engine_host_code_allowed") == [(True,)]
    plan = json.loads((tmp_path / "out/model.engine").read_text())
    assert plan["profiles"] == [[[n, 4, 4, 3] for n in sizes] for sizes in [(1, 1, 1), (2, 4, 8)]]
    assert description["profiles"] == [
        {"min": 1, "opt": 1, "max": 1},
        {"min": 2, "opt": 4, "max": 8},
    ]


def test_the_description_says_what_was_built_from_what(fake, onnx_file, tmp_path):
    layers = [{"Name": f"_gemm_mha_v2_myl0_{i}", "LayerType": "kgen"} for i in range(1)]
    fake("11.4.0.106", inspected=layers)
    path = onnx_file("float16")
    before = path.read_bytes()
    description = build(path, tmp_path / "out")
    assert json.loads((tmp_path / "out/engine.json").read_text()) == description
    assert json.loads((tmp_path / "out/layers.json").read_text()) == layers
    assert description["tensorrt"] == "11.4.0.106"
    assert description["device"] == fake_tensorrt.DEVICE
    assert description["precision"] == "fp16"
    assert description["metadata"] == {"class_names": '["a", "b"]'}
    assert description["tensors"] == [
        {"name": "images", "mode": "input", "type": "FLOAT", "shape": [-1, 4, 4, 3]},
        {"name": "logits", "mode": "output", "type": "FLOAT", "shape": [-1, 5]},
    ]
    assert description["attention"]["fused"] is True
    assert description["engine"]["bytes"] == (tmp_path / "out/model.engine").stat().st_size
    assert path.read_bytes() == before


def test_a_level_that_the_version_lacks_is_told_with_those_it_has(fake, onnx_file, tmp_path):
    fake("8.6.0")
    with pytest.raises(UserError, match=r"same_compute_capability.*8\.6\.0: use ampere_plus, none"):
        build(onnx_file(), tmp_path / "out", hardware_compatibility="same_compute_capability")
    fake("11.4.0.106")
    with pytest.raises(UserError, match=r"tactic_sources 'cublas' is unknown to TensorRT 11"):
        build(onnx_file(), tmp_path / "out", tactic_sources="cublas")


def test_the_timing_cache_of_the_last_build_is_used(fake, onnx_file, tmp_path):
    for _ in range(2):
        trt = fake("10.0.1")
        build(onnx_file(), tmp_path / "out")
    assert called(trt, "IBuilderConfig.set_timing_cache") == [(b"timed+",)]
    assert (tmp_path / "out/timing.cache").read_bytes() == b"timed++"


def test_a_timing_cache_of_another_gpu_starts_anew(fake, onnx_file, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/timing.cache").write_bytes(b"foreign")
    trt = fake("10.0.1", cache_fits=False)
    build(onnx_file(), tmp_path / "out")
    assert called(trt, "IBuilderConfig.set_timing_cache") == [(b"",)]
    assert (tmp_path / "out/timing.cache").read_bytes() == b"timed+"
    assert "another GPU or TensorRT" in capsys.readouterr().err


def test_parser_errors_are_printed_whole(fake, onnx_file, tmp_path, capsys):
    errors = ["node 3: no importer for Gelu\n  at line 7", "node 9: shapes differ"]
    fake("8.6.0", parser_errors=errors)
    path = onnx_file()
    assert run(path, tmp_path / "out") == 2
    output = capsys.readouterr().err
    # Each in its line: what the file says begins none.
    lines = ["parser: " + error.replace("\n", r"\n") for error in errors]
    assert set(lines) <= set(output.splitlines()), output
    assert output.splitlines()[-1].startswith("error: TensorRT 8.6.0 cannot read")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("version", fake_tensorrt.VERSIONS)
def test_a_failed_build_gives_the_reason_and_leaves_nothing(fake, onnx_file, tmp_path, version):
    fake(version, build_fails=True)
    with pytest.raises(UserError, match="built no engine: no implementation for node X"):
        build(onnx_file(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_tensorrt_cannot_use_is_one_line(fake, onnx_file, tmp_path):
    fake("8.6.0", device_fails=True)
    with pytest.raises(UserError, match="CUDA initialization failure with error: 35"):
        build(onnx_file(), tmp_path / "out")


@pytest.mark.parametrize(
    "shape, message",
    [((3, 4, 4, 3), "fixed at 3: use --batch 3"), ((-1, -1, 4, 3), "at one image size")],
)
def test_an_input_that_the_profiles_do_not_fit(fake, onnx_file, tmp_path, shape, message):
    fake("11.4.0.106", inputs=[("images", "FLOAT", shape)])
    with pytest.raises(UserError, match=message):
        build(onnx_file(), tmp_path / "out")


def test_a_fixed_batch_can_be_built(fake, onnx_file, tmp_path):
    fake("11.4.0.106", inputs=[("images", "FLOAT", (3, 4, 4, 3))])
    assert build(onnx_file(), tmp_path / "out", batch="3")["profiles"][0]["max"] == 3


@pytest.mark.parametrize("options", [{"optimization_level": 6}, {"workspace_mib": 0}])
def test_values_out_of_range(onnx_file, tmp_path, options):
    with pytest.raises(UserError, match=next(iter(options))):
        build(onnx_file(), tmp_path / "out", **options)


def test_a_directory_that_cannot_be_written_is_one_line(fake, onnx_file, tmp_path):
    (tmp_path / "out").write_text("a file")
    fake("10.0.1")
    with pytest.raises(UserError, match="out cannot be written"):
        build(onnx_file(), tmp_path / "out")


def test_a_full_disk_leaves_the_old_engine_and_its_description(
    fake, onnx_file, tmp_path, monkeypatch
):
    fake("10.0.1")
    path = onnx_file()
    build(path, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    write = pathlib.Path.write_bytes

    def full(self, data):
        if self.name == "layers.json":
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left on device"):
        build(path, tmp_path / "out", batch="1")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


class Terminal:
    """A stderr that is a terminal; Ctrl-C is pressed when it is written to for the nth time."""

    def __init__(self, interrupt_at=None):
        self.text, self.writes, self.interrupt_at = "", 0, interrupt_at

    def isatty(self):
        return True

    def flush(self):
        pass

    def write(self, text):
        self.writes += 1
        if self.writes == self.interrupt_at:
            raise KeyboardInterrupt
        self.text += text


def test_progress_is_shown_on_a_terminal(fake, onnx_file, tmp_path, monkeypatch):
    path = onnx_file()
    fake("10.0.1")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    build(path, tmp_path / "out")
    assert "Building: 1/2" in terminal.text
    assert terminal.text.endswith("\r\033[K")


def test_ctrl_c_ends_a_build_with_nothing_written(fake, onnx_file, tmp_path, monkeypatch):
    path = onnx_file()
    trt = fake("11.4.0.106")
    monkeypatch.setattr(sys, "stderr", Terminal(interrupt_at=1))
    assert run(path, tmp_path / "out") == 130
    assert called(trt, "Builder.stopped") == [()]
    assert not (tmp_path / "out").exists()


def test_nothing_is_shown_where_there_is_no_terminal(fake, onnx_file, tmp_path, capsys):
    fake("10.0.1")
    assert run(onnx_file(), tmp_path / "out") == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert "TensorRT 10.0.1 on NVIDIA Fake (compute capability 9.0): fp32" in output.out
    assert "batch 1:8:64" in output.out


def test_without_tensorrt_one_line_and_exit_code_2(monkeypatch, onnx_file, tmp_path, capsys):
    path = onnx_file()
    before = path.read_bytes()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert run(path, tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: TensorRT is not installed here")
    assert path.read_bytes() == before
    assert not (tmp_path / "out").exists()


def no_driver(name):
    raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize("driver", [no_driver, lambda name: fake_tensorrt.FakeDriver(count=0)])
def test_without_a_gpu_one_line_and_exit_code_2(
    fake, onnx_file, tmp_path, capsys, monkeypatch, driver
):
    path = onnx_file()
    # TensorRT must not even be asked: 8.6 crashes without a driver.
    trt = fake("8.6.0", device_fails=True)
    monkeypatch.setattr(ctypes, "CDLL", driver)
    assert run(path, tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no NVIDIA GPU here")
    assert trt.calls == []


def test_the_fake_refuses_what_its_version_lacks():
    old, new = fake_tensorrt.fake_tensorrt("8.6.0"), fake_tensorrt.fake_tensorrt("11.4.0.106")
    assert not hasattr(new.BuilderFlag, "FP16") and hasattr(old.BuilderFlag, "FP16")
    assert not hasattr(old, "IProgressMonitor") and hasattr(new, "IProgressMonitor")

    class Logger(new.ILogger):
        pass

    config = new.Builder(Logger()).create_builder_config()
    with pytest.raises(AttributeError, match=r"tensorrt 11\.4\.0\.106 has no"):
        config.max_workspace_size = 1
    with pytest.raises(AttributeError):
        config.set_calibration_profile(None)


# What the bindings lack, by version: everything else in the sources must be there.
ABSENT = {
    "8": {"IProgressMonitor", "NetworkDefinitionCreationFlag.STRONGLY_TYPED"},
    "10": set(),
    "11": {
        "BuilderFlag.FP16",
        "BuilderFlag.INT8",
        "BuilderFlag.OBEY_PRECISION_CONSTRAINTS",
        "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
    },
}


def names_in(path):
    """Every `trt.X` and `trt.X.Y` that a source file says, as "X" and "X.Y"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if text.startswith(("trt.", "tensorrt.")):
                found.add(".".join(text.split(".")[1:3]).removesuffix(".__init__"))
    return found - {"__members__"}


@pytest.mark.parametrize("version", fake_tensorrt.VERSIONS)
def test_every_name_of_tensorrt_exists_in_its_real_bindings(version):
    used = set.union(*(names_in(path) for path in (ROOT / "vit_jax/export").glob("*.py")))
    flags = {flag for row in PRECISIONS.values() for flag in row.builder_flags or ()}
    used |= {f"BuilderFlag.{flag}" for flag in flags}
    assert len(used) > 20
    table = fake_tensorrt.NAMES[version]

    def exists(name):
        kind, _, member = name.partition(".")
        members = {word.partition("=")[0] for word in table.get(kind, "").split()}
        return kind in table[""].split() and (not member or member in members)

    absent = {name for name in used if not exists(name)}
    assert absent == ABSENT[version.split(".")[0]]


@pytest.fixture(scope="module", params=STRONG)
def bindings(request, tmp_path_factory):
    """The real bindings of a version, in a directory that `tensorrt_names.load` takes."""
    if not shutil.which("gcc"):
        pytest.skip("needs gcc for empty stand-ins of TensorRT's libraries")
    directory = tmp_path_factory.mktemp("bindings")
    try:
        tensorrt_names.download(request.param, directory)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no bindings of {request.param} for this Python, or no network: {error}")
    return request.param, directory


def test_the_recorded_names_are_those_of_the_real_bindings(bindings):
    version, directory = bindings
    words = [sys.executable, tensorrt_names.__file__, "--print", str(directory)]
    output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert json.loads(output) == fake_tensorrt.NAMES[version]


def test_what_is_made_of_the_real_bindings_works(bindings):
    version, directory = bindings
    code = """
        import importlib.util, pathlib, sys, types
        from vit_jax.errors import UserError
        from vit_jax.export import nvidia, to_tensorrt

        spec = importlib.util.spec_from_file_location("names", sys.argv[1])
        names = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(names)
        trt = names.load(pathlib.Path(sys.argv[2]))

        logger = nvidia.make_logger(trt)
        logger.log(trt.ILogger.INFO, "hidden")
        logger.log(trt.ILogger.WARNING, "shown")
        logger.log(trt.ILogger.ERROR, "the reason")
        assert logger.last_error() == "the reason"
        # The stand-ins make null pointers, as a real builder is where it cannot use the GPU.
        for kind in (trt.Builder, trt.Runtime):
            try:
                nvidia.create(kind, logger)
            except UserError as error:
                assert "cannot use this GPU: the reason" in str(error)
            else:
                raise AssertionError(kind)
        config = types.SimpleNamespace()
        progress = to_tensorrt._watch(trt, config)
        assert isinstance(config.progress_monitor, trt.IProgressMonitor)
        progress.phase_start("phase", None, 2)
        assert progress.step_complete("phase", 0)
        progress.phase_finish("phase")
        level = to_tensorrt._member(trt.HardwareCompatibilityLevel, "ampere_plus", "level", trt)
        assert level == trt.HardwareCompatibilityLevel.AMPERE_PLUS
        assert to_tensorrt.strongly_typed(trt)
        print(trt.__version__)
    """
    words = [sys.executable, "-c", textwrap.dedent(code), tensorrt_names.__file__, str(directory)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{version}\n", "TensorRT: shown\n")


def test_the_recorded_names_are_those_of_the_tensorrt_that_is_installed():
    tensorrt = pytest.importorskip("tensorrt", reason="needs TensorRT", exc_type=ImportError)
    if tensorrt.__version__ not in fake_tensorrt.NAMES:
        pytest.skip(f"the names of TensorRT {tensorrt.__version__} are not recorded")
    assert tensorrt_names.names(tensorrt) == fake_tensorrt.NAMES[tensorrt.__version__]


def test_it_needs_nothing_but_the_standard_library():
    code = (
        "import sys, vit_jax.export.to_tensorrt, vit_jax.export.deploy\n"
        "names = 'jax tensorflow onnx numpy tensorrt cuda'.split()\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_it_runs_on_python_3_10(tmp_path):
    home = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"))
    pythons = [*home.glob("versions/3.10.*/bin/python3.10"), shutil.which("python3.10")]
    for python in filter(None, pythons):
        if subprocess.run([python, "--version"], capture_output=True).returncode == 0:
            break
    else:
        pytest.skip("needs Python 3.10, the last that TensorRT 8.6 knows")
    words = [str(python), "-m", "vit_jax.export.to_tensorrt", str(tmp_path / "m.onnx")]
    done = subprocess.run(
        [*words, "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert (
        done.stderr == f"error: {tmp_path}/m.onnx cannot be read (No such file or directory): "
        "name an ONNX file\n"
    )


def test_a_real_engine_is_built_and_runs_where_there_is_a_gpu(tmp_path):
    pytest.importorskip("tensorrt", reason="needs TensorRT", exc_type=ImportError)
    try:
        nvidia.find_device()
    except UserError as error:
        pytest.skip(str(error))
    onnx = pytest.importorskip("onnx", reason="needs the export extra", exc_type=ImportError)
    weights = np.random.default_rng(0).normal(size=(48, 5)).astype(np.float32)
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Reshape", ["images", "shape"], ["flat"]),
            onnx.helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        ],
        "graph",
        [onnx.helper.make_tensor_value_info("images", 1, ["batch", 4, 4, 3])],
        [onnx.helper.make_tensor_value_info("logits", 1, ["batch", 5])],
        [
            onnx.numpy_helper.from_array(np.array([-1, 48], np.int64), "shape"),
            onnx.numpy_helper.from_array(weights, "weights"),
        ],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset), tmp_path / "model.onnx")
    build(tmp_path / "model.onnx", tmp_path / "out", batch="1,2:4:8")
    images = np.random.default_rng(1).normal(size=(11, 4, 4, 3)).astype(np.float32)
    for cuda_graph in (False, True):
        with runtime.load(tmp_path / "out", cuda_graph=cuda_graph) as model:
            logits = model.predict(images)
        np.testing.assert_allclose(logits, images.reshape(11, 48) @ weights, rtol=1e-4, atol=1e-4)
