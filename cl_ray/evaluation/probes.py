"""What frozen features know: neighbours, a linear probe, and few labels.

All take features [N, d] of training images with their labels, and features of test images. Test
labels are only compared with at the very end: nothing is fitted to them and nothing chosen by them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from cl_ray.errors import UserError
from cl_ray.evaluation.classifier import Floats, Labels

NEIGHBOURS = 20
"""k of `knn_20`."""
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""What a linear probe may choose from, the strongest first."""
FEW, SEEDS = 10, 10
"""Labels a class, and draws of them, where labels are few."""
FEW_PENALTY = 1e-2
"""Of a probe on few labels, which leave none to choose by; a tenth or ten times hardly matters."""
GRAPH, DIMENSIONS, EDGES, ALPHA = 60_000, 64, 5, 0.99
"""Label spreading: at most so many images, their principal components and neighbours; alpha is
that of Zhou et al. (2004, section 4)."""
MANY = 200
"""More classes than this are read by neighbours only. At 1000, each of a probe's up to seven fits
took 25 s of one core for 10,000 images, and arrays [60,000, SEEDS, 1000] of spread labels, of which
several are there at once, would take 2.4 GB each."""
BLOCK = 500
"""Queries whose distances to all others are in memory at once: 120 MB for 60,000."""


@dataclass(frozen=True)
class ProbeScore:
    """What a way of reading the features reaches on the test images.

    Args:
        accuracy: Share of the test images, 0 to 1; the mean where there are several draws.
        seconds: What it took.
        spread: Standard deviation over the draws of labels; None where there is one.
        setting: What was chosen on the way, in words.
    """

    accuracy: float
    seconds: float
    spread: float | None = None
    setting: str = ""

    @property
    def error(self) -> float:
        """1 - accuracy."""
        return 1 - self.accuracy


@dataclass(frozen=True)
class RepresentationScores:
    """All scores by name, and a sentence for each that could not be had."""

    scores: dict[str, ProbeScore]
    notes: list[str]


def evaluate_representation(
    train: Floats,
    labels: Labels,
    test: Floats,
    test_labels: Labels,
    seed: int = 0,
    few: bool = True,
) -> RepresentationScores:
    """Every score of some features.

    Args:
        train: [N, d], of training images.
        labels: [N], theirs, from 0.
        test: [M, d], of test images.
        test_labels: [M].
        seed: Of the probe's validation part and the draws of few labels.
        few: Whether to take the scores of few labels too.

    Returns:
        `knn_1`, `knn_20`: the majority of the nearest training images, see `nearest`;
        `linear_probe`: see there;
        `labels_100` (of ten classes): a linear probe on 10 labels a class and nothing else. One
            scale is common to all features: so few labels cannot tell the dimensions that matter
            from those that a scale of their own would raise to the same height;
        `labels_100_spread`: the same labels spread over the other training images, see
        `spread_labels`. Comparable with semi-supervised metrics, which use those images too.
        Of more than MANY classes the first two only, with a note.

    Raises:
        UserError: The arrays do not go together or are not finite.
    """
    _check(train, labels, test, test_labels)
    x, q = (torch.from_numpy(np.ascontiguousarray(part, np.float32)) for part in (train, test))
    y, truth = torch.from_numpy(labels), torch.from_numpy(test_labels)
    classes = int(y.max()) + 1
    scores: dict[str, ProbeScore] = {}
    notes: list[str] = []

    clock = _Clock()
    neighbours = y[nearest_neighbours(x, q, min(NEIGHBOURS, len(x)))]
    first = _share(neighbours[:, 0] == truth)
    votes = _share(majority_vote(neighbours, classes) == truth)
    seconds = clock()
    scores["knn_1"] = ProbeScore(first, seconds, setting="Euclidean")
    scores[f"knn_{NEIGHBOURS}"] = ProbeScore(votes, seconds, setting="Euclidean")

    if classes > MANY:
        left_out = "the linear probe" + (" and the scores of few labels" if few else "")
        notes.append(
            f"{classes} classes or more are too many for {left_out}, measured of up to {MANY}."
        )
        return RepresentationScores(scores, notes)

    mean, deviation = x.mean(0), x.std(0)
    deviation[deviation <= 1e-6 * deviation.max()] = 1  # a dead feature stays 0
    x_unit, q_unit = (x - mean) / deviation, (q - mean) / deviation
    probe = linear_probe(x_unit, y, classes, seed)
    right = _share(probe(q_unit).argmax(1) == truth)
    scores["linear_probe"] = ProbeScore(right, clock(), setting=f"penalty {probe.penalty:g}")

    if not few:
        return RepresentationScores(scores, notes)
    counts = torch.bincount(y, minlength=classes)
    name = f"labels_{FEW * classes}"
    if counts.min() < FEW:
        rarest = int(counts.argmin())
        notes.append(
            f"{name} needs {FEW} labels of every class: class {rarest} has {counts[rarest]}."
        )
        return RepresentationScores(scores, notes)
    draws = [sample_few_labels(labels, classes, seed, draw) for draw in range(SEEDS)]
    rights = []
    common = x.var(0).mean().sqrt().clamp(min=1e-30)
    q_even = (q - mean) / common
    for rows in draws:
        probe = fit_few_labels((x[rows] - mean) / common, y[rows], classes, FEW_PENALTY)
        rights.append(_share(probe(q_even).argmax(1) == truth))
    scores[name] = _over_draws(rights, clock(), f"penalty {FEW_PENALTY:g}")
    found = label_spreading(x, y, q, classes, draws, seed)
    rights = [_share(labels_of_draw == truth) for labels_of_draw in found]
    scores[f"{name}_spread"] = _over_draws(rights, clock(), f"{EDGES} neighbours, alpha {ALPHA}")
    return RepresentationScores(scores, notes)


def nearest_neighbours(bank: Tensor, queries: Tensor, k: int) -> Tensor:
    """Rows [M, k] of the k nearest in `bank` [N, d] of each of `queries` [M, d], nearest first.

    Euclidean, and exact: every pair is compared. That is what 1-NN metrics of others are by, and
    on D's features it was as good as cosine or better. |q|^2 is left out: it changes no order.
    """
    half = bank.square().sum(1) / 2
    return torch.cat(
        [
            torch.addmm(half, part, bank.T, alpha=-1).topk(k, largest=False).indices
            for part in queries.split(BLOCK)
        ]
    )


def majority_vote(neighbours: Tensor, classes: int) -> Tensor:
    """The commonest of each row's labels [M, k], the smaller one of two: [M]."""
    votes = torch.zeros(len(neighbours), classes, dtype=torch.int32)
    return votes.scatter_add_(1, neighbours, torch.ones_like(neighbours, dtype=torch.int32)).argmax(
        1
    )


@dataclass(frozen=True)
class Probe:
    """A linear classifier.

    Args:
        weight: [classes, d].
        bias: [classes].
        penalty: Of its squared weights.
    """

    weight: Tensor
    bias: Tensor
    penalty: float

    def __call__(self, features: Tensor) -> Tensor:
        """Logits [M, classes]."""
        return linear(features, self.weight, self.bias)


def linear_probe(features: Tensor, labels: Tensor, classes: int, seed: int = 0) -> Probe:
    """Multinomial logistic regression, its penalty chosen on a sixth of the training images.

    The penalties are tried from the strongest on, each from where the last one ended, until the
    accuracy falls; the best one, of equals the strongest, is then fitted to all of the images.

    Args:
        features: [N, d], standardised.
        labels: [N].
        classes: How many there are.
        seed: Decides which sixth.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held, used = order.tensor_split([len(order) // 6])
    x, y = features[used], labels[used]
    best, reached, last = None, -1.0, None
    for penalty in PENALTIES:
        last = fit_linear_probe(x, y, classes, penalty, last)
        right = _share(last(features[held]).argmax(1) == labels[held]) if len(held) else 0.0
        if right < reached:
            break
        if right > reached:
            best, reached = last, right
    assert best is not None
    return fit_linear_probe(features, labels, classes, best.penalty, best)


def fit_linear_probe(
    features: Tensor, labels: Tensor, classes: int, penalty: float, start: Probe | None = None
) -> Probe:
    """Least mean cross-entropy + penalty / 2 |weight|^2, by L-BFGS (convex: one solution)."""
    if start:
        weight, bias = start.weight.clone(), start.bias.clone()
    else:
        weight, bias = features.new_zeros(classes, features.shape[1]), features.new_zeros(classes)
    solver = torch.optim.LBFGS(
        [weight.requires_grad_(), bias.requires_grad_()],
        max_iter=100,
        history_size=10,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = cross_entropy(linear(features, weight, bias), labels)
        value = value + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return Probe(weight.detach(), bias.detach(), penalty)


def fit_few_labels(features: Tensor, labels: Tensor, classes: int, penalty: float) -> Probe:
    """`fit`, of fewer images than dimensions: the weights lie in the span of the images.

    (Kimeldorf and Wahba, 1971: what is orthogonal to every image only adds to the penalty.)
    """
    axes = torch.linalg.qr(features.T).Q
    small = fit_linear_probe(features @ axes, labels, classes, penalty)
    return Probe(small.weight @ axes.T, small.bias, penalty)


def sample_few_labels(labels: Labels, classes: int, seed: int, draw: int) -> NDArray[np.int64]:
    """Rows of FEW images of each class, drawn without repetition: [FEW * classes].

    Raises:
        UserError: A class has fewer.
    """
    random = np.random.default_rng([seed, draw])
    rows = []
    for label in range(classes):
        there = np.flatnonzero(labels == label)
        if len(there) < FEW:
            raise UserError(f"Class {label} has {len(there)} images: {FEW} labels are drawn of it.")
        rows.append(random.choice(there, FEW, replace=False))
    return np.concatenate(rows)


def label_spreading(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    classes: int,
    draws: list[NDArray[np.int64]],
    seed: int = 0,
) -> Tensor:
    """Labels of queries, of a few labels that were spread over all training images.

    Learning with local and global consistency (Zhou et al., 2004, section 2): F is
    (I - alpha S)^-1 Y on the graph of nearest neighbours among the training images, S its
    symmetrically normalised adjacency, Y the few labels. Queries are no part of the graph; they
    take the labels of their neighbours in it.

    Args:
        features: [N, d], of training images.
        labels: [N]; only those that `draws` names are looked at.
        queries: [M, d].
        classes: How many there are.
        draws: Rows that are labelled, a draw each.
        seed: Decides which GRAPH images stand in the graph where there are more.

    Returns:
        [len(draws), M].
    """
    from scipy import sparse

    mean = features.mean(0)
    if features.shape[1] > DIMENSIONS:  # neighbours among all are dear, and hardly change
        axes = torch.linalg.eigh(torch.cov(features.T)).eigenvectors[:, -DIMENSIONS:]
        features, queries = (features - mean) @ axes, (queries - mean) @ axes
    named = np.unique(np.concatenate(draws))
    others = np.setdiff1d(np.arange(len(features)), named)
    rest = np.random.default_rng(seed).permutation(others)[: max(0, GRAPH - len(named))]
    rows = np.concatenate([named, rest])
    count, edges = len(rows), min(EDGES, len(rows) - 1)
    features = features[torch.from_numpy(rows)]

    to = nearest_neighbours(features, features, edges + 1)[:, 1:]  # without itself
    pairs = (np.repeat(np.arange(count), edges), to.flatten().numpy())
    one_way = sparse.csr_matrix((np.ones(count * edges, np.float32), pairs), (count, count))
    graph = one_way + one_way.T
    scale = sparse.diags_array(np.asarray(graph.sum(1)).ravel() ** -0.5)
    graph = (scale @ graph @ scale).tocsr()

    known = np.zeros((count, len(draws), classes), np.float32)
    for draw, chosen in enumerate(draws):
        known[np.searchsorted(named, chosen), draw, labels[torch.from_numpy(chosen)]] = 1
    flat = known.reshape(count, -1)
    beliefs = conjugate_gradients(lambda f: f - ALPHA * (graph @ f), flat).reshape(known.shape)
    beliefs = np.maximum(beliefs, 0)  # none is less but by rounding
    beliefs /= beliefs.sum(2, keepdims=True) + np.finfo(np.float32).tiny
    around = nearest_neighbours(features, queries, edges)  # [M, edges]
    found = np.zeros((len(queries), len(draws), classes), np.float32)
    for column in around.numpy().T:
        found += beliefs[column]
    return torch.from_numpy(found.argmax(2).T)


def conjugate_gradients(
    product: Callable[[Floats], Floats], right: Floats, tolerance: float = 1e-6, steps: int = 300
) -> Floats:
    """Solve A x = b for each column of b, A symmetric and positive definite.

    Args:
        product: A times an array [N, c].
        right: [N, c].
        tolerance: Of the residual's norm, relative to that of b.
        steps: At most.
    """
    x = np.zeros_like(right)
    residual, direction = right.copy(), right.copy()
    size = first = np.square(right).sum(0)
    for _ in range(steps):
        image = product(direction)
        length = size / np.maximum((direction * image).sum(0), 1e-30)
        x += length * direction
        residual -= length * image
        before, size = size, np.square(residual).sum(0)
        if (size <= tolerance**2 * first).all():
            break
        direction = residual + size / np.maximum(before, 1e-30) * direction
    return x


class _Clock:
    """Seconds since it was last asked."""

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def __call__(self) -> float:
        before, self.at = self.at, time.perf_counter()
        return self.at - before


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _over_draws(rights: list[float], seconds: float, setting: str) -> ProbeScore:
    return ProbeScore(float(np.mean(rights)), seconds, float(np.std(rights, ddof=1)), setting)


def _check(train: Floats, labels: Labels, test: Floats, test_labels: Labels) -> None:
    for kind, features, given in (("training", train, labels), ("test", test, test_labels)):
        if features.ndim != 2 or features.shape[1] != train.shape[-1] or not len(features):
            raise UserError(
                f"The {kind} features are of shape {list(features.shape)}, those of training "
                f"{list(train.shape)}: both must be [N, d] of the same d."
            )
        if given.shape != (len(features),) or given.dtype.kind not in "iu" or given.min() < 0:
            raise UserError(
                f"The {kind} labels, {given.dtype} {list(given.shape)}, must be one whole number "
                f"from 0 for each of the {len(features)} images."
            )
        if not np.isfinite(features).all():
            row = int(np.flatnonzero(~np.isfinite(features).all(1))[0])
            raise UserError(
                f"The features of {kind} image {row} are not finite: the network that made them "
                "has broken weights."
            )
