"""Evaluation of a trained model: samples, features and reconstructions. Free of Ray."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch.nn.functional import adaptive_avg_pool2d

from cl_ray.data.dataset import UNLABELLED, Dataset, RowBatch, sample_rows
from cl_ray.data.stacked_mnist import STACKED_MODES, load_digits, mode_labels, sample_triples
from cl_ray.errors import UserError, pluralize
from cl_ray.evaluation.classifier import FORWARD_BATCH, Floats, Labels, Pixels
from cl_ray.evaluation.config import MANIFOLD_NEIGHBOURS, EvaluationConfig
from cl_ray.evaluation.feature_metrics import FeatureData, sample_view_pairs
from cl_ray.evaluation.fidelity import Samples
from cl_ray.evaluation.metrics import (
    CLASSIFIER_ERROR,
    FEATURE_METRICS,
    MODE_METRICS,
    OVER_BASELINE,
    PROBE_METRICS,
    RECONSTRUCTION,
    SAMPLE_METRICS,
    Metric,
    MetricContext,
)
from cl_ray.evaluation.probes import FeatureScore, ProbeData
from cl_ray.evaluation.reference import (
    Reference,
    ReferenceClassifier,
    StackedReference,
    load_features,
)
from cl_ray.evaluation.reference_name import lacks_images, resolve_reference
from cl_ray.model import TrainedModel

MODE_SAMPLES = 26_000
"""Samples in which papers count modes (see `ModeEvaluator`)."""

PIXEL_SIDE = 32
"""Images of a longer side are averaged to this one where their pixels are the features."""

_MOST_IMAGES, _MOST_BYTES = 60_000, 2 * 10**9
"""Training images that probes are fitted to by default, and the bytes of their pixels, at most."""

ReportProgress = Callable[[str], None]
"""Called with the name of what is measured next."""


@dataclass(frozen=True)
class MetricValue:
    """A metric of generated images, and its real-data baseline: of as many real images instead."""

    value: float
    real_baseline: float


@dataclass(frozen=True)
class Fidelity:
    """Metrics of the samples.

    Args:
        features: Name of the reference whose features are compared, such as `mnist-classifier`.
        metrics: By their names in SAMPLE_METRICS.
        histogram: How often the reference predicts each class for the samples; None if it gives
            no labels.
        classes: Names of these classes, if it has any.
    """

    features: str
    count: int
    metrics: dict[str, MetricValue]
    histogram: list[int] | None
    classes: list[str] | None


@dataclass(frozen=True)
class ModeCoverage:
    """Modes of stacked digits among the samples.

    Args:
        features: Name of the reference that reads the samples.
        of: Number of modes.
        metrics: By their names in MODE_METRICS; the baseline is of real triples of test digits.
    """

    features: str
    count: int
    of: int
    metrics: dict[str, MetricValue]


@dataclass(frozen=True)
class Reconstruction:
    """Mean squared error of G(x), pixels in [0, 1].

    Args:
        error: Of the held-out images.
        mean_image: Of the mean training image in the place of every reconstruction.
    """

    error: float
    mean_image: float


@dataclass(frozen=True)
class Classification:
    """Predictions of D's classifier.

    Args:
        error: Fraction of the images whose predicted class is not their label.
        count: The split's images that have a label.
        training_labels: Training images whose label was used; None: all that have one.
    """

    error: float
    count: int
    training_labels: int | None


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one checkpoint; as a dictionary, the content of evaluation.json.

    Args:
        data: Name of the dataset.
        split: Its split that was measured on; `train` for training images, without a better one.
        pairs: `pairs.mode` of the run; representations of the mode `labels` are supervised.
        supervision: Labels that the training saw, in words; empty for none.
        probe_images: Training images that probes were fitted to: fewer give lower scores.
        fidelity: Of the samples; None without a reference.
        modes: Of the samples of stacked digits; else None.
        representation: Of the features of `discriminator`, `encoder` and, to compare, `pixels`, by
            their names in PROBE_METRICS and FEATURE_METRICS.
        classification: Of the split's images, by D; None without a classifier or labels.
        reconstruction: Of the split's images.
        notes: A sentence for each thing that was not measured, or measured differently.
    """

    checkpoint: str
    step: int
    data: str
    split: str
    pairs: str
    supervision: str
    probe_images: int
    fidelity: Fidelity | None
    modes: ModeCoverage | None
    representation: dict[str, dict[str, FeatureScore]]
    classification: Classification | None
    reconstruction: Reconstruction
    notes: list[str]
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Return all metrics by name; those of G's encoder and of pixels with a prefix."""
        values = {RECONSTRUCTION.name: self.reconstruction.error}
        if self.classification:
            values[CLASSIFIER_ERROR.name] = self.classification.error
        for part in (self.fidelity, self.modes):
            if part:
                values |= {name: metric.value for name, metric in part.metrics.items()}
        for metric in SAMPLE_METRICS:
            found = self.fidelity.metrics.get(metric.name) if self.fidelity else None
            if metric.relative and found and found.real_baseline > 0:
                values[metric.name + OVER_BASELINE] = found.value / found.real_baseline
        for owner, scores in self.representation.items():
            prefix = "" if owner == "discriminator" else f"{owner}_"
            values |= {prefix + name: score.value for name, score in scores.items()}
        return values


def summary_line(evaluation: Evaluation) -> str:
    """Return the most important metrics in one line."""
    parts = []
    if evaluation.fidelity:
        distance = evaluation.fidelity.metrics["frechet"]
        ratio = distance.real_baseline and distance.value / distance.real_baseline
        relative = f" ({ratio:.0f} x the real-data baseline)" if ratio else ""
        over = evaluation.fidelity.features
        parts.append(f"Fréchet distance {distance.value:.3f} over {over}{relative}")
    if evaluation.modes:
        modes = evaluation.modes
        found, divergence = (modes.metrics[name].value for name in ("modes", "mode_kl"))
        of = f"{modes.of} modes in {modes.count:,} samples"
        parts.append(f"{found:.0f} of {of}, KL {divergence:.3f}")
    scores = evaluation.representation.get("discriminator", {})
    shown = [
        f"{title} {scores[name].value:.2%}"
        for name, title in {"knn_1": "1-NN", "linear_probe": "linear probe"}.items()
        if name in scores
    ]
    if shown:
        parts.append(f"{' and '.join(shown)} of {evaluation.probe_images:,} training images")
    if evaluation.classification:
        used = evaluation.classification.training_labels
        labels = f" with {pluralize(used, 'label')}" if used else ""
        parts.append(f"error of D's classifier {evaluation.classification.error:.2%}{labels}")
    parts.append(f"reconstruction error {evaluation.reconstruction.error:.4f}")
    return f"{', '.join(parts)} (split {evaluation.split})"


class FidelityEvaluator:
    """Measures generated images against held-out real ones, beside the real-data baseline.

    Real features and baselines are computed once, so a second call takes half the time.

    Args:
        reference: Computes the features that are compared.
        train: Training images, for the baselines.
        held_out: Real images that the networks were not trained on.
        count: Images of each set, drawn at random; None is as many as the smaller of the two has.
        seed: Seed of all random draws.
    """

    def __init__(
        self,
        reference: Reference,
        train: RowBatch,
        held_out: RowBatch,
        count: int | None = None,
        seed: int = 0,
    ):
        self.reference, self.held_out, self.seed = reference, held_out, seed
        self.count = count or min(len(train.image), len(held_out.image))
        self.real = reference.features(held_out.image[self._order(len(held_out.image))])
        train = train.take(self._order(len(train.image)))
        self._baseline_samples = {
            name: self._samples(rows.image, rows.label, np.arange(len(rows.image)))
            for name, rows in {"train": train, "held_out": held_out}.items()
        }
        self._baselines: dict[str, float] = {}

    def measure(
        self,
        images: Pixels,
        labels: Labels | None = None,
        metrics: Sequence[Metric[Samples, float]] = SAMPLE_METRICS,
        tell: ReportProgress = lambda _: None,
    ) -> Fidelity:
        """Compute metrics of generated images.

        Args:
            images: uint8 [count, H, W, C], generated.
            labels: int64 [count], the classes that they were generated as; None if unconditional.
            metrics: Which metrics.
            tell: Called with the title of each metric that takes long.
        """
        samples = self._samples(images, labels, self._order(len(images)))
        values = {}
        for metric in metrics:
            if metric.thorough:
                tell(metric.title)
            if metric.name not in self._baselines:
                real = self._baseline_samples[metric.baseline]
                self._baselines[metric.name] = metric.compute(real)
            value = metric.compute(samples)
            values[metric.name] = MetricValue(value, self._baselines[metric.name])
        gives_labels = isinstance(self.reference, ReferenceClassifier | StackedReference)
        histogram = samples.histogram.tolist() if gives_labels else None
        classes = None
        if isinstance(self.reference, ReferenceClassifier):
            classes = self.reference.metadata.classes
        return Fidelity(self.reference.name, self.count, values, histogram, classes)

    def _order(self, count: int) -> NDArray[np.int64]:
        return np.random.default_rng(self.seed).permutation(count)[: self.count]

    def _samples(self, images: Pixels, labels: Labels | None, order: NDArray[np.int64]) -> Samples:
        return Samples(images, labels, order, self.real, self.held_out, self.reference, self.seed)


class ModeEvaluator:
    """Counts the modes of stacked digits among samples, to detect mode collapse.

    The measure of Unrolled GAN (Metz et al., 2017, section 3.3.1), VEEGAN (Srivastava et al., 2017)
    and PacGAN (Lin et al., 2018): 26,000 samples, each channel read by a classifier of digits. It
    depends on the number of samples, and a little on the classifier: compare with the baseline.

    Args:
        reference: Reads the samples, and the real digits for the baseline.
        split: Split of the packaged digits that the baseline is of.
        seed: Seed of the draw of real triples.
    """

    def __init__(self, reference: StackedReference, split: str = "test", seed: int = 0):
        self.reference, self.split, self.seed = reference, split, seed
        real = load_digits(split).image
        self._digits = reference.digits.labels(reference.digits.features(real))

    def measure(self, samples: Pixels) -> ModeCoverage:
        """Compute the metrics of samples, uint8 [N, 28, 28, 3], and of as many real triples."""
        triples = sample_triples(self.split, len(samples), self.seed)
        modes = self.reference.labels(self.reference.features(samples))
        found, real = (
            np.bincount(labels, minlength=STACKED_MODES)
            for labels in (modes, mode_labels(self._digits[triples]))
        )
        metrics = {m.name: MetricValue(m.compute(found), m.compute(real)) for m in MODE_METRICS}
        return ModeCoverage(self.reference.name, len(samples), STACKED_MODES, metrics)


def evaluate_representation(
    data: ProbeData | FeatureData,
    metrics: Sequence[Metric[Any, FeatureScore]] = PROBE_METRICS,
    tell: ReportProgress = lambda _: None,
) -> tuple[dict[str, FeatureScore], list[str]]:
    """Compute scores by name, and a sentence for each reason why the labels allow none."""
    scores: dict[str, FeatureScore] = {}
    notes: dict[str, None] = {}
    for metric in metrics:
        tell(metric.title)
        start = time.perf_counter()
        try:
            score = metric.compute(data)
        except UserError as error:
            notes[str(error)] = None
            continue
        scores[metric.name] = replace(score, seconds=time.perf_counter() - start)
    return scores, list(notes)


def pixel_features(images: Pixels) -> Floats:
    """Return the pixels of uint8 [N, H, W, C] in [0, 1] as features to compare with, [N, d].

    Images of more than 32 x 32 pixels are averaged to that: all pixels of photographs would take
    longer than all else, and gigabytes.
    """
    if images.shape[1] > PIXEL_SIDE:
        parts = torch.from_numpy(images).split(FORWARD_BATCH)
        size = (PIXEL_SIDE, PIXEL_SIDE)
        small = [adaptive_avg_pool2d(x.permute(0, 3, 1, 2).float() / 255, size) for x in parts]
        return torch.cat(small).flatten(1).numpy()
    return np.divide(images.reshape(len(images), -1), 255, dtype=np.float32)


def default_images(dataset: Dataset) -> int:
    """Return how many training images probes are fitted to unless told: all, within limits."""
    affordable = _MOST_BYTES // math.prod(dataset.info.shape)
    return min(dataset.info.splits["train"].rows, _MOST_IMAGES, affordable)


def check_decodable(dataset: Dataset, split: str, condition: str) -> None:
    """Check that a split has the labels by which G reconstructs its images.

    Raises:
        UserError: It has none, and D predicts none.
    """
    if condition == "projection" and not dataset.info.labelled_rows(split):
        raise UserError(
            f"condition projection decodes images by their labels, and the split {split} of "
            f"{dataset.location} has none: measure labelled images, or train with condition "
            "classifier."
        )


class Evaluator:
    """Evaluates models on one dataset. What depends on the data only is computed once.

    Args:
        config: Reference, and numbers of images.
        split: The split that is measured on: `validation` for everything that chooses, `test` to
            report. Where there is none, `test` is replaced by `validation`, and that by part of
            the training images, which a note says.
        seed: Seed of all random draws.
        device: Where a pretrained reference computes.

    Raises:
        UserError: The reference does not exist or does not take such images.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: EvaluationConfig,
        split: Literal["validation", "test"] = "validation",
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.dataset, self.config, self.seed = dataset, config, seed
        splits = ("test", "validation", "train")
        wanted = splits[splits.index(split) :]
        self.split = next(name for name in wanted if name in dataset.info.splits)
        self.notes: list[str] = []
        name = resolve_reference(dataset, config.reference)
        self.reference = load_features(name, device) if name else None
        if self.reference is None:
            few = lacks_images(dataset)
            but = f", and here are {few}" if few and dataset.info.labelled else ""
            self.notes.append(
                "Fidelity needs a reference's features: `cl-ray evaluate` trains one of more than "
                f"{2 * MANIFOLD_NEIGHBOURS} images with labels{but}; give it, or a pretrained one "
                "such as torchvision:resnet50, as --evaluation.reference of `cl-ray train` or "
                "--reference of `cl-ray evaluate`."
            )
        elif self.reference.shape not in (None, dataset.info.shape):
            raise UserError(
                f"evaluation.reference {config.reference!r} takes images of "
                f"{list(self.reference.shape or ())}, {dataset.info.name} has "
                f"{list(dataset.info.shape)}: give another reference."
            )
        if self.split != split:
            instead = "training images" if self.split == "train" else f"the split {self.split}"
            self.notes.append(
                f"The data has no split {split}: measured on {instead}. `cl-ray data` holds images "
                f"out with --{split}-fraction."
            )
        if not dataset.info.labelled:
            self.notes.append(
                "The images have no labels, so no probe of the representation was measured."
            )
        if dataset.info.predicted_labels:
            self.notes.append(
                f"Labels of training images, to which probes are fitted: "
                f"{dataset.info.predicted_labels}."
            )
        without = [
            f"{part.unlabelled:,} of the {part.rows:,} images of the split {name}"
            for name, part in dataset.info.splits.items()
            if part.unlabelled and name in ("train", self.split)
        ]
        if without:
            self.notes.append(
                f"{' and '.join(without)} have no label: what compares with labels uses the others."
            )
        self._fidelity: FidelityEvaluator | None = None
        self._modes: ModeEvaluator | None = None
        self._images: tuple[RowBatch, RowBatch] | None = None

    def evaluate(
        self, model: TrainedModel, thorough: bool = False, tell: ReportProgress = lambda _: None
    ) -> Evaluation:
        """Compute the metrics of a model that the data allows.

        Args:
            model: For images of the data's shape.
            thorough: Also compute metrics that take long, the scores of G's encoder and of pixels,
                and count modes in as many samples as papers do.
            tell: Called with what is measured next.

        Raises:
            UserError: Features are NaN or Inf, the model has other classes than the data, or the
                split lacks the labels that its condition needs.
        """
        start = time.perf_counter()
        model.check_classes(self.dataset)
        check_decodable(self.dataset, self.split, model.config.condition)
        tell("images")
        train, held_out = self.images()
        context = MetricContext.of(self.dataset, self.config, model.config.condition, self.split)
        with _limited_threads():
            fidelity = self._measure_fidelity(model, context, thorough, tell)
            modes = self._measure_modes(model, thorough, tell)
            representation, missing = self._measure_features(model, context, thorough, tell)
        classification = self._measure_classifier(model, context)
        tell("reconstruction")
        held_out = held_out.labelled() if model.classes else held_out
        real = held_out.image
        copies = model.reconstruct(real, held_out.label if model.classes else None)
        mean = np.broadcast_to(train.image.mean(0, dtype=np.float64), real.shape)
        reconstruction = Reconstruction(
            RECONSTRUCTION.compute((copies, real)), RECONSTRUCTION.compute((mean, real))
        )
        return Evaluation(
            checkpoint=model.checkpoint,
            step=model.step,
            data=self.dataset.info.name,
            split=self.split,
            pairs=model.config.pairs.mode,
            supervision=model.supervision,
            probe_images=len(train.labelled().image),
            fidelity=fidelity,
            modes=modes,
            representation=representation,
            classification=classification,
            reconstruction=reconstruction,
            notes=[*self.notes, *self._skipped(context, thorough), *missing],
            seconds=round(time.perf_counter() - start, 1),
        )

    def images(self) -> tuple[RowBatch, RowBatch]:
        """Return the training images that probes are fitted to, and those measured on."""
        if self._images is None:
            sizes = self.config.images, self.config.samples
            if self.split != "train":
                train = sample_rows(self.dataset, "train", sizes[0], self.seed)
                held_out = sample_rows(self.dataset, self.split, sizes[1], self.seed)
            else:  # disjoint
                rows = sample_rows(self.dataset, "train", sum(sizes), self.seed)
                cut = max(len(rows.id) - sizes[1], len(rows.id) // 2)
                train, held_out = rows.take(slice(0, cut)), rows.take(slice(cut, None))
            self._images = train, held_out
        return self._images

    def _measure_fidelity(
        self, model: TrainedModel, context: MetricContext, thorough: bool, tell: ReportProgress
    ) -> Fidelity | None:
        if self.reference is None:
            return None
        if self._fidelity is None:
            tell("real images")
            train, held_out = self.images()
            if len(train.image) < self.config.samples and self.split != "train":  # by --images
                train = sample_rows(self.dataset, "train", self.config.samples, self.seed)
            count = min(self.config.samples, len(train.image), len(held_out.image))
            if count <= MANIFOLD_NEIGHBOURS:
                smaller = min(("train", train), (self.split, held_out), key=lambda s: len(s[1].id))
                self.notes.append(
                    f"No fidelity was measured: it takes more than {MANIFOLD_NEIGHBOURS} images, "
                    f"and there are {count} of the split {smaller[0]}."
                )
                self.reference = None
                return None
            self._fidelity = FidelityEvaluator(self.reference, train, held_out, count, self.seed)
        tell("samples")
        images, labels = self._generate(model, self._fidelity.count)
        tell("distances")
        metrics = _selected(SAMPLE_METRICS, context, thorough)
        if self.images()[1].labelled().label is None:  # none of those drawn, though of others
            metrics = [m for m in metrics if m.name not in _OF_LABELLED]
        return self._fidelity.measure(images, labels, metrics, tell)

    def _generate(self, model: TrainedModel, count: int) -> tuple[Pixels, Labels | None]:
        """Generate images, and their classes (None without), as frequent as among real images."""
        label = self.images()[1].labelled().label
        if not model.classes or label is None:
            return model.generate(count, self.seed), None
        labels = np.resize(np.random.default_rng(self.seed).permutation(label), count)
        return model.decode(model.latents(count, self.seed, labels=labels), labels=labels), labels

    def _measure_modes(
        self, model: TrainedModel, thorough: bool, tell: ReportProgress
    ) -> ModeCoverage | None:
        if not isinstance(self.reference, StackedReference):
            return None
        tell("modes")
        self._modes = self._modes or ModeEvaluator(self.reference, self.split, self.seed)
        count = MODE_SAMPLES if thorough else self.config.samples
        return self._modes.measure(self._generate(model, count)[0])

    def _measure_features(
        self, model: TrainedModel, context: MetricContext, thorough: bool, tell: ReportProgress
    ) -> tuple[dict[str, dict[str, FeatureScore]], list[str]]:
        """Return the scores of each features, and notes."""
        train, held_out = self.images()
        probes = _selected(PROBE_METRICS, context, thorough)
        others = _selected(FEATURE_METRICS, context, thorough)
        extractors: dict[str, Callable[[Pixels], Floats]] = {"discriminator": model.embed}
        if thorough:
            extractors["encoder"] = lambda images: model.encode(images).numpy()
            extractors["pixels"] = pixel_features
        views = sample_view_pairs(held_out.image, self.seed) if others else None
        scores: dict[str, dict[str, FeatureScore]] = {}
        notes: list[str] = []
        for owner, extract in extractors.items() if probes or others else ():

            def tell_title(title: str, owner: str = owner) -> None:
                tell(f"representation: {owner}, {title}")

            tell(f"representation: {owner}")
            x, q = extract(train.image), extract(held_out.image)
            scores[owner] = {}
            if train.labelled().label is not None and held_out.labelled().label is not None:
                data = ProbeData(*_labelled(x, train), *_labelled(q, held_out), self.seed)
                scores[owner], notes = evaluate_representation(data, probes, tell_title)
            if views is not None:
                pair = extract(views[0]), extract(views[1])
                measured = FeatureData(x, q, pair, train.label, held_out.label, self.seed)
                scores[owner] |= evaluate_representation(measured, others, tell_title)[0]
        if thorough and self.dataset.info.shape[0] > PIXEL_SIDE:
            notes = [*notes, f"Pixels, as features, are averaged to {PIXEL_SIDE} x {PIXEL_SIDE}."]
        return scores, notes  # which depend on the data only

    def _measure_classifier(
        self, model: TrainedModel, context: MetricContext
    ) -> Classification | None:
        if CLASSIFIER_ERROR.unavailable(context):
            return None
        rows = self.images()[1].labelled()
        if rows.label is None:
            return None
        error = CLASSIFIER_ERROR.compute((model.classify(rows.image), rows.label))
        return Classification(error, len(rows.label), model.config.labels.count)

    def _skipped(self, context: MetricContext, thorough: bool) -> list[str]:
        """Return a sentence for each reason why scores of labelled data are not measured."""
        measured: tuple[Metric[Any, Any], ...] = (*PROBE_METRICS, *FEATURE_METRICS)
        metrics = [m for m in measured if thorough or not m.thorough]
        if thorough and self.reference:
            metrics += [m for m in SAMPLE_METRICS if m.thorough]
        titles: dict[str, list[str]] = {}
        for metric in metrics if self.dataset.info.labelled else ():
            reason = metric.unavailable(context)
            if reason:
                titles.setdefault(reason, []).append(metric.title)
        return [f"Not measured of {reason}: {', '.join(t)}." for reason, t in titles.items()]


_OF_LABELLED = ("class_accuracy", "classification_accuracy")
"""Metrics of samples that compare with the labels of held-out images."""


def _selected(
    metrics: Sequence[Metric[Any, Any]], context: MetricContext, thorough: bool
) -> list[Metric[Any, Any]]:
    """Select the available metrics; the thorough ones only if asked for."""
    return [m for m in metrics if (thorough or not m.thorough) and not m.unavailable(context)]


def _labelled(features: Floats, rows: RowBatch) -> tuple[Floats, Labels]:
    """Return the features and labels of the images that have a label."""
    assert rows.label is not None
    known = rows.label != UNLABELLED
    return features[known], rows.label[known]


def _limited_threads() -> threadpool_limits:
    """Give numpy and scikit-learn as many threads as torch has."""
    import sklearn.cluster
    import sklearn.decomposition
    import sklearn.linear_model
    import sklearn.neighbors  # noqa: F401 (only the pools of loaded libraries are limited)

    return threadpool_limits(torch.get_num_threads())
