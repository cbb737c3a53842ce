"""What strangers may call a class, a file or a key of a config, and what of it is shown."""

import json
import re
import sys

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

import vit_jax
from vit_jax import cli, command
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.printable import csv_cell, printable, table_cell
from vit_jax.runner import markdown

# Clears the screen, renames the window, begins a line, writes to the left, and clears again.
HOSTILE = "\x1b[2J\x1b]0;x\x07n\nFORGED \u202e\x9b2J"
MODEL = {
    "architecture": "vit", "patch_size": 4, "hidden_size": 8, "num_layers": 1, "mlp_dim": 8,
    "num_heads": 2, "num_classes": 2, "classifier": "token",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HOSTILE, r"\x1b[2J\x1b]0;x\x07n\nFORGED \u202e\x9b2J"),
        ("\udcff.png", r"\udcff.png"),  # a byte of a file name that is no text
        ("a\u2028b\u2066c\ufeff\x7f", r"a\u2028b\u2066c\ufeff\x7f"),
        *((text, text) for text in ("edelweiß", "百合　花", "שושן", "گل‌ها", "👨‍👩‍👧 ❤️", r"\x1b |")),
    ],
)  # fmt: skip
def test_only_what_cannot_be_seen_is_escaped(text, shown):
    assert printable(text) == shown == printable(shown)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1"])
def test_no_cell_of_a_spreadsheet_becomes_a_formula(text):
    assert csv_cell(text) == f"'{printable(text)}"
    assert csv_cell(f"a{text}") == printable(f"a{text}")


def test_a_cell_does_not_end_before_its_text():
    assert table_cell("a|b\nc") == r"a\|b\nc"
    header, _, row = markdown(["", "top | 5"], [["a|b\n", "1"]]).splitlines()
    assert (header, row) == (r"|  | top \| 5 |", r"| a\|b\n | 1 |")


def test_an_error_is_one_line_whatever_it_quotes(capsys):
    error = UserError(f"class {HOSTILE} is unknown")
    assert str(error).isprintable() and "FORGED" in str(error)
    command.report(OSError(f"two\nlines, {HOSTILE}"))
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """Weights, a photo, a data set and a config, all of whose names are hostile."""
    root = tmp_path_factory.mktemp("strange") / HOSTILE
    classes = [f"{HOSTILE}{i}" for i in range(2)]
    for name in classes:
        (root / "data/test" / name).mkdir(parents=True)
        Image.new("RGB", (9, 8)).save(root / "data/test" / name / f"{HOSTILE}.png")
    (root / "broken.png").write_text("no image")
    images = np.zeros((1, 8, 8, 3), np.float32)
    shapes = jax.eval_shape(create_model(MODEL).init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(0, 0.5, x.shape).astype(np.float32)
        for name, x in flatten_dict(shapes, sep="/").items()
    }
    np.savez(root / "a.npz", **arrays)
    info = {"model": {"num_heads": 2}, "class_names": classes}
    (root / "a.npz.json").write_text(json.dumps(info))
    np.savez(root / "b.npz", **arrays, **{HOSTILE: np.zeros(1)})
    other = {"model_type": HOSTILE, "architectures": [HOSTILE], "id2label": {"0": HOSTILE}}
    (root / "hf").mkdir()
    (root / "hf/config.json").write_text(json.dumps(other))
    (root / "c.json").write_text(json.dumps({HOSTILE: {HOSTILE: HOSTILE}}))
    return root


COMMANDS = {
    "predict": (0, "predict --checkpoint @/a.npz @/data"),
    "predict a broken image": (1, "predict --checkpoint @/a.npz @/data @/broken.png"),
    "predict with odd arrays": (2, "predict --checkpoint @/b.npz @/data"),
    "predict with a foreign config": (2, "predict --checkpoint @/hf @/data"),
    "evaluate": (0, "evaluate --checkpoint @/a.npz --dataset folder:@/data --per_class"),
    "evaluate elsewhere": (2, "evaluate --checkpoint @/a.npz --dataset folder:@/nowhere"),
    "analyze": (0, "analyze positions --checkpoint @/a.npz --output @/analysis"),
    "convert": (0, "convert --from @/a.npz --to @/converted.npz --format official"),
    "convert twice": (2, "convert --from @/a.npz --to @/a.npz --format official"),
    "weights": (2, "weights @"),
    "export": (2, "export --checkpoint @/b.npz --output @/export"),
    "plan": (2, "plan --config @/c.json --on h100"),
    "train": (2, "train --config @/c.json --workdir @/run"),
    "a flag": (2, "train --@"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_passes_on_what_a_stranger_wrote(strange, name, capfd, monkeypatch):
    code, line = COMMANDS[name]
    words = [word.replace("@", str(strange)) for word in line.split()]
    monkeypatch.setattr(sys, "argv", ["vit-jax", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    output = "".join(capfd.readouterr())
    assert end.value.code == code, output
    assert all(x == "\n" or x.isprintable() for x in output), ascii(output)
    assert not re.search(r"^FORGED", output, re.MULTILINE)
    assert "FORG" in output  # It was shown at all; what is long is cut.


def test_a_model_tells_where_it_is_from_in_one_line(strange):
    assert repr(vit_jax.load(strange / "a.npz")).isprintable()
