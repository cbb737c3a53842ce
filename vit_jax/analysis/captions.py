"""Sentences that say what one sees in a picture, with its numbers and the paper's figure."""

from collections.abc import Sequence

import numpy as np

from vit_jax.analysis.curves import Panel
from vit_jax.analysis.embeddings import similarity_by_place

# Of the patches that are looked at most, the share that a caption speaks of.
_MOST = 0.1


def of_rollout(attention: np.ndarray, patch_size: int) -> str:
    """Says how far attention rollout is spread over an image.

    Args:
        attention: [rows, columns], not negative.
        patch_size: side in pixels of what becomes one token.
    """
    values = np.sort(attention, axis=None)[::-1].astype(np.float64)
    count = max(1, round(_MOST * len(values)))
    share = values[:count].sum() / values.sum()
    return (
        f"Attention rollout (Appendix D.8, Figures 6 and 14): the {_patches(count)} of "
        f"{patch_size} x {patch_size} pixels that are looked at most, of {len(values)}, have "
        f"{share:.0%} of the attention to the image."
    )


def _patches(count: int) -> str:
    return "patch" if count == 1 else f"{count} patches"


def of_heads(who: str) -> str:
    """Says what the maps of all heads show.

    Args:
        who: looks: "the class token".
    """
    return (
        f"What {who} looks at, in every head (row) of every layer (column), in one scale of color "
        "(the paper shows them multiplied, in Figures 6 and 14)."
    )


def of_layers() -> str:
    """Says what the colors of patches show."""
    return (
        "The patches after every layer, colored by their first three principal components: patches "
        "of one color are alike there (not in the paper)."
    )


def of_distances(distances: np.ndarray, uniform: float) -> str:
    """Says how far the heads of the first and of the last layer look.

    Args:
        distances: [layers, heads] in pixels.
        uniform: of a head that looks at all tokens alike.
    """
    first, last = (f"{row.min():.0f} to {row.max():.0f}" for row in distances[[0, -1]])
    beyond = int((distances > uniform).sum())
    return (
        f"How far each head looks (Figures 7, right, and 11; Appendix D.7): {first} pixels in the "
        f"first layer, {last} in the last; {beyond} of {distances.size} heads look farther than "
        f"if they looked at all tokens alike, {uniform:.0f} pixels."
    )


def of_filters(count: int, share: float) -> str:
    """Says how much of the filters is shown.

    Args:
        count: of principal components.
        share: of the variance that they hold together.
    """
    return (
        f"The first {count} principal components of the filters that see the image, as in Figure "
        f"7, left; they hold {share:.0%} of the variance."
    )


def of_positions(similarity: np.ndarray) -> str:
    """Says how alike the position embeddings of patches are.

    Args:
        similarity: [rows, columns, rows, columns], cosines.
    """
    words = {
        "neighbors": "of neighbors",
        "line": "within a row or column",
        "others": "of all others",
    }
    means = similarity_by_place(similarity)
    found = ", ".join(
        f"{means[place]:.2f} {text}" for place, text in words.items() if place in means
    )
    return (
        "Each tile compares the position embedding of one patch with those of all, as in Figure 7, "
        f"center, and Figure 10; the mean cosine is {found or 'that of one patch'}."
    )


def of_curves(panels: Sequence[Panel], constant: float) -> str:
    """Says where the curves of a run end, and what of them is smoothed.

    Args:
        panels: see `curves.read_panels`.
        constant: of the exponential mean.
    """
    parts = [
        f"{panel.name.replace('_', ' ')} {panel.evaluation.values[-1]:.4g}"
        for panel in panels
        if panel.evaluation
    ]
    end = max(curve.steps[-1] for panel in panels for _, curve in panel.curves())
    smoothing = (
        f"thick lines of training are exponential means with the constant {constant:g}, faint ones "
        "are as logged"
        if constant
        else "nothing is smoothed"
    )
    scores = f" with, in evaluation, {', '.join(parts)}" if parts else ""
    return f"The run has come to step {end:.0f}{scores}; {smoothing}."
