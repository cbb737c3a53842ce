"""Fine-tuning on one's own images: Table 4, fitted to the images, the weights and the machine.

Table 4 is for accelerators, at 384 pixels and 512 images a step. What of it depends on how many
images there are is BiT-HyperRule's (Kolesnikov et al., 2020, arXiv 1912.11370, Section 3.3), whose
protocol the paper follows (Appendix B.1.1). On a CPU fewer and smaller images are seen, as in
docs/results.md, where that was measured. All else is Table 4's, but that the head is kept where it
knows the classes.
"""

import math
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vit_jax.image_size import ImageSize, sides
from vit_jax.models import ModelConfig
from vit_jax.recipes.paper import (
    FINETUNE_BATCH_SIZE,
    FINETUNE_IMAGE_SIZE,
    FINETUNE_LR,
    TABLE_4,
    finetune,
)
from vit_jax.recipes.presets import BIT_HYPERRULE, size_of

# On a CPU: 10 epochs of 32 images a step are 225 steps of 12 kinds of flower, of which 200 were
# measured in docs/results.md. The least makes up for few images, the most is hours of a small ViT.
CPU_BATCH_SIZE = 32
CPU_IMAGE_SIZE = 224
CPU_EPOCHS = 10
CPU_STEPS = (200, 2000)
CPU_WARMUP = 0.1
SMALLEST_BATCH = 8
EVALUATIONS = 5
# Of a device's memory: what activations may take; the rest is for the state and the compiler.
ACTIVATIONS = 0.6


class Facts(NamedTuple):
    """The circumstances that decide.

    Attributes:
        num_images: to train on.
        image_size: that the weights were made for.
        model: their description.
        on_cpu: whether there is no accelerator.
        devices: their number.
        memory: of each, in bytes; 0 if it is not known.
        has_bfloat16: whether an accelerator multiplies in bfloat16: every TPU, and GPUs from
            compute capability 8.0 on (CUDA C++ Programming Guide, "Compute Capabilities"). On
            others XLA does it in float32 (openxla/xla, issue 12429).
    """

    num_images: int
    image_size: ImageSize
    model: ModelConfig
    on_cpu: bool
    devices: int
    memory: int
    has_bfloat16: bool = True


class Choice(NamedTuple):
    """A value of a config, by its dotted key, and why."""

    key: str
    value: Any
    reason: str


def own(model: str, dataset: str) -> ConfigDict:
    """Table 4 for a data set that it does not have, with a head that is kept where it can be.

    This is where `choices` begins: on its own it asks for an accelerator.
    """
    config = finetune(model, dataset)
    config.keep_head = "auto"
    return config


def batch_size(facts: Facts) -> int:
    """Table 4's, on a CPU 32, or the power of two that is not above the number of images."""
    most = CPU_BATCH_SIZE if facts.on_cpu else FINETUNE_BATCH_SIZE
    few = 2 ** int(math.log2(max(facts.num_images, 1)))
    size = max(min(most, few), SMALLEST_BATCH)
    return math.ceil(size / facts.devices) * facts.devices


def choices(
    facts: Facts,
    batch: int,
    steps: int | None = None,
    image_size: ImageSize | None = None,
    dtype: str | None = None,
) -> list[Choice]:
    """The values of a config that depend on the circumstances.

    Args:
        facts: these.
        batch: images a step.
        steps: of the run, where the user has said how many.
        image_size: likewise.
        dtype: of the computation, likewise.
    """
    table = f"Table 4's {FINETUNE_BATCH_SIZE}" if not facts.on_cpu else "a CPU's"
    by_images = f"{table}, and not above {facts.num_images:,} images"
    made = [Choice("batch_size", batch, by_images)]
    if facts.on_cpu or not facts.has_bfloat16:
        why = "a CPU is slow in bfloat16" if facts.on_cpu else "this GPU has no bfloat16"
        made += [Choice("model.dtype", "float32", why)]
        dtype = dtype or "float32"
    size, why = _image_size(facts)
    made += [Choice("dataset.image_size", size, why)]
    made += _length(facts, batch, steps)
    rate, why = _rate(batch)
    made += [Choice("schedule.base_lr", rate, why)]
    parts = _parts(facts, batch, image_size or size, dtype)
    if parts > 1:
        why = f"{batch // parts} images at a time fit in {facts.memory / 2**30:.0f} GiB"
        made += [Choice("accumulate_steps", parts, why)]
    return made


def _image_size(facts: Facts) -> tuple[ImageSize, str]:
    own_size, step = facts.image_size, facts.model.downsampling
    if not isinstance(own_size, int):  # Where it is no square somebody chose it.
        return own_size, "the weights' own"
    if facts.on_cpu and own_size > CPU_IMAGE_SIZE:
        return CPU_IMAGE_SIZE // step * step, f"less than the weights' {own_size}: for a CPU"
    if facts.on_cpu or own_size < CPU_IMAGE_SIZE or own_size >= FINETUNE_IMAGE_SIZE:
        return own_size, "the weights' own"
    return FINETUNE_IMAGE_SIZE // step * step, "Table 4"


def _length(facts: Facts, batch: int, steps: int | None) -> list[Choice]:
    if facts.on_cpu:
        least, most = CPU_STEPS
        wanted = math.ceil(CPU_EPOCHS * facts.num_images / batch)
        chosen = min(max(wanted, least), most)
        why = f"{CPU_EPOCHS} epochs, from {least} to {most} steps"
    else:
        chosen = BIT_HYPERRULE[size_of(facts.num_images)].steps
        why = f"BiT-HyperRule of {facts.num_images:,} images"
    made = [Choice("duration", f"{chosen} steps", why)] if steps is None else []
    steps = steps or chosen
    warmup, why = round(CPU_WARMUP * steps), "a tenth"
    if not facts.on_cpu and steps == chosen:
        rule = BIT_HYPERRULE[size_of(facts.num_images)]
        warmup, why = rule.warmup_steps, "BiT-HyperRule"
    often = f"{math.ceil(steps / EVALUATIONS)} steps"
    return [
        *made,
        Choice("schedule.warmup", f"{warmup} steps", why),
        Choice("evals.val.every", often, f"{EVALUATIONS} times"),
        Choice("checkpoint_every", often, "with each evaluation"),
        Choice("log_every", "10 steps" if facts.on_cpu else "50 steps", "to be seen at work"),
    ]


def _rate(batch: int) -> tuple[float, str]:
    """The rate of Table 4 that is nearest to the published one times the root of the batch."""
    wanted = FINETUNE_LR * math.sqrt(batch / FINETUNE_BATCH_SIZE)
    rates = TABLE_4["oxford_flowers102"].base_lrs
    nearest = min(rates, key=lambda rate: abs(math.log(rate / wanted)))
    return nearest, f"of Table 4, for {batch} images a step"


def _parts(facts: Facts, batch: int, image_size: ImageSize, dtype: str | None) -> int:
    """The parts of a batch whose activations fit in memory, a power of two.

    Korthikanti et al. (2022, arXiv 2205.05198), Equation 2: a layer keeps s h (34 + 5 a s / h)
    bytes of an image in 16 bits, of s tokens, width h and a heads. Of a ResNet it is not known.
    """
    fields = vars(facts.model)
    if not facts.memory or not {"num_layers", "hidden_size", "num_heads"} <= fields.keys():
        return 1
    tokens = math.prod(x // facts.model.downsampling for x in sides(image_size)) + 1
    width, heads = fields["hidden_size"], fields["num_heads"]
    layer = tokens * (34 * width + 5 * heads * tokens) * (2 if dtype == "float32" else 1)
    fitting = ACTIVATIONS * facts.memory / (layer * fields["num_layers"])
    parts = 1
    while batch % (2 * parts * facts.devices) == 0 and batch / (parts * facts.devices) > fitting:
        parts *= 2
    return parts
