"""The page on which one drops a picture. It loads nothing from elsewhere."""

import base64
import hashlib
import pathlib
import re
from typing import TYPE_CHECKING

from vit_jax import webpage
from vit_jax.image_size import in_words
from vit_jax.serving.served import Served

if TYPE_CHECKING:
    from vit_jax.serving.app import Options

_FOLDER = pathlib.Path(__file__).parent


def make_page(served: Served, options: "Options", has_attention: bool) -> tuple[str, str]:
    """Returns the page, and the Content-Security-Policy that lets it do what it does and no more.

    Args:
        served: the model.
        options: the bounds of the server.
        has_attention: whether it draws what the model looks at.
    """
    route = "/predict" if served.has_classes else f"/{served.output}"
    style, script = ((_FOLDER / f"page.{x}").read_text(encoding="utf-8") for x in ("css", "js"))
    page = webpage.document(
        f"{served.name}: drop a picture",
        [
            f"<h1>{webpage.text(served.name)}</h1>",
            _DROP if served.has_classes else _no_classes(served.output),
            _RESULT.format(attention=_ATTENTION if has_attention else _NO_ATTENTION)
            if served.has_classes
            else "",
            "<h2>From a program</h2>",
            f"<pre><code>curl -F image=@photo.jpg <span id=origin></span>{route}</code></pre>",
            f"<h2>The model</h2>{_facts(served, options)}",
            f"<script>\n{script}</script>" if served.has_classes else "",
        ],
        style,
    )
    policy = [
        "default-src 'none'",
        *(f"{kind}-src {_hashes(page, kind)}" for kind in ("script", "style")),
        "connect-src 'self'",
        "img-src blob: data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return page, "; ".join(policy)


_DROP = """<label id="drop">
<input id="file" type="file" accept="image/*">
<span><b>Drop a picture here</b>, paste it, or choose a file</span>
</label>
<p id="error" role="alert" hidden></p>"""

_RESULT = """<section id="result" hidden>
<figure><img id="picture" alt="the picture"><figcaption id="name"></figcaption></figure>
<div><ol id="classes" class="classes"></ol><p id="time"></p></div>
{attention}
</section>"""

_ATTENTION = """<figure><img id="attention" alt="what the model looks at">
<figcaption>What it looks at: attention rollout over all layers</figcaption></figure>"""

_NO_ATTENTION = """<p class="faint">What the model looks at needs its weights in Flax: start the \
server with --checkpoint beside --model.</p>"""


def _no_classes(output: str) -> str:
    return f"<p>This model gives {webpage.text(output)}, no classes: programs have them.</p>"


def _facts(served: Served, options: "Options") -> str:
    size = in_words(served.preprocessing.image_size)
    (shape,) = (" x ".join(map(str, served.output_shape)),)
    most = min(options.max_batch, served.largest or options.max_batch)
    facts = {
        "Weights": served.metadata.get("source", ""),
        "Input": f"{size} pixels, {served.preprocessing.channels} channels"
        + ", made of images of any size by the model itself" * served.takes_raw,
        "Output": f"{served.output}, {shape}",
        "Runs in": f"{served.facts.get('runtime')}, up to {most} image{'s' * (most > 1)} at a time",
        **{f"SHA-256 of {name}": value for name, value in served.facts.get("sha256", {}).items()},
    }
    rows = (
        f"<dt>{webpage.text(key)}</dt><dd>{webpage.text(str(value))}</dd>"
        for key, value in facts.items()
        if value
    )
    return f"<dl>{''.join(rows)}</dl>"


def _hashes(page: str, kind: str) -> str:
    """The sources of a kind that a page holds, as its policy names them."""
    found = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
    digests = (hashlib.sha256(text.encode()).digest() for text in found)
    names = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    return " ".join(names) or "'none'"
