"""One shard a worker, delivered by Ray Data, which delivers and never decides.

The cut is explicit (`Share`), not `streaming_split`'s, which drops a remainder and hands blocks
out by arrival. Tasks ask for no CPU, and few run at once: however many CPUs the workers hold, a
task can be placed, so that training can never wait for a reader that waits for training.

Nothing here imports torch before a shard is opened: processes that cut and read start the sooner.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray.data
from ray.train import DataConfig

from cl_ray.data.config import PairDataConfig
from cl_ray.data.dataset import Dataset, RowBatch, RowRange
from cl_ray.data.partition import TRAIN_SPLIT, Partition
from cl_ray.errors import UserError

if TYPE_CHECKING:
    import torch

    from cl_ray.data.loaders import PairLoader


READERS = 2
"""Tasks of one rank that read at once."""
TASK_BYTES = 64e6
"""Pixels that one task reads of a resident partition."""


@dataclass(frozen=True)
class ShardHandle:
    """What `ray.train.get_dataset_shard` gives a worker: its partition, not yet read."""

    partition: Partition

    def open(self, device: "torch.device | str") -> "PairLoader":
        """The share on the device if it fits the memory budget, else as a stream."""
        from cl_ray.data.loaders import InMemoryLoader, StreamingLoader

        if self.partition.resident:
            return InMemoryLoader(self.partition, self.rows(), device)
        return StreamingLoader(self.partition, self.windows, device)

    def rows(self) -> RowBatch:
        """All rows of the partition, read by Ray Data, in order of arrival."""
        partition, dataset = self.partition, self.partition.dataset
        per_task = max(1, int(TASK_BYTES / partition.gigabytes / 1e9 * len(partition.pieces(0))))
        pieces = partition.pieces(0)
        parts = [pieces[i : i + per_task] for i in range(0, len(pieces), per_task)]

        def read(part: list[RowRange], number: int) -> dict[str, np.ndarray]:
            rows = dataset.read(TRAIN_SPLIT, part)
            label = {} if rows.label is None else {"label": rows.label}
            return {"id": rows.id, "image": rows.image, **label}

        blocks = list(_map_parts(parts, read))
        columns = {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}
        return RowBatch(columns["id"], columns["image"], columns.get("label"))

    def windows(self, epoch: int, first: int) -> Iterator[dict[str, np.ndarray]]:
        """The paired windows of an epoch from `first` on, put back in order."""
        partition = self.partition
        windows = partition.windows(epoch)[first:]

        def pair(part: list[RowRange], number: int) -> dict[str, np.ndarray]:
            from cl_ray.data.loaders import sample_window_pairs

            rows = partition.dataset.read(TRAIN_SPLIT, part)
            paired = sample_window_pairs(partition, rows, epoch, first + number)
            return {"window": np.full(len(rows.id), number), **paired}

        early: dict[int, list[dict[str, np.ndarray]]] = {}
        due = 0
        for block in _map_parts(windows, pair):
            number = int(block.pop("window")[0])
            early.setdefault(number, []).append(block)
            while sum(len(b["id"]) for b in early.get(due, ())) == _count(windows, due) > 0:
                blocks = early.pop(due)  # one, unless Ray Data cut the window up
                yield {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}
                due += 1


def _count(windows: list[list[RowRange]], number: int) -> int:
    return sum(p.stop - p.start for p in windows[number]) if number < len(windows) else 0


def _map_parts(parts: list[list[RowRange]], function: Any) -> Iterator[dict[str, np.ndarray]]:
    """`function(part, number)` of every part as a block of a Ray dataset, in order of arrival.

    Raises:
        UserError: A part's, in its own words: Ray Data would wrap it in a traceback of its own.
    """
    if not parts:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    items = [
        {"number": number, "part": [[p.shard, p.group, p.start, p.stop] for p in part]}
        for number, part in enumerate(parts)
    ]

    def apply(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        part = [RowRange(*(int(n) for n in numbers)) for numbers in batch["part"][0]]
        try:
            return function(part, int(batch["number"][0]))
        except UserError as error:
            return {"complaint": np.array([str(error)])}

    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    readers = ray.data.TaskPoolStrategy(size=min(READERS, len(items)))
    mapped = dataset.map_batches(apply, batch_size=1, num_cpus=0, compute=readers)
    for block in mapped.iter_batches(batch_size=None, batch_format="numpy"):
        if "complaint" in block:
            raise UserError(str(block["complaint"][0]))
        yield block


class DeterministicDataConfig(DataConfig):
    """Gives every rank its `RankShard` when the number of workers is known."""

    def __init__(self, dataset: Dataset, config: PairDataConfig):
        super().__init__()
        self.dataset, self.config = dataset, config

    def configure(
        self, datasets: dict[str, Any], world_size: int, *_: Any, **__: Any
    ) -> list[dict[str, Any]]:
        """One shard a rank, under the dataset's name."""
        partitions = [
            Partition(self.dataset, self.config, world_size, rank) for rank in range(world_size)
        ]
        return [{name: ShardHandle(partition) for name in datasets} for partition in partitions]
