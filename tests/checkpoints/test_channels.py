"""Weights for images of one, four and other numbers of channels, against timm and Transformers."""

import numpy as np
import pytest

from vit_jax.checkpoints import foreign_configs, timm_config
from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.checkpoints.save import save_pretrained
from vit_jax.checkpoints.transfer import input_kernel

from .torch_models import (
    assert_close,
    assert_same_tensors,
    logits_of_torch,
    randomize,
    safetensors_torch,
    timm,
    tiny_timm,
    torch,
    transformer,
    transformers,
)


def images(channels):
    return np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, channels)).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 7])
def test_the_kernel_on_other_channels_is_timms(channels):
    kernel = np.random.default_rng(0).normal(size=(4, 4, 3, 6)).astype(np.float32)
    theirs = timm.models.adapt_input_conv(channels, torch.from_numpy(kernel.transpose(3, 2, 0, 1)))
    ours = input_kernel(kernel, channels).transpose(3, 2, 0, 1)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 4])
def test_timms_models_of_other_channels_agree_both_ways(tmp_path, channels, apply):
    module, x = tiny_timm(in_chans=channels), images(channels)
    safetensors_torch.save_file(module.state_dict(), tmp_path / "theirs.safetensors")
    ours = load_pretrained(tmp_path / "theirs.safetensors", num_heads=2)
    assert ours.preprocessing.channels == channels
    assert_close(apply(ours, x), logits_of_torch(module, x))
    save_pretrained(ours, tmp_path / "folder", "timm")
    again = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    assert_same_tensors(again.state_dict(), module.state_dict())
    assert again.pretrained_cfg["input_size"] == (channels, 32, 32)
    (tmp_path / "folder" / "vit_jax.json").unlink()
    assert load_pretrained(tmp_path / "folder").preprocessing == ours.preprocessing


@pytest.mark.parametrize("channels", [1, 4])
def test_transformers_models_of_other_channels_agree_both_ways(tmp_path, channels, apply):
    config = transformer(32, num_channels=channels, num_labels=5)
    module, x = randomize(transformers.ViTForImageClassification(config)), images(channels)
    module.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    assert ours.preprocessing.channels == channels
    assert_close(apply(ours, x), logits_of_torch(module, x))
    save_pretrained(ours, tmp_path / "ours", "huggingface")
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "ours")
    assert_same_tensors(again.state_dict(), module.state_dict())


@pytest.mark.parametrize(
    "format, sizes",
    [
        ("torchvision", {}),
        ("timm", {"layer_scale": 1.0}),
        ("timm", {"distillation_token": True}),
        ("huggingface", {"distillation_token": True}),
    ],
)
def test_statistics_of_rgb_are_not_those_of_other_channels(format, sizes):
    told = {"architecture": "vit", "classifier": "token", **sizes}
    views = [
        foreign_configs.read_folder(None, format, {**told, "channels": n}, 224).preprocessing
        for n in (3, 4)
    ]
    assert views[0].mean == timm_config.IMAGENET_STATISTICS["mean"]
    assert views[1].with_channels(4).mean == views[1].with_channels(4).std == (0.5,) * 4


@pytest.fixture
def apply():
    """Logits by one compiled call."""
    import jax

    from vit_jax.models import create_model

    def logits(pretrained, x):
        model = create_model(pretrained.model)
        return np.asarray(jax.jit(model.apply)({"params": pretrained.params}, x))

    return logits
