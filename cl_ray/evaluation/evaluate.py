"""Everything that is measured of a run's networks. Free of Ray, so that any process may do it."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl_ray.data.dataset import STACKED, Dataset, RowBatch
from cl_ray.data.sampling import sample_rows
from cl_ray.data.stacked_mnist import is_stacked_mnist
from cl_ray.errors import UserError
from cl_ray.evaluation.config import EvaluationConfig
from cl_ray.evaluation.fidelity import (
    NEIGHBOURS,
    Fidelity,
    FidelityEvaluator,
    MetricValue,
    classification_accuracy_score,
)
from cl_ray.evaluation.modes import SAMPLES, ModeCoverage, ModeEvaluator
from cl_ray.evaluation.probes import RepresentationScores, evaluate_representation
from cl_ray.evaluation.reference import (
    FeatureExtractor,
    ReferenceClassifier,
    StackedReference,
    load_features,
)
from cl_ray.model import TrainedModel

DIGITS = (28, 28, 1)
"""Shape of the images that the packaged reference takes."""
PARTS = 20
"""Of the images, one after another in float64."""

ReportProgress = Callable[[str], None]
"""Called with the name of what is measured next."""


@dataclass(frozen=True)
class Reconstruction:
    """How far G(x) is from x, as a mean square over pixels in [0, 1].

    Args:
        error: Of the test images.
        mean_image: What the mean of the training images, given for every image, would leave.
    """

    error: float
    mean_image: float


@dataclass(frozen=True)
class Evaluation:
    """What a checkpoint is worth.

    Args:
        checkpoint: Its name.
        step: Steps that it was trained for.
        data: The data set's name.
        pairs: The mode that D's representation was trained in; `labels` is supervised.
        supervision: What labels the training saw; empty for none.
        learnt_from: Training images that nearest neighbours and probes had: fewer, lower scores.
        fidelity: Of the samples; None where there is no reference.
        modes: Of the samples, where the reference reads stacked digits; else None.
        representation: Of the features of `discriminator`, `encoder` and, to compare, `pixels`.
        reconstruction: Of the test images.
        notes: A sentence for each thing that could not be measured or was measured otherwise.
        seconds: What it took.
    """

    checkpoint: str
    step: int
    data: str
    pairs: str
    supervision: str
    learnt_from: int
    fidelity: Fidelity | None
    modes: ModeCoverage | None
    representation: dict[str, RepresentationScores]
    reconstruction: Reconstruction
    notes: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """What evaluation.json holds: plain values."""
        scores = {
            who: {name: asdict(score) for name, score in found.scores.items()}
            for who, found in self.representation.items()
        }
        return {**asdict(self), "representation": scores}

    def metrics(self) -> dict[str, float]:
        """One number a name, D's scores under their own; what curves and searches go by."""
        found = {"reconstruction": self.reconstruction.error}
        if self.fidelity:
            values = self.fidelity.metrics
            found |= {name: figure.value for name, figure in values.items()}
            if values["frechet"].floor > 0:
                found["frechet_over_floor"] = values["frechet"].value / values["frechet"].floor
        if self.modes:
            found |= {name: figure.value for name, figure in self.modes.metrics.items()}
        for who, scores in self.representation.items():
            prefix = "" if who == "discriminator" else f"{who}_"
            found |= {f"{prefix}{name}": s.accuracy for name, s in scores.scores.items()}
        return found


def summary_line(evaluation: Evaluation) -> str:
    """The metrics that are looked at first, in one line."""
    parts = []
    if evaluation.fidelity:
        distance = evaluation.fidelity.metrics["frechet"]
        over = f" ({distance.value / distance.floor:.0f} x its floor)" if distance.floor else ""
        parts.append(f"Fréchet distance {distance.value:.3f}{over}")
    if evaluation.modes:
        modes = evaluation.modes
        found, divergence = (modes.metrics[name].value for name in ("modes", "mode_kl"))
        of = f"{modes.of} modes in {modes.count:,} samples"
        parts.append(f"{found:.0f} of {of}, KL {divergence:.3f}")
    scores = evaluation.representation.get("discriminator")
    if scores:
        called = {"knn_1": "1-NN", "linear_probe": "linear probe"}
        there = scores.scores
        told = [f"{n} {there[k].accuracy:.2%}" for k, n in called.items() if k in there]
        parts.append(f"{' and '.join(told)} of {evaluation.learnt_from:,} training images")
    parts.append(f"reconstruction error {evaluation.reconstruction.error:.4f}")
    return ", ".join(parts)


SMALLER_IS_BETTER = ("frechet", "frechet_over_floor", "kernel", "mode_kl", "reconstruction")


def is_larger_better(figure: str) -> bool:
    """Whether an evaluation's figure grows as the networks get better: shares and accuracies."""
    return figure not in SMALLER_IS_BETTER


class Evaluator:
    """Evaluates networks of one run. What belongs to the data is read and computed once.

    Args:
        dataset: Whose split `test` the networks are measured on; without one, on training images.
        config: How much of it.
        seed: Of what is drawn.

    Raises:
        UserError: The reference is not there or does not take such images.
    """

    def __init__(self, dataset: Dataset, config: EvaluationConfig, seed: int = 0):
        self.dataset, self.config, self.seed = dataset, config, seed
        self.notes: list[str] = []
        self.reference = load_reference(dataset, config.reference)
        if self.reference is None:
            self.notes.append(
                "Fidelity needs a reference's features: train one of labelled images with "
                "`python -m cl_ray.evaluation.reference` and give it as --reference of `cl-ray "
                "evaluate`, or as --evaluation.reference of `cl-ray train`."
            )
        elif self.reference.shape not in (None, dataset.info.shape):
            raise UserError(
                f"evaluation.reference {config.reference!r} takes images of "
                f"{list(self.reference.shape or ())}, {dataset.info.name} has "
                f"{list(dataset.info.shape)}: give another reference."
            )
        self._judge: FidelityEvaluator | None = None
        self._modes: ModeEvaluator | None = None
        self._images: tuple[RowBatch, RowBatch] | None = None

    def evaluate(
        self, run: TrainedModel, thorough: bool = False, tell: ReportProgress | None = None
    ) -> Evaluation:
        """Measure the networks of `run`.

        Args:
            run: Networks for images of the data's shape.
            thorough: Also measure G's encoder and the bare pixels, the scores of few labels, and
                a classifier that is trained on the samples, and count modes in as many samples as
                papers do; else D's representation and the samples.
            tell: Told what is measured next.

        Raises:
            UserError: The networks make no finite features, or know other classes than the data.
        """
        begun = time.perf_counter()
        run.check_classes(self.dataset)
        tell = tell or (lambda _: None)
        notes = list(self.notes)
        tell("images")
        train, test = self.images()
        if "test" not in self.dataset.info.splits:
            notes.append("There is no split test: measured on training images.")
        fidelity = self._fidelity(run, thorough, tell)
        modes = self._count_modes(run, thorough, tell)
        reference = self.reference if train.label is not None else None
        why = f"{modes.of} classes have too few each" if modes else ""
        if isinstance(reference, ReferenceClassifier) and not self._tells_these_apart(reference):
            why = "the reference tells other classes apart than the data has"
        if thorough and why:
            notes.append(f"No classifier was trained on the samples: {why}.")
        scores = self._representation(run, thorough, tell)
        if train.label is None:
            notes.append("The images have no labels, so the representation was not measured.")
        for found in scores.values():
            notes += [note for note in found.notes if note not in notes]
        tell("reconstruction")
        labels = test.label if run.classes else None
        error = _mean_square(run.reconstruct(test.image, labels), test.image)
        mean = np.broadcast_to(train.image.mean(0, dtype=np.float64), test.image.shape)
        return Evaluation(
            checkpoint=run.checkpoint,
            step=run.step,
            data=self.dataset.info.name,
            pairs=run.config.pairs.mode,
            supervision=run.config.supervision,
            learnt_from=len(train.image),
            fidelity=fidelity,
            modes=modes,
            representation=scores,
            reconstruction=Reconstruction(error, _mean_square(mean, test.image)),
            notes=notes,
            seconds=round(time.perf_counter() - begun, 1),
        )

    def _tells_these_apart(self, reference: ReferenceClassifier) -> bool:
        """Whether the reference's classes are those of the data, which has labels."""
        return self.dataset.class_names() == list(reference.about.classes)

    def images(self) -> tuple[RowBatch, RowBatch]:
        """Training images that are learnt from, and the ones that the networks are measured on."""
        if self._images is None:
            wanted = self.config.images, self.config.samples
            if "test" in self.dataset.info.splits:
                train = sample_rows(self.dataset, "train", wanted[0], self.seed)
                test = sample_rows(self.dataset, "test", wanted[1], self.seed)
            else:  # no image is on both sides
                rows = sample_rows(self.dataset, "train", sum(wanted), self.seed)
                cut = max(len(rows.id) - wanted[1], len(rows.id) // 2)
                train, test = _part(rows, slice(0, cut)), _part(rows, slice(cut, None))
            self._images = train, test
        return self._images

    def _fidelity(self, run: TrainedModel, thorough: bool, tell: ReportProgress) -> Fidelity | None:
        if self.reference is None:
            return None
        train, test = self.images()
        if self._judge is None:
            tell("floors of the real images")
            count = min(self.config.samples, len(train.image), len(test.image))
            if count <= NEIGHBOURS:
                raise UserError(
                    f"{self.dataset.location} has too few images to be evaluated by: it takes "
                    f"more than {NEIGHBOURS} training and test images."
                )
            self._judge = FidelityEvaluator(
                self.reference, train.image, test.image, count, self.seed
            )
        tell("samples")
        samples, asked = self._samples(run, self._judge.count)
        tell("distances")
        found = self._judge.measure(samples)
        if (
            not isinstance(self.reference, ReferenceClassifier)
            or test.label is None
            or train.label is None
        ):
            return found
        if not self._tells_these_apart(self.reference):
            return found
        if asked is not None:
            agrees = [
                float((self.reference.predict(images).argmax(1) == labels).mean())
                for images, labels in ((samples, asked), (test.image, test.label))
            ]
            found.metrics["class_accuracy"] = MetricValue(*agrees)
        if thorough:
            tell("a classifier trained on the samples")
            labels = self.reference.predict(samples).argmax(1) if asked is None else asked
            real = (train.image, train.label), (test.image, test.label)
            accuracy = classification_accuracy_score(
                (samples, labels), *real, self.reference.classes, self.seed
            )
            found.metrics["classification_accuracy"] = accuracy
        return found

    def _samples(
        self, run: TrainedModel, count: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
        """Images of noise and, if the run knows classes, the classes asked for.

        Those come as often as among the real images that they are compared with.
        """
        label = self.images()[1].label
        if not run.classes or label is None:
            return run.generate(count, self.seed), None
        asked = np.resize(np.random.default_rng(self.seed).permutation(label), count)
        return run.decode(run.latents(count, self.seed, kinds=asked), labels=asked), asked

    def _count_modes(
        self, run: TrainedModel, thorough: bool, tell: ReportProgress
    ) -> ModeCoverage | None:
        if not isinstance(self.reference, StackedReference):
            return None
        tell("modes")
        self._modes = self._modes or ModeEvaluator(self.reference, self.seed)
        count = SAMPLES if thorough else self.config.samples
        return self._modes.measure(self._samples(run, count)[0])

    def _representation(
        self, run: TrainedModel, thorough: bool, tell: ReportProgress
    ) -> dict[str, RepresentationScores]:
        train, test = self.images()
        if train.label is None or test.label is None:
            return {}
        ways: dict[str, Callable[[NDArray[np.uint8]], NDArray[np.float32]]] = {
            "discriminator": run.embed
        }
        if thorough:
            ways["encoder"] = lambda images: run.encode(images).numpy()
            ways["pixels"] = lambda images: np.divide(
                images.reshape(len(images), -1), 255, dtype=np.float32
            )
        found = {}
        for who, features in ways.items():
            tell(f"representation: {who}")
            x, q = features(train.image), features(test.image)
            found[who] = evaluate_representation(
                x, train.label, q, test.label, self.seed, few=thorough
            )
        return found


def load_reference(dataset: Dataset, name: str) -> FeatureExtractor | None:
    """The reference that a config names for a data set; None for none."""
    chosen = resolve_reference(dataset, name)
    return load_features(chosen) if chosen else None


def resolve_reference(dataset: Dataset, name: str) -> str | None:
    """The name of a data set's reference, `auto` resolved; None for none."""
    if name == "auto" and is_stacked_mnist(dataset.info):
        return STACKED
    if name == "auto":
        packaged = dataset.info.name == "mnist" and dataset.info.shape == DIGITS
        return "mnist" if packaged else None
    return None if name == "none" else name


def _part(rows: RowBatch, which: slice) -> RowBatch:
    label = None if rows.label is None else rows.label[which]
    return RowBatch(rows.id[which], rows.image[which], label)


def _mean_square(images: NDArray[Any], others: NDArray[np.uint8]) -> float:
    """Mean squared difference of [n, H, W, C], pixels in [0, 1], a few images at a time."""
    parts = zip(np.array_split(images, PARTS), np.array_split(others, PARTS), strict=True)
    total = sum(float(np.square(np.subtract(x, y, dtype=np.float64)).sum()) for x, y in parts)
    return total / others.size / 255**2
