"""The ranking of trials, and the files and tables that show it."""

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.small_search import FRECHET, PROBE, prepared_search
from rich.console import Console

from cl_ray.config import Config, preset
from cl_ray.errors import printable
from cl_ray.evaluation.config import EvaluationConfig
from cl_ray.tuning.leaderboard import (
    SearchProgress,
    best_trial,
    describe_best,
    leaderboard_table,
    rank_trials,
    search_front,
    write_leaderboard,
)
from cl_ray.tuning.space import Space
from cl_ray.tuning.study import SearchMetric, TrialResult


def trial(number: int, frechet: float, probe: float = 0.5, status: str = "finished") -> TrialResult:
    valid = status in ("finished", "stopped")
    metrics = {"frechet": frechet, "linear_probe": probe} if valid else {}
    values = {"optimizer.lr_g": 0.0001 * (number + 1)}
    return TrialResult(number, status, values, metrics, epoch=2, reason="" if valid else status)


TRIALS = [
    trial(0, 9.0, 0.9),
    trial(1, 1.0, 0.1, "stopped"),
    trial(2, 5.0, 0.95),
    trial(3, 0.0, 0.0, "diverged"),
    trial(4, 2.0, 0.8),
    trial(5, 0.0, 0.0, "failed"),
]


def test_the_best_come_first_and_invalid_ones_last() -> None:
    assert [r.number for r in rank_trials(TRIALS, [FRECHET])] == [4, 2, 0, 1, 3, 5]
    assert [r.number for r in rank_trials(TRIALS, [PROBE])] == [2, 0, 4, 1, 3, 5]
    best = best_trial(TRIALS, [FRECHET])
    assert best is not None
    assert best.number == 4  # the best of the finished ones


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_never_wins(value: float) -> None:
    """As one that an earlier version recorded."""
    broken = [trial(6, value, 0.99), trial(7, 0.5, value)]
    assert [r.number for r in rank_trials([*broken, *TRIALS], [FRECHET])][-3:] == [6, 3, 5]
    assert [r.number for r in rank_trials([*broken, *TRIALS], [PROBE])][-3:] == [7, 3, 5]
    for metrics in ([FRECHET], [PROBE], [FRECHET, PROBE]):
        without = best_trial(TRIALS, metrics)
        with_broken = best_trial([broken[metrics[0] is PROBE], *TRIALS], metrics)
        assert with_broken == without
        assert best_trial([broken[metrics[0] is PROBE]], metrics) is None
    assert {6, 7}.isdisjoint(r.number for r in search_front([*broken, *TRIALS], [FRECHET, PROBE]))


def test_the_front_has_those_that_none_beats_in_both_metrics() -> None:
    both = [FRECHET, PROBE]
    assert {r.number for r in search_front(TRIALS, both)} == {2, 4}  # 2 beats 0 in both
    # The finished trials go before one that was stopped.
    assert search_front([TRIALS[1], TRIALS[3]], both) == [TRIALS[1]]
    assert [r.number for r in rank_trials(TRIALS, both)][2:] == [0, 1, 3, 5]


def test_the_first_of_the_table_is_the_best_of_several_metrics() -> None:
    """Also where a stopped trial changes the ranks of the finished ones."""
    finished = [trial(0, 3.0, 0.9), trial(1, 1.0, 0.5), trial(2, 2.0, 0.7)]
    for stopped in ([], [trial(3, 2.5, 0.8, "stopped"), trial(4, 1.5, 0.6, "stopped")]):
        results, both = [*finished, *stopped], [FRECHET, PROBE]
        assert rank_trials(results, both)[0] == best_trial(results, both)
        assert {r.number for r in rank_trials(results, both)[:3]} == {0, 1, 2}


def test_it_says_why_a_trial_is_the_best() -> None:
    assert describe_best(TRIALS, [FRECHET]) == (
        "Trial 4 is the best of 3 finished trials: frechet 2 after 2 epochs."
    )
    assert describe_best(TRIALS, [FRECHET, PROBE]) == (
        "Trial 2 is the best of 2 trials of the Pareto front, by the mean of its ranks among 3 "
        "finished trials: frechet 5, linear_probe 0.95 after 2 epochs."
    )
    assert describe_best([TRIALS[1], TRIALS[3]], [FRECHET]) == (
        "Trial 1 is the best of 1 stopped trial: frechet 1 after 2 epochs."
    )
    assert describe_best(TRIALS[5:], [FRECHET]) == ""


def test_files_and_the_best_config(tmp_path: Path) -> None:
    search = prepared_search(tmp_path, [FRECHET], Space.load("rates"))
    measured = preset("quick").model_copy(update={"evaluation": EvaluationConfig(images=500)})
    write_leaderboard(replace(search, trial_config=measured), TRIALS)
    header = (tmp_path / "s" / "best.yaml").read_text().splitlines()[:2]
    assert header[0] == f"# Search s. {describe_best(TRIALS, [FRECHET])}"
    images = search.dataset.info.splits["train"].rows
    assert header[1] == (
        f"# An epoch was {images:,} training images; metrics are of at most 10,000 samples and "
        "as many real images, probes of at most 500 training ones."
    )
    config = Config.load(tmp_path / "s" / "best.yaml")
    assert config.optimizer.lr_g == pytest.approx(0.0005)
    assert config == preset("quick").model_copy(update={"optimizer": config.optimizer})
    rows = json.loads((tmp_path / "s" / "leaderboard.json").read_text())
    assert [row["trial"] for row in rows] == [4, 2, 0, 1, 3, 5]
    lines = list(csv.DictReader(io.StringIO((tmp_path / "s" / "leaderboard.csv").read_text())))
    assert [line["trial"] for line in lines] == ["4", "2", "0", "1", "3", "5"]
    assert lines[0]["frechet"] == "2.0"
    assert lines[0]["optimizer.lr_g"] == "0.0005"
    assert lines[4]["reason"] == "diverged"


def test_no_cell_is_a_formula_and_numbers_are_numbers(tmp_path: Path) -> None:
    reasons = [f'{start}HYPERLINK("http://x")\n\x1b[2J' for start in "=+-@\t\r"]
    failed = [
        TrialResult(number, "failed", {"seed": -1}, reason=reason)
        for number, reason in enumerate(reasons)
    ]
    write_leaderboard(prepared_search(tmp_path, [FRECHET], Space.load("rates")), failed)
    text = (tmp_path / "s" / "leaderboard.csv").read_text()
    assert text.count("\n") == 1 + len(failed)
    lines = list(csv.DictReader(io.StringIO(text)))
    assert [line["reason"] for line in lines] == [f"'{printable(reason)}" for reason in reasons]
    assert {line["seed"] for line in lines} == {"-1"}


def drawn(results: list[TrialResult], metrics: list[SearchMetric], width: int) -> list[str]:
    """Return the lines of the table on a console of that width."""
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(leaderboard_table(results, metrics, 3, console))
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.mark.parametrize("width", [60, 300])
def test_a_trial_is_a_line_with_the_fields_that_differ(width: int) -> None:
    values = {f"losses.weight_{i}": 0.0123 + i for i in range(12)}
    results = [
        TrialResult(0, "finished", {**values, "seed": 5}, {"frechet": 1.5}, 2),
        TrialResult(1, "waiting", {"losses.weight_0": 3.0, "seed": 5}),
    ]
    lines = drawn(results, [FRECHET], width)
    assert all(len(line) <= width for line in lines)
    assert [line.split()[:2] for line in lines[-2:]] == [["0", "finished"], ["1", "waiting"]]
    assert "seed" not in "".join(lines)  # the same in all
    shown = [v for v in values.values() if f"{v:.3g}" in lines[-2]]
    assert len(shown) == 12 if width == 300 else 2 <= len(shown) < 12
    assert shown == list(values.values())[: len(shown)]
    assert "seed" in "".join(drawn(results[:1], [FRECHET], 300))  # of one trial all are shown


def test_a_star_marks_the_front() -> None:
    ranked = rank_trials(TRIALS, [FRECHET, PROBE])
    numbers = [line.split()[0] for line in drawn(ranked, [FRECHET, PROBE], 120)[1:]]
    assert numbers == ["*2", "*4", "0", "1", "3", "5"]
    numbers = [line.split()[0] for line in drawn(ranked, [FRECHET], 120)[1:]]
    assert numbers == ["2", "4", "0", "1", "3", "5"]


def test_a_log_has_lines_and_a_terminal_a_table() -> None:
    log = io.StringIO()
    with SearchProgress(Console(file=log, width=120), [FRECHET], 2, 8) as progress:
        progress.show("trial 5 failed: disk full", TRIALS)
        progress.show("", TRIALS)
    assert log.getvalue() == "[6/8] trial 5 failed: disk full\n"
    screen = io.StringIO()
    console = Console(file=screen, width=120, height=9, force_terminal=True, color_system=None)
    with SearchProgress(console, [FRECHET], 2, 8) as progress:
        progress.show("", [*TRIALS, TrialResult(6, "running", {}), TrialResult(7, "waiting", {})])
    assert "6/8 trials   best: trial 4, frechet 2" in screen.getvalue()
    assert "disk full" not in screen.getvalue()
