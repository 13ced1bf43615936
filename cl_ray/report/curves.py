"""Which charts a run has: training curves, the balance between G and D, evaluations by step."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cl_ray.config import Config
from cl_ray.evaluation.metrics import METRICS, metric_title
from cl_ray.report.charts import Chart, line_chart, path_chart
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
EVALUATION_CHARTS = (
    ("Fréchet distance / real-data baseline", {"ratio": "frechet_over_baseline"}),
    (
        "Precision, recall and coverage",
        {"precision": "precision", "recall": "recall", "coverage": "coverage"},
    ),
    ("Modes with a sample", {"modes": "modes"}),
    ("KL(modes of samples || modes of data), nats", {"KL": "mode_kl"}),
    ("Samples of the requested class", {"by the reference": "class_accuracy"}),
    ("Accuracy of D’s representation", {"1-NN": "knn_1", "linear probe": "linear_probe"}),
    ("Reconstruction MSE, pixels in [0, 1]", {"G": "reconstruction"}),
)
"""Title, and for each legend entry the name of its metric, without `evaluation/`."""
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
    known = {name for _, names in EVALUATION_CHARTS for name in names.values()} | _ONLY_IN_TABLES
    others = [name for metric in METRICS for name in metric.names if name not in known]
    fractions = {metric.name for metric in METRICS if metric.fraction}
    charts = []
    for title, names in (*EVALUATION_CHARTS, *((metric_title(n), {n: n}) for n in others)):
        keys = {label: f"evaluation/{name}" for label, name in names.items()}
        keys = {label: key for label, key in keys.items() if any(key in line for line in epochs)}
        lines = [line for line in epochs if all(key in line for key in keys.values())]
        if keys and len(lines) > 1:
            steps = np.array([line["step"] for line in lines], np.int64)
            found = {
                label: (f"c{i}", MetricCurve(steps, np.array([line[key] for line in lines], float)))
                for i, (label, key) in enumerate(keys.items())
            }
            charts.append(line_chart(title, found, fraction=fractions.issuperset(names.values())))
    return charts
