"""Models of timm and Transformers, every tensor random, and what is compared with them."""

import numpy as np
import pytest
from PIL import Image

from vit_jax import models
from vit_jax.data.images import preprocess

PEERS = "needs the peers extra: pip install -e '.[peers]'"
torch = pytest.importorskip("torch", reason=PEERS, exc_type=ImportError)
timm = pytest.importorskip("timm", reason=PEERS, exc_type=ImportError)
safetensors_torch = pytest.importorskip("safetensors.torch", reason=PEERS, exc_type=ImportError)
transformers = pytest.importorskip("transformers", reason=PEERS, exc_type=ImportError)


TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}


def randomize(module, seed=0):
    """Every tensor random, so that a swapped pair cannot hide, and of a usual scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in module.state_dict().items():
            noise = torch.randn(x.shape, generator=generator)
            if x.ndim == 1:
                x.copy_(0.2 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                x.copy_(noise / max(x[0].numel(), 1) ** 0.5)
    return module.eval()


def images(size, count=2):
    """Noise of a side, or of a height and a width."""
    shape = (count, *np.broadcast_to(size, 2), 3)
    return np.random.default_rng(size).uniform(-1, 1, shape).astype(np.float32)


def logits_of_torch(module, x):
    with torch.no_grad():
        output = module(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    return getattr(output, "logits", output).numpy()


def logits_of(pretrained, x):
    return np.asarray(models.create_model(pretrained.model).apply({"params": pretrained.params}, x))


def assert_close(actual, expected):
    assert np.std(expected) > 1e-2
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(actual[name].numpy(), x.numpy(), err_msg=name)


def transformer(size, **options):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 32, "patch_size": 8, "image_size": size, **options}
    return transformers.ViTConfig(**sizes)


def save_state(path, state):
    if path.suffix == ".safetensors":
        safetensors_torch.save_file(state, path)
    else:
        torch.save(state, path)


def tiny_timm(**options):
    return randomize(timm.create_model("vit_tiny_patch16_224", img_size=32, **TINY | options))


def photograph(height, width):
    """Noise over patches of color: any pixel out of place shows."""
    rng = np.random.default_rng(height * width)
    patches = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8)).resize((width, height))
    noise = rng.integers(-60, 61, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(patches) + noise, 0, 255).astype(np.uint8))


# Resized to 256 or 248, the longer sides of some leave an odd number of pixels to crop.
PHOTOGRAPHS = [(375, 500), (500, 333), (224, 224), (248, 251), (100, 1000), (301, 303), (256, 259)]


def assert_same_view(preprocessing, shape, theirs):
    """Against [3, height, width] of a peer; that evaluate sees the same, tests/data tells."""
    picture = photograph(*shape)
    ours = preprocess(np.asarray(picture), preprocessing)
    np.testing.assert_allclose(ours, theirs(picture).transpose(1, 2, 0), atol=1e-5)
