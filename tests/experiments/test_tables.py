import csv
import dataclasses
import io
import statistics

import pytest

from experiments import figure7, table3, table4, table8, table9
from experiments.runner import tables
from experiments.runner.experiment import Measurement
from experiments.runner.results import Result, Results
from experiments.runner.scales import SCALES
from experiments.runner.setting import Setting

from ..handmade import make_result, make_results
from ..webpages import HOSTILE


def rows_of(markdown):
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_a_cell_has_the_mean_and_deviation_of_the_seeds_in_percent_and_the_paper_s():
    results = make_results(
        make_result({"task": "Pets", "model": "B"}, [0.5, 0.6], paper=93.81),
        make_result({"task": "Pets", "model": "H"}, [0.25], paper=97.56, paper_sd=0.02),
        make_result({"task": "VTAB", "model": "H"}, [], paper=76.29, paper_sd=1.7),
    )
    sd = 100 * statistics.stdev([0.5, 0.6])
    header, _, pets, vtab = rows_of(tables.markdown(results))
    assert header == ["task", "B", "H"]
    assert pets == ["Pets", f"55.00 ± {sd:.2f} (93.81)", "25.00 (97.56 ± 0.02)"]
    assert vtab == ["VTAB", "", "(76.29 ± 1.70)"]


@pytest.mark.parametrize(("paper", "shown"), [((95.3, 85.5), "(95.3)"), ((99.0, 98.13), "(99.00)")])
def test_the_paper_s_shares_have_as_many_decimals_as_there(paper, shown):
    found = [make_result({"task": str(x), "model": "B"}, [], paper=x) for x in paper]
    assert rows_of(tables.markdown(make_results(*found)))[2][1] == shown


@pytest.mark.parametrize(("value", "shown"), [(4262.1, "4262"), (1.23456e-05, "1.235e-05")])
def test_what_is_no_share_is_shown_as_it_is(value, shown):
    result = make_result({"task": "exaFLOPs"}, [value], percent=False, paper=4262)
    assert tables.markdown(make_results(result, column="")).count(f"| {shown} (4262) |") == 1


def test_what_is_missing_is_told_with_its_reason():
    results = make_results(
        make_result({"task": "a", "model": "B"}, [0.5, None], ["run-2 failed: no memory"]),
        make_result({"task": "b", "model": "B"}, [None, None], ["run-3 has not run"], paper=1.25),
        make_result({"task": "c", "model": "B"}, [None], ["run-4 failed: killed by SIGKILL"]),
    )
    text = tables.markdown(results)
    assert [row[1] for row in rows_of(text)[2:]] == [
        "50.00 [1 of 2 seeds]",
        "not run (1.25)",
        "failed",
    ]
    assert text.endswith(
        "- run-2 failed: no memory\n- run-4 failed: killed by SIGKILL\n- run-3 has not run"
    )


def test_failures_come_before_the_many_that_have_not_run():
    lines = [f"run-{i} has not run" for i in range(50)] + ["run-50 failed: no memory"]
    text = tables.markdown(make_results(make_result({"task": "a"}, [None], lines, paper=1)))
    listed = [line for line in text.splitlines() if line.startswith("- ")]
    assert listed[0] == "- run-50 failed: no memory"
    assert listed[-1] == "- 21 more, see results.jsonl"
    assert len(listed) == 31


@pytest.mark.parametrize("scale", ["smoke", "mini", "paper"])
def test_the_scale_and_the_data_that_stand_for_the_paper_s_are_told(scale):
    setting = Setting(SCALES[scale], 1, {"jft": "folder:/mine"})
    run = setting.pretrain("ViT-B/32", "jft")
    found = Result(Measurement({"task": "a"}, [run]), (0.5,))
    text = tables.markdown(dataclasses.replace(make_results(found), setting=setting))
    assert setting.scale.summary in text
    assert "JFT-300M is folder:/mine here" in text


def test_hostile_text_neither_ends_a_cell_nor_begins_a_line():
    results = make_results(
        make_result({"task": HOSTILE, "model": HOSTILE}, [None], [f"{HOSTILE} failed"])
    )
    text = tables.markdown(results)
    assert "\x1b" not in text
    assert not any(line.startswith("# forged") for line in text.splitlines())
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [row.replace(r"\|", "").count("|") for row in rows] == [3, 3, 3]


def test_csv_has_a_row_for_each_measurement_in_the_unit_that_is_shown():
    results = make_results(
        make_result({"task": "a,b", "model": "B"}, [0.5, None], paper=60, paper_sd=2, x=3),
        make_result({"task": HOSTILE}, [7.0], percent=False, metric="exaflops", paper_x=4),
    )
    first, second = csv.DictReader(io.StringIO(tables.csv(results)))
    assert {key: first[key] for key in ("experiment", "scale", "task", "model")} == {
        "experiment": "table0",
        "scale": "smoke",
        "task": "a,b",
        "model": "B",
    }
    numbers = ("mean", "seeds", "seeds_asked", "paper", "paper_sd", "x")
    assert [float(first[key]) for key in numbers] == [50, 1, 2, 60, 2, 3]
    assert (first["sd"], first["unit"], second["unit"]) == ("", "%", "")
    assert (second["metric"], second["mean"], second["paper_x"]) == ("exaflops", "7.0", "4")
    assert "\x1b" not in second["task"] and "\n" not in second["task"]


def test_csv_has_no_formulas_and_its_numbers_are_numbers():
    results = make_results(make_result({"task": "=1+1", "model": "a-b"}, [-2.0], metric="@SUM(A1)"))
    (row,) = csv.DictReader(io.StringIO(tables.csv(results)))
    assert [row[key] for key in ("task", "model", "metric")] == ["'=1+1", "a-b", "'@SUM(A1)"]
    assert float(row["mean"]) == -200


def caption_of(module, **seeds):
    setting = Setting(SCALES["smoke"], **{"seeds": 1, **seeds})
    found = [Result(x, (0.5,) * len(x.sources)) for x in module.EXPERIMENT.measure(setting)]
    return " ".join(tables.caption(Results(module.EXPERIMENT, setting, tuple(found), {})))


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (table3, ["own validation images (validation)", "a class of ImageNet (5-shot)"]),
        (table4, ["held-out training images (0.03, ", "test images (test)"]),
        (table8, ["The accuracy is that of linear classification from 5 images a class"]),
        (table9, ["after fine-tuning, on test images", "the mean of those of tasks"]),
        (figure7, []),
    ],
)
def test_a_table_says_what_its_accuracies_are(module, told):
    text = caption_of(module)
    assert [part for part in told if part not in text] == []
    assert ("The accuracy is" in text) == bool(told)


def test_numbers_that_are_not_the_paper_s_are_not_called_so():
    text = caption_of(table3)
    assert "the paper's number" not in text and "published later" in text
    assert "in parentheses the paper's number" in caption_of(table9)
    assert "in parentheses" not in caption_of(figure7)
    result = make_result({"task": "a"}, [0.5], paper=50)
    results = make_results(result, make_result({"task": "b"}, [0.5]), reference="published later")
    first, second = csv.DictReader(io.StringIO(tables.csv(results)))
    assert (first["reference"], second["reference"]) == ("published later", "")
    assert tables.grid(results).columns == ("ours (published later)",)


def test_a_column_has_the_paper_s_numbers_in_its_head_only_if_there_are():
    lone = make_results(make_result({"task": "a"}, [0.5]))
    assert tables.grid(lone).columns == ("ours",)


@pytest.mark.parametrize(("seeds", "deviates"), [(1, False), (2, True)])
def test_one_seed_has_no_deviation(seeds, deviates):
    text = caption_of(table8, seeds=seeds)
    assert ("±" in text) == deviates and ("of one seed" in text) != deviates


def test_two_measurements_of_one_place_are_an_error():
    twice = [make_result({"task": "a", "model": "B"}, [0.5])] * 2
    with pytest.raises(ValueError, match="table0 has two measurements of"):
        tables.markdown(make_results(*twice))
