import dataclasses
import json
import os
import re
import shlex

import numpy as np
import pytest

from vit_jax import command
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.export.build_commands import polygraphy_command, trtexec_command
from vit_jax.export.deploy import main, write_deploy
from vit_jax.export.onnx_file import read_onnx
from vit_jax.export.profiles import parse_batch
from vit_jax.export.to_tensorrt import build

from . import fake_tensorrt

onnx = pytest.importorskip("onnx", reason="needs the export extra", exc_type=ImportError)
PREPROCESSING = Preprocessing(4, 0.875, "bicubic", True, resize="timm", squash=True)
NAMES = ["rose", 'the "other" one', "água"]


def triton_message():
    """Triton's ModelConfig: the fields that are used here, as in its model_config.proto."""
    pytest.importorskip("google.protobuf", reason="comes with TensorFlow")
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(
        name="model_config.proto", package="t", syntax="proto3"
    )
    types = [
        "INVALID",
        "BOOL",
        "UINT8",
        "UINT16",
        "UINT32",
        "UINT64",
        "INT8",
        "INT16",
        "INT32",
        "INT64",
        "FP16",
        "FP32",
        "FP64",
        "STRING",
        "BF16",
    ]
    enums = {
        "DataType": {f"TYPE_{name}": number for number, name in enumerate(types)},
        "Kind": {"KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2},
    }
    for name, values in enums.items():
        enum = file.enum_type.add(name=name)
        for value, number in values.items():
            enum.value.add(name=value, number=number)
    messages = {
        "ModelConfig": "name 1 s, platform 2 s, max_batch_size 4 i, input 5 *Tensor, "
        "output 6 *Output, instance_group 7 *Group, dynamic_batching 11 Batching, "
        "optimization 12 Optimization, ensemble_scheduling 15 Ensemble, backend 17 s",
        "Tensor": "name 1 s, data_type 2 @DataType, dims 4 *l",
        "Output": "name 1 s, data_type 2 @DataType, dims 3 *l, label_filename 4 s",
        "Group": "count 2 i, kind 4 @Kind, profile 5 *s",
        "Batching": "preferred_batch_size 1 *i, max_queue_delay_microseconds 2 u",
        "Optimization": "cuda 3 Cuda, execution_accelerators 4 Accelerators",
        "Accelerators": "gpu_execution_accelerator 1 *Accelerator",
        "Accelerator": "name 1 s, parameters 2 map",
        "Ensemble": "step 1 *Step",
        "Step": "model_name 1 s, model_version 2 l, input_map 3 map, output_map 4 map",
        "Cuda": "graphs 1 b",
    }
    scalars = {"s": 9, "i": 5, "l": 3, "u": 4, "b": 8}
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for field in fields.split(", "):
            label, number, kind = field.split()
            if kind == "map":
                entry_name = f"{label.title().replace('_', '')}Entry"
                nested = message.nested_type.add(name=entry_name)
                nested.options.map_entry = True
                for i, part in enumerate(("key", "value"), 1):
                    nested.field.add(name=part, number=i, label=1, type=9)
                kind = f"*{name}.{entry_name}"
            repeated, kind = kind.startswith("*"), kind.lstrip("*")
            entry = message.field.add(name=label, number=int(number), label=3 if repeated else 1)
            if kind in scalars:
                entry.type = scalars[kind]
            else:
                entry.type = 14 if kind.startswith("@") else 11
                entry.type_name = f".t.{kind.lstrip('@')}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelConfig"))()


def read_config(path):
    message = triton_message()
    from google.protobuf import text_format

    return text_format.Parse(path.read_text(), message)


@pytest.fixture
def directory(tmp_path):
    """Writes DIR/model.onnx."""

    def make(*, dtype="FLOAT", weights="float32", batch="batch", external=False, names=NAMES):
        helper = onnx.helper
        graph = helper.make_graph(
            [helper.make_node("Softmax", ["images"], ["logits"])],
            "graph",
            [
                helper.make_tensor_value_info(
                    "images", getattr(onnx.TensorProto, dtype), [batch, 4, 4, 3]
                )
            ],
            [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [batch, 3])],
            [onnx.numpy_helper.from_array(np.ones((2, 2)).astype(weights), "weights")],
        )
        model = helper.make_model(graph)
        metadata = {"preprocessing": json.dumps(dataclasses.asdict(PREPROCESSING))}
        if names:
            metadata["class_names"] = json.dumps(names)
        helper.set_model_props(model, metadata)
        options = {
            "save_as_external_data": True,
            "size_threshold": 0,
            "location": "model.onnx.data",
        }
        onnx.save(model, tmp_path / "model.onnx", **options if external else {})
        return tmp_path

    return make


def test_an_onnx_file_becomes_a_model_of_triton(directory):
    target = write_deploy(directory(), batch="1,8:16:64", queue_delay_us=500, instances=2)
    model = target / "models/vit_onnx"
    config = read_config(model / "config.pbtxt")
    assert (config.name, config.platform) == ("vit_onnx", "onnxruntime_onnx")
    assert config.max_batch_size == 64
    (image,), (logits,) = config.input, config.output
    assert (image.name, image.data_type, list(image.dims)) == ("images", 11, [4, 4, 3])
    assert (logits.name, logits.data_type, list(logits.dims)) == ("logits", 11, [3])
    assert list(config.dynamic_batching.preferred_batch_size) == [1, 16, 64]
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert (config.instance_group[0].count, config.instance_group[0].kind) == (2, 1)
    assert (model / logits.label_filename).read_text(encoding="utf-8").splitlines() == NAMES
    assert (model / "1/model.onnx").read_bytes() == (target.parent / "model.onnx").read_bytes()
    assert not (target / "models/vit_tensorrt").exists()


def test_an_engine_becomes_a_second_model_with_all_its_profiles(directory, monkeypatch):
    root = directory()
    fake_tensorrt.install(monkeypatch, "11.4.0.106")
    build(root / "model.onnx", root, batch="1,2:4:8")
    target = write_deploy(root, batch="1:2:1024", name="flowers")
    model = target / "models/flowers_tensorrt"
    config = read_config(model / "config.pbtxt")
    assert (config.name, config.platform) == ("flowers_tensorrt", "tensorrt_plan")
    assert config.max_batch_size == 8
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert config.optimization.cuda.graphs
    assert (model / "1/model.plan").read_bytes() == (root / "model.engine").read_bytes()


def test_an_engine_of_trtexec_is_served_too_and_said_so(directory, capsys):
    root = directory()
    (root / "model.engine").write_bytes(b"built by the command of deploy/README.md")
    model = write_deploy(root, batch="1,2:4:8") / "models/vit_tensorrt"
    config = read_config(model / "config.pbtxt")
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 8)
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert (model / "1/model.plan").read_bytes() == (root / "model.engine").read_bytes()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "model.engine has no engine.json" in said and "1:1:1,2:4:8" in said
    # The README goes on giving the commands of every version: which it was nobody knows.
    assert "### TensorRT 8.6" in (root / "deploy/README.md").read_text()


def test_a_fixed_batch_is_no_dynamic_one(directory):
    target = write_deploy(directory(batch=3))
    config = read_config(target / "models/vit_onnx/config.pbtxt")
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [3, 4, 4, 3]
    assert not config.HasField("dynamic_batching")
    assert "--minShapes=images:3x4x4x3" in (target / "README.md").read_text()


def test_pixels_and_external_data_and_no_class_names(directory):
    target = write_deploy(directory(dtype="UINT8", external=True, names=None))
    told = json.loads(re.search("Preprocessing: `(.*)`", (target / "README.md").read_text())[1])
    assert told["resize"] == "timm" and told["squash"] is True
    model = target / "models/vit_onnx"
    config = read_config(model / "config.pbtxt")
    assert config.input[0].data_type == 2
    assert config.output[0].label_filename == ""
    assert not (model / "labels.txt").exists()
    assert (model / "1/model.onnx.data").is_file()
    onnx.checker.check_model(str(model / "1/model.onnx"))


def test_a_second_call_replaces_the_first(directory):
    root = directory()
    (write_deploy(root, name="old") / "stray").touch()
    target = write_deploy(root, name="new")
    names = sorted(path.name for path in (target / "models").iterdir())
    assert names == ["new", "new_decode", "new_onnx"]
    assert not (target / "stray").exists()
    assert sorted(path.name for path in root.iterdir()) == ["deploy", "model.onnx"]
    # Another user, the server's, can enter it.
    assert os.stat(target).st_mode & 0o555 == 0o555


def test_where_there_are_no_hard_links_files_are_copied(directory, monkeypatch):
    def no_links(*_arguments):
        raise OSError("links are not supported here")

    root = directory()
    monkeypatch.setattr(os, "link", no_links)
    copied = write_deploy(root) / "models/vit_onnx/1/model.onnx"
    assert copied.read_bytes() == (root / "model.onnx").read_bytes()


@pytest.mark.parametrize("name", ["", "a/b", ".."])
def test_a_name_that_is_no_directory_is_refused(directory, name):
    with pytest.raises(UserError, match="is not a directory name"):
        write_deploy(directory(), name=name)


def test_no_onnx_file_is_one_line_and_exit_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        command.run(lambda: main([str(tmp_path)]))
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/model.onnx cannot be read")
    assert list(tmp_path.iterdir()) == []


def test_the_readme_gives_commands_that_a_shell_reads_as_they_were_meant(directory, monkeypatch):
    root = directory(weights="float16")
    fake_tensorrt.install(monkeypatch, "10.16.1.11")
    build(root / "model.onnx", root, batch="1,2:4:8", workspace_mib=64, version_compatible=True)
    text = (write_deploy(root) / "README.md").read_text()
    blocks = re.findall(r"(?m)^    (\S.*)$", text.replace("\\\n", ""))
    commands = [shlex.split(block) for block in blocks]
    model, profiles = read_onnx(root / "model.onnx"), parse_batch("1,2:4:8")
    options = {"workspace_mib": 64, "version_compatible": True}
    assert trtexec_command("10.16.1.11", model, profiles, options) in commands
    assert polygraphy_command("10.16.1.11", model, profiles, options) in commands
    (own,) = [words for words in commands if words[:2] == ["python", "-m"]]
    assert own[:3] == ["python", "-m", "vit_jax.export.to_tensorrt"]
    assert own[3:] == [
        "model.onnx",
        "--output",
        ".",
        "--batch",
        "1:1:1,2:4:8",
        "--version_compatible",
        "--workspace_mib",
        "64",
    ]
    # Only the version that built the engine reproduces it.
    assert text.count("### TensorRT") == 1


def test_without_an_engine_there_are_commands_for_every_version(directory):
    text = (write_deploy(directory(weights="float16"), batch="1,2:4:8") / "README.md").read_text()
    assert re.findall(r"### TensorRT (\S+)", text) == ["11", "10", "8.6"]
    assert "one profile" in text
    assert '"image_size": 4' in text


def test_class_names_of_strangers_stay_in_their_lines(directory):
    names = ["a\nb", "\x1b[2J", "água"]
    labels = write_deploy(directory(names=names)) / "models/vit_onnx/labels.txt"
    assert labels.read_text().splitlines() == [r"a\nb", r"\x1b[2J", "água"]
