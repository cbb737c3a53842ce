import dataclasses
import itertools
import statistics

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb

from experiments.runner import pictures

from ..handmade import make_result, make_results

# Figure 4 of the paper: images in millions, 5-shot accuracy.
FIGURE_4 = {
    "ViT-L/16": {9: 42, 30: 58, 90: 70, 303: 71.5},
    "R152x2": {9: 52.7, 30: 66.9, 90: 68.9, 303: 69.3},
}


def figure_4(images, accuracy, scale="paper"):
    """Ours at `images` of the paper's sizes, with two seeds around `accuracy` of the paper's."""
    return make_results(
        *(
            make_result(
                {"model": model, "images": str(size)},
                [accuracy(paper) - 0.01, accuracy(paper) + 0.01],
                paper=paper,
                x=images(size),
                paper_x=1e6 * size,
            )
            for model, row in FIGURE_4.items()
            for size, paper in row.items()
        ),
        scale=scale,
    )


def drawn(axes, color, hollow):
    """What is drawn of a family: the points of its lines that are no entry of the legend."""
    hollow_color = to_hex("white") if hollow else to_hex(color)
    return [
        line.get_xydata().tolist()
        for line in axes.lines
        if len(line.get_xdata()) > 1
        and line.get_marker() in "osD^"
        and to_hex(line.get_markerfacecolor()) == hollow_color
    ]


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("ViT-L/16", pictures.VIT),
        ("ViT-8-1024-2048/32", pictures.VIT),
        ("R50+ViT-B/32", pictures.HYBRID),
        ("R152x2", pictures.RESNET),
        ("Axial-ViT-B/16", pictures.AXIAL),
        ("AxialResNet50", pictures.AXIAL),
    ],
)
def test_a_model_belongs_to_a_family(model, family):
    assert pictures.family(model) == family


def test_families_differ_in_black_and_white_too():
    models = ("ViT-B/16", "R50+ViT-B/16", "R50x1", "Axial-ViT-B/16")
    for key in ("color", "marker", "linestyle"):
        assert len({pictures.style(model)[key] for model in models}) == len(models)


@pytest.mark.parametrize(
    "models",
    [
        ("ViT-Ti/16", "ViT-S/16", "ViT-B/32", "ViT-B/16", "ViT-L/32", "ViT-L/16", "ViT-H/14"),
        ("R50x1", "R101x1", "R152x1", "R50x2", "R152x2", "R200x3"),
        ("R50+ViT-B/32", "R50+ViT-B/16", "R50+ViT-L/32", "R50+ViT-L/16"),
    ],
)
def test_the_larger_model_has_the_larger_marker(models):
    sizes = [pictures.style(model)["markersize"] for model in models]
    assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)


def test_ours_are_drawn_before_the_paper_s_where_they_are_comparable():
    figure, (axes,) = pictures.panels(1)
    pictures.points(axes, figure_4(lambda size: 1e6 * size, lambda paper: paper / 100), log="x")
    pictures.finish(figure)
    assert figure.axes == [axes] and axes.get_xscale() == "log"
    blue = pictures.style("ViT-L/16")["color"]
    expected = [[1e6 * size, paper] for size, paper in FIGURE_4["ViT-L/16"].items()]
    np.testing.assert_allclose(drawn(axes, blue, hollow=False)[0], expected)
    np.testing.assert_allclose(drawn(axes, blue, hollow=True)[0], expected)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "ViT",
        "ResNet (BiT)",
        "paper",
    ]


def test_error_bars_are_the_deviation_over_seeds():
    figure, (axes,) = pictures.panels(1)
    pictures.points(axes, figure_4(lambda size: 1e6 * size, lambda paper: paper / 100), log="x")
    bars = axes.collections[0].get_segments()
    sd = 100 * statistics.stdev([-0.01, 0.01])
    assert [abs(top - bottom) for (_, bottom), (_, top) in bars] == pytest.approx([2 * sd] * 4)


def test_the_paper_s_have_axes_of_their_own_where_they_lie_far_apart():
    figure, (axes,) = pictures.panels(1)
    axes.set(xlabel="images", ylabel="accuracy", title="Few-shot")
    results = figure_4(lambda size: 4.7 * size, lambda paper: (paper + 20) / 100, "smoke")
    pictures.points(axes, results, log="x")
    pictures.points(axes, results, log="x")
    pictures.finish(figure)
    ours, papers = figure.axes
    assert ours is axes
    assert [each.get_title() for each in figure.axes] == [
        "Few-shot: smoke scale",
        "Few-shot: the paper",
    ]
    assert papers.get_xlabel() == "images" and papers.get_xscale() == "log"
    blue = pictures.style("ViT-L/16")["color"]
    assert not drawn(ours, blue, hollow=True) and not drawn(papers, blue, hollow=False)
    expected = [[1e6 * size, paper] for size, paper in FIGURE_4["ViT-L/16"].items()]
    np.testing.assert_allclose(drawn(papers, blue, hollow=True)[0], expected)
    assert ours.get_position().x1 < papers.get_position().x0


@pytest.mark.parametrize(("scale", "axes"), [("paper", 1), ("mini", 2), ("smoke", 2)])
def test_only_the_paper_s_scale_shares_its_axes(scale, axes):
    same = figure_4(lambda size: 1e6 * size, lambda paper: paper / 100, scale)
    figure, (first,) = pictures.panels(1)
    pictures.points(first, same)
    assert len(figure.axes) == axes
    figure, (first,) = pictures.panels(1)
    pictures.bars(first, same, group="images")
    assert len(figure.axes) == axes


def draw(results):
    figure, (axes,) = pictures.panels(1)
    pictures.points(axes, results)
    return pictures.finish(figure)


def test_a_picture_says_what_its_numbers_are_of():
    found = make_result({"model": "ViT-B/32"}, [0.5], x=1.0)
    small = make_results(found, draw=draw)
    assert "smoke scale; tiny models" in pictures.picture_of(small).texts[-1].get_text()
    whole = make_results(found, draw=draw, scale="paper")
    assert pictures.picture_of(whole).texts[-1].get_text() == "paper scale"
    setting = dataclasses.replace(whole.setting, datasets={"jft": "folder:/\x1b[2J"})
    text = pictures.picture_of(dataclasses.replace(whole, setting=setting)).texts[-1].get_text()
    assert text == r"paper scale; JFT-300M is folder:/\x1b[2J"


def test_there_is_no_picture_of_nothing():
    missing = make_result({"model": "ViT-B/32"}, [None], x=1.0, paper=50.0, paper_x=1.0)
    assert pictures.picture_of(make_results(missing, draw=draw)) is None
    assert pictures.picture_of(make_results(make_result({"model": "B"}, [0.5]))) is None


def test_a_lone_line_is_named_once():
    figure = draw(make_results(make_result({"model": "ViT-B/32"}, [0.5], x=1.0)))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ViT-B/32"]
    assert not figure.axes[0].texts


def test_what_is_missing_is_left_out():
    found = figure_4(lambda size: 1e6 * size, lambda paper: paper / 100).found
    missing = make_result({"model": "ViT-L/16"}, [None], ["failed"], x=5e6)
    figure, (axes,) = pictures.panels(1)
    pictures.points(axes, make_results(missing, *found), log="x")
    nothing = make_results(make_result({"model": "ViT-L/16"}, [None], x=5e6))
    pictures.points(axes, nothing)
    assert len(drawn(axes, pictures.style("ViT-L/16")["color"], hollow=False)[0]) == 4
    pictures.finish(figure)


def test_names_do_not_hide_each_other():
    found = [
        make_result({"model": model}, [0.7 + 0.0005 * i], x=100.0)
        for i, model in enumerate(["ViT-L/16", "R152x2", "R50+ViT-L/16"])
    ]
    spread = make_result({"model": "ViT-B/32"}, [0.5], x=10.0)
    figure, (axes,) = pictures.panels(1)
    pictures.points(axes, make_results(*found, spread), log="x")
    pictures.finish(figure)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 4
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_bars_are_means_of_their_groups():
    found = [
        make_result({"group": group, "task": task, "model": "H"}, values, paper=paper)
        for group, task, values, paper in [
            ("natural", "a", [0.5, 0.7], 90),
            ("natural", "b", [0.9, 0.9], 70),
            ("structured", "c", [0.4, 0.4], 60),
            ("structured", "d", [None, None], 50),
            ("other", "e", [], 40),
            ("other", "f", [], None),
        ]
    ]
    figure, (axes,) = pictures.panels(1)
    pictures.bars(axes, make_results(*found, scale="paper"), group="group")
    heights = sorted(bar.get_height() for bar in axes.patches if bar.get_height())
    # Paper's: (90 + 70) / 2 and (60 + 50) / 2; ours: (50 + 90 + 70 + 90) / 4; others are missing.
    assert heights == pytest.approx([55, 75, 80])
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "natural",
        "structured",
        "other",
    ]
    # The seeds' means are 70 and 80.
    (_, bottom), (_, top) = axes.collections[0].get_segments()[0]
    assert top - bottom == pytest.approx(2 * statistics.stdev([70, 80]))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.03, "0.03"),
        (5000, "5000"),
        (30_000, "30k"),
        (303e6, "303M"),
        (0, "0"),
        (3e-6, r"$3\cdot 10^{-6}$"),
        (1e-5, "$10^{-5}$"),
    ],
)
def test_ticks_are_plain_numbers(value, shown):
    assert pictures.plain(value) == shown


def test_more_series_than_can_be_told_apart_are_an_error():
    assert len({style["color"] for style in pictures.series_styles("abcdefg").values()}) == 7
    with pytest.raises(ValueError, match="8 series: no more than 7"):
        pictures.series_styles("abcdefgh")


def test_the_paper_s_are_fainter_than_ours():
    figure, (axes,) = pictures.panels(1)
    pictures.points(axes, figure_4(lambda size: 1e6 * size, lambda paper: paper / 100), log="x")
    lines = [line for line in axes.lines if len(line.get_xdata()) > 1 and line.get_marker() == "o"]
    paper, ours = sorted(lines, key=lambda line: line.get_zorder())
    assert sum(to_rgb(paper.get_color())) > sum(to_rgb(ours.get_color()))
