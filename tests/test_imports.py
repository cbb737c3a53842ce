"""Who imports whom, read from the source: only downward, and in no circle."""

import ast
import pathlib
from typing import NamedTuple

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "vit_jax"

# From the bottom to the top: a module imports those of its own layer and of layers below. An entry
# is a module or a package with all that is in it; the longest that matches counts.
LAYERS = (
    (
        "printable",
        "errors",
        "files",
        "image_outputs",
        "image_size",
        "command",
        "interruption",
        "pixel_classes",
        "signals",
        "tensorflow_env",
        "terminal",
        "webpage",
        "xla_flags",
    ),
    ("last_words", "processes"),
    ("models", "multipliers", "lora", "distillation"),
    ("state", "sharding", "steps", "mixing"),
    ("data",),
    ("evaluation",),
    ("recipes", "config", "config_migration", "config_objective", "config_rules"),
    ("analysis", "checkpoints"),
    ("config_files", "dense_features", "doctor", "export", "inference", "provenance"),
    ("analysis.of_images",),
    ("serving",),
    ("teacher",),
    ("writers",),
    ("trackers", "profiling"),
    ("reporting",),
    ("program",),
    ("plan",),
    ("preparation", "initialization", "own_images"),
    ("longer", "pictures"),
    ("train",),
    ("runner",),
    # Commands, which no library module imports.
    (
        "main",
        "predict",
        "convert",
        "detect",
        "evaluate",
        "features",
        "probe",
        "restore",
        "segment",
        "sweep",
        "analysis.__main__",
        "checkpoints.__main__",
        "doctor.__main__",
        "export.__main__",
        "plan.__main__",
        "serving.__main__",
    ),
    ("cli", "__main__"),
)
COMMANDS = {name for layer in LAYERS[-2:] for name in layer}
# The way in: its names are imported when they are first asked for.
ROOT = "vit_jax"

# They run where there is no TensorFlow, nor what belongs to it or to the export.
WITHOUT_TENSORFLOW = (
    "models",
    "multipliers",
    "distillation",
    "lora",
    "mixing",
    "steps",
    "state",
    "sharding",
    "analysis",
    "checkpoints",
    "recipes",
    "config",
    "config_migration",
    "config_objective",
    "config_rules",
    "config_files",
    "dense_features",
    "detect",
    "features",
    "inference",
    "predict",
    "probe",
    "restore",
    "segment",
    "main",
    "plan",
    "program",
    "teacher",
    "sweep",
    "cli",
    "data.box_views",
    "data.boxes",
    "data.images",
    "data.image_files",
    "data.masks",
    "data.preprocess",
    "data.protocols",
    "data.randaugment",
    "data.resampling",
    "data.augmentation",
    "evaluation",
    "export.engine",
    "export.runtime",
    "export.to_tensorrt",
    "serving",
)
# They read TFDS's data sets, for which it needs no TensorFlow.
WITH_TFDS = ("data", "own_images", "preparation", "train", "evaluate")
OF_TENSORFLOW = {"tensorflow", "tensorflow_datasets", "clu", "onnx", "onnxruntime", "tf2onnx"}
# Machines that build an engine, or serve one, have no JAX either.
WITHOUT_JAX = ("export.engine", "export.runtime", "export.to_tensorrt", "serving.app")


class Imports(NamedTuple):
    """What a module imports when it is imported, and what its functions do when they are called."""

    top: set[str]
    inside: set[str]


def name_of(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def read_imports(source: str, modules: set[str]) -> Imports:
    """The modules that a source imports; what only type checkers see does not count."""
    imports = Imports(set(), set())

    def visit(node: ast.AST, found: set[str]) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child, found)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in modules else str(node.module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found = imports.inside
        for child in ast.iter_child_nodes(node):
            visit(child, found)

    visit(ast.parse(source), imports.top)
    return imports


IMPORTS = {name: read_imports(source, set(SOURCES)) for name, source in SOURCES.items()}


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name in SOURCES}


def short(name: str) -> str:
    return name.removeprefix(f"{ROOT}.")


def layer_of(name: str) -> int:
    """The layer of a module, by the longest entry that it is or lies in."""
    entries = {entry: height for height, layer in enumerate(LAYERS) for entry in layer}
    parts = short(name).split(".")
    for length in range(len(parts), 0, -1):
        if (entry := ".".join(parts[:length])) in entries:
            return entries[entry]
    raise AssertionError(f"{name} has no layer: give it one in LAYERS")


def is_in(name: str, entries: tuple[str, ...]) -> bool:
    return short(name).removesuffix(".__main__") == short(name) and any(
        short(name) == entry or short(name).startswith(f"{entry}.") for entry in entries
    )


def loaded_with(name: str) -> set[str]:
    """All that the import of a module imports, packages around it among them."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        if module in IMPORTS:
            waiting += IMPORTS[module].top
        if module.startswith(f"{ROOT}."):
            waiting.append(module.rpartition(".")[0])
    return seen


def test_every_module_has_a_layer():
    for name in set(SOURCES) - {ROOT}:
        layer_of(name)


def test_every_entry_of_the_layers_is_a_module():
    entries = {entry for layer in LAYERS for entry in layer}
    assert {entry for entry in entries if f"{ROOT}.{entry}" not in SOURCES} == set()


def test_no_import_runs_upward():
    upward = [
        f"{name} -> {other}"
        for name in set(SOURCES) - {ROOT}
        for other in ours(IMPORTS[name].top | IMPORTS[name].inside) - {ROOT}
        if layer_of(other) > layer_of(name)
    ]
    assert sorted(upward) == []


def test_no_library_module_imports_a_command():
    found = [
        f"{name} -> {other}"
        for name in set(SOURCES) - {ROOT}
        if short(name) not in COMMANDS
        for other in ours(IMPORTS[name].top | IMPORTS[name].inside)
        if short(other) in COMMANDS
    ]
    assert sorted(found) == []


def test_no_circles_even_where_functions_import():
    edges = {
        name: ours(IMPORTS[name].top | IMPORTS[name].inside) - {ROOT, name}
        for name in set(SOURCES) - {ROOT}
    }
    # What imports nothing that is left can be taken away; a circle stays.
    while leaves := [name for name, others in edges.items() if not others & set(edges)]:
        for name in leaves:
            del edges[name]
    assert {name: sorted(others & set(edges)) for name, others in edges.items()} == {}


@pytest.mark.parametrize("name", [name for name in SOURCES if is_in(name, WITHOUT_TENSORFLOW)])
def test_it_is_imported_without_tensorflow(name):
    roots = {module.partition(".")[0] for module in loaded_with(name)}
    assert roots & OF_TENSORFLOW == set()


@pytest.mark.parametrize("name", [name for name in SOURCES if is_in(name, WITH_TFDS)])
def test_the_input_is_imported_without_tensorflow(name):
    roots = {module.partition(".")[0] for module in loaded_with(name)}
    assert "tensorflow" not in roots


@pytest.mark.parametrize("name", [f"{ROOT}.{name}" for name in WITHOUT_JAX])
def test_what_deploys_is_imported_without_jax(name):
    roots = {module.partition(".")[0] for module in loaded_with(name)}
    assert roots & {"jax", "jaxlib", "flax", "optax"} == set()


def test_optional_packages_are_imported_where_they_are_used():
    optional = {
        "torch",
        "timm",
        "transformers",
        "tensorrt",
        "cuda",
        "jax2onnx",
        "tf2onnx",
        "wandb",
        "mlflow",
        "pycocotools",
    }
    found = {
        f"{name} -> {other}"
        for name, imports in IMPORTS.items()
        for other in imports.top
        if other.partition(".")[0] in optional
    }
    assert found == set()


def test_the_reader_tells_the_top_from_functions():
    source = """
import os
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import jax
else:
    import json
def function():
    from vit_jax import models
    from vit_jax.errors import UserError
"""
    imports = read_imports(source, {"vit_jax", "vit_jax.models", "vit_jax.errors"})
    assert imports.top == {"os", "typing", "json"}
    assert imports.inside == {"vit_jax.models", "vit_jax.errors"}
