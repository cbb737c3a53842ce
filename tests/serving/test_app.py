"""The routes: what is answered is what the model says, and the mistakes of one harm nobody else."""

import base64
import contextlib
import hashlib
import io
import json
import logging
import re
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from vit_jax.data.image_files import read_view
from vit_jax.errors import UserError
from vit_jax.evaluation.ranking import top
from vit_jax.export import runtime

from ..webpages import Page
from . import tiny

pytest.importorskip("fastapi", reason="needs the serve extra: pip install '.[serve]'")
from vit_jax.serving import app, limits, served

PNG = {"Content-Type": "image/png"}


def post(client, image, path="/predict", **options):
    return client.post(path, content=tiny.encode(image), headers=PNG, **options)


class TestAnswers:
    def test_classes_are_those_of_an_independent_model(self, client):
        for seed in range(5):
            tiny.check(post(client, tiny.pixels(seed)), tiny.pixels(seed))

    def test_a_photograph_is_seen_as_by_predict(self, client, folder, tmp_path):
        image = np.random.default_rng(1).integers(0, 256, (61, 47, 3), np.uint8)
        path = tmp_path / "photo.jpg"
        path.write_bytes(tiny.encode(image, "JPEG"))
        (result,) = client.post("/predict", content=path.read_bytes()).json()["results"]
        with runtime.load(folder / "model.onnx") as model:
            row = model.predict(read_view(str(path), model.preprocessing)[None])[0]
            assert result["predictions"] == top(row, model.class_names, "softmax", 5)
        assert result["file"] is None

    def test_several_files_of_a_form_have_their_names_and_their_classes(self, client):
        files = [("image", (f"{i}.png", tiny.encode(tiny.pixels(i)))) for i in range(4)]
        results = client.post("/predict", files=files).json()["results"]
        assert [result["file"] for result in results] == [f"{i}.png" for i in range(4)]
        for seed, result in enumerate(results):
            tiny.check_classes(result["predictions"], tiny.pixels(seed))

    def test_of_several_files_one_that_is_none_has_an_error(self, client):
        files = [
            ("a", ("good.png", tiny.encode(tiny.pixels(0)))),
            ("b", ("bad\x1b[2J.png", b"junk")),
        ]
        good, bad = client.post("/predict", files=files).json()["results"]
        tiny.check_classes(good["predictions"], tiny.pixels(0))
        assert "is not an image" in bad["error"] and "\x1b" not in bad["file"] + bad["error"]

    @pytest.mark.parametrize("top_k", [1, 3, 5, 100])
    def test_top_k_says_how_many(self, client, top_k):
        (result,) = post(client, tiny.pixels(0), f"/predict?top_k={top_k}").json()["results"]
        assert len(result["predictions"]) == min(top_k, tiny.CLASSES)

    def test_logits_are_those_of_the_model_to_the_bit(self, client, folder):
        (result,) = post(client, tiny.pixels(3), "/logits").json()["results"]
        np.testing.assert_allclose(result["logits"], tiny.logits(tiny.pixels(3)), rtol=1e-4)
        with runtime.load(folder / "model.onnx") as model:
            image = io.BytesIO(tiny.encode(tiny.pixels(3)))
            view = read_view("a.png", model.preprocessing, image.getvalue())
            expected = model.predict(view[None])[0]
        assert np.array_equal(np.float32(result["logits"]), expected)

    def test_a_sigmoid_and_probabilities_are_taken_as_they_are(self, folder, start_app):
        tiny.save_onnx(folder / "model.onnx", loss="sigmoid")
        (result,) = post(start_app(), tiny.pixels(0)).json()["results"]
        for each in result["predictions"]:
            logit = tiny.logits(tiny.pixels(0))[each["index"]]
            np.testing.assert_allclose(each["probability"], 1 / (1 + np.exp(-logit)), rtol=1e-4)
        tiny.save_onnx(folder / "model.onnx", output="probabilities")
        client = start_app()
        (result,) = post(client, tiny.pixels(0)).json()["results"]
        (raw,) = post(client, tiny.pixels(0), "/probabilities").json()["results"]
        for each in result["predictions"]:
            assert each["probability"] == raw["probabilities"][each["index"]]

    def test_features_have_a_route_of_their_own_and_no_classes(self, folder, start_app):
        tiny.save_onnx(folder / "model.onnx", output="features", class_names=None)
        client = start_app()
        (result,) = post(client, tiny.pixels(0), "/features").json()["results"]
        np.testing.assert_allclose(result["features"], tiny.logits(tiny.pixels(0)), rtol=1e-4)
        answer = post(client, tiny.pixels(0))
        assert answer.status_code == 404
        assert answer.json()["error"] == "the model gives features, no classes: use POST /features"
        assert "no classes" in client.get("/").text

    def test_a_graph_of_pixels_gets_pixels(self, folder, start_app):
        tiny.save_onnx(folder / "model.onnx", dtype="UINT8")
        (result,) = post(start_app(), tiny.pixels(0), "/logits").json()["results"]
        expected = tiny.pixels(0).reshape(-1).astype(np.float64) @ tiny.WEIGHTS
        np.testing.assert_allclose(result["logits"], expected, rtol=1e-4)

    def test_a_graph_that_prepares_images_itself_gets_them_as_they_are(self, folder, start_app):
        tiny.save_raw_onnx(folder / "model.onnx")
        client = start_app()
        assert client.get("/model").json()["input"]["height"] is None
        assert "up to 1 image at a time" in client.get("/").text
        shapes = (8, 8), (61, 47), (1, 1), (3, 200)
        images = [
            np.random.default_rng(i).integers(0, 256, (*shape, 3), np.uint8)
            for i, shape in enumerate(shapes)
        ]
        files = [("image", (f"{i}.png", tiny.encode(x))) for i, x in enumerate(images)]
        files += [("image", ("bad.png", b"junk"))]
        files += [("image", ("long.png", tiny.encode(np.zeros((1, 2**14 + 1, 3), np.uint8))))]
        *results, bad, long = client.post("/logits", files=files).json()["results"]
        for image, result in zip(images, results, strict=True):
            expected = image.mean((0, 1)) @ tiny.WEIGHTS[:3].astype(np.float64)
            np.testing.assert_allclose(result["logits"], expected, rtol=1e-4)
        assert "is not an image" in bad["error"] and "a side of 16385 pixels" in long["error"]
        assert "vit_jax_batch_images_count 4.0" in client.get("/metrics").text

    def test_the_model_is_described(self, client, folder):
        found = client.get("/model").json()
        assert found["name"] == "tiny" and found["class_names"] == tiny.NAMES
        assert found["input"] == {"height": 8, "width": 8, "channels": 3, "dtype": "float32"}
        assert found["preprocessing"]["mean"] == [0.1, 0.2, 0.3]
        digest = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
        assert found["sha256"] == {"model.onnx": digest}
        assert found["output_shape"] == [5] and not found["attention"]

    def test_health_and_metrics_tell_what_happens(self, client):
        assert client.get("/health").json() == {"live": True, "ready": True}
        post(client, tiny.pixels(0))
        client.get("/nowhere/at/all")
        text = client.get("/metrics").text
        assert 'vit_jax_requests_total{path="/predict",status="200"} 1.0' in text
        assert 'vit_jax_requests_total{path="other",status="404"} 1.0' in text
        assert "vit_jax_batch_images_count 1.0" in text
        assert "process_resident_memory_bytes" in text

    def test_the_description_of_the_routes_is_there_and_its_pages_are_not(self, client):
        assert "/predict" in client.get("/openapi.json").json()["paths"]
        assert client.get("/docs").status_code == client.get("/redoc").status_code == 404


class TestBatches:
    def test_requests_share_batches_and_have_their_own_answers(self, start_app):
        sizes, gate = [], threading.Event()

        def changes(served):
            def predict(images):
                sizes.append(len(images))
                assert gate.wait(30)
                return served.predict(images)

            return {"predict": predict}

        client = start_app(changes, max_batch=4)
        with ThreadPoolExecutor(9) as pool:
            answers = [pool.submit(post, client, tiny.pixels(seed)) for seed in range(9)]
            wait_for(lambda: in_work(client) == 9)
            gate.set()
            for seed, answer in enumerate(answers):
                tiny.check(answer.result(), tiny.pixels(seed))
        assert sum(sizes) == 9 and len(sizes) < 6 and max(sizes) <= 4

    def test_a_full_queue_turns_away_and_answers_the_others(self, start_app):
        gate = threading.Event()

        def changes(served):
            def predict(images):
                assert gate.wait(30)
                return served.predict(images)

            return {"predict": predict}

        client = start_app(changes, max_queue=2)
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(post, client, tiny.pixels(seed)) for seed in range(2)]
            wait_for(lambda: in_work(client) == 2)
            refused = post(client, tiny.pixels(2))
            assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
            assert "the queue is full" in refused.json()["error"]
            health = client.get("/health")
            assert (health.status_code, health.json()) == (503, {"live": True, "ready": False})
            gate.set()
            for seed, answer in enumerate(answers):
                tiny.check(answer.result(), tiny.pixels(seed))
        tiny.check(post(client, tiny.pixels(2)), tiny.pixels(2))

    def test_a_model_that_fails_once_goes_on(self, start_app):
        calls = []

        def changes(served):
            def predict(images):
                calls.append(len(images))
                if len(calls) == 1:
                    raise RuntimeError("out of memory at /secret/path")
                rows = served.predict(images)
                return rows * np.nan if len(calls) == 2 else rows

            return {"predict": predict}

        client = start_app(changes)
        failed = post(client, tiny.pixels(0))
        assert failed.status_code == 500 and "secret" not in failed.text
        failed = post(client, tiny.pixels(0))
        assert failed.status_code == 500 and "not finite" in failed.json()["error"]
        tiny.check(post(client, tiny.pixels(0)), tiny.pixels(0))

    def test_one_image_that_is_too_much_for_the_model_is_its_own_files(self, start_app, caplog):
        def changes(served):
            def predict(images):
                rows = served.predict(images)
                rows[(images > 0).all((1, 2, 3))] = np.nan
                return rows

            return {"predict": predict}

        white = np.full((8, 8, 3), 255, np.uint8)
        files = [
            (x, (f"{x}.png", tiny.encode(y))) for x, y in (("a", tiny.pixels(0)), ("b", white))
        ]
        client = start_app(changes)
        # Elsewhere absl silences the root.
        caplog.set_level(logging.ERROR, "vit_jax.serving.app")
        good, bad = client.post("/predict", files=files).json()["results"]
        tiny.check_classes(good["predictions"], tiny.pixels(0))
        assert bad == {
            "file": "b.png",
            "error": "the model gives outputs that are not finite: mend it",
        }
        assert "not finite" in caplog.text and "b.png" not in caplog.text
        files[0] = ("a", ("a.png", b"junk"))
        assert client.post("/predict", files=files).status_code == 500

    def test_few_images_are_decoded_while_a_model_that_prepares_them_is_busy(
        self, folder, start_app, monkeypatch
    ):
        opened, most, gate, one = [], [], threading.Event(), threading.Lock()

        @contextlib.contextmanager
        def open_image(name, *args, **options):
            with real(name, *args, **options) as image:
                opened.append(name)
                most.append(len(opened))
                yield image
                opened.remove(name)

        def changes(served):
            def predict(images):
                assert gate.wait(30)
                assert one.acquire(blocking=False), "two threads use the model"
                rows = served.predict(images)
                one.release()
                return rows

            return {"predict": predict}

        real = served.open_image
        monkeypatch.setattr(served, "open_image", open_image)
        tiny.save_raw_onnx(folder / "model.onnx")
        client = start_app(changes)
        files = [("image", (f"{i}.png", tiny.encode(tiny.pixels(i)))) for i in range(20)]
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.post, "/predict", files=files)
            wait_for(lambda: opened)
            time.sleep(0.3)
            gate.set()
            assert len(answer.result().json()["results"]) == 20
        assert len(most) == 20 and max(most) <= 4

    def test_a_failure_gives_its_room_back_when_all_of_its_images_have_ended(
        self, start_app, monkeypatch
    ):
        gate = threading.Event()

        def changes(served):
            def predict(images):
                assert gate.wait(30)
                return served.predict(images)

            return {"predict": predict}

        def read(name, *args):
            if name == "bad":
                raise RuntimeError("no memory")
            return read_view(name, *args)

        monkeypatch.setattr(served, "read_view", read)
        client = start_app(changes)
        files = [("a", ("good", IMAGE)), ("b", ("bad", IMAGE))]
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.post, "/predict", files=files)
            wait_for(lambda: in_work(client) == 2)
            time.sleep(0.3)
            assert in_work(client) == 2 and not answer.done()
            gate.set()
            assert answer.result().status_code == 500
        assert in_work(client) == 0


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def in_work(client):
    (count,) = re.findall(r"^vit_jax_images_in_work (\S+)", client.get("/metrics").text, re.M)
    return float(count)


def bomb():
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""

    def chunk(kind, data):
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = (60_000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


IMAGE = tiny.encode(tiny.pixels(0))
JPEG = tiny.encode(np.full((64, 64, 3), 99, np.uint8), "JPEG")
FORM = {"Content-Type": "multipart/form-data; boundary=x"}
PART = b'--x\r\nContent-Disposition: form-data; name="a"%b\r\n\r\n%b\r\n--x--\r\n'


def form(name, content=IMAGE):
    return {"content": PART % (name, content), "headers": FORM}


# What is sent, and what of the answer is expected.
BAD = {
    "not an image": ("POST", "/predict", {"content": b"hello"}, 422, "is not an image"),
    "HTML": ("POST", "/predict", {"content": b"<svg onload=alert(1)>"}, 422, "is not an image"),
    "a bomb": ("POST", "/predict", {"content": bomb()}, 422, "more than 178,956,970 pixels"),
    "cut off": ("POST", "/predict", {"content": JPEG[:-200]}, 422, "is damaged"),
    "empty": ("POST", "/predict", {"content": b""}, 400, "the body is empty"),
    "too large": ("POST", "/predict", {"content": b"x" * 200_001}, 413, "200,001 bytes"),
    "too large, in parts": (
        *("POST", "/predict", {"content": iter([b"x" * 50_000] * 9)}, 413),
        "more than 200,000 bytes",
    ),
    "JSON": ("POST", "/predict", {"json": {"image": "a"}}, 415, "'application/json' is no image"),
    "text": ("POST", "/predict", {"data": {"image": "a"}}, 415, "is no image"),
    "compressed": (
        *("POST", "/predict", {"content": IMAGE, "headers": {"Content-Encoding": "gzip"}}, 415),
        "'gzip': send the image as it is",
    ),
    "a form without a boundary": (
        *("POST", "/predict"),
        {"content": IMAGE, "headers": {"Content-Type": "multipart/form-data"}},
        *(400, "Missing boundary"),
    ),
    "a form of a charset that is none": (
        *("POST", "/predict"),
        {
            "content": PART % (b'; filename="a.png"', IMAGE),
            "headers": {"Content-Type": f"{FORM['Content-Type']}; charset=undefined"},
        },
        *(400, "the form cannot be read"),
    ),
    "a form of junk": ("POST", "/predict", {"content": IMAGE, "headers": FORM}, 400, "the form"),
    "a form without a file": ("POST", "/predict", form(b""), 400, "is text, not a file"),
    "a form of nothing": (
        *("POST", "/predict", {"content": b"--x--\r\n", "headers": FORM}, 400),
        "has no file",
    ),
    "a form with an empty file": (
        *("POST", "/predict", form(b'; filename="a.png"', b""), 422),
        "is an empty file",
    ),
    "too many files": (
        *("POST", "/predict", {"files": [("a", ("a", IMAGE))] * 4}, 400),
        "at most 3 files",
    ),
    "a name of HTML": (
        *("POST", "/predict", form(b'; filename="<b>\x1b.png"', b"junk"), 422),
        r"<b>\\x1b.png is not an image",
    ),
    "top_k of 0": ("POST", "/predict?top_k=0", {}, 400, "top_k is '0'"),
    "top_k of -1": ("POST", "/predict?top_k=-1", {}, 400, "top_k is '-1'"),
    "top_k of letters": ("POST", "/predict?top_k=abc", {}, 400, "whole number of at least 1"),
    "top_k of many digits": ("POST", f"/predict?top_k={'9' * 5000}", {}, 400, "top_k is '999"),
    "top_k twice": ("POST", "/predict?top_k=1&top_k=2", {}, 400, "given 2 times"),
    "another parameter": ("POST", "/predict?topk=1", {}, 400, "'topk' is unknown: did you mean"),
    "a parameter of none": ("POST", "/logits?a=1", {}, 400, "'a' is unknown: use none"),
    "another method": ("GET", "/predict", {}, 405, "GET is not for /predict: use POST"),
    "a method of its own": ("BREW", "/", {}, 405, "BREW is not for /: use GET"),
    "another path": ("POST", "/classify", {}, 404, "/classify is not here: use one of /"),
    "a path that climbs": ("GET", "/..%2f..%2fetc%2fpasswd", {}, 404, "is not here"),
    "a path of HTML": ("GET", "/%3Cscript%3E%1b", {}, 404, "is not here"),
    "a slash too many": ("GET", "/model/", {}, 404, "/model/ is not here"),
    "a host that is none": ("GET", "/x", {"headers": {"Host": "["}}, 404, "/x is not here"),
    "attention without weights": ("POST", "/attention", {"content": IMAGE}, 404, "--checkpoint"),
}


class TestBadRequests:
    @pytest.fixture
    def client(self, start_app):
        return start_app(max_bytes=200_000, max_files=3)

    @pytest.mark.parametrize("name", BAD)
    def test_it_is_one_line_of_json_and_the_next_is_answered(self, client, name):
        method, path, options, status, message = BAD[name]
        options = dict(options)
        if method == "POST" and "content" not in options and len(options) == 0:
            options["content"] = IMAGE
        answer = client.request(method, path, **options)
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert list(answer.json()) == ["error"]
        error = answer.json()["error"]
        assert message.replace("\\\\", "\\") in error
        assert error.isprintable() and len(error) < 500
        tiny.check(post(client, tiny.pixels(0)), tiny.pixels(0))

    def test_there_are_twenty_kinds(self):
        assert len(BAD) >= 20

    def test_a_model_whose_single_answer_is_too_large_is_refused(self, start_app, monkeypatch):
        monkeypatch.setattr(app, "_MOST_VALUES", tiny.CLASSES - 1)
        with pytest.raises(UserError, match=f"gives {tiny.CLASSES} numbers an image, and an answ"):
            start_app()

    def test_large_answers_are_of_few_files(self, start_app, monkeypatch):
        monkeypatch.setattr(app, "_MOST_VALUES", 2 * tiny.CLASSES)
        client = start_app()
        files = [("a", ("a.png", IMAGE))] * 3
        refused = client.post("/logits", files=files)
        assert refused.status_code == 400 and "at most 2 files" in refused.json()["error"]
        assert client.post("/logits", files=files[:2]).status_code == 200
        assert client.post("/predict", files=files).status_code == 200

    def test_the_log_has_no_text_of_a_form(self, client, caplog):
        client.post("/predict", content=PART % (b"", b"x") + b"--x\x1b[2J", headers=FORM)
        client.post("/predict", content=b"--x%$?!\r\n", headers=FORM)
        assert not [x for x in caplog.records if x.name.startswith("python_multipart")]

    def test_too_many_requests_at_a_time_are_turned_away_in_json(self, client, monkeypatch):
        monkeypatch.setattr(limits, "REQUESTS", 0)
        refused = post(client, tiny.pixels(0))
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert refused.headers["x-content-type-options"] == "nosniff"
        assert "requests at a time" in refused.json()["error"]
        monkeypatch.undo()
        tiny.check(post(client, tiny.pixels(0)), tiny.pixels(0))
        assert 'path="/predict",status="503"} 1.0' in client.get("/metrics").text

    def test_too_many_bytes_at_a_time_are_turned_away(self, client):
        client.app.held = 16 * 200_000
        refused = post(client, tiny.pixels(0))
        assert refused.status_code == 503 and "too many uploads" in refused.json()["error"]
        client.app.held = 0
        tiny.check(post(client, tiny.pixels(0)), tiny.pixels(0))
        assert client.app.held == 0


class TestPage:
    @pytest.fixture
    def page(self, folder, start_app, tmp_path):
        def get(**metadata):
            tiny.save_onnx(folder / "model.onnx", **metadata)
            answer = start_app().get("/")
            path = tmp_path / "page.html"
            path.write_text(answer.text, encoding="utf-8")
            return answer, Page(path)

        return get

    def test_it_loads_nothing_from_elsewhere(self, page):
        answer, read = page()
        assert not read.all("link") and "@import" not in answer.text
        assert not [x for x in read.all("script") + read.all("img") if "src" in x]
        assert "http" not in answer.text.replace("http-equiv", "")

    def test_its_policy_allows_its_own_script_and_style_alone(self, page):
        answer, _ = page()
        policy = dict(
            x.split(" ", 1) for x in answer.headers["content-security-policy"].split("; ")
        )
        assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert policy["connect-src"] == "'self'"
        for kind in ("script", "style"):
            (text,) = re.findall(f"<{kind}>(.*?)</{kind}>", answer.text, re.S)
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert policy[f"{kind}-src"] == f"'sha256-{digest}'"

    def test_what_the_model_says_of_itself_stays_text(self, page):
        hostile = "<img src=x onerror=alert(1)>\x1b</script>"
        answer, read = page(source=hostile)
        assert len(read.all("script")) == 1 and "\x1b" not in answer.text
        assert not [image for image in read.all("img") if "onerror" in image]
        assert "<img src=x onerror=alert(1)>" in read.text

    def test_classes_stay_where_attention_fails(self, page):
        answer, _ = page()
        classify, look = re.findall(
            r"^async function (?:classify|look)\(.*?^}", answer.text, re.M | re.S
        )
        assert "/attention" not in classify and "/attention" in look
        assert "catch" in look and "hidden" not in look

    def test_without_weights_it_says_what_attention_needs(self, page):
        _, read = page()
        assert "start the server with --checkpoint" in read.text


def test_an_image_turned_by_its_camera_is_upright(client):
    image = tiny.pixels(4)
    data = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(np.ascontiguousarray(image[::-1, ::-1])).save(data, "PNG", exif=exif)
    tiny.check(client.post("/predict", content=data.getvalue()), image)


def test_many_pictures_are_looked_at_one_by_one_and_no_more_than_eight(start_app):
    gate = threading.Event()

    class Attention:
        def draw(self, _, encoded):
            assert gate.wait(30)
            return encoded

    client = start_app(attention=Attention())
    with ThreadPoolExecutor(9) as pool:
        answers = [pool.submit(post, client, tiny.pixels(0), "/attention") for _ in range(9)]
        wait_for(lambda: any(answer.done() for answer in answers))
        gate.set()
    assert sorted(answer.result().status_code for answer in answers) == [200] * 8 + [503]


def test_answers_are_json_that_anything_reads(client):
    text = post(client, tiny.pixels(0)).text
    assert json.loads(text)["results"][0]["predictions"][0]["probability"] > 0
    assert "NaN" not in text
