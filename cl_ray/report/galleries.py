"""What the networks of a checkpoint show: samples, ways between them, neighbours, a map."""

from dataclasses import dataclass, replace

import numpy as np

from cl_ray.data.dataset import Dataset, RowBatch
from cl_ray.data.sampling import sample_rows
from cl_ray.evaluation.classifier import Floats
from cl_ray.model import TrainedModel
from cl_ray.report.chart import TOP, Chart, dots, over_values
from cl_ray.report.embedding import FEWEST, embedding_map
from cl_ray.report.interpolation import slerp
from cl_ray.report.neighbours import nearest_pixels
from cl_ray.report.pictures import ImageGrid, blocks, image_grid

SEED = 1
COLUMNS = 8
"""Images a row: what a phone shows at their size."""
STEPS, WAYS = 10, 4
SHOWN, NEAREST = 8, 5
COMPARED = 400
"""Samples, and test images, whose nearest training image is looked for."""
MAPPED = 2000
PLANE = 360
LETTER, LINE = 10, 17
"""Room that a letter of a name takes on the map, in its units: across at most, and down."""
COLOURS = 10
CLASSES = 12
"""Of which samples are shown apart, at most."""
BANK_BYTES = 100_000_000
"""Training images that are searched, at most: all 60,000 digits, or 8,000 of 64 x 64 in colour."""


def images_to_show(dataset: Dataset, split: str) -> RowBatch:
    """Images of a split, drawn at random, as many as the map shows."""
    return sample_rows(dataset, split, MAPPED, SEED)


def samples(run: TrainedModel) -> list[ImageGrid]:
    """64 images of noise."""
    images = run.generate(8 * COLUMNS, SEED)
    return blocks(images, COLUMNS, 4, f"images that G made of noise, after {run.step:,} steps")


def by_class(run: TrainedModel) -> list[ImageGrid]:
    """A row of each class, of the same noise; of many classes some. None if the run knows none."""
    rows = []
    for kind in some_classes(run, CLASSES):
        kinds = np.full(COLUMNS, kind)
        images = run.decode(run.latents(COLUMNS, SEED, kinds=kinds), labels=kinds)
        alt = f"{COLUMNS} images that G made of noise as of class {run.classes[kind]}."
        rows.append(image_grid(images, COLUMNS, alt, run.classes[kind]))
    return rows


def some_classes(run: TrainedModel, most: int) -> list[int]:
    """Classes that the run was trained on, evenly spread where there are more."""
    counts = run.counts or (1,) * len(run.classes)
    there = [kind for kind, count in enumerate(counts) if count]
    return [there[i * len(there) // most] for i in range(most)] if len(there) > most else there


def ways_of_noise(run: TrainedModel) -> ImageGrid:
    """From one sample to another."""
    kinds = np.resize(some_classes(run, WAYS), WAYS) if run.classes else None  # of a row
    of_ends = None if kinds is None else np.tile(kinds, 2)
    ends = run.latents(2 * WAYS, SEED + 1, kinds=of_ends)
    points = slerp(ends[:WAYS], ends[WAYS:], STEPS)
    alt = (
        f"{WAYS} rows: G's image of one random vector turns into that of another in {STEPS} steps."
    )
    labels = None if kinds is None else kinds.repeat(STEPS)
    return image_grid(run.decode(points.flatten(0, 1), labels=labels), STEPS, alt)


def ways_of_images(run: TrainedModel, real: RowBatch) -> ImageGrid:
    """From a real image, by what G makes of the way between their codes, to another."""
    chosen = real.image[: 2 * WAYS]
    codes = run.encode(chosen)
    half = len(chosen) // 2
    points = slerp(codes[:half], codes[half : 2 * half], STEPS - 2)
    labels = None
    if run.classes:  # each point has the class of the end that it is nearer to
        known = run.classify(chosen) if real.label is None else real.label[: 2 * WAYS]
        ends = known[: 2 * half].reshape(2, half)
        labels = ends.T.repeat((STEPS - 2) // 2, 1).flatten()
    between = run.decode(points.flatten(0, 1), labels=labels)
    between = between.reshape(half, STEPS - 2, *run.shape)
    first, last = chosen[:half, None], chosen[half : 2 * half, None]
    rows = np.concatenate([first, between, last], 1).reshape(-1, *run.shape)
    alt = f"{half} rows: a real image, G's images of the way to another one, and that one."
    return image_grid(rows, STEPS, alt)


@dataclass(frozen=True)
class Neighbours:
    """Samples with their nearest training images, and how near those are.

    Args:
        rows: A sample, with the distance as its label, and the images nearest to it.
        chart: How the distances are distributed, of samples and of real test images.
        samples: Their median distance to the nearest training image.
        floor: That of real test images; None where there are none.
        nearer: Share of samples that are nearer than all but 1 % of the test images.
        count: Samples that were looked at.
        bank: Training images that were searched.
        whole: Whether those are all there are.
    """

    rows: list[tuple[ImageGrid, ImageGrid]]
    chart: Chart
    samples: float
    floor: float | None
    nearer: float | None
    count: int
    bank: int
    whole: bool


def nearest_training_images(
    run: TrainedModel, dataset: Dataset, test: RowBatch | None
) -> Neighbours:
    """The nearest training images of samples, and how much nearer they are than new images'."""
    most = BANK_BYTES // int(np.prod(dataset.info.shape))
    train = sample_rows(dataset, "train", most, SEED)
    made = run.generate(COMPARED, SEED)
    found = nearest_pixels(train.image, made, NEAREST)
    # The samples that are nearest to a training image come first: any copies are among these.
    by_distance = np.argsort(found.distances[:, 0], kind="stable")
    order = [*by_distance[: SHOWN // 2], *np.sort(by_distance[SHOWN // 2 :])[: SHOWN // 2]]
    rows = [
        (
            image_grid(made[i : i + 1], 1, "A sample.", f"{found.distances[i, 0]:.2f}"),
            image_grid(train.image[found.rows[i]], NEAREST, "Its nearest training images."),
        )
        for i in order
    ]
    sets: dict[str, tuple[str, np.ndarray]] = {"samples": ("fake", found.distances[:, 0])}
    floor = nearer = None
    if test is not None:
        new = nearest_pixels(train.image, test.image[:COMPARED], 1).distances[:, 0]
        sets["real test images"] = ("real", new)
        floor = float(np.median(new))
        nearer = float((found.distances[:, 0] < np.quantile(new, 0.01)).mean())
    return Neighbours(
        rows=rows,
        chart=over_values(
            "Distance to the nearest training image, share of images",
            {name: (colour, values) for name, (colour, values) in sets.items()},
            "Euclidean distance of pixels, each in [0, 1]",
        ),
        samples=float(np.median(found.distances[:, 0])),
        floor=floor,
        nearer=nearer,
        count=len(made),
        bank=len(train.id),
        whole=len(train.id) == dataset.info.splits["train"].rows,
    )


@dataclass(frozen=True)
class Group:
    """The points of one label.

    Args:
        name: The label's; empty where there are none.
        colour: A class of the style sheet.
        dots: The points, as SVG's `d`.
        count: How many.
        x: Where the name stands.
        y: The same, from above.
        named: Whether the name stands there: it does not if it would lie on another.
    """

    name: str
    colour: str
    dots: str
    count: int
    x: float
    y: float
    named: bool


@dataclass(frozen=True)
class EmbeddingPlot:
    """A map of embeddings, and what was mapped.

    Args:
        groups: Points by label.
        split: Which images they are.
        count: How many.
        kept: Share of variance that t-SNE saw.
        components: Principal components, [n, d].
        rows: The images.
        labels: Their labels' names; None if there are none.
        dimensions: Of the features.
    """

    groups: list[Group]
    split: str
    count: int
    kept: float
    components: Floats
    rows: RowBatch
    labels: list[str] | None
    dimensions: int


def plot_embedding(
    run: TrainedModel, dataset: Dataset, rows: RowBatch, split: str
) -> EmbeddingPlot | None:
    """D's representation of images as points; None where they are too few for a map."""
    if len(rows.id) < FEWEST:
        return None
    features = run.embed(rows.image)
    plane = embedding_map(features)
    low, high = plane.points.min(0), plane.points.max(0)
    x, y = ((plane.points - low) / np.maximum(high - low, 1e-9) * (PLANE - 2 * TOP) + TOP).T
    labels = None if rows.label is None else class_labels(dataset, rows.label)
    groups: list[Group] = []
    for number in [None] if rows.label is None else np.unique(rows.label).tolist():
        here = np.ones(len(x), bool) if rows.label is None else rows.label == number
        name = "" if number is None else class_labels(dataset, np.array([number]))[0]
        at = within(name, float(np.median(x[here])), float(np.median(y[here])))
        groups.append(
            Group(
                name=name,
                colour="ink" if number is None else f"c{number % COLOURS}",
                dots=dots(x[here], y[here]),
                count=int(here.sum()),
                x=round(at[0], 1),
                y=round(at[1], 1),
                named=bool(name),
            )
        )
    # Of two names on each other neither is written: one alone would seem to name both groups.
    alone = [not any(cross(g, other) for other in groups if other is not g) for g in groups]
    groups = [replace(g, named=g.named and free) for g, free in zip(groups, alone, strict=True)]
    return EmbeddingPlot(
        groups, split, len(x), plane.kept, plane.components, rows, labels, features.shape[1]
    )


def within(name: str, x: float, y: float) -> tuple[float, float]:
    """Where a name stands whole on the map, as near as can be to where its points are."""
    half = min(LETTER * len(name) / 2, PLANE / 2)
    return min(max(x, half), PLANE - half), min(max(y, LINE / 2), PLANE - LINE / 2)


def cross(one: Group, other: Group) -> bool:
    """Whether the name of one group would lie on another's."""
    apart = LETTER * (len(one.name) + len(other.name)) / 2
    return abs(one.x - other.x) < apart and abs(one.y - other.y) < LINE


def class_labels(dataset: Dataset, labels: np.ndarray) -> list[str]:
    """What the labels are called."""
    known = dataset.info.classes
    return [known[i] if known and i < len(known) else str(i) for i in labels.tolist()]
