"""Runs the tests of what is changed in a working copy: those nearest to it, then wider ones.

    python nearest.py FILE_OR_FOLDER...

It is what `make mutation` gives cosmic-ray as its test command. Of a mutant, the changed file is
tested; while nothing is changed, all that is named. Nearest to `vit_jax/state.py` is
`tests/test_state.py`, unless `NEAREST` names others; most mutants end there.
"""

import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).parents[1]
SECONDS = 600  # that nearest tests may take: a mutant may not come to an end

NEAREST = {
    "checkpoints/__main__": ("checkpoints/test_augreg", "checkpoints/test_download"),
    "checkpoints/config_fields": ("checkpoints/test_contradictions",),
    "checkpoints/conversion": ("test_convert",),
    "checkpoints/decoder": ("test_segment",),
    "checkpoints/detector": ("checkpoints/test_detector", "test_train_detection"),
    "checkpoints/flags": ("test_predict",),
    "checkpoints/foreign_configs": (
        *("checkpoints/test_contradictions", "checkpoints/test_foreign_configs"),
        "checkpoints/test_save",
    ),
    "checkpoints/huggingface_config": (
        *("checkpoints/test_contradictions", "checkpoints/test_huggingface_config"),
        "checkpoints/test_save",
    ),
    "checkpoints/huggingface_names": (
        *("checkpoints/test_layouts", "checkpoints/test_newer_vits", "checkpoints/test_save"),
    ),
    "checkpoints/infer": ("checkpoints/test_infer", "models/test_families"),
    "checkpoints/integrity": ("checkpoints/test_training",),
    "checkpoints/interpolation": ("checkpoints/test_newer_vits",),
    "checkpoints/layouts": ("checkpoints/test_layouts", "checkpoints/test_bit"),
    "checkpoints/model_info": ("checkpoints/test_contradictions", "checkpoints/test_pretrained"),
    "checkpoints/patch_head": ("test_restore",),
    "checkpoints/timm_config": (
        *("checkpoints/test_contradictions", "checkpoints/test_timm_config"),
        "checkpoints/test_save",
    ),
    "checkpoints/torch_names": ("checkpoints/test_layouts",),
    "models/__init__": ("models/test_families",),
    "models/base": ("models/test_families", "test_channels"),
    "models/detection": ("models/test_detection", "export/test_detectors"),
    "models/encoder": ("models/test_vit", "models/test_newer_parts", "models/test_positions"),
    "models/rematerialization": ("models/test_vit",),
    "models/axial": ("analysis/test_flops", "models/test_axial"),
    "models/resnet": ("analysis/test_flops", "models/test_resnet", "models/test_bit"),
    "models/vit": ("analysis/test_flops", "models/test_vit", "checkpoints/test_contradictions"),
    "recipes/__init__": ("test_recipes",),
    "recipes/names": ("test_recipes", "analysis/test_page"),
    "recipes/own": ("test_own_images",),
    "recipes/paper": ("test_recipes",),
    "recipes/presets": (
        *("test_recipes_presets", "experiments/test_segmentation", "experiments/test_detection"),
    ),
}
# By the first part of a module's name.
WIDER = {
    "checkpoints": ("checkpoints", "test_convert", "test_channels", "fuzz"),
    "models": ("models", "analysis/test_flops", "checkpoints", "numerics", "test_steps"),
    "recipes": ("test_recipes", "test_recipes_presets", "test_own_images"),
    "state": ("test_steps",),
}


def nearest_to(module: str) -> tuple[str, ...]:
    folder, _, name = module.rpartition("/")
    mirrored = folder if name == "__init__" else f"{folder}/test_{name}".removeprefix("/")
    return NEAREST.get(module, (mirrored,))


def wider_than(module: str) -> tuple[str, ...]:
    return WIDER.get(module.split("/")[0], ())


def path_of(tests: str) -> pathlib.Path:
    path = TESTS / tests
    return path if path.is_dir() else path.with_suffix(".py")


def changed_files() -> list[str]:
    command = ["git", "diff", "--name-only", "HEAD", "--", "vit_jax"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def modules_of(name: str) -> list[str]:
    path = pathlib.Path(name)
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [str(file.relative_to("vit_jax").with_suffix("")) for file in files]


def passes(tests: list[str], seconds: float | None = None) -> bool:
    if not tests:
        return True
    paths = [str(path_of(each)) for each in tests]
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not slow", *paths]
    code = subprocess.run(command, timeout=seconds).returncode
    return code in (0, 5)  # 5: all of them are slow.


def main(names: list[str]) -> int:
    changed = changed_files()
    modules = [module for name in changed or names for module in modules_of(name)]
    nearest = dict.fromkeys(tests for module in modules for tests in nearest_to(module))
    wider = dict.fromkeys(tests for module in modules for tests in wider_than(module))
    seconds = SECONDS if changed else None
    return 0 if passes(list(nearest), seconds) and passes(list(wider)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
