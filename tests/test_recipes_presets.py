"""The presets beside what their authors published, key by key.

The literals are typed from google-research/big_vision (configs/vit_i1k.py, vit_i21k.py,
vit_s16_i1k.py, transfer.py as of 2024) and google-research/big_transfer (bit_hyperrule.py, and what
bit_jax/train.py, bit_pytorch/train.py and input_pipeline_tf2_or_jax.py do with it).
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax import recipes
from vit_jax.config import check_config, count_steps
from vit_jax.config_files import load
from vit_jax.data import datasets
from vit_jax.data.augmentation import Augmentation, parse_augment
from vit_jax.data.protocols import evaluation, resized_sides, squashed_sides
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.provenance import sources
from vit_jax.recipes import get_config, model_name
from vit_jax.state import create_schedule

# Layers, width, MLP width, heads, by `decode_variant` of big_vision's models/vit.py.
VARIANTS = {
    "Ti": (12, 192, 768, 3),
    "S": (12, 384, 1536, 6),
    "B": (12, 768, 3072, 12),
    "L": (24, 1024, 4096, 16),
}

# What all four configs have.
COMMON = {
    "seed": 0,
    "loss": "softmax_xent",
    "log_training_steps": 50,
    "ckpt_steps": 1000,
    "model_name": "vit",
    "grad_clip_norm": 1.0,
    "schedule.decay_type": "cosine",
}
LABELS = (
    '|value_range(-1, 1)|onehot(1000, key="label", key_result="labels")|keep("image", "labels")'
)
SCRATCH = COMMON | {
    "optax_name": "scale_by_adam",
    "optax.mu_dtype": "bfloat16",
    "lr": 0.001,
    "wd": 0.0001,
    "schedule.warmup_steps": 10_000,
    "eval.pp_fn": "decode|resize_small(256)|central_crop(224)" + LABELS,
}
VIT_S16_I1K = SCRATCH | {
    "total_epochs": 90,
    "num_classes": 1000,
    "input.data.name": "imagenet2012",
    "input.data.split": "train[:99%]",
    "input.batch_size": 1024,
    "input.pp": "decode_jpeg_and_inception_crop(224)|flip_lr|randaug(2,10)" + LABELS,
    "model.variant": "S/16",
    "model.rep_size": True,
    "model.pool_type": "gap",
    "model.posemb": "sincos2d",
    "mixup.p": 0.2,
    "eval.log_steps": 2500,
    "eval.data.split": "validation",
}


def vit_i1k(variant, randaug, mixup):
    return SCRATCH | {
        "total_epochs": 300,
        "num_classes": 1000,
        "loss": "sigmoid_xent",
        "init_head_bias": -6.9,
        "input.data.name": "imagenet2012",
        "input.data.split": "train[:99%]",
        "input.batch_size": 4096,
        "input.pp": f"decode_jpeg_and_inception_crop(224)|flip_lr|{randaug}{LABELS}",
        "model.variant": variant,
        "model.rep_size": True,
        "model.pool_type": "tok",
        "mixup.p": mixup,
        "eval.log_steps": 2500,
        "eval.data.split": "validation",
    }


def vit_i21k(variant, randaug, mixup):
    return SCRATCH | {
        "total_epochs": 300,
        "num_classes": 21843,
        "loss": "sigmoid_xent",
        "init_head_bias": -10.0,
        "input.data.name": "imagenet21k",
        "input.batch_size": 4096,
        "input.pp": f"decode_jpeg_and_inception_crop(224)|flip_lr|{randaug}{LABELS}",
        "model.variant": variant,
        "model.pool_type": "gap",
        "model.posemb": "learn",
        "mixup.p": mixup,
        "eval.log_steps": 1000,
        # Theirs are parts of its split `full`, of a data set that is not public: ours holds out
        # what the user's has.
        "input.data.split": "",
        "eval.data.split": "",
    }


def transfer(dataset, split, num_classes, steps, warmup, crop, test="test"):
    return COMMON | {
        "log_training_steps": 10,
        "total_steps": steps,
        "num_classes": num_classes,
        "input.data.name": dataset,
        "input.data.split": split,
        "input.batch_size": 512,
        "input.pp": f"decode|{crop}|flip_lr{LABELS}",
        "model.variant": "B/32",
        "optax_name": "big_vision.momentum_hp",
        "wd": None,
        "lr": 0.01,
        "schedule.warmup_steps": warmup,
        "mixup.p": 0.0,
        "eval.pp_fn": "decode|resize_small(448)|central_crop(384)" + LABELS,
        "eval.log_steps": 100,
        "eval.data.split": test,
    }


RESMALL = "resize_small(448)|random_crop(384)"
PUBLISHED = {
    "S/16,baseline": VIT_S16_I1K,
    "S/16,baseline,90": VIT_S16_I1K,
    "S/16,baseline,imagenet2012,150": VIT_S16_I1K | {"total_epochs": 150},
    "S/16,baseline,imagenet2012,300": VIT_S16_I1K | {"total_epochs": 300},
    "Ti/16,augreg": vit_i1k("Ti/16", "randaug(2,0)", 0.0),
    "S/32,augreg,imagenet2012": vit_i1k("S/32", "randaug(2,15)", 0.2),
    "S/16,augreg,imagenet2012": vit_i1k("S/16", "randaug(2,15)", 0.5),
    "B/32,augreg,imagenet2012": vit_i1k("B/32", "randaug(2,15)", 0.5),
    "B/16,augreg,imagenet2012": vit_i1k("B/16", "randaug(2,15)", 0.5),
    "L/16,augreg,imagenet2012": vit_i1k("L/16", "randaug(2,15)", 0.5),
    "Ti/16,augreg,imagenet21k": vit_i21k("Ti/16", "", 0.0),
    "S/32,augreg,imagenet21k": vit_i21k("S/32", "", 0.0),
    "S/16,augreg,imagenet21k": vit_i21k("S/16", "randaug(2,0)", 0.0),
    "B/32,augreg,imagenet21k": vit_i21k("B/32", "randaug(2,10)", 0.2),
    "B/16,augreg,imagenet21k": vit_i21k("B/16", "randaug(2,10)", 0.2),
    "L/16,augreg,imagenet21k": vit_i21k("L/16", "randaug(2,15)", 0.5),
    "B/32,transfer,cifar10": transfer("cifar10", "train[:98%]", 10, 10_000, 500, RESMALL),
    "B/32,transfer,cifar100": transfer("cifar100", "train[:98%]", 100, 10_000, 500, RESMALL),
    "B/32,transfer,imagenet2012,inception": transfer(
        "imagenet2012", "train[:99%]", 1000, 20_000, 500, "inception_crop(384)", "validation"
    ),
    "B/32,transfer,oxford_iiit_pet,inception": transfer(
        "oxford_iiit_pet", "train[:90%]", 37, 500, 100, "inception_crop(384)"
    ),
    "B/32,transfer,oxford_flowers102": transfer(
        "oxford_flowers102", "train[:90%]", 102, 500, 100, RESMALL
    ),
}

# What their configs leave to their code: its defaults, in our keys.
DEFAULTS = {
    "accumulate_steps": 1,
    "augment_contrast": "augreg",
    "dataset.random_crop": True,
    "ema_decay": 0.0,
    "init_from": "",
    "label_smoothing": 0.0,
    "model.architecture": "vit",
    "model.attention_dropout_rate": 0.0,
    "model.distillation_token": False,
    "model.dropout_rate": 0.0,
    "model.gelu": "tanh",
    "model.layer_norm_epsilon": 1e-6,
    "model.layer_scale": 0.0,
    "model.dropout_after": "activation",
    "model.mlp": "gelu",
    "model.num_registers": 0,
    "model.position_placement": "stem",
    "model.stochastic_depth": 0.0,
    "objective": "classification",
    "optimizer.layer_decay": 1.0,
    "optimizer.lr_multipliers": "",
    "patience": 0,
    "schedule.end_lr": 0.0,
}
ADAM = {"optimizer.b1": 0.9, "optimizer.b2": 0.999, "optimizer.decay": "kernels"}
SGD = {"optimizer.momentum": 0.9, "optimizer.decay": "all"}
# Keys of ours that say how a run computes, where its data lie, or what it is not: theirs have no
# counterpart, or it changes nothing that is learned.
OURS_ALONE = {
    "class_weights", "dataset.broken", "dataset.channels", "dataset.data_dir",
    "dataset.development",
    "dataset.holdout", "dataset.sampling",
    "dataset.jpeg_dct", "dataset.subset", "dataset.subset_seed", "dataset.workers",
    "detection.layers", "detection.most_boxes", "detection.upsample", "detection.width",
    "distillation.alpha", "distillation.kind", "distillation.teacher", "distillation.temperature",
    "evals.val.data_dir", "evals.val.dataset", "evals.val.type", "keep_checkpoints", "keep_head",
    "log_images", "lora.alpha", "lora.rank", "lora.targets", "masking.rate", "masking.target",
    "model.dtype", "model.remat", "model.scan_layers", "model.num_classes", "schedule.cooldown",
    "schedule.drops", "schedule.timescale", "sharding",
    "evals.fewshot.type", "evals.fewshot.dataset", "evals.fewshot.data_dir", "evals.fewshot.split",
    "evals.fewshot.every", "evals.fewshot.shots",
}  # fmt: skip
LEFT_TO_WEIGHTS = {
    *("model.classifier", "model.gelu", "model.layer_norm_epsilon", "model.position_embedding"),
    *("model.distillation_token", "model.layer_scale", "model.mlp", "model.num_registers"),
    "model.position_placement",
}


def translated(published):
    """A config of big_vision in our keys; every key of it is taken."""
    left = dict(published)
    pop = left.pop
    size, patch = pop("model.variant").split("/")
    layers, width, mlp_dim, heads = VARIANTS[size]
    batch_size, pretrains = pop("input.batch_size"), "total_epochs" in left
    lr, wd, mixup = pop("lr"), pop("wd"), pop("mixup.p")
    words = pop("input.pp").removesuffix(LABELS).strip("|").split("|flip_lr")
    evaluated = pop("eval.pp_fn").removesuffix(LABELS)
    randaug = [int(x) for x in re.findall(r"\d+", words[1])]
    found = {
        "augment": Augmentation(*(randaug or (0, 0)), mixup),
        "batch_size": batch_size,
        "checkpoint_every": f"{pop('ckpt_steps')} steps",
        "dataset.eval_split": "",
        "dataset.name": pop("input.data.name"),
        "dataset.protocol": (words[0], evaluated),
        "dataset.random_flip": len(words) == 2,
        "dataset.train_split": pop("input.data.split"),
        "duration": f"{pop('total_epochs')} epochs" if pretrains else f"{pop('total_steps')} steps",
        "evals.val.every": f"{pop('eval.log_steps')} steps",
        "evals.val.split": "",
        "log_every": f"{pop('log_training_steps')} steps",
        "loss": {"sigmoid_xent": "sigmoid", "softmax_xent": "softmax"}[pop("loss")],
        "model.head_bias_init": pop("init_head_bias", 0.0),
        "model.hidden_size": width,
        "model.mlp_dim": mlp_dim,
        "model.num_heads": heads,
        "model.num_layers": layers,
        "model.patch_size": int(patch),
        "model.representation_size": width if pop("model.rep_size", False) else 0,
        "optimizer.clip_norm": pop("grad_clip_norm"),
        "optimizer.name": {"scale_by_adam": "adam", "big_vision.momentum_hp": "sgd"}[
            pop("optax_name")
        ],
        # momentum_hp has it for a default. Decay is added after the multiplication by lr there.
        "optimizer.mu_dtype": pop("optax.mu_dtype", "bfloat16"),
        "optimizer.weight_decay": wd / lr if wd else 0.0,
        "schedule.base_lr": lr,
        "schedule.decay": pop("schedule.decay_type"),
        "schedule.warmup": f"{pop('schedule.warmup_steps')} steps",
        "seed": pop("seed"),
    }
    if pretrains:
        found["model.classifier"] = {"tok": "token", "gap": "gap"}[pop("model.pool_type")]
        positions = {"learn": "learned", "sincos2d": "sincos2d"}
        found["model.position_embedding"] = positions[pop("model.posemb", "learn")]
    # The data set tells the number of classes, and what is evaluated, see below.
    assert left.keys() == {"num_classes", "model_name", "eval.data.split"}
    return found


@pytest.mark.parametrize("spec", PUBLISHED)
def test_every_key_is_as_published(spec):
    config = load(f"vit:{spec}").config
    ours = {
        key: value
        for key, value in flatten_dict(config.to_dict(), sep=".").items()
        if key not in OURS_ALONE
    }
    expected = DEFAULTS | translated(PUBLISHED[spec])
    if config.optimizer.name == "sgd":
        expected |= SGD | dict.fromkeys(LEFT_TO_WEIGHTS) | {"init_from": recipes.REQUIRED}
    else:
        expected |= ADAM
    ours["augment"] = parse_augment(ours["augment"])
    crop, evaluated = expected.pop("dataset.protocol")
    words = in_words(ours.pop("dataset.protocol"), ours.pop("dataset.image_size"))
    assert words == (crop, evaluated)
    assert ours == expected


def in_words(protocol, size):
    """A protocol in the language of big_vision's preprocessing; tests/data has what it does."""
    view = evaluation(protocol, size)
    assert (view.resize, view.interpolation, view.squash) == ("big_vision", "area", False)
    resized, _ = resized_sides(view)
    crops = {
        "big_vision": f"decode_jpeg_and_inception_crop({size})",
        "transfer": f"decode|resize_small({resized})|random_crop({size})",
        "transfer_inception": f"decode|inception_crop({size})",
    }
    return crops[protocol], f"decode|resize_small({resized})|central_crop({size})"


@pytest.mark.parametrize("spec", PUBLISHED)
def test_what_is_evaluated_by_default_is_as_published(spec):
    dataset, split = (PUBLISHED[spec][key] for key in ("input.data.name", "eval.data.split"))
    defaults = datasets._SPLITS.get(dataset, datasets._OTHER_SPLITS)
    assert defaults.evaluation == split


@pytest.mark.parametrize("spec", ["S/16,baseline,dev", "S/16,augreg,imagenet2012,dev"])
def test_dev_evaluates_on_what_is_held_out_anyway(spec):
    dataset = load(f"vit:{spec}").config.dataset
    assert (dataset.development, dataset.train_split) == (True, "")
    assert 100 - datasets._SPLITS["imagenet2012"].development == 99


# bit_hyperrule.py: resize, crop, mixup and what get_schedule gives for the images of TFDS's train.
HYPERRULE = {
    "cifar10": (160, 128, 0.1, [500, 3000, 6000, 9000, 10_000]),
    "cifar100": (160, 128, 0.1, [500, 3000, 6000, 9000, 10_000]),
    "oxford_iiit_pet": (512, 480, 0.0, [100, 200, 300, 400, 500]),
    "oxford_flowers102": (512, 480, 0.0, [100, 200, 300, 400, 500]),
    "imagenet2012": (512, 480, 0.1, [500, 6000, 12_000, 18_000, 20_000]),
    "oxford_flowers102:2.1.1": (512, 480, 0.0, [100, 200, 300, 400, 500]),
    # Said to have so many images, 32 x 32 and larger ones.
    "svhn_cropped,medium": (160, 128, 0.1, [500, 3000, 6000, 9000, 10_000]),
    "mnist,medium": (160, 128, 0.1, [500, 3000, 6000, 9000, 10_000]),
    "digits,small": (160, 128, 0.0, [100, 200, 300, 400, 500]),
    "food101,medium": (512, 480, 0.1, [500, 3000, 6000, 9000, 10_000]),
    # Not among its known_dataset_sizes; 1,000 images of 32 x 32, of 64 x 64, and larger ones.
    "vtab:svhn": (160, 128, 0.0, [100, 200, 300, 400, 500]),
    "vtab:eurosat": (160, 128, 0.0, [100, 200, 300, 400, 500]),
    "vtab:resisc45": (512, 480, 0.0, [100, 200, 300, 400, 500]),
}


@pytest.mark.parametrize("dataset", HYPERRULE)
def test_every_key_of_bits_hyperrule_is_as_published(dataset):
    resized, crop, mixup, supports = HYPERRULE[dataset]
    config = load(f"vit:R50x1,bit_hyperrule,{dataset}").config
    assert squashed_sides(config.dataset.protocol, crop) == (resized, resized)
    whole = evaluation(config.dataset.protocol, crop)
    assert (whole.center_crop, whole.resize, whole.interpolation) == (None, "box", "bilinear")
    ours = flatten_dict(config.to_dict(), sep=".")
    assert ours.pop("schedule.drops") == pytest.approx([x / supports[-1] for x in supports[1:-1]])
    expected = {key: value for key, value in DEFAULTS.items() if key in ours} | SGD | {
        "augment": f"mixup({mixup})" if mixup else "none",
        "batch_size": 512,
        "checkpoint_every": "1000 steps",
        "dataset.eval_split": "",
        "dataset.image_size": crop,
        "dataset.name": dataset.partition(",")[0],
        "dataset.protocol": "bit_hyperrule",
        "dataset.random_flip": True,
        "dataset.train_split": "",
        "duration": f"{supports[-1]} steps",
        "evals.val.every": "1000 steps",
        "evals.val.split": "",
        "init_from": recipes.REQUIRED,
        "log_every": "50 steps",
        "loss": "softmax",
        "model.architecture": "resnet",
        "model.group_norm_epsilon": None,
        "model.head_bias_init": 0.0,
        "model.resnet_layers": (3, 4, 6, 3),
        "model.width_factor": 1,
        "optimizer.clip_norm": 0.0,
        "optimizer.mu_dtype": "float32",
        "optimizer.name": "sgd",
        "optimizer.weight_decay": 0.0,
        "schedule.base_lr": 0.003,
        "schedule.decay": "staircase",
        "schedule.warmup": f"{supports[0]} steps",
        "seed": 0,
    }  # fmt: skip
    assert {key: value for key, value in ours.items() if key not in OURS_ALONE} == expected


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_the_rate_of_bits_hyperrule_is_the_published_one(size):
    config = get_config("R50x1", f"bit_hyperrule,folder:/photos,{size}")
    supports = {
        "small": [100, 200, 300, 400, 500],
        "medium": [500, 3000, 6000, 9000, 10_000],
        "large": [500, 6000, 12_000, 18_000, 20_000],
    }[size]
    steps = np.arange(supports[-1])
    tenths = (steps[:, None] > np.array(supports[1:])).sum(1)
    published = 0.003 * np.minimum(steps / supports[0], 1) * 10.0**-tenths
    keys = dict(config.schedule)
    lengths = {
        f"{key}_steps": count_steps(keys.pop(key), 0, 0)
        for key in ("warmup", "timescale", "cooldown")
    }
    schedule = create_schedule(total_steps=supports[-1], **lengths, **keys)
    ours = np.asarray(jax.vmap(schedule)(jnp.asarray(steps)))
    np.testing.assert_allclose(ours, published, rtol=1e-4)


@pytest.mark.parametrize(
    "spec",
    ["ViT-S/16,baseline,300,dev", "ViT-L/16,augreg,imagenet21k", "ViT-B/32,transfer,cifar100"]
    + ["ViT-B/32,transfer,cifar10,inception", "ViT-H/14,transfer,folder:/a"]
    + ["R152x4,bit_hyperrule,imagenet2012", "ViT-B/16,bit_hyperrule,vtab:dsprites_orientation"]
    + ["R50x1,transfer,cifar10", "Axial-ViT-B/16,baseline"],
)  # fmt: skip
def test_every_preset_passes_its_own_check(spec):
    check_config(load(f"vit:{spec}").config, may_lack=True)


def test_the_baseline_has_the_hidden_layer_and_neither_class_token_nor_learned_positions():
    config = get_config("ViT-S/16", "baseline").model
    model = create_model({**config, "num_classes": 1000})
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    number = sum(x.size for x in jax.tree.leaves(params))
    # Of the plain model; class token and 197 positions of 384; a layer of 384 x 384 and its bias.
    assert number == 22_050_664 - 384 - 197 * 384 + 384 * 384 + 384


def test_other_data_takes_imagenets_recipe_with_the_warm_up_in_epochs():
    for recipe, epochs in (("augreg", 10_000 * 4096 / 1_281_167), ("baseline", 7.993)):
        config = get_config("ViT-S/16", f"{recipe},folder:/a")
        assert config.schedule.warmup == f"{round(epochs)} epochs"
        assert config.dataset.train_split == ""
        imagenet = get_config("ViT-S/16", recipe)
        for section in ("optimizer", "model", "augment", "loss", "duration", "batch_size"):
            assert config[section] == imagenet[section]


def test_a_preset_says_where_its_values_are_from():
    with recipes.recording() as calls:
        get_config("ViT-B/32", "transfer,cifar10,inception")
    where = sources(calls[0])
    for key in ("optimizer.mu_dtype", "schedule.base_lr", "dataset.protocol", "batch_size"):
        assert where[key] == "big_vision's transfer.py"
    assert where["model.hidden_size"] == "ViT-B/32"
    assert where["model.gelu"] == "taken from the weights of init_from"
    assert where["dataset.name"] == "spec 'transfer,cifar10,inception'"
    for key in ("seed", "init_from", "optimizer.lr_multipliers"):  # No file of theirs has them.
        assert where[key] == "recipe transfer"


def test_models_of_big_vision_are_read_by_its_names():
    assert model_name("B/16") == "ViT-B/16"
    assert model_name("Ti/16") == "ViT-Ti/16"
    assert model_name("b/32") == "ViT-b/32"  # The paper's half of B.
    assert model_name("ViT-b/32") == "ViT-b/32"


@pytest.mark.parametrize("name", ["B", "b", "Ti", "H"])
def test_a_size_without_a_patch_is_no_model(name):
    assert model_name(name) == name
    for config in (name, f"configs/{name}.py"):
        with pytest.raises(UserError, match=f"config {config} does not exist: "):
            load(config)


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("cifar10,inception", "transfer,cifar10,inception"),
        ("cifar10,inception,dev", "transfer,cifar10,inception,dev"),
        ("food101,small", "bit_hyperrule,food101,small"),
        ("imagenet2012,300", "baseline,imagenet2012,300"),
    ],
)
def test_a_word_of_a_preset_without_it_is_told_with_it(spec, meant):
    with pytest.raises(UserError) as caught:
        load(f"vit:B/32,{spec}")
    assert str(caught.value).endswith(f"is a word of {meant.partition(',')[0]}: use {meant}")
    assert load(f"vit:B/32,{meant}").config.dataset.name == spec.partition(",")[0]


@pytest.mark.parametrize(
    ("model", "spec", "message"),
    [
        ("ViT-H/14", "augreg", "augreg has no augmentation for ViT-H/14, only for ViT-Ti/16, "),
        ("R50x1", "baseline", "baseline is a recipe for ViTs, and R50x1 has no position embedd"),
        ("ViT-S/16", "baseline,90,300", "'baseline,90,300' has 300 and 90: keep one of them"),
        ("ViT-S/16", "baseline,imagenet2012,100", "'100' after the data set: only dev or 90 or 1"),
        ("ViT-B/32", "transfer", "names no data set: for example transfer,cifar10"),
        ("ViT-B/32", "transfer,cifar10,512", "512, which is a resolution to fine-tune at"),
        (
            "R50x1",
            "bit_hyperrule,food101",
            "not know how large food101 is: say it after the data",
        ),
        ("R50x1", "bit_hyperrule,folder:/a,dev", "how large folder:/a is: .*small or medium or la"),
        ("R50x1", "bit_hyperrule,cifar10,tiny", "only dev or small or medium or large may follow"),
        (
            "R50x1",
            "bit_hyperule,cifar10",
            "is unknown: .* augreg or baseline or .*; did you mean b",
        ),
    ],
)
def test_a_wrong_spec_of_a_preset_is_refused(model, spec, message):
    with pytest.raises(UserError, match=message):
        get_config(model, spec)
