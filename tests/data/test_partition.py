"""The rows of each rank: disjoint, complete, and of one size to one row."""

from collections.abc import Callable

import pytest

from cl_ray.data.config import PairDataConfig, ShardConfig
from cl_ray.data.dataset import Dataset, RowRange
from cl_ray.data.partition import Partition, slice_ranges


def rows_of(ranges: list[RowRange]) -> list[tuple[int, int, int]]:
    """Each row as its file, row group and position there."""
    return [(r.shard, r.group, row) for r in ranges for row in range(r.start, r.stop)]


@pytest.fixture
def dataset(small_groups: Callable[[int], Dataset]) -> Dataset:
    return small_groups(347)


def test_row_ranges_divide_the_dataset_among_the_ranks(dataset: Dataset) -> None:
    whole = sorted(rows_of(dataset.row_groups("train")))
    assert len(dataset.row_groups("train")) == 6
    for workers in (1, 2, 3, 4, 6):
        ranks = [Partition(dataset, PairDataConfig(), workers, rank) for rank in range(workers)]
        for epoch in (0, 1):
            cut = [rows_of(rank.row_ranges(epoch)) for rank in ranks]
            assert sorted(row for rows in cut for row in rows) == whole
            assert {len(rows) for rows in cut} <= {347 // workers, -(-347 // workers)}
    # The seed and the epoch determine the order of row groups.
    orders = [
        [(r.shard, r.group) for r in Partition(dataset, PairDataConfig(seed=s)).row_ranges(epoch)]
        for s, epoch in ((3, 0), (3, 1), (4, 0), (3, 0))
    ]
    assert orders[3] == orders[0]
    assert len({tuple(order) for order in orders}) == 3


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


def test_slices_are_those_of_the_rows() -> None:
    ranges = [RowRange(*r) for r in ((0, 1, 0, 4), (0, 0, 2, 3), (1, 0, 5, 9), (2, 2, 0, 1))]
    rows = rows_of(ranges)
    for first in range(11):
        for end in range(first, 11):
            part = slice_ranges(ranges, first, end)
            assert rows_of(part) == rows[first:end]
            assert all(r.rows > 0 for r in part)


def test_rows_stay_in_memory_up_to_the_budget(dataset: Dataset) -> None:
    """The largest rank's pixels decide, so that all ranks decide alike."""
    largest = 174 * 28 * 28 / 1e9
    for rank in (0, 1):
        for memory, resident in ((largest, True), (largest * 0.999, False)):
            config = PairDataConfig(shards=ShardConfig(memory=memory))
            partition = Partition(dataset, config, 2, rank)
            assert partition.gigabytes == pytest.approx(largest)
            assert partition.resident is resident
