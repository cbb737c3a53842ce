import pathlib
import re
import runpy

import pytest

from vit_jax import recipes
from vit_jax.config import check_config, to_dict
from vit_jax.config_files import default_workdir, explain, find, load
from vit_jax.errors import UserError
from vit_jax.evaluation import registry

ROOT = pathlib.Path(__file__).parents[1]
SHOWN = {"b16": "ViT-B/16", "b32": "ViT-B/32", "l16": "ViT-L/16", "l32": "ViT-L/32"}
SHOWN |= {"h14": "ViT-H/14"}


def rows(file, recipe):
    """The rows of a recipe in the docstring of a config file, as lists of words."""
    words = [line.split() for line in runpy.run_path(f"configs/{file}.py")["__doc__"].splitlines()]
    return [line for line in words if line and line[0].startswith(f"{recipe},")]


@pytest.fixture(autouse=True)
def in_the_clone(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_config_file_of_before_keys_were_added_has_them_and_flags_can_set_them(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        """
from vit_jax import recipes

def get_config():
    config = recipes.get_config("ViT-B/16")
    config.optimizer = {
        "name": "sgd", "momentum": 0.9, "weight_decay": 0.0, "decay": "all",
        "mu_dtype": "float32", "clip_norm": 1.0,
    }
    config.schedule = {"base_lr": 0.1, "decay": "cosine", "warmup": "9 steps", "end_lr": 0.0}
    return config
"""
    )
    loaded = load(str(path), ["--config.schedule.cooldown=3 steps"])
    check_config(loaded.config)
    assert loaded.config.optimizer.lr_multipliers == ""
    assert loaded.config.schedule.cooldown == "3 steps"
    assert "config.schedule.base_lr = 0.1" in explain(loaded)


@pytest.mark.parametrize("file", SHOWN)
def test_a_config_file_shows_its_model(file):
    (line,) = re.findall(r"^ +num_layers.*$", (ROOT / f"configs/{file}.py").read_text(), re.M)
    shown = {key: int(number) for key, number in re.findall(r"([a-z]\w+) (\d+)(?!\d|M)", line)}
    model = load(f"configs/{file}.py").config.model
    assert shown == {
        key: model[key]
        for key in ("num_layers", "hidden_size", "mlp_dim", "num_heads", "patch_size")
    }


@pytest.mark.parametrize("file", SHOWN)
def test_a_config_file_shows_its_rows_of_table_3(file):
    text = runpy.run_path(f"configs/{file}.py")["__doc__"]
    found = rows(file, "pretrain")
    assert len(found) == 3
    for spec, epochs, base_lr, decay, weight_decay, dropout, *_ in found:
        config = recipes.get_config(SHOWN[file], spec)
        assert config.duration == f"{epochs} epochs"
        assert (config.schedule.base_lr, config.schedule.decay) == (float(base_lr), decay)
        assert config.optimizer.weight_decay == float(weight_decay)
        assert config.model.dropout_rate == float(dropout)
        assert config.optimizer.clip_norm == (1 if spec.endswith("imagenet2012") else 0)
        assert (config.batch_size, config.dataset.image_size) == (4096, 224)
        assert config.schedule.warmup == "10000 steps"
        assert (config.optimizer.b1, config.optimizer.b2) == (0.9, 0.999)
        assert config.model.representation_size == config.model.hidden_size
    assert "224 px, batch 4096, Adam with betas 0.9 and 0.999, 10000 steps of warm-up" in text


@pytest.mark.parametrize("file", SHOWN)
def test_a_config_file_shows_its_rows_of_table_4(file):
    text = runpy.run_path(f"configs/{file}.py")["__doc__"]
    found = rows(file, "finetune")
    assert {row[0].partition(",")[2] for row in found} == recipes.TABLE_4.keys()
    for spec, steps, warmup, *rates in found:
        config = recipes.get_config(SHOWN[file], spec)
        assert (config.duration, config.schedule.warmup) == (f"{steps} steps", f"{warmup} steps")
        assert config.schedule.base_lr == float(rates[0])
        assert sorted(map(float, rates)) == [*recipes.finetuning_row(config.dataset.name).base_lrs]
        assert config.batch_size == 512
        assert (
            f"(Table 4): {config.dataset.image_size} px, batch 512, SGD with momentum 0.9" in text
        )
        assert f"dropout {config.model.dropout_rate:g}." in text


@pytest.mark.parametrize(
    ("spec", "model", "expected"),
    [
        ("ViT-Ti/16", "ViT-Ti/16", ""),
        ("R50+ViT-B/16,finetune,cifar10", "R50+ViT-B/16", "finetune,cifar10"),
        ("R152x2,pretrain,imagenet21k,dev", "R152x2", "pretrain,imagenet21k,dev"),
        ("Axial-ViT-B/16,masked,jft", "Axial-ViT-B/16", "masked,jft"),
        ("ViT-B/16,pretrain,dev", "ViT-B/16", "pretrain,dev"),
        # As the official code and its files of weights spell them.
        ("b16,cifar10", "ViT-B/16", "finetune,cifar10"),
        ("r50_l32,imagenet2012", "R50+ViT-L/32", "finetune,imagenet2012"),
        ("r_ti16,oxford_iiit_pet,dev", "R+ViT-Ti/16", "finetune,oxford_iiit_pet,dev"),
        ("ViT-L_16,imagenet2012,512", "ViT-L/16", "finetune,imagenet2012,512"),
        ("R26_S_32,folder:/data/my, flowers", "R26+ViT-S/32", "finetune,folder:/data/my, flowers"),
        ("s32,finetune,folder:/data/flowers", "ViT-S/32", "finetune,folder:/data/flowers"),
    ],
)
def test_vit_takes_any_model_and_the_official_spelling(spec, model, expected):
    config = load(f"configs/vit.py:{spec}").config
    assert to_dict(config) == to_dict(recipes.get_config(model, expected))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("b16,finetun,cifar10", "recipe 'finetun' is unknown"),
        ("b16,pretrian", "recipe 'pretrian' is unknown"),
        ("b16,finetune", "names no data set"),
        ("b17,cifar10", "model 'b17' is unknown"),
    ],
)
def test_vit_refuses_what_is_misspelled(spec, message):
    with pytest.raises(UserError, match=message):
        load(f"vit:{spec}")


@pytest.mark.parametrize(
    ("old", "model"),
    [
        ("ti16", "ViT-Ti/16"),
        ("s16", "ViT-S/16"),
        ("s32", "ViT-S/32"),
        ("r50_b16", "R50+ViT-B/16"),
        ("r50_b32", "R50+ViT-B/32"),
        ("r50_l16", "R50+ViT-L/16"),
        ("r50_l32", "R50+ViT-L/32"),
        ("r26_b32", "R26+ViT-B/32"),
        ("r26_s32", "R26+ViT-S/32"),
        ("r_ti16", "R+ViT-Ti/16"),
        ("r50x1", "R50x1"),
        ("r50x2", "R50x2"),
        ("r101x1", "R101x1"),
        ("r152x1", "R152x1"),
        ("r152x2", "R152x2"),
        ("r152x4", "R152x4"),
        ("r200x3", "R200x3"),
        ("axial_b16", "Axial-ViT-B/16"),
        ("axial_b32", "Axial-ViT-B/32"),
        ("axial_r50", "AxialResNet50"),
    ],
)
def test_a_config_that_had_a_file_of_its_own_is_what_it_was(old, model):
    assert not (ROOT / f"configs/{old}.py").exists()
    for spec in ("", ":pretrain,imagenet21k", ":finetune,cifar100"):
        config = load(f"configs/{old}.py{spec}").config
        assert to_dict(config) == to_dict(recipes.get_config(model, spec[1:]))
        assert default_workdir(f"configs/{old}.py{spec}").startswith(f"runs/{old}")


def test_outside_of_the_clone_configs_are_found_by_name(tmp_path, monkeypatch):
    inside = load("configs/b16.py:finetune,cifar10")
    monkeypatch.chdir(tmp_path)
    for name in ("b16:finetune,cifar10", "configs/b16.py:finetune,cifar10", "vit:b16,cifar10"):
        assert load(name).config == inside.config
    assert find("digits") == (ROOT / "configs/digits.py", None)
    assert default_workdir("b16:finetune,cifar10") == "runs/b16-finetune-cifar10"
    (tmp_path / "b16").mkdir()  # a directory is no config
    assert find("b16")[0] == ROOT / "configs/b16.py"
    known = (
        "known are b16, b32, detection, digits, h14, l16, l32, segmentation, vit, or give a file"
    )
    for name, hint in {"digit": "digits", "b16x": "b16", "configs/l17.py": "l16"}.items():
        with pytest.raises(UserError, match=rf"does not exist: did you mean {hint}\? {known}$"):
            find(name)
    for name in ("elsewhere/b16.py", ""):
        with pytest.raises(UserError, match=f"does not exist: {known}$"):
            find(name)


@pytest.mark.parametrize("config", ["digits", "b16:finetune,cifar10"])
def test_an_evaluator_is_added_by_flags_in_any_order(config):
    flags = ["--config.evals.sure.every=2 epochs", "--config.evals.sure.type", "classification"]
    loaded = load(config, [*flags, "--config.init_from=B_16"])
    assert loaded.config.evals.sure.to_dict() == {
        **registry.complete({"type": "classification"}),
        "every": "2 epochs",
    }
    check_config(loaded.config)
    sources = dict(re.findall(r"^config.evals.sure.(\w+) = .*?# (.*)$", explain(loaded), re.M))
    assert sources["every"] == sources["type"] == "command line"
    assert sources["split"] == "default of type classification"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.evals.sure.type=objectiv", "evals.sure: type 'objectiv' is unknown: did you me"),
        ("--config.evals.sure.every=1", "to add one give its type, --config.evals.sure.type=obje"),
    ],
)
def test_an_evaluator_without_a_known_type_is_not_added(flag, message):
    with pytest.raises(UserError, match=message):
        load("digits", [flag])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("batch_size=abc", "config.batch_size is 'abc': it must be of type int"),
        ("schedule.base_lr=fast", "config.schedule.base_lr is 'fast': it must be of type float"),
        ("dataset.random_crop=often", "config.dataset.random_crop is 'often': it must be of type"),
    ],
)
def test_a_value_of_another_type_is_told_by_its_key(flag, message):
    with pytest.raises(UserError, match=f"^{message}"):
        load("digits", [f"--config.{flag}"])


@pytest.mark.parametrize(
    ("name", "flag", "message"),
    [
        ("digits", "=1", "config. is not a key that anything reads"),
        ("digits", ".1=2", "config.1 is not a key that anything reads"),
        ("digits", ".seed[0]=3", "config.seed[0] is not a key that anything reads"),
        ("digits", ".evals.val.type.x=3", "config.evals.val.type.x is not a key that anything"),
        ("digits", ".evals.keys.type=objective", "config.evals.keys is a name that cannot be give"),
        ("digits", ".seed=" + "9" * 5000, "config.seed is '99999"),
        ("digits", ".model=3", "Failed to parse '3' as a ConfigDict"),
        (
            "vit:R50x1",
            ".model.resnet_layers=" + "-" * 9000 + "1",
            "cannot be read, write it as in P",
        ),
        (
            "vit:R50x1",
            ".model.resnet_layers=(1,nan)",
            "config.model.resnet_layers has '(1,nan)': it",
        ),
        ("digits", ".schedule.base_lr=nan", "config.schedule.base_lr is nan: it must be a finite"),
        (
            "digits",
            ".seed=1180591620717411303424",
            "config.seed is 1180591620717411303424: it must",
        ),
    ],
)
def test_a_flag_that_is_none_is_one_line(name, flag, message):
    flag = f"--config.{flag}" if flag.startswith("=") else f"--config{flag}"
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        check_config(load(name, [flag]).config)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("\0", "--config is '\\x00': it must be one line of text, without '\\x00'"),
        ("x" * 5000, "it must have at most 4096 characters"),
        ("ti17:finetune,cifar10", "config ti17 does not exist: did you mean ti16? known are b16"),
        ("x" * 4000, "does not exist: known are"),
        ("vit:ViT-B/" + "9" * 4000, "is unknown: use ViT-SIZE/PATCH"),
        ("vit:R50x" + "9" * 50, "config.model.width_factor is 99999999999"),
        ("b16:" + "x" * 4000, "is unknown: use pretrain, masked or finetune"),
    ],
)
def test_a_name_that_is_none_is_one_line(name, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        check_config(load(name).config)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_a_file_that_makes_no_config_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config():\n    return {'seed': 1}\n")
    with pytest.raises(UserError, match="its get_config must return the ConfigDict of a run"):
        load(str(path))


def test_an_evaluator_is_added_in_python():
    loaded = load("digits", ["--config.seed=1"]).config
    for config in (loaded, recipes.get_config("ViT-B/16")):
        config.evals.sure = {"type": "objective", "split": "train"}
        check_config(config)
    with pytest.raises(AttributeError, match="surplus"):
        loaded.surplus = 1


def test_a_file_of_ones_own_is_read(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from vit_jax import recipes\n\n\ndef get_config():\n"
        "    config = recipes.get_config('ViT-S/16', 'pretrain,digits')\n"
        "    config.schedule.base_lr = 5e-4\n    return config\n"
    )
    loaded = load(str(path), ["--config.batch_size=64", "--config.dataset.random_flip=false"])
    check_config(loaded.config)
    values = loaded.config.schedule.base_lr, loaded.config.batch_size
    assert (values, loaded.config.dataset.random_flip) == ((5e-4, 64), False)
    with pytest.raises(UserError, match="takes no spec: leave out ':finetune'"):
        load(f"{path}:finetune")
    path.write_text("config = 1\n")
    with pytest.raises(UserError, match="has no get_config"):
        load(str(path))


def test_every_value_is_explained_by_who_set_it():
    flags = ["--config.batch_size=64", "--config.model.num_layers", "3"]
    lines = explain(load("configs/b16.py:pretrain,imagenet21k", flags)).splitlines()
    shown = {}
    for line in lines:
        key, value, source = re.fullmatch(r"config\.(\S+) = (.*?) +# (.*)", line).groups()
        shown[key] = (value, source)
    assert shown["batch_size"] == ("64", "command line")
    assert shown["model.num_layers"] == ("3", "command line")
    assert shown["model.hidden_size"] == ("768", "ViT-B/16")
    assert shown["schedule.base_lr"] == ("0.001", "Table 3, ViT-B/16 on imagenet21k")
    assert shown["optimizer.weight_decay"] == ("0.03", "Table 3, ViT-B/16 on imagenet21k")
    assert shown["schedule.warmup"] == ("'10000 steps'", "Table 3")
    assert shown["seed"] == ("0", "recipe pretrain")


def test_what_a_file_changes_and_what_weights_decide_is_told():
    digits = explain(load("configs/digits.py"))
    assert re.search(r"^config.model.num_layers = 4 +# configs/digits.py$", digits, re.M)
    assert re.search(r"^config.model.dropout_rate = 0.1 +# Table 3, ViT on", digits, re.M)
    finetune = explain(load("configs/l16.py:finetune,cifar10,512"))
    assert re.search(r"^config.model.gelu = None +# taken from the weights", finetune, re.M)
    assert re.search(r"^config.schedule.base_lr = 0.03 +# Table 4, cifar10$", finetune, re.M)
    assert re.search(r"^config.dataset.image_size = 512 +# Table 2$", finetune, re.M)


def test_the_config_of_a_run_is_explained_by_its_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(load("configs/digits.py").config.to_json())
    lines = explain(load(str(path), ["--config.seed=3"])).splitlines()
    assert {line.partition("# ")[2] for line in lines} == {str(path), "command line"}
    assert default_workdir(str(path)) == str(tmp_path)
