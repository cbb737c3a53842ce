import csv
import os
import pathlib
import subprocess
import sys

import pytest

from vit_jax.checkpoints import augreg, remote
from vit_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]

# In the order of the docstring of get_augreg_df, google-research/vision_transformer.
COLUMNS = (
    *("name", "ds", "lr", "aug", "wd", "do", "sd", "best_val", "final_val", "final_test"),
    *("adapt_ds", "adapt_lr", "adapt_steps", "adapt_resolution"),
    *("adapt_final_val", "adapt_final_test", "params", "infer_samples_per_sec"),
    *("filename", "adapt_filename"),
)

# The recommended files of the README of google-research/vision_transformer.
R26 = "R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0"
R26_IMAGENET = f"{R26}--imagenet2012-steps_20k-lr_0.01-res_384"
R26_OTHER = "R26_S_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.03-do_0.0-sd_0.0"
R26_SMALL_DATA = "R26_S_32-i1k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0"
TI = "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0"

ROWS = [
    # name, ds, final_val, filename, adapt_ds, adapt_resolution, adapt_final_val, adapt_filename
    ("R26+S/32", "i21k", "0.41", R26_OTHER, "imagenet2012", "384", "0.99", f"{R26_OTHER}--best"),
    ("R26+S/32", "i21k", "0.45", R26, "imagenet2012", "224", "0.81", f"{R26}--imagenet2012-224"),
    ("R26+S/32", "i21k", "0.45", R26, "imagenet2012", "384", "0.85", R26_IMAGENET),
    ("R26+S/32", "i21k", "0.45", R26, "imagenet2012", "384", "0.84", f"{R26}--imagenet2012-b"),
    ("R26+S/32", "i21k", "0.45", R26, "oxford-iiit-pet", "224", "0.93", f"{R26}--pet"),
    ("R26+S/32", "i21k", "0.45", R26, "resisc45", "224", "", f"{R26}--resisc45"),
    ("R26+S/32", "i1k", "0.78", R26_SMALL_DATA, "cifar100", "224", "0.9", f"{R26_SMALL_DATA}--c"),
    ("R26+S/32", "i21k", "", "R26_S_32-i21k-lost", "cifar100", "224", "0.99", "lost--cifar100"),
    ("S/32", "i21k", "0.99", "S_32-i21k-x", "imagenet2012", "224", "0.99", "S_32-i21k-x--y"),
    ("Ti/16", "i21k", "0.30", TI, "imagenet2012", "224", "0.75", f"{TI}--a"),
    ("Ti/16", "i21k", "0.30", TI, "imagenet2012", "224.0", "0.75", f"{TI}--b"),
    ("B/8", "i21k", "", "B_8-i21k-x", "imagenet2012", "224", "0.8", "B_8-i21k-x--y"),
]


@pytest.fixture
def index_csv(tmp_path):
    keys = "name ds final_val filename adapt_ds adapt_resolution adapt_final_val adapt_filename"
    path = tmp_path / "cache" / "augreg" / "index.csv"
    path.parent.mkdir(parents=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="0.5")
        writer.writeheader()
        writer.writerows(dict(zip(keys.split(), row, strict=True)) for row in ROWS)
    return path


@pytest.fixture
def index(index_csv):
    return augreg.read_index(index_csv)


@pytest.mark.parametrize("name", ["R26_S_32", "R26+S/32"])
def test_the_pretrained_file_of_the_best_upstream_score_is_recommended(index, name):
    assert augreg.recommended(index, name) == R26
    assert augreg.recommended(index, name, upstream="i1k") == R26_SMALL_DATA


def test_the_finetune_is_the_best_one_of_the_recommended_pretrained_file(index):
    # R26_OTHER has a better fine-tune, but was worse upstream.
    assert augreg.recommended(index, "R26_S_32", "imagenet2012") == R26_IMAGENET
    small = augreg.recommended(index, "R26_S_32", "imagenet2012", 224)
    assert small == f"{R26}--imagenet2012-224"


def test_a_data_set_goes_by_its_name_in_tfds_too(index):
    assert augreg.recommended(index, "R26_S_32", "oxford_iiit_pet") == f"{R26}--pet"


def test_of_equals_the_first_is_recommended(index):
    assert augreg.recommended(index, "Ti_16", "imagenet2012", 224) == f"{TI}--a"


def test_query_gives_every_row_that_fits(index):
    assert len(augreg.query(index, "R26_S_32")) == 7
    assert len(augreg.query(index, "R26_S_32", dataset="imagenet2012")) == 4
    rows = augreg.query(index, "R26_S_32", dataset="imagenet2012", resolution=384)
    assert [row.adapt_final_val for row in rows] == [0.99, 0.85, 0.84]
    assert [row.ds for row in augreg.query(index, "R26_S_32", upstream="i1k")] == ["i1k"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("R26_S_33",), "'R26_S_33' is no model: there is B_8, R26_S_32"),
        (("Ti_16", "pets"), "'pets' is no fine-tuning data set of Ti_16: there is imagenet2012"),
        (("Ti_16", "imagenet2012", 384), "384 is no resolution of Ti_16 on imagenet2012: there is"),
        (("Ti_16", None, 384), "resolution 384 without a data set"),
        (("Ti_16", None, None, "i1k"), "'i1k' is no upstream data set of Ti_16: there is i21k"),
        # The only fine-tune on CIFAR-100 is of another pre-trained file.
        (("R26_S_32", "cifar100"), "'cifar100' is no fine-tuning data set of R26_S_32"),
        (("R26_S_32", "resisc45"), "has no adapt_final_val"),
        (("B_8",), "B_8-i21k-x has no final_val"),
    ],
)
def test_what_is_not_in_the_index_is_one_line(index, arguments, message):
    with pytest.raises(UserError) as caught:
        augreg.recommended(index, *arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "column name is missing"),
        ("<html>\n<body>not found</body>", "column name is missing"),
        (",".join(COLUMNS), "has no rows"),
        (",".join(COLUMNS) + "\nB/16,i21k", "a row is cut short"),
        (",".join(COLUMNS) + "\n" + ",".join(["x"] * len(COLUMNS)), "could not convert"),
        (",".join(COLUMNS) + "\n" + ",".join(["inf"] * len(COLUMNS)), "infinity"),
        (",".join(COLUMNS) + '\n"' + "x" * 200_000, "field larger than field limit"),
        ("\x00\xff", "not the index"),
    ],
)
def test_a_damaged_index_is_one_line(tmp_path, text, message):
    path = tmp_path / "index.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        augreg.read_index(path)
    assert message in str(caught.value)
    assert "delete it, and it is fetched again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_index_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / "index.csv", "wb") as file:
        file.truncate(augreg.MAX_BYTES + 1)
    with pytest.raises(UserError, match="larger than 64 MiB"):
        augreg.read_index(tmp_path / "index.csv")


def test_the_name_of_a_model_fetches_its_recommended_file(index_csv, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(index_csv.parents[1]))
    path = index_csv.parent / f"{R26}.npz"
    path.write_bytes(b"weights")
    assert remote.fetch("R26_S_32") == path


def test_an_index_cannot_name_a_file_outside_the_cache(index_csv, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(index_csv.parents[1]))
    evil = "R26_S_32-/../../../x"
    index_csv.write_text(index_csv.read_text().replace(R26, evil))
    with pytest.raises(UserError, match="is no path in the bucket"):
        remote.fetch("R26_S_32")


def command(index_csv, *arguments):
    environment = {
        **os.environ,
        "VIT_JAX_CACHE": str(index_csv.parents[1]),
        "VIT_JAX_BUCKET_URL": "http://127.0.0.1:1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "vit_jax.checkpoints", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def test_the_command_lists_what_is_recommended(index_csv):
    code, out, err = command(index_csv, "R26_S_32")
    assert (code, err) == (0, [])
    assert [line.split() for line in out] == [
        ["data", "set", "pixels", "validation", "test", "name"],
        ["i21k", "0.4500", f"augreg/{R26}"],
        ["imagenet2012", "384", "0.8500", "0.5000", f"augreg/{R26_IMAGENET}"],
        ["imagenet2012", "224", "0.8100", "0.5000", f"augreg/{R26}--imagenet2012-224"],
        ["oxford-iiit-pet", "224", "0.9300", "0.5000", f"augreg/{R26}--pet"],
    ]


def test_the_command_fetches_the_first_that_it_lists(index_csv):
    path = index_csv.parent / f"{R26_IMAGENET}.npz"
    path.write_bytes(b"weights")
    code, out, err = command(index_csv, "R26+S/32", "--dataset=imagenet2012", "--fetch")
    assert (code, err) == (0, [])
    assert len(out) == 4
    assert R26_IMAGENET in out[1]
    assert out[-1] == str(path)


def test_the_command_says_where_a_single_file_lies(index_csv):
    code, out, err = command(index_csv, "ViT-B_16")
    assert (code, err) == (0, [])
    place = index_csv.parents[1] / "imagenet21k" / "ViT-B_16.npz"
    url = "http://127.0.0.1:1/imagenet21k/ViT-B_16.npz"
    assert out[1].split() == ["ViT-B_16", url, str(place)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "error: the following arguments are required: name"),
        (("B_17",), "error: 'B_17' is no name of published weights: give ViT-B_16"),
        (("ViT-B_16", "--dataset=cifar100"), "error: 'ViT-B_16' is one file: --dataset"),
        (("Ti_16", "--resolution=x"), "error: argument --resolution: 'x' is not a whole number"),
        (("Ti_16", "--fetch"), "error: augreg/Ti_16-i21k"),
        (("hf:x", "--fetch"), "error: 'hf:x' is no name on the Hugging Face hub"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(index_csv, arguments, message):
    code, _, err = command(index_csv, *arguments)
    assert code == 2
    assert len(err) == 1
    assert err[0].startswith(message)
