"""Which charts a run has."""

from typing import Any

import numpy as np
import pytest

from cl_ray.evaluation.metrics import METRICS, Metric
from cl_ray.report import curves
from cl_ray.report.charts import Chart
from cl_ray.report.curves import evaluation_charts, training_charts
from cl_ray.report.records import MetricCurve


def last_values(chart: Chart) -> list[str]:
    return [line.name for line in chart.figure.data]


def evaluated(name: str) -> list[dict[str, Any]]:
    return [{"step": step, f"evaluation/{name}": step / 20} for step in (5, 10)]


def test_losses_of_a_kind_share_a_chart_and_unknown_ones_have_their_own() -> None:
    curve = MetricCurve(np.arange(3), np.ones(3))
    names = ("d/classification", "g/classification", "d/something_new", "other/thing")
    charts = training_charts(dict.fromkeys(names, curve), [])
    assert [chart.title for chart in charts] == ["Classification losses", "D’s something new"]
    assert last_values(charts[0]) == ["D <b>1</b>", "G <b>1</b>"]


def test_a_new_metric_of_the_registry_has_a_chart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluation_charts(evaluated("sharpness")) == []
    new = Metric("sharpness", "sharpness of edges", float, larger_is_better=True, fraction=True)
    monkeypatch.setattr(curves, "METRICS", (*METRICS, new))
    monkeypatch.setattr(curves, "metric_title", lambda name: new.title)
    (chart,) = evaluation_charts(evaluated("sharpness"))
    assert chart.title == "Sharpness of edges"
    assert last_values(chart) == ["sharpness <b>50.00%</b>"]
