"""Images of a checkpoint's networks: samples, interpolations, nearest training images."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_ray.data.dataset import Dataset, RowBatch, sample_rows
from cl_ray.errors import UserError, printable
from cl_ray.evaluation.classifier import Pixels
from cl_ray.model import TrainedModel
from cl_ray.report.charts import Chart, histogram_chart
from cl_ray.report.images import ImageGrid, image_grid

SEED = 1
MAX_CLASSES = 12
"""Classes of which samples are shown separately, at most."""
_COLUMNS = 8
"""Images in a row: as many as a phone shows at their own size."""
_SAMPLES_PER_GRID = 32
_STEPS, _INTERPOLATIONS = 10, 4
_SHOWN, _NEAREST = 8, 5
_COMPARED = 400
"""Samples, and held-out images, whose nearest training image is searched."""
_BANK_BYTES = 100_000_000
"""Training images that are searched, at most: all 60,000 digits, or 8,000 of 64 x 64 in colour."""


def sample_grids(run: TrainedModel) -> list[ImageGrid]:
    """Return 64 samples, in grids that a wide page sets side by side."""
    images = run.generate(8 * _COLUMNS, SEED)
    parts = [images[i : i + _SAMPLES_PER_GRID] for i in range(0, len(images), _SAMPLES_PER_GRID)]
    what = f"images that G made of noise, after {run.step:,} steps."
    return [image_grid(part, _COLUMNS, f"{len(part)} {what}") for part in parts]


def class_grids(run: TrainedModel) -> list[ImageGrid]:
    """Return a row of samples of each class, of the same noise; none for an unconditional run."""
    rows = []
    for index in shown_classes(run, MAX_CLASSES):
        name, labels = run.classes[index], np.full(_COLUMNS, index)
        images = run.decode(run.latents(_COLUMNS, SEED, labels=labels), labels=labels)
        alt = f"{_COLUMNS} images of class {name} that G made of noise."
        rows.append(image_grid(images, _COLUMNS, alt, name))
    return rows


def shown_classes(run: TrainedModel, most: int) -> list[int]:
    """Return the classes with training images, or at most so many of them, evenly spread."""
    counts = run.counts or (1,) * len(run.classes)
    found = [index for index, count in enumerate(counts) if count]
    return [found[i * len(found) // most] for i in range(most)] if len(found) > most else found


def noise_interpolation(run: TrainedModel) -> ImageGrid:
    """Interpolate between latent vectors of noise; with classes, each row is of one class."""
    classes = shown_classes(run, _INTERPOLATIONS)
    labels = np.resize(classes, _INTERPOLATIONS) if classes else None
    ends = run.latents(
        2 * _INTERPOLATIONS, SEED + 1, labels=None if labels is None else np.tile(labels, 2)
    )
    points = slerp(ends[:_INTERPOLATIONS], ends[_INTERPOLATIONS:], _STEPS)
    of_points = None if labels is None else labels.repeat(_STEPS)
    images = run.decode(points.flatten(0, 1), labels=of_points)
    what = f"G's image of one random vector turns into that of another in {_STEPS} steps."
    return image_grid(images, _STEPS, f"{_INTERPOLATIONS} rows: {what}")


def image_interpolation(run: TrainedModel, real: RowBatch) -> ImageGrid:
    """Interpolate between the latent codes of real images, which stand at both ends of a row.

    Raises:
        UserError: There is one image only, or one with a label, or the run needs labels and the
            images have none.
    """
    real = real.labelled() if run.classes else real
    chosen = real.image[: 2 * _INTERPOLATIONS]
    if len(chosen) < 2:
        raise UserError("One image is too few for an interpolation.")
    codes = run.encode(chosen)
    half = len(chosen) // 2
    points = slerp(codes[:half], codes[half : 2 * half], _STEPS - 2)
    labels = None
    if run.classes:  # each point has the class of the nearer end
        known = run.classify(chosen) if real.label is None else real.label[: 2 * _INTERPOLATIONS]
        labels = known[: 2 * half].reshape(2, half).T.repeat((_STEPS - 2) // 2, 1).flatten()
    between = run.decode(points.flatten(0, 1), labels=labels)
    between = between.reshape(half, _STEPS - 2, *run.shape)
    first, last = chosen[:half, None], chosen[half : 2 * half, None]
    rows = np.concatenate([first, between, last], 1).reshape(-1, *run.shape)
    alt = f"{half} rows: a real image, G's images of the way to another one, and that one."
    return image_grid(rows, _STEPS, alt)


def slerp(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Interpolate between latent vectors [n, d] on the sphere (Shoemake, 1985, section 3.3).

    At even angles, in `steps` points with both ends included, 2 or more.

    Returns:
        [n, steps, d], of mean square 1, as G takes latent vectors. Between opposite ends, where
        every great circle is equally short, one of them is taken.
    """
    a, b = (torch.nn.functional.normalize(z.double(), dim=1) for z in (start, end))
    orthogonal = b - (a * b).sum(1, keepdim=True) * a
    is_opposite = orthogonal.norm(dim=1, keepdim=True) < 1e-6
    any_way = torch.roll(a, 1, dims=1) - (torch.roll(a, 1, dims=1) * a).sum(1, keepdim=True) * a
    side = torch.nn.functional.normalize(torch.where(is_opposite, any_way, orthogonal), dim=1)
    angle = torch.atan2((b * side).sum(1, keepdim=True), (a * b).sum(1, keepdim=True))
    angles = angle[:, None] * torch.linspace(0, 1, steps, dtype=a.dtype)[:, None]
    points = a[:, None] * angles.cos() + side[:, None] * angles.sin()
    return (points * start.shape[1] ** 0.5).to(start.dtype)


@dataclass(frozen=True)
class Neighbours:
    """Samples with their nearest training images: are any of them copies?

    Args:
        rows: A sample, with the distance as its label, and the images nearest to it.
        chart: The distribution of distances, of samples and of held-out real images.
        median: Median distance of a sample to its nearest training image.
        baseline: The same of held-out real images; None where there are none.
        nearer: Fraction of samples that are nearer than all but 1 % of the held-out images.
        bank: Number of training images that were searched.
        is_whole: Whether those are all training images.
    """

    rows: list[tuple[ImageGrid, ImageGrid]]
    chart: Chart
    median: float
    baseline: float | None
    nearer: float | None
    count: int
    bank: int
    is_whole: bool


def nearest_training_images(
    run: TrainedModel, dataset: Dataset, held_out: RowBatch | None
) -> Neighbours:
    """Find the nearest training images of samples, and compare with those of held-out images."""
    most = _BANK_BYTES // int(np.prod(dataset.info.shape))
    train = sample_rows(dataset, "train", most, SEED)
    samples = run.generate(_COMPARED, SEED)
    rows, distances = nearest_pixels(train.image, samples, _NEAREST)
    nearest = distances[:, 0]
    # The samples nearest to a training image come first: any copies are among these.
    order = np.argsort(nearest, kind="stable")
    half = _SHOWN // 2
    shown = []
    for i in [*order[:half], *np.sort(order[half:])[:half]]:
        which = "" if train.origin is None else f": {', '.join(train.origin[rows[i]])}"
        alt = printable(f"Its nearest training images{which}.")
        sample = image_grid(samples[i : i + 1], 1, "A sample.", f"{nearest[i]:.2f}")
        shown.append((sample, image_grid(train.image[rows[i]], _NEAREST, alt)))
    groups = {"samples": ("fake", nearest)}
    baseline = nearer = None
    if held_out is not None:
        real = nearest_pixels(train.image, held_out.image[:_COMPARED], 1)[1][:, 0]
        groups["held-out real images"] = ("real", real)
        baseline = float(np.median(real))
        nearer = float((nearest < np.quantile(real, 0.01)).mean())
    title = "Distance to the nearest training image, % of images"
    return Neighbours(
        rows=shown,
        chart=histogram_chart(title, groups, "Euclidean distance of pixels in [0, 1]"),
        median=float(np.median(nearest)),
        baseline=baseline,
        nearer=nearer,
        count=len(samples),
        bank=len(train.id),
        is_whole=len(train.id) == dataset.info.splits["train"].rows,
    )


def nearest_pixels(
    bank: Pixels, queries: Pixels, k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Find for each query [n, H, W, C] the k nearest images of the bank [N, H, W, C], exactly.

    The distance is Euclidean, of pixels in [0, 1]. So a copy has distance 0 on every data set,
    whatever a network makes of it.

    Returns:
        Rows of the bank and distances, both [n, k], nearest first.
    """
    from sklearn.neighbors import NearestNeighbors

    # Sums of squares of integers are exact in the float64 that it computes float32 with.
    flat = [images.reshape(len(images), -1).astype(np.float32) for images in (bank, queries)]
    search = NearestNeighbors(n_neighbors=min(k, len(bank)), algorithm="brute").fit(flat[0])
    distances, rows = search.kneighbors(flat[1])
    return rows, distances / 255
