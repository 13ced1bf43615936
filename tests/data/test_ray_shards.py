"""Ray Data delivers what the seed says, even where the workers hold every CPU."""

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.data
import torch
from helpers.machine import machine

from cl_ray.config import build
from cl_ray.data import ray_shards, writer
from cl_ray.data.dataset import Dataset, RowBatch, RowRange
from cl_ray.data.loaders import InMemoryLoader, StreamingLoader, sample_window_pairs
from cl_ray.data.partition import Partition
from cl_ray.data.ray_shards import DeterministicDataConfig, ShardHandle
from cl_ray.errors import UserError
from cl_ray.gan import PairBatch

COUNT, CPUS = 347, 2
COLUMNS = ("positive", "partner", "negative", "present")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with machine(cpus=CPUS):
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Digits in 6 row groups and 3 files."""
    rows = Dataset.open("mnist").read("train", [RowRange(0, 0, 0, COUNT)])
    assert rows.label is not None
    pictures = [
        writer.RawImage(image, int(label), "a digit")
        for image, label in zip(rows.image, rows.label, strict=True)
    ]
    folder = str(tmp_path_factory.mktemp("data") / "digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "GROUP_BYTES", 1)
        patch.setattr(writer, "GROUPS_PER_SHARD", 2)
        writer.write_splits({"train": pictures}, folder, writer.DatasetMetadata("digits", "MNIST"))
    return Dataset.open(folder)


def share(dataset: Dataset, workers: int = 2, rank: int = 1, **fields: Any) -> Partition:
    return Partition(dataset, build({"batch_size": 12, "seed": 3, **fields}), workers, rank)


def streamed(dataset: Dataset, mode: str = "views", **fields: Any) -> Partition:
    shards = {"memory": 1e-9, "window": 30}
    return share(dataset, pairs={"mode": mode}, shards=shards, **fields)


def same(ours: list[PairBatch], theirs: list[PairBatch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(ours, theirs, strict=True)
        for name in COLUMNS
    )


def same_windows(
    ours: list[dict[str, np.ndarray]], share: Partition, epoch: int, first: int
) -> bool:
    theirs = [
        sample_window_pairs(share, share.dataset.read("train", pieces), epoch, first + number)
        for number, pieces in enumerate(share.windows(epoch)[first:])
    ]
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
        for a, b in zip(ours, theirs, strict=True)
    )


def test_a_share_that_fits_is_read_whole_and_by_several_tasks(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_shards, "TASK_BYTES", 1)  # one row group a task
    ours = share(dataset, pairs={"mode": "labels"})
    assert len(ours.pieces(0)) > 2
    rows, theirs = ShardHandle(ours).rows(), dataset.read("train", ours.pieces(0))
    assert rows.label is not None
    assert theirs.label is not None
    order, their_order = np.argsort(rows.id), np.argsort(theirs.id)
    for mine, other in (
        (rows.id, theirs.id), (rows.image, theirs.image), (rows.label, theirs.label)
    ):  # fmt: skip
        assert mine.dtype == other.dtype
        assert np.array_equal(mine[order], other[their_order])
    opened = ShardHandle(ours).open("cpu")
    assert isinstance(opened, InMemoryLoader)
    for epoch in (0, 1):
        assert same(list(opened.batches(epoch)), list(InMemoryLoader.read(ours).batches(epoch)))


@pytest.mark.parametrize("mode", ["views", "labels"])
def test_a_larger_share_streams_the_same_batches(dataset: Dataset, mode: str) -> None:
    ours = streamed(dataset, mode)
    opened = ShardHandle(ours).open("cpu")
    assert isinstance(opened, StreamingLoader)
    for epoch, start in ((0, 0), (1, ours.steps // 2)):
        theirs = list(StreamingLoader.read(ours).batches(epoch, start))
        assert same(list(opened.batches(epoch, start)), theirs)
    assert same_windows(list(ShardHandle(ours).windows(1, 2)), ours, 1, 2)
    assert list(ShardHandle(ours).windows(0, len(ours.windows(0)))) == []


def test_windows_that_arrive_late_or_in_parts_are_put_in_order(dataset: Dataset) -> None:
    first = streamed(dataset).windows(0)[0][0]

    class Slow(Dataset):
        def read(self, split: str, pieces: Sequence[RowRange] | None = None) -> RowBatch:
            if pieces and pieces[0] == first:
                time.sleep(2)
            return super().read(split, pieces)

    context = ray.data.DataContext.get_current()
    whole = context.target_max_block_size
    context.target_max_block_size = 10 * 28 * 28  # 30 rows of two images are several blocks
    try:
        ours = streamed(Slow(dataset.location, dataset.info))
        windows = list(ShardHandle(ours).windows(0, 0))
    finally:
        context.target_max_block_size = whole
    assert same_windows(windows, streamed(dataset), 0, 0)


@ray.remote(num_cpus=1)
class Worker:
    """Holds a CPU, as Ray Train's workers do, and reads."""

    def read(self, share: Partition) -> list[bytes]:
        batches = list(ShardHandle(share).open("cpu").batches(0))
        return [getattr(b, name).numpy().tobytes() for b in batches for name in COLUMNS]


@pytest.mark.timeout(240)
def test_reading_ends_though_the_workers_hold_every_cpu(dataset: Dataset) -> None:
    workers = [Worker.remote() for _ in range(CPUS)]
    shares = [streamed(dataset, rank=0), share(dataset, rank=1)]  # one streams, one does not
    answers = [w.read.remote(s) for w, s in zip(workers, shares, strict=True)]
    streams, stays = ray.get(answers, timeout=200)
    assert ray.available_resources().get("CPU", 0) == 0  # they hold them still
    for kind, ours, answer in (
        (StreamingLoader, shares[0], streams), (InMemoryLoader, shares[1], stays)
    ):  # fmt: skip
        theirs = [
            getattr(b, n).numpy().tobytes() for b in kind.read(ours).batches(0) for n in COLUMNS
        ]
        assert answer == theirs
    for worker in workers:
        ray.kill(worker)


def test_what_a_task_refuses_is_said_in_its_own_words(dataset: Dataset, tmp_path: Path) -> None:
    shutil.copytree(dataset.location, tmp_path / "damaged")
    for file in (tmp_path / "damaged").glob("*.parquet"):
        content = bytearray(file.read_bytes())
        content[len(content) // 3] ^= 255
        file.write_bytes(content)
    damaged = share(Dataset.open(str(tmp_path / "damaged")))
    with pytest.raises(UserError, match=r"damaged/train-\d+-of-\d+\.parquet is damaged") as caught:
        ShardHandle(damaged).open("cpu")
    assert "\n" not in str(caught.value)
    few = share(dataset, shards={"memory": 1e-9, "window": 2}, pairs={"candidates": 4})
    with pytest.raises(UserError, match=r"pairs\.candidates 4 needs more images than the [23] "):
        list(ShardHandle(few).open("cpu").batches(0))


def test_every_rank_gets_its_share(dataset: Dataset) -> None:
    config = build({"batch_size": 12})
    for workers in (1, 3):
        given = DeterministicDataConfig(dataset, config).configure(
            {"train": None}, workers, None, None
        )
        assert [g["train"].partition for g in given] == [
            Partition(dataset, config, workers, rank) for rank in range(workers)
        ]
