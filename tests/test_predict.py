"""The command on tiny weights and images that the tests write."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image
from sklearn.datasets import load_digits

from vit_jax import command, inference, predict
from vit_jax.checkpoints.pretrained import abstract_params
from vit_jax.data.images import read_image
from vit_jax.data.protocols import evaluation
from vit_jax.errors import UserError
from vit_jax.models import create_model

from .data import tensorflow_views

ROOT = pathlib.Path(__file__).parents[1]
PREDICT = [sys.executable, "-m", "vit_jax.predict"]
MODEL = {
    "architecture": "vit",
    "patch_size": 8,
    "hidden_size": 12,
    "num_layers": 2,
    "mlp_dim": 16,
    "num_heads": 3,
    "num_classes": 7,
}
NAMES = ["daisy", "iris", "rose", "tulip", "poppy", "lily", "edelweiß"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An official .npz of a ViT for images of 16 pixels, every parameter random."""
    rng = np.random.default_rng(0)
    flat = {
        name: rng.normal(0, 0.5, x.shape).astype(np.float32)
        for name, x in flatten_dict(abstract_params(MODEL, 16), sep="/").items()
    }
    path = tmp_path_factory.mktemp("weights") / "tiny.npz"
    np.savez(path, **flat)
    return path


@pytest.fixture
def named(checkpoint, tmp_path):
    """The same weights with class names beside them."""

    def make(**known):
        path = tmp_path / "weights" / "named.npz"
        path.parent.mkdir()
        path.write_bytes(checkpoint.read_bytes())
        path.with_name("named.npz.json").write_text(json.dumps({"class_names": NAMES, **known}))
        return path

    return make


@pytest.fixture
def photos(tmp_path):
    """A directory with five images at three depths, a text file and hidden files."""
    rng = np.random.default_rng(1)
    root = tmp_path / "photos"
    for name in ["b.png", "a.PNG", "deep/er/c.bmp", "deep/d.png", ".hidden/e.png", ".f.png"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        # Smooth, so that images differ in more than the mean.
        pixels = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8)).resize((30, 20))
        pixels.save(root / name)
    (root / "notes.txt").write_text("no image")
    return root


IN_ORDER = ["a.PNG", "b.png", "deep/d.png", "deep/er/c.bmp"]


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Runs the command in this process; returns its exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
        code = predict.main()
        return (code, *capsys.readouterr())

    return run


def reference(checkpoint, files):
    """Softmax in float64 of the logits on what TensorFlow's evaluation sees."""
    with np.load(checkpoint) as flat:
        params = {}
        for name in flat.files:
            *parents, leaf = name.split("/")
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = flat[name]
    pixels = [tensorflow_views.decode(pathlib.Path(file).read_bytes()) for file in files]
    images = [tensorflow_views.eval_view(x, evaluation("inception", 16)) for x in pixels]
    apply = jax.jit(create_model(MODEL).apply)
    logits = np.asarray(apply({"params": params}, np.stack(images)))
    exponentials = np.exp(logits.astype(np.float64))
    return logits, exponentials / exponentials.sum(1, keepdims=True)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 32])
def test_json_and_logits_are_those_of_evaluation(
    checkpoint, photos, run_main, tmp_path, batch_size
):
    flags = ["--json", "--topk=7", "--logits", tmp_path / "out", "--batch_size", batch_size]
    code, output, errors = run_main("--checkpoint", checkpoint, photos, *flags)
    assert (code, errors) == (0, "")
    files = [str(photos / name) for name in IN_ORDER]
    logits, probabilities = reference(checkpoint, files)
    lines = [json.loads(line) for line in output.splitlines()]
    assert [line["file"] for line in lines] == files
    for line, expected in zip(lines, probabilities, strict=True):
        assert all(each.keys() == {"index", "label", "probability"} for each in line["predictions"])
        found = {each["index"]: each["probability"] for each in line["predictions"]}
        np.testing.assert_allclose([found[i] for i in range(7)], expected, rtol=1e-3)
        assert list(found) == sorted(found, key=found.get, reverse=True)
        assert {each["label"] for each in line["predictions"]} == {None}
    with np.load(tmp_path / "out") as saved:
        assert saved["files"].tolist() == files
        np.testing.assert_allclose(saved["logits"], logits, atol=1e-4)
    assert not list(tmp_path.glob(".out*"))


def test_plain_output_is_the_file_then_percent_and_class(checkpoint, named, photos, run_main):
    file = photos / "b.png"
    code, output, _ = run_main("--checkpoint", named(), file, "--topk", "2")
    _, (probabilities,) = reference(checkpoint, [file])
    best = np.argsort(probabilities)[:-3:-1]
    expected = [str(file), *(f"{probabilities[i]:8.2%}  {NAMES[i]}" for i in best)]
    assert (code, output.splitlines()) == (0, expected)
    assert "".join(NAMES).isascii() is False  # so that a name beyond ASCII is among them


def test_without_names_the_class_is_its_index(checkpoint, photos, run_main):
    _, output, _ = run_main("--checkpoint", checkpoint, photos / "b.png", "--topk", "1")
    _, (probabilities,) = reference(checkpoint, [photos / "b.png"])
    assert output.splitlines()[1].endswith(f"%  class {probabilities.argmax()}")


def test_class_names_come_from_the_checkpoint_or_from_a_file(named, photos, run_main, tmp_path):
    arguments = ("--checkpoint", named(), photos / "b.png", "--json", "--topk", "7")

    def labels(*flags):
        _, output, _ = run_main(*arguments, *flags)
        found = {each["index"]: each["label"] for each in json.loads(output)["predictions"]}
        return [found[index] for index in range(7)]

    assert labels() == NAMES
    (tmp_path / "names.txt").write_text("\n".join("ABCDEFG") + "\n")
    assert labels("--class_names", tmp_path / "names.txt") == list("ABCDEFG")


def test_weights_of_the_sigmoid_loss_give_probabilities_each_on_its_own(
    checkpoint, named, photos, run_main
):
    file = photos / "b.png"
    _, output, _ = run_main("--checkpoint", named(loss="sigmoid"), file, "--json", "--topk", "9")
    (logits,), _ = reference(checkpoint, [file])
    found = {each["index"]: each["probability"] for each in json.loads(output)["predictions"]}
    np.testing.assert_allclose([found[i] for i in range(7)], 1 / (1 + np.exp(-logits)), rtol=1e-3)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_extreme_logits_neither_overflow_nor_lose_the_small(loss):
    with np.errstate(all="raise", under="ignore"):
        best, _, last = inference.top(np.float32([-700, 700, 0]), None, loss, 3)
    assert (best["index"], best["probability"]) == (1, 1)
    expected = {"softmax": 0, "sigmoid": np.exp(-700)}[loss]
    assert last["probability"] == pytest.approx(expected, rel=1e-9)


def test_flags_override_what_the_checkpoint_says(checkpoint, photos, run_main, tmp_path):
    def logits(*flags):
        run_main("--checkpoint", checkpoint, photos, "--logits", tmp_path / "out.npz", *flags)
        with np.load(tmp_path / "out.npz") as saved:
            return saved["logits"]

    plain = logits()
    np.testing.assert_array_equal(logits("--gelu", "tanh"), plain)
    for flags in [
        ("--gelu", "erf"),
        ("--layer_norm_epsilon", "0.1"),
        ("--image_size", "24"),
    ]:
        changed = np.abs(logits(*flags) - plain).max()
        assert changed > 1e-4, flags


def test_a_bad_file_is_one_line_and_the_rest_is_done(checkpoint, photos, run_main, tmp_path):
    (photos / "aa.jpg").write_text("no image")
    (photos / "deep/dd\nd.png").write_bytes((photos / "b.png").read_bytes()[:90])
    (photos / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    absent = tmp_path / "absent.jpg"
    flags = ("--json", "--batch_size", "2", "--logits", tmp_path / "out.npz")
    code, output, errors = run_main("--checkpoint", checkpoint, absent, photos, *flags)
    assert code == 1
    files = [str(photos / name) for name in IN_ORDER]
    assert [json.loads(line)["file"] for line in output.splitlines()] == files
    assert errors.count("\n") == 4
    assert all(line.startswith("error: ") for line in errors.splitlines())
    for name in ["absent.jpg cannot be opened", "aa.jpg is not an image", "phone.heic is not an"]:
        assert name in errors
    with np.load(tmp_path / "out.npz") as saved:
        assert saved["files"].tolist() == files
        np.testing.assert_allclose(saved["logits"], reference(checkpoint, files)[0], atol=1e-4)


def test_where_nothing_can_be_read_the_exit_code_is_2_and_no_file_appears(
    checkpoint, run_main, tmp_path
):
    (tmp_path / "empty").mkdir()
    flags = ("--logits", tmp_path / "out.npz")
    code, output, errors = run_main("--checkpoint", checkpoint, tmp_path / "empty", *flags)
    assert (code, output) == (2, "")
    assert errors == f"error: {tmp_path / 'empty'} holds no image\n"
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topk", "0"], "argument --topk: '0' is not a whole number of at least 1"),
        (["--batch_size", "x"], "argument --batch_size: 'x' is not a whole number"),
        (["--gelu", "relu"], "argument --gelu: invalid choice: 'relu'"),
        (["--top", "3"], "unrecognized arguments: --top"),
        (["--logits", "no/such/directory/x.npz"], "is not a file in a directory that exists"),
        (["--logits", "."], "is not a file in a directory that exists"),
        (["--class_names", "absent.txt"], "--class_names absent.txt cannot be read"),
        (["--class_names", __file__], "lines for 7 classes: write one name a line"),
        (["--image_size", "12"], "image_size 12 is not a multiple of patch_size 8"),
        (["--checkpoint", "absent.npz"], "absent.npz does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    checkpoint, photos, monkeypatch, capsys, flags, message
):
    arguments = ["--checkpoint", str(checkpoint), str(photos), *flags]
    monkeypatch.setattr(sys, "argv", ["predict", *arguments])
    with pytest.raises(SystemExit) as end:
        command.run(predict.main)
    output, errors = capsys.readouterr()
    assert (end.value.code, output) == (2, "")
    assert errors.startswith("error: ") and message in errors
    assert errors.count("\n") == 1


def test_weights_without_a_head_are_refused(checkpoint, photos, run_main, tmp_path):
    with np.load(checkpoint) as flat:
        np.savez(
            tmp_path / "headless.npz",
            **{name: flat[name] for name in flat.files if not name.startswith("head/")},
        )
    with pytest.raises(UserError, match="has no head"):
        run_main("--checkpoint", tmp_path / "headless.npz", photos)


def test_a_head_of_zeros_predicts_nothing(checkpoint, photos, run_main, tmp_path):
    with np.load(checkpoint) as flat:
        head = {name: np.zeros_like(flat[name]) for name in ("head/kernel", "head/bias")}
        np.savez(tmp_path / "fresh.npz", **{**flat, **head})
    with pytest.raises(UserError, match="fresh.npz has a head of zeros, .*: fine-tune it"):
        run_main("--checkpoint", tmp_path / "fresh.npz", photos)


def test_it_imports_no_tensorflow(checkpoint, photos):
    code = (
        "import sys; from vit_jax import predict; predict.main(); "
        "sys.exit(', '.join({'tensorflow', 'orbax', 'torch'} & set(sys.modules)) or 0)"
    )
    arguments = ["--checkpoint", str(checkpoint), str(photos)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("%") == 4 * 5


def test_help_tells_the_exit_codes(run_main, capsys):
    with pytest.raises(SystemExit) as end:
        run_main("--help")
    assert end.value.code == 0
    assert "exit codes:" in capsys.readouterr().out


def test_the_digit_of_the_demo_is_of_the_test_split():
    digits = load_digits()
    sevens = np.round(digits.images[digits.target == 7] * 255 / 16)
    pixels = read_image(ROOT / "docs/seven.png")[..., 0]
    (where,) = np.flatnonzero((sevens == pixels).all((1, 2)))
    assert where % 5 == 4  # every fifth of each digit, see vit_jax.data.digits


def test_a_closed_pipe_is_quiet(checkpoint, photos):
    many = [str(photos / "b.png")] * 200
    with subprocess.Popen(
        [*PREDICT, "--checkpoint", str(checkpoint), *many, "--batch_size", "50"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == f"{photos / 'b.png'}\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line(checkpoint, photos):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*PREDICT, "--checkpoint", str(checkpoint), str(photos)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr == "error: [Errno 28] No space left on device\n"
