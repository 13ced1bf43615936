"""Training data by Ray Data, which delivers rows and decides nothing.

Images that fit the memory budget are a dataset that `TorchTrainer` cuts among the ranks. It is
materialized on the driver, by tasks that ask for no CPU or, where it is small, by the driver
itself, in the order of `Partition`, and its blocks end where ranks end. So a rank's shard is a list
of whole blocks, which takes no task: the default streaming split, cutting blocks in
`DataConfig.configure` and lazy reads in the workers all wait forever for CPUs that the workers hold
(Ray 2.60). Rows carry their position, and a worker checks that it has the rows of its partition,
whatever order blocks arrive in.

Images beyond the budget are read anew every epoch by each worker, by tasks that ask for no CPU.

Rows are read by `Dataset.read` in `map_batches` and not by `ray.data.read_parquet`, which reads
in the order of files, so that it would take a copy to cut the ranks' rows out of its blocks.

Torch is not imported before a loader is opened, so that reading processes start faster.
"""

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import ray.data
import ray.train
from ray.data.block import BlockAccessor
from ray.train import DataConfig

from cl_ray.data.config import PairDataConfig
from cl_ray.data.dataset import Dataset, RowBatch, RowRange
from cl_ray.data.partition import TRAIN_SPLIT, Partition
from cl_ray.errors import UserError

if TYPE_CHECKING:
    import torch

    from cl_ray.data.loaders import PairLoader

READERS_PER_WORKER = 2
"""Reading tasks that run at once, per worker."""
BLOCK_BYTES = 64e6
"""Pixels of one block of the training data."""
DRIVER_BYTES = 100e6
"""Pixels that the driver reads itself at most: tasks and what they need take seconds to start."""

_Columns = dict[str, np.ndarray]
_ERROR = "user_error"
"""Column of a block that a task returns in place of raising a UserError."""


class DeterministicDataConfig(DataConfig):
    """Gives every rank the blocks that hold the rows of its `Partition`.

    Args:
        partition: The dataset and the config.
        ends: Row index at which each block ends, from 0 on.
    """

    def __init__(self, partition: Partition, ends: list[int]):
        super().__init__()
        self.partition, self.ends = partition, ends

    def configure(
        self, datasets: dict[str, Any], world_size: int, *_: Any, **__: Any
    ) -> list[dict[str, Any]]:
        """Return the iterators of each rank, by the dataset's name.

        With an elastic number of workers, a block may be of two ranks, which select their rows.
        """
        shards = []
        for rank in range(world_size):
            first, end = replace(self.partition, workers=world_size, rank=rank).bounds
            start = self.ends[bisect_right(self.ends, first) - 1]
            stop = self.ends[bisect_left(self.ends, end)]
            splits = {n: rows.split_at_indices([start, stop])[1] for n, rows in datasets.items()}
            shards.append({name: split.iterator() for name, split in splits.items()})
        return shards


def build_train_dataset(
    dataset: Dataset, config: PairDataConfig, worker_range: tuple[int, int]
) -> tuple[dict[str, ray.data.Dataset], DeterministicDataConfig]:
    """Read the training images into Ray's object store, unless they are to be streamed.

    Args:
        dataset: The images at rest.
        config: Seed, batch size, pairs and memory budget.
        worker_range: The smallest and the largest number of workers.

    Returns:
        `datasets` and `dataset_config` of a `TorchTrainer`; no dataset if workers stream.

    Raises:
        UserError: A file is damaged or cannot be read.
    """
    workers = worker_range[1]
    partition = Partition(dataset, config, workers)
    ends = [0]
    for rank in range(workers):
        first, end = replace(partition, rank=rank).bounds
        blocks = max(1, round(partition.gigabytes * 1e9 / BLOCK_BYTES))
        ends += [first + (end - first) * (k + 1) // blocks for k in range(blocks)]
    data_config = DeterministicDataConfig(partition, ends)
    if not partition.resident:
        return {}, data_config
    groups = partition.shuffled_groups(0)
    parts = [groups.rows(start, stop) for start, stop in pairwise(ends)]

    def read(part: list[RowRange], number: int) -> _Columns:
        rows = partition.read(part)
        label = {} if rows.label is None else {"label": rows.label}
        position = np.arange(ends[number], ends[number + 1])
        return {"position": position, "id": rows.id, "image": rows.image, **label}

    if partition.gigabytes * workers <= DRIVER_BYTES / 1e9:
        columns = (read(part, number) for number, part in enumerate(parts))
        rows = ray.data.from_blocks(list(map(BlockAccessor.batch_to_block, columns)))
        rows.set_name(TRAIN_SPLIT)
        return {TRAIN_SPLIT: rows}, data_config
    with _quiet():
        rows = _map_parts(parts, read, READERS_PER_WORKER * workers)
        rows.set_name(TRAIN_SPLIT)
        rows.context.execution_options.preserve_order = True
        rows = rows.materialize()
        if rows.count() != partition.total_rows:
            for _ in _iter_blocks(rows):  # raises what a task reported
                pass
    return {TRAIN_SPLIT: rows}, data_config


def open_loader(partition: Partition, device: "torch.device | str") -> "PairLoader":
    """Open the loader of a worker of Ray Train: in memory if it fits the budget, else a stream."""
    from cl_ray.data.loaders import InMemoryLoader, StreamingLoader

    if partition.resident:
        shard = ray.train.get_dataset_shard(TRAIN_SPLIT)
        return InMemoryLoader(partition, shard_rows(partition, shard), device)
    return StreamingLoader(partition, lambda e, first: read_windows(partition, e, first), device)


def shard_rows(partition: Partition, shard: ray.data.DataIterator) -> RowBatch:
    """Return the rows of a rank from its shard of the training data, in order of arrival.

    Raises:
        RuntimeError: Ray Data delivered other rows than the partition's.
    """
    first, end = partition.bounds
    blocks = []
    for block in _iter_blocks(shard):
        own = (first <= block["position"]) & (block["position"] < end)
        blocks.append(block if own.all() else {name: c[own] for name, c in block.items()})
    columns = {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}
    if not np.array_equal(np.sort(columns["position"]), np.arange(first, end)):
        raise RuntimeError(
            f"Ray Data delivered {len(columns['position'])} rows to rank {partition.rank} of "
            f"{partition.workers}, which are not its rows {first} to {end - 1}"
        )
    return RowBatch(columns["id"], columns["image"], columns.get("label"))


def read_windows(partition: Partition, epoch: int, first: int) -> Iterator[_Columns]:
    """Read and pair the windows of a streamed epoch, in order, from window `first` on."""
    windows = partition.windows(epoch)[first:]
    rows_of = [sum(part.rows for part in ranges) for ranges in windows]

    def pair(part: list[RowRange], number: int) -> _Columns:
        from cl_ray.data.loaders import sample_window_pairs
        from cl_ray.device import keep_freed_memory

        keep_freed_memory()  # else the kernel clears the memory of each window anew
        rows = partition.read(part)
        paired = sample_window_pairs(partition, rows, epoch, first + number)
        return {"window": np.full(len(rows.id), number), **paired}

    if not windows:
        return
    early: dict[int, list[_Columns]] = {}  # blocks that arrived, by window
    due = 0
    for block in _iter_blocks(_map_parts(windows, pair, READERS_PER_WORKER)):
        early.setdefault(int(block.pop("window")[0]), []).append(block)
        while due in early and sum(len(b["id"]) for b in early[due]) == rows_of[due]:
            blocks = early.pop(due)
            if len(blocks) > 1:  # Ray Data divided the window
                yield {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}
            else:
                yield blocks[0]
            due += 1


def _map_parts(
    parts: list[list[RowRange]], function: Callable[[list[RowRange], int], _Columns], readers: int
) -> ray.data.Dataset:
    """Return a lazy dataset with `function(part, number)` of every part as a block."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    items = [
        {"number": number, "part": [[r.shard, r.group, r.start, r.stop] for r in part]}
        for number, part in enumerate(parts)
    ]

    def apply(batch: _Columns) -> _Columns:
        part = [RowRange(*(int(n) for n in numbers)) for numbers in batch["part"][0]]
        try:
            return function(part, int(batch["number"][0]))
        except UserError as error:  # Ray Data would log a traceback
            return {_ERROR: np.array([str(error)])}

    return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        apply,
        batch_size=1,
        num_cpus=0,  # so that tasks run however many CPUs the workers hold
        compute=ray.data.TaskPoolStrategy(size=min(readers, len(items))),
    )


def _iter_blocks(rows: "ray.data.Dataset | ray.data.DataIterator") -> Iterator[_Columns]:
    """Yield blocks in order of arrival; raise the UserError that a task returned."""
    for block in rows.iter_batches(batch_size=None, batch_format="numpy"):
        if _ERROR in block:
            raise UserError(str(block[_ERROR][0]))
        yield block


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray Data's messages about each execution off the driver's console."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
