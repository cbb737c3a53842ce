"""A function of the metrics on logits that a test gives."""

import flax.linen as nn
import numpy as np

from vit_jax.evaluation.metrics import classification_metrics, make_apply_fn
from vit_jax.sharding import make_mesh


class Logits(nn.Module):
    """The images are the logits."""

    @nn.compact
    def __call__(self, images):
        return images


def scored(logits, labels, batch_size, function=classification_metrics, **options):
    """A function of `metrics` on given logits, in batches padded with what must not count."""

    def batches():
        for start in range(0, len(labels), batch_size):
            image, label = logits[start : start + batch_size], labels[start : start + batch_size]
            pad = batch_size - len(label)
            yield {
                "image": np.pad(image, ((0, pad), (0, 0)), constant_values=np.nan),
                "label": np.pad(label, ((0, pad),) + ((0, 0),) * (label.ndim - 1)),
                "mask": np.pad(np.ones(len(label), np.float32), (0, pad)),
            }

    mesh = make_mesh()
    return function(make_apply_fn(Logits(), mesh), {}, batches(), mesh, **options)
