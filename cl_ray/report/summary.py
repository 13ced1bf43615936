"""What was trained and how it went, in a sentence, in large metrics and in a table."""

from dataclasses import dataclass
from typing import Any

from cl_ray.config import Config
from cl_ray.errors import redact_credentials
from cl_ray.model import TrainedModel
from cl_ray.report.chart import count, number, share_of


@dataclass(frozen=True)
class Stat:
    """A large figure: what it is, its value, and what that is against."""

    name: str
    value: str
    against: str


def headline(
    config: Config | None,
    summary: dict[str, Any] | None,
    lines: list[dict[str, Any]],
    run: TrainedModel | None,
) -> str:
    """One sentence on what was trained, and how far."""
    if config is None:
        return "This run’s settings cannot be read by this version of cl_ray."
    done = lines[-1]["epoch"] if lines else 0
    step = max(lines[-1]["step"] if lines else 0, run.step if run else 0)
    far = f"{done} of {config.epochs} epochs" if done < config.epochs else count(done, "epoch")
    how = {
        "views": "pairs from views of one image, without labels",
        "labels": "pairs by labels, supervised",
    }[config.pairs.mode]
    if config.condition != "none":
        how = (
            f"{how.removesuffix(', without labels')}; labels given to G and D ({config.condition})"
        )
    over = summary is not None and summary.get("epochs", 0) >= config.epochs
    state = "" if over else " It is still training, or was stopped before its end."
    return (
        f"G and D trained on {redact_credentials(config.data)} for {far}, {step:,} steps of "
        f"{config.batch_size} pairs; {how}.{state}"
    )


def headline_stats(
    evaluation: dict[str, Any] | None, summary: dict[str, Any] | None, lines: list[dict[str, Any]]
) -> list[Stat]:
    """The metrics that people ask for first, as far as they are there."""
    found = []
    measured = evaluation or {}
    fidelity = measured.get("fidelity") or {}
    frechet = (fidelity.get("metrics") or {}).get("frechet") or {}
    value, floor = frechet.get("value"), frechet.get("floor")
    if value is not None:
        against = f"{number(value / floor)} × that of real images" if floor else "0 if alike"
        found.append(Stat("Fréchet distance", number(value), against))
    scores = (measured.get("representation") or {}).get("discriminator") or {}
    for name, title in (("knn_1", "1 nearest neighbour"), ("linear_probe", "Linear probe")):
        score = scores.get(name) or {}
        if score.get("accuracy") is not None:
            of = "of test images, on D’s representation"
            found.append(Stat(title, share_of(score["accuracy"]), of))
    error = (measured.get("reconstruction") or {}).get("error")
    if error is not None:
        mean = (measured.get("reconstruction") or {}).get("mean_image")
        against = f"{number(mean)} for the mean image" if mean is not None else ""
        found.append(Stat("Reconstruction error", number(error), against))
    if lines:
        last = lines[-1]
        waited = f"{last['waited']:.1%} of the time waiting for data" if "waited" in last else ""
        if "images_per_second" in last:
            found.append(Stat("Speed, images/s", number(last["images_per_second"]), waited))
    if summary and "seconds" in summary:
        workers = summary.get("workers", 1)
        on = f"{count(workers, 'worker')}, {summary.get('device', 'device not known')}"
        found.append(Stat("Time", roughly(summary["seconds"]), on))
    return found


def how_it_went(
    summary: dict[str, Any] | None, lines: list[dict[str, Any]]
) -> list[tuple[str, str]]:
    """Machine, versions, cost and size, a row each."""
    if summary is None:
        return []
    rows = [("device of a worker", str(summary.get("device", "not known")))]
    rows.append(("workers", str(summary.get("workers", "not known"))))
    if "seconds" in summary:
        inside = summary.get("training_seconds")
        steps = f", of which training {duration_words(inside)}" if inside else ""
        rows.append(("time", f"{duration_words(summary['seconds'])} in all{steps}"))
    if lines and "images_per_second" in lines[-1]:
        rows.append(("speed", f"{number(lines[-1]['images_per_second'])} images/s, last epoch"))
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


def duration_words(seconds: float) -> str:
    """3 h 20 min, 5 min 52 s or 8.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def roughly(seconds: float) -> str:
    """3.9 min, in the unit that leaves a number of few digits."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
