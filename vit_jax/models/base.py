"""The parts of every model: a description, the module that is built from it, and a linear head.

A family of models is a file with both, and a line in `models.ARCHITECTURES`.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError, brief
from vit_jax.image_size import ImageSize
from vit_jax.models.rematerialization import POLICIES

Array = jax.Array
# Of a model, by its parameters' official names, joined by "/".
Arrays = Mapping[str, np.ndarray]

DTYPES = ("float32", "bfloat16")
# Where weights do not tell, as those of a ResNet: the paper, BiT and big_vision pre-trained at it.
USUAL_IMAGE_SIZE = 224

Check = Callable[[Any], str | None]


def option(
    default: Any = dataclasses.MISSING,
    *,
    choices: tuple[str, ...] = (),
    check: Check | None = None,
    training_only: bool = False,
) -> Any:
    """A field of a description that says more than its type and default.

    Args:
        default: its value where nothing is said of it; without one it must be given.
        choices: the values that it may have.
        check: says what is wrong with a value in a config, None if nothing.
        training_only: whether predictions do not depend on it.
    """
    metadata = {"choices": choices, "check": check, "training_only": training_only}
    return dataclasses.field(default=default, metadata=metadata)


def without_list(value: Any) -> Any:
    """A value of a config that compares: a tuple is a list in JSON."""
    return tuple(value) if isinstance(value, list) else value


def type_problem(value: Any, kind: type | UnionType) -> str | None:
    """Says whether a value is of another type than `kind`, or a number that is not finite."""
    alike = {float: (int, float), tuple: (tuple, list)}  # JSON has no tuples.
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, alike.get(kind, kind)):
        return f"is {brief(value)}: it must be of type {getattr(kind, '__name__', kind)}"
    if kind is float and not abs(value) <= sys.float_info.max:
        return f"is {brief(value)}: it must be a finite number"
    return None


# No axis of a model is longer: 48 times the classes of ImageNet-21k, 170 times ViT-22B's width.
LONGEST = 2**20


def at_least(least: int, most: int = LONGEST) -> Check:
    """Checks numbers that are counted: 1 and more, or 0 and more, up to what a model can have."""
    rule = f"be at least {least}" if least else "not be negative"

    def check(x: int) -> str | None:
        if x > most:
            return f"is {brief(x)}: it must be at most {most}, more has no model"
        return f"is {brief(x)}: it must {rule}" if x < least else None

    return check


def fraction(x: float) -> str | None:
    """Checks a rate from 0 to below 1."""
    return None if 0 <= x < 1 else f"is {brief(x)}: it must be from 0 to below 1"


def epsilon(x: float) -> str | None:
    """Checks what a normalization adds to a variance: with 1 and more it normalizes nothing."""
    return None if 0 < x < 1 else f"is {brief(x)}: it must be above 0 and below 1"


def logit(x: float) -> str | None:
    """Checks a bias of logits: the exponential of a larger one is 0 or infinite in float32."""
    return None if abs(x) <= 80 else f"is {brief(x)}: it must be from -80 to 80"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Describes a model; a subclass beside each module states all that is known of its family.

    The fields of a subclass are the keys of a config's `model` section. What the class says of its
    family, beside what the methods here do:

    - noun: what a model of the family is called in messages.
    - names: the forms of the names that `parse` reads, for the message that lists them.
    - landmark: the name of a parameter that tells a file of official names.
    - root: what the names of all its parameters begin with.
    - head: the name of the classifier, which has a kernel and a bias.
    - formats: those of `checkpoints.layouts` that have a place for its parameters.
    - embeds_pixels: whether `embedding` is a linear map of the image.
    - has_patch_embeddings: whether masked patch prediction can corrupt it.
    - resizers: by the last part of a parameter's name, how it is fitted to another image size.

    Attributes:
        num_classes: width of the head; 0 leaves the head out, and features are returned.
        head_bias_init: start value of the head's bias; -10 goes with the sigmoid loss.
        remat: what the backward pass computes again to save memory, one of
            `rematerialization.POLICIES`.
        dtype: of the computation, one of `DTYPES`; parameters and logits are always float32.
    """

    noun: ClassVar[str]
    names: ClassVar[str]
    landmark: ClassVar[str]
    root: ClassVar[str] = ""
    head: ClassVar[str] = "head"
    formats: ClassVar[tuple[str, ...]] = ("official",)
    embeds_pixels: ClassVar[bool] = False
    has_patch_embeddings: ClassVar[bool] = False
    resizers: ClassVar[Mapping[str, "Resizer"]] = {}

    num_classes: int = option(check=at_least(0))
    head_bias_init: float = option(0.0, check=logit, training_only=True)
    remat: str = option("nothing", choices=POLICIES, training_only=True)
    dtype: str = option("float32", choices=DTYPES, training_only=True)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata.get("choices")
            if choices and value not in choices:
                some = (" or " if len(choices) == 2 else ", ").join(choices)
                raise UserError(f"model.{field.name} {value!r} is unknown: use {some}")
        self.validate()

    def validate(self) -> None:
        """Checks what one field alone does not tell.

        Raises:
            UserError: the fields do not go together.
        """

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The dtype of the computation."""
        return jnp.dtype(self.dtype)

    @property
    def downsampling(self) -> int:
        """Side in pixels of the square of the image that becomes one position of the features."""
        raise NotImplementedError

    def build(self) -> "Model":
        """The module."""
        raise NotImplementedError

    def multiply_adds(self, image_size: ImageSize) -> int:
        """Multiply-adds of an image's forward pass, see `analysis.flops.multiply_adds`."""
        raise NotImplementedError

    def image_size(self, arrays: Arrays) -> ImageSize:
        """The size of the images that weights of this model are for, 0 where they do not tell."""
        del arrays
        return USUAL_IMAGE_SIZE

    @classmethod
    def parse(cls, name: str) -> dict[str, Any] | None:
        """The fields of the model of that name, None if it is not one of this family's.

        Raises:
            UserError: it is of this family's form, but there is no such model.
        """
        raise NotImplementedError

    @classmethod
    def recognizes(cls, arrays: Arrays) -> bool:
        """Tells whether these are the parameters of a model of this family."""
        return cls.landmark in arrays

    @classmethod
    def infer(cls, arrays: Arrays) -> dict[str, Any]:
        """The fields that the parameters of a model of this family tell.

        Raises:
            UserError: a parameter without which nothing can be told is missing or misshapen.
        """
        raise NotImplementedError

    @classmethod
    def prediction_defaults(cls) -> dict[str, Any]:
        """The default of every field that predictions depend on and that has one."""
        return {
            field.name: field.default
            for field in dataclasses.fields(cls)
            if not field.metadata.get("training_only") and field.default is not dataclasses.MISSING
        }


class Model(nn.Module):
    """An image to the logits of its classes.

    Attributes:
        config: the description; a module is frozen, so that a subclass may say which it is.
    """

    config: ModelConfig

    @property
    def downsampling(self) -> int:
        """See `ModelConfig.downsampling`."""
        return self.config.downsampling

    def without_head(self) -> Self:
        """The same model with features in place of logits."""
        return self.clone(config=dataclasses.replace(self.config, num_classes=0))


def linear_head(x: Array, config: ModelConfig, name: str = "head") -> Array:
    """The logits of features x [batch, features], to be called in a compact method of a module.

    The kernel starts at zero; where num_classes is 0 there is no head, and x is returned.
    """
    if not config.num_classes:
        return x
    return nn.Dense(
        config.num_classes,
        kernel_init=nn.initializers.zeros,
        bias_init=nn.initializers.constant(config.head_bias_init),
        name=name,
    )(x)


def width_of(arrays: Arrays, bias: str) -> int:
    """The width of a layer by its bias, 0 if there is none."""
    return arrays[bias].size if bias in arrays else 0


Grid = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Resize:
    """Between which models a parameter is fitted.

    Attributes:
        class_tokens: how many tokens before the patches have positions in the pretrained model and
            in the fresh one: none, a class token, or that and a distillation token.
        grids: rows and columns of patches of the two; None for a square.
    """

    class_tokens: tuple[int, int] = (0, 0)
    grids: tuple[Grid | None, Grid | None] = (None, None)


# Maps a pretrained parameter and the fresh one to what takes its place: the pretrained array itself
# where nothing is to change, or its shape has another mistake.
Resizer = Callable[[np.ndarray, np.ndarray, Resize], np.ndarray]
