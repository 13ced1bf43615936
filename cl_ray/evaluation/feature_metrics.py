"""Metrics of frozen features beside probes: their clusters, and checks that need no labels.

scikit-learn and scipy are imported where they are used: they take a second.
"""

import warnings
from functools import cached_property

import numpy as np
import torch

from cl_ray.data.config import ViewConfig
from cl_ray.data.dataset import UNLABELLED
from cl_ray.data.views import apply_views, sample_views
from cl_ray.evaluation.classifier import FORWARD_BATCH, Floats, Labels, Pixels
from cl_ray.evaluation.clustering import fit_cluster_heads
from cl_ray.evaluation.probes import FeatureScore, principal_components
from cl_ray.evaluation.reference import check_finite
from cl_ray.networks.normalize import to_uint8, to_unit

_CLUSTERED, _CLUSTERINGS, _STARTS = 10_000, 5, 10
"""Training images that clusters are fitted to, at most; seeds, and k-means' starts for each."""
_ROWS = 4096
"""Test images of the checks without labels, at most: uniformity compares all pairs of them."""
_VIEWS = ViewConfig(rotate=10, shift=0.08, scale=0.1, shear=10, warp=0.05, erase=0)
"""Views for the alignment: the same for all runs, whatever views they were trained on."""


class FeatureData:
    """Features that are measured, with what several metrics share.

    Args:
        train: float32 [N, d], features of training images.
        test: float32 [M, d], features of test images.
        views: float32 [V, d] each, features of two views of the same V test images.
        labels: int64 [N], of the training images, whose classes are counted; None without labels.
        test_labels: int64 [M], that clusters are compared with; None without labels. Images of
            either kind may be UNLABELLED.
        seed: The first of the seeds of clusters.

    Raises:
        UserError: A feature is NaN or Inf.
    """

    def __init__(
        self,
        train: Floats,
        test: Floats,
        views: tuple[Floats, Floats],
        labels: Labels | None = None,
        test_labels: Labels | None = None,
        seed: int = 0,
    ):
        for features, kind in ((train, "training image"), (test, "test image")):
            check_finite(features, kind)
        for features in views:
            check_finite(features, "the view of test image")
        self.train, self.test, self.views = train, test, views
        self.labels, self.test_labels, self.seed = labels, test_labels, seed

    @cached_property
    def components(self) -> tuple[Floats, Floats]:
        """Principal components of up to 10,000 training images and of labelled test images."""
        assert self.test_labels is not None
        test = self.test[self.test_labels != UNLABELLED]
        return principal_components(self.train[:_CLUSTERED], test, self.seed)

    @cached_property
    def cluster_count(self) -> int:
        """As many clusters as the training images have classes, at most one for each image.

        The labels have no other part in the clusters.
        """
        assert self.labels is not None
        classes = len(np.unique(self.labels[self.labels != UNLABELLED]))
        return min(classes, len(self.components[0]))

    @cached_property
    def clusters(self) -> list[Labels]:
        """The cluster of each labelled test image by a head of the features, for each seed."""
        train, test = self.components
        if len(train) == 1:
            return [np.zeros(len(test), np.int64)] * _CLUSTERINGS
        seeds = range(self.seed, self.seed + _CLUSTERINGS)
        heads = fit_cluster_heads(train, self.cluster_count, seeds)
        return [head.predict(test) for head in heads]

    @cached_property
    def known_labels(self) -> Labels:
        """The labels of the test images that have one."""
        assert self.test_labels is not None
        return self.test_labels[self.test_labels != UNLABELLED]


def sample_view_pairs(images: Pixels, seed: int = 0) -> tuple[Pixels, Pixels]:
    """Sample two views of each of the first 4096 images: uint8 [V, H, W, C] each."""
    random = torch.Generator().manual_seed(seed)
    views = []
    for _ in range(2):
        parts = [
            to_uint8(apply_views(to_unit(part), sample_views(_VIEWS, len(part), random)))
            for part in torch.from_numpy(images[:_ROWS]).split(FORWARD_BATCH)
        ]
        views.append(torch.cat(parts).numpy())
    return views[0], views[1]


def cluster_accuracy(data: FeatureData) -> FeatureScore:
    """Compute the accuracy of clusters as classes, under the best assignment of one to the other.

    The assignment maximises the accuracy (Kuhn, 1955), as is usual (Yang et al., 2010).
    """
    return _over_seeds([_best_accuracy(data.known_labels, found) for found in data.clusters])


def kmeans_accuracy(data: FeatureData) -> FeatureScore:
    """Compute the same of clusters by k-means."""
    from sklearn.cluster import KMeans

    (train, test), accuracies = data.components, []
    for seed in range(data.seed, data.seed + _CLUSTERINGS):
        kmeans = KMeans(data.cluster_count, n_init=_STARTS, random_state=seed % 2**32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are fewer different features than clusters
            found = kmeans.fit(train).predict(test)
        accuracies.append(_best_accuracy(data.known_labels, found))
    return _over_seeds(accuracies)


def normalized_mutual_information(data: FeatureData) -> FeatureScore:
    """Compute the mutual information of clusters and classes over their mean entropy, 0 to 1."""
    from sklearn.metrics import normalized_mutual_info_score

    return _over_seeds([normalized_mutual_info_score(data.known_labels, c) for c in data.clusters])


def adjusted_rand_index(data: FeatureData) -> FeatureScore:
    """Compute the agreement of clusters and classes on pairs of images (Hubert and Arabie, 1985).

    1 if equal, about 0 by chance.
    """
    from sklearn.metrics import adjusted_rand_score

    return _over_seeds([adjusted_rand_score(data.known_labels, c) for c in data.clusters])


def feature_alignment(data: FeatureData) -> FeatureScore:
    """Compute the mean squared distance of two views' features of unit length, 0 to 4.

    Wang and Isola (2020), section 4.1, alpha = 2. 0 for features that ignore the views; but also
    for constant ones: see `feature_uniformity`.
    """
    first, second = (torch.nn.functional.normalize(torch.from_numpy(v)) for v in data.views)
    return FeatureScore(float((first - second).square().sum(1).mean()))


def feature_uniformity(data: FeatureData) -> FeatureScore:
    """Compute log E exp(-2 |x - y|^2) over pairs of test images' features of unit length.

    Wang and Isola (2020), section 4.1, t = 2. 0 if all are the same, about -4 if they are spread
    evenly over a sphere of many dimensions.
    """
    x = torch.nn.functional.normalize(torch.from_numpy(data.test[:_ROWS])).double()
    exponents = 4 * (x @ x.T - 1)  # |x - y|^2 = 2 - 2 x.y
    pairs = exponents[~torch.eye(len(x), dtype=torch.bool)]
    if not len(pairs):
        return FeatureScore(0.0)
    return FeatureScore(float(pairs.logsumexp(0) - np.log(len(pairs))))


def effective_rank(data: FeatureData) -> FeatureScore:
    """Compute the exponential of the entropy of the singular values of test images' features.

    The effective rank of Roy and Vetterli (2007), which Garrido et al. (2023, eq. 1) call RankMe,
    the features not centred. 1 if all lie on a line, at most the number of dimensions and of
    images, of which it takes up to 4096.
    """
    x = torch.from_numpy(data.test[:_ROWS]).double()
    gram = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    fractions = values / values.sum().clamp(min=1e-30)
    return FeatureScore(float(torch.special.entr(fractions).sum().exp()))


def _best_accuracy(labels: Labels, clusters: Labels) -> float:
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics.cluster import contingency_matrix

    counts = contingency_matrix(labels, clusters)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, columns].sum() / counts.sum())


def _over_seeds(values: list[float]) -> FeatureScore:
    return FeatureScore(float(np.mean(values)), float(np.std(values, ddof=1)))
