import functools

import jax
import numpy as np
import pytest

from vit_jax.evaluate import evaluate
from vit_jax.models import create_model
from vit_jax.sharding import make_mesh
from vit_jax.steps import eval_step


@pytest.mark.parametrize("batch_size", [1, 4, 5, 16])
def test_every_image_counts_once_whatever_the_batch_size(batch_size):
    model = create_model(
        {"architecture": "vit", "patch_size": 4, "hidden_size": 8, "num_layers": 1, "mlp_dim": 8,
         "num_heads": 2, "num_classes": 3}
    )  # fmt: skip
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (11, 4, 4, 3)).astype(np.float32)
    labels = rng.integers(0, 3, 11).astype(np.int32)
    params = model.init(jax.random.key(0), images)["params"]
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), (8, 3))

    def batches():
        for start in range(0, 11, batch_size):
            image, label = images[start : start + batch_size], labels[start : start + batch_size]
            pad = batch_size - len(label)
            yield {
                "image": np.pad(image, ((0, pad), (0, 0), (0, 0), (0, 0))),
                "label": np.pad(label, (0, pad)),
                "mask": np.pad(np.ones(len(label), np.float32), (0, pad)),
            }

    step = jax.jit(functools.partial(eval_step, model=model, loss="softmax"))
    result = evaluate(step, params, batches(), make_mesh())
    logits = np.asarray(model.apply({"params": params}, images), np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert result["examples"] == 11
    assert result["accuracy"] == np.mean(logits.argmax(-1) == labels)
    assert result["loss"] == pytest.approx(-np.log(p[np.arange(11), labels]).mean(), rel=1e-5)
