"""Stand-ins for `tensorrt` and the CUDA runtime: they record, and refuse what is not there.

The fake of a version has the names of that version's real bindings (tensorrt_names.json) and no
others. Its engines compute: the mean of an image's pixels, times 1, 2, 3 and so on. What is queued
on a stream runs when the stream is synchronised, not before, and memory that was freed is gone, so
that a runtime that forgets one or the other gives wrong numbers. A copy from or to pageable memory
is not queued: the real runtime has read or written it when it returns ("API synchronization
behavior" in its manual).
"""

import ctypes
import enum
import json
import pathlib
import sys
import types

import numpy as np

NAMES = json.loads(pathlib.Path(__file__).with_name("tensorrt_names.json").read_text())
VERSIONS = tuple(NAMES)
OUTPUTS = 5
DEVICE = {"name": "NVIDIA Fake", "compute_capability": "9.0", "driver": "12.4"}

_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "UINT8": np.uint8}


def fake_tensorrt(version: str, **behavior):
    """The module `tensorrt` of a version.

    Args:
        version: one of `VERSIONS`.
        **behavior: inputs: of the parsed network, a list of (name, dtype, shape); parser_errors:
            a list; layers: (dtype of the output, LayerType) of the parsed network; inspected: the
            layers of the inspector's JSON; build_fails; device_fails; cache_fits.
    """
    table = {
        kind: {word.partition("=")[0]: word.partition("=")[2] for word in words.split()}
        for kind, words in NAMES[version].items()
    }
    trt = types.ModuleType("tensorrt")
    trt.__version__ = version
    trt.calls = calls = []

    def record(name, *arguments):
        calls.append((name, *arguments))

    def real(kind):
        """Leaves a class with the names that it really has, and none else can be set."""

        def wrap(cls):
            for name in [name for name in vars(cls) if not name.startswith("_")]:
                if name not in table.get(kind, {}):
                    delattr(cls, name)

            def set_attribute(self, name, value):
                if not name.startswith("_"):
                    if name not in table[kind]:
                        raise AttributeError(f"tensorrt {version} has no {kind}.{name}")
                    record(f"{kind}.{name}", value)
                object.__setattr__(self, name, value)

            if kind not in ("ILogger", "IProgressMonitor"):  # Made to be inherited from.
                cls.__setattr__ = set_attribute
            return cls

        return wrap

    for kind, members in table.items():
        values = {name: int(value) for name, value in members.items() if value}
        if kind and kind != "ILogger" and values:
            setattr(trt, kind, enum.IntEnum(kind, values))

    @real("ILogger")
    class ILogger:
        def log(self, severity, message):
            raise NotImplementedError

    for name, value in table["ILogger"].items():
        if value:
            setattr(ILogger, name, int(value))

    @real("IProgressMonitor")
    class IProgressMonitor:
        def phase_start(self, phase_name, parent_phase, num_steps):
            raise NotImplementedError

        def step_complete(self, phase_name, step):
            raise NotImplementedError

        def phase_finish(self, phase_name):
            raise NotImplementedError

    @real("ITensor")
    class Tensor:
        def __init__(self, name, dtype, shape):
            self._set(name=name, dtype=dtype, shape=shape)

        def _set(self, **values):
            for name, value in values.items():
                object.__setattr__(self, name, value)

    @real("ILayer")
    class Layer:
        num_outputs = 1

        def __init__(self, dtype, kind):
            object.__setattr__(self, "type", kind)
            self._output = Tensor("", dtype, ())

        def get_output(self, index):
            return [self._output][index]

        def set_output_type(self, index, dtype):
            record("ILayer.set_output_type", self.type, index, dtype)

    @real("INetworkDefinition")
    class Network:
        num_inputs = num_layers = 0

        def get_input(self, index):
            return self._inputs[index]

        def get_layer(self, index):
            return self._layers[index]

    @real("OnnxParser")
    class OnnxParser:
        num_errors = 0

        def __init__(self, network, logger):
            assert isinstance(network, Network)
            assert isinstance(logger, ILogger)
            self._network = network

        def parse_from_file(self, model):
            assert isinstance(model, str)
            record("OnnxParser.parse_from_file", model)
            errors = behavior.get("parser_errors", [])
            object.__setattr__(self, "num_errors", len(errors))
            inputs = behavior.get("inputs", [("images", "FLOAT", (-1, 4, 4, 3))])
            self._network._inputs = [Tensor(n, trt.DataType[t], s) for n, t, s in inputs]
            self._network._layers = [
                Layer(trt.DataType[t], trt.LayerType[k]) for t, k in behavior.get("layers", [])
            ]
            object.__setattr__(self._network, "num_inputs", len(inputs))
            object.__setattr__(self._network, "num_layers", len(self._network._layers))
            return not errors

        def get_error(self, index):
            return behavior["parser_errors"][index]

    @real("IOptimizationProfile")
    class Profile:
        def set_shape(self, input, min, opt, max):
            self._shapes = (input, tuple(min), tuple(opt), tuple(max))

    @real("ITimingCache")
    class TimingCache:
        def __init__(self, data):
            self._data = data

        def serialize(self):
            return (self._data or b"timed") + b"+"

    @real("IBuilderConfig")
    class BuilderConfig:
        def __init__(self):
            self._profiles, self._flags, self._cache = [], {trt.BuilderFlag.TF32}, None

        def set_flag(self, flag):
            self._flags.add(trt.BuilderFlag(flag))

        def clear_flag(self, flag):
            self._flags.discard(trt.BuilderFlag(flag))

        def set_memory_pool_limit(self, pool, pool_size):
            record("IBuilderConfig.set_memory_pool_limit", pool, pool_size)

        def set_tactic_sources(self, tactic_sources):
            record("IBuilderConfig.set_tactic_sources", tactic_sources)
            return True

        def add_optimization_profile(self, profile):
            self._profiles.append(profile._shapes)
            return len(self._profiles) - 1

        def create_timing_cache(self, serialized_timing_cache):
            return TimingCache(serialized_timing_cache)

        def set_timing_cache(self, cache, ignore_mismatch):
            fits = not cache._data or ignore_mismatch or behavior.get("cache_fits", True)
            if fits:
                self._cache = cache
                record("IBuilderConfig.set_timing_cache", cache._data)
            return fits

    @real("Builder")
    class Builder:
        def __init__(self, logger):
            self._logger = logger
            if behavior.get("device_fails"):
                logger.log(ILogger.ERROR, "CUDA initialization failure\nwith error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def create_builder_config(self):
            return BuilderConfig()

        def create_network(self, flags=0):
            record("Builder.create_network", flags)
            return Network()

        def create_optimization_profile(self):
            return Profile()

        def build_serialized_network(self, network, config):
            record("Builder.flags", {flag.name for flag in config._flags})
            monitor = getattr(config, "progress_monitor", None)
            if monitor is not None:
                monitor.phase_start("Building", None, 2)
                going_on = monitor.step_complete("Building", 0)
                monitor.phase_finish("Building")
                if not going_on:
                    record("Builder.stopped")
                    return None
            if behavior.get("build_fails"):
                self._logger.log(ILogger.ERROR, "no implementation for node X")
                return None
            tensor = network._inputs[0]
            plan = {
                "version": version,
                "dtype": tensor.dtype.name,
                "image_shape": list(tensor.shape[1:]),
                "profiles": [shapes[1:] for shapes in config._profiles],
            }
            return json.dumps(plan).encode()

    @real("EngineInspector")
    class Inspector:
        def get_engine_information(self, format):
            assert format is trt.LayerInformationFormat.JSON
            return json.dumps({"Layers": behavior.get("inspected", [])})

    @real("IExecutionContext")
    class Context:
        def __init__(self, engine):
            self._engine, self._profile, self._addresses = engine, None, {}
            self._shape, self._captured = None, None

        def set_optimization_profile_async(self, profile_index, stream_handle):
            assert isinstance(stream_handle, int)
            self._profile = profile_index
            return True

        def set_input_shape(self, name, shape):
            low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
            self._shape = tuple(shape)
            return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

        def set_tensor_address(self, name, memory):
            self._addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle):
            record("IExecutionContext.execute_async_v3", self._profile, self._shape[0])
            shape = self._shape
            capturing = CUDA.queue(stream_handle, lambda: self._compute(shape))
            if capturing:
                self._captured = shape
            return True

        def _compute(self, shape):
            assert self._captured in (None, self._shape), "a graph outlived the shapes it is of"
            dtype = _NUMPY[self._engine._plan["dtype"]]
            images = CUDA.array(self._addresses["images"], dtype, shape)
            outputs = CUDA.array(self._addresses["logits"], np.float32, (shape[0], OUTPUTS))
            outputs[:] = expected(images)

    @real("ICudaEngine")
    class Engine:
        num_io_tensors = 2

        def __init__(self, plan):
            self._plan = plan
            object.__setattr__(self, "num_optimization_profiles", len(plan["profiles"]))

        def get_tensor_name(self, index):
            return ["images", "logits"][index]

        def get_tensor_mode(self, name):
            return trt.TensorIOMode.INPUT if name == "images" else trt.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name):
            return trt.DataType[self._plan["dtype"]] if name == "images" else trt.DataType.FLOAT

        def get_tensor_shape(self, name):
            return (-1, *self._plan["image_shape"]) if name == "images" else (-1, OUTPUTS)

        def get_tensor_profile_shape(self, name, profile_index):
            assert name == "images"
            return [tuple(shape) for shape in self._plan["profiles"][profile_index]]

        def create_execution_context(self):
            return Context(self)

        def create_engine_inspector(self):
            return Inspector()

    @real("Runtime")
    class Runtime:
        def __init__(self, logger):
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine):
            plan = json.loads(bytes(serialized_engine))
            if plan["version"] != version:
                self._logger.log(ILogger.ERROR, "the version of the plan does not match")
                return None
            return Engine(plan)

    def init_libnvinfer_plugins(logger, namespace):
        assert isinstance(logger, ILogger) and namespace == ""
        return True

    classes = (ILogger, IProgressMonitor, OnnxParser, Builder, Runtime)
    for thing in (*classes, init_libnvinfer_plugins):
        if thing.__name__ in table[""]:
            setattr(trt, thing.__name__, thing)
    return trt


def expected(images: np.ndarray) -> np.ndarray:
    """What a fake engine computes, [batch, OUTPUTS] float32."""
    means = images.astype(np.float32).mean(axis=(1, 2, 3))
    return means[:, None] * np.arange(1, OUTPUTS + 1, dtype=np.float32)


class FakeCuda:
    """One stream, memory and graphs of the CUDA runtime, as cuda-python gives them.

    Has the names of `cuda.bindings.runtime`; every function returns a tuple with the status first.
    """

    cudaStreamNonBlocking = 1
    STREAM = 77

    def __init__(self):
        self.memory, self.pending, self.graphs, self.capture = {}, [], {}, None
        self.streams, self.pinned, self.freed, self.pageable_copies = set(), set(), {}, 0
        self.cudaMemcpyKind = enum.Enum(
            "cudaMemcpyKind", ["cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"]
        )
        self.cudaStreamCaptureMode = enum.Enum(
            "cudaStreamCaptureMode", ["cudaStreamCaptureModeThreadLocal"]
        )

    def queue(self, stream, work):
        """Puts work on the stream, or into the graph that is being captured; says which."""
        assert stream in self.streams
        (self.pending if self.capture is None else self.capture).append(work)
        return self.capture is not None

    def array(self, address, dtype, shape):
        """A view of memory that was allocated and is not free."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert len(self.memory[address]) >= size
        return np.frombuffer(self.memory[address], dtype, int(np.prod(shape))).reshape(shape)

    def in_use(self):
        """What was taken and not given back."""
        return len(self.memory) + len(self.streams) + len(self.graphs)

    def cudaStreamCreateWithFlags(self, flags):
        assert flags == self.cudaStreamNonBlocking
        self.streams.add(self.STREAM)
        return 0, self.STREAM

    def cudaStreamDestroy(self, stream):
        self.streams.remove(stream)
        return (0,)

    def cudaStreamSynchronize(self, stream):
        assert stream in self.streams and self.capture is None
        while self.pending:
            self.pending.pop(0)()
        return (0,)

    def cudaMalloc(self, size):
        memory = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(memory)] = memory
        return 0, ctypes.addressof(memory)

    def cudaMallocHost(self, size):
        status, address = FakeCuda.cudaMalloc(self, size)
        self.pinned.add(address)
        return status, address

    def cudaFree(self, address):
        assert address not in self.pinned
        # It is kept, so that no array of NumPy comes to lie there.
        self.freed[address] = self.memory.pop(address)
        return (0,)

    def cudaFreeHost(self, address):
        self.pinned.remove(address)
        return self.cudaFree(address)

    def cudaMemcpyAsync(self, target, source, count, kind, stream):
        device, host = target, source
        if kind is self.cudaMemcpyKind.cudaMemcpyDeviceToHost:
            device, host = source, target
        assert device in self.memory and device not in self.pinned and host not in self.freed
        assert isinstance(kind, self.cudaMemcpyKind) and count <= len(self.memory[device])
        if host in self.pinned:
            assert count <= len(self.memory[host])
            self.queue(stream, lambda: ctypes.memmove(target, source, count))
            return (0,)
        self.pageable_copies += 1
        self.cudaStreamSynchronize(stream)
        ctypes.memmove(target, source, count)
        return (0,)

    def cudaStreamBeginCapture(self, stream, mode):
        assert stream in self.streams and isinstance(mode, self.cudaStreamCaptureMode)
        assert not self.pending, "the capture began before the warm-up had ended"
        self.capture = []
        return (0,)

    def cudaStreamEndCapture(self, stream):
        assert stream in self.streams
        graph, self.capture = self.capture, None
        return 0, graph

    def cudaGraphInstantiateWithFlags(self, graph, flags):
        assert flags == 0
        self.graphs[id(graph)] = graph
        return 0, id(graph)

    def cudaGraphDestroy(self, graph):
        assert isinstance(graph, list)
        return (0,)

    def cudaGraphLaunch(self, executable, stream):
        for work in self.graphs[executable]:
            self.queue(stream, work)
        return (0,)

    def cudaGraphExecDestroy(self, executable):
        del self.graphs[executable]
        return (0,)

    def cudaGetErrorString(self, status):
        return 0, f"error {status}".encode()


class FakeDriver:
    """libcuda.so.1 with a number of GPUs, of the compute capability of `DEVICE`."""

    def __init__(self, count=1):
        self.count = count

    def cuInit(self, flags):
        return flags

    def cuDeviceGetCount(self, count):
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device, ordinal):
        device._obj.value = ordinal
        return 0

    def cuDeviceGetName(self, name, length, device):
        assert length == 256 and device.value == 0
        name.value = DEVICE["name"].encode()
        return 0

    def cuDeviceGetAttribute(self, number, attribute, device):
        assert device.value == 0
        number._obj.value = {75: 9, 76: 0}[attribute]
        return 0

    def cuDriverGetVersion(self, number):
        number._obj.value = 12040
        return 0


CUDA = FakeCuda()


def install(monkeypatch, version, **behavior):
    """Puts the fakes where the package looks for TensorRT, the driver and the CUDA runtime."""
    trt = fake_tensorrt(version, **behavior)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libcuda.so.1": FakeDriver()}[name])
    bindings = types.ModuleType("cuda.bindings")
    bindings.runtime = CUDA
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", CUDA)
    return trt
