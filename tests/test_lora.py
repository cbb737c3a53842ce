"""LoRA, against the form of the paper and PEFT in NumPy, and through a run."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import lora, steps, train
from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.config import check_config
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.multipliers import multipliers
from vit_jax.plan.estimate import describe
from vit_jax.program import check_multipliers, lr_multipliers
from vit_jax.recipes import get_config
from vit_jax.state import create_optimizer, create_state

from .runs import assert_same_run, read_arrays, train_until

BLOCK = "Transformer/encoderblock_0"
ATTENTION = f"{BLOCK}/MultiHeadDotProductAttention_1"
SGD = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "decay": "all",
       "mu_dtype": "float32", "clip_norm": 0.0}  # fmt: skip


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Width 6, two heads of 3; three inputs.
PARAMS = unflatten_dict(
    {
        f"{ATTENTION}/query/kernel": draw(6, 2, 3, seed=1),
        f"{ATTENTION}/out/kernel": draw(2, 3, 6, seed=2),
        f"{BLOCK}/MlpBlock_3/Dense_0/kernel": draw(6, 4, seed=3),
        "head/kernel": draw(4, 1, seed=4),
    },
    sep="/",
)
INPUTS = draw(3, 6, seed=5)
KERNELS = (f"{ATTENTION}/query", f"{ATTENTION}/out", f"{BLOCK}/MlpBlock_3/Dense_0")


def applied(params):
    """A loss of all four kernels, as the model's own parameters."""
    flat = flatten_dict(params, sep="/")
    x = jnp.tanh(jnp.einsum("nd,dhk->nhk", INPUTS, flat[f"{KERNELS[0]}/kernel"]))
    x = jnp.tanh(jnp.einsum("nhk,hkd->nd", x, flat[f"{KERNELS[1]}/kernel"]))
    return jnp.tanh(x @ flat[f"{KERNELS[2]}/kernel"]) @ flat["head/kernel"]


def applied_as_in_peft(flat, scale):
    """The same in NumPy with every kernel as in PEFT's Linear: x W + scale * (x A) B."""
    x = np.float64(INPUTS)
    for name in KERNELS:
        a, b = flat[f"lora/{name}/a"], flat[f"lora/{name}/b"]
        kernel = np.float64(flat[f"{name}/kernel"]).reshape(a.shape[0], b.shape[1])
        x = np.tanh(x @ kernel + scale * ((x @ a) @ b))
    return x @ np.float64(flat["head/kernel"])


def objective(params, batch, *, train, rng):
    del batch, train, rng
    return {"loss": applied(params)[:, 0]}


def adapted():
    params = lora.with_adapters(PARAMS, rank=2, targets="query,out,mlp", seed=0)
    flat = flatten_dict(params, sep="/")
    for seed, name in enumerate(KERNELS):  # With B at 0 A has no gradient.
        flat[f"lora/{name}/b"] = draw(*flat[f"lora/{name}/b"].shape, seed=10 + seed)
    return unflatten_dict(flat, sep="/")


def test_a_step_is_that_of_the_paper_and_leaves_the_kernels():
    params, alpha = adapted(), 6.0
    flat = {name: np.float64(x) for name, x in flatten_dict(params, sep="/").items()}
    expected = applied_as_in_peft(flat, alpha / 2)
    found = jax.jit(lambda params: applied(lora.merge(params, alpha)))(params)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    optimizer = create_optimizer(SGD | {"lr_multipliers": lora.FROZEN}, lambda count: 0.1)
    state = create_state(params, optimizer, seed=0, average=False)
    batch = {"image": INPUTS, "label": np.zeros(3, np.int32)}
    step = functools.partial(
        steps.train_step, objective=lora.merging(objective, alpha), optimizer=optimizer,
        lr_multipliers=lora.FROZEN,
    )  # fmt: skip
    after, _ = jax.jit(step)(state, batch)
    found = flatten_dict(after.params, sep="/")
    for name, value in flat.items():
        if "lora" not in name and "head" not in name:
            np.testing.assert_array_equal(found[name], value)
            continue
        gradient = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = value.copy()
                moved[index] += step
                ends.append(applied_as_in_peft(flat | {name: moved}, alpha / 2).mean())
            gradient[index] = (ends[0] - ends[1]) / 2e-5
        assert np.abs(gradient).max() > 1e-4, name
        np.testing.assert_allclose(found[name], value - 0.1 * gradient, atol=1e-6)


def test_at_first_nothing_is_changed_and_a_is_gaussian():
    params = lora.with_adapters(
        {"Transformer": {"encoderblock_0": {"query": {"kernel": draw(400, 2, 50)}}}},
        rank=4, targets="query", seed=3,
    )  # fmt: skip
    adapters = flatten_dict(params["lora"], sep="/")
    a, b = (np.asarray(adapters[f"{BLOCK}/query/{x}"]) for x in "ab")
    assert (a.shape, b.shape) == ((400, 4), (4, 100)) and not b.any()
    assert (a.mean(), a.std()) == pytest.approx((0, 1 / 4), abs=0.02)
    assert np.mean(np.abs(a) < 1 / 4) == pytest.approx(0.6827, abs=0.03)
    merged = lora.merge(params, 8.0)
    np.testing.assert_array_equal(
        merged["Transformer"]["encoderblock_0"]["query"]["kernel"], draw(400, 2, 50)
    )
    assert lora.merge(merged, 8.0) is merged


@pytest.mark.parametrize(
    ("targets", "adapted_per_layer"),
    [("query,value", 2 * (192 + 192)), ("query,key,value,out", 4 * (192 + 192)),
     ("mlp", 2 * (192 + 768))],
)  # fmt: skip
def test_only_adapters_and_head_are_trained_and_have_moments(targets, adapted_per_layer):
    config = get_config("ViT-Ti/16", "finetune,cifar10")
    config.update({"lora": {"rank": 4, "targets": targets}, "model": {"num_layers": 2}})
    config.optimizer = get_config("ViT-Ti/16").optimizer  # Adam, of two moments.
    described = describe(config, num_classes=10, devices=1)
    factors = flatten_dict(multipliers(described.state.params, lr_multipliers(config)), sep="/")
    trained = {name for name, factor in factors.items() if factor}
    assert {name for name in trained if not name.startswith("lora/")} == {
        "head/kernel", "head/bias"
    }  # fmt: skip
    numbers = 2 * 4 * adapted_per_layer + 192 * 10 + 10
    scalars = 8  # Counts of steps, in 32 bits.
    assert 0 <= described.memory()["optimizer"] - 2 * 4 * numbers <= 4 * scalars


def test_what_the_user_says_of_a_parameter_goes_before_what_lora_freezes(tiny_config):
    config = tiny_config(**{"lora.rank": 2, "lora.targets": "mlp"})
    config.optimizer.lr_multipliers = ".*LayerNorm_0/scale=0.5,"
    found = multipliers(describe(config, num_classes=10, devices=1).state.params,
                        lr_multipliers(config))  # fmt: skip
    flat = flatten_dict(found, sep="/")
    assert flat[f"{BLOCK}/LayerNorm_0/scale"] == 0.5 and flat[f"{BLOCK}/LayerNorm_0/bias"] == 0
    assert flat["pre_logits/kernel"] == flat[f"lora/{BLOCK}/MlpBlock_3/Dense_1/b"] == 1


def test_learning_rates_that_leave_lora_nothing_to_freeze_are_refused(tiny_config):
    config = tiny_config(**{"lora.rank": 2, "optimizer.lr_multipliers": "head/.*=1,.*=0.1"})
    message = "'head/.*=1,.*=0.1' gives every parameter a rate, so LoRA freezes nothing: name fewer"
    with pytest.raises(UserError, match=re.escape(message)):
        check_multipliers(config)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("ViT-B/16", {"init_from": ""}, "rank is 2, but there are no weights to adapt: give --con"),
        ("R50x1", {}, "'query,value', but the model has no such kernels in layers of a Transform"),
        ("ViT-B/16", {"objective": "masked_patches"}, "objective masked_patches pre-trains all"),
    ],
)
def test_where_lora_has_no_meaning_it_is_refused(model, changes, message):
    config = get_config(model, "finetune,cifar10")
    config.update({"init_from": "weights.npz", "lora": {"rank": 2}} | changes)
    if model == "R50x1":
        config.model.resnet_layers = (1,)
    with pytest.raises(UserError, match=re.escape(message)):
        check_config(config)
        check_multipliers(config)


def test_adapters_of_other_kernels_are_refused_before_they_are_multiplied():
    layer = {"kernel": np.zeros((4, 4))}
    huge = {"a": np.broadcast_to(0.0, (2**30, 1)), "b": np.broadcast_to(0.0, (1, 2**30))}
    params = {"Transformer": layer, "lora": {"Transformer": huge}}
    with pytest.raises(ValueError, match="of Transformer are not of its kernel"):
        lora.merge(params, 1.0)


def lora_config(tiny_config, finished, **overrides):
    fixed = {"init_from": str(finished), "lora.rank": 2, "lora.alpha": 6.0,
             "lora.targets": "query,key,value,out,mlp"}  # fmt: skip
    return tiny_config(**fixed, **overrides)


def test_a_run_adapts_and_its_weights_are_those_of_a_model(tiny_config, tmp_path, finished):
    config = lora_config(tiny_config, finished, duration="3 steps")
    train.train(config, tmp_path / "run")
    saved = read_arrays(tmp_path / "run", 3)
    base, run = load_pretrained(finished), load_pretrained(tmp_path / "run")
    before, after = (flatten_dict(x.params, sep="/") for x in (base, run))
    assert before.keys() == after.keys()
    for name, value in before.items():
        path = "".join(f"['{part}']" for part in name.split("/")[:-1])
        key = f"['ema_params']['lora']{path}"
        if name.endswith("/kernel") and f"{key}['a']" in saved:
            change = saved[f"{key}['a']"] @ saved[f"{key}['b']"] * 3
            assert np.abs(change).max() > 1e-5
            np.testing.assert_allclose(after[name], value + change.reshape(value.shape), atol=1e-6)
        elif not name.startswith(("head/", "pre_logits/")):
            np.testing.assert_allclose(after[name], value, rtol=1e-6)
            whole = "".join(f"['{part}']" for part in name.split("/"))
            np.testing.assert_array_equal(saved[f"['params']{whole}"], value)
    # What was evaluated is what is loaded.
    model = create_model(run.model)
    images = draw(2, 8, 8, 3)
    logits = np.asarray(jax.jit(model.apply)({"params": run.params}, images))
    scores = functools.partial(steps.classification(model, "softmax"), train=False)
    adapted = unflatten_dict(
        {tuple(re.findall(r"'([^']+)'", k))[1:]: x for k, x in saved.items() if "['ema_" in k}
    )
    labels = np.array([1, 2])
    found = jax.jit(lora.merging(scores, 6.0))(adapted, {"image": images, "label": labels})
    expected = scipy.special.logsumexp(logits, 1) - logits[np.arange(2), labels]
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)


@pytest.mark.slow
def test_a_run_with_adapters_resumes_bit_for_bit(tiny_config, tmp_path, finished):
    config = lora_config(tiny_config, finished)
    train.train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_until(config, tmp_path / "stopped", step=5)
    train.train(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", 6)
