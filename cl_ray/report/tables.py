"""Rows of the page's tables of metrics: each metric of evaluation.json beside its baseline."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cl_ray.evaluation.metrics import metric_title
from cl_ray.report.charts import format_number, format_percent


@dataclass(frozen=True)
class MetricRow:
    """One metric.

    Args:
        name: Its name.
        about: What it is, in a few words.
        value: Its value for the samples, with its unit.
        baseline: Its value for real images in their place; empty if unknown.
        ratio: The value over the baseline; empty if they are not divided.
        bar: The value on a scale from 0 to 100 that ends at the best; None if it has no end.
        mark: The baseline on that scale.
    """

    name: str
    about: str
    value: str
    baseline: str
    ratio: str
    bar: float | None
    mark: float | None


@dataclass(frozen=True)
class _Display:
    """How a metric is shown: what it is, its format, the end of its scale, whether divided."""

    about: str = ""
    form: Callable[[float], str] = format_number
    end: float | None = None
    relative: bool = False


def _one_decimal(value: float) -> str:
    return f"{value:.1%}"


def _one_to(value: float) -> str:
    return f"1 : {1 / value:.1f}" if value > 0 else "0 : 1"


_DISPLAYS = {
    "frechet": _Display("0 for identical distributions", relative=True),
    "kernel": _Display("about 0 for identical distributions"),
    "precision": _Display("samples that lie among real images", _one_decimal, 1),
    "recall": _Display("real images that lie among the samples", _one_decimal, 1),
    "density": _Display("how densely real images surround a sample", end=1),
    "coverage": _Display("real images with a sample beside them", _one_decimal, 1),
    "label_entropy": _Display("of the labels that the reference predicts"),
    "label_balance": _Display("1 : 1 is even", _one_to, 1),
    "class_accuracy": _Display("samples for which the reference predicts it", format_percent, 1),
    "classification_accuracy": _Display("on real test images", format_percent, 1),
    "modes": _Display("", "{:.0f}".format),
    "mode_kl": _Display(relative=True),
}
"""Of metrics that are shown otherwise than by their title and three digits."""


def fidelity_rows(fidelity: dict[str, Any]) -> list[MetricRow]:
    """Return a row for each metric with a value, in their order.

    Args:
        fidelity: The part `fidelity` or `modes` of evaluation.json.
    """
    rows = []
    for name, metric in (fidelity.get("metrics") or {}).items():
        value, baseline = (metric or {}).get("value"), (metric or {}).get("real_baseline")
        if value is None:
            continue
        display = _DISPLAYS.get(name, _Display())
        end = display.end
        if name == "label_entropy" and fidelity.get("histogram"):
            end = math.log(len(fidelity["histogram"]))
        ratio = ""
        if baseline and display.relative:
            ratio = f"{format_number(value / baseline)} × the baseline"
        rows.append(
            MetricRow(
                name=_capitalize(metric_title(name)),
                about=display.about,
                value=display.form(value),
                baseline="" if baseline is None else display.form(baseline),
                ratio=ratio,
                bar=_on_scale(value, end),
                mark=None if baseline is None else _on_scale(baseline, end),
            )
        )
    return rows


_OWNERS = {"discriminator": "D’s representation", "encoder": "G’s encoder", "pixels": "raw pixels"}


def representation_table(
    representation: dict[str, Any],
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return column names, and for each probe its name and its cells: accuracy ± spread."""
    owners = {k: v for k, v in representation.items() if isinstance(v, dict) and v}
    names = dict.fromkeys(name for scores in owners.values() for name in scores)
    rows = [
        (_capitalize(metric_title(name)), [_cell(s.get(name)) for s in owners.values()])
        for name in names
    ]
    return [_OWNERS.get(owner, owner.capitalize()) for owner in owners], rows


def _cell(score: dict[str, Any] | None) -> str:
    if not score or score.get("accuracy") is None:
        return "–"
    spread = score.get("spread")
    text = format_percent(score["accuracy"])
    return text + (f" ± {spread * 100:.2f}" if spread is not None else "")


def _on_scale(value: float, end: float | None) -> float | None:
    return None if not end else round(100 * min(max(value / end, 0), 1), 1)


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]
