"""Images of one, four and other numbers of channels, against PIL and channel by channel."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import images
from vit_jax.data.folder import open_folder
from vit_jax.data.headers import check_end, measure
from vit_jax.data.image_files import find_images
from vit_jax.data.images import preprocess, read_image
from vit_jax.data.labeled_files import FileRules
from vit_jax.data.listing import open_list
from vit_jax.data.preprocess import eval_view, train_view
from vit_jax.data.protocols import PROTOCOLS, Preprocessing, evaluation
from vit_jax.errors import UserError


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(sum(shape)).integers(0, np.iinfo(dtype).max, shape, dtype)


def saved(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def array(pixels):
    buffer = io.BytesIO()
    np.save(buffer, pixels, allow_pickle=True)
    return buffer.getvalue()


def pages(pixels):
    gray = [Image.fromarray(np.ascontiguousarray(channel)) for channel in np.rollaxis(pixels, -1)]
    return saved(gray[0], "TIFF", save_all=True, append_images=gray[1:])


GRAY, RGB, RGBA, FIVE = (noise(20, 24, channels) for channels in (1, 3, 4, 5))
DEEP = noise(20, 24, dtype=np.uint16)
LUMA = np.asarray(Image.fromarray(RGB).convert("L"))[..., None]
JPEG = saved(Image.fromarray(RGB), "JPEG")


@pytest.mark.parametrize(
    "encoded, expected",
    [
        (saved(Image.fromarray(GRAY[..., 0]), "PNG"), GRAY),
        (saved(Image.fromarray(DEEP), "PNG"), DEEP[..., None] >> 8),
        (saved(Image.fromarray(DEEP), "TIFF"), DEEP[..., None] >> 8),
        (saved(Image.fromarray(RGB), "PNG"), LUMA),
        (saved(Image.fromarray(np.dstack([RGB, GRAY])), "PNG"), LUMA),
        (JPEG, np.asarray(Image.open(io.BytesIO(JPEG)).convert("L"))[..., None]),
        (array(RGB), LUMA),
        (array(GRAY), GRAY),
        (array(DEEP[..., None]), DEEP[..., None] >> 8),
        (pages(FIVE), FIVE[..., :1]),
        (saved(Image.fromarray(noise(20, 24, 2)), "PNG"), noise(20, 24, 2)),
        (saved(Image.fromarray(RGBA), "PNG"), RGBA),
        (pages(RGBA), RGBA),
        (array(FIVE), FIVE),
        (array(np.asfortranarray(FIVE.astype(">u2") * 256 + 3)), FIVE),
        (pages(FIVE), FIVE),
        (
            saved(
                Image.fromarray(RGBA), "TIFF", save_all=True, append_images=[Image.fromarray(RGB)]
            ),
            RGBA,
        ),
        (pages(np.dstack([DEEP, DEEP // 2])), np.dstack([DEEP, DEEP // 2]) >> 8),
    ],
)
def test_an_image_is_read_as_so_many_channels(encoded, expected):
    found = read_image("x", encoded, channels=expected.shape[-1])
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_gray_of_large_images_is_converted_in_tiles(monkeypatch):
    monkeypatch.setattr(images, "_TILE", 24 * 7)
    np.testing.assert_array_equal(read_image("x", array(RGB), channels=1), LUMA)


@pytest.mark.parametrize(
    "encoded, channels, message",
    [
        (JPEG, 4, "x has 3 channels, and 4 are wanted: give images of 4, or train with --conf"),
        (saved(Image.fromarray(GRAY[..., 0]), "JPEG"), 2, "x has 1 channel, and 2 are wanted"),
        (saved(Image.fromarray(RGBA), "PNG"), 5, "x has 4 channels, and 5 are wanted"),
        (array(FIVE), 3, "x has 5 channels, and 3 are wanted"),
        (pages(FIVE), 6, "x has 5 channels, and 6 are wanted"),
        (pages(FIVE), 4, "x has more than 4 pages"),
        (saved(Image.fromarray(RGB), "TIFF", save_all=True, append_images=[Image.fromarray(RGB)]),
         2, "x has pages that are not gray"),
        (pages(np.zeros((4, 4, 5), np.float32)), 5, "x has pixels of 32 bits, whose range"),
        (pages(np.zeros((4, 4, 2), np.int32)), 2, "x has pixels of 32 bits, whose range"),
        (array(np.zeros((4, 4, 1))), 1, "x holds float64 .4, 4, 1.: an image is an array of uint8"),
        (array(np.zeros((4, 4), np.uint8)), 1, "x holds uint8 .4, 4.: an image is an array"),
        (array(np.full((4, 4, 1), print, object)), 1, "x holds object"),
        (array(FIVE)[:200], 5, "x is damaged .72 of 2,400 bytes are there"),
        (array(GRAY).replace(b"(20, 24, 1)", b"(9**9, 9,1)"), 1, "x is damaged"),
        (array(GRAY).replace(b"20, 24, 1), }   ", b"90000,90000,1),}"), 1, "more than 178,956,970"),
    ],
)  # fmt: skip
def test_what_has_other_channels_or_is_no_image_is_refused(encoded, channels, message):
    with pytest.raises(UserError, match=message) as caught:
        read_image("x", encoded, channels=channels)
    assert "\n" not in str(caught.value)


def test_an_array_is_an_image_by_its_header(tmp_path):
    for name, pixels in {"a": FIVE, "b": np.zeros((4, 4)), "c": np.zeros(9, np.uint8)}.items():
        (tmp_path / f"{name}.npy").write_bytes(array(pixels))
    sizes = [measure(path, channels=5) for path in sorted(tmp_path.iterdir())]
    assert sizes == [len(array(FIVE)), None, None]
    assert find_images([str(tmp_path)], channels=5) == [str(tmp_path / "a.npy")]


@pytest.mark.parametrize("pixels", [FIVE, DEEP[..., None]])
def test_an_array_that_is_cut_off_is_found_by_its_size(tmp_path, pixels):
    path = tmp_path / "a.npy"
    path.write_bytes(array(pixels))
    check_end(path)
    path.write_bytes(array(pixels)[:-1])
    whole = len(array(pixels))
    with pytest.raises(UserError, match=f"is cut off, {whole - 1:,} of {whole:,} bytes are there"):
        check_end(path)


def test_arrays_beside_photographs_are_passed_over(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(4):
            Image.fromarray(RGB).save(tmp_path / name / f"{index}.png")
    found, before = find_images([str(tmp_path)]), open_folder(str(tmp_path))
    (tmp_path / "a" / "labels.npy").write_bytes(array(np.zeros(9, np.uint8)))
    (tmp_path / "b" / "mask.npy").write_bytes(array(RGB))
    assert find_images([str(tmp_path)]) == found
    folder = open_folder(str(tmp_path))
    assert folder.splits == before.splits
    assert folder.notes[-1].endswith("2 passed over that are no images (.npy)")
    (tmp_path / "list.csv").write_text("path,label\na/0.png,a\nb/mask.npy,b")
    with pytest.raises(UserError, match=r"mask\.npy is not an image"):
        open_list(str(tmp_path / "list.csv"))


def test_an_array_that_is_no_image_is_broken_where_arrays_are_images(tmp_path):
    for name, pixels in {"a": FIVE, "b": FIVE / 2}.items():
        (tmp_path / name).mkdir()
        for index in range(2):
            (tmp_path / name / f"{index}.npy").write_bytes(array(FIVE))
        (tmp_path / name / "3.npy").write_bytes(array(pixels))
    with pytest.raises(UserError, match=r"b/3\.npy holds float64 .*, or leave it out by dataset"):
        open_folder(str(tmp_path), FileRules(channels=5))
    skipping = open_folder(str(tmp_path), FileRules(channels=5, broken="skip"))
    assert sum(map(len, skipping.splits.values())) == 5
    (tmp_path / "list.csv").write_text("path,label\na/0.npy,a\nb/3.npy,b")
    with pytest.raises(UserError, match=r"b/3\.npy holds float64"):
        open_list(str(tmp_path / "list.csv"), FileRules(channels=5))


VIEWS = [evaluation(protocol, 8) for protocol in PROTOCOLS]
VIEWS += [Preprocessing(8, 0.8, antialias=True, resize="timm", interpolation="bicubic")]


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_each_channel_is_seen_as_one_of_an_rgb_image(channels):
    pixels = noise(40, 31, channels)
    options = {"image_size": 8, "random_crop": True, "random_flip": True}

    def views(pixels):
        encoded, channels = array(pixels), pixels.shape[-1]
        for protocol in PROTOCOLS:
            rng = np.random.default_rng(3)
            yield train_view(encoded, rng, protocol=protocol, channels=channels, **options)
        for view in VIEWS:
            yield eval_view(encoded, view.with_channels(channels))

    seen = [views(np.repeat(pixels[..., [c]], 3, -1)) for c in range(channels)]
    for whole, *each in zip(views(pixels), *seen, strict=True):
        assert whole.shape == (8, 8, channels)
        np.testing.assert_array_equal(whole, np.dstack([x[..., 0] for x in each]))


def test_each_channel_has_its_own_statistics():
    view = Preprocessing(20, mean=(0.1, 0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7, 0.8))
    pixels = noise(20, 20, 4)
    expected = (pixels / 255 - np.array(view.mean)) / np.array(view.std)
    np.testing.assert_allclose(preprocess(pixels, view), expected, atol=1e-5)
    np.testing.assert_allclose(view.to_picture(expected), pixels[..., :3] / 255, atol=1e-5)
    with pytest.raises(UserError, match="are of 4 channels, and the weights of 2"):
        view.with_channels(2)
    gray = dataclasses.replace(view, mean=(0.1,), std=(0.5,))
    shown = gray.to_picture((pixels[..., :1] / 255 - 0.1) / 0.5)
    np.testing.assert_allclose(shown, np.repeat(pixels[..., :1] / 255, 3, -1), atol=1e-5)
