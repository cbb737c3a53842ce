import pathlib
import subprocess

import pytest

from . import nearest

ROOT = pathlib.Path(__file__).parents[2]
# Of `make mutation` without MODULE.
MUTATED = ("vit_jax/models", "vit_jax/state.py", "vit_jax/recipes", "vit_jax/checkpoints")


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def runs(monkeypatch):
    """Stands in for git, which says that state.py is changed, and pytest; the list of its runs."""
    runs = []

    def run(command, **_):
        if command[0] == "git":
            return subprocess.CompletedProcess(command, 0, stdout="vit_jax/state.py\n")
        runs.append([pathlib.Path(path).stem for path in command[command.index("not slow") + 1 :]])
        return subprocess.CompletedProcess(command, codes.pop(0))

    codes = []
    monkeypatch.setattr(subprocess, "run", run)
    return lambda *given: (codes.extend(given), runs)[1]


def test_every_module_has_tests():
    """Without any, pytest would fail, which counts as a mutant that is noticed."""
    for module in (module for name in MUTATED for module in nearest.modules_of(name)):
        for tests in (*nearest.nearest_to(module), *nearest.wider_than(module)):
            assert nearest.path_of(tests).exists(), f"tests of {module}: there is no {tests}"


def test_only_what_is_named_otherwise_is_in_the_table():
    for module, tests in nearest.NEAREST.items():
        assert (ROOT / "vit_jax" / f"{module}.py").exists(), module
        assert len(tests) == len(set(tests)) > 0


@pytest.mark.parametrize(
    ("codes", "passed", "expected"),
    [
        ([1], False, [["test_state"]]),
        ([0, 1], False, [["test_state"], ["test_steps"]]),
        ([0, 0], True, [["test_state"], ["test_steps"]]),
        ([5, 0], True, [["test_state"], ["test_steps"]]),  # Each of the nearest is slow.
        ([2], False, [["test_state"]]),
    ],
)
def test_wider_tests_follow_the_nearest_of_what_is_changed(runs, codes, passed, expected):
    made = runs(*codes)
    assert nearest.main(list(MUTATED)) == (not passed)
    assert made == expected
