"""report.html of a search: what its charts show, and that the page is complete."""

import re
from pathlib import Path

import pytest
from helpers.small_search import FRECHET, PROBE, prepared_search
from optuna.visualization import plot_parallel_coordinate

from cl_ray.report.charts import THEME
from cl_ray.tuning.charts import history_charts, importance_chart, value_charts
from cl_ray.tuning.importance import (
    MIN_COMPARABLE,
    comparable_study,
    comparable_trials,
    parameter_importances,
)
from cl_ray.tuning.leaderboard import describe_best, search_front
from cl_ray.tuning.report import write_report
from cl_ray.tuning.search import Search
from cl_ray.tuning.space import Space
from cl_ray.tuning.study import TrialResult

SPACE = Space.from_yaml(
    """
    optimizer.lr_g: {kind: log, low: 0.0001, high: 0.01}
    optimizer.lr_d: {kind: log, low: 0.0001, high: 0.01}
    discriminator.depth: {kind: int, low: 2, high: 5}
    generator.depth: {kind: int, low: 2, high: 5, at_most: discriminator.depth}
    batch_size: {kind: choice, values: [32, 64, 128]}
    optimizer.ema_decay: {kind: float, low: 0.9, high: 0.999}
    """
)


def trials(count: int) -> list[TrialResult]:
    """Trials of three epochs, every fourth stopped after one; G's rate decides."""
    results = []
    for number in range(count):
        values = {
            "optimizer.lr_g": 0.0001 * 1.5 ** (number % 10),
            "optimizer.lr_d": 0.0002 + 0.0003 * (number % 7),
            "discriminator.depth": 3 + number % 3,
            "generator.depth": 2 + number % 2,
            "batch_size": 32 + 32 * (number % 2),
            "optimizer.ema_decay": 0.99,
        }
        cost = 0.8 + abs(number % 10 - 4)
        epochs = 1 if number % 4 == 3 else 3
        history = {epoch: cost * 4 / (1 + epoch) for epoch in range(1, epochs + 1)}
        metrics = {"frechet": history[epochs], "linear_probe": 0.9 - 0.01 * cost}
        status = "finished" if epochs == 3 else "stopped"
        result = TrialResult(number, status, values, metrics, epochs, 60.0, history=history)
        results.append(result)
    return results


def test_the_history_is_of_finished_trials_and_stopped_ones_have_a_curve() -> None:
    results = [TrialResult(0, "diverged", {}), *trials(9)[1:]]
    history, curves = history_charts(results, [FRECHET], SPACE)
    values, best, _ = history.figure.data
    finished = [result for result in results if result.status == "finished"]
    assert list(values.x) == [result.number for result in finished]
    assert list(values.y) == [result.metrics["frechet"] for result in finished]
    assert list(best.y) == sorted(best.y, reverse=True)
    assert history.note == "Without a value: 1 diverged."
    lengths = {trace.name: len(trace.x) for trace in curves.figure.data}
    assert lengths == {f"Trial{r.number}": r.epoch for r in results if r.epoch}
    assert "cannot be compared" in curves.note
    assert history.figure.layout.yaxis.type == "log"
    stopped = [result for result in results if result.status == "stopped"]
    assert list(history_charts(stopped, [FRECHET], SPACE)[0].figure.data[0].x) == [3, 7]
    assert history_charts(results[:1], [FRECHET], SPACE) == []


def test_values_outside_of_the_space_are_left_out(tmp_path: Path) -> None:
    """As those of a trial that was enqueued: Optuna takes no such value."""
    results = trials(12)
    results[0].values["optimizer.lr_g"] = 0.05
    search = prepared_search(tmp_path, [FRECHET], SPACE)
    search.folder.create()
    assert write_report(search, results).startswith("Of 11 trials after 1 epoch, ")
    (history, _) = history_charts(results, [FRECHET], SPACE)
    assert 0 in history.figure.data[0].x


def test_fields_of_one_last_name_are_told_apart() -> None:
    space = Space.from_yaml(
        """
        views.rotate: {kind: float, low: 0, high: 1}
        augment.rotate: {kind: float, low: 0, high: 1}
        """
    )
    results = []
    for number in range(12):
        values = {"views.rotate": number / 12, "augment.rotate": number * 7 % 12 / 12}
        history = {1: values["views.rotate"]}
        results.append(TrialResult(number, "finished", values, {}, 1, 1.0, history=history))
    found = parameter_importances(results, 1, FRECHET, space)
    assert list(found) == ["views.rotate"]  # the other explains no more than chance
    assert found["views.rotate"] > 0.8


def test_the_pareto_front_is_of_both_metrics() -> None:
    *_, front = history_charts(trials(12), [FRECHET, PROBE], SPACE)
    assert front.title == "Pareto front of frechet and linear_probe"
    assert front.figure.layout.xaxis.title.text == "frechet"
    assert front.figure.layout.yaxis.title.text == "linear_probe"
    assert sum(len(trace.x) for trace in front.figure.data) == 12


def test_values_are_drawn_of_fields_that_differ_and_contours_of_ten_trials() -> None:
    results = trials(12)
    parallel, rates, depths = value_charts(results, 1, FRECHET, SPACE)
    shown = plot_parallel_coordinate(comparable_study(results, 1, FRECHET, SPACE))
    labels = {"lr_g", "lr_d", "D depth", "G depth", "batch_size"}  # ema_decay has one value
    assert set(comparable_study(results, 1, FRECHET, SPACE).trials[0].params) == labels
    assert len(parallel.figure.data) == len(shown.data)
    assert parallel.min_width > 500
    assert rates.title == "frechet by lr_g and lr_d after 1 epoch"
    assert depths.title == "frechet by G depth and D depth after 1 epoch"
    assert rates.figure.layout.xaxis.type == "log"
    for chart in (rates, depths):
        contour, points, *_ = chart.figure.data
        assert contour.colorbar.title.text == "frechet"
        assert len(points.x) == 12
    assert len(value_charts(trials(MIN_COMPARABLE - 1), 1, FRECHET, SPACE)) == 1
    assert value_charts(results[:1], 1, FRECHET, SPACE) == []


def test_importances_are_bars_in_the_theme_of_the_page() -> None:
    comparable, epoch = comparable_trials(trials(14))
    chart = importance_chart(comparable, epoch, FRECHET, SPACE)
    assert chart.title == "Importances for frechet after 3 epochs"
    (bars,) = chart.figure.data
    assert set(bars.y) == {"lr_g", "lr_d", "D depth", "G depth", "batch_size"}
    assert sum(bars.x) == pytest.approx(1)
    assert "<" not in chart.to_json()
    template = chart.figure.layout.template.layout
    assert template.font.color == THEME["layout"]["font"]["color"]


@pytest.fixture
def search(tmp_path: Path) -> Search:
    return prepared_search(tmp_path, [FRECHET, PROBE], SPACE)


@pytest.mark.parametrize("count", [0, 1, 14])
def test_the_page_is_complete_and_has_the_sentence(search: Search, count: int) -> None:
    failed = TrialResult(count, "failed", {"optimizer.lr_g": 0.001}, reason="<no> memory")
    results = [*trials(count), failed]
    sentence = write_report(search, results)
    page = (Path(search.folder.uri) / "report.html").read_text()
    headline = describe_best(results, search.metrics) or "No trial can be ranked."
    assert f'<p class="lead">{headline}</p>' in page
    assert page.index(headline) < page.index(sentence.replace("'", "&#39;"))
    assert "&lt;no&gt; memory" in page
    assert 'name="viewport"' in page
    assert page.count("* plotly.js v") == 1
    assert len(re.findall(r"<tr[ >]", page.partition("<table>")[2].partition("</table>")[0])) == (
        1 + count + 1
    )
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert ("frechet by epoch" in titles) == (count > 0)
    assert ("No trial has a value of the metric; the table" in page) == (count == 0)
    assert any(t.startswith("Importances") for t in titles) == (count >= MIN_COMPARABLE)
    assert 'src="http' not in page
    stars = re.findall(r"<td>(\d+) \*</td>", page)
    assert stars == [str(r.number) for r in search_front(results, search.metrics)]
    if count == 14:
        assert sentence.startswith("Of 11 trials after 3 epochs, frechet depends most on ")
