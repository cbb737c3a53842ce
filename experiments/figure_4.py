"""Figure 4: pre-training on parts of a data set, compared by ImageNet 5-shot accuracy.

vit-jax train --config experiments/figure_4.py:ViT-B/32,imagenet21k,10%

The paper takes 9M, 30M, 90M and all 303M images of JFT (3%, 10%, 30%, 100%) for ViT-L/16, L/32,
B/32 and b/32, ResNets R50x1 and R152x2, with the same hyperparameters for every size and early
stopping on the best validation accuracy.
"""

import re

from ml_collections import ConfigDict

from vit_jax import recipes
from vit_jax.data.subset import parse_subset
from vit_jax.errors import UserError, brief

# Not in the paper: the paper gives no patience. These 5 evaluations are a tenth of a full run's 50.
PATIENCE = 5
EVALUATIONS = 50


def get_config(spec: str = "ViT-B/32,imagenet21k,10%") -> ConfigDict:
    """Table 3's row on a part of the data set, for as many steps as on all of it.

    Args:
        spec: "MODEL,DATASET,PERCENT%". The best validation accuracy is that on the part of the
            training images that is held out ("dev"); the percentage is of the others.

    Raises:
        UserError: the spec is of another form.
    """
    model, _, rest = spec.partition(",")
    dataset, _, subset = rest.rpartition(",")
    if not dataset or not subset.endswith("%"):
        raise UserError(f"spec {brief(spec)} is not of the form ViT-B/32,imagenet21k,10%")
    config = recipes.get_config(model, f"pretrain,{dataset},dev")
    share = float(parse_subset(subset))
    # An epoch of the subset is shorter: the hyperparameters, and so the steps, stay the same.
    config.duration = _epochs(config.duration, 1 / share)
    config.schedule.warmup = _epochs(config.schedule.warmup, 1 / share)
    config.evals.val.every = _epochs(config.duration, 1 / EVALUATIONS)
    config.checkpoint_every = config.evals.val.every
    config.dataset.subset = subset
    config.patience = PATIENCE
    config.evals.fewshot.dataset = "imagenet2012"
    config.evals.fewshot.shots = "5"
    config.evals.fewshot.every = config.evals.val.every
    return config


def _epochs(duration: str, factor: float) -> str:
    return re.sub(r"[\d.]+(?= epochs)", lambda number: f"{float(number[0]) * factor:.6f}", duration)
