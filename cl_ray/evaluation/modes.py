"""Mode collapse on stacked digits: how many of the 1000 modes are found, and how evenly.

The measure of Unrolled GAN (Metz et al., 2017, section 3.3.1), VEEGAN (Srivastava et al., 2017)
and PacGAN (Lin et al., 2018): 26,000 samples, each channel read by a classifier of digits. Metrics
hang on the number of samples, and a little on the classifier, so look at the floor: the same
measure of as many real triples of test digits.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cl_ray.data.stacked_mnist import STACKED_MODES, load_digits, mode_labels, sample_triples
from cl_ray.errors import UserError
from cl_ray.evaluation.classifier import Labels, Pixels
from cl_ray.evaluation.fidelity import MetricValue, label_histogram
from cl_ray.evaluation.reference import StackedReference

SAMPLES = 26_000
"""What the papers count modes in."""
DIGITS = 10


def mode_metrics(labels: Labels, expected: NDArray[np.float64]) -> dict[str, float]:
    """Modes with a sample, and how far the samples' modes are from the data's.

    Args:
        labels: [N], the mode of each sample, in [0, K).
        expected: [K], the data's share of each mode, all positive, their sum 1.

    Returns:
        `modes`, how many have at least one sample, 0 to K; `mode_kl`, the Kullback-Leibler
        divergence KL(p || q) of the samples' distribution p over modes from the data's q,
        sum p log(p / q) in nats: 0 if alike, log K if all samples are of one of K even modes. Of N
        samples of q itself it is about (K - 1) / 2N, for N well above K.

    Raises:
        UserError: There are no labels, one is out of range, or `expected` is no distribution.
    """
    if not len(labels) or labels.min() < 0 or labels.max() >= len(expected):
        raise UserError(
            f"Modes are counted of one label or more in 0 to {len(expected) - 1}, not of "
            f"{f'{labels.min()} to {labels.max()}' if len(labels) else 'none'}."
        )
    if not (expected > 0).all() or abs(expected.sum() - 1) > 1e-9:
        raise UserError(
            "The data's shares of the modes must be positive and add up to 1: their sum is "
            f"{expected.sum():g}, the smallest {expected.min():g}."
        )
    counts = label_histogram(labels, len(expected))
    found = counts > 0
    shares = counts[found] / counts.sum()
    divergence = float((shares * np.log(shares / expected[found])).sum())
    return {"modes": float(found.sum()), "mode_kl": max(divergence, 0.0)}  # but for rounding


@dataclass(frozen=True)
class ModeCoverage:
    """What was found of the modes.

    Args:
        features: What read the samples.
        count: Samples that were looked at.
        of: How many modes there are.
        metrics: By the names of `mode_figures`; the floors are of real triples of test digits.
    """

    features: str
    count: int
    of: int
    metrics: dict[str, MetricValue]


class ModeEvaluator:
    """Counts modes; what belongs to the digits is read and computed once.

    Args:
        reference: Reads the samples, and the real digits for the floor.
        seed: Of which real triples are drawn.
    """

    def __init__(self, reference: StackedReference, seed: int = 0):
        self.reference, self.seed = reference, seed
        self.expected = expected_mode_shares()
        real = load_digits("test").image
        self.read = reference.digits.labels(reference.digits.features(real))

    def measure(self, samples: Pixels) -> ModeCoverage:
        """Modes of the samples beside those of as many real triples.

        Args:
            samples: uint8 [N, 28, 28, 3], generated.

        Raises:
            UserError: They are of another shape or not uint8.
        """
        values = mode_metrics(self.labels(samples), self.expected)
        real = mode_labels(self.read[sample_triples("test", len(samples), self.seed)])
        floors = mode_metrics(real, self.expected)
        metrics = {name: MetricValue(value, floors[name]) for name, value in values.items()}
        return ModeCoverage(self.reference.name, len(samples), STACKED_MODES, metrics)

    def labels(self, samples: Pixels) -> Labels:
        """The mode of each sample, [N]."""
        return self.reference.labels(self.reference.features(samples))


def expected_mode_shares() -> NDArray[np.float64]:
    """How often each mode occurs in endless stacked training digits: [1000], all positive.

    The product of its digits' shares, which are not quite a tenth; the counts of a finite data set
    would add their own noise, and may be 0.
    """
    labels = load_digits("train").label
    assert labels is not None
    shares = np.bincount(labels, minlength=DIGITS) / len(labels)
    return np.einsum("a,b,c->abc", shares, shares, shares).reshape(STACKED_MODES)
