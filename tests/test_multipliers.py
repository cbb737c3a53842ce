import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import config_dict

from vit_jax import steps, train
from vit_jax.config import check_config
from vit_jax.errors import UserError
from vit_jax.multipliers import freeze, multipliers, parse_multipliers
from vit_jax.plan.estimate import describe
from vit_jax.program import check_multipliers
from vit_jax.recipes import ADAFACTOR, get_config
from vit_jax.state import create_optimizer, create_state

from .runs import assert_same_run, read_arrays, train_until

ADAM = {"name": "adam", "b1": 0.9, "b2": 0.999, "weight_decay": 0.3, "decay": "kernels",
        "mu_dtype": "float32", "clip_norm": 0.5}  # fmt: skip
SGD = {"name": "sgd", "momentum": 0.9, "weight_decay": 0.1, "decay": "all", "mu_dtype": "float32",
       "clip_norm": 0.5}  # fmt: skip
LAYER = {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "bias": jnp.array([0.5, 2.0])}
PARAMS = {"embedding": LAYER, "encoder": {"layer_0": LAYER, "layer_10": LAYER}, "head": LAYER}


def test_the_first_pattern_that_is_a_whole_name_counts():
    found = multipliers(PARAMS, "head/bias = 0, head/.*=10 ,encoder/layer_(0|1)/.*=.5")
    ones = {"kernel": 1.0, "bias": 1.0}
    assert found == {
        "embedding": ones,
        "encoder": {"layer_0": {"kernel": 0.5, "bias": 0.5}, "layer_10": ones},
        "head": {"kernel": 10.0, "bias": 0.0},
    }


def test_a_pattern_may_have_commas_and_equals_signs():
    entries = parse_multipliers(r"layer_\d{1,2}/(?=ker).*=1e-2,b=3.")
    assert [(x.pattern.pattern, x.factor) for x in entries] == [
        (r"layer_\d{1,2}/(?=ker).*", 0.01), ("b", 3.0)
    ]  # fmt: skip
    assert parse_multipliers("") == []


@pytest.mark.parametrize("num_layers", [12, 24])
def test_a_rate_for_each_layer_of_a_deep_model_can_be_said(num_layers):
    config = get_config("ViT-B/16")
    config.model.num_layers = num_layers
    rates = {
        f"Transformer/encoderblock_{i}/.*": 0.75 ** (num_layers - i) for i in range(num_layers)
    }
    config.optimizer.lr_multipliers = ",".join(f"{key}={rate}" for key, rate in rates.items())
    check_config(config)
    params = describe(config, num_classes=10, devices=1).state.params
    found = multipliers(params, config.optimizer.lr_multipliers)
    for i, rate in enumerate(rates.values()):
        assert set(jax.tree.leaves(found["Transformer"][f"encoderblock_{i}"])) == {rate}
    assert set(jax.tree.leaves([found["embedding"], found["head"]])) == {1.0}


# Of three layers at 0.5, from the code of BEiT and MAE: get_layer_id_for_vit counts the embeddings
# as 0, block i as i + 1, and all that follows the blocks as their number + 1.
LAYER_DECAY = {
    "cls": 0.0625, "embedding/kernel": 0.0625, "embedding/bias": 0.0625,
    "Transformer/posembed_input/pos_embedding": 0.0625,
    "Transformer/encoderblock_0/.*": 0.125, "Transformer/encoderblock_1/.*": 0.25,
    "Transformer/encoderblock_2/.*": 0.5, "Transformer/encoder_norm/.*": 1.0, "head/.*": 1.0,
    "MAPHead_0/.*": 1.0, "pre_logits/.*": 1.0, "conv_root/kernel": 0.0625,
    "block1/unit1/.*": 0.0625, "gn_root/.*": 0.0625,
}  # fmt: skip


def decayed(decay, model="ViT-Ti/16", **fields):
    config = get_config(model)
    config.model.update({"num_layers": 3, "representation_size": 0} | fields)
    params = describe(config, num_classes=10, devices=1).state.params
    return flatten_dict(multipliers(params, "", decay), sep="/")


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("ViT-Ti/16", {}),
        ("ViT-Ti/16", {"classifier": "map", "representation_size": 9, "scan_layers": True}),
        ("R50+ViT-B/16", {"resnet_layers": (1,)}),
    ],
)
def test_rates_decay_by_layer_as_in_beit_and_mae(model, fields):
    found = decayed(0.5, model, **fields)
    for name, scale in found.items():
        (expected,) = (x for pattern, x in LAYER_DECAY.items() if re.fullmatch(pattern, name))
        assert scale == expected, name
    assert set(found.values()) == {0.0625, 0.125, 0.25, 0.5, 1.0}


@pytest.mark.versions
def test_rates_decay_by_layer_as_in_timm():
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    sizes = {"depth": 3, "embed_dim": 32, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    names = {id(x): name for name, x in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=0.7)
    scales = {names[id(x)]: group["lr_scale"] for group in groups for x in group["params"]}
    found = decayed(0.7)
    ours = {
        "cls_token": "cls", "pos_embed": "Transformer/posembed_input/pos_embedding",
        "patch_embed.proj.weight": "embedding/kernel", "head.weight": "head/kernel",
        "head.bias": "head/bias",
    }  # fmt: skip
    for layer in range(3):
        block = f"Transformer/encoderblock_{layer}"
        ours[f"blocks.{layer}.norm1.weight"] = f"{block}/LayerNorm_0/scale"
        ours[f"blocks.{layer}.mlp.fc2.bias"] = f"{block}/MlpBlock_3/Dense_1/bias"
    for theirs, name in ours.items():
        assert found[name] == pytest.approx(scales[theirs]), name
    # timm has the last norm's rate with the last block; BEiT and MAE with the head.
    assert scales["norm.weight"] == pytest.approx(0.7)
    assert found["Transformer/encoder_norm/scale"] == 1.0


def test_the_rate_of_a_layer_is_multiplied_by_that_of_its_name_and_decays_weights_with_it():
    block = {"kernel": jnp.array([2.0]), "bias": jnp.array([3.0])}
    params = {"Transformer": {"encoderblock_0": block, "encoderblock_1": block}, "head": block}
    text = "Transformer/encoderblock_0/.*=3,head/bias=0"
    config = SGD | {"clip_norm": 0.0, "lr_multipliers": text, "layer_decay": 0.5}
    optimizer = create_optimizer(config, lambda count: 0.1)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    scales = {"encoderblock_0": 3 * 0.25, "encoderblock_1": 0.5}
    for name, scale in scales.items():
        expected = -0.1 * scale * (1 + 0.1 * 2.0)
        np.testing.assert_allclose(updates["Transformer"][name]["kernel"], expected, rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.1 * 1.2, rtol=1e-6)
    assert updates["head"]["bias"] == 0


def test_a_model_without_layers_has_no_layer_decay():
    config = get_config("R50x1", "finetune,cifar10")
    config.model.resnet_layers = (1,)
    config.optimizer.layer_decay = 0.75
    with pytest.raises(UserError, match="0.75, but the model has no layers of a Transformer: set"):
        check_multipliers(config)


DOCS = pathlib.Path(__file__).parents[1] / "docs/training.md"
PROBES = re.findall(r"'(\(\?!.*=0)'", DOCS.read_text())


@pytest.mark.parametrize(
    ("model", "fields", "probe", "trained"),
    [
        ("ViT-B/16", {}, PROBES[0], "head/"),
        ("ViT-B/16", {"scan_layers": True, "representation_size": 9}, PROBES[0], "head/"),
        ("R50+ViT-B/16", {}, PROBES[0], "head/"),
        ("R50x1", {}, PROBES[0], "resnet/head/"),
        ("ViT-B/16", {"classifier": "map"}, PROBES[1], ("head/", "MAPHead_0/")),
    ],
)
def test_the_linear_probe_of_the_docs_trains_the_head_alone(model, fields, probe, trained):
    config = get_config(model)
    config.model.update(fields)
    params = describe(config, num_classes=10, devices=1).state.params
    flat = flatten_dict(multipliers(params, probe), sep="/")
    assert {x for x in flat if flat[x]} == {x for x in flat if x.startswith(trained)}
    assert set(flat.values()) == {0.0, 1.0}


@pytest.mark.parametrize(
    "text",
    ["{}", "{}=1", "{}=1e7", "({}=1", "a=1,{}", "a={}", ".*|{}=0"],
)
@pytest.mark.parametrize("long", ["x" * 9000, " " * 9000, "1" * 9000, "=" * 9000])
def test_long_patterns_are_cut_in_messages_and_soon_told(text, long):
    with pytest.raises(UserError) as caught:
        multipliers(PARAMS, text.format(long))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("head=0", "'head', but no parameter has such a name, as a whole; near are head/bias; he"),
        (
            "haed/kernel=2",
            "'haed/kernel', but no parameter has such a name, as a whole; near are h",
        ),
        ("head/.*=0,head/bias=2", "'head/bias', which names only parameters of earlier patterns"),
        (
            ".*=0",
            "optimizer.lr_multipliers '.*=0' freezes all (embedding/bias; embedding/kernel; enc",
        ),
    ],
)
def test_patterns_without_an_effect_are_refused(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        create_optimizer(ADAM | {"lr_multipliers": text}, lambda count: 0.1).init(PARAMS)


def updated(config, params, grads, rate=0.1):
    optimizer = create_optimizer(config, lambda count: rate)
    state = optimizer.init(params)
    for scale in (1.0, -2.0, 3.0):
        scaled = optax.tree.scale(scale, grads)
        updates, state = optimizer.update(scaled, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("config", [ADAM, SGD, ADAFACTOR], ids=lambda x: x["name"])
def test_multiplied_and_frozen_parameters_are_as_if_trained_on_their_own(config):
    text = "embedding/.*=0,head/bias=0,encoder/layer_0/.*=3"
    grads = jax.tree.map(jnp.sin, PARAMS)
    found, state = updated(config | {"lr_multipliers": text}, PARAMS, grads)

    # Without what is frozen, which is then in no norm; with another rate for what is multiplied.
    def rest(tree):
        return {"encoder": tree["encoder"], "head": {"kernel": tree["head"]["kernel"]}}

    plain, plain_state = (x for x in updated(config, rest(PARAMS), rest(grads)))
    assert sum(x.size for x in jax.tree.leaves(state)) == (
        sum(x.size for x in jax.tree.leaves(plain_state))
    )
    jax.tree.map(np.testing.assert_array_equal, found["embedding"], PARAMS["embedding"])
    np.testing.assert_array_equal(found["head"]["bias"], PARAMS["head"]["bias"])
    np.testing.assert_allclose(found["head"]["kernel"], plain["head"]["kernel"], rtol=1e-6)
    one_step = config | {"momentum": 0.0} if "momentum" in config else config

    def first(config, params, grads, rate):
        optimizer = create_optimizer(config, lambda count: rate)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    with_text = first(one_step | {"lr_multipliers": text}, PARAMS, grads, 0.1)
    tripled = first(one_step, rest(PARAMS), rest(grads), 0.3)
    for name in ("kernel", "bias"):  # Weight decay is tripled with the rest of the step.
        np.testing.assert_allclose(
            with_text["encoder"]["layer_0"][name], tripled["encoder"]["layer_0"][name], rtol=1e-6
        )


def test_a_frozen_parameter_has_no_backward_pass():
    def loss(params, text):
        params = freeze(params, text) if text else params
        x = jnp.tanh(jnp.ones((1, 2)) @ params["embedding"]["kernel"])
        return jnp.sum(x @ params["head"]["kernel"])

    def products(text):
        return str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(PARAMS, text)).count("dot_gen")

    assert (products(""), products("embedding/.*=0")) == (5, 3)


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_a_training_step_leaves_what_is_frozen_and_its_norm(accumulate_steps):
    params = {"frozen": jnp.array([1.0, -1.0]), "trained": jnp.array([2.0, 3.0])}
    text, config = "frozen=0", SGD | {"clip_norm": 0.0, "lr_multipliers": "frozen=0"}
    optimizer = create_optimizer(config, lambda count: 0.1)

    def objective(params, batch, *, train, rng):
        del train, rng
        return {"loss": batch["image"] @ (params["frozen"] * 7 + params["trained"])}

    batch = {"image": jnp.array([[1.0, 0.0], [0.0, 3.0]]), "label": jnp.zeros(2, jnp.int32)}
    state = create_state(params, optimizer, seed=0, average=True)
    after, metrics = steps.train_step(
        state, batch, objective=objective, optimizer=optimizer, ema_decay=0.5,
        accumulate_steps=accumulate_steps, lr_multipliers=text,
    )  # fmt: skip
    gradient = np.array([0.5, 1.5])  # The mean of the images.
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-6)
    np.testing.assert_array_equal(after.params["frozen"], params["frozen"])
    np.testing.assert_array_equal(after.ema_params["frozen"], params["frozen"])
    expected = np.array([2.0, 3.0]) * (1 - 0.1 * 0.1) - 0.1 * gradient
    np.testing.assert_allclose(after.params["trained"], expected, rtol=1e-6)


NOISE = np.random.default_rng(0)
NETWORK = {
    name: {
        "kernel": jnp.float32(NOISE.normal(size=(inputs, outputs))),
        "bias": jnp.float32(NOISE.normal(size=outputs)),
    }
    for name, inputs, outputs in (("first", 3, 4), ("second", 4, 2))
}
FROZEN = "first/kernel=0,second/bias=0"
BATCHES = [
    {"image": np.float32(NOISE.normal(size=(6, 3))), "label": np.float32(NOISE.normal(size=(6, 2)))}
    for _ in range(5)
]


def squared_error(params, batch, *, train, rng):
    del train, rng
    first, second = params["first"], params["second"]
    x = jnp.tanh(batch["image"] @ first["kernel"] + first["bias"])
    error = x @ second["kernel"] + second["bias"] - batch["label"]
    return {"loss": jnp.square(error).mean(-1)}


def trained(config):
    """The network after a step of each batch, parts of it frozen."""
    optimizer = create_optimizer(config | {"lr_multipliers": FROZEN}, lambda count: 0.1)
    state = create_state(NETWORK, optimizer, seed=0, average=False)
    step = functools.partial(
        steps.train_step, objective=squared_error, optimizer=optimizer, lr_multipliers=FROZEN
    )
    step = jax.jit(step)
    for batch in BATCHES:
        state, _ = step(state, batch)
    return flatten_dict(state.params, sep="/")


@pytest.mark.versions
def test_steps_with_frozen_parameters_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    params = {
        name: torch.tensor(np.asarray(x)) for name, x in flatten_dict(NETWORK, sep="/").items()
    }
    free = [x.requires_grad_() for name, x in params.items() if f"{name}=0" not in FROZEN]
    optimizer = torch.optim.SGD(params.values(), lr=0.1, momentum=0.9)
    for batch in BATCHES:
        images, targets = (torch.tensor(batch[key]) for key in ("image", "label"))
        x = torch.tanh(images @ params["first/kernel"] + params["first/bias"])
        error = x @ params["second/kernel"] + params["second/bias"] - targets
        optimizer.zero_grad()
        error.square().mean().backward()
        torch.nn.utils.clip_grad_norm_(free, 0.5)
        optimizer.step()
    found = trained(SGD | {"weight_decay": 0.0})
    for name, expected in params.items():
        np.testing.assert_allclose(found[name], expected.detach(), rtol=1e-4, atol=1e-6)


def test_steps_with_frozen_parameters_are_those_of_set_to_zero():
    kinds = {
        "first": {"kernel": "frozen", "bias": "free"},
        "second": {"kernel": "free", "bias": "frozen"},
    }
    adam = optax.adamw(
        0.1, weight_decay=0.3, mask=lambda params: jax.tree.map(lambda x: x.ndim == 2, params)
    )
    free = optax.chain(optax.clip_by_global_norm(0.5), adam)
    optimizer = optax.multi_transform({"free": free, "frozen": optax.set_to_zero()}, kinds)

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(
            lambda params: squared_error(params, batch, train=True, rng=None)["loss"].mean()
        )(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = NETWORK, optimizer.init(NETWORK)
    for batch in BATCHES:
        params, state = step(params, state, batch)
    found, expected = trained(ADAM), flatten_dict(params, sep="/")
    for name, before in flatten_dict(NETWORK, sep="/").items():
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
        assert np.array_equal(found[name], before) == (f"{name}=0" in FROZEN)


@pytest.mark.parametrize("recipe", ["pretrain", "masked", "finetune"])
def test_a_mistyped_pattern_is_told_before_anything_is_opened(tiny_config, tmp_path, recipe):
    config = tiny_config(**{"dataset.name": "no_such_data_set"})
    config.optimizer.lr_multipliers = "heads/.*=0"
    if recipe == "masked":
        config.update({"objective": "masked_patches", "model": {"representation_size": 0}})
    if recipe == "finetune":
        config.init_from = "https://no-such-host.example/weights.npz"
        config.model.classifier = config_dict.placeholder(str)
        config.model.position_embedding = config_dict.placeholder(str)
    with pytest.raises(UserError, match="lr_multipliers has 'heads/.*', but no parameter has such"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("pattern", ["MAPHead_0/.*", ".*/pos_embedding", ".*/rel_embedding"])
def test_a_pattern_of_what_weights_may_have_is_left_to_them(tiny_config, pattern):
    config = tiny_config(**{"optimizer.lr_multipliers": f"{pattern}=0"})
    config.model.update({"classifier": "gap", "position_embedding": "none"})
    with pytest.raises(UserError, match="but no parameter has such a name"):
        check_multipliers(config)
    for key in ("classifier", "position_embedding"):
        config.model[key] = config_dict.placeholder(str)
    check_multipliers(config)


def test_what_weights_may_have_is_known_where_they_cannot_have_all_of_it(tiny_config):
    config = tiny_config(**{"optimizer.lr_multipliers": ".*/LayerScale_0/scale=0"})
    config.model.classifier = "gap"  # Without a place for registers and a distillation token.
    for key, kind in (("layer_scale", float), ("num_registers", int), ("distillation_token", bool)):
        config.model[key] = config_dict.placeholder(kind)
    check_multipliers(config)


@pytest.mark.slow
def test_a_run_with_frozen_parameters_resumes_bit_for_bit(tiny_config, tmp_path):
    config = tiny_config(
        **{
            "schedule.decay": "rsqrt",
            "schedule.cooldown": "2 steps",
            "schedule.end_lr": 0.0,
            "model.classifier": "map",
        }
    )
    config.optimizer = ADAFACTOR | {"lr_multipliers": "embedding/.*=0,head/.*=10"}
    train.train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_until(config, tmp_path / "stopped", step=5)
    train.train(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", 6)
    before, after = (read_arrays(tmp_path / "whole", step) for step in (4, 6))
    changed = {name for name in before if (before[name] != after[name]).any()}
    kernel, probe = "['params']['embedding']['kernel']", "['params']['MAPHead_0']['probe']"
    assert kernel in before and kernel not in changed and probe in changed
    moments = [name for name in before if "opt_state" in name]
    assert any("['MAPHead_0']" in name for name in moments)
    assert not any("['embedding']" in name for name in moments)


def test_a_plan_counts_no_moments_of_what_is_frozen(tiny_config):
    config = tiny_config()
    frozen = tiny_config(**{"optimizer.lr_multipliers": "head/.*=0"})
    whole, part = (describe(x, num_classes=10, devices=1).memory() for x in (config, frozen))
    assert whole["parameters"] == part["parameters"]
    assert whole["optimizer"] - part["optimizer"] == 2 * 4 * (16 * 10 + 10)
