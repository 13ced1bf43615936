"""The fitted prior: a mixture of Gaussians over latent vectors, which samples are drawn from.

Training noise is uniform on a sphere, but the latent vectors (codes) of images are not: between
the codes of two digits there are regions without images, and G decodes noise there to no digit. So
after each epoch a mixture is fitted to the codes of images (ex-post density estimation with ten
Gaussians: Ghosh et al., 2020, From Variational to Deterministic Autoencoders, section 4). It halves
the Fréchet distance (benchmarks/README.md). With few codes a kernel density estimate is
used instead; a conditional G has one mixture per class.
"""

import math
import warnings
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

PRIOR_IMAGES = 5000
"""Training images that a mixture is fitted to, at most."""
KERNELS = 20_000
"""Codes in a kernel density estimate, at most. Their modes have the frequencies of the codes, of
which more are better (benchmarks/README.md, "The fitted prior")."""
_KERNEL_VALUES, _KERNEL_BYTES = 20_000 * 64, 2**27
"""Values of codes, which every checkpoint holds, and pixels of their images, above which a kernel
density estimate has fewer, but at least PRIOR_IMAGES."""
_ENCODED_PIXELS = 500 * 28 * 28
"""Pixels encoded at once: the activations of larger images take more memory than the training."""
CODES_PER_DIMENSION = 10
"""Minimum of codes per Gaussian and dimension; with fewer codes there are fewer Gaussians."""
MIN_GAUSSIANS = 25
"""With codes for fewer Gaussians, the prior is a kernel density estimate: of PRIOR_IMAGES, in more
than 20 dimensions (measured there)."""
BANDWIDTH = 0.8
"""Standard deviation of its kernels, relative to Silverman's rule (1986, equation 4.14): about half
that of the codes in 10 dimensions, 0.7 in 64 (measured in benchmarks/README.md, "The fitted
prior"). Small kernels give copies of training images."""
EM_ITERATIONS = 10
MIN_VARIANCE = 1e-4
"""Added to every variance; codes have mean square 1."""
WIDENING = 0.25
"""Standard deviation of the noise by which a mixture is widened: samples vary more, and stay near
codes (measured there, too)."""


class Prior(NamedTuple):
    """A mixture of K Gaussians over latent vectors, float32 on the CPU.

    Args:
        weights: Probabilities of the Gaussians, [K], or for each class, [classes, K].
        means: [K, latent].
        scale_tril: Lower Cholesky factors of the covariances, [K, latent, latent], or of the one
            that all share, [1, latent, latent].
    """

    weights: Tensor
    means: Tensor
    scale_tril: Tensor

    def transform_noise(
        self, noise: Tensor, uniform: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Turn noise into samples of the mixture.

        Args:
            noise: Unit normal, [n, latent].
            uniform: Selects the Gaussians, [n] in [0, 1).
            labels: Classes [n], if the prior has any; None: all classes are equally likely.

        Returns:
            Latent vectors [n, latent].
        """
        weights = self.weights
        if weights.ndim == 2:
            weights = weights.mean(0) if labels is None else weights[labels]
        edges = weights.cumsum(-1)
        edges = edges / edges[..., -1:]  # rounding would leave a gap below 1
        index = (uniform[:, None] >= edges).sum(1)  # ONNX has no searchsorted
        if len(self.scale_tril) == 1:
            # One product, without a copy of the factor for each sample. In float64, so that a
            # sample does not depend on how many are drawn with it.
            product = noise.double() @ self.scale_tril[0].double().T
            return self.means[index] + product.to(noise.dtype)
        return self.means[index] + (self.scale_tril[index] @ noise[:, :, None]).squeeze(2)


class PriorFitter:
    """Fits the prior to the codes of training images, which it reads at its first use.

    Args:
        partition: The images, and the classes of a conditional G.
        config: Number of Gaussians (0 fits nothing), latent noise and seed.
    """

    def __init__(self, partition: Partition, config: GANConfig):
        self.partition, self.classes, self.config = partition, len(partition.classes), config
        self.images: Tensor | None = None
        self.labels: Tensor | None = None

    def fit(self, generator: Generator, discriminator: Discriminator) -> Prior | None:
        """Fit the prior of a generator; None without components or if a code is NaN or Inf.

        Images without a label are of the class that the discriminator predicts.
        """
        g, seed = self.config.generator, self.config.seed
        if not g.prior:
            return None
        weight = next(generator.parameters())
        if self.images is None:
            info = self.partition.dataset.info
            count = PRIOR_IMAGES
            if not self.classes and count < fewest_for_mixture(g.latent):
                most = min(_KERNEL_VALUES // g.latent, _KERNEL_BYTES // math.prod(info.shape))
                count = max(count, min(KERNELS, most))
            rows = sample_rows(self.partition.dataset, TRAIN_SPLIT, count, seed)
            rows = self.partition.select_labels(rows)
            self.images = torch.from_numpy(rows.image)
            if self.classes and rows.label is not None:
                self.labels = torch.from_numpy(rows.label).to(weight.device)
        with torch.no_grad():
            codes = torch.cat([generator.encode(images) for images in self._batches(weight)])
        if not codes.isfinite().all():
            return None
        if self.labels is None:
            return fit_prior(codes, g.prior, seed)
        labels = self.labels
        if self.partition.unlabelled_rows:
            images = self._batches(weight)
            predicted = torch.cat([predict_classes(discriminator, part) for part in images])
            labels = labels.where(labels != UNLABELLED, predicted)
        return fit_class_priors(codes, labels, self.classes, g.prior, seed)

    def _batches(self, weight: Tensor) -> Iterator[Tensor]:
        """Yield the images in [-1, 1], on the device and in the type of `weight`."""
        assert self.images is not None
        size = max(1, _ENCODED_PIXELS // math.prod(self.images.shape[1:3]))
        for part in self.images.split(size):
            yield to_unit(part.to(weight.device), weight.dtype)


def fit_prior(codes: Tensor, components: int, seed: int) -> Prior:
    """Fit the prior to codes: a mixture, or of few codes a kernel density estimate.

    A pure function of its arguments, which are those of `fit_mixture`.
    """
    if min(len(codes), PRIOR_IMAGES) >= fewest_for_mixture(codes.shape[1]):
        return fit_mixture(codes, components, seed)
    return kernel_density(codes)


def fewest_for_mixture(latent: int) -> int:
    """Return the number of codes [latent] from which a mixture is fitted to them."""
    return MIN_GAUSSIANS * CODES_PER_DIMENSION * latent


def kernel_density(codes: Tensor) -> Prior:
    """Put an equal Gaussian around each code, a smoothed bootstrap (Silverman, 1986, section 6.4).

    Its covariance is a fraction of that of the codes, see BANDWIDTH.
    """
    count, latent = codes.shape
    means = codes.cpu().double()
    bandwidth = BANDWIDTH * (count * (latent + 2) / 4) ** (-1 / (latent + 4))
    covariance = bandwidth**2 * torch.cov(means.T, correction=0)
    covariance.diagonal().add_(MIN_VARIANCE)
    scale_tril = torch.linalg.cholesky(covariance)[None].float().contiguous()
    return Prior(torch.full((count,), 1 / count), means.float(), scale_tril)


def fit_mixture(codes: Tensor, components: int, seed: int) -> Prior:
    """Fit a mixture of Gaussians: a pure function of its arguments.

    Args:
        codes: Latent vectors of images, [n, latent].
        components: Number of Gaussians, at most.
        seed: Selects the initial Gaussians.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture
    from threadpoolctl import threadpool_limits

    count, latent = codes.shape
    mixture = GaussianMixture(
        max(1, min(components, count // (CODES_PER_DIMENSION * latent))),
        max_iter=EM_ITERATIONS,
        init_params="k-means++",
        reg_covar=MIN_VARIANCE,
        random_state=seed % 2**32,
    )
    # One thread: more are no faster on so small a problem, and would change the order of sums.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(codes.cpu().double().numpy())
    widening = WIDENING**2 * torch.eye(latent, dtype=torch.float64)
    covariances = torch.from_numpy(mixture.covariances_) + widening
    return Prior(
        torch.from_numpy(mixture.weights_).float(),
        torch.from_numpy(mixture.means_).float(),
        torch.linalg.cholesky(covariances).float().contiguous(),
    )


def fit_class_priors(
    codes: Tensor, labels: Tensor, classes: int, components: int, seed: int
) -> Prior:
    """Fit one mixture for each class, with at most `components` Gaussians in all.

    A class with too few codes for one Gaussian has the mixture of all codes. `labels` are the
    classes of the codes, [n]; the other arguments are those of `fit_mixture`.
    """
    by_class = [codes[labels == number] for number in range(classes)]
    enough = torch.tensor([len(c) >= CODES_PER_DIMENSION * codes.shape[1] for c in by_class])
    parts = [
        fit_mixture(by_class[number], max(1, components // classes), seed)
        for number in enough.nonzero().flatten()
    ]
    if not enough.all():
        parts.append(fit_mixture(codes, components, seed))
    part_of_class = enough.cumsum(0) - 1
    part_of_class[~enough] = len(parts) - 1
    weights = torch.block_diag(*(part.weights[None] for part in parts))
    return Prior(
        weights[part_of_class],
        torch.cat([part.means for part in parts]),
        torch.cat([part.scale_tril for part in parts]),
    )
