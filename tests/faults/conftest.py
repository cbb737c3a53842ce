import os
import random
import subprocess
import time

import pytest

from . import harness


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(os.path.dirname(__file__)):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="package", autouse=True)
def compiled(tmp_path_factory):
    """One cache of compiled programs for all children: a start costs no more than its imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("xla")))
        yield


@pytest.fixture
def chance(request):
    """Draws for a test, the same whichever others run."""
    print(f"FAULTS_SEED={harness.SEED} in the environment repeats these faults")
    return random.Random(f"{harness.SEED} {request.node.name}")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    harness.write_images(folder)
    return folder


@pytest.fixture(scope="session")
def reference(images, tmp_path_factory):
    """The run that nothing disturbs, with every step saved."""
    folder = tmp_path_factory.mktemp("reference")
    config = harness.write_config(
        harness.make_config(images),
        folder / "config.json",
        checkpoint_every="1 step",
        keep_checkpoints=1000,
    )
    outcome = harness.Command(config, folder / "run", folder).end()
    assert outcome.code == 0, outcome.text
    return harness.Reference(folder / "run")


@pytest.fixture
def config(images):
    return harness.make_config(images)


@pytest.fixture
def train(config, tmp_path):
    """Starts the run in `tmp_path/run`; returns the process."""
    processes = []

    def start(fault=None, workdir=None, flags=(), scratch=tmp_path, **changes):
        path = harness.write_config(config, tmp_path / f"{len(processes)}.json", **changes)
        command = harness.Command(path, workdir or tmp_path / "run", scratch, fault, flags)
        processes.append(command.process)
        return command

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def finishes(train, reference, tmp_path):
    """Runs to the end what has been struck, which must be that of the undisturbed run."""

    def finish(workdir=None, may_hold="", **options):
        outcome = train(workdir=workdir, **options).end()
        assert outcome.code == 0, outcome.text
        assert "Traceback" not in outcome.text, outcome.text
        harness.assert_finished_alike(workdir or tmp_path / "run", reference, may_hold)
        return outcome

    return finish


@pytest.fixture
def row(record_property, images, tmp_path):
    """Takes down what a line of the table says: the fault, its moment, and what became of it."""
    start = time.monotonic()

    def note(fault, moment, outcome):
        nonlocal start
        now = time.monotonic()
        for folder in (tmp_path / "disk", tmp_path, images):
            outcome = outcome.replace(f"{folder}/", "")
        line = (fault, moment, outcome, f"{now - start:.0f}")
        print(*line, sep=" | ")  # Shown where the test fails.
        record_property("fault", line)
        start = now

    return note


@pytest.fixture
def disk(tmp_path):
    """A disk of 64 MB of its own; None where this process may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def pytest_terminal_summary(terminalreporter):
    rows = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "fault" and report.when == "call"
    ]
    if rows:
        terminalreporter.section(f"faults, FAULTS_SEED={harness.SEED}")
        header = ("Fault", "Moment", "Outcome", "Seconds")
        for line in (header, ("-", "-", "-", "-:"), *rows):
            terminalreporter.write_line("| " + " | ".join(line) + " |")
