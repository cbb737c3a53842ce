"""What a file from a stranger could turn into code is called nowhere, read from the source."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("vit_jax", "configs", "experiments", "benchmarks", "docs")
    for path in (ROOT / folder).rglob("*.py")
)

# Whatever their arguments are. A module in place of a function stands for all in it.
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal", "shelve", "dill", "joblib"),
    *("cloudpickle", "jsonpickle", "pandas.read_pickle", "runpy", "code", "codeop"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
    *("torch.jit.load", "torch.hub.load", "torch.package", "numpy.fromregex"),
}
BUILTINS = {"eval", "exec", "compile", "__import__"}

# An argument that must be there and the value that it must have.
REQUIRED = {"torch.load": ("weights_only", True)}
# An argument that may only have this value, in any call.
ONLY = {"allow_pickle": False, "shell": False, "weights_only": True, "trust_remote_code": False}

# Module and call, and why it may be there.
EXCEPTIONS = {
    ("vit_jax/config_files.py", "exec_module"): "a config is a Python file, which its user names",
}


def dangers(source):
    """Yields the line and the name of each use of what may run what a file holds."""
    tree = ast.parse(source)
    names = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            for alias in node.names:
                name = f"{getattr(node, 'module', None) or ''}.{alias.name}".strip(".")
                if is_forbidden(name):
                    yield node.lineno, name
        # Also where it is not called but passed on.
        elif isinstance(node, ast.Name | ast.Attribute) and is_forbidden(dotted(node, names)):
            yield node.lineno, dotted(node, names)
        elif isinstance(node, ast.Attribute) and node.attr == "exec_module":
            yield node.lineno, "exec_module"
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func, names)
        values = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        for key, value in ONLY.items():
            if values.get(key, str(value)) != str(value):
                yield node.lineno, f"{key}={values[key]}"
        if name in REQUIRED and REQUIRED[name][0] not in values:
            yield node.lineno, f"{name} without {REQUIRED[name][0]}"


def imported(tree):
    """What a name of the module stands for: `np` for numpy, `load` for pickle.load."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition(".")[0]
                names |= {alias.asname: alias.name} if alias.asname else {root: root}
        elif isinstance(node, ast.ImportFrom):
            names |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
    return names


def dotted(node, names):
    """The full name of what is called, as far as the source tells: `torch.load`."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id if node.id in BUILTINS else "?")
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return "?"


def is_forbidden(name):
    parts = name.split(".")
    return any(".".join(parts[:length]) in FORBIDDEN for length in range(1, len(parts) + 1))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_call_runs_what_a_file_holds(path):
    name = str(path.relative_to(ROOT))
    found = {(name, danger) for _, danger in dangers(path.read_text())}
    assert found - EXCEPTIONS.keys() == set()


def test_every_exception_is_still_there():
    for name, danger in EXCEPTIONS:
        assert danger in {found for _, found in dangers((ROOT / name).read_text())}


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec('1')",
        "compile('1', '', 'exec')",
        "__import__('os')",
        "import pickle\npickle.load(file)",
        "import pickle\npickle.loads(data)",
        "import pickle as p\ndef f():\n    return p.loads(data)",
        "from pickle import loads",
        "from pickle import loads as read\nread(data)",
        "import pickle\npickle.Unpickler(file).load()",
        "import marshal",
        "from marshal import loads",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import os\nos.system('ls')",
        "from os import system\nsystem('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess\nsubprocess.run('ls', shell=flag)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "from numpy import load\nload(path, allow_pickle=flag)",
        "import pickle\nread = pickle.loads",
        "import pickle\nclass Safe(pickle.Unpickler): pass",
        "values = map(eval, texts)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "from torch import load\nload(path)",
        "import runpy\nrunpy.run_path(path)",
        "spec.loader.exec_module(module)",
        "model = from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_each_dangerous_call_is_seen(source):
    assert list(dangers(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "code = process.wait()\nprint(code.name)",
        "import re\nre.compile('a')",
        "import ast\nast.literal_eval('1')",
        "import json\njson.load(file)",
        "import pickle\ntry: pass\nexcept pickle.UnpicklingError: pass",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import torch\ntorch.load(path, weights_only=True)",
        "import yaml\nyaml.safe_load(text)",
        "import subprocess\nsubprocess.run(['ls'])",
    ],
)
def test_what_is_harmless_passes(source):
    assert not list(dangers(source))
