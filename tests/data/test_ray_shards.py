"""Ray Data delivers the rows that the seed determines, even if the workers hold every CPU."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.data
import ray.train
from helpers.local_ray import local_ray
from helpers.random_images import flip_byte
from ray.train import LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from cl_ray.batch import PairBatch
from cl_ray.data import dataset as dataset_module
from cl_ray.data import ray_shards
from cl_ray.data.config import PairDataConfig
from cl_ray.data.dataset import Dataset, RowBatch, RowRange
from cl_ray.data.loaders import InMemoryLoader, StreamingLoader, sample_window_pairs
from cl_ray.data.partition import Partition
from cl_ray.data.ray_shards import build_train_dataset, open_loader, read_windows, shard_rows
from cl_ray.errors import UserError

CPUS = 2
COLUMNS = ("positive", "partner", "negative", "present")
STREAMED = {"memory": 1e-9, "window": 30}

pytestmark = pytest.mark.ray
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers lack the helpers


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_ray(cpus=CPUS):
        yield


@pytest.fixture(scope="module")
def dataset(small_groups: Callable[[int], Dataset]) -> Dataset:
    """Digits in 6 row groups and 3 files."""
    return small_groups(347)


def partition(dataset: Dataset, workers: int = 2, rank: int = 1, **fields: Any) -> Partition:
    config = PairDataConfig.model_validate({"batch_size": 12, "seed": 3, **fields})
    return Partition(dataset, config, workers, rank)


def content(batches: Iterator[PairBatch]) -> list[bytes]:
    return [getattr(batch, name).numpy().tobytes() for batch in batches for name in COLUMNS]


def check_windows(delivered: list[dict[str, np.ndarray]], part: Partition, first: int) -> None:
    expected = [
        sample_window_pairs(part, part.dataset.read("train", ranges), 0, first + number)
        for number, ranges in enumerate(part.windows(0)[first:])
    ]
    assert len(delivered) == len(expected)
    for ours, theirs in zip(delivered, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("driver_bytes", [0, ray_shards.DRIVER_BYTES], ids=["tasks", "driver"])
def test_shards_are_the_partitions_for_every_number_of_workers(
    driver_bytes: float, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_shards, "DRIVER_BYTES", driver_bytes)
    monkeypatch.setattr(ray_shards, "BLOCK_BYTES", 30_000)  # several blocks a rank
    config, most = partition(dataset).config, 5
    datasets, data_config = build_train_dataset(dataset, config, (1, most))
    assert datasets["train"].count() == 347
    assert datasets["train"].num_blocks() >= 2 * most
    for workers in range(1, most + 1):
        shards = data_config.configure(datasets, workers, None, None)
        for rank, shard in enumerate(shards):
            part = Partition(dataset, config, workers, rank)
            rows = shard_rows(part, shard["train"]).sorted_by_id()
            expected = dataset.read("train", part.row_ranges(0)).sorted_by_id()
            for name in ("id", "image", "label"):
                assert getattr(rows, name).dtype == getattr(expected, name).dtype
                assert np.array_equal(getattr(rows, name), getattr(expected, name))
    with pytest.raises(RuntimeError, match="which are not its rows 0 to"):
        shard_rows(Partition(dataset, config, most, 0), shards[-1]["train"])


def test_partitions_beyond_the_budget_stream_the_same_batches(dataset: Dataset) -> None:
    part = partition(dataset, pairs={"mode": "labels"}, shards=STREAMED)
    assert build_train_dataset(dataset, part.config, (1, 2))[0] == {}
    loader = open_loader(part, "cpu")
    assert isinstance(loader, StreamingLoader)
    for epoch, start in ((0, 0), (1, part.steps // 2)):
        expected = StreamingLoader.read(part).batches(epoch, start)
        assert content(loader.batches(epoch, start)) == content(expected)
    check_windows(list(read_windows(part, 0, 2)), part, 2)
    assert list(read_windows(part, 0, len(part.windows(0)))) == []


def test_tasks_decode_encoded_images(
    dataset: Dataset, small_groups: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tasks deliver pixels, so that workers decode nothing."""
    monkeypatch.setattr(ray_shards, "DRIVER_BYTES", 0)
    encoded = small_groups(347, "png")
    assert len(encoded.info.splits["train"].shards) > 1
    resident, streamed = partition(encoded), partition(encoded, shards=STREAMED)
    datasets, data_config = build_train_dataset(encoded, resident.config, (2, 2))
    shard = data_config.configure(datasets, 2, None, None)[1]["train"]
    loader = StreamingLoader(streamed, lambda e, first: read_windows(streamed, e, first))
    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "decode_pixels", None)  # in this process, not in the tasks
        rows = shard_rows(resident, shard).sorted_by_id()
        batches = content(loader.batches(1))
    expected = dataset.read("train", partition(dataset).row_ranges(0)).sorted_by_id()
    assert np.array_equal(rows.image, expected.image)
    same = StreamingLoader.read(partition(dataset, shards=STREAMED))
    assert batches == content(same.batches(1))


def test_windows_that_arrive_late_or_in_parts_are_sorted(dataset: Dataset, tmp_path: Path) -> None:
    part = partition(dataset, shards=STREAMED)
    first, other_was_read = part.windows(0)[0][0], tmp_path / "read"

    class Slow(Dataset):
        def read(
            self, split: str, ranges: Sequence[RowRange] | None = None, origins: bool = False
        ) -> RowBatch:
            is_first = ranges is not None and ranges[0] == first
            while is_first and not other_was_read.exists():
                time.sleep(0.01)
            rows = super().read(split, ranges, origins)
            if not is_first:
                other_was_read.touch()
            return rows

    context = ray.data.DataContext.get_current()
    block_size = context.target_max_block_size
    context.target_max_block_size = 10 * 28 * 28  # 30 rows are several blocks
    try:
        slow = partition(Slow(dataset.location, dataset.info), shards=STREAMED)
        windows = list(read_windows(slow, 0, 0))
    finally:
        context.target_max_block_size = block_size
    check_windows(windows, part, 0)


def read_two_epochs(setup: dict[str, Any]) -> list[bytes]:
    """Read on every worker; return the batches of all ranks, in order, from rank 0."""
    context = ray.train.get_context()
    workers, rank = context.get_world_size(), context.get_world_rank()
    loader = open_loader(Partition(setup["dataset"], setup["config"], workers, rank), "cpu")
    own = [batch for epoch in (0, 1) for batch in content(loader.batches(epoch))]
    Path(setup["folder"], f"{workers}-{rank}").write_bytes(b"".join(own))
    return [str(ray.available_resources().get("CPU", 0)).encode()]


@pytest.mark.parametrize(("workers", "streamed"), [((1, 2), False), (2, True)])
def test_workers_that_hold_every_cpu_take_the_batches_of_their_partitions(
    dataset: Dataset, tmp_path: Path, workers: Any, streamed: bool
) -> None:
    config = PairDataConfig.model_validate(
        {"batch_size": 12, "seed": 3, **({"shards": STREAMED} if streamed else {})}
    )
    span = workers if isinstance(workers, tuple) else (workers, workers)
    datasets, data_config = build_train_dataset(dataset, config, span)
    assert bool(datasets) is not streamed
    result = TorchTrainer(
        read_two_epochs,
        train_loop_config={"dataset": dataset, "config": config, "folder": str(tmp_path)},
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name="run", storage_path=str(tmp_path), logging_config=LoggingConfig(log_level="ERROR")
        ),
        datasets=datasets,
        dataset_config=data_config,
    ).fit()
    assert result.return_value == [b"0"]  # no CPU was left
    for rank in range(CPUS):
        part = Partition(dataset, config, CPUS, rank)
        loader = (StreamingLoader if streamed else InMemoryLoader).read(part)
        expected = [batch for epoch in (0, 1) for batch in content(loader.batches(epoch))]
        assert (tmp_path / f"{CPUS}-{rank}").read_bytes() == b"".join(expected)


def test_user_errors_of_tasks_keep_their_message(dataset: Dataset, tmp_path: Path) -> None:
    shutil.copytree(dataset.location, tmp_path / "damaged")
    for file in (tmp_path / "damaged").glob("*.parquet"):
        flip_byte(file, file.stat().st_size // 3)
    damaged = Dataset.open(str(tmp_path / "damaged"))
    with pytest.raises(UserError, match=r"damaged/train-\d+-of-\d+\.parquet is damaged") as caught:
        build_train_dataset(damaged, partition(damaged).config, (2, 2))
    assert "\n" not in str(caught.value)
    few = partition(dataset, shards={"memory": 1e-9, "window": 2}, pairs={"candidates": 4})
    with pytest.raises(UserError, match=r"pairs\.candidates 4 needs more images than the [23] "):
        list(open_loader(few, "cpu").batches(0))
