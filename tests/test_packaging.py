"""How it is installed: the locks, make in any folder, and a home that cannot be written."""

import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import setuptools
from flax.traverse_util import flatten_dict
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vit_jax.command import keep_programs
from vit_jax.doctor import environment
from vit_jax.errors import UserError
from vit_jax.files import cache_dir
from vit_jax.models import create_model

ROOT = pathlib.Path(__file__).parents[1]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
# What .ci/run installs, and from which lock.
ENVIRONMENTS = {
    "newest.txt": ("export-newest", "docs", "test"),
    "pinned.txt": ("export", "peers", "test"),
}
MACHINES = [
    {"python_version": version, "python_full_version": f"{version}.1", **system}
    for version in ("3.11", "3.12", "3.13")
    for system in (
        {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux"},
        {"sys_platform": "darwin", "platform_machine": "arm64", "platform_system": "Darwin"},
    )
]


# What make hands to the tests that it runs, and would take up again in a make that they run.
SETTINGS = re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
FROM_MAKE = {*SETTINGS, "COVERAGE", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS"}


def make(*words: str, cwd: pathlib.Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs make as in a shell of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in FROM_MAKE}
    words = ["make", *words]
    return subprocess.run(words, cwd=cwd, env=kept | variables, capture_output=True, text=True)


def locked(lock: pathlib.Path) -> list[tuple[Requirement, list[str]]]:
    """The requirements of a lock, each with its hashes."""
    entries = re.split(r"\n(?=\S)", lock.read_text().replace("\\\n", " ").strip())
    found = []
    for entry in entries:
        requirement, *hashes = entry.split(" --hash=")
        found.append((Requirement(requirement.strip()), [word.strip() for word in hashes]))
    return found


def declared(monkeypatch) -> dict:
    """The arguments of setup() in setup.py."""
    arguments = {}
    monkeypatch.setattr(setuptools, "setup", lambda **given: arguments.update(given))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    return arguments


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_a_lock_names_one_version_by_its_hashes_and_no_server(lock):
    entries = locked(lock)
    assert entries
    for requirement, hashes in entries:
        (version,) = requirement.specifier
        assert version.operator == "==" and not requirement.url
        assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", value) for value in hashes)
    assert "://" not in lock.read_text()


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: "-".join(machine.values()))
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_lock_has_what_setup_py_asks_for(name, machine, monkeypatch):
    pins = {}
    for requirement, _ in locked(ROOT / "requirements" / name):
        if not requirement.marker or requirement.marker.evaluate(machine):
            pin = pins.setdefault(canonicalize_name(requirement.name), requirement.specifier)
            assert pin is requirement.specifier, f"two versions of {requirement.name}"
    setup = declared(monkeypatch)
    asked = [*setup["install_requires"]]
    for extra in ENVIRONMENTS[name]:
        asked += setup["extras_require"][extra]
    for requirement in map(Requirement, asked):
        if not requirement.marker or requirement.marker.evaluate(machine):
            (pin,) = pins[canonicalize_name(requirement.name)]
            assert pin.version in requirement.specifier, f"{requirement}: make lock"


OWN = sorted((ROOT / "requirements").glob("*.in"))


@pytest.mark.parametrize("asked", OWN, ids=lambda asked: asked.name)
def test_a_lock_has_what_its_own_file_asks_for(asked):
    pins = {canonicalize_name(x.name) for x, _ in locked(asked.with_suffix(".txt"))}
    lines = [line for line in asked.read_text().splitlines() if not line.startswith("#")]
    assert lines and {canonicalize_name(Requirement(line).name) for line in lines} <= pins


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_what_ci_installs_is_locked(name):
    extras = f"EXTRAS={','.join(ENVIRONMENTS[name])}"
    assert extras in (ROOT / ".ci/run").read_text()
    run = make("--dry-run", "VENV=.venv-none", ".venv-none/installed", extras, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    installs = [line for line in run.stdout.splitlines() if " pip install " in line]
    # What pip may fetch has a hash; the last is this package itself, for which it fetches nothing.
    *fetching, own = installs
    assert [line.split("--requirement ")[1] for line in fetching] == [
        "requirements/build.txt",
        f"requirements/{name}",
    ]
    assert all("--require-hashes" in line for line in fetching)
    assert all("--no-deps --no-build-isolation" in line for line in installs)
    assert own.endswith("--editable .")


# Stands in for Python: what a virtual environment has is a copy of it. It notes how it is called.
# As pip-licenses it calls the Python that it is given.
STAND_IN = """#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
  mkdir -p "$3/bin"
  for name in python ruff ty pip-licenses; do cp "$0" "$3/bin/$name"; done
fi
if [ "$1" = --python ]; then "$2"; fi
printf '%s|%s|%s|%s\\n' "$0" "$JAX_COMPILATION_CACHE_DIR" "${PATH%%:*}" "$*" >> "$CALLS"
"""


@pytest.fixture
def clone(tmp_path):
    """A clone as far as make needs it, in a folder with spaces and letters of other alphabets."""
    clone = tmp_path / "ein Pfad é 模型's" / "vit"
    (clone / "vit_jax").mkdir(parents=True)
    shutil.copytree(ROOT / "requirements", clone / "requirements")
    for name in ("Makefile", "setup.py", "vit_jax/__init__.py"):
        shutil.copy(ROOT / name, clone / name)
    return clone


@pytest.fixture
def python(tmp_path):
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return path


def test_make_works_in_any_folder(clone, python, tmp_path):
    calls = tmp_path / "calls"
    before = sorted(clone.parent.iterdir())
    names = ["demo", "test", "coverage", "lint", "docs", "doctor"]
    variables = {"CALLS": str(calls), "JAX_COMPILATION_CACHE_DIR": ""}
    run = make(f"PYTHON={python}", *names, cwd=clone, **variables)
    assert run.returncode == 0, run.stderr
    called = [line.split("|") for line in calls.read_text().splitlines()]
    caches = {cache for *_, cache, _, words in called if re.search("pytest|mkdocs", words)}
    assert caches == {str(clone / ".venv/xla")}
    (path,) = [path for *_, path, words in called if "mkdocs" in words]
    assert path == str(clone / ".venv/bin")
    assert sum("vit_jax" in words for *_, words in called) >= 5
    assert sorted(clone.parent.iterdir()) == before  # nothing is written beside the clone


def test_licenses_are_looked_for_on_a_path_without_spaces(clone, python, tmp_path):
    calls = tmp_path / "calls"
    run = make(f"PYTHON={python}", "licenses", cwd=clone, CALLS=str(calls))
    assert run.returncode == 0, run.stderr
    # Python finds its packages from where it is called; pip-licenses would split that.
    called = pathlib.Path(calls.read_text().splitlines()[-2].partition("|")[0])
    assert called.parts[-2:] == ("bin", "python") and called.is_absolute()
    assert " " not in str(called) and not called.parents[2].exists()  # nothing is left


@pytest.fixture
def unprivileged():
    """What a command begins with so that permissions bind it, though root runs it."""
    if os.geteuid():
        return []
    drop = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"]
    if shutil.which("setpriv") is None or subprocess.run([*drop, "true"]).returncode:
        pytest.skip("root is bound by no permissions, and setpriv cannot change that")
    return drop


@pytest.fixture
def checkpoint(tmp_path):
    """An official .npz of a ViT for images of 8 pixels."""
    model = {"architecture": "vit", "patch_size": 4, "hidden_size": 8, "num_layers": 1}
    model = create_model({**model, "mlp_dim": 8, "num_heads": 2, "num_classes": 3})
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8, 8, 3)))["params"]
    # It begins with zeros, which predict refuses.
    params["head"]["kernel"] = np.arange(24, dtype=np.float32).reshape(8, 3)
    path = tmp_path / "tiny.npz"
    np.savez(path, **flatten_dict(params, sep="/"))
    return path


@pytest.mark.parametrize(
    "words",
    [["predict", "docs/seven.png"], ["analyze", "filters", "--output", "{output}"]],
    ids=lambda words: words[0],
)
def test_a_command_needs_no_home_that_can_be_written(
    words, unprivileged, checkpoint, run, tmp_path, monkeypatch
):
    home = tmp_path / "home"
    (home / ".cache/vit_jax/xla").mkdir(parents=True)
    for folder in (home / ".cache/vit_jax/xla", home / ".cache", home):
        folder.chmod(0o555)
    monkeypatch.setenv("HOME", str(home))
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "VIT_JAX_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    words = [word.format(output=tmp_path / "output") for word in words]
    line = [*unprivileged, sys.executable, "-m", "vit_jax", *words, "--checkpoint", str(checkpoint)]
    code, printed = run(line)
    assert code == 0, printed
    assert not re.search("Traceback|Warning|[Pp]ermission|Read-only", printed)


@pytest.fixture
def homeless(monkeypatch):
    """A user whom the system does not know, as `docker run --user 12345` makes one."""
    for name in ("HOME", "VIT_JAX_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_programs_are_not_kept(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    keep_programs()


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize("look", [cache_dir, environment.places])
def test_without_a_home_a_command_says_what_to_set(look):
    with pytest.raises(UserError, match="no home: set HOME"):
        look()
