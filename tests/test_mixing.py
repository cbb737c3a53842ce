"""Mixup, CutMix and random erasing of batches, against the authors' code in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vit_jax import program
from vit_jax.mixing import create_mix, cut, cutmix, erase, mixup
from vit_jax.plan.estimate import describe

COUNT, HEIGHT, WIDTH = 4, 12, 20
# Every pixel of image i is i / 8, so that it tells where it is from.
IMAGES = np.broadcast_to(np.arange(COUNT)[:, None, None, None] / 8, (COUNT, HEIGHT, WIDTH, 3))
BATCH = {"image": jnp.float32(IMAGES), "label": jnp.array([2, 0, 1, 1])}
BEFORE = [3, 0, 1, 2]
KEYS = jax.random.split(jax.random.key(0), 500)


def over_keys(mix, batch=BATCH):
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(mix, (0, None)))(KEYS, batch))


def rand_bbox(lam, cx, cy, width, height):
    """The function of that name of clovaai/CutMix-PyTorch, train.py."""
    cut_rat = np.sqrt(1.0 - lam)
    cut_w, cut_h = int(width * cut_rat), int(height * cut_rat)
    x1, x2 = np.clip(cx - cut_w // 2, 0, width), np.clip(cx + cut_w // 2, 0, width)
    y1, y2 = np.clip(cy - cut_h // 2, 0, height), np.clip(cy + cut_h // 2, 0, height)
    return x1, y1, x2, y2


def test_the_box_of_cutmix_is_that_of_its_authors():
    noise = np.random.default_rng(0)
    for _ in range(50):
        lam, cx, cy = np.float32(noise.uniform()), noise.integers(20), noise.integers(12)
        x1, y1, x2, y2 = rand_bbox(lam, cx, cy, 20, 12)
        assert cut(lam, cx, 20) == (x1, x2)
        assert cut(lam, cy, 12) == (y1, y2)


def bounds(mask):
    """Top, bottom, left, right of a rectangle of True in [height, width]."""
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    assert mask[top:bottom, left:right].all() and mask.sum() == (bottom - top) * (right - left)
    return top, bottom, left, right


def shares_of_the_authors(number):
    """The shares that the authors' boxes leave of an image, with alpha 1."""
    noise, shares = np.random.default_rng(0), []
    for _ in range(number):
        center = noise.integers(WIDTH), noise.integers(HEIGHT)
        x1, y1, x2, y2 = rand_bbox(noise.uniform(), *center, WIDTH, HEIGHT)
        shares.append(1 - (x2 - x1) * (y2 - y1) / (WIDTH * HEIGHT))
    return np.array(shares)


def test_cutmix_pastes_one_box_and_labels_have_the_shares_of_its_pixels():
    found = over_keys(functools.partial(cutmix, alpha=1.0, num_classes=3))
    pasted = found["image"] != IMAGES
    own = 1 - pasted[:, 0, :, :, 0].mean((1, 2))
    for mask, image in zip(pasted, found["image"], strict=True):
        assert (mask == mask[:1, :, :, :1]).all()
        if mask.any():
            bounds(mask[0, :, :, 0])
        np.testing.assert_array_equal(image, np.where(mask, IMAGES[BEFORE], IMAGES))
    targets, labels = np.eye(3)[BATCH["label"]], np.asarray(BATCH["label"])
    share = own[:, None, None]
    expected = share * targets + (1 - share) * targets[BEFORE]
    np.testing.assert_allclose(found["targets"], expected, atol=1e-6)
    larger = np.where(own[:, None] >= 0.5, labels, labels[BEFORE])
    np.testing.assert_array_equal(found["label"], larger)
    shares = shares_of_the_authors(5000)
    assert abs(np.mean(own < 0.5) - np.mean(shares < 0.5)) < 0.04
    assert abs(own.mean() - shares.mean()) < 0.04
    # The authors' code, drawn by NumPy.
    noise, shares = np.random.default_rng(1), []
    for _ in range(4000):
        box = rand_bbox(noise.beta(1, 1), noise.integers(WIDTH), noise.integers(HEIGHT), 20, 12)
        shares.append(1 - (box[2] - box[0]) * (box[3] - box[1]) / (WIDTH * HEIGHT))
    assert own.mean() == pytest.approx(np.mean(shares), abs=0.05)
    assert own.std() == pytest.approx(np.std(shares), abs=0.04)


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_several_labels_of_an_image_are_mixed_alike(mix):
    labels = np.array([[0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0]])
    alike = {key: mix(jax.random.key(5), BATCH | {"label": x}, 0.8, num_classes=3)
             for key, x in (("rank 1", BATCH["label"]), ("rank 2", jnp.array(labels)))}  # fmt: skip
    np.testing.assert_array_equal(alike["rank 1"]["image"], alike["rank 2"]["image"])
    # The first image has label 2 and the last label 1.
    share = float(alike["rank 1"]["targets"][0, 2])
    expected = share * labels + (1 - share) * labels[BEFORE]
    np.testing.assert_allclose(alike["rank 2"]["targets"], expected, atol=1e-6)
    assert 0 < share < 1
    own = mix is mixup or share >= 0.5
    np.testing.assert_array_equal(alike["rank 2"]["label"], labels if own else labels[BEFORE])


def boxes_of_the_authors(noise, count, side):
    """Top, left, height, width as zhunzhong07/Random-Erasing draws them, by NumPy.

    `transforms.py` there, with the area up to 0.4 as in the paper and in its `main` programs.
    """
    for _ in range(count):
        for _ in range(100):
            area, ratio = noise.uniform(0.02, 0.4) * side**2, noise.uniform(0.3, 1 / 0.3)
            height, width = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if width < side and height < side:
                top, left = (noise.integers(0, side - x, endpoint=True) for x in (height, width))
                yield top, left, height, width
                break


def test_random_erasing_is_that_of_its_authors():
    images = jnp.full((2, 40, 40, 3), 7.0)
    mix = functools.partial(erase, probability=0.25)
    found = over_keys(mix, {"image": images})["image"].reshape(-1, 40, 40, 3)
    erased = found != 7
    assert erased.any((1, 2, 3)).mean() == pytest.approx(0.25, abs=0.05)
    boxes, values = [], []
    for mask, image in zip(erased[:400], found[:400], strict=True):
        if mask.any():
            assert (mask == mask[..., :1]).all()
            boxes.append(bounds(mask[..., 0]))
            values.append(image[mask])
    top, bottom, left, right = np.array(boxes).T
    height, width = bottom - top, right - left
    areas = erased[..., 0].mean((1, 2))
    areas = areas[areas > 0]
    assert 0.015 < areas.min() < 0.05 and 0.36 < areas.max() < 0.42
    ratios = height / width
    assert 0.25 < ratios.min() < 0.6 and 2.2 < ratios.max() < 4.2
    # Anywhere: as often at the upper as at the lower end, and at the left as at the right.
    assert np.mean(top) == pytest.approx(np.mean(40 - bottom), abs=4)
    assert np.mean(left) == pytest.approx(np.mean(40 - right), abs=4)
    noise = np.concatenate(values)
    assert -1 <= noise.min() < -0.99 and 0.99 < noise.max() <= 1
    assert (noise.mean(), noise.var()) == pytest.approx((0, 1 / 3), abs=0.02)


def test_erased_boxes_are_distributed_as_those_of_the_authors():
    mix = functools.partial(erase, probability=1.0)
    found = over_keys(mix, {"image": jnp.full((4, 64, 64, 1), 7.0)})["image"] != 7
    found = np.array([bounds(mask) for mask in found.reshape(-1, 64, 64)])
    found[:, 1], found[:, 3] = found[:, 1] - found[:, 0], found[:, 3] - found[:, 2]
    top, height, left, width = found.T
    expected = np.array([*boxes_of_the_authors(np.random.default_rng(2), 20_000, 64)]).T
    for ours, theirs in (
        (height * width, expected[2] * expected[3]),
        (height / width, expected[2] / expected[3]),
        (top, expected[0]),
        (left, expected[1]),
    ):
        assert stats.ks_2samp(ours, theirs).pvalue > 0.01


def test_each_batch_has_mixup_or_cutmix_with_equal_chance_after_erasing():
    options = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "num_classes": 3}
    found = over_keys(create_mix(**options, erase_probability=0.0))
    is_cut = np.isin(found["image"], IMAGES).all((1, 2, 3, 4))
    assert is_cut.mean() == pytest.approx(0.5, abs=0.07)
    np.testing.assert_allclose(found["targets"].sum(-1), 1, atol=1e-6)
    mix = jax.jit(create_mix(**options, erase_probability=1.0))
    all_three, again, other = (
        jax.device_get(mix(jax.random.key(seed), BATCH)) for seed in (1, 1, 2)
    )
    jax.tree.map(np.testing.assert_array_equal, all_three, again)
    assert np.any(all_three["image"] != other["image"])
    assert not np.isin(all_three["image"], IMAGES).all()


def test_mixup_alone_draws_as_it_did_before_there_was_more():
    mix = create_mix(mixup_alpha=0.5, cutmix_alpha=0.0, erase_probability=0.0, num_classes=3)
    expected = mixup(jax.random.key(3), BATCH, 0.5, 3)
    jax.tree.map(np.testing.assert_array_equal, mix(jax.random.key(3), BATCH), expected)
    assert create_mix(mixup_alpha=0, cutmix_alpha=0, erase_probability=0, num_classes=3) is None


def test_pixels_are_cut_and_erased_as_what_they_become():
    pixels = np.random.default_rng(7).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    mix = create_mix(mixup_alpha=0.0, cutmix_alpha=1.0, erase_probability=0.5, num_classes=3)
    inputs = (pixels / 127.5 - 1).astype(np.float32)
    found, expected = (
        mix(jax.random.key(4), BATCH | {"image": jnp.asarray(x)}) for x in (pixels, inputs)
    )
    np.testing.assert_allclose(found["image"], expected["image"], atol=1e-6)


def test_the_words_of_augment_reach_the_step(tiny_config, monkeypatch):
    class Seen(Exception):
        pass

    def see(**options):
        raise Seen(options)

    monkeypatch.setattr(program, "create_mix", see)
    config = tiny_config(augment="erase(0.25)+mixup(0.8)+cutmix(1.0)")
    with pytest.raises(Seen) as caught:
        describe(config, num_classes=10, devices=1).lower()
    assert caught.value.args[0] == {
        "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "erase_probability": 0.25, "num_classes": 10
    }  # fmt: skip
