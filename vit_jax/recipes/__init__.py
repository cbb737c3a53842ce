"""Training recipes by name: the paper's, and presets that its authors published later."""

import contextlib
from collections.abc import Callable, Generator, Mapping
from contextvars import ContextVar
from typing import NamedTuple

from ml_collections import ConfigDict

from vit_jax.errors import UserError, brief, brief_name, nearest
from vit_jax.recipes import own, paper, presets
from vit_jax.recipes.names import OFFICIAL_NAMES, model_name, name_of, sizes_of
from vit_jax.recipes.paper import (
    ADAFACTOR,
    LEFT_TO_WEIGHTS,
    REQUIRED,
    TABLE_3,
    TABLE_4,
    FineTuning,
    Pretraining,
    base,
    finetune,
    finetuning_row,
    masked,
    pretrain,
    pretraining_row,
    table_name,
)

__all__ = [
    "ADAFACTOR",
    "LEFT_TO_WEIGHTS",
    "OFFICIAL_NAMES",
    "PRESETS",
    "RECIPES",
    "REQUIRED",
    "TABLE_3",
    "TABLE_4",
    "FineTuning",
    "Pretraining",
    "Recipe",
    "Recorded",
    "base",
    "finetune",
    "finetuning_row",
    "get_config",
    "masked",
    "model_name",
    "name_of",
    "parse_spec",
    "pretrain",
    "pretraining_row",
    "recording",
    "sizes_of",
    "table_name",
]


class Recipe(NamedTuple):
    """A recipe that a spec can name.

    Attributes:
        make: the config of a model and a data set, by their names.
        options: words that may follow the data set, and what each changes in the config; "dev" may
            beside them.
        default_dataset: where the spec names none; "" is an error then.
        source: of the values, for presets.
        goes_without_option: tells of a data set whether no word need follow it.
    """

    make: Callable[[str, str], ConfigDict]
    options: Mapping[str, Callable[[ConfigDict], None]] = {}
    default_dataset: str = ""
    source: str = ""
    goes_without_option: Callable[[str], bool] = lambda dataset: True  # noqa: ARG005


PRESETS = {
    "augreg": Recipe(
        presets.augreg,
        default_dataset="imagenet2012",
        source="AugReg (2106.10270), big_vision's vit_i1k.py and vit_i21k.py",
    ),
    "baseline": Recipe(
        presets.baseline,
        options=presets.BASELINE_DURATIONS,
        default_dataset="imagenet2012",
        source="Better plain ViT baselines (2205.01580), big_vision's vit_s16_i1k.py",
    ),
    "transfer": Recipe(
        presets.transfer,
        options={"inception": presets.crop_as_inception},
        source="big_vision's transfer.py",
    ),
    "bit_hyperrule": Recipe(
        presets.bit_hyperrule,
        options=presets.HYPERRULE_SIZES,
        source="BiT-HyperRule (1912.11370)",
        goes_without_option=presets.knows_size,
    ),
    "segmentation": Recipe(
        presets.segmentation, source="Segmenter (2105.05633), Section 4.1, with the linear decoder"
    ),
    "detection": Recipe(
        presets.detection, source="ViTDet (2203.16527), Appendix A.2, with a dense head on one grid"
    ),
    "own": Recipe(own.own, source="Table 4, as vit_jax.recipes.own fits it"),
}
RECIPES = {
    "pretrain": Recipe(paper.pretrain, default_dataset="imagenet2012"),
    "masked": Recipe(paper.masked),
    "finetune": Recipe(paper.finetune, options={"512": paper.enlarge}),
    **PRESETS,
}


def get_config(model: str, spec: str = "") -> ConfigDict:
    """The config of a run: a model of the paper under one of its recipes, or a later preset.

    Args:
        model: the paper's name, for example "ViT-B/16".
        spec: words separated by commas. First the recipe: "pretrain" (the default), "masked" for
            pre-training by masked patch prediction, or "finetune", or a preset of
            `vit_jax.recipes.presets`: "augreg" or "baseline" from scratch, "transfer",
            "bit_hyperrule", "segmentation" or "detection" from weights, and "own", with which
            `vit-jax train --data` begins. Then the data set: a TFDS name, "vtab:TASK",
            "folder:PATH" or "list:FILE" (default imagenet2012 from scratch with labels; else it
            must be given). Then, optionally, "dev" to hold out the part of train on which the paper
            chose its hyperparameters and to evaluate on that, and a word of the recipe's: of
            finetune "512", the resolution and the averaging of Table 2's ImageNet rows; of baseline
            "90", "150" or "300", its epochs; of transfer "inception", its other crop; of
            bit_hyperrule "small", "medium" or "large", the size of the data set, which must be said
            where it is not known.

    Raises:
        UserError: the spec has a word that is none of these.
    """
    name, dataset, options = parse_spec(spec)
    recipe = RECIPES[name]
    config = recipe.make(model, dataset)
    for option in options - {"dev"}:
        recipe.options[option](config)
    if "dev" in options:
        config.dataset.development = True
        config.dataset.train_split = ""  # Both splits are chosen then.
    if (recorded := _recorded.get()) is not None:
        recorded.append(Recorded(model, spec, config.copy_and_resolve_references()))
    return config


class Recorded(NamedTuple):
    """The arguments of a call of `get_config`, and a copy of its result."""

    model: str
    spec: str
    config: ConfigDict


_recorded: ContextVar[list[Recorded] | None] = ContextVar("recorded", default=None)


@contextlib.contextmanager
def recording() -> Generator[list[Recorded]]:
    """Lists the calls of `get_config` in this context, which tells what a config file changed."""
    calls: list[Recorded] = []
    token = _recorded.set(calls)
    try:
        yield calls
    finally:
        _recorded.reset(token)


def parse_spec(spec: str) -> tuple[str, str, set[str]]:
    """The recipe, the data set and the options that a spec names, see `get_config`."""
    name, comma, dataset = (spec or "pretrain").partition(",")
    if name not in RECIPES:
        near = nearest(name, RECIPES)
        hint = f"did you mean {near}?" if near else "for example pretrain,imagenet21k"
        raise UserError(
            f"recipe {brief(name)} is unknown: use pretrain, masked or finetune, or of the presets "
            f"{' or '.join(PRESETS)}; {hint}"
        )
    dataset, options = _split_options(spec, dataset, ("dev", *RECIPES[name].options))
    if "," in dataset and not dataset.startswith(("folder:", "list:")):
        dataset, _, rest = dataset.partition(",")
        valid = " or ".join(("dev", *RECIPES[name].options))
        raise UserError(
            f"spec {brief(spec)} has {brief(rest)} after the data set: only {valid} may follow"
        )
    default = RECIPES[name].default_dataset
    if not dataset and (not default or (comma and not options)):
        raise UserError(f"spec {brief(spec)} names no data set: for example {name},cifar10")
    dataset = dataset or default
    if not options - {"dev"} and not RECIPES[name].goes_without_option(dataset):
        raise UserError(
            f"{name} does not know how large {brief_name(dataset)} is: say it after the data set, "
            f"{' or '.join(RECIPES[name].options)}, for example {name},food101,medium"
        )
    return name, dataset, options


def _split_options(spec: str, dataset: str, valid: tuple[str, ...]) -> tuple[str, set[str]]:
    """Splits off the options at the end."""
    options = set()
    while (word := dataset.rpartition(",")[2]) in (*valid, "512"):
        dataset = dataset.rpartition(",")[0]
        options.add(word)
    if "512" in options - set(valid):
        raise UserError(
            f"spec {brief(spec)} has 512, which is a resolution to fine-tune at: use "
            f"finetune,{dataset or 'imagenet2012'},512, or change config.dataset.image_size"
        )
    if len(chosen := sorted(options - {"dev"})) > 1:
        raise UserError(f"spec {brief(spec)} has {' and '.join(chosen)}: keep one of them")
    return dataset, options
