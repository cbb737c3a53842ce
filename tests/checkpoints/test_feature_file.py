"""Features that are kept, and the file that is not of them."""

import numpy as np
import pytest

from vit_jax.checkpoints.feature_file import (
    Features,
    fingerprint_params,
    fingerprint_text,
    read_features,
    write_features,
)
from vit_jax.errors import UserError

PRINTS = {"weights": b"\x00\xff" * 16, "images": bytes(range(32))}
ROWS = {"train": 6, "test": 2}


def splits():
    rng = np.random.default_rng(0)
    return {
        name: Features(rng.normal(size=(n, 3)).astype(np.float32), np.arange(n, dtype=np.int32))
        for name, n in ROWS.items()
    }


def read(path, prints=PRINTS, rows=ROWS, width=3, num_classes=6):
    return read_features(path, prints, rows, width, num_classes)


def test_they_are_read_to_the_bit_and_numpy_opens_them(tmp_path):
    path = tmp_path / "a.npz"
    write_features(path, splits(), PRINTS)
    found = read(path)
    with np.load(path) as arrays:
        for name, written in splits().items():
            assert found[name].values.tobytes() == written.values.tobytes()
            assert found[name].labels.tolist() == written.labels.tolist()
            np.testing.assert_array_equal(arrays[f"{name}/features"], written.values)
            np.testing.assert_array_equal(arrays[f"{name}/labels"], written.labels)
    assert [x.name for x in tmp_path.iterdir()] == ["a.npz"]


def test_several_labels_are_read_where_they_are_asked_for(tmp_path):
    path, several = tmp_path / "a.npz", {}
    for name, of_one in splits().items():
        several[name] = Features(of_one.values, np.eye(6, dtype=np.int32)[of_one.labels])
    write_features(path, several, PRINTS)
    found = read_features(path, PRINTS, ROWS, 3, 6, several_labels=True)
    np.testing.assert_array_equal(found["test"].labels, several["test"].labels)
    with pytest.raises(UserError, match="has no whole features of train"):
        read(path)
    several["test"].labels[0, 0] = 2
    write_features(path, several, PRINTS)
    with pytest.raises(UserError, match="has no whole features of test"):
        read_features(path, PRINTS, ROWS, 3, 6, several_labels=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prints": {**PRINTS, "images": b"\x01" * 32}}, "holds features of other images: name"),
        ({"prints": dict.fromkeys(PRINTS, b"\x01" * 32)}, "of other weights and images: name"),
        ({"rows": {"train": 6, "test": 3}}, "has no whole features of test: remove it"),
        ({"width": 4}, "has no whole features of train: remove it"),
        ({"num_classes": 5}, "has no whole features of train: remove it"),
        ({"prints": {"weights": PRINTS["weights"]}}, "holds no features of `probe`"),
    ],
)
def test_what_is_of_something_else_is_one_line(tmp_path, change, message):
    write_features(tmp_path / "a.npz", splits(), PRINTS)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / "a.npz", **change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("labels", [[0.5, 1], [-1, 0], [0, 1e30]])
def test_labels_that_are_none_are_refused(tmp_path, labels):
    damaged = splits() | {"test": Features(np.ones((2, 3), np.float32), np.float32(labels))}
    write_features(tmp_path / "a.npz", damaged, PRINTS)
    with pytest.raises(UserError, match="has no whole features of test"):
        read(tmp_path / "a.npz")


def test_pickled_objects_are_never_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", **{"train/features": np.array([{}, {}], object)})
    with pytest.raises(UserError, match="holds pickled Python objects, which are never loaded"):
        read(tmp_path / "a.npz")


def test_a_fingerprint_changes_with_every_value_name_and_place():
    def params(kernel, name="kernel"):
        return {"head": {name: np.array(kernel, np.float32)}}

    found = {
        fingerprint_params(x)
        for x in (
            params([1, 2]), params([2, 1]), params([1, 2.0000002]), params([[1, 2]]),
            params([1, 2], "bias"),
        )
    }  # fmt: skip
    assert len(found) == 5
    assert fingerprint_params(params([1, 2])) == fingerprint_params(params([1, 2]))
    texts = [("a", ["b"]), ("a", ["b", ""]), ("ab", [""]), ("a", ["b\udcff"])]
    assert len({fingerprint_text(x, lines=lines) for x, lines in texts}) == 4
