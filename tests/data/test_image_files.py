import os
import threading

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import image_files
from vit_jax.data.image_files import find_images, read_batches
from vit_jax.data.protocols import evaluation
from vit_jax.errors import UserError


@pytest.fixture
def photos(tmp_path):
    """Gray images 0, 1 and 2 in a folder, each of its own level, and a text file between them."""
    for level, name in enumerate(["a.png", "b/c.PNG", "d.bmp"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (level, level, level)).save(tmp_path / name)
    (tmp_path / "c.jpg").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_stands_for_its_images_and_any_other_path_for_itself(photos):
    names = ["a.png", "b/c.PNG", "c.jpg", "d.bmp"]
    expected = ["absent", *(str(photos / name) for name in names), str(photos / "notes.txt")]
    assert find_images(["absent", str(photos), str(photos / "notes.txt")]) == expected
    (photos / "texts").mkdir()
    (photos / "texts/a.txt").write_text("no image")
    assert find_images([str(photos / "texts")]) == [str(photos / "texts")]


@pytest.mark.parametrize("channels", [1, 3])
def test_pipes_are_named_and_links_that_lead_back_not_followed(photos, channels):
    (photos / "b" / "around").symlink_to(photos)
    (photos / "itself.png").symlink_to("itself.png")
    for name in ("pipe.png", "pipe.npy"):
        os.mkfifo(photos / name)  # Whoever opened it would wait.
    found = find_images([str(photos)], channels)
    assert [os.path.relpath(file, photos) for file in found] == [
        *("a.png", "b/c.PNG", "c.jpg", "d.bmp", "itself.png", "pipe.png")
    ]
    errors = []
    view = evaluation("pad", 8, channels=channels)
    ((files, _),) = read_batches(found, view, 8, lambda error: errors.append(str(error)))
    assert len(files) == 3
    assert [error.split(" ")[0] for error in errors] == [*map(str, found[2:3]), *found[4:]]
    assert "is not a file" in errors[-1]
    assert "cannot be opened: Too many levels of symbolic links" in errors[-2]


def test_batches_have_one_shape_and_leave_out_what_cannot_be_read(photos):
    errors = []
    batches = list(read_batches(find_images([photos]), evaluation("pad", 8), 3, errors.append))
    assert [files for files, _ in batches] == [
        [str(photos / "a.png"), str(photos / "b/c.PNG")],
        [str(photos / "d.bmp")],
    ]
    for (_, batch), levels in zip(batches, ([0, 1], [2]), strict=True):
        assert (batch.shape, batch.dtype) == ((3, 8, 8, 3), np.float32)
        expected = np.array(levels) / 127.5 - 1
        np.testing.assert_allclose(batch[: len(levels), 4, 4, 0], expected, atol=1e-6)
        assert not batch[len(levels) :].any()
    (error,) = errors
    assert "c.jpg is not an image" in str(error)


def test_the_next_batch_is_read_while_the_present_one_is_used(photos, monkeypatch):
    read = {str(photos / name): threading.Event() for name in ("a.png", "b/c.PNG", "d.bmp")}
    original = image_files.open_image

    def recorded(path, *arguments, **options):
        read[path].set()
        return original(path, *arguments, **options)

    monkeypatch.setattr(image_files, "open_image", recorded)
    batches = read_batches(list(read), evaluation("pad", 8), 1, pytest.fail)
    assert next(batches)[0] == [str(photos / "a.png")]
    assert read[str(photos / "b/c.PNG")].wait(timeout=30)
    assert not read[str(photos / "d.bmp")].is_set()  # No more is held in memory.


def test_what_report_raises_ends_it(photos):
    def fail(error):
        raise error

    with pytest.raises(UserError, match="holds no image"):
        next(read_batches([str(photos)], evaluation("pad", 8), 1, fail))
