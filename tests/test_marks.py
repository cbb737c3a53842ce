"""What compares with a peer runs where CI has the peers."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
TESTS = """
import pytest

def test_unmarked():
    pytest.importorskip("timm_that_is_not_here", reason="needs the peers extra")

@pytest.mark.versions
def test_versions():
    pytest.skip("could not import 'torch'")

@pytest.mark.slow
def test_slow():
    pytest.skip("needs the peers extra")

def test_of_something_else():
    pytest.skip("needs gcc")
"""
FILE = """
import pytest

pytest.importorskip("that_is_not_here", reason="could not import 'transformers'")
"""


def test_a_test_that_ci_would_skip_without_its_peers_and_run_nowhere_fails(tmp_path):
    (tmp_path / "test_one_by_one.py").write_text(TESTS)
    (tmp_path / "test_as_a_file.py").write_text(FILE)
    words = ["-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    words += ["-c", "pyproject.toml", "--continue-on-collection-errors", "-rfE", str(tmp_path)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert "1 failed, 3 skipped, 1 error" in done.stdout, done.stdout + done.stderr
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    names = ["ERROR test_as_a_file.py", "FAILED test_one_by_one.py::test_unmarked"]
    assert [line.partition(" - ")[0] for line in sorted(failed)] == names
    assert "no environment of CI runs this: mark it versions" in failed[0]
