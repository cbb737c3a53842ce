import datetime
import json

import pytest

from experiments.runner import pages, tables

from ..handmade import make_result, make_results
from ..webpages import HOSTILE, Page

RESULTS = (
    make_result({"data": "JFT", "task": "Pets", "model": "B"}, [0.5, 0.6], paper=93.81),
    make_result({"data": "JFT", "task": "VTAB", "model": "B"}, [0.25, None], ["run-2 has not run"]),
    make_result({"data": "I21k", "task": "VTAB", "model": "B"}, [None], ["run-3 failed: killed"]),
)


def test_a_page_shows_the_table_beside_the_paper_s_numbers(tmp_path):
    results = make_results(*RESULTS, rows=("data", "task"), about="What the paper says.")
    page = Page(pages.write(results, tmp_path))
    assert page.rows == [
        ["data", "task", "B"],
        ["JFT", "Pets", "55.00 ± 7.07 (93.81)"],
        ["VTAB", "25.00 1 of 2 seeds"],  # Under the same JFT.
        ["I21k", "VTAB", "failed"],
    ]
    spans = [attributes["rowspan"] for attributes in page.all("th") if "rowspan" in attributes]
    assert spans == ["2"]
    for text in (
        "Table 0: a test",
        "What the paper says.",
        results.setting.scale.summary,
        "run-2 has not run",
        "run-3 failed: killed",
        "python -m experiments.table0 --scale smoke",
        f"Made on {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
    ):
        assert text in page.text


def test_a_page_needs_nothing_from_elsewhere(tmp_path):
    (tmp_path / "table0").mkdir()
    (tmp_path / "table0/picture.png").write_bytes(b"")
    results = make_results(*RESULTS, rows=("data", "task"))
    for path in (pages.write(results, tmp_path), pages.write_index([results], tmp_path)):
        page = Page(path)
        assert not page.all("script") and not page.all("link")
        assert [image["src"] for image in page.all("img")] == ["table0/picture.png"]
        assert "url(" not in path.read_text() and "@import" not in path.read_text()


@pytest.mark.parametrize("where", ["label", "column", "problem", "title", "about"])
def test_hostile_text_stays_text(tmp_path, where):
    names = dict.fromkeys(("label", "column", "problem", "title", "about"), "harmless")
    names[where] = HOSTILE
    labels = {"task": names["label"], "model": names["column"]}
    found = make_result(labels, [None], [f"{names['problem']} failed"])
    results = make_results(found, title=names["title"], about=names["about"])
    page = pages.write(results, tmp_path)
    index = pages.write_index([results], tmp_path)
    for path in (page, index):
        assert not Page(path).all("script")
        assert "\x1b" not in path.read_text()
    assert "<script>alert('|')</script>\\x1b[2J\\n#" in Page(page).text


def test_an_experiment_without_picture_has_none(tmp_path):
    page = Page(pages.write(make_results(*RESULTS[:1]), tmp_path))
    assert not page.all("img")
    assert "Files:" not in page.text


def test_the_cost_is_that_of_the_runs_that_the_experiment_needs(tmp_path):
    results = make_results(*RESULTS, rows=("data", "task"))
    names = [source.name for result in RESULTS for source in result.measurement.sources]
    for name in (*names[:2], "of-another"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "metrics.json").write_text("{}")
        records = [
            {"step": 50, "device_days": 15 / 86400, "exaflops": 1.0},
            {"step": 100, "device_days": 30 / 86400, "exaflops": 2.5},
            {"step": 100, "eval_accuracy": 0.5},
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / "runs" / name / "metrics.jsonl").write_text(text)
    (tmp_path / "runs/of-another/metrics.jsonl").write_text("damaged")
    page = Page(pages.write(results, tmp_path)).text
    for fact in ("2 of 5 runs", "Steps 200", "Time 1m00s", "5 exaFLOPs"):
        assert fact in page
    index = Page(pages.write_index([results], tmp_path)).text
    for fact in ("0 of 1 are complete", "3 runs", "Steps 200", "5 exaFLOPs"):
        assert fact in index


def write(results, folder):
    """A page with the files that a command leaves beside it."""
    own = folder / results.experiment.name
    own.mkdir()
    (own / "table.csv").write_text(tables.csv(results))
    problems = [line for result in results.found for line in result.problems]
    records = [{"run": line.split()[0], "problem": line} for line in problems]
    (own / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    pages.write(results, folder)


def test_the_index_has_a_card_for_each_also_for_those_of_earlier_commands(tmp_path):
    complete = make_results(RESULTS[0], name="figure1", title="Figure 1: one")
    partly = make_results(*RESULTS[1:], name="table2", title="Table 2: two", rows=("data",))
    earlier = make_results(RESULTS[0], name="table3", title="Table 3: <three>")
    failed = make_results(*RESULTS, name="table4", title="Table 4: four", rows=("data", "task"))
    for results in (complete, partly, earlier, failed):
        write(results, tmp_path)
    (tmp_path / "table5.html").write_text("<title>Table 5: five</title>")  # And nothing else.
    pages.write_index([complete, partly], tmp_path)  # The second time, it lies there itself.
    page = Page(pages.write_index([complete, partly], tmp_path))
    links = [attributes["href"] for attributes in page.all("a")]
    names = ("figure1", "table2", "table3", "table4", "table5")
    assert links[1:] == [f"{name}.html" for name in names]
    for text in (
        "2 of 5 are complete",
        "Figure 1: one 1 of 1 numbers",
        "Table 2: two 1 of 2 numbers, 1 without some seeds, 1 run failed",
        "Table 3: <three> 1 of 1 numbers, by an earlier command",
        "Table 4: four 2 of 3 numbers, 1 without some seeds, 1 run failed, by an earlier command",
        "Table 5: five made by an earlier command",
        "made by python -m experiments.all",
    ):
        assert text in page.text
    assert ["JFT · Pets · B", "55"] in page.rows  # Of Table 4, which has no picture.


@pytest.mark.parametrize("damage", ["", "a,b\n1,2\n", "\0", "mean,seeds,seeds_asked,metric\nx\n"])
def test_the_index_is_written_beside_damaged_files_of_earlier_commands(tmp_path, damage):
    write(make_results(RESULTS[0], name="table3", title="Table 3: three"), tmp_path)
    for name in ("table.csv", "results.jsonl"):
        (tmp_path / "table3" / name).write_text(damage)
    results = make_results(RESULTS[0], name="figure1")
    text = Page(pages.write_index([results], tmp_path)).text
    assert "Table 3: three made by an earlier command" in text
    assert "experiments.all" not in text
