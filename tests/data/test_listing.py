"""Lists of images and labels: what they mean, and what is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from sklearn.preprocessing import MultiLabelBinarizer

from vit_jax.data.datasets import FileRules, name_of, open_dataset, open_evaluation
from vit_jax.errors import UserError

ROWS = [("a.png", "10"), ("in/b.png", "9"), ("in/../c.png", "9"), ("d.png", "10")]


@pytest.fixture
def images(tmp_path):
    """A folder of four images; b.png lies in one of its own."""
    (tmp_path / "in").mkdir()
    for index, name in enumerate(("a", "in/b", "c", "d")):
        Image.new("RGB", (4, 4), (index, 0, 0)).save(tmp_path / f"{name}.png")
    return tmp_path


def write(folder, text, suffix="csv"):
    path = folder / f"list.{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return f"list:{path}"


def shade(example):
    """The red of an image, which tells the four apart."""
    with open(example["id"], "rb") as file:
        assert file.read() == example["image"]
    return Image.open(example["id"]).getpixel((0, 0))[0]


def labels_of(*sources):
    """The class of every image by its shade."""
    return {shade(x): source.class_names[x["label"]] for source in sources for x in source}


def refuse(name, **options):
    with pytest.raises(UserError) as caught:
        open_dataset(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_csv_and_json_lines_say_the_same(images):
    rows = [(str(images / path) if path == "d.png" else path, label) for path, label in ROWS]
    table = "\ufeffPath,width, label\r\n" + "".join(f"{p},4,{x}\r\n" for p, x in rows) + "\r\n"
    lines = "\n".join(json.dumps({"path": p, "label": int(x)}) for p, x in rows)
    for name in (write(images, table), write(images, lines, "jsonl")):
        train, held_out = open_dataset(name)
        assert labels_of(train, held_out) == {0: "10", 1: "9", 2: "9", 3: "10"}
        assert train.class_names == ("9", "10")  # In the order of the numbers.
        assert (train.num_examples, held_out.num_examples) == (2, 2)
        assert not train.multi_label and train.root == str(images)
        assert labels_of(open_evaluation(name)) == labels_of(train, held_out)
        assert {row.split for row in train.partition.rows.values()} == {"train", "validation"}


def test_a_table_is_read_as_by_tensorflow(images):
    """TensorFlow's reader is of RFC 4180 too, and shares no code with Python's."""
    names = ['a,"b".png', "a b.png", "ä.png", "'c'.png", "d;e.png"]
    for index, name in enumerate(names):
        Image.new("RGB", (4, 4), (index, 0, 0)).save(images / name)
    rows = ['"a,""b"".png","rose, ""red""",1', 'a b.png, lily ,"2"', '"ä.png",ünder,',
            "'c'.png,'rose',3", '"d;e.png","a;b",4']  # fmt: skip
    columns = tf.io.decode_csv(rows, [[""]] * 3)[:2]
    expected = {path.decode(): label.decode().strip() for path, label in zip(
        *(column.numpy() for column in columns), strict=True)}  # fmt: skip
    assert [*expected] == names
    source = open_evaluation(write(images, "\r\n".join(["path,label,size", *rows])))
    found = {Path(x["id"]).name: source.class_names[x["label"]] for x in source}
    assert found == expected
    assert source.class_names == tuple(sorted(expected.values()))


def test_splits_are_those_of_the_list(images):
    names = ["train", "val", "train", "test"]
    lines = [f"{path},{x},{split}" for (path, x), split in zip(ROWS, names, strict=True)]
    name = write(images, "\n".join(["path,label,split", *lines]))
    train, validation = open_dataset(name)
    assert (labels_of(train), labels_of(validation)) == ({0: "10", 2: "9"}, {1: "9"})
    assert labels_of(open_evaluation(name, split="test")) == {3: "10"}
    assert train.partition is None and validation.split == "validation"


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_several_labels_are_ones_in_the_columns_of_their_classes(images, suffix):
    labels = [["red", "open"], [], ["open"], ["shut", "red", "red"]]
    paths = [path for path, _ in ROWS]
    text = {
        "csv": "\n".join(
            ["path,labels", *(f"{p}, {' ; '.join(x)};" for p, x in zip(paths, labels, strict=True))]
        ),
        "jsonl": "\n".join(
            json.dumps({"path": p, "labels": x}) for p, x in zip(paths, labels, strict=True)
        ),
    }[suffix]
    source = open_evaluation(write(images, text, suffix))
    expected = MultiLabelBinarizer().fit(labels)
    assert source.multi_label and source.class_names == tuple(expected.classes_)
    found = {shade(example): example["label"] for example in source}
    assert all(x.dtype == np.int64 for x in found.values())
    np.testing.assert_array_equal([found[i] for i in range(4)], expected.transform(labels))


def test_the_rarest_label_decides_where_an_image_is_divided(images):
    image = (images / "a.png").read_bytes()
    lines = ["path,labels"]
    for index in range(20):
        (images / f"{index}.png").write_bytes(image)
        lines.append(f"{index}.png,common{';rare' if index < 5 else ''}")
    train, held_out = open_dataset(write(images, "\n".join(lines)))
    counts = [sum(example["label"] for example in source) for source in (train, held_out)]
    np.testing.assert_array_equal(counts, [[16, 4], [4, 1]])  # of 20 common and 5 rare ones


def test_lines_that_repeat_others_count_once(images):
    (images / "link.png").symlink_to("a.png")
    others = [
        "./a.png",
        images / "a.png",
        f"../{images.name}/a.png",
        "link.png",
        images / "in/../a.png",
    ]
    text = "".join(f"{path},x\n" for path in others)
    for directory in (images, Path(os.path.relpath(images))):
        name = write(directory, f"path,label\na.png,x\n{text}c.png,y\n")
        source = open_evaluation(name)
        assert labels_of(source) == {0: "x", 2: "y"}
        assert source.notes[1].endswith("5 passed over that repeat other lines")
    (images / "list.csv").write_text(f"path,label\na.png,x\n{images}/a.png,y\n")
    assert "1 lines contradict others" in refuse(name)


def test_what_is_wrong_with_images_is_told_at_once(images):
    (images / "broken.png").write_bytes(b"")
    os.mkfifo(images / "pipe.png")
    name = write(
        images,
        "path,label,split\na.png,x,train\nin/b.png,y,test\nbroken.png,x,train\ngone.png,x,train\n"
        "pipe.png,x,train\nc.png,x,train\nc.png,x,test\nd.png,x,test\nd.png,z,test\n",
    )
    message = refuse(name, files=FileRules(least_classes=2))
    assert message.startswith(f"list '{images}/list.csv' has 4 problems: (1) class 'y' is not in")
    assert "(2) 3 files are no images or are cut off (broken.png, gone.png, pipe.png)" in message
    assert "(3) 2 lines contradict others" in message
    assert "(c.png in lines 7 and 8, d.png in lines 9 and 10)" in message
    assert "(4) list" in message and "has one class alone, 'x'" in message


def test_broken_images_are_left_out_if_so_asked(images):
    name = write(images, "path,label\na.png,x\nc.png,y\ngone.png,y\n")
    assert f"{images}/gone.png of line 4 cannot be read (No such file" in refuse(name)
    source = open_evaluation(name, files=FileRules(broken="skip"))
    assert labels_of(source) == {0: "x", 2: "y"}
    assert source.notes[1].endswith("1 left out that are broken: gone.png")
    assert source.partition.rows["gone.png"] == ("y", "broken", 0)


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        ("csv", "", "its first line is '': it must name the columns, path and label, or path"),
        ("csv", "path;label\na.png;x", "its first line is 'path;label': it must name the columns"),
        ("csv", "path,label,labels\n", "its first line is 'path,label,labels'"),
        ("csv", "path,label,path\n", "its first line is 'path,label,path'"),
        ("csv", "path,label\n", "has no images: write a line for each"),
        ("csv", "path,label\na.png,x\nb,c.png,x\n", "line 3 has 3 columns and the first 2: put"),
        ("csv", "path,label\na.png,\n", "line 2 has label '': it must be text of 1 to 200"),
        ("csv", f"path,label\na.png,{'x' * 201}\n", "it must be text of 1 to 200 characters"),
        ("csv", "path,label\n ,x\n", "line 2 has no path that can be one"),
        ("csv", "path,label,split\na.png,x,tarin\n", "line 2 has split 'tarin': use train, test"),
        ("csv", "path,label,split\na.png,x,\n", "line 2 has split '': use train, test"),
        ("csv", 'path,label\n"a.png,x\n', "unexpected end of data"),
        ("csv", f"path,label\n{'x' * 140_000},x\n", "field larger than field limit"),
        ("csv", "path,label\nä.png,x\n".encode("latin-1"), "it is no UTF-8 text, save it as that"),
        ("csv", "path,label\n".encode("utf-16"), "it is no UTF-8 text, save it as that"),
        ("csv", "path,labels\na.png,;\n", "has no label in it: write one for each image"),
        ("csv", "path,label\na\0.png,x\n", "embedded null"),
        ("jsonl", "{", "line 1 is no JSON: Expecting property name"),
        ("jsonl", "[" * 100_000, "line 1 is no JSON: "),
        ("jsonl", "[1]", "line 1 is [1]: it must be an object"),
        ("jsonl", '{"path": "a.png"}', "line 1 has the keys 'path': it must have \"path\", and"),
        ("jsonl", '{"path": 3, "label": "x"}', "line 1 has no path that can be one"),
        ("jsonl", r'{"path": "\ud800", "label": "x"}', "line 1 has no path that can be one"),
        ("jsonl", r'{"path": "a.png", "label": "\ud800"}', "which is no text"),
        ("jsonl", '{"path": "a.png", "label": true}', "line 1 has label True: it must be text"),
        ("jsonl", '{"path": "a.png", "labels": "x"}', "labels 'x': they must be a list of texts"),
        (
            "jsonl",
            '{"path": "a.png", "label": "x"}\n\n{"path": "c.png", "labels": ["x"]}',
            "line 3 differs from line 1 in what it has: all have label or all labels",
        ),
        (
            "jsonl",
            '{"path": "a.png", "label": "x"}\n{"path": "c.png", "label": "x", "split": "test"}',
            "line 2 differs from line 1 in what it has",
        ),
        ("txt", "path,label\n", "ends in neither .csv nor .jsonl: rename it"),
    ],
)
def test_a_list_that_is_none_is_told_in_one_line(images, suffix, content, message):
    assert message in refuse(write(images, content, suffix))


def test_a_list_without_bounds_is_not_read(images):
    with open(images / "list.csv", "wb") as file:
        file.truncate(2**29 + 1)
    assert "has more than 512 MiB: divide it" in refuse(f"list:{images}/list.csv")


def test_a_path_names_a_folder_or_a_list(images):
    (images / "list.CSV").write_text("")
    assert name_of(str(images)) == name_of(f"{images}//") == f"folder:{images}"
    assert name_of("/") == "folder:/"
    assert name_of(f"{images}/list.CSV") == f"list:{images}/list.CSV"
    for path in ("a.png", "nowhere", "nowhere.csv"):
        with pytest.raises(UserError, match=f"'{images}/{path}' is no data set: give a folder"):
            name_of(f"{images}/{path}")
