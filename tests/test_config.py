import dataclasses
import functools
import json
import math
import pathlib
import re
import runpy

import jax
import jax.numpy as jnp
import optax
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from vit_jax import models
from vit_jax.config import check_config, count_steps, read_config, to_dict, unknown_key
from vit_jax.config_files import load
from vit_jax.config_migration import (
    ADDED_KEYS,
    ADDED_MODEL_KEYS,
    MOVED_KEYS,
    complete_sections,
    migrate,
)
from vit_jax.config_rules import RULES, check_value, model_rules
from vit_jax.errors import UserError
from vit_jax.models.base import option
from vit_jax.recipes import ADAFACTOR, LEFT_TO_WEIGHTS, get_config
from vit_jax.state import (
    DECAYS,
    OPTIMIZERS,
    SCHEDULE_LENGTHS,
    create_optimizer,
    create_schedule,
    optimizer_keys,
)

ROOT = pathlib.Path(__file__).parents[1]
# Written by the code of before config.evals.
BEFORE_EVALS = pathlib.Path(__file__).with_name("config_of_before_evals.json")
FILES = [
    *ROOT.glob("configs/*.py"),
    ROOT / "experiments/cifar10_from_scratch.py",
]


def recipe(model, spec=""):
    if spec != "adafactor":
        return get_config(model, spec)
    config = get_config(model, "pretrain,jft")
    config.optimizer = ADAFACTOR
    config.schedule.decay, config.schedule.end_lr = "rsqrt", 0.0
    return config


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_file_passes_its_own_check(path):
    check_config(runpy.run_path(str(path))["get_config"]())


@pytest.mark.parametrize("spec", ["pretrain,imagenet21k", "pretrain,jft,dev", "masked,jft"])
def test_every_recipe_passes_its_own_check(spec):
    check_config(recipe("ViT-L/16", spec))


def _section(config, path):
    return functools.reduce(getattr, path.split("."), config) if path else config


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ("", "bacth_size", "did you mean config.batch_size"),
        ("dataset", "random_flips", "did you mean config.dataset.random_flip"),
        ("masking", "rates", "did you mean config.masking.rate"),
        ("model", "dropout", "did you mean config.model.dropout_rate"),
        ("evals.fewshot", "shot", "did you mean config.evals.fewshot.shots"),
        ("optimizer", "momentum", "valid are optimizer.b1, optimizer.b2, optimizer.clip_norm"),
        ("schedule", "lr", "did you mean config.schedule.base_lr or config.schedule.end_lr?"),
        ("schedule", "warmup_steps", "did you mean config.schedule.warmup"),
    ],
)
def test_an_unknown_key_raises_and_names_the_nearest(section, key, nearest):
    config = recipe("ViT-B/16")
    _section(config, section)[key] = 1
    name = f"{section}.{key}".lstrip(".")
    with pytest.raises(UserError, match=f"config.{name} is not a key that anything") as error:
        check_config(config)
    assert nearest in str(error.value)


@pytest.mark.parametrize(("key", "moved"), MOVED_KEYS.items())
def test_a_key_of_before_says_what_replaces_it(key, moved):
    error = unknown_key(key, ["evals"])
    assert str(error) == f"config.{key} is config.{moved} today: set that"


def test_a_key_that_is_gone_says_so_and_a_run_that_has_it_goes_on():
    for key in ("cache", "shuffle_buffer"):
        config = recipe("ViT-B/16")
        config.dataset[key] = "auto"
        with pytest.raises(UserError, match=f"config.dataset.{key} is gone, .*: leave it out"):
            check_config(config)
        check_config(ConfigDict(migrate(to_dict(config))))


def test_a_config_file_of_before_says_what_replaces_its_keys():
    for key, moved in (("eval_every", "evals.val.every"), ("fewshot", "evals.fewshot")):
        config = recipe("ViT-B/16")
        config[key] = "5 epochs"
        with pytest.raises(UserError, match=f"config.{key} is config.{moved} today: set that"):
            check_config(config)


@pytest.mark.parametrize(
    ("spec", "given", "name"),
    [
        ("pretrain,imagenet2012", "adam", "adafactor"),
        ("pretrain,imagenet2012", "adam", "sgd"),
        ("finetune,cifar10", "sgd", "adam"),
        ("adafactor", "adafactor", "sgd"),
    ],
)
def test_the_name_of_another_optimizer_says_that_its_keys_go_with_it(spec, given, name):
    config = recipe("ViT-B/16", spec)
    config.init_from = "weights.npz"
    check_config(config)
    config.optimizer.name = name
    message = f"name is '{name}' but its other keys are those of {given}, which a flag cannot chan"
    with pytest.raises(UserError, match=message):
        check_config(config)


def test_a_missing_key_raises():
    config = recipe("ViT-B/16")
    del config.dataset.protocol
    with pytest.raises(UserError, match="config.dataset.protocol is missing"):
        check_config(config)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("", "batch_size", "64", "config.batch_size is '64': it must be of type int"),
        ("", "batch_size", 64.0, "config.batch_size is 64.0: it must be of type int"),
        ("", "batch_size", True, "config.batch_size is True: it must be of type int"),
        ("dataset", "random_flip", 1, "config.dataset.random_flip is 1: it must be of type bool"),
        ("", "schedule", 3, "config.schedule is 3: it is a section of keys"),
        ("", "evals", "flowers", "config.evals is 'flowers': it is a section of keys"),
        (
            "evals.fewshot",
            "shots",
            (1, 5),
            "config.evals.fewshot.shots is (1, 5): it must be of typ",
        ),
        ("", "patience", -1, "config.patience is -1: it must not be negative"),
        ("", "augment", "strong3", "augment 'strong3' is not understood: use none, light1, light2"),
        (
            "",
            "augment_contrast",
            "mean",
            "config.augment_contrast 'mean' is unknown: use augreg or pil",
        ),
        ("dataset", "jpeg_dct", "best", "config.dataset.jpeg_dct 'best' is unknown: use accurate"),
        ("dataset", "channels", 0, "config.dataset.channels is 0: it must be at least 1"),
        ("dataset", "subset", "half", "dataset.subset 'half' is not understood: use a number of"),
        ("dataset", "holdout", 1.0, "config.dataset.holdout is 1.0: it must be above 0 and below"),
        ("dataset", "broken", "mend", "config.dataset.broken 'mend' is unknown: use refuse or sk"),
        ("dataset", "subset_seed", -1, "config.dataset.subset_seed is -1: it must not be neg"),
        ("evals.fewshot", "shots", "few", "shots 'few' are not positive numbers, each once"),
        ("optimizer", "name", "lamb", "optimizer.name 'lamb' is unknown: use adam, adafactor, sgd"),
        ("model", "architecture", "cnn", "model.architecture 'cnn' is unknown: use vit"),
        ("optimizer", "weight_decay", "0.1", "config.optimizer.weight_decay is '0.1': it must be"),
        ("", "objective", "contrastive", "config.objective 'contrastive' is unknown: use classifi"),
        ("masking", "rate", 0.0, "config.masking.rate is 0.0: it must be above 0 and at most 1"),
        ("masking", "rate", 1.1, "config.masking.rate is 1.1: it must be above 0 and at most 1"),
        ("masking", "target", "color", "config.masking.target 'color' is unknown: use mean_colo"),
        ("", "accumulate_steps", 0, "config.accumulate_steps is 0: it must be at least 1"),
        ("", "keep_checkpoints", 0, "config.keep_checkpoints is 0: it must be at least 1"),
        ("model", "patch_size", 0, "config.model.patch_size is 0: it must be at least 1"),
        ("model", "num_classes", -1, "config.model.num_classes is -1: it must not be negative"),
        ("model", "dropout_rate", 1.5, "config.model.dropout_rate is 1.5: it must be from 0 to be"),
        ("model", "stochastic_depth", 1.0, "config.model.stochastic_depth is 1.0: it must be from"),
        ("model", "position_embedding", "1d", "position_embedding '1d' is unknown: use learned"),
        ("model", "position_placement", "all", "position_placement 'all' is unknown: use stem"),
        ("schedule", "base_lr", 0.0, "config.schedule.base_lr is 0.0: it must be above 0"),
        (
            "optimizer",
            "mu_dtype",
            "float8",
            "config.optimizer.mu_dtype 'float8' is unknown: use float32 or",
        ),
    ],
)
def test_a_wrong_value_raises(section, key, value, message):
    config = ConfigDict(to_dict(recipe("ViT-B/16")), type_safe=False)
    _section(config, section)[key] = value
    with pytest.raises(UserError, match=re.escape(message)):
        check_config(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("resnet_layers", 3, "config.model.resnet_layers is 3: it must be of type tuple"),
        ("resnet_layers", [3, 0], "config.model.resnet_layers has 0: it must be units per stage"),
        ("resnet_layers", [3, "4"], "config.model.resnet_layers has '4': it must be units per"),
        ("group_norm_epsilon", "1e-5", "config.model.group_norm_epsilon is '1e-5': it must be of"),
        ("width_factor", 0, "config.model.width_factor is not a key that anything reads"),
        ("resnet_layer", (3,), "did you mean config.model.resnet_layers"),
    ],
)
def test_a_wrong_value_of_a_hybrid_raises(key, value, message):
    config = ConfigDict(to_dict(recipe("R50+ViT-B/16")), type_safe=False)
    config.model[key] = value
    with pytest.raises(UserError, match=message):
        check_config(config)


def test_the_keys_of_a_resnet_are_its_own():
    config = recipe("R50x1")
    check_config(config)
    config.model.width_factor = 0
    with pytest.raises(UserError, match="config.model.width_factor is 0: it must be at least 1"):
        check_config(config)
    del config.model.width_factor
    with pytest.raises(UserError, match="config.model.width_factor is missing"):
        check_config(config)
    config = recipe("R50x1")
    config.model.gelu = "erf"
    with pytest.raises(UserError, match="config.model.gelu is not a key that anything reads"):
        check_config(config)


def test_the_keys_of_a_hybrid_are_not_those_of_a_vit():
    config = recipe("ViT-B/16")
    config.model.resnet_layers = (3, 4, 9)
    with pytest.raises(UserError, match="config.model.resnet_layers is not a key that anything"):
        check_config(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("label_smoothing", 0.1),
        ("model.head_bias_init", -10.0),
        ("model.num_classes", 10),
        ("model.representation_size", 768),
    ],
)
def test_masked_patch_prediction_has_no_classes(key, value):
    config = recipe("ViT-B/16", "masked,cifar10")
    config.update_from_flattened_dict({key: value})
    message = f"config.{key} is {value}, but objective masked_patches has no classes: add --config"
    with pytest.raises(UserError, match=re.escape(message)):
        check_config(config)
    config.objective = "classification"
    check_config(config)


@pytest.mark.parametrize("model", ["ViT-B/16", "R50+ViT-B/16"])
def test_masked_patch_prediction_has_no_pooling(model):
    config = recipe(model, "masked,cifar10")
    config.model.classifier = "map"
    message = "classifier is 'map', but objective masked_patches has no pooling to train: set --con"
    with pytest.raises(UserError, match=message):
        check_config(config)
    config.objective = "classification"
    check_config(config)


@pytest.mark.parametrize("key", ["train_split", "eval_split"])
def test_development_and_a_split_are_refused_without_the_data_set(key):
    config = recipe("ViT-Ti/16", "pretrain,no_such_data_set")
    config.dataset[key] = "train[:99%]"
    check_config(config)
    config.dataset.development = True
    with pytest.raises(UserError, match="config.dataset: development=True chooses both splits: dr"):
        check_config(config)


def test_images_without_labels_are_not_mixed():
    config = recipe("ViT-Ti/16", "masked,cifar10")
    config.augment = "randaugment(2,10)"
    check_config(config)
    config.augment = "light2"
    with pytest.raises(
        UserError, match="config.augment is 'light2', but .* leave mixup and cutmix out"
    ):
        check_config(config)


HOSTILE = {
    int: ["7", 7.5, True, None, math.nan, [1], -(2**70), 2**70, 10**5000],
    float: ["0.1", True, None, math.nan, math.inf, -math.inf, [0.1], 1e300, -1e300, 10**5000],
    bool: ["true", 1, None, math.nan],
    str: [3, True, None, math.nan, ["a"], "\x1b[2J", "a\nb", "a\0", "\ud800", "9" * 5000],
    tuple: ["3", 3, True, None, math.nan, [math.nan], ["3"], [True], [-1], [2**70], [3] * 999],
}
# What may be negative: the others must refuse -1 as well.
SIGNED = {"seed", "model.head_bias_init"}


def _with(config, key, value):
    """The config with another value, of whatever type, as a JSON file would have it."""
    values = to_dict(config)
    *sections, name = key.split(".")
    functools.reduce(dict.get, sections, values)[name] = value
    return ConfigDict(values)


def _by_key():
    """A recipe that has it, for every key that any recipe has, and its type."""
    kinds, of_key = {f"model.{key}": kind for key, kind in LEFT_TO_WEIGHTS.items()}, {}
    for model in ("ViT-B/16", "R50+ViT-B/16", "R50x1", "Axial-ViT-B/16", "AxialResNet50"):
        for spec in ("adafactor", "pretrain,imagenet21k", "masked,jft", "finetune,cifar10,512,dev"):
            values = flatten_dict(recipe(model, spec).to_dict(), sep=".")
            of_key |= {key: (model, spec, kinds.get(key, type(x))) for key, x in values.items()}
    return of_key


BY_KEY = _by_key()


@pytest.mark.parametrize("key", sorted(BY_KEY))
def test_what_no_value_can_be_is_refused_by_its_key_with_a_way_out(key):
    model, spec, kind = BY_KEY[key]
    sound = recipe(model, spec)
    sound.init_from = "weights.npz"
    check_config(sound)
    hostile = HOSTILE[kind]
    if kind in (int, float) and key not in SIGNED:
        hostile = [*hostile, kind(-1)]
    if key.removeprefix("model.") in LEFT_TO_WEIGHTS:  # Where None has a meaning.
        hostile = [x for x in hostile if x is not None]
    for value in hostile:
        config = _with(sound, key, value)
        with pytest.raises(UserError) as caught:
            check_config(config)
        line = str(caught.value)
        assert line.isprintable() and len(line) < 600
        assert line.startswith((f"config.{key}", f"config.{key.rpartition('.')[0]}"))
        of_type = key.endswith(".type")  # Whose error lists all that there are.
        assert f"; try --config.{key}=" in line or (of_type and "use one of" in line)
        # It shows the value, or as much of it as there is room for.
        shown = "'999" if value == "9" * 5000 else None
        shown = shown or ("whole number of" if value == 10**5000 else repr(value)[:60])
        assert (
            shown in line or (of_type and str(value)[:60] in line) or (f"config.{key} has " in line)
        )  # A list has one that is wrong.


@pytest.mark.parametrize("key", sorted(BY_KEY))
def test_the_way_out_is_one(key):
    section, _, name = key.rpartition(".")
    if section == "model":
        rule = model_rules(recipe(BY_KEY[key][0]).model.architecture)[name]
    elif section.startswith("evals."):
        rule = RULES[f"evals.*.{name}"]
    else:
        rule = RULES[key]
    check_value(key, rule.example, rule)


def test_a_key_without_a_rule_is_noticed():
    assert {re.sub(r"^evals\.\w+", "evals.*", key) for key in BY_KEY if "model." not in key} == {
        key for key in RULES if not key.startswith("model.")
    }
    for architecture in models.ARCHITECTURES:
        for key, field in models.model_fields(architecture).items():
            ruled = field.metadata.get("choices") or field.metadata.get("check")
            assert ruled or field.type is bool, f"{architecture}.{key} has no rule: give it one"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.hidden_size", 2**40, "config.model.hidden_size is 1099511627776: it must be at mo"),
        ("model.num_heads", True, "config.model.num_heads is True: it must be of type int"),
        ("dataset.image_size", 10**6, "config.dataset.image_size is 1000000: it must be a whole"),
        ("dataset.image_size", 9984, "config.model has 7.6e+15 multiply-adds for an image of con"),
        ("schedule.base_lr", math.nan, "config.schedule.base_lr is nan: it must be a finite numb"),
        ("seed", 1 << 70, "config.seed is 1180591620717411303424: it must be at most 4294967295"),
        ("duration", "_", "config.duration: duration '_' is not understood: use '500 steps' or"),
        ("log_every", "2147483648", "config.log_every: duration '2147483648' is above 2147483647"),
        ("augment", "mixup(1e9)", "config.augment: augment 'mixup(1e9)' is not understood: use"),
        ("augment", "mixup(1001)", "is out of range: mixup's alpha must be above 0 and at most 1"),
        ("batch_size", {"a": {"b": 2}}, "config.batch_size is {'a': {'b': 2}}: it must be of type"),
    ],
)
def test_what_a_day_of_attacks_got_through_is_refused(key, value, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check_config(_with(recipe("ViT-L/16"), key, value))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer.lr_multipliers", "head", "multipliers: 'head' is not understood: use PATTERN="),
        ("optimizer.lr_multipliers", "(=1", "'(' is no regular expression: missing ), untermina"),
        ("distillation.kind", "warm", "'warm' is unknown: use hard or soft"),
        ("distillation.alpha", 1.5, "it must be at most 1, where labels count for nothing"),
        ("distillation.temperature", 0.0, "is 0.0: it must be above 0"),
        ("distillation.teacher", "B_16", "config.loss is 'sigmoid', but a teacher's classes are"),
        ("lora.rank", -1, "is -1: it must not be negative"),
        ("log_images", "input", "config.log_images: 'input' is unknown: use inputs, attention, c"),
        ("lora.alpha", 0.0, "is 0.0: it must be above 0"),
        (
            "lora.targets",
            "query,head",
            "'head' is no kernel of a layer: use query,key,value,out,mlp",
        ),
        ("optimizer.layer_decay", 0.0, "is 0.0: it must be above 0; try --config.optimizer.layer_"),
        ("optimizer.layer_decay", 1.5, "it must be at most 1, at which all layers have the same"),
        ("optimizer.lr_multipliers", "a=1e7", "factor 1e7 of 'a' is above 1e+06"),
        ("schedule.drops", [0.6, 0.3], "config.schedule.drops is [0.6, 0.3]: it must be up to 10"),
        ("schedule.timescale", "0", "schedule.timescale is 0: it must be at least 1 step"),
        ("schedule.cooldown", "500 epochs", "500 epochs but the run has 14, of which 0 are the"),
        ("schedule.cooldown", "9 steps", "end_lr is 1e-05 but a cool-down ends at 0: set --config"),
        ("schedule.decay", "rsqrt", "schedule.end_lr is 1e-05 but decay rsqrt has no end: set --"),
    ],
)
def test_a_schedule_or_multipliers_that_cannot_be_are_refused(key, value, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check_config(_with(recipe("ViT-L/16", "pretrain,jft"), key, value))


def test_seeds_that_jax_would_take_for_another_are_refused():
    # The reason of the bound: more than 32 bits are cut off.
    assert jax.random.key_data(jax.random.key(5)).tolist() == (
        jax.random.key_data(jax.random.key(2**32 + 5)).tolist()
    )


def test_an_int_will_do_for_a_float():
    config = ConfigDict(to_dict(recipe("ViT-B/16")), type_safe=False)
    config.optimizer.weight_decay = 0
    check_config(config)


def test_finetuning_needs_to_be_told_from_what():
    config = recipe("ViT-B/16", "finetune,cifar10")
    with pytest.raises(UserError, match="config.init_from must be given: --config.init_from="):
        check_config(config)
    config.init_from = "weights.npz"
    check_config(config)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ("500 steps", 500),
        ("500", 500),
        ("10_000 steps", 10_000),
        ("1 step", 1),
        # 300 epochs of ImageNet's 1,281,167 images in batches of 4,096: 93,835.4.
        ("300 epochs", 93_835),
        ("0.5 epochs", 156),
        ("1 epoch", 313),
        ("0 steps", 0),
        ("0.0001 epochs", 1),
    ],
)
def test_durations(duration, steps):
    assert count_steps(duration, num_examples=1_281_167, batch_size=4096) == steps


@pytest.mark.parametrize(
    "duration", ["", "ten steps", "5 hours", "0.5 steps", "-1 steps", "epochs"]
)
def test_a_duration_of_another_form_is_refused(duration):
    with pytest.raises(UserError, match="is not understood: use '500 steps' or '7 epochs'"):
        count_steps(duration, num_examples=10, batch_size=1)


def test_more_steps_than_are_counted_are_refused():
    assert count_steps("2147483647 steps", num_examples=1, batch_size=1) == 2**31 - 1
    with pytest.raises(UserError, match="is 2147484000 steps of 1 images: at most 2147483647"):
        count_steps("2147484 epochs", num_examples=1000, batch_size=1)


@pytest.mark.parametrize("model", ["ViT-B/16", "R50+ViT-B/16", "R+ViT-Ti/16"])
def test_config_json_gives_the_config_back(model, tmp_path):
    config = recipe(model)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    assert to_dict(read_config(str(path))) == to_dict(config)
    check_config(read_config(str(path)))


def test_what_a_config_json_leaves_to_the_weights_can_be_given_by_flags(tmp_path):
    config = recipe("ViT-B/16", "finetune,cifar10")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    read = read_config(str(path))
    assert to_dict(read) == to_dict(config)
    for key, kind in LEFT_TO_WEIGHTS.items():
        if key in config.model:
            assert config.model[key] is None
            # ml_collections parses a flag by this type.
            assert read.model.get_ref(key).get_type() is kind


def test_a_value_of_before_is_called_as_today():
    config = to_dict(recipe("ViT-B/16", "masked,imagenet2012"))
    config["masking"]["target"] = "mean_colour"
    assert migrate(config)["masking"]["target"] == "mean_color"


@pytest.mark.parametrize(("before", "policy"), [(False, "nothing"), (True, "everything")])
def test_whether_layers_were_computed_again_is_a_policy_today(before, policy):
    config = to_dict(recipe("ViT-B/16"))
    config["model"]["remat"] = before
    after = migrate(config)
    assert after["model"]["remat"] == policy
    assert migrate(after) == after


def test_a_config_of_before_evals_has_them():
    before = json.loads(BEFORE_EVALS.read_text())
    assert (before["eval_every"], before["fewshot"]["shots"]) == ("4 steps", "1,10")
    after = migrate(before)
    assert after.pop("evals") == {
        "val": {
            "type": "objective", "dataset": "", "data_dir": "", "split": "", "every": "4 steps"
        },
        "fewshot": {
            "type": "fewshot", "dataset": "digits", "data_dir": "", "split": "", "shots": "1,10",
            "every": "3 steps",
        },
    }  # fmt: skip
    before["masking"]["target"] = "mean_color"
    for key in ("cache", "shuffle_buffer"):
        del before["dataset"][key]
    before["class_weights"] = ""
    before["dataset"] |= {"workers": 0, "holdout": 0.2, "broken": "refuse", "sampling": ""}
    before["dataset"]["channels"] = 3
    before["keep_head"] = "never"
    before["log_images"] = ""
    before["model"] |= {"remat": "nothing", **ADDED_MODEL_KEYS}
    before["distillation"] = {
        "teacher": "", "kind": "hard", "alpha": 0.5, "temperature": 3.0
    }  # fmt: skip
    before["detection"] = {"width": 256, "layers": 4, "upsample": 1, "most_boxes": 100}
    before["lora"] = {"rank": 0, "alpha": 8.0, "targets": "query,value"}
    before["optimizer"] |= {"lr_multipliers": "", "layer_decay": 1.0}
    before["schedule"] |= {"cooldown": "0 steps", "drops": [0.3, 0.6, 0.9]}
    before["schedule"]["timescale"] = "10000 steps"
    assert after == {key: x for key, x in before.items() if key not in ("eval_every", "fewshot")}
    check_config(read_config(str(BEFORE_EVALS)))


@pytest.mark.parametrize("key", ADDED_KEYS)
def test_a_config_json_from_before_a_key_has_what_runs_did_then(key, tmp_path):
    config = to_dict(recipe("ViT-B/16"))
    section, _, name = key.rpartition(".")
    del (config[section] if section else config)[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert to_dict(read_config(str(path))) == migrate(config)
    values = flatten_dict(to_dict(read_config(str(path))), sep=".")
    assert values[key] == ADDED_KEYS[key]
    check_config(read_config(str(path)))


@pytest.mark.parametrize("model", ["ViT-B/16", "R50+ViT-B/16", "R50x1"])
def test_a_config_json_from_before_the_newer_vits_has_the_papers_model(model, tmp_path):
    config = to_dict(recipe(model))
    old = {key: x for key, x in config["model"].items() if key not in ADDED_MODEL_KEYS}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config, "model": old}))
    assert to_dict(read_config(str(path))) == config
    assert (old == config["model"]) == (model == "R50x1")


# The sections as config files had them that were written before the keys were added.
OPTIMIZER_OF_BEFORE = {
    "name": "adam", "b1": 0.9, "b2": 0.99, "weight_decay": 0.1, "decay": "all",
    "mu_dtype": "float32", "clip_norm": 1.0,
}  # fmt: skip
SCHEDULE_OF_BEFORE = {"base_lr": 0.01, "decay": "cosine", "warmup": "2 steps", "end_lr": 0.0}


def test_sections_that_are_replaced_as_a_whole_get_the_keys_of_today():
    config = recipe("ViT-B/16")
    config.optimizer, config.schedule = OPTIMIZER_OF_BEFORE, SCHEDULE_OF_BEFORE
    check_config(config)
    filled = complete_sections(config)
    assert filled.optimizer.to_dict() == OPTIMIZER_OF_BEFORE | {
        "lr_multipliers": "",
        "layer_decay": 1.0,
    }
    assert filled.schedule.to_dict() == SCHEDULE_OF_BEFORE | {
        "timescale": "10000 steps", "drops": (0.3, 0.6, 0.9), "cooldown": "0 steps"
    }  # fmt: skip
    assert config.schedule.to_dict() == SCHEDULE_OF_BEFORE
    assert complete_sections(filled) is filled
    del config.optimizer.b1
    with pytest.raises(UserError, match="config.optimizer.b1 is missing"):
        check_config(config)


def test_lists_of_a_config_json_are_tuples_which_flags_can_replace(tmp_path):
    config = recipe("R50+ViT-B/16")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    flags = ["--config.schedule.drops=(0.5,0.7)", "--config.model.resnet_layers=(3,4)"]
    changed = load(str(path), flags).config
    assert (changed.schedule.drops, changed.model.resnet_layers) == ((0.5, 0.7), (3, 4))
    assert read_config(str(path)).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read: Expecting property name"),
        ("[]", "cannot be read: it is [], not an object of keys and values"),
        ('"x"', "cannot be read: it is 'x', not an object of keys and values"),
        ("[" * 100_000, "cannot be read: maximum recursion depth"),
        ('{"seed": ' * 100_000, "cannot be read: maximum recursion depth"),
        ('{"seed": 1' + "0" * 5000 + "}", "cannot be read: Exceeds the limit (4300 digits)"),
        ("{}", "config.accumulate_steps is missing"),
        ('{"seeds": 1}', "config.seeds is not a key that anything reads: did you mean config.seed"),
        ('{"\\u001b[2J": 1}', r"config.'\x1b[2J' is not a key that anything reads"),
        ('{"__class__": 1}', "cannot be read: '__class__ cannot be overridden.'"),
    ],
)
def test_a_broken_config_json_is_refused(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_config(str(path))
    assert str(caught.value).isprintable() and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer", 3, "config.optimizer is 3: it is a section of keys"),
        ("optimizer.name", [], "config.optimizer.name is []: it must be of type str"),
        ("model.architecture", "cnn", "config.model.architecture 'cnn' is unknown: use vit"),
        ("evals", [1], "config.evals is [1]: it is a section of keys"),
        ("evals.val", 7, "config.evals.val is 7: it is a section of keys"),
        (
            "evals.val.type",
            None,
            "config.evals.val: type 'None' is unknown: use one of objective",
        ),
        ("evals.\x1b", {"type": "objective"}, r"config.evals has an entry '\x1b': give it a name"),
    ],
)
def test_a_config_json_of_other_sections_is_refused(tmp_path, key, value, message):
    config = to_dict(_with(recipe("ViT-B/16"), key, value))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=re.escape(message)):
        read_config(str(path))


# Another value of every key of a section that is handed on as a whole: something must change.
MODEL = {
    "num_classes": (3, 4), "patch_size": (4, 2), "hidden_size": (8, 16), "num_layers": (2, 3),
    "mlp_dim": (8, 12), "num_heads": (2, 4), "classifier": ("gap", "token"),
    "representation_size": (0, 5), "dropout_rate": (0.1, 0.0), "attention_dropout_rate": (0.0, 0.1),
    "dropout_after": ("activation", "dense"),
    "stochastic_depth": (0.0, 0.1), "position_embedding": ("learned", "none"),
    "position_placement": ("stem", "layers"), "gelu": ("tanh", "erf"),
    "layer_norm_epsilon": (1e-6, 1e-5), "head_bias_init": (0.0, -10.0),
    "remat": ("nothing", "dots"), "scan_layers": (False, True), "dtype": ("float32", "bfloat16"),
    "resnet_layers": ((1,), (2,)), "group_norm_epsilon": (1e-6, 1e-5), "width_factor": (1, 2),
    "layer_scale": (0.0, 0.5), "num_registers": (0, 2), "mlp": ("gelu", "swiglu"),
    "distillation_token": (False, True),
}  # fmt: skip
OPTIMIZER = {
    "b1": (0.9, 0.8), "b2": (0.999, 0.3), "momentum": (0.9, 0.8), "weight_decay": (0.1, 0.2),
    "decay": ("all", "kernels"), "mu_dtype": ("float32", "bfloat16"), "clip_norm": (0.0, 0.5),
    "lr_multipliers": ("", ".*bias=2"), "layer_decay": (1.0, 0.5), "decay_rate": (0.8, 0.7),
}  # fmt: skip
SCHEDULE = {
    "base_lr": (0.1, 0.2), "decay": ("cosine", "linear"), "end_lr": (0.0, 0.01),
    "warmup_steps": (2, 4), "total_steps": (20, 30), "timescale_steps": (5, 6),
    "cooldown_steps": (0, 5), "drops": ((0.3, 0.6), (0.3, 0.7)),
}  # fmt: skip


def without_effect(values, keys, result, changed=None):
    """Those of the keys, or of the changed ones, whose second value has the result of the first."""
    first = {key: values[key][0] for key in keys}
    before = result(first)
    return {key for key in changed or keys if result(first | {key: values[key][1]}) == before}


def program(architecture):
    """The program that initializes a model as it is applied in training, or why there is none."""

    def of(fields):
        images, rng = jnp.zeros((1, 32, 32, 3)), jax.random.key(0)

        def run(rng):
            module = models.create_model({"architecture": architecture, **fields})
            return module.init_with_output({"params": rng, "dropout": rng}, images, train=True)

        try:
            return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(run)(rng)))
        except UserError as error:
            return str(error)

    return of


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_every_model_key_has_an_effect(architecture, monkeypatch):
    keys = models.model_keys(architecture) - {"architecture"}
    assert not without_effect(MODEL, keys, program(architecture))

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Careless(models.ARCHITECTURES[architecture]):
        surplus: int = option(0)

    monkeypatch.setitem(models.ARCHITECTURES, architecture, Careless)
    values, changed = MODEL | {"surplus": (0, 1)}, {"surplus", "num_classes"}
    assert without_effect(
        values, values.keys() & models.model_keys(architecture), program(architecture), changed
    ) == {"surplus"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_key_has_an_effect(name):
    def tree(kernel, bias):
        layers = {"encoderblock_0": {"bias": jnp.array([bias])}}
        return {"kernel": jnp.array(kernel), "Transformer": layers}

    params = tree([1.0, 2.0], 3.0)
    gradients = [tree([0.3, -2.1], k) for k in (0.7, -0.2)]

    def updated(values):
        optimizer = create_optimizer({"name": name, **values}, lambda step: 0.1)
        state, found = optimizer.init(params), params
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, found)
            found = optax.apply_updates(found, updates)
        return [x.tolist() for x in jax.tree.leaves(found)]

    assert not without_effect(OPTIMIZER, optimizer_keys(name) - {"name"}, updated)


def test_every_schedule_key_has_an_effect():
    def rates(values):
        schedule = create_schedule(**values)
        return [float(schedule(step)) for step in range(20)]

    of_others = {"linear": {"timescale_steps", "drops"}, "cosine": {"timescale_steps", "drops"},
                 "rsqrt": {"end_lr", "drops", "total_steps"},
                 "staircase": {"end_lr", "timescale_steps"}}  # fmt: skip
    assert of_others.keys() == set(DECAYS)
    for decay, without in of_others.items():
        values = SCHEDULE | {"decay": (decay, "linear" if decay == "cosine" else "cosine")}
        assert without_effect(values, values, rates) == without
    # And these are the keys: lengths are counted in steps before.
    keys = {f"{x}_steps" if x in SCHEDULE_LENGTHS else x for x in recipe("ViT-B/16").schedule}
    assert keys | {"total_steps"} == set(SCHEDULE)
