"""The rows of each rank: disjoint, complete, and of one size to one row."""

from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from helpers.datasets import labels_of, mnist, write_images

from cl_ray.data.config import LabelConfig, PairDataConfig, ShardConfig
from cl_ray.data.dataset import UNLABELLED, Dataset, RowRange
from cl_ray.data.partition import Partition, draw_labelled_ids


def rows_of(ranges: Iterable[RowRange]) -> list[tuple[int, int, int]]:
    """Each row as its file, row group and position there."""
    return [(r.shard, r.group, row) for r in ranges for row in range(r.start, r.stop)]


@pytest.fixture
def dataset(small_groups: Callable[[int], Dataset]) -> Dataset:
    return small_groups(347)


def test_windows_are_consecutive_rows_of_about_one_size(dataset: Dataset) -> None:
    for size, workers in ((40, 1), (40, 3), (5, 2), (1000, 2), (58, 6)):
        config = PairDataConfig(shards=ShardConfig(window=size))
        for rank in range(workers):
            partition = Partition(dataset, config, workers, rank)
            for epoch in (0, 1):
                windows = partition.windows(epoch)
                assert [r for w in windows for r in rows_of(w)] == rows_of(
                    partition.row_ranges(epoch)
                )
                rows = [len(rows_of(w)) for w in windows]
                assert max(rows) - min(rows) <= 1
                assert len(rows) == max(1, round(sum(rows) / size))


def test_rows_of_row_groups_are_slices_of_their_concatenation(dataset: Dataset) -> None:
    groups = dataset.row_groups("train").take(np.array([5, 2, 0, 3, 4, 1]))  # the first is short
    rows = rows_of(groups)
    assert groups.total == len(rows) == 347
    cuts = [0, 1, 26, 27, 28, 91, 100, 346, 347]
    for first, end in product(cuts, cuts):
        assert rows_of(groups.rows(first, end)) == rows[first:end]


def test_rows_stay_in_memory_up_to_the_budget(dataset: Dataset) -> None:
    """The largest rank's pixels decide, so that all ranks decide alike."""
    largest = 174 * 28 * 28 / 1e9
    for rank in (0, 1):
        for memory, resident in ((largest, True), (largest * 0.999, False)):
            config = PairDataConfig(shards=ShardConfig(memory=memory))
            partition = Partition(dataset, config, 2, rank)
            assert partition.gigabytes == pytest.approx(largest)
            assert partition.resident is resident


def test_drawn_labels_are_of_all_classes_alike_and_follow_from_the_seed(tmp_path: Path) -> None:
    images, labels = mnist("train", 300)
    first = int(np.flatnonzero(labels == 3)[0])
    rare = [None if k != first and label == 3 else label for k, label in enumerate(labels)]
    dataset = Dataset.open(write_images(tmp_path / "rare", train=(images, rare)))
    label_of = dict(zip(*dataset.read_labels("train"), strict=True))
    labelled = dataset.info.labelled_rows("train")
    for count, of_others in {10: {1}, 28: {3}, 55: {6}, 57: {6, 7}, labelled: None}.items():
        ids = draw_labelled_ids(dataset, count, seed=5)
        drawn = np.bincount([label_of[i] for i in ids])  # refuses UNLABELLED
        assert len(set(ids.tolist())) == count
        assert drawn[3] == 1  # all that it has
        assert of_others in (set(np.delete(drawn, 3).tolist()), None)
        assert np.array_equal(ids, draw_labelled_ids(dataset, count, seed=5))
    first_draw, other = (draw_labelled_ids(dataset, 20, seed) for seed in (5, 6))
    assert not np.array_equal(first_draw, other)


def test_all_workers_use_the_same_labels(dataset: Dataset) -> None:
    labels, shards = LabelConfig(count=30, seed=2), ShardConfig(window=40)
    config = PairDataConfig(labels=labels, condition="classifier", shards=shards)
    label_of = dict(zip(*dataset.read_labels("train"), strict=True))
    ids: list[int] = []
    for rank in range(3):
        partition = Partition(dataset, config, 3, rank)
        assert partition.unlabelled_rows == 317
        assert partition.counts == [3] * 10
        parts = [partition.read(ranges) for ranges in partition.windows(epoch=1)]
        whole = partition.read(partition.row_ranges(1))
        for rows in (whole, *parts):
            used = rows.take(labels_of(rows) != UNLABELLED)
            assert labels_of(used).tolist() == [label_of[i] for i in used.id]
            ids += used.id.tolist() if rows is not whole else []
    assert sorted(ids) == draw_labelled_ids(dataset, 30, 2).tolist()


def test_all_labels_are_used_by_default(dataset: Dataset) -> None:
    partition = Partition(dataset, PairDataConfig(condition="projection"))
    rows = partition.read(partition.row_ranges(0))
    whole = dataset.read("train", partition.row_ranges(0))
    assert np.array_equal(labels_of(rows), labels_of(whole))
    assert partition.unlabelled_rows == 0
    assert partition.counts == dataset.class_counts("train")
