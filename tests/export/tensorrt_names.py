"""The names in TensorRT's Python bindings, by version: tensorrt_names.json.

    python tests/export/tensorrt_names.py 10.0.1 11.4.0.106   # from PyPI: 1.3 MB each, needs gcc
    python tests/export/tensorrt_names.py                     # from the tensorrt that is installed

Each call adds to the file or replaces in it. The wheels of the bindings lack TensorRT's libraries;
empty ones with the same names are enough to import them, and so to see what exists.
"""

import ctypes
import enum
import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile

FILE = pathlib.Path(__file__).with_suffix(".json")
# What the package uses, and what is reached from it.
CLASSES = """
    Builder BuilderFlag DataType EngineInspector HardwareCompatibilityLevel IBuilderConfig
    ICudaEngine IExecutionContext IHostMemory ILayer ILogger INetworkDefinition
    IOptimizationProfile IProgressMonitor ITensor ITimingCache LayerInformationFormat LayerType
    MemoryPoolType NetworkDefinitionCreationFlag OnnxParser ParserError ProfilingVerbosity Runtime
    TacticSource TensorIOMode
"""
CLASSES = tuple(CLASSES.split())
FUNCTIONS = ("__version__", "init_libnvinfer_plugins")


def names(trt) -> dict[str, str]:
    """By class, what it has; members of enumerations with their values."""
    table = {"": " ".join(name for name in (*FUNCTIONS, *CLASSES) if hasattr(trt, name))}
    for kind in CLASSES:
        if not hasattr(trt, kind):
            continue
        members = []
        for name in sorted(dir(getattr(trt, kind))):
            if name.startswith("_") or name in ("name", "value", "itemsize"):
                continue
            value = getattr(getattr(trt, kind), name)
            is_member = isinstance(value, enum.Enum) or hasattr(type(value), "__members__")
            members.append(f"{name}={int(value)}" if is_member else name)
        table[kind] = " ".join(members)
    return table


def download(version: str, directory: pathlib.Path) -> None:
    """Fetches the bindings of a version and makes stand-ins for the libraries that they want.

    Raises:
        OSError, subprocess.CalledProcessError: no network, no such wheel, or no gcc.
    """
    major = version.split(".")[0]
    package = "tensorrt-cu12-bindings" if major == "10" else "tensorrt-cu13-bindings"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(directory)]
    subprocess.run([*pip, f"{package}=={version}"], check=True, capture_output=True, timeout=120)
    (wheel,) = directory.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(directory)
    entry_points = [
        *(f"createInfer{kind}_INTERNAL" for kind in ("Builder", "Refitter", "Runtime")),
        *("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL"),
        *("getBuilderPluginRegistry", "getNvOnnxParserVersion", "getPluginRegistry"),
        "initLibNvInferPlugins",
    ]
    source = directory / "stand_in.c"
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        functions = entry_points if library == "nvinfer" else []
        source.write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in functions))
        target = f"lib{library}.so.{major}"
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{target}", "-o", target, str(source)]
        subprocess.run(command, check=True, capture_output=True, cwd=directory)


def load(directory: pathlib.Path):
    """Imports what `download` left; once a process, since two versions do not go together."""
    for library in directory.glob("lib*.so.*"):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(directory))
    import tensorrt_bindings

    return tensorrt_bindings


def main(versions: list[str]) -> None:
    table = json.loads(FILE.read_text()) if FILE.exists() else {}
    if not versions:
        import tensorrt

        table[tensorrt.__version__] = names(tensorrt)
    for version in versions:
        with tempfile.TemporaryDirectory() as directory:
            download(version, pathlib.Path(directory))
            command = [sys.executable, __file__, "--print", directory]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            table[version] = json.loads(output)
    FILE.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--print"]:
        print(json.dumps(names(load(pathlib.Path(sys.argv[2])))))
    else:
        main(sys.argv[1:])
