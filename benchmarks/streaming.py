"""Images a second that streaming delivers, beside a bare decode loop, on one CPU.

    python benchmarks/streaming.py [--images 4000] [--encoding jpeg]

Writes smooth random images of 128 pixels, then in turns decodes them in a loop of Pillow and
streams them by Ray Data into a loader that trains nothing. Prints both and their ratio.
"""

import logging
import os
import tempfile
import time
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import ray
import tyro
from PIL import Image

from cl_ray.data.config import PairDataConfig, ShardConfig
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import StreamingLoader
from cl_ray.data.partition import Partition
from cl_ray.data.ray_shards import read_windows
from cl_ray.data.writer import DatasetMetadata, RawImage, write_splits


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        images: How many.
        encoding: How they are stored.
        rounds: Turns; the best of each is taken.
    """

    images: int = 4000
    encoding: Literal["png", "webp", "jpeg"] = "jpeg"
    rounds: int = 3


def write(folder: str, options: Options) -> Dataset:
    """Write the images."""
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (300, 8, 8, 3), dtype=np.uint8)
    pool = [Image.fromarray(image).resize((128, 128), Image.Resampling.BICUBIC) for image in small]
    raw = (RawImage(np.asarray(pool[k % 300]), None, "image") for k in range(options.images))
    metadata = DatasetMetadata("smooth", "random")
    write_splits({"train": raw}, folder, metadata, encoding=options.encoding)
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
    loader = StreamingLoader(partition, lambda e, first: read_windows(partition, e, first))
    return sum(int(batch.present.sum()) for batch in loader.batches(0))


def main(options: Options) -> None:
    """Measure in turns and print."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    best = {"decode": 0.0, "stream": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        dataset = write(f"{folder}/set", options)
        config = PairDataConfig(batch_size=64, shards=ShardConfig(memory=1e-3))
        partition = Partition(dataset, config)
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        stream_all(partition)  # starts the reading processes
        for _ in range(options.rounds):
            for name, measure in (
                ("decode", lambda: decode_all(dataset)),
                ("stream", lambda: stream_all(partition)),
            ):
                start = time.perf_counter()
                best[name] = max(best[name], measure() / (time.perf_counter() - start))
        ray.shutdown()
    print(f"decode loop {best['decode']:,.0f} images/s, streamed {best['stream']:,.0f} images/s")
    print(f"ratio {best['stream'] / best['decode']:.2f} ({options.encoding}, 128 pixels, one CPU)")


if __name__ == "__main__":
    main(tyro.cli(Options))
