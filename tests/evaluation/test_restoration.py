"""What fills a mask without a model, and the error."""

import numpy as np
import pytest

from vit_jax.evaluation.restoration import error, with_mean_color, with_neighbors

RNG = np.random.default_rng(0)
IMAGE = RNG.random((12, 16, 3)).astype(np.float32)
MASK = RNG.random((12, 16)) < 0.5


def test_the_mean_color_is_that_of_the_known_pixels():
    filled = with_mean_color(IMAGE, MASK)
    known = [IMAGE[y, x] for y in range(12) for x in range(16) if not MASK[y, x]]
    np.testing.assert_allclose(filled[MASK], np.tile(sum(known) / len(known), (MASK.sum(), 1)))
    np.testing.assert_array_equal(filled[~MASK], IMAGE[~MASK])


@pytest.mark.parametrize("fill", [with_mean_color, lambda *x: with_neighbors(*x, 4)])
def test_a_baseline_does_not_read_what_is_masked(fill):
    other = np.where(MASK[..., None], RNG.random(IMAGE.shape), IMAGE).astype(np.float32)
    np.testing.assert_array_equal(fill(IMAGE, MASK), fill(other, MASK))


def test_neighbors_fill_a_hole_in_a_ramp_and_leave_the_rest():
    ramp = np.broadcast_to(np.linspace(0.2, 0.8, 24)[:, None, None], (24, 24, 3))
    ramp = ramp.astype(np.float32)
    hole = np.zeros((24, 24), bool)
    hole[8:16, 8:16] = True
    filled = with_neighbors(ramp, hole, 8)
    np.testing.assert_array_equal(filled[~hole], ramp[~hole])
    assert error(ramp, filled, hole) < 0.35 * error(ramp, with_mean_color(ramp, hole), hole)


def test_the_error_is_the_root_mean_square_of_masked_pixels_in_gray_levels():
    other = IMAGE.copy()
    other[MASK] += np.where(np.arange(MASK.sum()) % 2, 3, -4)[:, None] / np.float32(255)
    count = MASK.sum()
    expected = np.sqrt((9 * (count // 2) + 16 * (count - count // 2)) / count)
    assert error(IMAGE, other, MASK) == pytest.approx(expected, rel=1e-5)
    other[~MASK] = 0
    assert error(IMAGE, other, MASK) == pytest.approx(expected, rel=1e-5)
