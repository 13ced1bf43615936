"""What evaluation.json says, as rows to look at: each figure beside its floor."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cl_ray.report.chart import number, share_of


@dataclass(frozen=True)
class MetricRow:
    """One figure.

    Args:
        name: What is measured.
        about: What that is, in a few words.
        value: Of the samples, with its unit.
        floor: Of real images in their place, with its unit; empty if not known.
        against: The one compared with the other; empty if not compared.
        bar: The value on a scale from 0 to 100 that ends at the best; None if it has no end.
        mark: The floor on that scale.
    """

    name: str
    about: str
    value: str
    floor: str
    against: str
    bar: float | None
    mark: float | None


@dataclass(frozen=True)
class MetricFormat:
    """How a figure is shown: its name, what it is, how it is written, where its scale ends."""

    name: str
    about: str
    form: Callable[[float], str]
    end: float | None = None
    ratio: bool = False


def percent_of_whole(value: float) -> str:
    """0.7634 as 76.3%."""
    return f"{value:.1%}"


def one_to(value: float) -> str:
    """0.4 as 1 : 2.5."""
    return f"1 : {1 / value:.1f}" if value > 0 else "0 : 1"


def metric_formats(classes: int | None) -> dict[str, MetricFormat]:
    """What is known of the metrics of fidelity, by their names in evaluation.json."""
    nats = math.log(classes) if classes else None
    most = f" (at most {nats:.2f})" if nats else ""
    return {
        "frechet": MetricFormat("Fréchet distance", "0 if alike", number, ratio=True),
        "kernel": MetricFormat("Kernel distance", "0 if alike, give or take noise", number),
        "precision": MetricFormat(
            "Precision", "samples that lie among real images", percent_of_whole, 1
        ),
        "recall": MetricFormat(
            "Recall", "real images that lie among the samples", percent_of_whole, 1
        ),
        "density": MetricFormat("Density", "how densely real images surround a sample", number, 1),
        "coverage": MetricFormat(
            "Coverage", "real images with a sample beside them", percent_of_whole, 1
        ),
        "label_entropy": MetricFormat(
            "Entropy of labels", f"nats{most}, as the reference labels the samples", number, nats
        ),
        "label_balance": MetricFormat("Rarest to commonest label", "1 : 1 is even", one_to, 1),
        "class_accuracy": MetricFormat(
            "Of the class asked for", "samples that the reference gives their class", share_of, 1
        ),
        "classification_accuracy": MetricFormat(
            "Classifier trained on samples", "real test images that it labels rightly", share_of, 1
        ),
        "modes": MetricFormat("Modes found", "with at least one sample", "{:.0f}".format),
        "mode_kl": MetricFormat(
            "Divergence over modes", "KL(samples || data), nats", number, ratio=True
        ),
    }


def fidelity_rows(fidelity: dict[str, Any]) -> list[MetricRow]:
    """A row for each figure that has a value, in their order."""
    histogram = fidelity.get("histogram")
    known = metric_formats(len(histogram) if histogram else None)
    rows = []
    for name, figure in (fidelity.get("metrics") or {}).items():
        value, floor = (figure or {}).get("value"), (figure or {}).get("floor")
        if value is None:
            continue
        how = known.get(name) or MetricFormat(name.replace("_", " ").capitalize(), "", number)
        against = ""
        if floor is not None and how.ratio and floor > 0:
            against = f"{number(value / floor)} × the floor"
        rows.append(
            MetricRow(
                name=how.name,
                about=how.about,
                value=how.form(value),
                floor="" if floor is None else how.form(floor),
                against=against,
                bar=_on_scale(value, how.end),
                mark=None if floor is None else _on_scale(floor, how.end),
            )
        )
    return rows


SCORES = {
    "knn_1": "1 nearest neighbour",
    "knn_20": "20 nearest neighbours",
    "linear_probe": "Linear probe, all labels",
}
"""Those of few labels carry their number in their name."""
OWNERS = {"discriminator": "D’s representation", "encoder": "G’s encoder", "pixels": "bare pixels"}


def representation_table(
    representation: dict[str, Any],
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Column names, and for each score its name and a cell a column: accuracy, spread."""
    there = {k: v for k, v in representation.items() if isinstance(v, dict) and v}
    names = dict.fromkeys(name for scores in there.values() for name in scores)
    rows = [(_called(n), [_cell(scores.get(n)) for scores in there.values()]) for n in names]
    return [OWNERS.get(owner, owner.capitalize()) for owner in there], rows


def _called(name: str) -> str:
    few = re.fullmatch(r"labels_(\d+)(_spread)?", name)
    if few is None:
        return SCORES.get(name, name.replace("_", " ").capitalize())
    return f"{few[1]} labels, " + ("spread over the other images" if few[2] else "linear probe")


def _cell(score: dict[str, Any] | None) -> str:
    if not score or score.get("accuracy") is None:
        return "–"
    spread = score.get("spread")
    return share_of(score["accuracy"]) + (f" ± {spread * 100:.2f}" if spread is not None else "")


def _on_scale(value: float, end: float | None) -> float | None:
    return None if not end else round(100 * min(max(value / end, 0), 1), 1)
