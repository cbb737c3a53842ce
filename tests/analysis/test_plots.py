"""What stands where in the pictures, and figures as parts of a page."""

import re
import xml.etree.ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from vit_jax.analysis import plots

from ..webpages import HOSTILE


def test_a_block_of_the_heat_map_is_a_patch_to_the_pixel():
    image = np.zeros((12, 12, 3))
    image[4:8, 8:12] = 1  # The patch in row 1 and column 2 of patches of 4 pixels.
    attention = np.zeros((1, 3, 3))
    attention[0, 1, 2] = 0.5
    figure = plots.rollouts(image[None], attention)
    pixels, heat, masked = (np.asarray(axes.images[0].get_array()) for axes in figure.axes[:3])
    where = pixels.any(axis=-1)
    np.testing.assert_array_equal(heat[..., 1] > 0.3, where)
    np.testing.assert_array_equal(masked.any(axis=-1), where)
    assert len({tuple(axes.images[0].get_extent()) for axes in figure.axes[:3]}) == 1


def test_colors_mean_multiples_of_the_mean_in_all_heat_maps():
    maps = np.random.default_rng(0).random((4, 4))
    image = np.full((8, 8, 3), 0.5)
    figure = plots.rollouts(np.stack([image, image]), np.stack([maps, 7 * maps[::-1]]))
    first, second = (np.asarray(figure.axes[n].images[0].get_array()) for n in (1, 4))
    np.testing.assert_allclose(first, second[::-1], atol=1e-6)
    bar = figure.axes[-1]
    highest = np.quantile([maps, maps], 0.97) / maps.mean()
    assert bar.get_xlim() == pytest.approx((0, highest))
    assert bar.get_xlabel() == "times the mean of the patches"
    # Over a mid-gray as this image's the heat map has the very colors of the bar.
    place = np.unravel_index((abs(maps - maps.mean())).argmin(), maps.shape)
    (mesh,) = (x for x in bar.collections if x.get_array() is not None)
    drawn = mesh.cmap(maps[place] / maps.mean() / highest)[:3]
    np.testing.assert_allclose(first[2 * place[0], 2 * place[1]], drawn, atol=0.01)


def test_captions_are_above_their_images_and_harmless():
    figure = plots.rollouts(
        np.zeros((3, 4, 4, 3)), np.ones((3, 2, 2)), [(f"{n} {HOSTILE} $x$", "daisy") for n in "abc"]
    )
    figure.draw_without_rendering()
    texts = [text for text in figure.texts if "forged" in text.get_text()]
    assert len(texts) == 3
    for text, axes in zip(texts, figure.axes[0:9:3], strict=True):
        assert text.get_text().isprintable() and not text.get_parse_math()
        box, panel = text.get_window_extent(), axes.get_window_extent()
        assert box.y0 >= panel.y1 and box.y0 - panel.y1 < panel.height / 2
        assert box.x0 == pytest.approx(panel.x0, abs=3)


@pytest.mark.parametrize("grid", [(2, 2), (14, 14), (3, 5)])
def test_tiles_of_similarities_stand_apart_each_at_its_number(grid):
    rng = np.random.default_rng(0)
    similarity = rng.uniform(-1, 1, (*grid, *grid))
    figure = plots.similarity_grid(similarity)
    tiles, bar = figure.axes
    assert (tiles.get_xlabel(), tiles.get_ylabel()) == ("input patch column", "input patch row")
    assert bar.get_ylabel() == "cosine similarity" and bar.get_ylim() == (-1, 1)
    (picture,) = tiles.images
    pixels = picture.get_array()
    left, right, bottom, top = picture.get_extent()

    def at(row, column):
        y = (row - top) / (bottom - top) * pixels.shape[0]
        x = (column - left) / (right - left) * pixels.shape[1]
        return pixels[int(y), int(x)]

    rows, columns = grid
    for row, column in np.ndindex(grid):
        # The cells of a tile lie within 0.4 of its number on the axes.
        for y, x in np.ndindex(grid):
            down, across = ((y + 0.5) / rows - 0.5, (x + 0.5) / columns - 0.5)
            found = at(row + 1 + 0.8 * down, column + 1 + 0.8 * across)
            assert found == pytest.approx(similarity[row, column, y, x], abs=1e-6)
        if column:
            assert np.ma.is_masked(at(row + 1, column + 0.5)) or np.isnan(at(row + 1, column + 0.5))


def test_figures_of_a_page_share_no_names_and_have_the_color_of_its_text():
    found = []
    for name in ("one", "two"):
        figure = Figure()
        axes = figure.subplots()
        axes.plot([0, 1], marker="o")
        axes.imshow(np.eye(3))
        axes.legend(["entry"])
        axes.set_title("--><script>alert(1)</script>", parse_math=False)
        svg = plots.to_svg(figure, name)
        xml.etree.ElementTree.fromstring(svg)
        assert not axes.get_legend().get_frame_on()  # White under letters of a dark page.
        assert "#000000" not in svg and "currentColor" in svg
        assert "script" not in svg and "<!--" not in svg
        ids = re.findall(r'\bid="(.*?)"', svg)
        assert set(re.findall(r'(?:href="#|url\(#)(.*?)[")]', svg)) <= set(ids)
        found += ids
    assert len(found) == len(set(found))
