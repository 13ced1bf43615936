"""What was trained and with which result: a sentence, the most important numbers, a table."""

from dataclasses import dataclass
from typing import Any

from cl_ray.config import Config
from cl_ray.errors import redact_credentials
from cl_ray.evaluation.metrics import metric_title
from cl_ray.model import TrainedModel
from cl_ray.report.charts import format_number, format_percent


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
    """Return a sentence on what was trained, and how far.

    Args:
        config: The run's config; None if it cannot be read.
        summary: summary.json.
        epochs: The lines of metrics.jsonl.
        run: The checkpoint that is shown.
    """
    if config is None:
        return "This run’s settings cannot be read by this version of cl_ray."
    done = epochs[-1]["epoch"] if epochs else 0
    step = max(epochs[-1]["step"] if epochs else 0, run.step if run else 0)
    length = f"{done} of {config.epochs} epochs" if done < config.epochs else _count(done, "epoch")
    pairs = "pairs by labels, supervised"
    if config.pairs.mode == "views":
        pairs = "pairs of views of the same image"
        pairs += ", without labels" if config.condition == "none" else ""
    if config.condition != "none":
        pairs += f"; labels given to G and D ({config.condition})"
    is_over = summary is not None and summary.get("epochs", 0) >= config.epochs
    state = "" if is_over else " It is still training, or was stopped before its end."
    return (
        f"G and D trained on {redact_credentials(config.data)} for {length}, {step:,} steps of "
        f"{config.batch_size} pairs; {pairs}.{state}"
    )


def headline_stats(
    evaluation: dict[str, Any] | None, summary: dict[str, Any] | None, epochs: list[dict[str, Any]]
) -> list[Stat]:
    """Return the most important numbers, as far as they are known.

    Args:
        evaluation: evaluation.json.
        summary: summary.json.
        epochs: The lines of metrics.jsonl.
    """
    stats = []
    measured = evaluation or {}
    frechet = ((measured.get("fidelity") or {}).get("metrics") or {}).get("frechet") or {}
    value, baseline = frechet.get("value"), frechet.get("real_baseline")
    if value is not None:
        ratio = f"{format_number(value / baseline)} × that of real images" if baseline else ""
        stats.append(Stat(metric_title("frechet"), format_number(value), ratio))
    scores = (measured.get("representation") or {}).get("discriminator") or {}
    for name in ("knn_1", "linear_probe"):
        score = scores.get(name) or {}
        if score.get("accuracy") is not None:
            what = "accuracy on test images, of D’s representation"
            stats.append(Stat(metric_title(name), format_percent(score["accuracy"]), what))
    reconstruction = measured.get("reconstruction") or {}
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
        workers = _count(summary.get("workers", 1), "worker")
        device = summary.get("device", "device not known")
        stats.append(
            Stat("Time", format_rough_duration(summary["seconds"]), f"{workers}, {device}")
        )
    return stats


def run_details(
    summary: dict[str, Any] | None, epochs: list[dict[str, Any]]
) -> list[tuple[str, str]]:
    """Return rows on machine, versions, cost and size: name and value.

    Args:
        summary: summary.json.
        epochs: The lines of metrics.jsonl.
    """
    if summary is None:
        return []
    rows = [("device of a worker", str(summary.get("device", "not known")))]
    rows.append(("workers", str(summary.get("workers", "not known"))))
    if "seconds" in summary:
        inside = summary.get("training_seconds")
        steps = f", of which training {_exact_duration(inside)}" if inside else ""
        rows.append(("time", f"{_exact_duration(summary['seconds'])} in all{steps}"))
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


def format_rough_duration(seconds: float) -> str:
    """Format as 3.9 min, in the unit that leaves few digits."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _exact_duration(seconds: float) -> str:
    """Format as 3 h 20 min, 5 min 52 s or 8.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
