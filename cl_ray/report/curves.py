"""Which charts a run has: training curves, the balance between G and D, evaluations by step."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cl_ray.config import Config
from cl_ray.evaluation.metrics import METRICS, metric_title
from cl_ray.report.charts import Chart, capitalize, line_chart, path_chart
from cl_ray.report.records import MetricCurve

EQUILIBRIUM = (2 * math.log(2), math.log(2))
"""D's and G's non-saturating loss where D gives every image probability 1/2 (Goodfellow et al.,
2014, theorem 1)."""
TRAINING_CHARTS = (
    ("Adversarial losses", {"D": "d/adversarial", "G": "g/adversarial"}),
    ("Reconstruction |G(x) − x|, 0 to 2", {"G": "g/reconstruction"}),
    ("D’s contrastive loss (InfoNCE)", {"D": "d/contrastive"}),
    ("Pair losses: which fake is of x⁺", {"D": "d/pair", "G": "g/pair_confusion"}),
    ("Classification losses", {"D": "d/classification", "G": "g/classification"}),
    ("D’s squared gradient at real images (R1)", {"D": "d/approximate_r1"}),
    ("D’s gradient penalty, (|∇s| − 1)²", {"D": "d/gradient_penalty"}),
    ("Uniformity loss of G’s latent vectors", {"G": "g/uniformity"}),
)
"""Title, and for each legend entry the name of its metric in the run's log."""
_SHARED_CHARTS = {
    "Precision, recall and coverage": ("precision", "recall", "coverage"),
    "Accuracy of D’s representation": ("knn_1", "linear_probe"),
}
"""Metrics of the registry that share a chart, by its title; others have one of their own."""
_ONLY_IN_TABLES = {"frechet", "kernel", "density", "label_entropy", "label_balance", "knn_20"}
"""Metrics of the registry without a curve on the page; TensorBoard has it. New ones have one."""


@dataclass(frozen=True)
class LossBalance:
    """How G and D did against each other.

    Args:
        charts: Scores, their margin, and the path through the plane of both losses.
        first_margin: Mean score of real images minus that of fakes, over the first tenth of the
            records.
        last_margin: The same over the last tenth.
    """

    charts: list[Chart]
    first_margin: float
    last_margin: float


def training_charts(curves: dict[str, MetricCurve], epoch_ends: list[int]) -> list[Chart]:
    """Build the charts of losses and speed, of curves by their names in the run's log."""
    known = {name for _, names in TRAINING_CHARTS for name in names.values()}
    others = [name for name in sorted(curves) if name[:2] in ("d/", "g/") and name not in known]
    owners = {"d": "D", "g": "G"}
    named = [
        (f"{owners[name[0]]}’s {name[2:].replace('_', ' ')}", {owners[name[0]]: name})
        for name in others
    ]
    charts = []
    for title, names in (*TRAINING_CHARTS, *named):
        found = {label: (name[0], curves[name]) for label, name in names.items() if name in curves}
        if found:
            charts.append(line_chart(title, found, epoch_ends))
    speed = curves.get("speed/images_per_second")
    if speed:
        named_speed = {"images/s": ("quiet", speed)}
        charts.append(line_chart("Speed, images/s", named_speed, epoch_ends, from_zero=True))
    return charts


def loss_balance(
    curves: dict[str, MetricCurve], epoch_ends: list[int], config: Config | None
) -> LossBalance | None:
    """Build the balance over time; None where no scores were logged."""
    real, fake = curves.get("score/real"), curves.get("score/fake")
    if real is None or fake is None or len(real.steps) != len(fake.steps):
        return None
    margin = MetricCurve(real.steps, real.values - fake.values)
    scores = {"real": ("real", real), "fake": ("fake", fake)}
    margins = {"margin": ("d", margin)}
    charts = [
        line_chart("D’s mean scores", scores, epoch_ends),
        line_chart("D’s margin: score real − fake", margins, epoch_ends, from_zero=True),
    ]
    d, g = curves.get("d/adversarial"), curves.get("g/adversarial")
    if d and g and len(d.steps) == len(g.steps):
        known = config is not None and config.losses.objective == "non-saturating"
        charts.append(
            path_chart(
                "G’s loss against D’s",
                ("D’s adversarial loss", d),
                ("G’s adversarial loss", g),
                (*EQUILIBRIUM, "equilibrium") if known else None,
            )
        )
    tenth = max(1, len(margin.values) // 10)
    first, last = margin.values[:tenth], margin.values[-tenth:]
    return LossBalance(charts, float(np.mean(first)), float(np.mean(last)))


def evaluation_charts(epochs: list[dict[str, Any]]) -> list[Chart]:
    """Build the charts of what metrics.jsonl has of evaluations, where there are two or more."""
    shared = {name for names in _SHARED_CHARTS.values() for name in names} | _ONLY_IN_TABLES
    names_of = {title: list(names) for title, names in _SHARED_CHARTS.items()}
    for metric in METRICS:
        names_of |= {capitalize(metric_title(n)): [n] for n in metric.names if n not in shared}
    fractions = {metric.name for metric in METRICS if metric.fraction}
    charts = []
    for title, members in names_of.items():
        names = [n for n in members if any(f"evaluation/{n}" in line for line in epochs)]
        lines = [line for line in epochs if all(f"evaluation/{n}" in line for n in names)]
        if names and len(lines) > 1:
            steps = np.array([line["step"] for line in lines], np.int64)
            found = {}
            for i, name in enumerate(names):
                values = np.array([line[f"evaluation/{name}"] for line in lines], float)
                label = metric_title(name) if title in _SHARED_CHARTS else name
                found[label] = f"c{i}", MetricCurve(steps, values)
            charts.append(line_chart(title, found, fraction=fractions.issuperset(members)))
    return charts
