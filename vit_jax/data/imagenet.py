"""The 1,000 classes of ILSVRC 2012, which every ImageNet checkpoint has in the same order."""

import functools
import importlib.resources
import re
from collections.abc import Mapping


@functools.cache
def classes() -> Mapping[str, str]:
    """English names by WordNet id (`n01440764`), in the order of the logits.

    The ids are TFDS's class names of imagenet2012; the names are WordNet's lemmas.
    """
    text = importlib.resources.files("vit_jax.data").joinpath("imagenet_classes.txt").read_text()
    return dict(line.split(" ", 1) for line in text.splitlines())


def readable(name: str) -> str:
    """The English name of a WordNet id of ImageNet's; any other name as it is."""
    return classes().get(name, name)


def comparable(name: str) -> str:
    """A class name without case and punctuation, a WordNet id as what it stands for."""
    return re.sub(r"[\W_]+", " ", readable(name)).strip().casefold()
