"""The sources of a recipe's values, in the words of the paper's tables.

`vit-jax train --print_config` shows it beside every value.
"""

from flax.traverse_util import flatten_dict

from vit_jax import recipes

# Of every recipe the values of the row of its table, and those that all of its rows share.
_SOURCES = {
    "pretrain": (
        ("duration", "model.dropout_rate", "optimizer.weight_decay", "schedule.base_lr")
        + ("schedule.decay",),
        ("batch_size", "dataset.image_size", "optimizer.b1", "optimizer.b2", "optimizer.clip_norm")
        + ("optimizer.name", "schedule.warmup"),
    ),
    "finetune": (
        ("duration", "schedule.base_lr"),
        ("batch_size", "dataset.image_size", "optimizer.clip_norm", "optimizer.momentum")
        + ("optimizer.name", "optimizer.weight_decay", "schedule.decay"),
    ),
    "masked": (
        (),
        ("batch_size", "duration", "masking.rate", "masking.target", "objective")
        + ("optimizer.name", "schedule.base_lr", "schedule.decay", "schedule.warmup"),
    ),
}
_TABLES = {"pretrain": "Table 3", "finetune": "Table 4", "masked": "Appendix B.1.2"}
_OTHER_SOURCES = {
    "pretrain": {"model.representation_size": "Section 3.1", "loss": "published code"},
    "finetune": {"model.dropout_rate": "published code", "schedule.warmup": "published code"},
    "masked": {},
}


# What a preset has because a config here must have it.
_OF_NO_SOURCE = {"init_from", "optimizer.layer_decay", "optimizer.lr_multipliers"}


def sources(made: recipes.Recorded) -> dict[str, str]:
    """Returns the source of every value of a recipe, by its key, such as "schedule.base_lr"."""
    recipe, dataset, options = recipes.parse_spec(made.spec)
    keys = flatten_dict(made.config.to_dict(), sep=".", keep_empty_nodes=True)
    is_preset = recipe in recipes.PRESETS
    where = _of_preset(made, recipe) if is_preset else _of_paper(recipe, made.model, dataset)
    where |= dict.fromkeys((f"model.{key}" for key in recipes.sizes_of(made.model)), made.model)
    if "512" in options:
        where |= dict.fromkeys(("dataset.image_size", "ema_decay"), "Table 2")
    where |= dict.fromkeys(("dataset.name", "dataset.development"), f"spec {made.spec!r}")
    where |= {
        f"model.{key}": "taken from the weights of init_from"
        for key, value in made.config.model.items()
        if value is None
    }
    return {key: where.get(key, f"recipe {recipe}") for key in keys}


def _of_paper(recipe: str, model: str, dataset: str) -> dict[str, str]:
    row, shared = _SOURCES[recipe]
    where = dict.fromkeys(shared, _TABLES[recipe])
    where |= dict.fromkeys(row, f"{_TABLES[recipe]}, {_row_name(recipe, model, dataset)}")
    return where | _OTHER_SOURCES[recipe]


def _of_preset(made: recipes.Recorded, recipe: str) -> dict[str, str]:
    """The source of every value that is not that of a config before a recipe."""
    unset, values = (
        flatten_dict(config.to_dict(), sep=".", keep_empty_nodes=True)
        for config in (recipes.base(made.model, made.config.dataset.name), made.config)
    )
    changed = {key for key, value in values.items() if key not in unset or value != unset[key]}
    changed -= _OF_NO_SOURCE
    return dict.fromkeys(changed, recipes.PRESETS[recipe].source)


def _row_name(recipe: str, model: str, dataset: str) -> str:
    """The row of Table 3 or 4 that is taken for a model and a data set, in its table's words."""
    dataset = recipes.table_name(dataset)
    if recipe == "pretrain":
        row = recipes.pretraining_row(model, dataset)
        found = next(
            (" on ".join(key) for key, value in recipes.TABLE_3.items() if value is row), model
        )
        return found.replace("ViT-*", "ViT")
    return dataset if dataset in recipes.TABLE_4 else "oxford_flowers102"
