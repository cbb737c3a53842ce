import itertools
import json
import math
import re
import shutil
from unittest import mock

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax import initialization, preparation, program, train
from vit_jax.checkpoints.pretrained import Pretrained, abstract_params, load_pretrained
from vit_jax.checkpoints.save import save_pretrained
from vit_jax.data import datasets
from vit_jax.data.protocols import evaluation
from vit_jax.errors import UserError
from vit_jax.models import create_model, model_config, prediction_defaults
from vit_jax.recipes import OFFICIAL_NAMES, get_config, name_of

from .runs import read_losses, train_until
from .sources import png


def test_finetuning_from_a_run_replaces_its_head(tiny_config, tmp_path, finished, capsys):
    config = tiny_config(
        init_from=str(finished),
        duration="1 step",
        **{
            "dataset.image_size": "8x16",
            "model.representation_size": 0,
            "schedule.warmup": "0 steps",
        },
    )
    train.train(config, tmp_path / "run")
    output = capsys.readouterr().out
    for action in ("loaded", "resized", "dropped", "new"):
        assert action in output
    assert read_losses(tmp_path / "run")[0] == pytest.approx(math.log(10), rel=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model.scan_layers": True, "model.num_layers": 2},
        {"objective": "masked_patches", "model.representation_size": 0, "model.patch_size": 2},
    ],
)
def test_parameters_are_those_of_the_models_own_initialization(
    tiny_config, tmp_path, monkeypatch, overrides
):
    started = []
    monkeypatch.setattr(train, "_finish", lambda _, state, *__: started.append(state) or {})
    config = tiny_config(**overrides)
    train.train(config, tmp_path / "run")
    (state,) = started
    prepared = preparation.prepare(config, tmp_path, None)
    init_rng, rng = jax.random.split(jax.random.key(config.seed))
    whole = jax.jit(prepared.model.init)(init_rng, np.zeros((1, 8, 8, 3), np.float32))["params"]
    for params in (state.params, state.ema_params):
        jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert (state.rng, state.step) == (rng, 0)
    moments = jax.tree.leaves(state.opt_state)
    assert len(moments) > 2 * len(jax.tree.leaves(whole))
    assert not any(np.any(x) for x in moments)


def test_what_weights_replace_is_not_computed(tiny_config):
    config = tiny_config()
    model, *_ = program.create_objective(config, 10)
    init_rng = jax.random.split(jax.random.key(config.seed))[0]
    whole = flatten_dict(jax.jit(model.init)(init_rng, np.zeros((1, 8, 8, 3)))["params"], sep="/")
    wanted = {"cls", "Transformer/posembed_input/pos_embedding", "pre_logits/kernel"}
    params = initialization._initialize(model, config, lambda name, _: name in wanted)
    for name, value in flatten_dict(params, sep="/").items():
        assert (value.shape, value.dtype) == (whole[name].shape, whole[name].dtype)
        np.testing.assert_array_equal(value, whole[name] if name in wanted else 0)
    assert np.any(whole["Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"])


TINY_SIZES = {
    "patch_size": 4, "hidden_size": 16, "num_layers": 1, "mlp_dim": 32, "num_heads": 2
}  # fmt: skip


@pytest.fixture
def foreign_weights(tmp_path):
    """Weights of a model that differs from Google's in all that travels with them."""
    model = {"architecture": "vit", "num_classes": 3, **TINY_SIZES, "gelu": "erf"}
    model |= {"classifier": "gap", "layer_norm_epsilon": 1e-3}
    shapes = abstract_params(model, 8)
    noise = np.random.default_rng(0)
    params = jax.tree.map(lambda x: noise.standard_normal(x.shape).astype(np.float32), shapes)
    model = prediction_defaults("vit") | model
    pretrained = Pretrained(params, model, evaluation("bit", 8), None, "softmax", "")
    save_pretrained(pretrained, tmp_path / "timm", "timm")
    return tmp_path / "timm"


def finetune_config(data_dir, init_from, **overrides):
    config = get_config("ViT-Ti/4", "finetune,digits")
    fixed = {f"model.{key}": value for key, value in TINY_SIZES.items()}
    fixed |= {"dataset.data_dir": data_dir, "dataset.image_size": 8, "dataset.protocol": "pad"}
    fixed |= {"batch_size": 32, "duration": "2 steps", "model.dtype": "float32"}
    fixed |= {"schedule.warmup": "1 step", "init_from": str(init_from)}
    config.update_from_flattened_dict(fixed | overrides)
    return config


def test_as_many_patches_in_another_grid_have_other_positions(data_dir, foreign_weights):
    config = finetune_config(data_dir, foreign_weights, **{"dataset.image_size": "4x16"})
    _, weights = initialization.read_weights(config)
    found, old = (
        x["Transformer"]["posembed_input"]["pos_embedding"][0]
        for x in (weights.params, load_pretrained(foreign_weights).params)
    )
    np.testing.assert_allclose(found, np.linspace(old[0], old[1], 4), atol=1e-6)


def test_finetuning_takes_what_travels_with_the_weights(
    data_dir, tmp_path, foreign_weights, capsys
):
    config = finetune_config(data_dir, foreign_weights, checkpoint_every="1 step")
    with pytest.raises(KeyboardInterrupt):
        train_until(config, tmp_path / "run", step=2)
    expected = {"classifier": "gap", "gelu": "erf", "layer_norm_epsilon": 1e-3}
    expected |= {"position_embedding": "learned", "position_placement": "stem"}
    listed = ", ".join(f"{key} {value}" for key, value in expected.items())
    assert f"has it: {listed}\n" in capsys.readouterr().out
    saved = json.loads((tmp_path / "run/config.json").read_text())["model"]
    assert expected.items() <= saved.items()
    assert config.model.gelu is None  # The caller's stays as it was.
    # The first step has a rate of 0: the features are those of the weights, by their own model.
    first, weights = load_pretrained(tmp_path / "run"), load_pretrained(foreign_weights)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    features = [
        create_model(each.model, num_classes=0).apply({"params": each.params}, images)
        for each in (first, weights)
    ]
    np.testing.assert_allclose(*features, rtol=1e-5, atol=1e-5)
    # What was taken is in the checkpoint, so that the weights are not needed to go on.
    shutil.rmtree(foreign_weights)
    train.train(config, tmp_path / "run")
    assert "continuing from step 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.gelu": "tanh"}, "model.gelu is tanh but .* was trained with erf: set --config.mo"),
        ({"model.layer_norm_epsilon": 1e-6}, "set --config.model.layer_norm_epsilon=0.001"),
        ({"model.position_embedding": "none"}, "none but .*: set --config.model.position_embedd"),
        ({"model.hidden_size": 32}, "model.hidden_size is 32 but .* was trained with 16: set"),
        ({"model.representation_size": 8}, "do not fit the model .* pre_logits/bias is missing"),
        ({"init_from": "/nowhere"}, "/nowhere does not exist"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_the_data_set_is_opened(
    data_dir, tmp_path, foreign_weights, monkeypatch, overrides, message
):
    monkeypatch.delattr(datasets, "open_dataset")
    config = finetune_config(data_dir, **({"init_from": foreign_weights} | overrides))
    with pytest.raises(UserError, match=message):
        train.train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "of_config"),
    [({}, "a ViT-B/16"), ({"model.num_layers": 3}, "of other sizes")],
)
def test_weights_of_another_named_model_are_told_by_its_name(overrides, of_config):
    config = get_config("ViT-B/16", "finetune,digits")
    config.update_from_flattened_dict(overrides)
    model = prediction_defaults("vit") | model_config("ViT-Ti/16") | {"num_classes": 3}
    weights = Pretrained({}, model, evaluation("bit", 224), None, "softmax", "Ti_16.npz")
    told = f"Ti_16.npz is a ViT-Ti/16 but the config's model is {of_config}: use --config "
    with pytest.raises(UserError, match=f"^{told}vit:ViT-Ti/16,...$"):
        initialization._check_model(config.model, weights)


@pytest.mark.parametrize("name", [*sorted({*OFFICIAL_NAMES.values()}), "ViT-B/8", "ViT-L/14"])
def test_a_model_has_the_name_that_it_is_made_by(name):
    sizes = model_config(name)
    assert name_of({**sizes, "num_classes": 10, "gelu": "erf"}) == name
    assert name_of({**sizes, "architecture": "another"}) is None


@pytest.mark.parametrize("changed", ["dropout_rate", "stochastic_depth", ""])
def test_finetuning_drops_what_the_weights_were_trained_without(data_dir, monkeypatch, changed):
    model = {"architecture": "vit", "num_classes": 3, **TINY_SIZES, "num_layers": 2}
    noise = np.random.default_rng(0)
    shapes = abstract_params(model, 8)
    params = jax.tree.map(lambda x: noise.standard_normal(x.shape).astype(np.float32), shapes)
    pretrained = Pretrained(
        params, prediction_defaults("vit") | model, evaluation("bit", 8), None, "softmax", "it"
    )
    monkeypatch.setattr(initialization, "load_pretrained", lambda _: pretrained)
    rates = {f"model.{changed}": 0.5} if changed else {}
    config = finetune_config(data_dir, "it", **{"model.num_layers": 2, **rates})
    config, weights = initialization.read_weights(config)
    _, objective, _ = program.create_objective(config, num_classes=3)
    images = noise.uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)
    batch = {"image": images, "label": np.zeros(4, np.int32)}
    # Of three classes, as the weights: a fresh head of zeros would hide what is below it.
    fitted = {**weights.params, "head": params["head"]}

    def losses(**options):
        return np.asarray(objective(fitted, batch, **options)["loss"])

    trained = [losses(train=True, rng=jax.random.key(seed)) for seed in (1, 1, 2)]
    evaluated = losses(train=False)
    np.testing.assert_array_equal(*trained[:2])
    assert np.allclose(trained[0], evaluated) == np.allclose(*trained[1:]) == (not changed)
    own = create_model(pretrained.model).apply({"params": params}, images)
    np.testing.assert_allclose(evaluated, -jax.nn.log_softmax(own)[:, 0], rtol=1e-4, atol=1e-5)


@pytest.fixture
def flowers(tmp_path):
    """A folder of 3 classes, and weights of 5 that have these in another order."""
    for split, name in itertools.product(("train", "test"), ("daisy", "iris", "Lily Valley")):
        directory = tmp_path / "flowers" / split / name
        directory.mkdir(parents=True)
        directory.joinpath("a.png").write_bytes(png(np.full((8, 8, 3), 99, np.uint8)))
    return tmp_path / "flowers"


NAMED = ("iris", "tulip", "lily_valley", "daisy", "rose")


def named_weights(path, names, **model):
    """Random weights of an official file, with class names."""
    model = {**TINY_SIZES, "num_classes": len(names), "representation_size": 0, **model}
    model = {"architecture": "vit"} | prediction_defaults("vit") | model
    noise = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: noise.standard_normal(x.shape).astype(np.float32), abstract_params(model, 8)
    )
    pretrained = Pretrained(params, model, evaluation("bit", 8), names, "softmax", "")
    save_pretrained(pretrained, path, "official")
    return pretrained


def started(config, workdir, monkeypatch):
    """The state with which a run begins."""
    states = []
    monkeypatch.setattr(train, "_finish", lambda _, state, *__: states.append(state) or {})
    train.train(config, workdir)
    return states[0]


def of_folder(data, init_from, **overrides):
    fixed = {"dataset.name": f"folder:{data}", "dataset.data_dir": "", "keep_head": "auto"}
    return finetune_config("", init_from, **{**fixed, **overrides})


@pytest.mark.parametrize("names", [NAMED, ("Lily Valley", "daisy", "iris")])
def test_the_head_is_kept_for_the_classes_that_it_knows(
    flowers, tmp_path, monkeypatch, capsys, names
):
    weights = named_weights(tmp_path / "w.npz", names)
    state = started(of_folder(flowers, tmp_path / "w.npz"), tmp_path / "run", monkeypatch)
    images = np.random.default_rng(1).uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)
    whole = create_model(weights.model).apply({"params": weights.params}, images)
    # In the order of the data's classes: Lily Valley, daisy, iris.
    expected = whole[:, [2, 3, 0]] if names is NAMED else whole
    found = create_model(weights.model, num_classes=3).apply({"params": state.params}, images)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    output = capsys.readouterr().out
    assert f"the head is kept: 3 of the {len(names)} classes" in output
    assert re.search(r"^matched \(16, 3\) +head/kernel$", output, re.M)
    assert "dropped" not in output and "new " not in output


@pytest.mark.parametrize(
    ("names", "model", "overrides", "reason"),
    [
        (NAMED, {}, {"keep_head": "never"}, None),
        (("iris", "tulip", "daisy"), {}, {}, "not all classes of the data are among those of"),
        (None, {}, {}, "w.npz has none whose classes are known by name"),
        # The head of another input: behind a hidden layer, or of another pooling.
        (NAMED, {"representation_size": 16}, {}, "w.npz is behind another pooling or a hidden"),
        (NAMED, {"classifier": "gap"}, {"model.classifier": "token"}, "is behind another pooling"),
        (NAMED, {}, {"model.num_classes": 4}, "it has 4 classes, and the data 3"),
    ],
)
def test_a_head_that_would_mean_something_else_is_not_kept(
    flowers, tmp_path, monkeypatch, capsys, names, model, overrides, reason
):
    named_weights(tmp_path / "w.npz", names or tuple("abc"), **model)
    if names is None:
        (tmp_path / "w.npz.json").unlink()
    config = of_folder(flowers, tmp_path / "w.npz", **overrides)
    state = started(config, tmp_path / "run", monkeypatch)
    assert not np.any(state.params["head"]["kernel"])
    output = capsys.readouterr().out
    assert "the head is kept" not in output
    assert re.findall("the head is new: .*", output) == ([mock.ANY] if reason else [])
    assert (reason or "") in output


def test_finetuning_without_weights_has_the_models_defaults(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_start", lambda *_: (None, None))
    monkeypatch.setattr(train, "_finish", lambda *_: {})
    train.train(finetune_config(data_dir, ""), tmp_path / "run")
    saved = json.loads((tmp_path / "run/config.json").read_text())["model"]
    assert prediction_defaults("vit").items() <= saved.items()
