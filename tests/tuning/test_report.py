"""report.html of a search: what its charts hold, and that it claims no more than trials tell."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cl_ray.config import preset
from cl_ray.data.dataset import Dataset
from cl_ray.storage import RunStorage
from cl_ray.tuning.charts import (
    SearchChart,
    bars,
    grid_of,
    history,
    map_of,
    marks,
    parallel,
    pareto,
    tick_step,
)
from cl_ray.tuning.importance import FEWEST, RATES, comparable, importances, what_mattered
from cl_ray.tuning.options import Options
from cl_ray.tuning.prepare import Search
from cl_ray.tuning.report import DEPTHS, write_report
from cl_ray.tuning.space import Space
from cl_ray.tuning.study import SearchMetric, TrialResult

FRECHET, PROBE = SearchMetric("frechet", larger=False), SearchMetric("linear_probe", larger=True)
SPACE = Space.from_yaml(
    """
    optimizer.lr_g: {kind: log, low: 0.0001, high: 0.01}
    optimizer.lr_d: {kind: log, low: 0.0001, high: 0.01}
    discriminator.depth: {kind: int, low: 2, high: 5}
    generator.depth: {kind: int, low: 2, high: 5, at_most: discriminator.depth}
    batch_size: {kind: choice, values: [32, 64, 128]}
    optimizer.average: {kind: float, low: 0.9, high: 0.999}
    """
)


def trials(many: int, stop: int = 4) -> list[TrialResult]:
    """Trials of three epochs, every `stop`th stopped after one; G's rate decides."""
    rows = []
    for number in range(many):
        values = {
            "optimizer.lr_g": 0.0001 * 1.5 ** (number % 10),
            "optimizer.lr_d": 0.0002 + 0.0003 * (number % 7),
            "discriminator.depth": 3 + number % 3,
            "generator.depth": 2 + number % 2,
            "batch_size": 32 + 32 * (number % 2),
            "optimizer.average": 0.99,
        }
        figure = 0.8 + abs(number % 10 - 4)
        ended = 1 if number % stop == stop - 1 else 3
        by_epoch = {epoch: figure * 4 / (1 + epoch) for epoch in range(1, ended + 1)}
        metrics = {"frechet": by_epoch[ended], "linear_probe": 0.9 - 0.01 * figure}
        status = "finished" if ended == 3 else "stopped"
        rows.append(TrialResult(number, status, values, metrics, ended, 60.0, history=by_epoch))
    return rows


def axis(chart: SearchChart, name: str) -> dict[str, Any]:
    return dict(chart.figure.to_plotly_json()["layout"][name])


def words(chart: SearchChart) -> list[str]:
    return [note.text for note in chart.figure.layout.annotations]


def test_a_trial_that_was_stopped_early_looks_otherwise_and_says_after_how_many_epochs() -> None:
    chart = history([*trials(8), TrialResult(8, "diverged", {})], FRECHET, 3)
    finished, stopped, best = chart.figure.data
    assert finished.name == "finished, after 3 epochs"
    assert stopped.name == "stopped early, after 1 epoch"
    assert list(stopped.x) == [3, 7]
    assert finished.marker.symbol != stopped.marker.symbol
    assert finished.marker.color != stopped.marker.color
    assert list(best.x) == list(finished.x)  # metrics after one epoch are not among the best
    assert list(best.y) == sorted(best.y, reverse=True)
    assert "does not compare" in chart.note
    assert "1 diverged" in chart.note
    assert history(trials(3), FRECHET, 3).note == ""


@pytest.mark.parametrize("metric", [FRECHET, PROBE])
def test_the_best_value_is_told_where_it_is(metric: SearchMetric) -> None:
    rows = trials(12)
    chart = history(rows, metric, 3)
    whole = [row for row in rows if row.status == "finished"]
    choose = max if metric.larger else min
    best = choose(whole, key=lambda row: row.metrics[metric.name])
    (said,) = words(chart)
    assert f"(trial {best.number})" in said
    assert f"{best.metrics[metric.name]:.3g}" in said
    if not metric.larger:
        ticks = axis(chart, "yaxis")["tickvals"]
        assert min(ticks) < best.metrics["frechet"] < max(ticks)
        assert min(ticks) > best.metrics["frechet"] / 5


@pytest.mark.parametrize(
    ("many", "gap"), [(1, 1), (4, 1), (11, 1), (12, 2), (20, 2), (51, 5), (52, 10), (500, 50)]
)
def test_marks_of_trials_are_whole_numbers(many: int, gap: int) -> None:
    assert tick_step(many) == gap
    assert axis(history(trials(many), FRECHET, 3), "xaxis")["dtick"] == gap


def test_marks_of_a_logarithmic_axis_are_plain_numbers() -> None:
    assert marks(0.0005, 0.005) == [0.0005, 0.001, 0.002, 0.005]
    assert marks(1e-6, 1.0) == [1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0]
    chart = map_of(trials(12), 1, FRECHET, SPACE, *RATES)
    for name in ("xaxis", "yaxis"):
        assert axis(chart, name)["ticktext"] == [
            "0.0001", "0.0002", "0.0005", "0.001", "0.002", "0.005", "0.01",
        ]  # fmt: skip
        assert axis(chart, name)["range"] == pytest.approx([-4, -2])


def test_parallel_axes_are_those_of_fields_that_differ() -> None:
    rows = trials(12)
    chart = parallel(rows, 1, FRECHET, SPACE)
    (lines,) = chart.figure.data
    by_name = {axis.label: axis for axis in lines.dimensions}
    assert list(by_name) == ["lr_g", "lr_d", "D depth", "batch_size", "G depth", "frechet"]
    assert list(by_name["D depth"].ticktext) == ["3", "4", "5"]
    assert list(by_name["batch_size"].ticktext) == ["32", "64"]  # no trial has 128
    assert by_name["lr_g"].ticktext[0] == "0.0001"
    assert list(by_name["frechet"]["values"]) == [row.history[1] for row in rows]
    chart.to_html(script=False)
    side = chart.figure.layout.margin
    assert min(side.l, side.r) >= 50  # half of the outer names' width
    assert chart.width > 500


def test_contours_take_ten_points() -> None:
    kinds = [[d.type for d in map_of(trials(n), 1, FRECHET, SPACE, *RATES).figure.data]
             for n in (FEWEST - 1, FEWEST)]  # fmt: skip
    assert kinds == [["scatter"], ["contour", "scatter"]]
    assert "Fewer than 10" in map_of(trials(4), 1, FRECHET, SPACE, *RATES).note


def test_every_colour_bar_says_what_it_is_of() -> None:
    grid = grid_of(trials(12), 1, FRECHET, SPACE, *DEPTHS)
    assert grid.figure.data[0].colorbar.title.text == "frechet"
    points = map_of(trials(12), 1, FRECHET, SPACE, *RATES).figure.data[-1]
    assert points.marker.colorbar.title.text == "frechet"


def test_one_epoch_is_not_epochs() -> None:
    rows = trials(12)
    titles = [
        chart.title
        for epoch in (1, 3)
        for chart in (
            bars({"optimizer.lr_g": 1.0}, epoch),
            parallel([r for r in rows if epoch in r.history], epoch, FRECHET, SPACE),
        )
    ]
    assert [re.findall(r"after \d epochs?", title) for title in titles] == [
        ["after 1 epoch"], ["after 1 epoch"], ["after 3 epochs"], ["after 3 epochs"],
    ]  # fmt: skip


def test_the_front_is_of_both_metrics() -> None:
    (chart,) = pareto(trials(12), [FRECHET, PROBE], 3)
    assert chart.title == "frechet against linear_probe"
    assert [trace.name for trace in chart.figure.data] == ["finished", "stopped early", "front"]
    assert len({trace.marker.symbol for trace in chart.figure.data}) == 3
    assert "does not compare" in chart.note
    assert pareto(trials(12), [FRECHET], 3) == []


def test_nothing_is_claimed_of_fewer_than_ten_trials() -> None:
    for many in (0, 1, 4, FEWEST - 1):
        alike, epoch = comparable(trials(many))
        weights = importances(alike, epoch, FRECHET, SPACE)
        assert weights == {}
        # Nor where shares are given.
        for given in (weights, {"optimizer.lr_g": 0.9}):
            sentence = what_mattered(alike, epoch, FRECHET, given)
            assert "too few to say what mattered" in sentence
            assert "%" not in sentence
            assert "quarter" not in sentence
    assert what_mattered(trials(1), 1, FRECHET, {}).startswith("1 trial after 1 epoch is too few")
    same = [
        TrialResult(n, "finished", {}, {"frechet": 1.0}, 1, history={1: 1.0}) for n in range(12)
    ]
    assert "12 trials after 1 epoch do not differ" in what_mattered(same, 1, FRECHET, {})


def test_an_earlier_epoch_that_ten_reached_comes_before_a_later_one_of_fewer() -> None:
    rows = trials(12, stop=2)
    assert [len([r for r in rows if e in r.history]) for e in (1, 3)] == [12, 6]
    assert comparable(rows) == (rows, 1)
    few = trials(6)
    assert comparable(few) == ([r for r in few if 3 in r.history], 3)


@pytest.fixture
def search(tmp_path: Path) -> Search:
    base = preset("quick")
    options = Options(name="s", storage=str(tmp_path), epochs=3)
    folder, metrics = RunStorage(str(tmp_path), "s"), [FRECHET, PROBE]
    return Search("s", folder, options, SPACE, base, base, Dataset.open("mnist"), metrics, False)


@pytest.mark.parametrize("many", [0, 1, 4, 14])
def test_the_page_is_whole_and_says_what_the_search_said(search: Search, many: int) -> None:
    rows = [
        *trials(many),
        TrialResult(many, "failed", {"optimizer.lr_g": 0.001}, reason="<no> memory"),
    ]
    sentence = write_report(search, rows)
    page = (Path(search.folder.uri) / "report.html").read_text()
    assert sentence
    assert sentence.replace("'", "&#39;") in page
    assert "&lt;no&gt; memory" in page
    assert 'name="viewport"' in page
    assert page.count("plotly.js v") == (many > 0)
    assert len(re.findall(r"<tr[ >]", page)) == 1 + many + 1
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert ("frechet by trial" in titles) == (many > 0)
    assert ("No trial has a figure; the table" in page) == (many == 0)
    assert any(title.startswith("What mattered") for title in titles) == (many >= FEWEST)
    assert 'src="http' not in page
    if many == 14:
        assert sentence.startswith("Of 11 trials after 3 epochs, frechet went by ")
        assert json.dumps("best so far") in page
