import pytest

from experiments import paper
from vit_jax import recipes
from vit_jax.config_files import load
from vit_jax.errors import UserError
from vit_jax.models import with_defaults
from vit_jax.recipes import get_config

RECIPES = ("finetune", "pretrain")
# The warm-up of the published code and later configs, in steps.
WARMUP = {
    "imagenet2012": 500,
    "cifar100": 500,
    "cifar10": 500,
    "oxford_iiit_pet": 100,
    "oxford_flowers102": 100,
    "vtab": 200,
}


def rows(table):
    return [line.split() for line in table.strip().splitlines()]


def test_every_number_of_table_3():
    assert {key: tuple(row) for key, row in recipes.TABLE_3.items()} == paper.TABLE_3


def test_every_number_of_table_4():
    expected = {data: (*row, WARMUP[data]) for data, row in paper.TABLE_4.items()}
    assert {data: tuple(row) for data, row in recipes.TABLE_4.items()} == expected


def test_pretraining_on_imagenet_is_table_3():
    config = get_config("ViT-B/16")
    assert config.dataset.name == "imagenet2012"
    assert (config.batch_size, config.dataset.image_size) == (4096, 224)
    assert (config.duration, config.schedule.warmup) == ("300 epochs", "10000 steps")
    assert (config.schedule.base_lr, config.schedule.decay) == (3e-3, "cosine")
    assert config.optimizer.name == "adam"
    assert (config.optimizer.b1, config.optimizer.b2) == (0.9, 0.999)
    assert (config.optimizer.weight_decay, config.optimizer.clip_norm) == (0.3, 1.0)
    assert (config.model.dropout_rate, config.model.representation_size) == (0.1, 768)


@pytest.mark.parametrize(
    ("model", "dataset", "duration", "base_lr", "weight_decay", "dropout"),
    [
        ("ViT-B/32", "imagenet21k", "90 epochs", 1e-3, 0.03, 0.1),
        ("ViT-L/16", "imagenet21k", "90 epochs", 1e-3, 0.03, 0.1),
        ("ViT-L/16", "jft", "14 epochs", 4e-4, 0.1, 0.0),
        ("ViT-L/32", "jft", "7 epochs", 6e-4, 0.1, 0.0),
        ("ViT-H/14", "jft", "14 epochs", 3e-4, 0.1, 0.0),
        ("ViT-L/32", "imagenet21k:1.0.0", "90 epochs", 1e-3, 0.03, 0.1),
        # Not in the table: H takes the row of L, S that of B.
        ("ViT-H/14", "imagenet21k", "90 epochs", 1e-3, 0.03, 0.1),
        ("ViT-S/16", "jft", "7 epochs", 8e-4, 0.1, 0.0),
        ("ViT-b/32", "jft", "7 epochs", 8e-4, 0.1, 0.0),
        ("ViT-8-1024-2048/32", "jft", "7 epochs", 8e-4, 0.1, 0.0),
        ("R50+ViT-B/32", "jft", "7 epochs", 8e-4, 0.1, 0.0),
        ("R50+ViT-L/32", "jft", "7 epochs", 2e-4, 0.1, 0.0),
        ("R50+ViT-L/16", "jft", "14 epochs", 4e-4, 0.1, 0.0),
        # Not in the table: R26 and R take the row of R50, on ImageNet-21k all that of their ViT.
        ("R26+ViT-S/32", "jft", "7 epochs", 8e-4, 0.1, 0.0),
        ("R+ViT-Ti/16", "jft", "7 epochs", 8e-4, 0.1, 0.0),
        ("R50+ViT-L/16", "imagenet21k", "90 epochs", 1e-3, 0.03, 0.1),
        ("R26+ViT-B/32", "imagenet21k", "90 epochs", 1e-3, 0.03, 0.1),
    ],
)
def test_pretraining_elsewhere_is_table_3(model, dataset, duration, base_lr, weight_decay, dropout):
    config = get_config(model, f"pretrain,{dataset}")
    assert config.duration == duration
    assert (config.schedule.base_lr, config.schedule.decay) == (base_lr, "linear")
    assert config.schedule.end_lr == 1e-5
    assert config.optimizer.weight_decay == weight_decay
    assert config.optimizer.clip_norm == 0  # Table 3: clipping on ImageNet only.
    assert config.model.dropout_rate == dropout
    assert (config.loss, config.model.head_bias_init) == ("sigmoid", -10.0)


@pytest.mark.parametrize(
    ("model", "dataset", "duration", "base_lr", "weight_decay"),
    [
        ("R50x1", "jft", "7 epochs", 1e-3, 0.1),
        ("R101x1", "jft", "7 epochs", 8e-4, 0.1),
        ("R152x2", "jft", "7 epochs", 6e-4, 0.1),
        # Not in the table: the widest take the row of R152x2, R200x3 the 14 epochs of Table 6; on
        # ImageNet-21k all take the row of ViT-B, on ImageNet that of every ViT.
        ("R152x4", "jft", "7 epochs", 6e-4, 0.1),
        ("R200x3", "jft", "14 epochs", 6e-4, 0.1),
        ("R50x1", "imagenet21k", "90 epochs", 1e-3, 0.03),
        ("R152x4", "imagenet2012", "300 epochs", 3e-3, 0.3),
    ],
)
def test_resnets_are_pretrained_as_table_3_says(model, dataset, duration, base_lr, weight_decay):
    config = get_config(model, f"pretrain,{dataset}")
    assert (config.duration, config.schedule.base_lr) == (duration, base_lr)
    assert config.optimizer.name == "adam"
    assert config.optimizer.weight_decay == weight_decay
    assert (config.batch_size, config.dataset.image_size) == (4096, 224)
    assert config.model.head_bias_init == (0 if dataset == "imagenet2012" else -10)


def test_a_resnet_without_a_row_on_jft_is_refused():
    with pytest.raises(UserError, match="Table 3 has no row for R50x3 on jft"):
        get_config("R50x3", "pretrain,jft")


def test_resnets_are_finetuned_as_vits():
    resnet, vit = (get_config(model, "finetune,cifar100") for model in ("R152x2", "ViT-B/16"))
    assert resnet.dataset.image_size == 384
    del resnet.model, vit.model
    assert resnet.to_dict() == vit.to_dict()


@pytest.mark.parametrize(
    ("dataset", "steps", "warmup", "base_lr"),
    [
        ("imagenet2012", 20_000, 500, 0.03),
        ("cifar10", 10_000, 500, 0.03),
        ("cifar10:3.*.*", 10_000, 500, 0.03),
        ("folder:/data/photos", 500, 100, 0.03),
        ("oxford_iiit_pet", 500, 100, 0.03),
        ("vtab", 2500, 200, 0.01),
    ],
)
def test_finetuning_is_table_4(dataset, steps, warmup, base_lr):
    config = get_config("ViT-L/16", f"finetune,{dataset}")
    assert (config.duration, config.schedule.warmup) == (f"{steps} steps", f"{warmup} steps")
    assert (config.schedule.base_lr, config.schedule.decay) == (base_lr, "cosine")
    assert (config.batch_size, config.dataset.image_size) == (512, 384)
    assert (config.optimizer.name, config.optimizer.momentum) == ("sgd", 0.9)
    assert (config.optimizer.weight_decay, config.optimizer.clip_norm) == (0.0, 1.0)
    assert config.model.representation_size == 0
    assert config.loss == "softmax"


# Typed from google-research/vision_transformer, vit_jax/configs/models.py: dropout_rate of each of
# its models that the paper's recipes are for. attention_dropout_rate is 0.0 in all of them.
PUBLISHED_DROPOUT = """
ViT-Ti/16 0.0
ViT-S/16 0.0
ViT-S/32 0.0
ViT-B/8 0.0
ViT-B/16 0.0
ViT-B/32 0.0
ViT-L/16 0.1
ViT-L/32 0.0
ViT-H/14 0.1
R+ViT-Ti/16 0.0
R26+ViT-S/32 0.0
R26+ViT-B/32 0.0
R50+ViT-B/16 0.1
R50+ViT-L/32 0.1
"""


@pytest.mark.parametrize("dataset", ["imagenet2012,512", "cifar10", "vtab:svhn", "folder:/x"])
@pytest.mark.parametrize(("model", "dropout"), rows(PUBLISHED_DROPOUT))
def test_dropout_in_fine_tuning_is_that_of_the_published_code(model, dropout, dataset):
    config = get_config(model, f"finetune,{dataset}").model
    assert (config.dropout_rate, config.attention_dropout_rate) == (float(dropout), 0.0)


@pytest.mark.parametrize("model", ["R50+ViT-B/32", "R50+ViT-L/16", "ViT-b/32", "Axial-ViT-B/16"])
def test_models_that_were_not_published_are_fine_tuned_without_dropout(model):
    assert get_config(model, "finetune,cifar10").model.dropout_rate == 0.0
    assert "dropout_rate" not in get_config("R50x1", "finetune,cifar10").model


def test_masked_patch_prediction_is_appendix_b12():
    config = get_config("ViT-B/16", "masked,jft")
    assert (config.objective, config.dataset.name) == ("masked_patches", "jft")
    assert (config.duration, config.batch_size) == ("1000000 steps", 4096)
    assert (config.schedule.base_lr, config.schedule.decay) == (2e-4, "cosine")
    assert (config.schedule.warmup, config.schedule.end_lr) == ("10000 steps", 0.0)
    assert (config.masking.rate, config.masking.target) == (0.5, "mean_color")
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.b1, optimizer.b2) == ("adam", 0.9, 0.999)
    # Not in the paper; Table 3 has these on JFT.
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.1, 0.0)
    assert (config.dataset.image_size, config.dataset.protocol) == (224, "big_vision")
    assert (config.model.dropout_rate, config.model.representation_size) == (0.0, 0)
    assert (config.loss, config.init_from) == ("softmax", "")


def test_masked_patch_prediction_is_the_same_on_other_data_and_models():
    jft, other = get_config("ViT-B/16", "masked,jft"), get_config("ViT-B/16", "masked,folder:/a")
    other.dataset.name = "jft"
    assert other.to_dict() == jft.to_dict()
    hybrid = get_config("R50+ViT-B/16", "masked,cifar10,dev")
    assert hybrid.dataset.development
    assert (hybrid.duration, hybrid.model.architecture) == ("1000000 steps", "hybrid")
    # The paper's masking is what nobody needs to ask for; the objective of others is classes.
    for spec in ("pretrain", "finetune,cifar10"):
        config = get_config("ViT-B/16", spec)
        assert config.objective == "classification"
        assert config.masking.to_dict() == jft.masking.to_dict()


def test_huge_is_finetuned_at_a_multiple_of_its_patches():
    assert get_config("ViT-H/14", "finetune,cifar10").dataset.image_size == 27 * 14


def test_hybrids_are_pretrained_as_vits_on_imagenet():
    row = get_config("R50+ViT-B/16")
    assert (row.duration, row.schedule.base_lr) == ("300 epochs", 3e-3)
    assert (row.optimizer.weight_decay, row.optimizer.clip_norm) == (0.3, 1.0)


@pytest.mark.parametrize("model", ["R50+ViT-B/16", "R50+ViT-L/32", "R+ViT-Ti/16"])
def test_hybrids_are_finetuned_at_384(model):
    assert get_config(model, "finetune,cifar10").dataset.image_size == 384


@pytest.mark.parametrize(
    ("model", "base_lr"), [("R50+ViT-H/32", 2e-4), ("R50+ViT-H/16", 4e-4), ("R26+ViT-S/32", 8e-4)]
)
def test_hybrids_that_table_3_lacks_take_the_row_of_the_nearest_on_jft(model, base_lr):
    assert get_config(model, "pretrain,jft").schedule.base_lr == base_lr


@pytest.mark.parametrize("model", ["ViT-B/16", "R50+ViT-B/16", "R50x1", "AxialResNet50"])
def test_finetuning_leaves_to_the_weights_what_travels_with_them(model):
    finetune, pretrain = (get_config(model, f"{recipe},cifar10").model for recipe in RECIPES)
    traveling = {key for key in finetune if finetune[key] is None}
    assert traveling == recipes.LEFT_TO_WEIGHTS.keys() & set(finetune)
    assert traveling >= {"group_norm_epsilon"} if "R" in model else traveling >= {"gelu"}
    assert all(value is not None for value in pretrain.values())


def test_dev_holds_out_a_part_of_train():
    assert get_config("ViT-B/16", "finetune,cifar10,dev").dataset.development
    assert not get_config("ViT-B/16", "finetune,cifar10").dataset.development


@pytest.mark.parametrize("development", [False, True])
@pytest.mark.parametrize("name", ["folder:/a/b", "folder:/a, b/c", "cifar10:3.0.2"])
def test_a_folder_or_version_can_be_named(name, development):
    spec = f"finetune,{name}" + (",dev" if development else "")
    dataset = get_config("ViT-B/16", spec).dataset
    assert (dataset.name, dataset.development) == (name, development)


def test_pretraining_on_other_data_is_imagenets_recipe_in_epochs():
    config, imagenet = get_config("ViT-B/16", "pretrain,folder:/a"), get_config("ViT-B/16")
    assert config.duration == "300 epochs"
    # As many images as ImageNet's warm-up: 10,000 batches of 4,096 out of 1,281,167 images.
    assert config.schedule.warmup == f"{round(10_000 * 4096 / 1_281_167)} epochs"
    assert config.optimizer.to_dict() == imagenet.optimizer.to_dict()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("finetun,cifar10", "recipe 'finetun' is unknown.*did you mean finetune"),
        ("cifar10", "recipe 'cifar10' is unknown: use pretrain, masked or finetune"),
        ("finetune", "names no data set: for example finetune,cifar10"),
        ("finetune,", "names no data set"),
        ("pretrain,", "names no data set"),
        ("masked", "names no data set: for example masked,cifar10"),
        ("finetune,cifar10,dve", "'dve' after the data set: only dev or 512 may follow"),
        ("finetune,cifar10,384", "'384' after the data set: only dev or 512 may follow"),
        ("finetune,512", "names no data set: for example finetune,cifar10"),
        ("pretrain,imagenet2012,512", "512, which is a resolution to fine-tune at: use finetune,i"),
        ("pretrain,512", "512, which is a resolution to fine-tune at: use finetune,imagenet2012,"),
    ],
)
def test_a_wrong_spec_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        get_config("ViT-B/16", spec)


@pytest.mark.parametrize(
    ("file", "patch_size", "hidden_size"),
    [
        ("ti16", 16, 192),
        ("s16", 16, 384),
        ("s32", 32, 384),
        ("b16", 16, 768),
        ("b32", 32, 768),
        ("l16", 16, 1024),
        ("l32", 32, 1024),
        ("h14", 14, 1280),
    ],
)
def test_every_config_file_is_its_model(file, patch_size, hidden_size):
    for spec in ("", "pretrain,imagenet21k", "finetune,cifar100"):
        model = load(f"configs/{file}.py:{spec}").config.model
        assert (model.patch_size, model.hidden_size) == (patch_size, hidden_size)


@pytest.mark.parametrize(
    ("file", "resnet_layers", "patch_size", "hidden_size"),
    [
        ("r50_b32", (3, 4, 6, 3), 1, 768),
        ("r50_b16", (3, 4, 9), 1, 768),
        ("r50_l32", (3, 4, 6, 3), 1, 1024),
        ("r50_l16", (3, 4, 9), 1, 1024),
        ("r26_s32", (2, 2, 2, 2), 1, 384),
        ("r26_b32", (2, 2, 2, 2), 1, 768),
        ("r_ti16", (), 8, 192),
    ],
)
def test_every_config_file_of_a_hybrid_is_its_model(file, resnet_layers, patch_size, hidden_size):
    for spec in ("", "pretrain,imagenet21k", "finetune,cifar100"):
        model = load(f"configs/{file}.py:{spec}").config.model
        assert (model.architecture, model.resnet_layers) == ("hybrid", resnet_layers)
        assert (model.patch_size, model.hidden_size) == (patch_size, hidden_size)


@pytest.mark.parametrize(
    ("file", "twin"), [("axial_b16", "b16"), ("axial_b32", "b32"), ("axial_r50", "r50x1")]
)
@pytest.mark.parametrize("data", ["jft", "imagenet21k", "imagenet2012"])
def test_an_axial_model_is_trained_as_what_it_was_made_from(file, twin, data):
    for spec in (f"pretrain,{data}", "finetune,cifar100"):
        config, expected = (
            load(f"configs/{x}.py:{spec}").config.copy_and_resolve_references().unlock()
            for x in (file, twin)
        )
        assert config.model.architecture == ("axial_resnet" if "r50" in file else "axial_vit")
        if "vit" in config.model.architecture:
            models = (with_defaults(x.model) for x in (config, expected))
            assert [x["classifier"] for x in models] == ["gap", "token"]
            config.model.architecture, config.model.classifier = "vit", expected.model.classifier
            assert config.model == expected.model
        else:
            assert config.model.resnet_layers == expected.model.resnet_layers
        config.model = expected.model
        assert config == expected


@pytest.mark.parametrize(
    ("file", "resnet_layers", "width_factor"),
    [
        ("r50x1", (3, 4, 6, 3), 1),
        ("r50x2", (3, 4, 6, 3), 2),
        ("r101x1", (3, 4, 23, 3), 1),
        ("r152x1", (3, 8, 36, 3), 1),
        ("r152x2", (3, 8, 36, 3), 2),
        ("r152x4", (3, 8, 36, 3), 4),
        ("r200x3", (3, 24, 36, 3), 3),
    ],
)
def test_every_config_file_of_a_resnet_is_its_model(file, resnet_layers, width_factor):
    for spec in ("", "pretrain,imagenet21k", "finetune,cifar100"):
        model = load(f"configs/{file}.py:{spec}").config.model
        assert (model.architecture, model.resnet_layers) == ("resnet", resnet_layers)
        assert model.width_factor == width_factor


# Section 4.2 and the caption of Table 2; 518 = 37 x 14.
@pytest.mark.parametrize(
    ("model", "image_size"),
    [("ViT-L/16", 512), ("ViT-H/14", 518), ("ViT-B/32", 512), ("R50+ViT-L/32", 512)],
)
@pytest.mark.parametrize(
    "spec", ["imagenet2012,512", "imagenet2012,512,dev", "imagenet2012,dev,512"]
)
def test_the_imagenet_rows_of_table_2(model, image_size, spec):
    config, usual = (get_config(model, f"finetune,{s}") for s in (spec, "imagenet2012"))
    assert (config.dataset.image_size, config.ema_decay) == (image_size, 0.9999)
    assert config.dataset.development == ("dev" in spec)
    assert config.dataset.name == "imagenet2012"
    assert usual.ema_decay == 0
    assert config.duration == usual.duration == "20000 steps"
    assert config.schedule.to_dict() == usual.schedule.to_dict()
