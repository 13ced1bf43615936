"""What streaming costs: beside a bare decode loop, and while a network trains.

    python benchmarks/streaming.py [--images 4000] [--encoding jpeg]
    python benchmarks/streaming.py --train 40

Writes smooth random images of 128 pixels, then in turns decodes them in a loop of Pillow and
streams them by Ray Data into a loader that trains nothing, all on one CPU. Prints the images a
second by the clock and for each second of CPU, of all processes together, and their ratios.

With `--train STEPS` it trains with the preset `photos-128` on one CPU instead, epochs of STEPS
steps that stream, while another CPU decodes. Prints the share of each epoch that it waits for data.
"""

import logging
import math
import os
import tempfile
import time
from functools import partial
from io import BytesIO
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import ray
import torch
import tyro
from PIL import Image

from cl_ray.config import preset
from cl_ray.data.config import PairDataConfig, ShardConfig
from cl_ray.data.dataset import Dataset
from cl_ray.data.decoding import Encoding
from cl_ray.data.loaders import StreamingLoader
from cl_ray.data.partition import Partition
from cl_ray.data.ray_shards import read_windows
from cl_ray.data.writer import DatasetMetadata, RawImage, write_splits
from cl_ray.device import keep_freed_memory
from cl_ray.trainer import Trainer

STREAMED = ShardConfig(memory=1e-3)


def write(folder: str, images: int, encoding: Encoding) -> Dataset:
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (300, 8, 8, 3), dtype=np.uint8)
    pool = [Image.fromarray(image).resize((128, 128), Image.Resampling.BICUBIC) for image in small]
    raw = (RawImage(np.asarray(pool[k % 300]), None, "image") for k in range(images))
    write_splits({"train": raw}, folder, DatasetMetadata("smooth", "random"), encoding=encoding)
    return Dataset.open(folder)


def decode_all(dataset: Dataset) -> int:
    """Decode every image by Pillow; return their number."""
    count = 0
    for shard in dataset.info.splits["train"].shards:
        for cell in pq.read_table(f"{dataset.location}/{shard.file}", columns=["image"])["image"]:
            np.asarray(Image.open(BytesIO(cell.as_py())))
            count += 1
    return count


def stream_all(partition: Partition) -> int:
    """Stream an epoch; return the number of positives."""
    loader = StreamingLoader(partition, partial(read_windows, partition))
    return sum(int(batch.present.sum()) for batch in loader.batches(0))


def cpu_times() -> dict[int, float]:
    """Return the seconds of CPU of this process and of all that it started, by their numbers."""
    import psutil  # which Ray brings along

    own = psutil.Process()
    times = {process.pid: process.cpu_times() for process in (own, *own.children(recursive=True))}
    return {number: spent.user + spent.system for number, spent in times.items()}


def compare(dataset: Dataset, rounds: int) -> None:
    """Deliver the images in turns."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    partition = Partition(dataset, PairDataConfig(batch_size=64, shards=STREAMED))
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    stream_all(partition)  # starts the reading processes
    loops = {"decode": partial(decode_all, dataset), "stream": partial(stream_all, partition)}
    best = {(name, unit): 0.0 for name in loops for unit in ("second", "second of CPU")}
    for _ in range(rounds):
        for name, loop in loops.items():
            start, before = time.perf_counter(), cpu_times()
            count = loop()
            wall, after = time.perf_counter() - start, cpu_times()
            # The time of a process that ended is not known.
            known = before.keys() <= after.keys()
            spent = wall, sum(after.values()) - sum(before.values()) if known else math.inf
            for unit, seconds in zip(("second", "second of CPU"), spent, strict=True):
                best[name, unit] = max(best[name, unit], count / seconds)
    for unit in ("second", "second of CPU"):
        decoded, streamed = best["decode", unit], best["stream", unit]
        print(
            f"images a {unit}: decode loop {decoded:,.0f}, streamed {streamed:,.0f}, ratio "
            f"{streamed / decoded:.2f} (128 pixels, one CPU)"
        )


def train_epochs(dataset: Dataset, epochs: int) -> None:
    """Train on streamed images; print how long each epoch waits for them."""
    torch.set_num_threads(1)
    keep_freed_memory()
    config = preset("photos-128").model_copy(update={"shards": STREAMED})
    partition = Partition(dataset, config)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    loader = StreamingLoader(partition, partial(read_windows, partition))
    trainer = Trainer(config, loader)
    for epoch in range(epochs):
        metrics = trainer.train_epoch()
        print(
            f"epoch {epoch + 1}: {metrics['data_time_fraction']:.2%} of {metrics['seconds']:.0f} s "
            f"waiting for data, {metrics['images_per_second']:.1f} images/s"
        )


def main(
    images: int = 4000,
    encoding: Literal["png", "webp", "jpeg"] = "jpeg",
    rounds: int = 3,
    train: int = 0,
) -> None:
    """Write the images and measure.

    Args:
        images: How many.
        encoding: How they are stored.
        rounds: Turns, of which the best of each is taken, or epochs to train.
        train: Steps of an epoch of training; 0 trains nothing.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    images = train * preset("photos-128").batch_size or images
    with tempfile.TemporaryDirectory() as folder:
        dataset = write(f"{folder}/set", images, encoding)
        (train_epochs if train else compare)(dataset, rounds)
        ray.shutdown()


if __name__ == "__main__":
    tyro.cli(main)
