"""The command that restores masked patches: what it writes and refuses, and what is learned."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax import config_files, restore, train
from vit_jax.checkpoints import flags
from vit_jax.checkpoints.pretrained import Pretrained
from vit_jax.config import check_config
from vit_jax.data.protocols import Preprocessing
from vit_jax.errors import UserError
from vit_jax.evaluation.restoration import error
from vit_jax.image_size import sides
from vit_jax.models import create_model, masked
from vit_jax.restore import Restorer

from .segmenters import TINY

HYBRID = {**TINY, "architecture": "hybrid", "patch_size": 1, "resnet_layers": ()}


def random_predictor(target="pixels", config=TINY, size="16x12"):
    """Of images of such a height and width, in patches of 4; its weights are random."""
    rng = np.random.default_rng(0)
    model = masked.predictor(create_model(config), target)
    images = np.zeros((1, *sides(size), 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32), shapes)
    own = {name: params.pop(name) for name in masked.PARAMETERS}
    return Pretrained(params, config, Preprocessing(size), None, "softmax", "random", masked=own)


@pytest.fixture
def loaded(monkeypatch):
    monkeypatch.setattr(flags, "load", lambda args: random_predictor())


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(1)
    for index in range(7):
        pixels = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{index}.png")
    return tmp_path / "photos"


def run(*words):
    return restore.main(["--checkpoint", "random", *map(str, words)])


def sizes(folder):
    found = {}
    for path in folder.iterdir():
        with Image.open(path) as image:
            found[path.name] = image.size
    return found


@pytest.mark.usefixtures("loaded", "photos")
def test_every_image_has_a_file_of_the_inputs_size_and_six_share_a_sheet(tmp_path, capsys):
    assert run("photos", "--output", "out") == 0
    found = sizes(tmp_path / "out")
    sheets = [found.pop(f"sheet-{number}.png") for number in (1, 2)]
    assert found == {f"{index}.restored.png": (12, 16) for index in range(7)}
    # Two images beside each other, or one alone: three pictures of 1.75 inches, at 110 dots each.
    assert [width for width, _ in sheets] == pytest.approx([6 * 1.87 * 110, 3 * 1.87 * 110], abs=2)
    rows = [(height / 110 - 0.45) / (1.75 + 0.54) for _, height in sheets]
    assert rows == pytest.approx([3, 1], abs=0.02)
    *images, mean = [x for x in capsys.readouterr().out.splitlines() if "sheet-" not in x]
    number = r"(\d+\.\d)"
    words = rf"model {number}, mean color {number}, neighbors {number}"
    errors = [re.fullmatch(rf"photos/\d\.png: {words}", line).groups() for line in images]
    means = re.fullmatch(rf"mean of 7: {words}, of 255 gray levels", mean).groups()
    columns = np.array(errors, float).mean(axis=0)
    assert np.array(means, float) == pytest.approx(columns, abs=0.11)


def test_the_known_patches_stay_and_the_masked_ones_are_the_models(photos):
    restorer = Restorer(random_predictor(), 0.5, 3)
    files = [str(photos / f"{index}.png") for index in range(3)]
    mask, model = restorer.mask, masked.predictor(create_model(TINY), "pixels")
    places = np.flatnonzero(mask[::4, ::4])
    assert mask.shape == (16, 12) and len(places) == 6
    pretrained = random_predictor()
    params = {**pretrained.params, **pretrained.masked}
    corruption = masked.Corruption(places[None], mask[::4, ::4].reshape(1, -1), np.arange(12)[None])
    for file, found in zip(files, restorer(files, 2), strict=True):
        assert found.file == file
        inputs = found.image[None] * 2 - 1
        (guess,) = model.apply({"params": params}, inputs, corruption)
        expected = found.image.copy()
        for place, patch in zip(places, np.asarray(guess), strict=True):
            row, column = divmod(place, 3)
            pixels = np.clip(patch.reshape(4, 4, 3) / 2 + 0.5, 0, 1)
            expected[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = pixels
        np.testing.assert_allclose(found.restored, expected, atol=1e-5)
        np.testing.assert_array_equal(found.restored[~mask], found.image[~mask])
        assert (found.masked[mask] == 0.5).all()
        np.testing.assert_array_equal(found.masked[~mask], found.image[~mask])
        assert found.errors["model"] == pytest.approx(error(found.image, expected, mask), rel=1e-4)


@pytest.mark.parametrize(
    ("config", "target"), [(TINY, "mean_color"), (TINY, "downsized"), (HYBRID, "pixels")]
)
def test_other_targets_and_hybrids_are_restored(photos, config, target):
    restorer = Restorer(random_predictor(target, config), 0.5, 0)
    assert restorer.target == target
    (found,) = restorer([str(photos / "0.png")], 4)
    np.testing.assert_array_equal(found.restored[~restorer.mask], found.image[~restorer.mask])
    if target == "pixels":
        return
    # A 3-bit color is the middle of one of eight levels.
    levels = found.restored[restorer.mask] * 8 - 0.5
    np.testing.assert_allclose(levels, levels.round(), atol=1e-4)
    patches = masked.cut_patches(found.restored[None], 4)[0, restorer.mask[::4, ::4].ravel()]
    is_plain = (patches == patches[:, :1, :1]).all()
    assert is_plain == (target == "mean_color")


@pytest.mark.usefixtures("loaded", "photos")
def test_the_mask_is_a_function_of_seed_and_share():
    first, again, other = (Restorer(random_predictor(), 0.5, seed).mask for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert Restorer(random_predictor("mean_color"), 0.25, 5).mask.mean() == 0.25
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert run("photos/1.png", "photos/2.png", "--output", folder, "--seed", seed) == 0
    # Whatever is restored beside it, one at a time or several.
    assert run("photos/2.png", "--output", "d", "--seed", 5, "--batch_size", 1) == 0
    a, b, c, d = (np.asarray(Image.open(f"{x}/2.restored.png")).astype(int) for x in "abcd")
    np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(a, d, atol=1)
    assert abs(a - c).max() > 20


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--share", "0"], "'0' is not a number above 0 and below 1"),
        (["--share", "nan"], "'nan' is not a number above 0 and below 1"),
        (["--share", "0.01"], r"--share 0.01 of 12 patches is 0: one must be masked at least"),
        (["--share", "0.99"], r"--share 0.99 of 12 patches is 12: .* and one left$"),
        (["--seed", "-1"], "'-1' is not a whole number from 0 to 4294967295"),
        (["--seed", "4294967296"], "is not a whole number from 0"),
        (["photos"], "photos/0.png have restored images of one name: restore them into folders"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(photos, tmp_path, words, message):
    (tmp_path / "more").mkdir()
    (tmp_path / "more/0.png").write_bytes((photos / "0.png").read_bytes())
    with pytest.raises(UserError, match=message) as refused:
        run("more", *words, "--output", "out")
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("loaded", "photos")
def test_an_output_among_the_images_is_refused():
    with pytest.raises(UserError, match="which restored images would replace or be taken for"):
        run("photos", "--output", "photos/out")


@pytest.mark.usefixtures("loaded")
def test_what_cannot_be_read_is_a_line_and_an_exit_code(photos, tmp_path, capsys):
    (photos / "9.jpg").write_bytes(b"nothing")
    assert run("photos", "--output", "out") == 1
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "9.jpg is not an image" in told.err
    assert "mean of 7:" in told.out
    assert run("photos/9.jpg", "--output", "none") == 2
    assert not list((tmp_path / "none").iterdir())


@pytest.mark.usefixtures("photos")
def test_a_model_that_predicts_no_patches_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match=f"^{finished}.* has no head that predicts patches: train"):
        restore.main(["photos", "--checkpoint", str(finished), "--output", "out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_embedding": None}, "mask_embedding is missing"),
        ({"mask_embedding": np.zeros((1, 1, 9))}, r"mask_embedding has shape \(1, 1, 9\)"),
        ({"patch_head": {"bias": np.zeros(48)}}, "patch_head/kernel is missing"),
        ({"patch_head": {"bias": np.zeros(47)}}, "patch_head of 47 outputs, which are no predi"),
        ({"patch_head": None}, "patch_head of 0 outputs"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(change, message):
    pretrained = random_predictor()
    of_masked = {k: x for k, x in {**pretrained.masked, **change}.items() if x is not None}
    with pytest.raises(UserError, match=message):
        Restorer(dataclasses.replace(pretrained, masked=of_masked), 0.5, 0)


def test_predictions_that_are_not_finite_are_refused(photos):
    pretrained = random_predictor()
    head = pretrained.masked["patch_head"]
    head["bias"][3] = np.inf
    with pytest.raises(UserError, match="^random predicts what is not finite: mend it$"):
        list(Restorer(pretrained, 0.5, 0)([str(photos / "0.png")], 1))


def test_the_small_config_is_appendix_b12_with_whole_patches():
    config = config_files.load("restoration:folder:some/photos").config
    check_config(config)
    assert (config.objective, config.dataset.name) == ("masked_patches", "folder:some/photos")
    assert dict(config.masking) == {"rate": 0.5, "target": "pixels"}
    assert config.dataset.image_size // config.model.patch_size == 12


SIDE, PATCH = 16, 4


def draw_stripes(folder, count, seed):
    """Images of horizontal stripes of a pixel each: a patch tells all others of its row."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        colors = rng.integers(0, 256, (SIDE, 1, 3))
        pixels = np.broadcast_to(colors, (SIDE, SIDE, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03}.png")


def test_stripes_are_restored_by_who_has_learned_them(masked_config, tmp_path, capsys):
    draw_stripes(tmp_path / "stripes/train/any", 512, seed=1)
    draw_stripes(tmp_path / "stripes/test/any", 24, seed=2)
    config = masked_config(
        batch_size=32,
        ema_decay=0.0,
        log_every="100 steps",
        checkpoint_every="200 steps",
        **{
            "dataset.name": f"folder:{tmp_path / 'stripes'}",
            "dataset.image_size": SIDE,
            "dataset.random_crop": False,
            "evals.val.every": "200 steps",
            "masking.target": "pixels",
            "model.patch_size": PATCH,
            "model.hidden_size": 64,
            "model.mlp_dim": 64,
            "model.num_heads": 4,
            "model.dropout_rate": 0.0,
            "model.position_embedding": "sincos2d",
            "optimizer.weight_decay": 0.0,
            "schedule.base_lr": 5e-3,
        },
    )
    errors = {}
    for steps in (1, 200):
        config.duration, workdir = f"{steps} steps", tmp_path / f"run{steps}"
        config.schedule.warmup = "0 steps"
        train.train(config.copy_and_resolve_references(), workdir)
        capsys.readouterr()
        words = [str(tmp_path / "stripes/test"), "--checkpoint", str(workdir), "--seed", "0"]
        assert restore.main([*words, "--output", str(tmp_path / f"out{steps}")]) == 0
        told = capsys.readouterr().out
        found = re.search(
            r"^mean of 24: model (.+), mean color (.+), neighbors (.+), of", told, re.M
        )
        errors[steps], mean_color, neighbors = map(float, found.groups())
    # Uniform colors are 256 / sqrt(12) = 73.9 from their mean.
    assert mean_color == pytest.approx(74, abs=4)
    assert errors[1] > 65
    assert errors[200] < 20 < neighbors
