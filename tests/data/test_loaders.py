"""A rank's batches: each row once an epoch, far negatives, nothing left to time or chance."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import labels_of

from cl_ray.batch import PairBatch
from cl_ray.data.config import PairDataConfig
from cl_ray.data.dataset import UNLABELLED, Dataset, RowBatch
from cl_ray.data.loaders import (
    PAIR_IMAGES,
    InMemoryLoader,
    PairLoader,
    StreamingLoader,
    sample_window_pairs,
)
from cl_ray.data.partition import Partition, draw_labelled_ids

LOADERS: dict[str, type[InMemoryLoader] | type[StreamingLoader]] = {
    "memory": InMemoryLoader,
    "streaming": StreamingLoader,
}
COLUMNS = ("positive", "partner", "negative", "present")

SIZES = [  # mode, rows, batch, workers, window, quantile
    ("views", 347, 12, 1, 90, 0.3),
    ("labels", 347, 12, 2, 40, 0.3),
    ("views", 347, 12, 3, 50, 0.3),
    ("labels", 348, 12, 4, 40, 0.3),  # 87 rows each, of which 3 are in an incomplete batch
    ("views", 360, 12, 6, 30, 0.1),  # divides: no batch is incomplete
    ("labels", 25, 12, 2, 6, 0.01),  # rank 1 has no row left for its last batch
    ("views", 13, 32, 2, 100, 0.01),  # not even one whole batch
]


def partition_of(
    dataset: Dataset, batch: int = 12, workers: int = 1, rank: int = 0, **fields: Any
) -> Partition:
    config = PairDataConfig.model_validate({"batch_size": batch, "seed": 3, **fields})
    return Partition(dataset, config, workers, rank)


def batches_equal(ours: list[PairBatch], theirs: list[PairBatch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(ours, theirs, strict=True)
        for name in COLUMNS
    )


class Identify:
    """Tells rows by their pixels, and how far apart they are."""

    def __init__(self, dataset: Dataset):
        rows = dataset.read("train")
        self.labels = dict(zip(rows.id.tolist(), labels_of(rows).tolist(), strict=True))
        self.by_pixels = {i.tobytes(): int(n) for i, n in zip(rows.image, rows.id, strict=True)}
        assert len(self.by_pixels) == len(rows.id)  # no two digits alike
        self.pixels = {int(n): i / 255.0 for i, n in zip(rows.image, rows.id, strict=True)}

    def ids(self, images: torch.Tensor, present: torch.Tensor) -> list[int]:
        return [self.by_pixels[image.numpy().tobytes()] for image in images[present]]

    def batch(self, batch: PairBatch, rank: int = 0) -> list[list[int]]:
        """Ids of positives, partners and negatives."""
        columns = (batch.positive, batch.partner, batch.negative)
        return [self.ids(column, batch.present[rank]) for column in columns]

    def distance(self, one: int, other: int) -> float:
        return float(np.linalg.norm(self.pixels[one] - self.pixels[other]))


@pytest.mark.parametrize("case", SIZES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("kind", LOADERS)
def test_each_row_is_a_positive_once_an_epoch_and_its_negative_is_far(
    small_groups: Callable[[int], Dataset],
    kind: str,
    case: tuple[str, int, int, int, int, float],
) -> None:
    mode, count, batch, workers, window, quantile = case
    dataset = small_groups(count)
    identify, least = Identify(dataset), dataset.distance_quantile("train", quantile)
    pairs = {"mode": mode, "quantile": quantile, "candidates": 1}
    loaders: list[PairLoader] = [
        LOADERS[kind].read(
            partition_of(dataset, batch, workers, rank, pairs=pairs, shards={"window": window})
        )
        for rank in range(workers)
    ]
    local = batch // workers
    orders: list[list[list[int]]] = []
    lasts: dict[int, torch.Tensor] = {}
    for epoch in (0, 1):
        positives: list[list[int]] = []
        for loader in loaders:
            partition = loader.partition
            batches = list(loader.batches(epoch))
            steps = partition.steps
            assert len(batches) == steps == loaders[0].partition.steps
            for start in (steps // 2, steps - 1, steps):
                assert batches_equal(list(loader.batches(epoch, start)), batches[start:])
            assert all(b.present.all() for b in batches[:-1])
            assert all(b.labels is None for b in batches)  # nothing is conditioned on them
            last = batches[-1].present
            assert torch.equal(last, torch.arange(local) < last.sum(1, keepdim=True))
            assert torch.equal(last, lasts.setdefault(epoch, last))  # the same on every rank
            positives.append([])
            all_negatives = []
            for b in batches:
                for images in (b.positive, b.partner, b.negative):
                    assert images.shape == (local, 28, 28, 1)
                    assert images.dtype == torch.uint8
                ours, partners, negatives = identify.batch(b, partition.rank)
                positives[-1] += ours
                all_negatives += negatives
                for one, partner, negative in zip(ours, partners, negatives, strict=True):
                    assert identify.distance(one, negative) >= least
                    if mode == "views":
                        assert partner == one
                    else:
                        labels = identify.labels
                        assert labels[partner] == labels[one] != labels[negative]
            ranges = partition.row_ranges(0 if kind == "memory" else epoch)
            rows = dataset.read("train", ranges).id.tolist()
            assert sorted(positives[-1]) == sorted(rows)  # in memory the same in every epoch
            assert set(all_negatives) <= set(rows)
        assert sorted(n for ours in positives for n in ours) == list(range(count))
        sizes = [len(ours) for ours in positives]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) == sizes[0]
        assert loaders[0].partition.steps == -(-sizes[0] // local)  # no empty step
        orders.append(positives)
    assert orders[0] != orders[1]


@pytest.mark.parametrize(("count", "batch", "workers", "repeats"), [(20, 12, 1, 5), (21, 8, 2, 3)])
@pytest.mark.parametrize("kind", LOADERS)
def test_an_epoch_may_pass_over_the_rows_several_times(
    small_groups: Callable[[int], Dataset],
    kind: str,
    count: int,
    batch: int,
    workers: int,
    repeats: int,
) -> None:
    dataset = small_groups(count)
    identify, fields = Identify(dataset), {"epoch_repeats": repeats, "shards": {"window": 6}}
    for rank in range(workers):
        partition = partition_of(dataset, batch, workers, rank, **fields)
        loader = LOADERS[kind].read(partition)
        batches = list(loader.batches(0))
        assert (
            len(batches) == partition.steps == -(-repeats * -(-count // workers) * workers // batch)
        )
        assert all(b.present[rank].all() for b in batches[:-2])  # passes are not cut to batches
        own = len(partition.read(partition.row_ranges(0)).id)
        positives = [i for b in batches for i in identify.batch(b, rank)[0]]
        passes = [positives[k * own : (k + 1) * own] for k in range(repeats)]
        assert len(positives) == repeats * own
        assert all(len(set(ids)) == own for ids in passes)
        assert len({tuple(ids) for ids in passes}) == repeats
        for start in range(partition.steps + 1):
            assert batches_equal(list(loader.batches(0, start)), batches[start:])


@pytest.mark.parametrize("kind", LOADERS)
def test_batches_follow_from_seed_epoch_workers_and_rank(
    small_groups: Callable[[int], Dataset], kind: str
) -> None:
    fields: dict[str, Any] = {"pairs": {"mode": "labels"}, "shards": {"window": 40}}
    dataset = small_groups(347)

    def batches(epoch: int = 0, workers: int = 2, rank: int = 0, **more: Any) -> list[PairBatch]:
        partition = partition_of(dataset, workers=workers, rank=rank, **fields, **more)
        return list(LOADERS[kind].read(partition).batches(epoch))

    torch.manual_seed(0)
    np.random.seed(0)
    first = batches()
    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.random.get_rng_state()
    assert batches_equal(batches(), first)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is not used
    loader = LOADERS[kind].read(partition_of(dataset, workers=2, **fields))
    later = list(loader.batches(1))
    assert batches_equal(list(loader.batches(0)), first)  # whatever was read before
    assert batches_equal(batches(epoch=1), later)
    for other in (later, batches(rank=1), batches(workers=3), batches(seed=4)):
        assert not torch.equal(
            torch.cat([b.positive for b in other])[:60], torch.cat([b.positive for b in first])[:60]
        )
    # The seed determines the order of rows too: here they all come in one window.
    seeds = [
        next(LOADERS[kind].read(partition_of(small_groups(60), seed=seed)).batches(0))
        for seed in (3, 4)
    ]
    assert not torch.equal(seeds[0].positive, seeds[1].positive)
    if kind == "memory":  # negatives are resampled every epoch
        identify = Identify(dataset)
        pairs = [
            {pair for b in bs for pair in zip(*identify.batch(b)[::2], strict=True)}
            for bs in (first, later)
        ]
        assert len(pairs[0] & pairs[1]) < len(pairs[0]) / 4


def test_the_order_of_arrival_does_not_matter(small_groups: Callable[[int], Dataset]) -> None:
    fields: dict[str, Any] = {"pairs": {"mode": "labels"}, "shards": {"window": 60}}
    partition = partition_of(small_groups(347), workers=2, rank=1, **fields)
    rows = partition.dataset.read("train", partition.row_ranges(0))
    order = np.random.default_rng(0).permutation(len(rows.id))
    shuffled = RowBatch(rows.id[order], rows.image[order], labels_of(rows)[order])
    assert batches_equal(*(list(InMemoryLoader(partition, r).batches(2)) for r in (rows, shuffled)))
    window, again = (sample_window_pairs(partition, r, epoch=2, window=5) for r in (rows, shuffled))
    assert window.keys() == again.keys() == {"id", "image", *PAIR_IMAGES}
    assert np.array_equal(window["id"], again["id"])
    for name in PAIR_IMAGES:
        assert np.array_equal(window["image"][window[name]], again["image"][again[name]])


def test_windows_before_the_start_are_not_read(small_groups: Callable[[int], Dataset]) -> None:
    partition = partition_of(small_groups(347), batch=12, shards={"window": 30})
    ends = np.cumsum([sum(r.rows for r in window) for window in partition.windows(0)])
    asked: list[int] = []

    def read_windows(epoch: int, first: int) -> Iterator[dict[str, np.ndarray]]:
        asked.append(first)
        for number in range(first, len(ends)):
            rows = partition.dataset.read("train", partition.windows(epoch)[number])
            yield sample_window_pairs(partition, rows, epoch, number)

    whole = list(StreamingLoader.read(partition).batches(0))
    assert ends[4] == 12 * 12  # where a step begins with a window
    for start in (0, 1, 5, 12, 28):
        batches = StreamingLoader(partition, read_windows).batches(0, start)
        assert batches_equal(list(batches), whole[start:])
        assert asked[-1] == np.searchsorted(ends, start * 12, side="right")


@pytest.mark.parametrize(("count", "fraction"), [(20, 0.25), (160, 0.25), (20, 0.0), (None, 0.25)])
@pytest.mark.parametrize("kind", LOADERS)
def test_batches_have_enough_labelled_images_where_few_are(
    small_groups: Callable[[int], Dataset], kind: str, count: int | None, fraction: float
) -> None:
    dataset, batch_size, workers = small_groups(320), 16, 2
    labels = {"count": count, "seed": 1, "batch_fraction": fraction}
    fields: dict[str, Any] = {"condition": "classifier", "shards": {"window": 80}, "labels": labels}
    same, seen = Identify(dataset), set()
    kept = set(draw_labelled_ids(dataset, count, seed=1).tolist() if count else same.labels)
    for rank in range(workers):
        loader = LOADERS[kind].read(partition_of(dataset, batch_size, workers, rank, **fields))
        batches = list(loader.batches(epoch=0))
        assert batches_equal(batches[5:], list(loader.batches(0, 5)))
        for batch in batches:
            positives, _, negatives = same.batch(batch)
            assert batch.labels is not None
            assert (batch.labelled is None) == (count is None)  # all are
            for number, ids in enumerate((positives, negatives)):
                if batch.labelled is not None:
                    assert batch.labelled[:, number].tolist() == [i in kept for i in ids]
                expected = [same.labels[i] if i in kept else UNLABELLED for i in ids]
                assert batch.labels[:, number].tolist() == expected
            if count == 20:
                assert len(kept.intersection(positives)) >= fraction * batch_size / workers - 1
            seen.update(positives)
    if count == 20 and fraction:
        assert kept < seen
        assert len(seen) < 320  # they took the place of others
    else:
        assert len(seen) == 320


def test_small_batches_of_many_workers_have_as_many_labelled_images_on_average(
    small_groups: Callable[[int], Dataset],
) -> None:
    dataset, fields = small_groups(320), {"condition": "classifier", "labels": {"count": 20}}
    found = []
    for rank in range(8):
        loader = InMemoryLoader.read(partition_of(dataset, 16, 8, rank, **fields))
        for batch in loader.batches(epoch=0):
            assert batch.labelled is not None
            found.append(float(batch.labelled[:, 0].float().mean()))
    # An eighth of two is one in every fourth batch; 20 of 320 are labelled anyway.
    assert 0.125 < sum(found) / len(found) < 0.25


def test_which_labels_are_known_is_left_out_if_all_are(
    small_groups: Callable[[int], Dataset],
) -> None:
    partition = partition_of(small_groups(40), condition="classifier")
    for loader in LOADERS.values():
        assert next(loader.read(partition).batches(0)).labelled is None
