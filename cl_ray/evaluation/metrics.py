"""The registry of metrics: what each is called, how it is computed, and what it needs.

To add a metric, write a function of `Samples` (generated images), of `ProbeData` (features with
labels), of `FeatureData` (features with or without labels) or of a histogram over the modes of
stacked digits, and add an entry to SAMPLE_METRICS, PROBE_METRICS, FEATURE_METRICS or MODE_METRICS.
Evaluations, evaluation.json, curves, tables, `checkpoint.metric` and the search then know it.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from cl_ray.data.dataset import STACKED, Dataset
from cl_ray.errors import UserError
from cl_ray.evaluation import feature_metrics as features
from cl_ray.evaluation import fidelity, probes
from cl_ray.evaluation.classifier import Labels, Pixels
from cl_ray.evaluation.config import EvaluationConfig
from cl_ray.evaluation.feature_metrics import FeatureData
from cl_ray.evaluation.fidelity import Samples
from cl_ray.evaluation.probes import FeatureScore, ProbeData
from cl_ray.evaluation.reference import ReferenceClassifier, gives_labels
from cl_ray.evaluation.reference_name import resolve_reference

OVER_BASELINE = "_over_baseline"
"""Suffix of a metric divided by its real-data baseline."""

Input = TypeVar("Input")
Value = TypeVar("Value", float, FeatureScore)


@dataclass(frozen=True)
class MetricContext:
    """What decides which metrics an evaluation has.

    Args:
        reference: Name of its reference, `auto` resolved; None if there is none.
        split: The split that is measured on.
    """

    dataset: Dataset
    reference: str | None
    condition: str
    split: str = "validation"

    @classmethod
    def of(
        cls, dataset: Dataset, config: EvaluationConfig, condition: str, split: str = "validation"
    ) -> "MetricContext":
        """Resolve the reference of an evaluation's config, and a split that is missing."""
        split = split if split in dataset.info.splits else "train"
        return cls(dataset, resolve_reference(dataset, config.reference), condition, split)


Requirement = Callable[[MetricContext], str | None]
"""Returns None if it is met, else what the metric is not measured of, in words."""


@dataclass(frozen=True)
class Metric(Generic[Input, Value]):
    """An entry of the registry.

    Args:
        name: Key in evaluation.json, of curves, of `checkpoint.metric` and of the search.
        compute: The metric as a function of what it measures.
        requires: What must hold; the first that does not is named in errors.
        larger_is_better: Whether it grows as the networks get better.
        fraction: Whether it is a fraction of 1, which charts write in per cent.
        thorough: Whether it takes so long that only `cl-ray evaluate` computes it.
        relative: Whether NAME_over_baseline is a metric, too: this one over its baseline.
        baseline: Real images that take the samples' place for its real-data baseline: as many
            training images, or the held-out images where a baseline must be of unseen ones.
    """

    name: str
    title: str
    compute: Callable[[Input], Value]
    requires: tuple[Requirement, ...] = ()
    _: KW_ONLY
    larger_is_better: bool
    fraction: bool = False
    thorough: bool = False
    relative: bool = False
    baseline: Literal["train", "held_out"] = "train"

    @property
    def names(self) -> list[str]:
        """Its name and, if relative, that of its ratio to the baseline."""
        return [self.name, *([self.name + OVER_BASELINE] if self.relative else [])]

    def unavailable(self, context: MetricContext) -> str | None:
        """Return what it is not measured of; None if it is measured."""
        return next(filter(None, (requirement(context) for requirement in self.requires)), None)


def _has_reference(context: MetricContext) -> str | None:
    return None if context.reference else "this data without a reference (evaluation.reference)"


def _predicts_labels(context: MetricContext) -> str | None:
    if context.reference is None or gives_labels(context.reference):
        return None
    return f"this data by evaluation.reference {context.reference!r}, which gives no labels"


def _knows_classes(context: MetricContext) -> str | None:
    """The reference's classes are those of the data; without a reference, that is what lacks."""
    if context.reference is None:
        return None
    name = context.reference
    if name != STACKED and gives_labels(name) and not _has_labels(context):
        classes = ReferenceClassifier.load(name).metadata.classes
        if classes == context.dataset.class_names():
            return None
    return f"this data by evaluation.reference {name!r}, which does not name its classes"


def _is_conditional(context: MetricContext) -> str | None:
    trained = context.condition != "none"
    return None if trained else "networks that are told no classes (condition none)"


def _has_classifier(context: MetricContext) -> str | None:
    if context.condition == "classifier":
        return None
    return f"networks without a classifier (condition {context.condition})"


def _is_stacked(context: MetricContext) -> str | None:
    return None if context.reference == STACKED else f"this data, not being {STACKED}"


def _has_labels(context: MetricContext) -> str | None:
    for split in ("train", context.split):
        if not context.dataset.info.labelled_rows(split):
            whole = not context.dataset.info.labelled
            return f"this data without labels{'' if whole else f' in the split {split}'}"
    return None


def _has_two_classes(context: MetricContext) -> str | None:
    for split in ("train", context.split):
        if context.dataset.only_label(split) is not None:
            return f"this data of one class in the split {split}"
    return None


def _has_few_classes(context: MetricContext) -> str | None:
    many = len(context.dataset.class_names()) > probes.MAX_PROBED_CLASSES
    return f"this data of more than {probes.MAX_PROBED_CLASSES} classes" if many else None


def _frechet(samples: Samples) -> float:
    return fidelity.frechet_distance(samples.real_features, samples.features)


def _kernel(samples: Samples) -> float:
    return fidelity.kernel_distance(samples.real_features, samples.features, samples.seed)


_LABELLED = (_has_labels, _has_two_classes)
_PROBED = (*_LABELLED, _has_few_classes)


def sample_metric(
    name: str,
    title: str,
    compute: Callable[[Samples], float],
    *requires: Requirement,
    larger_is_better: bool,
    **options: Any,
) -> Metric[Samples, float]:
    """Make an entry; samples are generated only where there is a reference."""
    needs = (*requires, _has_reference)
    return Metric(name, title, compute, needs, larger_is_better=larger_is_better, **options)


def _manifold_metric(name: str) -> Metric[Samples, float]:
    return sample_metric(
        name,
        name,
        lambda samples: samples.manifolds[name],
        larger_is_better=True,
        fraction=name != "density",
    )


SAMPLE_METRICS: tuple[Metric[Samples, float], ...] = (
    sample_metric("frechet", "Fréchet distance", _frechet, larger_is_better=False, relative=True),
    sample_metric("kernel", "kernel distance", _kernel, larger_is_better=False),
    *map(_manifold_metric, ("precision", "recall", "density", "coverage")),
    sample_metric(
        "label_entropy",
        "entropy of the labels, nats",
        lambda s: fidelity.label_entropy(s.histogram),
        _predicts_labels,
        larger_is_better=True,
    ),
    sample_metric(
        "label_balance",
        "rarest label : commonest",
        lambda s: fidelity.label_balance(s.histogram, s.real_classes),
        _predicts_labels,
        larger_is_better=True,
    ),
    sample_metric(
        "class_accuracy",
        "samples of the requested class",
        fidelity.class_accuracy,
        _is_conditional,
        _knows_classes,
        larger_is_better=True,
        fraction=True,
        baseline="held_out",
    ),
    sample_metric(
        "classification_accuracy",
        "accuracy of a classifier trained on them",
        fidelity.classification_accuracy_score,
        _has_labels,
        _knows_classes,
        larger_is_better=True,
        fraction=True,
        thorough=True,
    ),
)
"""Of generated images, beside the real-data baseline; without a reference none are generated."""

MODE_METRICS: tuple[Metric[NDArray[np.int64], float], ...] = (
    Metric(
        "modes",
        "modes with a sample",
        lambda h: float((h > 0).sum()),
        (_is_stacked,),
        larger_is_better=True,
    ),
    Metric(
        "mode_kl",
        "KL(samples || data) over modes, nats",
        lambda h: fidelity.mode_kl(h, fidelity.expected_mode_fractions()),
        (_is_stacked,),
        larger_is_better=False,
    ),
)
"""Of the histogram over the modes of stacked digits, int64 [1000], of more samples than the others
are of; the baseline is of real triples."""

_probe = partial(Metric[ProbeData, FeatureScore], larger_is_better=True, fraction=True)
PROBE_METRICS: tuple[Metric[ProbeData, FeatureScore], ...] = (
    _probe("linear_probe", "linear probe", probes.linear_probe_accuracy, _PROBED),
    _probe("knn_1", "1-NN", partial(probes.knn_accuracy, k=1), _LABELLED),
    _probe("knn_20", "20-NN", partial(probes.knn_accuracy, k=20), _LABELLED),
    _probe("few_labels", "10 labels per class", probes.few_labels_accuracy, _PROBED, thorough=True),
    _probe(
        "few_labels_spread",
        "10 labels per class, spread over all images",
        probes.few_labels_spread_accuracy,
        _PROBED,
        thorough=True,
    ),
)
"""Test accuracy of probes of the features; D's go by the name alone."""

_of_features = partial(Metric[FeatureData, FeatureScore], thorough=True)
_of_clusters = partial(_of_features, requires=_PROBED, larger_is_better=True)
FEATURE_METRICS: tuple[Metric[FeatureData, FeatureScore], ...] = (
    _of_clusters("cluster_accuracy", "clustering accuracy", features.cluster_accuracy),
    _of_clusters("kmeans_accuracy", "k-means clustering accuracy", features.kmeans_accuracy),
    _of_clusters("nmi", "normalized mutual information", features.normalized_mutual_information),
    _of_clusters("ari", "adjusted Rand index", features.adjusted_rand_index),
    _of_features(
        "alignment", "alignment of two views", features.feature_alignment, larger_is_better=False
    ),
    _of_features("uniformity", "uniformity", features.feature_uniformity, larger_is_better=False),
    _of_features(
        "effective_rank", "effective rank (RankMe)", features.effective_rank, larger_is_better=True
    ),
)
"""Of the features themselves: clusters, and checks that need no labels; D's go by the name
alone."""

RECONSTRUCTION: Metric[tuple[Any, Pixels], float] = Metric(
    "reconstruction",
    "mean squared error of reconstructions, pixels in [0, 1]",
    lambda pair: mean_squared_error(*pair),
    larger_is_better=False,
)

CLASSIFIER_ERROR: Metric[tuple[Labels, Labels], float] = Metric(
    "classifier_error",
    "error of D's classifier",
    lambda pair: float(np.mean(pair[0] != pair[1])),
    (_has_classifier, _has_labels),
    larger_is_better=False,
    fraction=True,
)
"""Of the classes that D predicts and the labels, of images that have one."""

METRICS: tuple[Metric[Any, Any], ...] = (
    *SAMPLE_METRICS,
    *MODE_METRICS,
    *PROBE_METRICS,
    *FEATURE_METRICS,
    CLASSIFIER_ERROR,
    RECONSTRUCTION,
)
"""All metrics; the first available one is what a search optimises by default."""

_BY_NAME = {name: metric for metric in METRICS for name in metric.names}


def mean_squared_error(images: NDArray[Any], targets: Pixels, parts: int = 20) -> float:
    """Compute the mean squared difference of images [n, H, W, C], pixels scaled to [0, 1].

    In float64, a part of the images at a time.
    """
    pairs = zip(np.array_split(images, parts), np.array_split(targets, parts), strict=True)
    total = sum(float(np.square(np.subtract(x, y, dtype=np.float64)).sum()) for x, y in pairs)
    return total / targets.size / 255**2


def metric_title(name: str) -> str:
    """Return the name of a metric in tables; of an unknown one, its name in words."""
    title = _BY_NAME[name].title if name in _BY_NAME else name.replace("_", " ")
    return f"{title} / real-data baseline" if name.endswith(OVER_BASELINE) else title


def is_fraction(name: str) -> bool:
    """Return whether a metric is known to be a fraction of 1, which is written in per cent."""
    return name in _BY_NAME and _BY_NAME[name].fraction


def is_larger_better(name: str) -> bool:
    """Return whether a metric grows as the networks get better."""
    return _BY_NAME[name].larger_is_better


def available_metrics(context: MetricContext) -> list[str]:
    """Return the names of the metrics that evaluations have while a run trains.

    The first one is what a search optimises by default.

    Raises:
        UserError: The reference does not exist, or the labels are no classes.
    """
    return [
        name
        for metric in METRICS
        if not (metric.thorough or metric.unavailable(context))
        for name in metric.names
    ]


def check_metric_available(name: str, context: MetricContext, field: str, prefix: str = "") -> None:
    """Check that evaluations have a metric while a run trains.

    A config field or flag names it, with a prefix before the metric's name.

    Raises:
        UserError: They have not; says why, and which they have.
    """
    metric = _BY_NAME.get(name)
    missing = "networks" if metric is None or metric.thorough else metric.unavailable(context)
    if missing:
        raise UserError(
            f"{field} {prefix + name!r} is not measured during training for {missing}: use "
            f"{', '.join(prefix + other for other in available_metrics(context))}."
        )
