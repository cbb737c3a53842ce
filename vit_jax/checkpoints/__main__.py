"""Says which file published weights are: `python -m vit_jax.checkpoints B_16 [--fetch]`."""

import math
from collections.abc import Sequence

from vit_jax import command
from vit_jax.checkpoints import augreg, remote
from vit_jax.errors import UserError
from vit_jax.printable import printable

_EPILOG = """examples:
  %(prog)s B_16
  %(prog)s B_16 --dataset imagenet2012 --resolution 224 --fetch
  %(prog)s hf:google/vit-base-patch16-224 --fetch"""


def build_parser(prog: str) -> command.Parser:
    """Returns the parser of the command."""
    parser = command.Parser(
        prog=prog,
        description="Finds published weights. Of an AugReg model (B_16) it lists the recommended\n"
        "pre-trained file and the best fine-tunes of it.",
        epilog=_EPILOG,
    )
    parser.add_argument("name", help="B_16, ViT-B_16, augreg/FILE, hf:OWNER/NAME, ...")
    parser.add_argument("--dataset", help="only fine-tunes on this: imagenet2012, cifar100, ...")
    parser.add_argument("--resolution", type=command.positive, help="of the fine-tune, pixels")
    parser.add_argument("--upstream", choices=augreg.UPSTREAM, help="pre-trained on [i21k]")
    parser.add_argument(
        "--fetch", action="store_true", help="fetch the first file listed, and print where it is"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, and with `--fetch` the path of the file that was fetched."""
    args = build_parser("python -m vit_jax.checkpoints").parse_args(argv)
    if augreg.model_of(args.name) in remote.AUGREG_MODELS and "-" not in args.name:
        index = augreg.read_index(remote.fetch_index())
        rows = _recommendations(
            index, args.name, args.dataset, args.resolution, args.upstream or "i21k"
        )
        header = ("data set", "pixels", "validation", "test", "name")
        first = rows[0][-1]
    elif args.dataset or args.resolution or args.upstream:
        raise UserError(
            f"{args.name!r} is one file: --dataset, --resolution and --upstream choose among those "
            f"of an AugReg model ({', '.join(remote.AUGREG_MODELS)})"
        )
    elif args.name.startswith("hf:"):
        repository, revision = remote.split_hub_name(args.name)
        header, first = ("name", "repository", "revision"), args.name
        rows = [(args.name, repository, revision or "main")]
    else:
        header, first = ("name", "from", "in the cache at"), args.name
        rows = [(args.name, *remote.locate(args.name))]
    print(_table([header, *rows]), flush=True)
    if args.fetch:
        print(printable(str(remote.fetch(first))))
    return 0


def _recommendations(
    index: Sequence[augreg.Entry],
    name: str,
    dataset: str | None,
    resolution: int | None,
    upstream: str,
) -> list[tuple[str, ...]]:
    """The recommended pre-trained file, unless a data set is asked for, and its best fine-tunes."""
    choice = augreg.best(index, name, upstream=upstream, dataset=dataset, resolution=resolution)
    rows = []
    if dataset is None:
        rows.append((choice.ds, "", f"{choice.final_val:.4f}", "", f"augreg/{choice.filename}"))
    siblings = [row for row in index if row.filename == choice.filename]
    finetunes = augreg.query(
        siblings, name, upstream=upstream, dataset=dataset, resolution=resolution
    )
    scored = [row for row in finetunes if math.isfinite(row.adapt_final_val)]
    seen = set()
    for row in sorted(scored, key=lambda row: (row.adapt_ds, -row.adapt_final_val)):
        if (row.adapt_ds, row.adapt_resolution) in seen:
            continue
        seen.add((row.adapt_ds, row.adapt_resolution))
        scores = (f"{row.adapt_final_val:.4f}", f"{row.adapt_final_test:.4f}")
        path = f"augreg/{row.adapt_filename}"
        rows.append((row.adapt_ds, str(row.adapt_resolution), *scores, path))
    return rows


def _table(rows: Sequence[Sequence[object]]) -> str:
    rows = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    command.run(main)
