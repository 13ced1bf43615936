"""The fitted prior: a kernel density estimate of latent vectors, which samples are drawn from.

Training noise is uniform on a sphere, but the latent vectors (codes) of images are not: between
the codes of two digits there are regions without images, and G decodes noise there to no digit. So
after each epoch a density is fitted to the codes of training images (ex-post density estimation:
Ghosh et al., 2020, From Variational to Deterministic Autoencoders, section 4). A sample is the code
of an image with normal noise, a smoothed bootstrap (Silverman, 1986, Density Estimation, section
6.4); of a conditional G, the code of an image of its class.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cl_ray.data.dataset import UNLABELLED, sample_rows
from cl_ray.data.partition import TRAIN_SPLIT, Partition
from cl_ray.forward import predict_classes
from cl_ray.networks.discriminator import Discriminator
from cl_ray.networks.generator import Generator
from cl_ray.networks.normalize import to_unit
from cl_ray.train_config import GANConfig

BANDWIDTH = 0.8
"""Standard deviation of the noise relative to Silverman's rule (1986, equation 4.14): of 20,000
codes 0.4 of theirs in 10 dimensions, 0.7 in 64 (measured in benchmarks/README.md, "The fitted
prior"). Little noise gives copies of training images."""
MIN_VARIANCE = 1e-4
"""Added to every variance; codes have mean square 1."""
_MAX_VALUES, _MAX_BYTES, _MIN_CODES = 20_000 * 64, 2**27, 5000
"""Values of codes, which every checkpoint holds, and pixels of their images, which stay in memory,
above which fewer than `generator.prior_codes` are taken, but at least _MIN_CODES."""
_ENCODED_PIXELS = 500 * 28 * 28
"""Pixels encoded at once: the activations of larger images take more memory than the training."""


class Prior(NamedTuple):
    """A kernel density estimate of K codes, in order of their class; on the CPU.

    Args:
        codes: Latent vectors of images, float32 [K, latent].
        starts: Index of the first code of each class, int64 [classes]; [1] without classes.
        counts: Number of codes of each class, at least 1; int64, of the same shape.
        scale_tril: Lower Cholesky factor of the noise's covariance, float32 [latent, latent].
    """

    codes: Tensor
    starts: Tensor
    counts: Tensor
    scale_tril: Tensor

    def transform_noise(
        self, noise: Tensor, uniform: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Turn noise into samples.

        Args:
            noise: Unit normal, [n, latent].
            uniform: Selects the codes, [n] in [0, 1).
            labels: Classes [n], if the prior has any; None: of each class as many samples as codes.

        Returns:
            Latent vectors [n, latent].
        """
        # In float64, so that an index is not rounded up to the next class, and that a sample does
        # not depend on how many are drawn with it.
        if labels is None:
            index = (uniform.double() * len(self.codes)).long()
        else:
            index = self.starts[labels] + (uniform.double() * self.counts[labels]).long()
        return self.codes[index] + (noise.double() @ self.scale_tril.double().T).to(noise.dtype)


class PriorFitter:
    """Fits the prior to the codes of training images, which it reads at its first use.

    Args:
        partition: The images, and the classes of a conditional G.
        config: Number of codes (0 fits nothing) and seed.
    """

    def __init__(self, partition: Partition, config: GANConfig):
        self.partition, self.config = partition, config
        self.images: Tensor | None = None
        self.labels: Tensor | None = None

    def fit(self, generator: Generator, discriminator: Discriminator) -> Prior | None:
        """Fit the prior of a generator; None without codes or if one is NaN or Inf.

        Images without a label are of the class that the discriminator predicts.
        """
        if not self.config.generator.prior_codes:
            return None
        weight = next(generator.parameters())
        images = self._read()
        with torch.no_grad():
            codes = torch.cat([generator.encode(part) for part in _batches(images, weight)])
        if not codes.isfinite().all():
            return None
        labels = self.labels
        if labels is not None and self.partition.unlabelled_rows:
            predicted = [predict_classes(discriminator, part) for part in _batches(images, weight)]
            labels = labels.where(labels != UNLABELLED, torch.cat(predicted).cpu())
        return fit_prior(codes, labels, len(self.partition.classes))

    def _read(self) -> Tensor:
        """Return the images, uint8 [n, height, width, channels], and keep their labels."""
        if self.images is None:
            config, dataset = self.config, self.partition.dataset
            most = _MAX_VALUES // config.generator.latent
            most = max(_MIN_CODES, min(most, _MAX_BYTES // math.prod(dataset.info.shape)))
            count = min(config.generator.prior_codes, most)
            rows = sample_rows(dataset, TRAIN_SPLIT, count, config.seed)
            rows = self.partition.select_labels(rows)
            self.images = torch.from_numpy(rows.image)
            if self.partition.classes and rows.label is not None:
                self.labels = torch.from_numpy(rows.label)
        return self.images


def _batches(images: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """Yield the images in [-1, 1], on the device and in the type of `weight`."""
    size = max(1, _ENCODED_PIXELS // math.prod(images.shape[1:3]))
    for part in images.split(size):
        yield to_unit(part.to(weight.device), weight.dtype)


def fit_prior(codes: Tensor, labels: Tensor | None = None, classes: int = 1) -> Prior:
    """Put normal noise around each code: a pure function of its arguments.

    The noise's covariance is a fraction of that of the codes within their classes, see BANDWIDTH.
    A class without a code has those of all classes.

    Args:
        codes: Latent vectors of images, [n, latent].
        labels: Their classes, int64 [n] on the CPU; None: all are of one class.
        classes: The number of classes.
    """
    codes = codes.cpu()
    if labels is None:
        labels, classes = torch.zeros(len(codes), dtype=torch.long), 1
    order = labels.argsort(stable=True)
    codes, labels = codes[order], labels[order]
    counts = labels.bincount(minlength=classes)
    starts, empty = counts.cumsum(0) - counts, counts == 0
    residuals = codes.double()
    means = torch.zeros(classes, codes.shape[1], dtype=torch.float64)
    means = means.index_add(0, labels, residuals) / counts.clamp(min=1)[:, None]
    residuals = residuals - means[labels]
    bandwidth = BANDWIDTH * _silverman(len(codes) / (classes - int(empty.sum())), codes.shape[1])
    covariance = bandwidth**2 * residuals.T @ residuals / len(codes)
    covariance.diagonal().add_(MIN_VARIANCE)
    return Prior(
        codes.float().contiguous(),
        starts.masked_fill(empty, 0),
        counts.masked_fill(empty, len(codes)),
        torch.linalg.cholesky(covariance).float().contiguous(),
    )


def _silverman(count: float, latent: int) -> float:
    """Return the bandwidth of Silverman (1986), equation 4.14, relative to the codes' deviation."""
    return (count * (latent + 2) / 4) ** (-1 / (latent + 4))
