import pytest

from experiments import figure4, objectnet, table3, table5, table9
from experiments.runner import notes
from experiments.runner.scales import MINI, PAPER, SMOKE
from experiments.runner.setting import Setting


def about(experiment, scale=SMOKE, **datasets):
    setting = Setting(scale, 1, datasets, images={"jft": 1_000})
    measurements = experiment.measure(setting)
    return "\n".join(notes.about_data(measurements, setting))


@pytest.mark.parametrize(
    ("experiment", "told", "untold"),
    [
        (table5, ["Pets is 200", "first half", "every image"], ["VTAB", "ObjectNet", "few-shot"]),
        (table9, ["a task of VTAB is 100", "JFT-300M is all"], ["Pets", "ReaL", "few-shot"]),
        (figure4, ["JFT-300M is all", "few-shot"], ["Pets", "ReaL", "every image of every task"]),
        (table3, ["ImageNet-21k is 433", "few-shot"], ["Pets", "ObjectNet", "task"]),
        (objectnet, ["ObjectNet is the second half"], ["Pets", "ReaL", "few-shot"]),
    ],
)
def test_a_page_tells_of_the_data_sets_that_its_numbers_are_of(experiment, told, untold):
    text = about(experiment)
    assert [part for part in told if part not in text] == []
    assert [part for part in untold if part in text] == []


def test_the_paper_s_data_sets_need_no_words():
    assert about(table5, PAPER) == ""


@pytest.mark.parametrize("scale", [PAPER, MINI, SMOKE])
def test_a_data_set_in_place_of_the_paper_s_is_not_comparable(scale):
    text = about(table5, scale, jft="folder:/my photos")
    assert "JFT-300M is folder:/my photos here, which the paper did not use" in text
    for false in ("JFT-300M is all", "JFT-300M has seen"):
        assert false not in text
    assert "photos" not in about(figure4, scale, imagenet21k="folder:/my photos")


@pytest.mark.parametrize(("name", "other"), [("imagenet2012:5.1.0", False), ("imagenette", True)])
def test_a_version_of_the_paper_s_data_set_is_the_paper_s(name, other):
    text = about(table5, PAPER, imagenet2012=name)
    assert f"ImageNet is {name}" in text
    assert ("did not use" in text) == other


def test_the_folder_of_objectnet_is_what_the_paper_used():
    assert about(objectnet, PAPER, objectnet="/data/on") == "ObjectNet is read from /data/on."
    # Smaller scales do not read it.
    assert "/data/on" not in about(objectnet, SMOKE, objectnet="/data/on")
