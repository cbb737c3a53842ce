"""The command on tiny weights and images that the tests write."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from vit_jax.analysis import __main__ as command_line
from vit_jax.analysis import attention, intermediates
from vit_jax.checkpoints.pretrained import load_pretrained
from vit_jax.data.images import preprocess, read_image
from vit_jax.errors import UserError
from vit_jax.models import create_model

ROOT = pathlib.Path(__file__).parents[2]
MODEL = {
    "architecture": "vit",
    "patch_size": 8,
    "hidden_size": 12,
    "num_layers": 2,
    "mlp_dim": 16,
    "num_heads": 3,
    "num_classes": 7,
}
HYBRID = {**MODEL, "architecture": "hybrid", "resnet_layers": (1, 1), "patch_size": 2}


def write_checkpoint(path, model, image_size=16):
    rng = np.random.default_rng(0)
    images = np.zeros((1, image_size, image_size, 3))
    shapes = jax.eval_shape(create_model(model).init, jax.random.key(0), images)
    flat = {
        name: rng.normal(0, 0.5, x.shape).astype(np.float32)
        for name, x in flatten_dict(shapes["params"], sep="/").items()
    }
    np.savez(path, **flat)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An official .npz of a ViT for images of 16 pixels, every parameter random."""
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "tiny.npz", MODEL)


@pytest.fixture
def photos(tmp_path):
    """Three images, two of them of one name, and between them a file that is none."""
    rng = np.random.default_rng(1)
    for name in ("a.png", "deep/a.png", "z.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    (tmp_path / "photos/broken.png").write_bytes(b"no image")
    return tmp_path / "photos"


@pytest.fixture
def run_main(monkeypatch, capsys, tmp_path):
    """Runs the command in this process; returns its exit code, stdout, stderr and directory."""

    def run(analysis, checkpoint, *arguments):
        output = tmp_path / "made" / "here"
        flags = ["--checkpoint", checkpoint, "--output", output, "--num_heads", 3, *arguments]
        monkeypatch.setattr(sys, "argv", ["analysis", analysis, *map(str, flags)])
        code = command_line.main()
        return (code, *capsys.readouterr(), output)

    return run


@pytest.fixture
def expected(checkpoint, photos):
    """The attention weights and tokens of a.png, deep/a.png and z.png, one image at a time."""
    pretrained = load_pretrained(checkpoint, num_heads=3)
    model = create_model(pretrained.model)
    files = [photos / "a.png", photos / "deep/a.png", photos / "z.png"]
    images = [preprocess(read_image(file), pretrained.preprocessing)[None] for file in files]
    functions = (intermediates.attention_weights, intermediates.layer_tokens)
    return [
        np.concatenate([function(model, pretrained.params, image) for image in images])
        for function in functions
    ]


def names(directory):
    return {path.name for path in directory.iterdir()}


def assert_picture(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 100
    assert pixels.std() > 5  # Something is drawn.


def test_all_writes_every_picture_and_its_numbers(checkpoint, photos, expected, run_main):
    arguments = ("--images", photos, "--batch_size", 2, "--dpi", 70)
    code, printed, errors, output = run_main("all", checkpoint, *arguments)
    assert code == 1  # broken.png
    assert errors.count("\n") == 1
    assert f"error: {photos / 'broken.png'} is not an image" in errors
    stems = ["filters", "positions", "rollout", "distance"]
    stems += [f"{kind}_{x}" for kind in ("attention", "intermediates") for x in ("a", "a_2", "z")]
    assert names(output) == {f"{stem}.{kind}" for stem in stems for kind in ("png", "npz")}
    assert {pathlib.Path(line).name for line in printed.splitlines()} == names(output)
    for stem in stems:
        assert_picture(output / f"{stem}.png")
    files = [str(photos / name) for name in ("a.png", "deep/a.png", "z.png")]
    weights, tokens = expected
    for index, (stem, file) in enumerate(zip(("a", "a_2", "z"), files, strict=True)):
        with np.load(output / f"attention_{stem}.npz") as found:
            assert found["image"] == file
            np.testing.assert_allclose(found["weights"], weights[index], atol=1e-5)
        with np.load(output / f"intermediates_{stem}.npz") as found:
            assert found["image"] == file
            np.testing.assert_allclose(found["tokens"], tokens[index], rtol=1e-4, atol=1e-4)
    with np.load(output / "rollout.npz") as found:
        assert found["files"].tolist() == files
        # The class token's row, of which the first is its share in itself.
        shares = np.asarray(attention.rollout(weights))[:, 0, 1:].reshape(3, 2, 2)
        np.testing.assert_allclose(found["rollout"], shares, rtol=1e-4)
        assert found["mask"].shape == (3, 16, 16)
        np.testing.assert_allclose(found["mask"].max(axis=(1, 2)), 1, rtol=1e-5)
    with np.load(output / "distance.npz") as found:
        # Four patches of 8 pixels: neighbors are 8 apart, opposite corners 8 * 2^0.5.
        far = 8 * np.array([[0, 1, 1, 2**0.5], [1, 0, 2**0.5, 1]])
        far = np.concatenate([far, far[::-1, ::-1]])
        each = (weights[..., 1:, 1:] * far).sum(-1).mean(-1)
        np.testing.assert_allclose(found["distance_of_images"], each, rtol=1e-4)
        np.testing.assert_allclose(found["distance"], each.mean(axis=0), rtol=1e-4)


def test_all_goes_on_without_curves_that_nobody_asked_for(monkeypatch, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("garbage\n")
    monkeypatch.setattr(command_line, "_of_model", lambda *_: (0, "", {}))
    arguments = ["all", "--checkpoint", f"{run}", "--images", "a.png", "--output", f"{tmp_path}/o"]
    assert command_line.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("without curves: ") and printed.count("\n") == 1
    for asked in ([*arguments, "--run", f"{run}"], ["curves", *arguments[1:]]):
        with pytest.raises(UserError):
            command_line.main(asked)


def test_filters_and_positions_need_no_images(checkpoint, run_main):
    code, _, errors, output = run_main("filters", checkpoint)
    assert (code, errors) == (0, "")
    assert run_main("positions", checkpoint)[0] == 0
    assert names(output) == {"filters.png", "filters.npz", "positions.png", "positions.npz"}
    with np.load(output / "filters.npz") as found:
        assert found["components"].shape == (12, 8, 8, 3)
    with np.load(output / "positions.npz") as found:
        assert found["similarity"].shape == (2, 2, 2, 2)


@pytest.mark.parametrize(
    ("model", "size", "grid"),
    [(HYBRID, "32", (2, 2)), ({**MODEL, "classifier": "gap"}, "32x24", (4, 3))],
    ids=["hybrid", "gap, no square"],
)
def test_hybrids_and_models_without_a_class_token_too(
    model, size, grid, photos, run_main, tmp_path
):
    weights = write_checkpoint(tmp_path / "other.npz", model, image_size=32)
    arguments = ("--images", photos / "a.png", photos / "z.png", "--dpi", 70, "--image_size", size)
    code, _, errors, output = run_main("all", weights, *arguments)
    assert (code, errors) == (0, "")
    with np.load(output / "rollout.npz") as found:
        assert found["rollout"].shape == (2, *grid)
        side = 32 // grid[0]
        assert found["mask"].shape == (2, 32, grid[1] * side)
    with np.load(output / "positions.npz") as found:
        assert found["similarity"].shape == (*grid, *grid)
    with np.load(output / "distance.npz") as found:
        assert np.all(found["distance"] < side * (grid[0] - 1) * 2**0.5)
        assert np.all(found["distance"] > side / 20)


RESNET = {"architecture": "resnet", "resnet_layers": (1, 1, 1, 1), "num_classes": 7}
NO_POSITIONS = {**MODEL, "classifier": "map", "position_embedding": "none"}


@pytest.mark.parametrize(
    ("model", "without"),
    [
        (RESNET, ["attention", "rollout", "distance", "intermediates", "positions"]),
        (NO_POSITIONS, ["positions"]),
    ],
    ids=["resnet", "no positions"],
)
def test_all_leaves_out_what_a_model_has_not_and_says_why(model, without, photos, tmp_path, capsys):
    weights = write_checkpoint(tmp_path / "other.npz", model, image_size=32)
    info = {"model": model, "preprocessing": {"image_size": 32}}
    (tmp_path / "other.npz.json").write_text(json.dumps(info))
    output = tmp_path / "made"
    flags = ["--checkpoint", str(weights), "--output", str(output), "--dpi", "60", "--html"]
    with pytest.raises(UserError, match="this model has no position embedding"):
        command_line.main(["positions", *flags])
    assert not output.exists()
    assert command_line.main(["all", *flags, "--images", str(photos / "a.png")]) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    lines = [line for line in printed.splitlines() if not line.startswith(str(output))]
    if model == RESNET:
        assert lines.pop() == "the images are not read: no analysis of them is left"
    assert [line.partition(": this model has no ")[0] for line in lines] == [
        f"without {name}" for name in without
    ]
    pictures = {"attention_a", "rollout", "distance", "intermediates_a", "filters", "positions"}
    drawn = {name for name in pictures if name.partition("_")[0] not in without}
    assert {path.stem for path in output.iterdir()} == drawn | {"index"}


def test_nothing_readable_is_exit_code_2(checkpoint, photos, run_main):
    code, _, errors, output = run_main("rollout", checkpoint, "--images", photos / "broken.png")
    assert code == 2
    assert errors.count("\n") == 1
    assert not names(output)


def test_an_analysis_of_images_asks_for_them(checkpoint, run_main):
    with pytest.raises(UserError, match="rollout looks at images: give some with --images"):
        run_main("rollout", checkpoint)


def test_a_directory_that_cannot_be_made_is_one_line(checkpoint, run_main, tmp_path):
    (tmp_path / "made").write_text("")
    with pytest.raises(UserError, match="--output .*made/here cannot be made: Not a directory"):
        run_main("filters", checkpoint)


def test_a_failed_write_leaves_nothing_half_written(checkpoint, photos, run_main, monkeypatch):
    arguments = ("distance", checkpoint, "--images", photos / "a.png")
    *_, output = run_main(*arguments)
    before = {path.name: path.read_bytes() for path in output.iterdir()}

    def full(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match="distance.npz cannot be written: No space left on device"):
        run_main(*arguments)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_it_runs_as_a_command_without_tensorflow(checkpoint, photos, tmp_path):
    code = "import runpy, sys; sys.modules['tensorflow'] = None; sys.argv[0] = 'analysis'; "
    code += "runpy.run_module('vit_jax.analysis', run_name='__main__')"
    flags = ["--checkpoint", checkpoint, "--images", photos / "a.png", "--output", tmp_path / "out"]
    process = subprocess.run(
        [sys.executable, "-c", code, "rollout", "--num_heads", "3", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert names(tmp_path / "out") == {"rollout.png", "rollout.npz"}


def test_memory_does_not_grow_with_the_number_of_images():
    """128 images through B/16: what one batch of 8 needs, whatever the number of batches."""
    model = create_model(
        {**MODEL, "hidden_size": 768, "num_layers": 12, "mlp_dim": 3072, "num_heads": 12},
        patch_size=16,
    )
    images = jax.ShapeDtypeStruct((8, 224, 224, 3), np.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]

    def distances(params, images):
        weights = intermediates.attention_weights(model, params, images)
        return attention.attention_distance(weights, (14, 14), 16)

    memory = jax.jit(distances).lower(params, images).compile().memory_analysis()
    assert memory.output_size_in_bytes == 8 * 12 * 12 * 4
    assert memory.temp_size_in_bytes < 2**29
