"""What every fuzzer shares: its budget, a watch over what a case does, and how one is repeated.

    def test_png(fuzz):
        fuzz("png", mutated(PNG), read_png, sound=[PNG], name="a.png")

`fuzz` draws cases from a strategy of Hypothesis until its time is over, after those that are kept
in `corpus/png`. Bytes become a file, a dict of names and bytes a folder, of which the reader gets
the path; text is passed as it is. Each must give a result or a `UserError` of one line, execute
nothing, write nothing outside its folder, and end in bounded time and memory.

    FUZZ_SECONDS=600   for each fuzzer; 3 by default, so that all cost CI about a minute
    FUZZ_SEED=1        of the cases; 0 by default, so that a red CI is due to a change, while
                       `make fuzz` takes another each time
    FUZZ_CASE=PATH     only this case, as a failure prints it
"""

import contextlib
import hashlib
import json
import os
import pathlib
import resource
import shutil
import signal
import sys
import tempfile
import time
import unicodedata
import warnings
import zlib

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from vit_jax.errors import UserError

SECONDS = float(os.environ.get("FUZZ_SECONDS", "3"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
ROUND = 200  # cases; Hypothesis begins each with the smallest ones again
CORPUS = pathlib.Path(__file__).parent / "corpus"

# Of one case, far above what any takes: processor time, for others may be busy, and address space.
CASE_SECONDS = 10
CASE_BYTES = 1 << 30

FORBIDDEN = {
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "pty.spawn"),
    *("subprocess.Popen", "os.kill", "os.killpg", "os.putenv", "os.unsetenv", "ctypes.dlopen"),
    *("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "urllib.Request"),
    *("pickle.find_class", "webbrowser.open"),
}
# Where the path stands among an event's arguments that is written.
WRITTEN = {
    **{f"os.{name}": (0,) for name in ("mkdir", "rmdir", "remove", "truncate", "chmod", "utime")},
    **{"os.rename": (0, 1), "os.link": (1,), "os.symlink": (1,), "shutil.rmtree": (0,)},
}
# And where the descriptor of the folder that it is relative to, as `shutil.rmtree` gives it.
RELATIVE = {"os.mkdir": 2, "os.rmdir": 1, "os.remove": 1}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# The standard library makes these classes by `exec`.
MAKERS = ("dataclasses.py", os.path.join("collections", "__init__.py"), "inspect.py", "enum.py")


class Watch:
    """Refuses and notes what no reader does, while there is a folder that is read."""

    def __init__(self):
        self.folder, self.seen = None, []
        # Programs that JAX has compiled.
        self.kept = os.path.realpath(os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.devnull)
        sys.addaudithook(self._audit)

    @contextlib.contextmanager
    def over(self, folder):
        self.folder, self.seen = os.path.realpath(folder), []
        try:
            yield
        finally:
            self.folder = None

    def _audit(self, event, arguments):
        if self.folder is None:
            return
        problem = None
        if event in FORBIDDEN:
            problem = f"{event}{arguments!r}"[:200]
        elif event == "exec":
            problem = self._executed(arguments[0])
        elif event == "open" and arguments[2] & WRITING:
            problem = self._outside(event, arguments[0])
        elif event in WRITTEN:
            folder = arguments[RELATIVE[event]] if event in RELATIVE else -1
            outside = (self._outside(event, arguments[i], folder) for i in WRITTEN[event])
            problem = next(filter(None, outside), None)
        if problem:
            self.seen.append(problem)
            raise PermissionError(f"a case may not do this: {problem}")

    def _executed(self, code):
        """An import executes a file that is installed."""
        file = code.co_filename
        caller = sys._getframe(2).f_code.co_filename
        if file.startswith("<") and not file.startswith("<frozen"):
            return None if caller.endswith(MAKERS) else f"exec of {file} in {caller}"
        return f"exec of {file}" if os.path.realpath(file).startswith(self.folder) else None

    def _outside(self, event, path, folder=-1):
        if isinstance(path, int):
            return None
        base = os.getcwd() if folder < 0 else os.readlink(f"/proc/self/fd/{folder}")
        real = os.path.realpath(os.path.join(base, os.fsdecode(path)))
        roots = (self.folder, self.kept, os.devnull)
        inside = any(real == root or real.startswith(root + os.sep) for root in roots)
        return None if inside else f"{event} of {real}"


@pytest.fixture(scope="session")
def watch():
    return Watch()


@contextlib.contextmanager
def limited(size):
    """Bounds the memory and the time of a case of `size` bytes.

    Yields:
        A list, to which a text is added if the time is over.
    """
    over = []

    def stop(*_):
        over.append("it takes too long")
        raise TimeoutError("too long for a case")

    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = pages * resource.getpagesize() + CASE_BYTES + 16 * size
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 20 * CASE_SECONDS)
    began = time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    try:
        yield over
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    if time.process_time() - began > CASE_SECONDS:
        over.append(f"it took {time.process_time() - began:.0f} s of processor time")


def put(value, folder, name):
    """Makes a case of what a strategy drew; returns what its reader takes, and its bytes."""
    if isinstance(value, str):
        return value, len(value)
    if isinstance(value, bytes):
        (folder / name).write_bytes(value)
        return folder / name, len(value)
    for file, content in value.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    return folder, sum(map(len, value.values()))


def keep(value, folder):
    """Saves a case for `take`."""
    if isinstance(value, dict):
        for file, content in value.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        return folder
    path = folder / ("text.txt" if isinstance(value, str) else "file")
    path.write_bytes(value.encode(errors="surrogatepass") if isinstance(value, str) else value)
    return path


def take(path):
    """Reads a case that was saved: a folder, text in a `.txt`, or the bytes of a file."""
    if path.is_dir():
        files = (file for file in sorted(path.rglob("*")) if file.is_file())
        return {str(file.relative_to(path)): file.read_bytes() for file in files}
    content = path.read_bytes()
    return content.decode(errors="surrogatepass") if path.suffix == ".txt" else content


def corpus_of(reader):
    """The cases in `corpus/READER`; `reasons.json` there tells of each why it is kept."""
    folder = CORPUS / reader
    if not folder.exists():
        return []
    reasons = json.loads((folder / "reasons.json").read_text())
    paths = {path.name: path for path in folder.iterdir() if path.name != "reasons.json"}
    assert reasons.keys() == paths.keys() and all(reasons.values()), "each case has its reason"
    return [take(paths[name]) for name in sorted(reasons)]


class TimeIsUp(BaseException):
    """Ends a round; Hypothesis takes any Exception for a failure."""


class Fuzzer:
    """One reader under attack."""

    def __init__(self, reader, read, name, watch, folder, node):
        self.reader, self.read, self.name = reader, read, name
        self.watch, self.folder, self.node = watch, folder, node
        self.cases = self.accepted = 0
        self.failed = False

    def case(self, value):
        """Reads one case; an AssertionError says what is wrong and how to repeat it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.cases += 1
        problem, cause = self._problem(*put(value, self.folder, self.name))
        if problem is None:
            return
        self.failed = True
        digest = hashlib.sha256(repr(value).encode()).hexdigest()[:12]
        saved = pathlib.Path(tempfile.gettempdir(), "vit_jax-fuzz", f"{self.reader}-{digest}")
        saved.mkdir(parents=True, exist_ok=True)
        raise AssertionError(
            f"{self.reader}: {problem}\n"
            f"repeat it: FUZZ_CASE={keep(value, saved)} python -m pytest '{self.node}'\n"
            f"found by: FUZZ_SEED={SEED} FUZZ_SECONDS={SECONDS:g}, case {self.cases}"
        ) from cause

    def _problem(self, given, size):
        problem = cause = None
        with warnings.catch_warnings(), limited(size) as over, self.watch.over(self.folder):
            warnings.simplefilter("ignore")
            try:
                self.read(given)
                self.accepted += 1
            except UserError as error:
                problem = told_badly(str(error))
            except Exception as error:
                problem, cause = f"{type(error).__name__}: {error}"[:500], error
        return next(iter([*self.watch.seen, *over]), problem), cause

    def search(self, strategy):
        """Draws cases until the time is over."""
        until = None

        def drawn(value):
            nonlocal until
            now = time.monotonic()
            until = until or now + SECONDS
            if now > until and not self.failed:  # A failure is reduced first.
                raise TimeIsUp
            self.case(value)

        options = {
            "max_examples": ROUND,
            "deadline": None,
            "database": None,
            "phases": [Phase.generate, Phase.shrink],
            "suppress_health_check": list(HealthCheck),
            "report_multiple_bugs": False,
        }
        with contextlib.suppress(TimeIsUp):
            for number in range(sys.maxsize):
                start = zlib.crc32(f"{self.reader} {SEED} {number}".encode())
                seed(start)(settings(**options)(given(strategy)(drawn)))()


def told_badly(message):
    """What is wrong with the text of a UserError, None if nothing."""
    shown = "\u200c\u200d"  # They join letters and emoji, and are not printable to Python.
    if not all(x.isprintable() or x in shown or unicodedata.category(x) == "Zs" for x in message):
        return f"its error is no printable line: {message!r}"
    if len(message) > 2000:
        return f"its error has {len(message)} characters: {message[:200]}"
    return "it allocates without a bound" if "does not fit in memory" in message else None


@pytest.fixture
def fuzz(tmp_path, monkeypatch, request, record_property, watch):
    """A function that attacks a reader.

    Its arguments:
        reader: the name of the fuzzer, of its corpus and of its line in the summary.
        strategy: of cases: bytes, a dict of names and bytes, or text.
        read: of a path or text; asserts what holds of a result, whatever the case is.
        sound: cases that must be read; they also import what the reader imports when it is called.
        name: of the file that bytes become.
    """
    # What a reader would write to the working directory is seen there.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def attack(reader, strategy, read, *, sound=(), name="input"):
        for value in sound:
            (tmp_path / "sound").mkdir()
            read(put(value, tmp_path / "sound", name)[0])
            shutil.rmtree(tmp_path / "sound")
        fuzzer = Fuzzer(reader, read, name, watch, tmp_path / "case", request.node.nodeid)
        if chosen := os.environ.get("FUZZ_CASE"):
            fuzzer.case(take(pathlib.Path(chosen)))
            return
        for value in [*sound, *corpus_of(reader)]:
            fuzzer.case(value)
        fuzzer.search(strategy)
        assert not list((tmp_path / "elsewhere").iterdir()), "it wrote where it was started"
        line = f"{fuzzer.cases} cases in {SECONDS:g} s, seed {SEED}, {fuzzer.accepted} of them read"
        record_property("fuzz", f"{reader}: {line}")

    return attack


def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.stats.get("passed", [])
    lines = [text for report in reports for key, text in report.user_properties if key == "fuzz"]
    if lines:
        terminalreporter.section("fuzzing")
        for line in sorted(lines):
            terminalreporter.line(line)
