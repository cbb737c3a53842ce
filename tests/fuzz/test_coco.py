"""Annotations in COCO's format: every object is one of an image that is there, or one line."""

import json

from hypothesis import strategies as st

from vit_jax.data.coco_folder import open_coco_folder

from .mutations import JSON, mutated, mutated_json
from .test_images import COLOR, encode

PNG = encode(COLOR, "PNG")
IMAGES = {"images/a.png": PNG, "images/b/b.png": PNG, "images/c.png": PNG[:40]}
NAME = "annotations/instances_default.json"
DOCUMENT = {
    "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b/b.png", "width": 4}],
    "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
    "annotations": [
        {"image_id": 1, "category_id": 3, "bbox": [0, 0, 3, 2.5], "iscrowd": 0, "area": 5},
        {"image_id": 2, "category_id": 5, "bbox": [1, 1, 1, 1], "segmentation": [[1, 2, 3]]},
    ],
}
VALUES = st.one_of(
    st.sampled_from(["../a.png", "/dev/zero", "", ".", "b", "\0", 1e400, -1, 2**70, [1, 2, 3, 4]]),
    JSON,
)


@st.composite
def folders(draw):
    text = json.dumps(DOCUMENT).encode()
    whole = draw(st.booleans())
    return IMAGES | {NAME: draw(mutated_json(DOCUMENT, VALUES) if whole else mutated(text))}


def read(folder):
    found = open_coco_folder(str(folder))
    assert found.class_names and len(set(found.class_names)) == len(found.class_names)
    for split in found.split_names:
        for file in found.splits[split]:
            assert file.path.startswith(f"{folder}/images/")
            boxes = file.label.of_image(COLOR.height, COLOR.width)
            assert ((boxes.classes >= 0) & (boxes.classes < len(found.class_names))).all()
            assert (boxes.corners[:, 2:] > boxes.corners[:, :2]).all()
            assert (abs(boxes.corners) < 2e9).all()


def test_coco(fuzz):
    fuzz("coco", folders(), read, sound=[IMAGES | {NAME: json.dumps(DOCUMENT).encode()}])
