"""The curves of a run, and the balance between G and D, as charts."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cl_ray.config import Config
from cl_ray.report.chart import Chart, by_step, through_plane
from cl_ray.report.records import MetricCurve

NEITHER = (2 * math.log(2), math.log(2))
"""D's and G's non-saturating loss where D gives every image an even chance: Goodfellow et al.
(2014), theorem 1."""


def curve_charts(curves: dict[str, MetricCurve], ends: list[int]) -> list[Chart]:
    """Losses and speed; curves of the same kind share a chart.

    Args:
        curves: By their names in the run's records.
        ends: Steps at which epochs ended.
    """
    charts = [
        _together(curves, ends, "Adversarial losses", {"D": "d/adversarial", "G": "g/adversarial"}),
        _alone(curves, ends, "Reconstruction |G(x) − x|, 0 to 2", "g/reconstruction", "g"),
        _alone(curves, ends, "D’s contrastive loss (InfoNCE)", "d/contrastive", "d"),
        _together(
            curves,
            ends,
            "Which fake came from x⁺: losses",
            {"D tells": "d/pair", "G hides": "g/pair_confusion"},
        ),
        _together(
            curves,
            ends,
            "Naming the class: losses",
            {"D": "d/classification", "G": "g/classification"},
        ),
        _alone(curves, ends, "D’s squared slope at real images (R1)", "d/approximate_r1", "d"),
        _alone(curves, ends, "Unevenness of G’s latent vectors", "g/uniformity", "g"),
    ]
    known = {
        "d/adversarial", "g/adversarial", "g/reconstruction", "d/contrastive", "d/pair",
        "g/pair_confusion", "d/approximate_r1", "g/uniformity", "d/classification",
        "g/classification",
    }  # fmt: skip
    for name in sorted(curves):
        if name[:2] in ("d/", "g/") and name not in known:
            title = f"{name[0].upper()}’s {name[2:].replace('_', ' ')}"
            charts.append(_alone(curves, ends, title, name, name[0]))
    speed = curves.get("speed/images_per_second")
    if speed:
        charts.append(by_step("Speed, images/s", {"images/s": ("ink", speed)}, ends, least=0))
    return [chart for chart in charts if chart]


@dataclass(frozen=True)
class LossBalance:
    """How G and D stood to each other.

    Args:
        charts: Scores, their margin, and the path through the plane of both losses.
        first: Mean margin of scores, real less fake, over the first tenth of the records.
        last: Over the last tenth.
    """

    charts: list[Chart]
    first: float
    last: float


def loss_balance(
    curves: dict[str, MetricCurve], ends: list[int], config: Config | None
) -> LossBalance | None:
    """The balance over time; None where there are no scores."""
    real, fake = curves.get("score/real"), curves.get("score/fake")
    if real is None or fake is None or len(real.steps) != len(fake.steps):
        return None
    margin = MetricCurve(real.steps, real.values - fake.values)
    charts = [
        by_step("D’s mean scores", {"real": ("real", real), "fake": ("fake", fake)}, ends),
        by_step("D’s margin: score of real less fake", {"margin": ("d", margin)}, ends, least=0),
    ]
    d, g = curves.get("d/adversarial"), curves.get("g/adversarial")
    if d and g and len(d.steps) == len(g.steps):
        known = config is not None and config.losses.objective == "non-saturating"
        charts.append(
            through_plane(
                "The game: G’s loss against D’s",
                ("D’s adversarial loss", d),
                ("G’s adversarial loss", g),
                (*NEITHER, "even chance") if known else None,
            )
        )
    tenth = max(1, len(margin.values) // 10)
    first, last = margin.values[:tenth], margin.values[-tenth:]
    return LossBalance(charts, float(np.mean(first)), float(np.mean(last)))


WHILE_TRAINING = (
    ("Fréchet distance over its floor", {"ratio": "frechet_over_floor"}),
    (
        "Precision, recall and coverage",
        {"precision": "precision", "recall": "recall", "coverage": "coverage"},
    ),
    ("Modes with a sample", {"modes": "modes"}),
    ("Divergence of the samples’ modes from the data’s, nats", {"KL": "mode_kl"}),
    ("Samples of the class asked for", {"by the reference": "class_accuracy"}),
    ("Accuracy of D’s representation", {"1 neighbour": "knn_1", "linear probe": "linear_probe"}),
    ("Reconstruction: mean square, pixels in [0, 1]", {"G": "reconstruction"}),
)
"""Charts of what was measured while training: title, and by legend what follows evaluation/."""
SHARES = {"precision", "recall", "coverage", "class_accuracy", "knn_1", "linear_probe"}
"""Of those the ones that are shares: the tables have them as per cent too."""


def evaluation_charts(lines: list[dict[str, Any]]) -> list[Chart]:
    """Metrics that were measured while training, where there are two of them or more.

    Args:
        lines: Of metrics.jsonl.
    """
    charts = []
    for title, names in WHILE_TRAINING:
        everything = {label: f"evaluation/{name}" for label, name in names.items()}
        keys = {k: v for k, v in everything.items() if any(v in line for line in lines)}
        measured = [ln for ln in lines if all(k in ln for k in keys.values())]
        if keys and len(measured) > 1:
            steps = np.array([ln["step"] for ln in measured], np.int64)
            found = {
                label: (
                    f"c{i}",
                    MetricCurve(steps, np.array([ln[key] for ln in measured], np.float64)),
                )
                for i, (label, key) in enumerate(keys.items())
            }
            charts.append(by_step(title, found, share=SHARES.issuperset(names.values())))
    return charts


def on_fewer(config: Config | None, evaluation: dict[str, Any] | None) -> bool:
    """Whether the run measured itself on fewer images than its evaluation.json is of."""
    if config is None or evaluation is None:
        return False
    fidelity = evaluation.get("fidelity") or {}
    mine = config.evaluation
    return mine.images < (evaluation.get("learnt_from") or 0) or mine.samples < (
        fidelity.get("count") or 0
    )


def _together(
    curves: dict[str, MetricCurve], ends: list[int], title: str, names: dict[str, str]
) -> Chart | None:
    """D's curve and G's in one chart; what is not there is left out."""
    there = {label: curves[name] for label, name in names.items() if name in curves}
    if not there or len({len(curve.steps) for curve in there.values()}) > 1:
        return None
    colours = {label: name[0] for label, name in names.items()}
    return by_step(title, {label: (colours[label], c) for label, c in there.items()}, ends)


def _alone(
    curves: dict[str, MetricCurve], ends: list[int], title: str, name: str, colour: str
) -> Chart | None:
    curve = curves.get(name)
    label = {"d": "D", "g": "G"}[colour]
    return by_step(title, {label: (colour, curve)}, ends) if curve else None
