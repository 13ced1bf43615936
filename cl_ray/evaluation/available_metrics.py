"""Which metrics an evaluation gives while a run trains: known before anything is started."""

from cl_ray.config import Config
from cl_ray.data.dataset import STACKED, Dataset
from cl_ray.errors import UserError
from cl_ray.evaluation.evaluate import resolve_reference
from cl_ray.evaluation.probes import MANY
from cl_ray.evaluation.reference import INCEPTION, ReferenceClassifier

FIDELITY = (
    "frechet",
    "frechet_over_floor",
    "kernel",
    "precision",
    "recall",
    "density",
    "coverage",
)
BY_LABEL = ("label_entropy", "label_balance")
MODES = ("modes", "mode_kl")
CLASSES = ("class_accuracy",)
PROBES = ("linear_probe",)
NEIGHBOURS = ("knn_1", "knn_20")
ALWAYS = ("reconstruction",)


def available_metrics(config: Config, dataset: Dataset) -> list[str]:
    """The metrics by name, as `Evaluation.metrics` has them; what a search goes by comes first.

    Raises:
        UserError: The reference is not there, or the data's labels are no classes.
    """
    return [name for name in _all() if _lacks(name, config, dataset) is None]


def check_metric_available(
    name: str, config: Config, dataset: Dataset, field: str, prefix: str = ""
) -> None:
    """See that evaluations give a figure.

    Args:
        name: The figure's.
        config: Whose evaluations.
        dataset: What is trained on.
        field: Which of the user's choices it is.
        prefix: What stands before a figure's name there.

    Raises:
        UserError: They do not; it says why, and what they give.
    """
    lack = _lacks(name, config, dataset) if name in _all() else "networks"
    if lack is not None:
        there = ", ".join(f"{prefix}{figure}" for figure in available_metrics(config, dataset))
        raise UserError(
            f"{field} {prefix + name!r} is not among what is measured of {lack}: take {there}."
        )


def _all() -> tuple[str, ...]:
    return (*FIDELITY, *BY_LABEL, *MODES, *CLASSES, *PROBES, *NEIGHBOURS, *ALWAYS)


def _lacks(name: str, config: Config, dataset: Dataset) -> str | None:
    """What it is of that a figure is not measured; None if it is."""
    reference = resolve_reference(dataset, config.evaluation.reference)
    labelled = dataset.info.labelled
    if name in CLASSES and config.condition == "none":
        return "networks that are told no classes (condition none)"
    if name in (*FIDELITY, *BY_LABEL, *CLASSES) and reference is None:
        return "this data without a reference (evaluation.reference)"
    if name in MODES and reference != STACKED:
        return f"this data, not being {STACKED}"
    if name in (*PROBES, *NEIGHBOURS) and not labelled:
        return "this data without labels"
    if name in PROBES and len(dataset.class_names()) > MANY:
        return f"this data of more than {MANY} classes"
    if name in BY_LABEL and str(reference).startswith(f"{INCEPTION}:"):
        return f"this data by evaluation.reference {reference!r}, which gives no labels"
    if name in CLASSES and not _of_the_same_classes(str(reference), dataset):
        return f"this data by evaluation.reference {reference!r}, which does not name its classes"
    return None


def _of_the_same_classes(reference: str, dataset: Dataset) -> bool:
    """Whether a reference tells the data's classes apart."""
    if reference == STACKED or reference.startswith(f"{INCEPTION}:") or not dataset.info.labelled:
        return False
    return ReferenceClassifier.load(reference).about.classes == dataset.class_names()
