"""A page of HTML that gathers the pictures of an analysis: one file that needs no other."""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flax.traverse_util import flatten_dict

from vit_jax import webpage
from vit_jax.files import atomic_write
from vit_jax.image_size import in_words
from vit_jax.recipes.names import name_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vit_jax.checkpoints.pretrained import Pretrained

PAGE = "index.html"
# Images that have a part of the page; of more it would be too large to open.
MOST_IMAGES = 24
_STYLE = pathlib.Path(__file__).with_suffix(".css")


@dataclasses.dataclass
class Page:
    """The page as it grows: its sections in the order in which to read them.

    Attributes:
        images: an article of HTML for each image, by its file.
        of_model: pictures of the model and of its run.
        skipped: how many images have no article.
    """

    images: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    of_model: list[str] = dataclasses.field(default_factory=list)
    skipped: int = 0

    def begin(self, file: str, predictions: Sequence[Mapping[str, Any]]) -> bool:
        """Begins the article of an image; returns whether the page has room for it.

        Args:
            file: of the image.
            predictions: its most probable classes, see `ranking.top`; may be empty.
        """
        if len(self.images) >= MOST_IMAGES:
            self.skipped += 1
            return False
        self.images[file] = [_classes(predictions)]
        return True

    def add(
        self,
        title: str,
        caption: str,
        figure: "Figure",
        *,
        file: str = "",
        closed: bool = False,
        wide: bool = False,
    ) -> None:
        """Adds a picture.

        Args:
            title: above it.
            caption: a sentence below it.
            figure: to draw.
            file: of the image that it is of; "" for one of the model.
            closed: whether one opens it first.
            wide: whether one of the model stands alone in its row.
        """
        from vit_jax.analysis import plots

        # Unlike in every picture of the page.
        number = len(self.of_model) + sum(map(len, self.images.values()))
        svg = plots.to_svg(figure, f"{'image' if file else 'model'}{len(self.images)}x{number}")
        label = webpage.text(f"{title}. {caption}")
        picture = (
            f'<figure><div class="drawing" role="img" aria-label="{label}">{svg}</div>'
            f"<figcaption>{webpage.text(caption)}</figcaption></figure>"
        )
        if closed:
            head = f"<summary>{webpage.text(title)}</summary>"
            picture = f"<details>{head}{picture}</details>"
        elif not file:
            look = ' class="wide"' if wide else ""
            picture = f"<section{look}><h2>{webpage.text(title)}</h2>{picture}</section>"
        (self.images[file] if file else self.of_model).append(picture)

    def write(self, folder: pathlib.Path, title: str, facts: Mapping[str, str]) -> pathlib.Path:
        """Writes the page and returns its path.

        Args:
            folder: where it goes.
            title: of the page.
            facts: in a list below it.

        Raises:
            UserError: it cannot be written.
        """
        body = [
            f"<h1>{webpage.text(title)}</h1>",
            _list(facts),
            *self._of_images(),
            f'<div class="pair">{"".join(self.of_model)}</div>',
        ]
        path = folder / PAGE
        with atomic_write(path) as temporary:
            style = _STYLE.read_text(encoding="utf-8")
            text = webpage.document(title, body, style, self_contained=True)
            temporary.write_text(text, encoding="utf-8")
        return path

    def _of_images(self) -> list[str]:
        if not self.images:
            return []
        articles = [
            f"<article><h3>{webpage.text(file)}</h3>{''.join(parts)}</article>"
            for file, parts in self.images.items()
        ]
        more = f"{self.skipped:,} more images have no place here; the NPZ files have them all."
        return [
            "<h2>What it looks at</h2>",
            *articles,
            f"<p>{webpage.text(more)}</p>" if self.skipped else "",
        ]


def label_of(prediction: Mapping[str, Any]) -> str:
    """The name of a predicted class, see `ranking.top`; its number where it has none."""
    label = prediction["label"]
    return f"class {prediction['index']}" if label is None else label


def facts_of(pretrained: "Pretrained", given: str) -> dict[str, str]:
    """Facts about a model to tell it from others.

    Args:
        pretrained: the model.
        given: the name or path by which it was asked for.
    """
    model, preprocessing = pretrained.model, pretrained.preprocessing
    arrays = flatten_dict(pretrained.params, sep="/")
    shape = ", ".join(
        f"{key} {model[key]}"
        for key in ("patch_size", "num_layers", "hidden_size", "num_heads", "mlp_dim")
        if key in model
    )
    name = name_of(model)
    facts = {
        "Model": f"{name}: {shape}" if name else f"{model['architecture']}: {shape}",
        "Parameters": f"{sum(math.prod(x.shape) for x in arrays.values()):,}",
        "Image": f"{in_words(preprocessing.image_size)} pixels",
        "Classes": f"{model['num_classes']:,}" if model["num_classes"] else "none: it has no head",
        "Weights": given if given == pretrained.source else f"{given}: {pretrained.source}",
    }
    return facts | dict([_hash(pretrained.source, arrays)])


def _hash(source: str, arrays: Mapping[str, Any]) -> tuple[str, str]:
    """A hash and what it is of: of the file as `sha256sum` has it where there is one."""
    if pathlib.Path(source).is_file():
        with open(source, "rb") as file:
            return "SHA-256", hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape} {arrays[name].dtype}\n".encode())
        digest.update(arrays[name].tobytes())
    return "SHA-256 of the parameters", digest.hexdigest()


def _classes(predictions: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f'<li style="--share: {each["probability"]:.4f}"><span>{webpage.text(label_of(each))}'
        f"</span> <b>{each['probability']:.1%}</b></li>"
        for each in predictions
    )
    return f'<ol class="classes">{rows}</ol>' if rows else ""


def _list(facts: Mapping[str, str]) -> str:
    rows = (f"<dt>{webpage.text(key)}</dt><dd>{webpage.text(x)}</dd>" for key, x in facts.items())
    return f"<dl>{''.join(rows)}</dl>"
