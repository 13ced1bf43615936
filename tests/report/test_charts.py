"""Charts hold the numbers that they are drawn from."""

import json
from typing import Any

import numpy as np

from cl_ray.report import charts
from cl_ray.report.records import MetricCurve


def curve(values: list[float], every: int = 10) -> MetricCurve:
    return MetricCurve(np.arange(1, len(values) + 1) * every, np.array(values))


def layout(chart: charts.Chart) -> dict[str, Any]:
    return dict(chart.figure.to_plotly_json()["layout"])


def test_a_line_has_the_values_of_its_curve() -> None:
    d, g = curve([3.0, 1.0, 2.0, 0.0]), curve([0.5] * 4)
    chart = charts.line_chart("Losses", {"D": ("d", d), "G": ("g", g)}, [20, 40], from_zero=True)
    lines = chart.figure.data
    for line, expected, colour in zip(lines, (d, g), "dg", strict=True):
        assert list(line.x) == expected.steps.tolist()
        assert list(line.y) == expected.values.tolist()
        assert line.line.color == charts.COLOURS[colour]
    assert [line.name for line in lines] == ["D <b>0</b>", "G <b>0.5</b>"]
    assert [shape["x0"] for shape in layout(chart)["shapes"]] == [20, 40]
    assert layout(chart)["yaxis"]["rangemode"] == "tozero"
    assert chart.alt == "Losses, over 40 steps: D from 3 to 0; G from 0.5 to 0.5."
    many = charts.line_chart("Losses", {"D": ("d", d)}, range(1, 40))
    assert "shapes" not in layout(many)  # lines of many epochs would cover the curve


def test_fractions_are_in_per_cent() -> None:
    chart = charts.line_chart("Accuracy", {"D": ("c0", curve([0.95, 0.97]))}, fraction=True)
    assert "D from 95.00% to 97.00%" in chart.alt
    assert layout(chart)["yaxis"]["tickformat"].endswith("%")
    assert chart.figure.data[0].name == "D <b>97.00%</b>"


def test_long_curves_are_thinned_to_means_and_one_record_is_a_point() -> None:
    values = np.random.default_rng(0).normal(size=10 * charts.MAX_POINTS)
    whole = MetricCurve(np.arange(len(values)), values)
    (line,) = charts.line_chart("Long", {"D": ("d", whole)}).figure.data
    assert np.allclose(line.y, values.reshape(charts.MAX_POINTS, 10).mean(1))
    assert list(line.x) == list(range(9, len(values), 10))
    (point,) = charts.line_chart("Short", {"D": ("d", curve([2.0]))}).figure.data
    assert point.mode == "markers"


def test_a_path_leads_from_the_start_of_the_run_to_its_end() -> None:
    d, g = curve([0.5 + 0.01 * i for i in range(50)]), curve([3 - 0.05 * i for i in range(50)])
    chart = charts.path_chart("Losses", ("D", d), ("G", g), (1.386, 0.693, "equilibrium"))
    path, spots = chart.figure.data
    assert (list(path.x), list(path.y)) == (d.values.tolist(), g.values.tolist())
    assert list(path.marker.color) == d.steps.tolist()
    assert spots.text == ("start", "end", "equilibrium")
    assert spots.x == (d.values[0], d.values[-1], 1.386)
    assert spots.y == (g.values[0], g.values[-1], 0.693)
    short = charts.path_chart("Losses", ("D", curve([2.0])), ("G", curve([1.0])))
    assert short.figure.data[-1].text == ("start", "end")


def test_a_histogram_has_the_fraction_of_each_bin() -> None:
    groups = {"a": ("real", np.array([1.0] * 30 + [2.0] * 10)), "b": ("fake", np.array([5.0] * 7))}
    chart = charts.histogram_chart("Distances", groups, "distance")
    fractions = [{y for y in trace.y if y} for trace in chart.figure.data]
    assert fractions == [{0.75, 0.25}, {1.0}]
    assert chart.alt == "Distances: a, median 1; b, median 5."


def test_every_colour_has_a_dark_counterpart_and_json_may_stand_in_a_script() -> None:
    chart = charts.line_chart("</script>", {"</script>": ("d", curve([1.0, 2.0]))})
    text = chart.to_json()
    assert "<" not in text
    figure = json.loads(text)
    assert figure["data"][0]["name"].startswith("</script>")
    assert figure["layout"]["template"]["layout"]["font"] == charts.THEME["layout"]["font"]
    assert "data" not in figure["layout"]["template"]  # plotly's default theme is 7 kB a chart
    dark: dict[str, str] = {}
    for light, other in charts.PALETTE.values():  # page.js exchanges them by value
        assert dark.setdefault(light, other) == other


def test_numbers_have_three_significant_digits() -> None:
    numbers = [charts.format_number(v) for v in (12345.6, 999.6, 1.2345, 0.00001234, 0)]
    assert numbers == ["12,346", "1000", "1.23", "0.0000123", "0"]
    assert "e" not in charts.format_number(1e-7)
