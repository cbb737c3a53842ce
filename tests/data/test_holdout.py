"""What is held out, and the file that says so."""

import csv
import os

import pytest

from vit_jax.data import holdout
from vit_jax.data.holdout import Partition, Row
from vit_jax.errors import UserError


@pytest.mark.parametrize(
    ("images", "share", "expected"),
    [
        (0, 0.2, 0), (1, 0.2, 0), (1, 0.9, 0), (2, 0.2, 1), (2, 0.9, 1), (3, 0.2, 1), (7, 0.2, 1),
        (8, 0.2, 2), (10, 0.2, 2), (10, 0.99, 9), (99, 0.1, 10), (1000, 0.001, 1), (999, 0.25, 250),
    ],
)  # fmt: skip
def test_a_class_gives_its_share_and_of_two_images_one(images, share, expected):
    assert len(holdout.draw([[f"{i}.jpg" for i in range(images)]], share)) == expected


def test_what_is_held_out_does_not_depend_on_order_or_on_other_classes():
    first, second = ([f"{name}/{i}.jpg" for i in range(50)] for name in "ab")
    held_out = holdout.draw([first, second], 0.2)
    assert held_out == holdout.draw([second[::-1], first[::-1]], 0.2)
    assert held_out & set(first) == holdout.draw([first], 0.2)


def test_new_images_hardly_move_the_others():
    names = [f"{i}.jpg" for i in range(1000)]
    before, after = holdout.draw([names[:900]], 0.2), holdout.draw([names], 0.2)
    # Of the 180 smallest of 900 numbers, those beyond the 200th of 1,000: about none.
    assert len(before - after) <= 12
    assert 5 <= len(after & set(names[900:])) <= 40  # 20 are expected, sd 4.


ROWS = {
    "a/1.jpg": Row("a", "train", 1234),
    'a/with, "all"\nof it.jpg': Row("a", "validation", 2**40),
    os.fsdecode(b"b/\xff.png"): Row("b;c", "broken", 0),
}


def test_a_partition_is_read_as_it_was_written(tmp_path):
    holdout.record(Partition(ROWS), tmp_path)
    assert holdout.read(tmp_path / "split.csv") == Partition(ROWS)
    text = (tmp_path / "split.csv").read_text(errors="surrogateescape")
    assert text.splitlines()[:2] == ["path,class,split,bytes", "a/1.jpg,a,train,1234"]
    with open(tmp_path / "split.csv", errors="surrogateescape", newline="") as file:
        columns = ("class", "split", "bytes")
        found = {row["path"]: tuple(row[x] for x in columns) for row in csv.DictReader(file)}
    assert found == {name: tuple(map(str, row)) for name, row in ROWS.items()}
    assert os.listdir(tmp_path) == ["split.csv"]
    holdout.record(None, tmp_path)  # A failed start of another data set.
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "its first line is not path,class,split,bytes"),
        (b"path,label\na,b\n", "its first line is not path,class,split,bytes"),
        (b"path,class,split,bytes\na.jpg,a\n", r"line 2 is \['a.jpg', 'a'\]"),
        (b"path,class,split,bytes\na.jpg,a,\x1b[2J,1\n", r"line 2 is \['a.jpg', 'a', '.x1b\[2J'"),
        (b"path,class,split,bytes\na.jpg,a,train,x\n", "invalid literal for int"),
        (b'path,class,split,bytes\n"a.jpg,a,train,1\n', "unexpected end of data"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_none_is_told_in_one_line(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "split.csv").write_bytes(content)
    with pytest.raises(UserError, match=f"split.csv cannot be read: .*{reason}") as error:
        holdout.read(tmp_path / "split.csv")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/20", "best", "best/10", "best/"])
def test_the_partition_of_a_checkpoint_is_that_of_its_run(tmp_path, part):
    run = tmp_path / "run"
    (run / part).mkdir(parents=True)
    assert holdout.of_checkpoint(f"{run}/{part}") is None
    holdout.record(Partition(ROWS), run)
    assert holdout.of_checkpoint(f"{run}/{part}") == Partition(ROWS)
    assert holdout.of_checkpoint(str(run / "weights.npz")) is None
    assert holdout.of_checkpoint("B_16") is None


@pytest.mark.parametrize(
    ("there", "larger", "fits"),
    [(4, 0, True), (4, 2, True), (4, 3, False), (2, 0, True), (2, 1, False), (0, 0, False)],
)
def test_a_partition_fits_what_has_half_of_its_images(there, larger, fits):
    rows = {f"{i}.jpg": Row("a", "train", 10 + i) for i in range(4)}
    partition = Partition(rows | {f"{i}.png": Row("a", "broken", 0) for i in range(9)})
    sizes = {f"{i}.jpg": 10 + i + (i < larger) for i in range(there)}
    assert partition.fits(sizes | {f"new{i}.jpg": 10 for i in range(100)}) == fits
    assert partition.fits_by_name(sizes) == (there >= 2)
