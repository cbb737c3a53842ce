import dataclasses
import fcntl
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from vit_jax.doctor import reference

from .serving import tiny

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODEL = "ViT-1-64-128/16"
SMALL = [MODEL, "2", "--image_size", "32", "--rounds", "3", "--seconds", "0"]
LAST_LINE = r"ours/official (\d+\.\d{3}) ours/timm (\d+\.\d{3}|not measured)"
# What a leased GPU does not have.
ABSENT = ("tensorflow", "tensorflow_datasets", "ml_collections", "clu", "grain")


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The benchmarks import each other as scripts do."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def benchmark(name):
    return importlib.import_module(name)


@pytest.fixture
def load():
    return benchmark("peers").workload(MODEL, 2, image_size=32, dtype="float32", overrides={})


@pytest.mark.parametrize("name", ["train_step", "inference"])
def test_models_are_compared(name, tmp_path, capsys):
    path = tmp_path / "found.json"
    benchmark(name).main([*SMALL, "--peers", "official", "timm", "--output", str(path)])
    lines = capsys.readouterr().out.splitlines()
    match = re.fullmatch(LAST_LINE, lines[-1])
    assert match, lines[-1]
    found = json.loads(path.read_text())
    assert found["machine"]["versions"]["jax"] == jax.__version__
    assert found["matrix_rate"] > 0
    ours, theirs = (found["candidates"][name] for name in ("ours", "official"))
    # The ratio is that of turns of the same round.
    ratios = np.divide(ours["turns"], theirs["turns"])
    assert float(match[1]) == pytest.approx(np.median(ratios), abs=1e-3)
    assert ours["images_per_second"] == pytest.approx(2 / np.median(ours["turns"]))
    if importlib.util.find_spec("timm") is None:
        assert match[2] == "not measured"
        assert "No module named" in found["candidates"]["timm"]["unavailable"]
    else:
        assert found["candidates"]["timm"]["errors"]


@pytest.mark.versions
@pytest.mark.parametrize("peer", ["timm", "Hugging Face"])
def test_peers_of_pytorch_compute_the_same(peer, load):
    pytest.importorskip("torch")
    pytest.importorskip("timm" if peer == "timm" else "transformers")
    train_step, inference = benchmark("train_step"), benchmark("inference")
    predictor = inference.TorchPredictor(peer, load)
    predictor(1)
    assert benchmark("peers").relative_error(predictor.logits(), exact_logits(load)) < 1e-5
    errors = train_step.Check(load)(peer, train_step.TorchTrainer(peer, load), 1e-4)
    assert errors["gradients"] < 1e-4


def exact_logits(load):
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), load.tree)
    return reference.logits(params, load.images.astype(np.float64))[0]


def test_the_official_style_is_the_paper_s_model(load):
    inference, peers = benchmark("inference"), benchmark("peers")
    assert peers.relative_error(inference.reference(load), exact_logits(load)) < 1e-5


def test_gradients_of_parts_are_those_of_the_batch(load, monkeypatch):
    train_step, peers = benchmark("train_step"), benchmark("peers")
    loss, gradients = train_step.reference(load)
    monkeypatch.setattr(train_step, "REFERENCE_BATCH", 1)
    in_parts = train_step.reference(load)
    assert in_parts[0] == pytest.approx(loss, rel=1e-5)
    assert peers.gradient_error(in_parts[1], gradients) < 1e-5
    exact, exact_gradients = reference.loss(
        jax.tree.map(lambda x: np.asarray(x, np.float64), load.tree),
        load.images.astype(np.float64),
        load.labels,
    )
    assert loss == pytest.approx(exact, rel=1e-5)
    flat = flatten_dict(exact_gradients(), sep="/")
    assert peers.gradient_error(gradients, flat) < 1e-4


def with_a_kernel_one_percent_larger(params):
    (name,) = (name for name in params if name.endswith("Dense_0/kernel"))
    return {**params, name: 1.01 * params[name]}


def with_queries_and_keys_swapped(params):
    swap = {"query": "key", "key": "query"}
    names = {name: "/".join(swap.get(x, x) for x in name.split("/")) for name in params}
    return {name: params[other] for name, other in names.items()}


@pytest.mark.parametrize("name", ["train_step", "inference"])
@pytest.mark.parametrize(
    "perturb", [with_a_kernel_one_percent_larger, with_queries_and_keys_swapped]
)
def test_a_peer_with_other_weights_is_refused(name, perturb, monkeypatch):
    module, peers = benchmark(name), benchmark("peers")
    builders = module.TRAINERS if name == "train_step" else module.PREDICTORS
    original = builders["official"]

    def perturbed(load):
        return original(dataclasses.replace(load, params=perturb(load.params)))

    monkeypatch.setitem(builders, "official", perturbed)
    with pytest.raises(peers.Wrong, match="official: "):
        module.main([*SMALL, "--peers", "official"])


def test_a_peer_with_another_update_is_refused(monkeypatch):
    train_step, peers = benchmark("train_step"), benchmark("peers")
    original = train_step.official

    def slower(load):
        monkeypatch.setattr(train_step, "LEARNING_RATE", 0.9e-4)
        return original(load)

    monkeypatch.setitem(train_step.TRAINERS, "official", slower)
    with pytest.raises(peers.Wrong, match="official: the loss after an update"):
        train_step.main([*SMALL, "--peers", "official"])


def test_turns_begin_with_another_each_round_and_end_in_time(monkeypatch):
    paired = benchmark("paired")
    monkeypatch.setattr(paired, "PAUSE_SECONDS", 0)
    now, order = [0.0], []
    monkeypatch.setattr(paired.time, "perf_counter", lambda: now[0])

    def candidate(name, seconds):
        def repeat(calls):
            now[0] += seconds * calls
            order.append((name, calls))

        return repeat

    candidates = {"a": candidate("a", 0.04), "b": candidate("b", 1.0)}
    times = paired.time_in_turns(candidates, rounds=50, seconds=4.5)
    # Of a three calls make a tenth of a second; a round takes 1.12 s, and after 4.5 s none begins.
    assert order[4:] == [("a", 3), ("b", 1), ("b", 1), ("a", 3)] * 2 + [("a", 3), ("b", 1)]
    assert times == {"a": pytest.approx([0.04] * 5), "b": pytest.approx([1.0] * 5)}


def test_ratios_are_of_one_round():
    paired = benchmark("paired")
    # The machine slows down in the middle, for both.
    assert paired.ratio([1.0, 10.0, 100.0], [2.0, 20.0, 200.0]) == (0.5, 0.5, 0.5)
    assert paired.summary([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)


def test_of_timm_the_faster_counts():
    ratios = {"ours": 1.0, "official": 0.8, "timm": 0.7, "timm, torch.compile": 0.95}
    found = {name: {"ours_to_it": {"median": ratio}} for name, ratio in ratios.items()}
    assert benchmark("peers").last_line(found) == "ours/official 0.800 ours/timm 0.950"


@pytest.fixture
def photographs(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "photographs"
    (folder / "below").mkdir(parents=True)
    for i in range(6):
        colors = rng.integers(0, 256, (3, 4, 3), np.uint8)
        picture = Image.fromarray(colors).resize((80, 60), Image.Resampling.BILINEAR)
        picture.save(folder / ("below" if i % 2 else ".") / f"{i}.jpg", quality=90)
    return folder


def test_pipelines_are_compared(photographs, tmp_path, capsys):
    path = tmp_path / "found.json"
    words = [str(photographs), "--image_size", "32", "--batch", "4", "--batches", "12"]
    words += ["--peers", "plain tf.data", "--rounds", "3", "--output", str(path)]
    benchmark("input_pipeline").main(words)
    last = capsys.readouterr().out.splitlines()[-1]
    found = json.loads(path.read_text())
    assert found["images"] == 6
    turns = [found["candidates"][x]["seconds_of_a_batch"] for x in ("plain tf.data", "ours")]
    ratio = np.median(np.divide(*turns))
    assert last == f"ours/plain {ratio:.2f}"


def test_a_pipeline_of_another_range_is_refused(photographs, monkeypatch):
    module = benchmark("input_pipeline")

    def darker(load):
        begin = module.ours(load)
        return lambda turn: ((x // 2, labels) for x, labels in begin(turn))

    monkeypatch.setitem(module.PIPELINES, "plain tf.data", darker)
    words = [str(photographs), "--image_size", "32", "--batch", "4", "--batches", "4"]
    with pytest.raises(AssertionError, match="plain tf.data: the (mean|std)"):
        module.main([*words, "--peers", "plain tf.data"])


def test_moments_of_a_command_are_timed(tmp_path):
    startup = benchmark("startup")
    script = "import time; print('a', flush=True); time.sleep(0.5); print('step  1/9', flush=True)"
    words = [sys.executable, "-c", f"{script}; time.sleep(60)"]
    cache = str(tmp_path)
    found = startup.time_moments(words, {"first_words": "", "first_step": r"step +1/"}, cache)
    assert 0.5 < found["first_step"] - found["first_words"] < 5
    with pytest.raises(RuntimeError, match="ended before compiling, compiled, first_step"):
        startup.time_moments([sys.executable, "-c", "print()"], startup.MOMENTS, cache)


def test_the_gpu_script_runs_without_what_a_gpu_machine_lacks(tmp_path):
    refuse = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {ABSENT}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    (tmp_path / "sitecustomize.py").write_text(refuse)
    words = [sys.executable, str(BENCHMARKS / "gpu.py"), "--trial", "--output", str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    parts = ["--parts", "train_h", "--override", "nonsense=1"]
    failed = subprocess.run([*words, *parts], env=env, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "failed" in json.loads((tmp_path / "gpu.json").read_text())["train_h"]
    done = subprocess.run([*words, "--parts", "train_h"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "gpu_train_h.json").read_text())["dtype"] == "bfloat16"
    assert "| ours |" in (tmp_path / "gpu.md").read_text()


def test_parts_prepare_side_by_side_and_are_timed_one_after_the_other(tmp_path):
    gpu = benchmark("gpu")
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import turns\n"
        "time.sleep(float(sys.argv[2])); turns.wait(); begin = time.time(); time.sleep(0.3)\n"
        "open(sys.argv[3], 'w').write(f'{begin} {time.time()}')\n"
    )
    sleeps = {"train_b": "1", "infer_b": "0", "train_l": "100"}
    words = {name: ["-c", script, BENCHMARKS, x, tmp_path / name] for name, x in sleeps.items()}
    words["train_h"] = ["-c", "raise SystemExit('no memory')"]
    runs = [
        gpu.Run(name, [sys.executable, *map(str, words[name])], tmp_path / f"{name}.log", tmp_path)
        for name in ("train_b", "infer_b", "train_h", "train_l")
    ]
    outcomes = dict(gpu.finished(runs, 10))
    assert outcomes["train_h"] == "failed (1): no memory"
    assert outcomes["train_l"].startswith("was ended after 10 s")
    assert all(outcomes[name].startswith("done") for name in ("train_b", "infer_b"))
    times = [
        [*map(float, (tmp_path / name).read_text().split())] for name in ("train_b", "infer_b")
    ]
    (first_begin, first_end), (second_begin, _) = times
    # infer_b was ready long before, and waited until train_b had been timed.
    assert second_begin >= first_end > first_begin


def test_compilations_of_parts_exclude_each_other(tmp_path, monkeypatch):
    turns = benchmark("turns")
    with turns.compiling():  # Alone, nothing is written.
        pass
    monkeypatch.setenv(turns.FOLDER, str(tmp_path))

    def take():
        with (tmp_path / "compiling").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    with turns.compiling(), pytest.raises(BlockingIOError):
        take()
    take()


def test_a_server_under_load_is_compared_with_bare_onnxruntime(tmp_path, capsys):
    for package in ("fastapi", "onnx", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package}", exc_type=ImportError)
    tiny.save_onnx(tmp_path / "model" / "model.onnx")
    flags = ["--seconds", "2", "--warm_up", "0.2", "--bare_seconds", "0.2", "--bad", "0.3"]
    path = tmp_path / "found.json"
    words = ["--model", str(tmp_path / "model"), "--connections", "4", "--output", str(path)]
    assert benchmark("serving").main([*words, *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"served/bare \d+\.\d{3}", lines[-1]) and lines[-2] == "errors 0"
    found = json.loads(path.read_text())
    assert found["images"] > 0 and found["refused"] > 0 and found["errors"] == {}
    assert found["resident_mib"][0] > 10 and min(found["bare"]) > 0


def test_a_server_that_answers_otherwise_is_found_out():
    load = benchmark("serving").Load("nowhere", 0, [b"image"], 0)
    for probability in (0.5, 0.5001, 0.6):
        load._compare(0, [{"index": 1, "probability": probability}])
    assert load.errors == {"another answer to the same image": 1}
