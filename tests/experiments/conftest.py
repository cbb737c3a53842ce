"""The programs of experiments/ as modules, and a stand-in for the training that they start."""

import json
import pathlib
import sys

import pytest
from ml_collections import ConfigDict

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

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
    import runner

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
def program(run, tmp_path, monkeypatch):
    """Runs a program of experiments/ on a config; returns its exit code and what it printed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run_program(name: str, config: ConfigDict, *flags: str) -> tuple[int, str]:
        path = tmp_path / "config.json"
        path.write_text(config.to_json())
        command = [sys.executable, str(ROOT / "experiments" / name), "--config", str(path)]
        return run([*command, *flags])

    return run_program


@pytest.fixture
def read_metrics():
    return lambda path: json.loads((path / "metrics.json").read_text())
