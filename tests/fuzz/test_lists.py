"""Lists of images and labels: every image is where it says, or one line."""

import json
import os

from hypothesis import strategies as st

from vit_jax.data.listing import open_list

from .mutations import JSON, mutated, mutated_json
from .test_images import COLOR, encode

PNG = encode(COLOR, "PNG")
IMAGES = {"a.png": PNG, "b/b.png": PNG, "c.png": PNG[:40]}
CSV = b"path,label,split\na.png,rose,train\nb/b.png,rose,val\n"
LABELS = b'path,labels\na.png,rose;lily\n"b/b.png",\n./a.png,rose;lily\n'
OBJECTS = [{"path": "a.png", "label": "rose"}, {"path": "b/b.png", "label": 3}]
PATHS = st.sampled_from(["a.png", "../a.png", "/dev/zero", "/proc/self/mem", "", ".", "b", "\0"])


@st.composite
def lists(draw):
    kind = draw(st.sampled_from(["csv", "labels", "jsonl"]))
    if kind == "jsonl":
        lines = [draw(mutated_json(x, st.one_of(PATHS, JSON))) for x in OBJECTS]
        return IMAGES | {"list.jsonl": b"\n".join(lines)}
    return IMAGES | {"list.csv": draw(mutated(CSV if kind == "csv" else LABELS))}


def read(folder):
    (path,) = folder.glob("list.*")
    found = open_list(str(path))
    assert len(set(found.class_names)) == len(found.class_names)
    files = [file for split in found.split_names for file in found.splits[split]]
    assert len({os.path.normpath(file.path) for file in files}) == len(files)
    for split in found.split_names:
        if not found.splits[split]:
            continue
        for example in found.source(split):
            assert example["image"].startswith(PNG[:8])
            if found.multi_label:
                assert example["label"].shape == (len(found.class_names),)
            else:
                assert 0 <= example["label"] < len(found.class_names)


def test_lists(fuzz):
    objects = "\n".join(map(json.dumps, OBJECTS)).encode()
    sound = [IMAGES | {"list.csv": CSV}, IMAGES | {"list.jsonl": objects}]
    sound.append(IMAGES | {"list.csv": LABELS})
    fuzz("lists", lists(), read, sound=sound)
