"""Probes of frozen features: nearest neighbours, a linear probe, and few labels.

Each probe is a function of `ProbeData`. Test labels are only compared with: nothing is fitted to
them and nothing is selected by them. scikit-learn is imported where it is used: it takes a second.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cl_ray.errors import UserError
from cl_ray.evaluation.classifier import Floats, Labels
from cl_ray.evaluation.reference import check_finite

MAX_PROBED_CLASSES = 200
"""Above this only nearest neighbours are measured. At 1000 classes each of a linear probe's up to
seven fits took 25 s of one core for 10,000 images, and label spreading over 60,000 images needs
several arrays of 2.4 GB."""

_KNN = 20
_PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Weight decay that a linear probe selects from, strongest first."""
_FEW, _DRAWS = 10, 10
"""Labels per class, and random draws of them."""
_FEW_PENALTY = 1e-2
"""Few labels leave none to select it by; a tenth of it or ten times as much hardly matters."""
_GRAPH, _EDGES, _ALPHA = 60_000, 5, 0.99
"""Label spreading: at most so many images and neighbours; alpha is that of Zhou et al. (2004,
section 4)."""
_COLUMNS = 64
"""Classes whose labels are spread at once."""
_DIMENSIONS = 96
_WHITENING = 0.75
"""Principal components in which neighbours and clusters are found. All dimensions cost more and
are no better."""


@dataclass(frozen=True)
class FeatureScore:
    """A metric of features.

    Args:
        value: The metric, of a probe the fraction of correct test images; the mean over draws of
            labels or over seeds of clusters.
        spread: Standard deviation over the draws or seeds; None if there is one only.
        setting: Hyperparameters of a probe, in words.
        seconds: The time it took.
    """

    value: float
    spread: float | None = None
    setting: str = ""
    seconds: float = 0.0


class ProbeData:
    """Features and labels of training and test images, with what several probes share.

    Args:
        train: float32 [N, d], features of training images.
        labels: int64 [N], from 0.
        test: float32 [M, d], features of test images.
        test_labels: int64 [M].
        seed: Seed of the validation split of the linear probe and of the draws of few labels.

    Raises:
        UserError: A feature is NaN or Inf.
    """

    def __init__(
        self, train: Floats, labels: Labels, test: Floats, test_labels: Labels, seed: int = 0
    ):
        check_finite(train, "training image")
        check_finite(test, "test image")
        self.train, self.test = (np.ascontiguousarray(x, np.float32) for x in (train, test))
        self.labels, self.test_labels, self.seed = labels, test_labels, seed
        self.classes = int(labels.max()) + 1

    @cached_property
    def components(self) -> tuple[Floats, Floats]:
        """The `principal_components` of training and test images."""
        return principal_components(self.train, self.test, self.seed)

    @cached_property
    def neighbour_labels(self) -> Labels:
        """Labels [M, 20] of the training images nearest to each test image, nearest first."""
        k = min(_KNN, len(self.train))
        return self.labels[nearest_neighbours(*self.components, k)]

    @cached_property
    def few_label_draws(self) -> list[NDArray[np.int64]]:
        """Rows [10 classes] of ten random training images per class, a draw each.

        Raises:
            UserError: A class has fewer.
        """
        return [sample_few_labels(self.labels, self.seed, i) for i in range(_DRAWS)]

    def accuracy(self, predicted: Labels) -> float:
        """Return the fraction of test images whose label is `predicted` [M]."""
        return float((predicted == self.test_labels).mean())


def knn_accuracy(data: ProbeData, k: int) -> FeatureScore:
    """Classify by the majority of the k nearest training images, k up to 20.

    By cosine similarity of `principal_components`.

    The smaller label wins a tie, as in scikit-learn.
    """
    from scipy.stats import mode

    predicted = mode(data.neighbour_labels[:, :k], axis=1).mode
    return FeatureScore(data.accuracy(predicted), setting=f"{_DIMENSIONS} principal components")


def nearest_neighbours(bank: Floats, queries: Floats, k: int) -> NDArray[np.int64]:
    """Return the rows [M, k] of `bank` [N, d] nearest to each of `queries` [M, d], nearest first.

    Euclidean and exact.
    """
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(bank)
    return np.asarray(index.kneighbors(queries, return_distance=False))


def linear_probe_accuracy(data: ProbeData) -> FeatureScore:
    """Fit multinomial logistic regression to standardised features of all training images.

    Raises:
        UserError: The training images are of one class.
    """
    mean, std = data.train.mean(0), data.train.std(0, ddof=1)
    std[std <= 1e-6 * std.max()] = 1  # a constant feature stays 0
    predicted, penalty = linear_probe(
        (data.train - mean) / std, data.labels, (data.test - mean) / std, data.seed
    )
    return FeatureScore(data.accuracy(predicted), setting=f"penalty {penalty:g}")


def linear_probe(
    train: Floats, labels: Labels, test: Floats, seed: int = 0
) -> tuple[Labels, float]:
    """Predict test labels by logistic regression whose penalty a sixth of the images selects.

    The penalties are tried from the strongest on, each fit from the last one's solution, until the
    accuracy falls. Of equals the strongest is taken, and fitted to all training images.

    Args:
        train: float32 [N, d], standardised.
        labels: int64 [N].
        test: float32 [M, d].
        seed: Decides which sixth is held out.

    Returns:
        Predicted labels [M] and the penalty, see `logistic_regression`.

    Raises:
        UserError: The labels are of one class.
    """
    classes = len(np.unique(labels))
    if classes < 2:
        raise UserError("A linear probe needs labels of two classes or more.")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).numpy()
    held_out, fitted = np.split(order, [len(order) // 6])
    classes_fitted = len(np.unique(labels[fitted]))
    model, best, highest = None, _PENALTIES[0], -1.0
    for penalty in _PENALTIES if len(held_out) and classes_fitted > 1 else ():
        model = logistic_regression(train[fitted], labels[fitted], penalty, model)
        accuracy = float(model.score(train[held_out], labels[held_out]))
        if accuracy < highest:
            break
        if accuracy > highest:
            best, highest = penalty, accuracy
    start = model if classes_fitted == classes else None
    return logistic_regression(train, labels, best, start).predict(test), best


def logistic_regression(features: Floats, labels: Labels, penalty: float, start: Any = None) -> Any:
    """Minimise mean cross-entropy + penalty / 2 |weights|^2 (scikit-learn's L-BFGS).

    Against L-BFGS of torch on 10,000 images of 1024 features: the same accuracy to 0.05 points at
    1.4 times the CPU time, 23 s against 17 s.

    Args:
        features: float32 [N, d].
        labels: int64 [N], of two classes or more.
        penalty: Weight decay.
        start: A fitted model of the same classes to start from; it is fitted anew.

    Returns:
        A fitted `sklearn.linear_model.LogisticRegression`.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = start or LogisticRegression(warm_start=True, max_iter=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.set_params(C=1 / (penalty * len(features))).fit(features, labels)


def few_labels_accuracy(data: ProbeData) -> FeatureScore:
    """Fit logistic regression to ten labels per class and nothing else.

    All features share one scale: so few labels cannot tell the dimensions that matter from those
    that a scale of their own would raise to the same height.

    Raises:
        UserError: A class has fewer than ten training images, or there is one class only.
    """
    if len(np.unique(data.labels)) < 2:
        raise UserError("A linear probe needs labels of two classes or more.")
    mean, scale = data.train.mean(0), max(float(np.sqrt(data.train.var(0, ddof=1).mean())), 1e-30)
    train, test = (data.train - mean) / scale, (data.test - mean) / scale
    accuracies = []
    for rows in data.few_label_draws:
        # The weights lie in the span of the images (Kimeldorf and Wahba, 1971): a fit in it takes
        # a tenth of the time where there are fewer images than features.
        axes = np.linalg.qr(train[rows].T)[0]
        model = logistic_regression(train[rows] @ axes, data.labels[rows], _FEW_PENALTY)
        accuracies.append(data.accuracy(model.predict(test @ axes)))
    return _over_draws(accuracies, f"penalty {_FEW_PENALTY:g}")


def few_labels_spread_accuracy(data: ProbeData) -> FeatureScore:
    """Spread ten labels per class over the other training images, see `label_spreading`.

    Comparable with semi-supervised results, which use the unlabelled images too.

    Raises:
        UserError: A class has fewer than ten training images.
    """
    draws, (train, test) = data.few_label_draws, data.components
    predicted = label_spreading(train, data.labels, test, data.classes, draws, data.seed)
    accuracies = [data.accuracy(row) for row in predicted]
    return _over_draws(accuracies, f"{_EDGES} neighbours, alpha {_ALPHA}")


def sample_few_labels(labels: Labels, seed: int, draw: int) -> NDArray[np.int64]:
    """Draw the rows [10 classes] of ten images per class that has any, without repetition.

    Raises:
        UserError: A class has fewer.
    """
    random = np.random.default_rng([seed, draw])
    rows = []
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        if len(of_class) < _FEW:
            raise UserError(
                f"{_FEW} labels per class need as many training images: class {label} has "
                f"{len(of_class)}."
            )
        rows.append(random.choice(of_class, _FEW, replace=False))
    return np.concatenate(rows)


class PrincipalComponents:
    """Projects features to the leading principal components of those it is fitted to.

    Each of the 96 is divided by its standard deviation to the power of 0.75: a part of a whitening,
    without which the largest components alone decide which images are near each other, while a
    whole one raises noise. Rows then have unit length, so that the Euclidean distance ranks as the
    cosine similarity does.

    By a randomized SVD (Halko et al., 2011), which takes seconds at 8,512 dimensions, where all
    eigenvectors of the covariance take a minute of two cores.

    Args:
        features: float32 [N, d].
        seed: Seed of the randomized SVD.
    """

    def __init__(self, features: Floats, seed: int = 0):
        from sklearn.decomposition import PCA

        count = min(_DIMENSIONS, *features.shape)
        self._pca = PCA(count, svd_solver="randomized", random_state=seed % 2**32)
        components = self._pca.fit(features).transform(features)
        self._scale = np.maximum(components.std(0), 1e-12) ** _WHITENING

    def project(self, features: Floats) -> Floats:
        """Project features [M, d] to [M, 96], or to fewer where N or d is smaller."""
        from sklearn.preprocessing import normalize

        return np.asarray(normalize(self._pca.transform(features) / self._scale))


def principal_components(train: Floats, test: Floats, seed: int = 0) -> tuple[Floats, Floats]:
    """Project features [N, d] and [M, d] to the `PrincipalComponents` of the first."""
    components = PrincipalComponents(train, seed)
    return components.project(train), components.project(test)


class NeighbourGraph:
    """A graph of nearest neighbours among images, on which a few labels spread to all.

    Learning with local and global consistency (Zhou et al., 2004, section 2): F solves
    (I - alpha S) F = Y, S the symmetrically normalised adjacency, Y the few labels.

    scikit-learn's LabelSpreading leaves the graph asymmetric and lost 5 points with it (0.83
    against 0.89, 100 labels of 10,000 digits), and it builds the graph anew for each draw.

    Args:
        features: float32 [N, d], of the images.
    """

    def __init__(self, features: Floats):
        from scipy import sparse
        from sklearn.neighbors import NearestNeighbors

        edges = min(_EDGES, len(features) - 1)
        self._index = NearestNeighbors(n_neighbors=edges, algorithm="brute").fit(features)
        directed = self._index.kneighbors_graph().astype(np.float32)
        graph = directed + directed.T
        scale = sparse.diags_array(np.asarray(graph.sum(1)).ravel() ** -0.5)
        self._adjacency = (scale @ graph @ scale).tocsr()

    def spread(self, rows: NDArray[np.int64], labels: Labels, classes: int) -> Floats:
        """Spread the labels [n] of some rows [n] over all images.

        Returns:
            float32 [N, classes], the part of each class, which sum to 1; 0 of images that no label
            reaches.
        """
        from scipy.sparse.linalg import LinearOperator, cg

        parts = np.zeros((self._adjacency.shape[0], classes), np.float32)
        parts[rows, labels] = 1

        def product(flat: Floats) -> Floats:
            columns = flat.reshape(len(parts), -1)
            return (columns - _ALPHA * (self._adjacency @ columns)).ravel()

        for first in range(0, classes, _COLUMNS):  # together, but in memory only so many at once
            block = parts[:, first : first + _COLUMNS]
            system = LinearOperator((block.size, block.size), matvec=product, dtype=np.float32)
            solution, _ = cg(system, block.ravel(), rtol=1e-6, maxiter=300)
            block[:] = np.maximum(solution.reshape(block.shape), 0)  # negative only by rounding
        parts /= parts.sum(1, keepdims=True) + np.finfo(np.float32).tiny
        return np.asarray(parts)

    def neighbours(self, queries: Floats) -> NDArray[np.int64]:
        """Return the images [M, edges] nearest to queries [M, d], which are not in the graph."""
        return np.asarray(self._index.kneighbors(queries, return_distance=False))


def graph_rows(labelled: NDArray[np.int64], count: int, seed: int = 0) -> NDArray[np.int64]:
    """Return the labelled rows and, in random order, others of `count` rows, 60,000 in all."""
    others = np.setdiff1d(np.arange(count), labelled)
    room = max(0, _GRAPH - len(labelled))
    return np.concatenate([labelled, np.random.default_rng(seed).permutation(others)[:room]])


def label_spreading(
    features: Floats,
    labels: Labels,
    queries: Floats,
    classes: int,
    draws: Sequence[NDArray[np.int64]],
    seed: int = 0,
) -> Labels:
    """Predict labels of queries from few labels, spread over training images.

    Queries take the labels of their nearest neighbours in the `NeighbourGraph`.

    Args:
        features: float32 [N, d], of training images.
        labels: int64 [N]; only the rows in `draws` are read.
        queries: float32 [M, d].
        classes: Number of classes K.
        draws: Labelled rows, a draw each.
        seed: Decides which 60,000 images are in the graph where there are more.

    Returns:
        int64 [draws, M].
    """
    labelled = np.unique(np.concatenate(draws))
    graph = NeighbourGraph(features[graph_rows(labelled, len(features), seed)])
    neighbours = graph.neighbours(queries)
    predicted = []
    for chosen in draws:
        parts = graph.spread(np.searchsorted(labelled, chosen), labels[chosen], classes)
        votes = sum(parts[column] for column in neighbours.T)
        predicted.append(np.asarray(votes).argmax(1))
    return np.stack(predicted)


def _over_draws(accuracies: list[float], setting: str) -> FeatureScore:
    return FeatureScore(float(np.mean(accuracies)), float(np.std(accuracies, ddof=1)), setting)
