"""A real model, exported and served beside its weights: the same classes, and what it looks at."""

import dataclasses
import importlib.util
import io

import jax
import numpy as np
import pytest
from PIL import Image

import vit_jax
from vit_jax.checkpoints.pretrained import Pretrained
from vit_jax.data.images import preprocess
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.inference import VisionModel
from vit_jax.models import create_model

from . import tiny

pytest.importorskip("fastapi", reason="needs the serve extra: pip install '.[serve]'")

MODEL = {"architecture": "vit", "patch_size": 8, "hidden_size": 32, "num_layers": 2}
MODEL |= {"mlp_dim": 64, "num_heads": 2, "num_classes": 5}
PHOTO = tiny.encode(np.random.default_rng(3).integers(0, 256, (40, 30, 3), np.uint8), "JPEG")


def make_pretrained(size=16, seed=0):
    shapes = jax.eval_shape(
        create_model(MODEL).init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, size, size, 3), np.float32),
    )["params"]
    generator = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: generator.standard_normal(x.shape, np.float32) * np.float32(0.3), shapes
    )
    return Pretrained(params, MODEL, Preprocessing(size), tuple("abcde"), "softmax", "tiny")


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("onnxscript", reason="needs the export extra")
    from vit_jax.export import to_onnx
    from vit_jax.export.forward import make_forward
    from vit_jax.export.to_tf import can_serialize_graphs

    converter = "jax2tf" if can_serialize_graphs() else "jax2onnx"
    package = "tf2onnx" if converter == "jax2tf" else converter
    if not importlib.util.find_spec(package):
        pytest.skip(f"needs {package}, see docs/deployment.md")
    to_onnx.save(to_onnx.to_model(make_forward(make_pretrained()), converter), tmp_path)
    return tmp_path


def test_classes_and_attention_are_those_of_the_weights(folder, start_app):
    from vit_jax.serving.attention import Attention
    from vit_jax.serving.served import load

    pretrained = make_pretrained()
    client = start_app(attention=Attention(pretrained, load(folder)))
    photo = folder / "photo.jpg"
    photo.write_bytes(PHOTO)

    vit = VisionModel(pretrained, 1)
    (expected,) = vit.predict(photo)
    (result,) = client.post("/predict", content=PHOTO).json()["results"]
    assert [x["label"] for x in result["predictions"]] == [x["label"] for x in expected]
    for found, wanted in zip(result["predictions"], expected, strict=True):
        np.testing.assert_allclose(found["probability"], wanted["probability"], rtol=1e-4)

    answer = client.post("/attention", content=PHOTO)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    picture = np.asarray(Image.open(io.BytesIO(answer.content))).astype(np.float64)
    seen = np.asarray(Image.open(photo).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR))
    mask = vit.attention(photo)[0]
    # PIL's kernel widens where the image shrinks, and ours does not.
    assert np.abs(picture.sum() / (seen * mask[..., None]).sum() - 1) < 0.1
    assert client.get("/model").json()["attention"]
    assert 'id="attention"' in client.get("/").text

    for content, status, message in ((b"junk", 422, "not an image"), (b"", 400, "empty")):
        refused = client.post("/attention", content=content)
        assert refused.status_code == status and message in refused.json()["error"]


def test_weights_are_served_without_an_export(tmp_path, monkeypatch):
    pytest.importorskip("httpx2", reason="needs the test extra", exc_type=ImportError)
    from fastapi.testclient import TestClient

    from vit_jax.checkpoints.save import save_pretrained
    from vit_jax.serving import __main__, server

    save_pretrained(make_pretrained(), tmp_path / "tiny.npz", "official")
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(PHOTO)
    found = {}

    def serve(app, *_):
        with TestClient(app) as client:
            found["classes"] = client.post("/predict", content=PHOTO).json()
            found["model"] = client.get("/model").text
            found["attention"] = client.post("/attention", content=PHOTO)

    monkeypatch.setattr(server, "serve", serve)
    flags = ["--model", str(tmp_path / "tiny.npz"), "--port", "0", "--max_batch", "3"]
    assert __main__.main(flags) == 0
    (expected,) = vit_jax.load(tmp_path / "tiny.npz").predict(photo)
    (result,) = found["classes"]["results"]
    assert [x["label"] for x in result["predictions"]] == [x["label"] for x in expected]
    for one, other in zip(result["predictions"], expected, strict=True):
        np.testing.assert_allclose(one["probability"], other["probability"], rtol=1e-4)
    assert found["attention"].headers["content-type"] == "image/png"
    assert "tiny.npz" in found["model"] and str(tmp_path) not in found["model"]

    with pytest.raises(UserError, match="is no export: leave out --checkpoint"):
        __main__.main([*flags, "--checkpoint", "B_16"])
    with pytest.raises(UserError, match="--model nowhere does not exist: name the folder that vit"):
        __main__.main(["--model", "nowhere"])
    with pytest.raises(UserError, match="--device cuda is for ONNX files"):
        __main__.main([*flags, "--device", "cuda"])


def test_weights_of_another_model_are_refused(folder):
    from vit_jax.serving.attention import Attention
    from vit_jax.serving.served import load

    served = load(folder)
    deeper = dataclasses.replace(make_pretrained(), model={**MODEL, "num_layers": 3})
    with pytest.raises(UserError, match="is not what .* was exported from: num_layers differ"):
        Attention(deeper, served)
    with pytest.raises(UserError, match="preprocessing differ"):
        Attention(make_pretrained(24), served)


@pytest.mark.parametrize("pixels", ["preprocessed", "uint8", "raw"])
def test_other_weights_of_the_same_architecture_are_refused(pixels):
    from vit_jax.serving.attention import Attention
    from vit_jax.serving.weights import from_weights

    rule = Preprocessing(16, 0.5)
    pretrained = dataclasses.replace(make_pretrained(), preprocessing=rule)
    served = from_weights(pretrained, "tiny", 1)
    if pixels != "preprocessed":

        def predict(images):
            assert images.dtype == np.uint8
            if is_raw:
                images = np.stack([preprocess(image, rule) for image in images])
            return model.logits(images)

        model, is_raw = VisionModel(pretrained, 1), pixels == "raw"
        served = dataclasses.replace(served, takes_pixels=True, takes_raw=is_raw, predict=predict)
    Attention(pretrained, served)
    other = dataclasses.replace(make_pretrained(seed=1), preprocessing=rule)
    with pytest.raises(UserError, match="the weights differ, as the logits of an image do"):
        Attention(other, served)
