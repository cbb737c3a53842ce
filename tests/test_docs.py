"""What the pages show runs: the examples of docs/extending.md, and the flags of every command."""

import ast
import importlib
import json
import pathlib
import re
import shlex
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

from vit_jax import models
from vit_jax.cli import COMMANDS
from vit_jax.evaluation import registry
from vit_jax.export import precisions
from vit_jax.models import vit

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: pathlib.Path) -> list[tuple[str, str]]:
    """The titles and the code of a page's blocks of Python."""
    fence = r"^```python(?: title=\"([^\"]*)\")?\n(.*?)^```$"
    found = re.findall(fence, page.read_text(), re.M | re.S)
    assert found or page.name != "extending.md"
    return found


EXAMPLES = blocks(ROOT / "docs/extending.md")


def example(title: str, index: int = 0) -> str:
    return [code for name, code in EXAMPLES if name == title][index]


@pytest.fixture
def module(monkeypatch):
    """Makes a module of an example's code."""

    def make(name: str, title: str) -> types.ModuleType:
        made = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, made)
        exec(compile(example(title), title, "exec"), made.__dict__)
        return made

    return make


def is_cell(line: str) -> bool:
    return line.startswith("!") or line.startswith("    --")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_the_pages_is_python(page):
    for _, code in blocks(page):
        # "!" is Jupyter's.
        ast.parse("\n".join(line for line in code.splitlines() if not is_cell(line)))


def commands() -> list[str]:
    """Every command line of the pages, continued lines joined."""
    found = []
    for page in PAGES:
        text = re.sub(r"\\\n\s*", "", page.read_text())
        found += re.findall(r"^(?: {4}|!|\| `)(vit-jax [^`#\n]+)", text, re.M)
    return found


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_flags_on_the_pages_exist(line):
    _, name, *words = shlex.split(line)
    parser = importlib.import_module(COMMANDS[name].module).build_parser(f"vit-jax {name}")
    known = {flag for action in parser._actions for flag in action.option_strings}
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert {flag for flag in flags if not flag.startswith("--config.")} <= known


def test_a_size_is_one_row(monkeypatch):
    monkeypatch.setattr(vit, "SIZES", dict(vit.SIZES))
    exec(example("vit_jax/models/vit.py"), {"SIZES": vit.SIZES})
    model = models.create_model({**models.model_config("ViT-g/14"), "num_classes": 1000})
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    size = sum(x.size for x in jax.tree.leaves(shapes))
    assert size == pytest.approx(1011e6, rel=2e-3)  # Table 2 of Zhai et al.


def test_a_family_is_one_file_and_one_line(monkeypatch, module):
    family = module("vit_jax.models.pooled", "vit_jax/models/pooled.py").PooledConfig
    monkeypatch.setattr(models, "ARCHITECTURES", dict(models.ARCHITECTURES))
    line = example("vit_jax/models/__init__.py")
    exec(line, {"ARCHITECTURES": models.ARCHITECTURES, "PooledConfig": family})
    config = {**models.model_config("Pooled-64/4"), "num_classes": 10}
    model = models.create_model(config)
    images = jnp.ones((2, 8, 8, 3))
    params = model.init(jax.random.key(0), images, train=False)["params"]
    assert model.apply({"params": params}, images, train=False).shape == (2, 10)
    arrays = flatten_dict(params, sep="/")
    assert models.recognize(arrays) == "pooled"
    assert {"architecture": "pooled", **family.infer(arrays)} == config
    assert models.describe(config).multiply_adds(8) == 4 * 48 * 64 + 64 * 10


def test_a_data_set_and_an_evaluator_of_ones_own(monkeypatch, module, tmp_path):
    from vit_jax.train import train

    blobs = module("blobs", "blobs.py")
    blobs.Blobs(data_dir=tmp_path / "tfds").download_and_prepare()
    confidence = module("vit_jax.evaluation.confidence", "vit_jax/evaluation/confidence.py")
    monkeypatch.setattr(registry, "EVALUATORS", dict(registry.EVALUATORS))
    names = {**registry.__dict__, "confidence": confidence.confidence}
    exec(example("vit_jax/evaluation/registry.py"), names)
    config = blobs.get_config()
    exec(example("a config file"), {"config": config})
    small = {"hidden_size": 16, "num_layers": 1, "mlp_dim": 32, "num_heads": 2}
    config.model.update({**small, "dtype": "float32", "representation_size": 0})
    config.duration, config.schedule.warmup = "2 steps", "1 step"
    config.dataset.data_dir = str(tmp_path / "tfds")
    train(config, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    (sure,) = [record["sure/confidence"] for record in records if "sure/confidence" in record]
    assert 50 <= sure <= 100  # of two classes


def test_a_precision_is_one_row(monkeypatch):
    monkeypatch.setattr(precisions, "PRECISIONS", dict(precisions.PRECISIONS))
    exec(example("vit_jax/export/precisions.py"), dict(precisions.__dict__))
    assert precisions.thresholds()["tf32"]["cosine"] == 0.999
    assert precisions.detect("tf32", {"fp32": 100}, ["MatMul"]) == "tf32"


def test_an_experiment_is_one_file(module):
    assert module("experiments.dropout", "experiments/dropout.py").main


def test_docstrings_begin_with_a_verb_or_a_noun():
    others = r"(What|Whether|How|Where|Which|Who|When|Why|That|Those|Of|As|In)\b"
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = []
    for path in sorted((ROOT / "vit_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            docstring = isinstance(node, documented) and ast.get_docstring(node)
            if docstring and re.match(others, docstring):
                found.append(f"{path}: {docstring.splitlines()[0]}")
    assert not found
