"""Charts hold the numbers that they are of."""

import re
from itertools import pairwise

import numpy as np
import pytest

from cl_ray.report.chart import (
    BOTTOM,
    HEIGHT,
    LEFT,
    POINTS,
    RIGHT,
    TOP,
    WIDTH,
    axis,
    by_step,
    number,
    over_values,
    percent,
    short,
    through_plane,
)
from cl_ray.report.records import MetricCurve


def curve(values: list[float], every: int = 10) -> MetricCurve:
    return MetricCurve(np.arange(1, len(values) + 1) * every, np.array(values))


def points(path: str) -> np.ndarray:
    assert path[0] == "M"
    return np.array([[float(v) for v in pair.split()] for pair in path[1:].split("L")])


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0, 938, ["0", "200", "400", "600", "800"]),
        (0, 11_256, ["0", "5k", "10k"]),
        (-1.4, 3.1, ["-1", "0", "1", "2", "3"]),
        (0.162, 0.171, ["0.162", "0.164", "0.166", "0.168", "0.17"]),
    ],
)
def test_marks_are_round_numbers_within(low: float, high: float, words: list[str]) -> None:
    scale, ticks = axis(low, high, 40, 340)
    assert [tick.text for tick in ticks] == words
    ends = scale(np.array([low, high]))
    assert ends.tolist() == [40, 340]
    values = [float(w.replace("k", "e3")) for w in words]
    assert [tick.at for tick in ticks] == pytest.approx(scale(np.array(values)), abs=0.06)


def test_an_axis_may_end_at_marks_and_a_constant_has_one() -> None:
    scale, ticks = axis(-1.4, 3.1, 200, 0, grow=True)
    assert [tick.text for tick in ticks] == ["-2", "-1", "0", "1", "2", "3", "4"]
    assert (ticks[0].at, ticks[-1].at) == (200, 0)
    for value in (0.0, 3.0, -1e-5):
        scale, ticks = axis(value, value, 0, 100)
        assert 0 < float(scale(np.array(value))) < 100
        assert ticks


def test_a_line_lies_where_its_numbers_are() -> None:
    values = [3.0, 1.0, 2.0, 0.0]
    chart = by_step("Losses", {"D": ("d", curve(values)), "G": ("g", curve([0.5] * 4))}, [20, 40])
    d, g = (points(line.path) for line in chart.lines)
    assert d[:, 0] == pytest.approx(np.linspace(LEFT, WIDTH - RIGHT, 5)[1:], abs=0.06)
    top, foot = TOP, HEIGHT - BOTTOM
    assert d[:, 1] == pytest.approx([foot - v / 3 * (foot - top) for v in values], abs=0.06)
    assert len(set(g[:, 1])) == 1
    assert chart.xs == pytest.approx(d[:, 0], abs=0.06)
    assert chart.rules == pytest.approx([chart.xs[1], chart.xs[3]], abs=0.06)
    assert chart.lines[0].values == ["3", "1", "2", "0"]
    assert chart.x_values == ["10", "20", "30", "40"]
    assert chart.alt == "Losses, over 40 steps: D from 3 to 0; G from 0.5 to 0.5."


def test_shares_are_written_as_per_cent_on_the_axis_and_in_the_legend() -> None:
    chart = by_step("Accuracy", {"D": ("c0", curve([0.95, 0.97]))}, share=True)
    assert chart.lines[0].values == ["95.00%", "97.00%"]
    assert [tick.text for tick in chart.y_ticks] == ["95%", "95.5%", "96%", "96.5%", "97%"]
    assert "D from 95.00% to 97.00%" in chart.alt


def test_long_curves_are_thinned_to_means() -> None:
    values = np.random.default_rng(0).normal(size=10 * POINTS)
    thin = MetricCurve(np.arange(len(values)), values).thinned(POINTS)
    assert len(thin.steps) == POINTS
    assert thin.values == pytest.approx(values.reshape(POINTS, 10).mean(1))
    assert thin.steps.tolist() == list(range(9, len(values), 10))
    chart = by_step("Long", {"D": ("d", MetricCurve(np.arange(len(values)), values))})
    assert len(points(chart.lines[0].path)) == len(chart.xs) == POINTS


def test_one_record_is_a_dot() -> None:
    chart = by_step("Short", {"D": ("d", curve([2.0]))})
    assert len(points(chart.lines[0].path)) == 2
    game = through_plane("Game", ("D", curve([2.0])), ("G", curve([1.0])))
    assert [spot[2] for spot in game.spots] == ["start", "end"]


def test_a_path_through_the_plane_is_whole_and_ends_where_the_run_ended() -> None:
    d, g = curve([0.5 + 0.01 * i for i in range(50)]), curve([3 - 0.05 * i for i in range(50)])
    chart = through_plane("Game", ("D", d), ("G", g), (1.386, 0.693, "even chance"))
    parts = [points(line.path) for line in chart.lines]
    for before, after in pairwise(parts):
        assert before[-1].tolist() == after[0].tolist()
    assert sum(len(part) - 1 for part in parts) == 49
    start, end, even = chart.spots
    assert parts[0][0] == pytest.approx(start[:2], abs=0.06)
    assert parts[-1][-1] == pytest.approx(end[:2], abs=0.06)
    assert even[0] > end[0]  # D is ahead: its loss is below that of an even chance
    assert even[2] == "even chance"


def test_shares_of_values_add_up() -> None:
    sets = {"a": ("real", [1.0] * 30 + [2.0] * 10), "b": ("fake", [5.0] * 7)}
    chart = over_values("Distances", sets, "distance")
    for line, shares in zip(chart.lines, ({"75%", "25%"}, {"100%"}), strict=True):
        assert set(line.values) - {"0%"} == shares
    assert chart.alt == "Distances: a, median 1; b, median 5."


def test_numbers_in_words() -> None:
    assert [number(v) for v in (12345.6, 999.6, 1.2345, 0.00001234, 0)] == [
        "12,346", "1000", "1.23", "0.0000123", "0",
    ]  # fmt: skip
    assert [short(v) for v in (0.30000000000000004, 2500, 2e6, -0.0)] == ["0.3", "2.5k", "2M", "0"]
    assert [percent(v) for v in (0, 0.012, 0.25)] == ["0%", "1.2%", "25%"]
    assert not re.search("e", number(1e-7))
