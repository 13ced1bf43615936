"""What was trained and with which result: a sentence, the most important numbers, tables.

In all functions `evaluation` and `summary` are the content of evaluation.json and summary.json, and
`epochs` the lines of metrics.jsonl.
"""

import math
from dataclasses import dataclass
from typing import Any

from cl_ray.config import Config
from cl_ray.errors import format_duration, pluralize
from cl_ray.evaluation.metrics import is_fraction, metric_title
from cl_ray.model import TrainedModel
from cl_ray.report.charts import capitalize, format_number, format_percent


@dataclass(frozen=True)
class Stat:
    """A number in large type: its name, its value, and what to compare it with."""

    name: str
    value: str
    comparison: str


def headline(
    config: Config | None,
    summary: dict[str, Any] | None,
    epochs: list[dict[str, Any]],
    run: TrainedModel | None,
) -> str:
    """Return a sentence on what was trained, and how far; no config is one that cannot be read."""
    if config is None:
        return "This run’s settings cannot be read by this version of cl_ray."
    done = epochs[-1]["epoch"] if epochs else 0
    step = max(epochs[-1]["step"] if epochs else 0, run.step if run else 0)
    of = f"of {config.epochs} epochs"
    length = f"{done} {of}" if done < config.epochs else pluralize(done, "epoch")
    pairs = "pairs by labels, supervised"
    if config.pairs.mode == "views":
        pairs = "pairs of views of the same image"
        pairs += ", without labels" if config.condition == "none" else ""
    if config.condition != "none":
        pairs += f"; labels given to G and D ({config.condition})"
    if config.labels.count:
        pairs += f"; {config.labels.count:,} training images with a label"
    is_over = summary is not None and summary.get("epochs", 0) >= config.epochs
    state = "" if is_over else " It is still training, or was stopped before its end."
    return (
        f"G and D trained on {config.data} for {length}, {step:,} steps of "
        f"{config.batch_size} pairs; {pairs}.{state}"
    )


def headline_stats(
    evaluation: dict[str, Any], summary: dict[str, Any] | None, epochs: list[dict[str, Any]]
) -> list[Stat]:
    """Return the most important numbers, as far as they are known."""
    stats = []
    frechet = ((evaluation.get("fidelity") or {}).get("metrics") or {}).get("frechet") or {}
    value, baseline = frechet.get("value"), frechet.get("real_baseline")
    if value is not None:
        ratio = f"{format_number(value / baseline)} × that of real images" if baseline else ""
        stats.append(Stat(metric_title("frechet"), format_number(value), ratio))
    scores = (evaluation.get("representation") or {}).get("discriminator") or {}
    split = evaluation.get("split", "test")
    for name in ("knn_1", "linear_probe"):
        accuracy = (scores.get(name) or {}).get("value")
        if accuracy is not None:
            what = f"accuracy on the split {split}, of D’s representation"
            stats.append(Stat(metric_title(name), format_percent(accuracy), what))
    classified = evaluation.get("classification") or {}
    if classified.get("error") is not None:
        used = classified.get("training_labels")
        labels = pluralize(used, "label") if used else "labels"
        what = f"on the split {split}, trained with {labels}"
        stats.append(Stat("Error of D’s classifier", format_percent(classified["error"]), what))
    reconstruction = evaluation.get("reconstruction") or {}
    if reconstruction.get("error") is not None:
        mean = reconstruction.get("mean_image")
        comparison = f"{format_number(mean)} for the mean image" if mean is not None else ""
        error = format_number(reconstruction["error"])
        stats.append(Stat("Reconstruction error", error, comparison))
    last = epochs[-1] if epochs else {}
    if "images_per_second" in last:
        fraction = last.get("data_time_fraction")
        waiting = "" if fraction is None else f"{fraction:.1%} of the time waiting for data"
        stats.append(Stat("Speed, images/s", format_number(last["images_per_second"]), waiting))
    if summary and "seconds" in summary:
        workers = pluralize(summary.get("workers", 1), "worker")
        device = summary.get("device", "device not known")
        stats.append(Stat("Time", format_duration(summary["seconds"]), f"{workers}, {device}"))
    return stats


def run_details(
    summary: dict[str, Any] | None, epochs: list[dict[str, Any]]
) -> list[tuple[str, str]]:
    """Return rows on machine, versions, cost and size: name and value."""
    if summary is None:
        return []
    rows = [("device of a worker", str(summary.get("device", "not known")))]
    rows.append(("workers", str(summary.get("workers", "not known"))))
    if "seconds" in summary:
        inside = summary.get("training_seconds")
        steps = f", of which training {format_duration(inside)}" if inside else ""
        rows.append(("time", f"{format_duration(summary['seconds'])} in all{steps}"))
    if epochs and "images_per_second" in epochs[-1]:
        speed = format_number(epochs[-1]["images_per_second"])
        rows.append(("speed", f"{speed} images/s, last epoch"))
    for key, title in (("worker", "memory of a worker"), ("driver", "memory of the driver")):
        size = summary.get(f"{key}_peak_bytes")
        if size:
            rows.append((title, f"{size / 1e9:.2f} GB at its peak"))
    for network, weights in (summary.get("parameters") or {}).items():
        rows.append((network, f"{weights:,} parameters"))
    if summary.get("best"):
        rows.append(("best checkpoint", str(summary["best"])))
    for package, version in (summary.get("versions") or {}).items():
        rows.append((package, str(version)))
    return rows


@dataclass(frozen=True)
class MetricRow:
    """One metric.

    Args:
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


_ABOUT = {
    "frechet": "0 for identical distributions",
    "kernel": "about 0 for identical distributions",
    "precision": "samples that lie among real images",
    "recall": "real images that lie among the samples",
    "density": "how densely real images surround a sample",
    "coverage": "real images with a sample beside them",
    "label_entropy": "of the labels that the reference predicts",
    "label_balance": "1 : 1 is even",
    "class_accuracy": "samples for which the reference predicts it",
    "classification_accuracy": "on held-out real images",
}
"""What a metric is, where its title does not say enough."""
_UP_TO_ONE = ("density", "label_balance")
"""Metrics whose scale ends at 1, besides fractions."""
_RELATIVE = ("frechet", "mode_kl")
"""Metrics that are divided by their baseline."""


def fidelity_rows(fidelity: dict[str, Any]) -> list[MetricRow]:
    """Return a row for each metric of the part `fidelity` or `modes` that has a value."""
    rows = []
    for name, metric in (fidelity.get("metrics") or {}).items():
        value, baseline = (metric or {}).get("value"), (metric or {}).get("real_baseline")
        if value is None:
            continue
        end = 1.0 if is_fraction(name) or name in _UP_TO_ONE else None
        if name == "label_entropy" and fidelity.get("histogram"):
            end = math.log(len(fidelity["histogram"]))
        ratio = ""
        if baseline and name in _RELATIVE:
            ratio = f"{format_number(value / baseline)} × the baseline"
        rows.append(
            MetricRow(
                name=capitalize(metric_title(name)),
                about=_ABOUT.get(name, ""),
                value=_format(name, value),
                baseline="" if baseline is None else _format(name, baseline),
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
    """Return column names, and for each metric its name and its cells: value ± spread.

    The argument is the part of an evaluation of this name.
    """
    owners = {owner: scores for owner, scores in representation.items() if scores}
    names = dict.fromkeys(name for scores in owners.values() for name in scores)
    rows = [
        (capitalize(metric_title(name)), [_cell(name, s.get(name)) for s in owners.values()])
        for name in names
    ]
    return [_OWNERS.get(owner, owner.capitalize()) for owner in owners], rows


def _cell(name: str, score: dict[str, Any] | None) -> str:
    if score is None or score.get("value") is None:
        return "–"
    text, spread = _format(name, score["value"]), score.get("spread")
    if spread is None:
        return text
    return f"{text} ± {f'{100 * spread:.2f}' if is_fraction(name) else format_number(spread)}"


def _format(name: str, value: float) -> str:
    if name == "label_balance":
        return f"1 : {1 / value:.1f}" if value > 0 else "0 : 1"
    return format_percent(value) if is_fraction(name) else format_number(value)


def _on_scale(value: float, end: float | None) -> float | None:
    return None if not end else round(100 * min(max(value / end, 0), 1), 1)
