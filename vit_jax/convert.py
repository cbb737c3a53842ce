"""Converts weights: `python -m vit_jax.convert --from C --to PATH --format FORMAT`."""

import dataclasses

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from vit_jax import command, models
from vit_jax.checkpoints import flags
from vit_jax.checkpoints.pretrained import Pretrained, load_pretrained
from vit_jax.checkpoints.save import FORMATS, save_pretrained
from vit_jax.errors import UserError

_NUM_IMAGES = 2


def convert(source: Pretrained, path: str, layout: str) -> tuple[float, float]:
    """Writes a model in another format, reads it again and compares.

    Args:
        source: the model.
        path: where to, see `save_pretrained`.
        layout: one of `FORMATS`.

    Returns:
        The largest absolute difference of any parameter, and of the logits on random images.

    Raises:
        UserError: the model cannot be written in this format, or is another when it is read again.
    """
    save_pretrained(source, path, layout)
    again = load_pretrained(path)
    before, after = (flatten_dict(x.params, sep="/") for x in (source, again))
    of_params = max(float(np.abs(after[name] - x).max()) for name, x in before.items())
    of_logits = float(np.abs(_logits(again) - _logits(source)).max())
    described, found = (dataclasses.replace(x, params={}, source="") for x in (source, again))
    if of_params or of_logits or described != found:
        raise UserError(
            f"{path} is not what was converted (parameters differ by {of_params:.3g}, logits by "
            f"{of_logits:.3g}; {described} became {found}): do not use it"
        )
    return of_params, of_logits


def _logits(pretrained: Pretrained) -> np.ndarray:
    size = pretrained.preprocessing.image_size
    images = np.random.default_rng(0).uniform(-1, 1, (_NUM_IMAGES, size, size, 3))
    model = models.create_model(pretrained.model)
    return np.asarray(jax.jit(model.apply)({"params": pretrained.params}, np.float32(images)))


def _differences(source: Pretrained, layout: str) -> list[str]:
    """What readers other than this project would do otherwise, unless they are told."""
    model, notes = source.model, []
    if layout == "timm":
        if model["gelu"] == "tanh":
            notes += ["timm's GELU is the exact one: create the model with act_layer='gelu_tanh'"]
        if model["layer_norm_epsilon"] != 1e-6:
            notes += [f"timm's LayerNorm epsilon is 1e-6, here {model['layer_norm_epsilon']:g}"]
    if layout == "official" and model.get("gelu") == "erf":
        notes += ["Google's code has the tanh form of GELU, these weights the exact one"]
    if layout != "official" and source.preprocessing.resize != layout:
        resize, antialias = source.preprocessing.resize, source.preprocessing.antialias
        notes += [
            f"{layout} resizes with PIL, with antialiasing and to whole pixels; these weights saw "
            f"images by resize {resize}" + ", without antialiasing" * (not antialias)
        ]
    return notes


def main() -> int:
    """Runs the command; returns its exit code."""
    parser = command.Parser(prog="python -m vit_jax.convert", description=__doc__)
    flags.add_flags(parser, "--from")
    parser.add_argument("--to", required=True, metavar="PATH", help="a file or folder to be made")
    parser.add_argument("--format", required=True, choices=FORMATS)
    args = parser.parse_args()
    source = flags.load(args)
    of_params, of_logits = convert(source, args.to, args.format)
    print(f"from  {source.source}")
    print(f"to    {args.to} ({args.format})")
    print(f"largest difference of any parameter: {of_params:g}")
    print(f"largest difference of the logits on {_NUM_IMAGES} random images: {of_logits:g}")
    for note in _differences(source, args.format):
        print(f"note: {note}")
    return 0


if __name__ == "__main__":
    command.run(main)
