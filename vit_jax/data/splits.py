"""Splits and slices in the syntax of TFDS, of data sets that are none of TFDS's."""

from collections.abc import Mapping


def slices(split: str, sizes: Mapping[str, int]) -> list[tuple[str, slice]]:
    """Returns the parts that a split consists of, such as "train[:98%]+validation".

    Args:
        split: in the syntax of TFDS.
        sizes: the number of examples in each split that there is.

    Returns:
        The split of each part, and the slice of it.

    Raises:
        ValueError: if `split` is malformed, names no split that there is or selects nothing.
    """
    if sizes.get(split):
        return [(split, slice(0, sizes[split]))]
    import tensorflow_datasets as tfds  # Almost a second, and most splits are a name.

    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0)
        for name, size in sizes.items()
    }
    parts = [
        (part.splitname, slice(part.from_, part.to))
        for part in tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    ]
    if not any(range(sizes[name])[part] for name, part in parts):
        raise ValueError("it selects no image")
    return parts
