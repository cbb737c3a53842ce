import dataclasses
import gc
import json
import weakref

import numpy as np
import pytest

from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.export import runtime
from vit_jax.export.to_tensorrt import build

from . import fake_tensorrt
from .fake_tensorrt import CUDA, OUTPUTS, expected

onnx = pytest.importorskip("onnx", reason="needs the export extra", exc_type=ImportError)
PREPROCESSING = Preprocessing(
    4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.25), interpolation="bicubic"
)
METADATA = {
    "preprocessing": json.dumps(dataclasses.asdict(PREPROCESSING)),
    "class_names": json.dumps([f"class {i}" for i in range(OUTPUTS)]),
}
WEIGHTS = np.random.default_rng(0).normal(size=(48, OUTPUTS)).astype(np.float32)


def save_onnx(path, *, dtype="FLOAT", batch="batch", metadata=METADATA, shape=(4, 4, 3)):
    """logits = the pixels of an image @ WEIGHTS, in an ONNX file."""
    helper, from_array = onnx.helper, onnx.numpy_helper.from_array
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Reshape", ["floats", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info(
                "images", getattr(onnx.TensorProto, dtype), [batch, *shape]
            )
        ],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [batch, OUTPUTS])],
        [from_array(np.array([-1, 48], np.int64), "shape"), from_array(WEIGHTS, "weights")],
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def floats(count, seed=1):
    return np.random.default_rng(seed).normal(size=(count, 4, 4, 3)).astype(np.float32)


def pixels(count, seed=2):
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)


def normalized(images):
    """By Preprocessing's own words: mean is subtracted of pixels in [0, 1], std divides."""
    return ((images / 255.0 - PREPROCESSING.mean) / PREPROCESSING.std).astype(np.float32)


def logits(images):
    return images.reshape(len(images), 48).astype(np.float64) @ WEIGHTS.astype(np.float64)


def check(model, images, wanted):
    found = model.predict(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


class TestOnnx:
    @pytest.fixture(autouse=True)
    def onnxruntime(self):
        return pytest.importorskip(
            "onnxruntime", reason="needs the export extra", exc_type=ImportError
        )

    def test_floats_go_in_as_they_are(self, tmp_path):
        with runtime.load(save_onnx(tmp_path / "model.onnx")) as model:
            for count in (1, 3, 65):
                check(model, floats(count), logits(floats(count)))
            check(model, floats(2).astype(np.float64), logits(floats(2)))

    def test_pixels_are_normalized_as_the_metadata_says(self, tmp_path):
        model = runtime.load(save_onnx(tmp_path / "model.onnx"))
        assert model.preprocessing == PREPROCESSING
        assert model.class_names == tuple(f"class {i}" for i in range(OUTPUTS))
        check(model, pixels(3), logits(normalized(pixels(3))))

    def test_a_graph_of_pixels_gets_pixels(self, tmp_path):
        model = runtime.load(save_onnx(tmp_path / "model.onnx", dtype="UINT8"))
        check(model, pixels(3), logits(pixels(3)))
        with pytest.raises(UserError, match="images of float32 do not fit.*pass uint8"):
            model.predict(floats(1))

    def test_a_float16_graph_gets_float16(self, tmp_path):
        model = runtime.load(save_onnx(tmp_path / "model.onnx", dtype="FLOAT16"))
        check(model, floats(2), logits(floats(2).astype(np.float16)))

    @pytest.mark.parametrize("count", [1, 3, 4, 7])
    def test_a_fixed_batch_is_filled_up_and_split(self, tmp_path, count):
        model = runtime.load(save_onnx(tmp_path / "model.onnx", batch=3))
        check(model, floats(count), logits(floats(count)))

    def test_pixels_without_preprocessing_are_refused(self, tmp_path):
        model = runtime.load(save_onnx(tmp_path / "model.onnx", metadata={}))
        assert model.preprocessing is None and model.class_names is None
        check(model, floats(2), logits(floats(2)))
        with pytest.raises(UserError, match="how pixels are normalized"):
            model.predict(pixels(1))

    @pytest.mark.parametrize(
        "images",
        [
            np.zeros((0, 4, 4, 3)),
            np.zeros((4, 4, 3)),
            np.zeros((1, 5, 4, 3)),
            np.zeros((1, 3, 4, 4)),
        ],
    )
    def test_images_of_another_shape_are_refused(self, tmp_path, images):
        model = runtime.load(save_onnx(tmp_path / "model.onnx"))
        with pytest.raises(UserError, match=r"pass \[batch, 4, 4, 3\]"):
            model.predict(images)

    def test_integers_that_are_no_pixels_are_refused(self, tmp_path):
        model = runtime.load(save_onnx(tmp_path / "model.onnx"))
        with pytest.raises(UserError, match="images of int64 .*pass uint8 or floats"):
            model.predict(np.zeros((1, 4, 4, 3), np.int64))

    def test_a_damaged_file_is_one_line(self, tmp_path):
        path = save_onnx(tmp_path / "model.onnx")
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(UserError, match=r"onnxruntime cannot load .*model\.onnx") as caught:
            runtime.load(path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "metadata",
        [{"preprocessing": '{"image_size": 4}'}, {"model": "[]"}, {"model": '{"patch_size": "8"}'}],
    )
    def test_damaged_metadata_is_one_line(self, tmp_path, metadata):
        path = save_onnx(tmp_path / "model.onnx", metadata=metadata, shape=("h", "w", 3))
        with pytest.raises(UserError, match="metadata of .* is damaged"):
            runtime.load(path)

    @pytest.mark.parametrize("device", ["gpu", "cpu:0", "cuda:x", "cuda:-1"])
    def test_an_unknown_device_is_named(self, tmp_path, device):
        with pytest.raises(UserError, match="use cpu, cuda or tensorrt"):
            runtime.load(save_onnx(tmp_path / "model.onnx"), device)

    @pytest.mark.parametrize("device", ["cuda", "tensorrt:1"])
    def test_a_provider_that_is_not_there_is_one_line(self, tmp_path, device, monkeypatch):
        import onnxruntime

        path = save_onnx(tmp_path / "model.onnx")
        monkeypatch.setattr(
            onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"]
        )
        with pytest.raises(UserError, match="pip install onnxruntime-gpu"):
            runtime.load(path, device)

    def test_the_device_names_the_provider_and_its_gpu(self, tmp_path, monkeypatch):
        import onnxruntime

        given = {}
        real = onnxruntime.InferenceSession

        class Session:
            def __init__(self, path, options, providers):
                given["providers"] = providers
                self.session = real(path, options, providers=["CPUExecutionProvider"])

            def get_providers(self):
                return given["answer"]

            def __getattr__(self, name):
                return getattr(self.session, name)

        everything = list(runtime.PROVIDERS.values())
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: everything)
        monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
        path = save_onnx(tmp_path / "model.onnx")
        given["answer"] = ["TensorrtExecutionProvider"]
        runtime.load(path, "tensorrt:1")
        assert given["providers"] == [
            ("TensorrtExecutionProvider", {"device_id": 1}),
            ("CUDAExecutionProvider", {"device_id": 1}),
        ]
        # onnxruntime goes on without CUDA's libraries; that must not pass for the GPU.
        given["answer"] = ["CPUExecutionProvider"]
        with pytest.raises(UserError, match="cannot run on 'cuda'"):
            runtime.load(path, "cuda")


class TestSavedModel:
    @pytest.fixture(scope="class")
    def directory(self, tmp_path_factory):
        tf = pytest.importorskip("tensorflow", reason="needs TensorFlow", exc_type=ImportError)
        directory = tmp_path_factory.mktemp("export")
        module = tf.Module()
        module.weights = tf.Variable(WEIGHTS)

        @tf.function(input_signature=[tf.TensorSpec((None, 4, 4, 3), tf.float32, name="images")])
        def serve(images):
            return {"logits": tf.reshape(images, [-1, 48]) @ module.weights}

        tf.saved_model.save(module, str(directory / "saved_model"), {"serving_default": serve})
        return directory

    def test_any_batch_runs(self, directory):
        with runtime.load(directory / "saved_model") as model:
            for count in (1, 5):
                check(model, floats(count), logits(floats(count)))

    def test_preprocessing_is_that_of_the_onnx_file_beside_it(self, directory):
        save_onnx(directory / "model.onnx")
        model = runtime.load(directory / "saved_model")
        assert model.preprocessing == PREPROCESSING
        check(model, pixels(2), logits(normalized(pixels(2))))

    def test_what_is_no_saved_model_is_one_line(self, directory, tmp_path):
        del directory
        (tmp_path / "saved_model.pb").write_bytes(b"junk")
        with pytest.raises(UserError, match="is not a SavedModel") as caught:
            runtime.load(tmp_path)
        assert "\n" not in str(caught.value)


class TestEngine:
    @pytest.fixture
    def load(self, tmp_path, monkeypatch):
        """Builds an engine with fakes and loads it; nothing of the GPU may be left in the end.

        Nor may it copy from or to pageable memory: each copy would be waited for.
        """
        models, before = [], CUDA.pageable_copies

        def make(version="10.0.1", batch="1,2:4:8", cuda_graph=False, dtype="FLOAT"):
            inputs = [("images", dtype, (-1, 4, 4, 3))]
            self.trt = fake_tensorrt.install(monkeypatch, version, inputs=inputs)
            path = save_onnx(tmp_path / "model.onnx", dtype=dtype.replace("HALF", "FLOAT16"))
            build(path, tmp_path / "out", batch=batch)
            models.append(runtime.load(tmp_path / "out", cuda_graph=cuda_graph))
            return models[-1]

        yield make
        for model in models:
            model.close()
        assert (CUDA.in_use(), CUDA.pageable_copies) == (0, before)

    def runs(self):
        return [call[1:] for call in self.trt.calls if call[0].endswith("execute_async_v3")]

    @pytest.mark.parametrize("version", fake_tensorrt.VERSIONS)
    @pytest.mark.parametrize("cuda_graph", [False, True])
    def test_any_batch_gives_its_own_outputs(self, load, version, cuda_graph):
        model = load(version, cuda_graph=cuda_graph)
        for count in (1, 2, 3, 8, 1, 5, 8, 19):
            images = floats(count, seed=count)
            np.testing.assert_allclose(model.predict(images), expected(images), rtol=1e-6)

    def test_metadata_comes_from_the_description(self, load):
        model = load()
        assert model.preprocessing == PREPROCESSING
        assert model.class_names[0] == "class 0"
        found = model.predict(pixels(3))
        np.testing.assert_allclose(found, expected(normalized(pixels(3))), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dtype, images", [("UINT8", pixels(3)), ("HALF", floats(3))])
    def test_inputs_of_other_types(self, load, dtype, images):
        model = load(dtype=dtype)
        assert model.image_dtype == (np.uint8 if dtype == "UINT8" else np.float16)
        np.testing.assert_allclose(model.predict(images), expected(images), rtol=1e-2, atol=1e-3)

    def test_each_batch_runs_on_the_profile_that_fits_it(self, load):
        model = load(batch="1,8:16:32,4:6:8")
        for count in (1, 2, 8, 9):
            model.predict(floats(count))
        # 8 is in two profiles; 6 is nearer to it than 16.
        assert self.runs() == [(0, 1), (2, 4), (2, 8), (1, 9)]

    def test_a_large_batch_is_split_at_the_largest_profile(self, load):
        load().predict(floats(19))
        assert self.runs() == [(1, 8), (1, 8), (1, 3)]

    def test_a_graph_is_captured_once_a_size(self, load):
        model = load(cuda_graph=True)
        for count in (3, 4, 3, 8, 5):
            model.predict(floats(count))
        # Twice each: to warm up and to be captured.
        assert self.runs() == [(1, 4), (1, 4), (1, 8), (1, 8)]

    def test_results_outlive_the_next_run(self, load):
        model = load()
        first = model.predict(floats(3, seed=1))
        before = first.copy()
        model.predict(floats(3, seed=2))
        np.testing.assert_array_equal(first, before)

    def test_a_failure_half_way_gives_everything_back(self, load, monkeypatch):
        model = load()
        model.close()
        calls = []

        def out_of_memory(size):
            calls.append(size)
            return (2, None) if len(calls) == 2 else type(CUDA).cudaMalloc(CUDA, size)

        monkeypatch.setattr(CUDA, "cudaMalloc", out_of_memory)
        with pytest.raises(UserError, match="CUDA error 2: error 2"):
            load()
        assert CUDA.in_use() == 0

    def test_closing_lets_the_engine_go(self, load):
        model = load()
        model.predict(floats(1))
        runner = model._run.__self__
        (context,) = runner.contexts.values()
        alive = [weakref.ref(runner.engine), weakref.ref(context)]
        del context
        model.close()
        gc.collect()
        assert [reference() for reference in alive] == [None, None]


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"cuda_graph": True}])
def test_options_of_another_format_are_refused(tmp_path, options):
    (tmp_path / "saved_model.pb").touch()
    with pytest.raises(UserError, match="is for"):
        runtime.load(tmp_path, **options)


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere is missing: name a SavedModel"):
        runtime.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"model\.engine is missing"):
        runtime.load(tmp_path)
    (tmp_path / "weights.npz").touch()
    with pytest.raises(UserError, match=r"weights\.npz is not a SavedModel"):
        runtime.load(tmp_path / "weights.npz")


def test_the_fake_has_no_name_that_the_cuda_runtime_lacks():
    try:
        from cuda.bindings import runtime as cudart
    except ImportError:
        pytest.skip("needs cuda-python")
    names = [name for name in dir(fake_tensorrt.CUDA) if name.startswith("cuda")]
    assert len(names) > 10
    assert [name for name in names if not hasattr(cudart, name)] == []
