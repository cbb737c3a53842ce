import collections
import contextlib
import gc
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

with contextlib.suppress(ImportError):
    # timm imports it, which ends the process where TensorFlow has been loaded before.
    import triton  # noqa: F401

import jax
import pytest
from ml_collections import ConfigDict

from vit_jax.config import to_dict
from vit_jax.recipes import get_config

# A shell has what it runs in the background ignore SIGINT, and what that starts would likewise.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = pathlib.Path(__file__).parents[1]
# What depends on the versions of JAX, TensorFlow, PyTorch and their like.
VERSIONED = (
    *("analysis", "checkpoints", "doctor", "export", "models", "numerics"),
    "serving/test_attention.py",
    *("data/test_images.py", "data/test_preprocess.py", "test_convert.py", "test_inference.py"),
    *("test_sharding.py", "test_state.py", "test_steps.py", "test_train.py", "test_xla_flags.py"),
)

# What only the pinned environment of CI has, which runs the slow tests and those marked `versions`.
PEERS = re.compile(r"\b(peers|torch|torchvision|timm|transformers)\b")


def is_versioned(path: pathlib.Path) -> bool:
    return any(path.is_relative_to(ROOT / "tests" / name) for name in VERSIONED)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks what is `VERSIONED`, and begins with the files that take longest.

    One that is left to the end keeps one process busy. They are those with slow tests, before
    `-m "not slow"` leaves these out.
    """
    for item in items:
        if is_versioned(item.path):
            item.add_marker("versions")
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Fails a test that is skipped without its peers and would be left out where these are."""
    report = yield
    marks = (item.get_closest_marker(name) for name in ("versions", "slow"))
    return report if any(marks) else refuse_to_skip(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Fails a file of tests that is skipped likewise."""
    report = yield
    return report if is_versioned(collector.path) else refuse_to_skip(report)


def refuse_to_skip(report):
    if report.skipped and PEERS.search(reason := str(report.longrepr[2])):
        report.outcome = "failed"
        report.longrepr = f"{reason}: no environment of CI runs this: mark it versions"
    return report


@pytest.fixture(scope="module", autouse=True)
def release_memory():
    """Compiled programs and their constants would pile up to many gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def tiny_config(data_dir):
    """A run of seconds on the digits, that has a bit of everything: dropout, averaging, shifts."""

    def make(**overrides) -> ConfigDict:
        config = get_config("ViT-Ti/4", "pretrain,digits")
        config.update_from_flattened_dict(
            {
                "batch_size": 32,
                "duration": "6 steps",
                "ema_decay": 0.9,
                "log_every": "1 step",
                "evals.val.every": "4 steps",
                "checkpoint_every": "2 steps",
                "dataset.data_dir": data_dir,
                "dataset.image_size": 8,
                "dataset.protocol": "pad",
                "dataset.random_flip": False,
                "model.hidden_size": 16,
                "model.num_layers": 1,
                "model.mlp_dim": 32,
                "model.num_heads": 2,
                "model.representation_size": 16,
                "model.dtype": "float32",
                "schedule.base_lr": 1e-2,
                "schedule.warmup": "2 steps",
                **overrides,
            }
        )
        return config

    return make


@pytest.fixture(scope="session")
def finished_workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "finished"


@pytest.fixture
def finished(tiny_config, finished_workdir):
    """A run of six steps, done once for all tests that only look at it."""
    from vit_jax.train import train

    if not finished_workdir.exists():
        train(tiny_config(), finished_workdir)
    return finished_workdir


@pytest.fixture
def masked_config(tiny_config):
    """Six steps of masked patch prediction, of 2 x 2 pixels each."""

    def make(**overrides):
        fixed = {"objective": "masked_patches", "model.representation_size": 0}
        return tiny_config(**fixed, **{"model.patch_size": 2, **overrides})

    return make


@pytest.fixture
def command(tmp_path):
    """The command line of a run of a config, from its JSON."""

    def make(config: ConfigDict, workdir: pathlib.Path, *flags: str) -> list[str]:
        path = tmp_path / f"{workdir.name}.json"
        path.write_text(json.dumps(to_dict(config)))
        main = [sys.executable, "-m", "vit_jax.main", "--config", str(path)]
        return [*main, "--workdir", str(workdir), *flags]

    return make


@pytest.fixture
def start():
    """Starts a command on a number of simulated devices; what still runs at the end is killed."""
    processes = []

    def start_process(command: list[str], devices: int = 1, **options) -> subprocess.Popen:
        flags = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        )
        if devices > 1:  # Which takes minutes to compile.
            flags += " --xla_backend_optimization_level=0"
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stderr=subprocess.STDOUT,
                text=True,
                **{"stdout": subprocess.PIPE, **options},
            )
        )
        return processes[-1]

    yield start_process
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def run(start):
    """Runs a command to its end; returns its exit code and what it printed."""

    def run_process(command: list[str], devices: int = 1, **options) -> tuple[int, str]:
        process = start(command, devices, **options)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    return run_process


# Reads a config, notes that it ran, and writes what vit_jax.main would. A learning rate of 0.5
# is refused, 0.6 is killed, and 0.7 waits for a SIGTERM.
STAND_IN = """
import json, os, pathlib, signal, sys, time
config = json.loads(pathlib.Path(sys.argv[2]).read_text())
workdir = pathlib.Path(sys.argv[4])
rate, seed = config["schedule"]["base_lr"], config["seed"]
with open(workdir.parent / "started", "a") as file:
    file.write(workdir.name + "\\n")
print("a line", flush=True)
if rate == 0.5:
    sys.exit("error: the loss is not finite: stopped")
if rate == 0.6:
    os.kill(os.getpid(), signal.SIGKILL)
if rate == 0.7:
    def stop(*_):
        (workdir.parent / "saved").touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    (workdir.parent / "waiting").touch()
    time.sleep(60)
accuracy = 1 - abs(rate - 0.01) * 10 + seed / 100 - 0.2
if config["dataset"]["development"]:
    accuracy -= 0.1
workdir.mkdir(exist_ok=True)
(workdir / "config.json").write_text(json.dumps(config))
metrics = {"accuracy": accuracy, "loss": 1.0, "examples": 77, "step": 5}
(workdir / "metrics.json").write_text(json.dumps(metrics))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Replaces training; returns a function that lists the runs started since it was last asked."""
    from vit_jax import runner

    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    monkeypatch.setattr(runner, "MAIN", (sys.executable, str(path)))

    def started(workdir: pathlib.Path) -> list[str]:
        notes = workdir / "started"
        names = notes.read_text().split() if notes.exists() else []
        notes.unlink(missing_ok=True)
        return names

    return started


@pytest.fixture
def program(run, tmp_path):
    """Runs a module on a config; returns its exit code and what it printed."""

    def run_program(name: str, config: ConfigDict, *flags: str) -> tuple[int, str]:
        path = tmp_path / "config.json"
        path.write_text(config.to_json())
        command = [sys.executable, "-m", name, "--config", str(path)]
        return run([*command, *flags])

    return run_program


@pytest.fixture
def read_metrics():
    return lambda path: json.loads((path / "metrics.json").read_text())
