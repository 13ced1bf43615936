"""The ranking of trials, and the files and tables that show it."""

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from cl_ray.config import Config, preset
from cl_ray.storage import RunStorage
from cl_ray.tuning.leaderboard import (
    SearchProgress,
    best_trial,
    leaderboard_table,
    pareto_front,
    rank_trials,
    write_leaderboard,
)
from cl_ray.tuning.study import SearchMetric, TrialResult

FRECHET, PROBE = SearchMetric("frechet", False), SearchMetric("linear_probe", True)


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
    assert [r.number for r in rank_trials(TRIALS, [FRECHET])] == [1, 4, 2, 0, 3, 5]
    assert [r.number for r in rank_trials(TRIALS, [PROBE])] == [2, 0, 4, 1, 3, 5]
    best = best_trial(TRIALS, [FRECHET])
    assert best is not None
    assert best.number == 4  # the best of the finished ones


def test_the_front_has_those_that_none_beats_in_both_metrics() -> None:
    both = [FRECHET, PROBE]
    valid = [r for r in TRIALS if r.is_valid]
    assert {r.number for r in pareto_front(valid, both)} == {1, 2, 4}  # 2 beats 0 in both
    assert [r.number for r in rank_trials(TRIALS, both)][3:] == [0, 3, 5]


def test_files_and_the_best_config(tmp_path: Path) -> None:
    folder = RunStorage(str(tmp_path), "s")
    write_leaderboard(folder, TRIALS, [FRECHET], preset("quick"))
    config = Config.load(tmp_path / "s" / "best.yaml")
    assert config.optimizer.lr_g == pytest.approx(0.0005)
    assert config == preset("quick").model_copy(update={"optimizer": config.optimizer})
    rows = json.loads((tmp_path / "s" / "leaderboard.json").read_text())
    assert [row["trial"] for row in rows] == [1, 4, 2, 0, 3, 5]
    lines = list(csv.DictReader(io.StringIO((tmp_path / "s" / "leaderboard.csv").read_text())))
    assert [line["trial"] for line in lines] == ["1", "4", "2", "0", "3", "5"]
    assert lines[1]["frechet"] == "2.0"
    assert lines[1]["optimizer.lr_g"] == "0.0005"
    assert lines[4]["reason"] == "diverged"


@pytest.mark.parametrize("width", [60, 80, 300])
def test_no_value_of_a_table_is_cut_off(width: int) -> None:
    values = {f"losses.weight_{i}": 0.0123 + i for i in range(12)}
    console = Console(width=width, file=io.StringIO(), record=True)
    results = [TrialResult(0, "finished", values, {"frechet": 1.5}, 2), trial(1, 1.25)]
    console.print(leaderboard_table(results, [FRECHET], 2, console))
    text = console.export_text(clear=False)
    assert all(f"{value:.3g}" in text for value in values.values()), text
    assert "…" not in text
    console.export_text()
    console.print(leaderboard_table(results, [FRECHET], 2, console, wrap=False))
    assert len(console.export_text().strip().splitlines()) == 3


def test_a_log_has_lines_and_a_terminal_a_table() -> None:
    log = io.StringIO()
    with SearchProgress(Console(file=log, width=120), [FRECHET], 2, 8) as progress:
        progress.show("trial 5 failed: disk full", TRIALS)
        progress.show("", TRIALS)
    assert log.getvalue() == "[6/8] trial 5 failed: disk full\n"
    screen = io.StringIO()
    console = Console(file=screen, width=120, height=9, force_terminal=True, color_system=None)
    with SearchProgress(console, [FRECHET], 2, 8) as progress:
        progress.show("", [*TRIALS, TrialResult(6, "running", {})])
    assert "6/8 trials   best: trial 4, frechet 2" in screen.getvalue()
    assert "disk full" not in screen.getvalue()
