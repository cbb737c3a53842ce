"""What a size and a family of models need: a row, and a file with a line in the registry."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from vit_jax import models
from vit_jax.analysis import flops
from vit_jax.checkpoints.infer import infer_model
from vit_jax.checkpoints.pretrained import Pretrained, load_pretrained
from vit_jax.checkpoints.save import save_pretrained
from vit_jax.checkpoints.transfer import transfer
from vit_jax.config import check_config
from vit_jax.data.protocols import evaluation
from vit_jax.errors import UserError
from vit_jax.models import create_model, model_config, vit
from vit_jax.models.base import Model, ModelConfig, at_least, linear_head, option, width_of
from vit_jax.recipes import get_config, pretraining_row
from vit_jax.state import init_train_state
from vit_jax.steps import classification, train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class PooledConfig(ModelConfig):
    """The mean over the image's patches of a ReLU of what one linear map makes of each."""

    noun = "pooled model"
    names = "Pooled-WIDTH/PATCH"
    landmark = "patches/kernel"

    patch_size: int = option(check=at_least(1))
    width: int = option(check=at_least(1))
    slope: float = 0.0

    @property
    def downsampling(self):
        return self.patch_size

    def build(self):
        return Pooled(self)

    @classmethod
    def parse(cls, name):
        match = re.fullmatch(r"Pooled-(\d+)/(\d+)", name)
        return match and {"width": int(match[1]), "patch_size": int(match[2])}

    def multiply_adds(self, image_size, channels=3):
        return image_size**2 * channels * self.width + self.width * self.num_classes

    @classmethod
    def infer(cls, arrays):
        kernel = arrays[cls.landmark].shape
        return {
            "patch_size": kernel[0],
            "width": kernel[3],
            "num_classes": width_of(arrays, "head/bias"),
        }


class Pooled(Model):
    config: PooledConfig

    @nn.compact
    def __call__(self, images, *, train=False):  # noqa: ARG002
        side = (self.config.patch_size,) * 2
        x = nn.Conv(self.config.width, side, side, "VALID", name="patches")(images)
        x = nn.leaky_relu(x, self.config.slope).mean(axis=(1, 2))
        return linear_head(x, self.config)


@pytest.fixture(autouse=True)
def pooled(monkeypatch):
    monkeypatch.setitem(models.ARCHITECTURES, "pooled", PooledConfig)


def test_a_name_is_all_that_a_recipe_needs():
    assert model_config("Pooled-8/4") == {"architecture": "pooled", "width": 8, "patch_size": 4}
    config = get_config("Pooled-8/4", "pretrain,digits")
    check_config(config)
    assert config.model.to_dict() == {
        "architecture": "pooled",
        "patch_size": 4,
        "width": 8,
        "slope": 0.0,
        "num_classes": 0,
        "head_bias_init": 0.0,
        "remat": "nothing",
        "dtype": "bfloat16",
    }
    tuned = get_config("Pooled-8/5", "finetune,cifar10")
    assert tuned.dataset.image_size == 380  # Of 384 the largest multiple of the patches.
    with pytest.raises(UserError, match="AxialResNet50, or Pooled-WIDTH/PATCH"):
        model_config("Pooled-8")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("width", 0, "config.model.width is 0: it must be at least 1"),
        ("width", "8", "config.model.width is '8': it must be of type int"),
        ("slopes", 0.1, "config.model.slopes is not a key that anything reads: did you mean"),
        ("dtype", "float8", "model.dtype 'float8' is unknown: use float32 or bfloat16"),
    ],
)
def test_its_description_is_what_a_config_is_checked_by(key, value, message):
    config = get_config("Pooled-8/4", "pretrain,digits")
    with config.unlocked(), config.model.ignore_type():
        config.model[key] = value
    with pytest.raises(UserError, match=re.escape(message)):
        check_config(config)


def test_its_multiply_adds_are_those_that_xla_counts():
    config = model_config("Pooled-64/8")
    model = create_model(config, num_classes=10)
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    cost = jax.jit(model.apply).lower(variables, images).cost_analysis()
    counted = 2 * 2 * flops.multiply_adds(config, 64, 10)
    assert counted == pytest.approx(cost["flops"], rel=0.03)


def random_params(model):
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def test_its_weights_are_written_and_read_and_go_into_another_head(tmp_path):
    model = model_config("Pooled-8/4") | {"num_classes": 3}
    params = random_params(create_model(model))
    known = {key: x for key, x in model.items() if key != "architecture"}
    assert infer_model(flatten_dict(params, sep="/")) == {"architecture": "pooled", **known}
    saved = Pretrained(
        params, {**model, "slope": 0.25}, evaluation("inception", 16), None, "softmax", "memory"
    )
    save_pretrained(saved, tmp_path / "a.npz", "official")
    loaded = load_pretrained(tmp_path / "a.npz")
    assert loaded.model == saved.model
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    (tmp_path / "a.npz.json").unlink()  # Now the arrays alone tell.
    assert load_pretrained(tmp_path / "a.npz").model == {**model, "slope": 0.0}
    with pytest.raises(UserError, match="the timm format is not written for pooled models"):
        save_pretrained(saved, tmp_path / "b", "timm")

    fresh = random_params(create_model(model, num_classes=5))
    found, report = transfer(fresh, params)
    np.testing.assert_array_equal(found["patches"]["kernel"], params["patches"]["kernel"])
    np.testing.assert_array_equal(found["head"]["kernel"], fresh["head"]["kernel"])
    assert {row.name for row in report if row.action == "dropped"} == {"head/kernel", "head/bias"}


def test_a_step_trains_it():
    model, optimizer = create_model(model_config("Pooled-8/4"), num_classes=3), optax.sgd(0.1)
    state = init_train_state(model, optimizer, seed=0, image_size=16, average=False)
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
    batch = {"image": images, "label": np.array([0, 1, 2, 0])}
    objective = classification(model, "softmax")
    step = jax.jit(lambda state: train_step(state, batch, objective=objective, optimizer=optimizer))
    losses = []
    for _ in range(3):
        state, metrics = step(state)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(3), rel=1e-5)
    assert losses[2] < losses[1] < losses[0]


def test_a_size_is_a_row(monkeypatch):
    # Of "Scaling Vision Transformers" (Zhai et al., 2022, arXiv 2106.04560), Table 2.
    giant = {"hidden_size": 1408, "num_layers": 40, "mlp_dim": 6144, "num_heads": 16}
    monkeypatch.setitem(vit.SIZES, "g", giant)
    config = get_config("ViT-g/14", "pretrain,imagenet2012")
    check_config(config)
    assert giant.items() <= config.model.to_dict().items()
    model = create_model(config.model, num_classes=1000, representation_size=0)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    millions = sum(x.size for x in jax.tree.leaves(params)) / 1e6
    assert millions == pytest.approx(1011 + 1.4, abs=2)  # There without a head of 1,000 classes.
    assert get_config("Axial-ViT-g/14").model.mlp_dim == 6144


def test_a_size_that_the_paper_lacks_takes_the_row_of_the_largest(monkeypatch):
    monkeypatch.setitem(vit.SIZES, "g", vit.SIZES["H"])
    check_config(get_config("ViT-g/14", "pretrain,imagenet21k"))
    for dataset, model in {"imagenet21k": "ViT-L/16", "jft": "ViT-H/14"}.items():
        assert pretraining_row("ViT-g/14", dataset) == pretraining_row(model, dataset)
