"""What the pages show runs: the examples of what one adds, and the flags of every command."""

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

from experiments.runner import scales
from experiments.runner.command import build_parser
from experiments.runner.setting import Setting
from vit_jax import command, config_files, models, recipes
from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.cli import COMMANDS
from vit_jax.config import check_config
from vit_jax.evaluation import registry
from vit_jax.export import precisions
from vit_jax.models import vit
from vit_jax.program import check_multipliers
from vit_jax.train import train

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: pathlib.Path) -> list[tuple[str, str]]:
    """The titles and the code of a page's blocks of Python."""
    fence = r"^```python(?: title=\"([^\"]*)\")?\n(.*?)^```$"
    found = re.findall(fence, page.read_text(), re.M | re.S)
    assert found or page.name != "extending.md"
    return found


EXAMPLES = blocks(ROOT / "docs/extending.md") + blocks(ROOT / "docs/experiments.md")


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


def commands(program: str = "vit-jax ") -> list[str]:
    """Every command line of the pages, continued lines joined."""
    found = []
    for page in PAGES:
        text = re.sub(r"\\\n\s*", "", page.read_text())
        found += re.findall(rf"^(?: {{4}}|!|\| `)({program}[^`#&\n]+)", text, re.M)
    return found


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_every_command_is_on_the_page(page):
    text = (ROOT / page).read_text()
    assert not [name for name in COMMANDS if f"`vit-jax {name}" not in text]


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_flags_on_the_pages_exist(line):
    _, name, *words = shlex.split(line)
    parser = importlib.import_module(COMMANDS[name].module).build_parser(f"vit-jax {name}")
    known = {flag for action in parser._actions for flag in action.option_strings}
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert {flag for flag in flags if not flag.startswith("--config.")} <= known


def claims() -> list[str]:
    """The commands, flags and keys of configs in the last column of docs/compared.md."""
    text = (ROOT / "docs/compared.md").read_text()
    cells = [row.rsplit(" | ", 1)[-1] for row in re.findall(r"^\| .*(?= \|$)", text, re.M)]
    code = [span for cell in cells for span in re.findall(r"`([^`]+)`", cell)]
    return [span for span in code if re.match(r"vit-jax |--|[a-z]+\.[a-z_]+(=|$)", span)]


def check_command(words: list[str]) -> None:
    """Parses a command line as the command does, and checks the config that it names."""
    name, *rest = words
    parser = importlib.import_module(COMMANDS[name].module).build_parser(f"vit-jax {name}")
    if "--config" not in parser._option_string_actions:
        parser.parse_args(rest)
        return
    args, values = command.parse_config_flags(parser, rest)
    if getattr(args, "data", None):
        assert not values
        return
    config = config_files.load(args.config, values, parser).config
    check_config(config, may_lack=name == "plan")
    check_multipliers(config)


def has_flag(flag: str, value: str) -> bool:
    """Whether a command takes a flag with such a value, "" for one without."""
    for each in COMMANDS.values():
        parser = importlib.import_module(each.module).build_parser("")
        if action := parser._option_string_actions.get(flag):
            parser._get_values(action, [value] * bool(value))
            return True
    return False


BASE = ["train", "--config", "b16:finetune,cifar10", "--config.init_from=B_16"]


@pytest.mark.parametrize("code", sorted(set(claims())))
def test_what_the_comparison_says_can_be_typed(code):
    name, *words = shlex.split(code)
    key, _, value = name.removeprefix("--config.").partition("=")
    if name == "vit-jax":
        check_command(words)
    elif name.startswith("--") and not name.startswith("--config."):
        assert has_flag(name, " ".join(words))
    else:
        check_command([*BASE, f"--config.{key}={value}"])


def test_the_comparison_has_commands_and_keys():
    assert sum(code.startswith("vit-jax ") for code in claims()) >= 15
    assert sum(code.startswith("--config.") for code in claims()) >= 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_on_the_pages_are_in_the_makefile(page):
    (targets,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)
    named = re.findall(r"(?:^    |`)make ([a-z]+)", page.read_text(), re.M)
    assert set(named) <= set(targets.split())
    assert named or page.name != "CONTRIBUTING.md"


def test_a_size_is_one_row(monkeypatch):
    monkeypatch.setattr(vit, "SIZES", dict(vit.SIZES))
    exec(example("vit_jax/models/vit.py"), {"SIZES": vit.SIZES})
    model = models.create_model({**models.model_config("ViT-g/14"), "num_classes": 1000})
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    size = sum(x.size for x in jax.tree.leaves(shapes))
    assert size == pytest.approx(1011e6, rel=2e-3)  # Table 2 of Zhai et al.


def test_a_family_is_one_file_and_one_line(monkeypatch, module, data_dir, tmp_path):
    family = module("vit_jax.models.pooled", "vit_jax/models/pooled.py").PooledConfig
    monkeypatch.setitem(models.ARCHITECTURES, "pooled", None)  # So that it goes in the end.
    exec(example("vit_jax/models/__init__.py"), dict(models.__dict__))
    config = {**models.model_config("Pooled-64/4"), "num_classes": 10}
    model = models.create_model(config)
    images = jnp.ones((2, 8, 8, 3))
    params = model.init(jax.random.key(0), images, train=False)["params"]
    assert model.apply({"params": params}, images, train=False).shape == (2, 10)
    arrays = flatten_dict(params, sep="/")
    assert models.recognize(arrays) == "pooled"
    assert {"architecture": "pooled", **family.infer(arrays)} == config
    assert models.describe(config).multiply_adds(8) == 4 * 48 * 64 + 64 * 10
    assert family.channels(arrays) == 3

    config = recipes.get_config("Pooled-64/4", "pretrain,digits")
    config.update({"batch_size": 8, "duration": "1 step"})
    config.schedule.warmup = "0 steps"
    config.dataset.update({"data_dir": data_dir, "image_size": 8, "channels": 1})
    train(config, tmp_path / "run")
    assert load_pretrained(tmp_path / "run").preprocessing.channels == 1


def shorten(config, data_dir: str):
    """Two steps of the smallest model, with all else as it was."""
    config.model.update({"hidden_size": 16, "num_layers": 1, "mlp_dim": 32, "num_heads": 2})
    config.model.update({"dtype": "float32", "representation_size": 0})
    config.duration, config.schedule.warmup = "2 steps", "1 step"
    config.dataset.data_dir = data_dir
    return config


def test_a_data_set_of_ones_own(module, tmp_path):
    blobs = module("blobs", "blobs.py")
    blobs.Blobs(data_dir=tmp_path / "tfds").download_and_prepare()
    train(shorten(blobs.get_config(), str(tmp_path / "tfds")), tmp_path / "run")
    assert (tmp_path / "run/metrics.json").is_file()


def test_an_evaluator_of_ones_own(monkeypatch, module, tmp_path, data_dir, capsys):
    module("vit_jax.evaluation.confidence", "vit_jax/evaluation/confidence.py")
    monkeypatch.setattr(registry, "EVALUATORS", dict(registry.EVALUATORS))
    exec(example("vit_jax/evaluation/registry.py"), dict(registry.__dict__))
    config = module("sure_digits", "sure_digits.py").get_config()
    train(shorten(config, data_dir), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    (sure,) = [record["sure/confidence"] for record in records if "sure/confidence" in record]
    assert 10 <= sure <= 100  # of ten classes
    (printed,) = re.findall("prints `(.+?)`", (ROOT / "docs/extending.md").read_text())
    assert f"{printed} {sure:.4f}" in capsys.readouterr().out


def test_an_evaluator_is_added_to_the_digits_by_flags(monkeypatch, module, tmp_path, data_dir):
    confidence = module("vit_jax.evaluation.confidence", "vit_jax/evaluation/confidence.py")
    added = registry.EvaluatorType(confidence.confidence, keys={"scale": 100.0})
    monkeypatch.setattr(registry, "EVALUATORS", {**registry.EVALUATORS, "confidence": added})
    (line,) = [line for line in commands() if "type=confidence" in line]
    _, _, _, name, *flags = shlex.split(line)
    config = config_files.load(name, flags).config
    train(shorten(config, data_dir), tmp_path / "run")
    assert "sure/confidence" in (tmp_path / "run/metrics.jsonl").read_text()


def test_a_precision_is_one_row(monkeypatch):
    monkeypatch.setattr(precisions, "PRECISIONS", dict(precisions.PRECISIONS))
    exec(example("vit_jax/export/precisions.py"), dict(precisions.__dict__))
    assert precisions.thresholds()["tf32"]["cosine"] == 0.999
    assert precisions.detect("tf32", {"fp32": 100}, ["MatMul"]) == "tf32"


def test_an_experiment_is_one_file_of_forty_lines(module, tmp_path, data_dir):
    title = "experiments/dropout.py"
    assert example(title).count("\n") <= 40
    experiment = module("experiments.dropout", title).EXPERIMENT
    setting = Setting(scales.SMOKE, seeds=1)
    measurements = experiment.measure(setting)
    runs = [run for measurement in measurements for run in measurement.sources]
    assert len({run.name for run in runs}) == len(runs) == 3
    assert [run.config.model.dropout_rate for run in runs] == [0.0, 0.1, 0.3]
    for run in runs:
        check_config(run.config)
    train(shorten(runs[0].config, data_dir), tmp_path)
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert measurements[0].metric in found[-1]


@pytest.mark.parametrize("line", sorted(set(commands("python -m experiments"))))
def test_flags_of_experiments_on_the_pages_exist(line):
    words = shlex.split(line)
    name = words[2].removeprefix("experiments.")
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    source = (ROOT / f"experiments/{name}.py").read_text()
    if "from experiments.runner import command" not in source:
        return  # It has flags of its own.
    known = build_parser("", "")._option_string_actions
    assert given <= known.keys()


def test_size_and_cost_are_counted_as_the_page_says():
    ((_, count),) = [block for block in blocks(ROOT / "docs/models.md") if "eval_shape" in block[1]]
    names = {}
    exec(count, names)
    table = (ROOT / "docs/models.md").read_text()
    row = f"{names['parameters']:,} | {names['multiply_adds'] / 1e9:.2f} |"
    assert re.search(rf"^\| ViT-B/16 .*{re.escape(row)}$", table, re.M)


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
