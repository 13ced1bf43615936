"""Make `cl_ray/data/mnist/`, the digits that travel inside the package, from the original files.

    python scripts/package_mnist.py --root data

`root` holds `MNIST/raw/` as torchvision lays it out. The same files give the same bytes, with the
same pyarrow.
"""

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cl_ray.data.dataset import PACKAGED
from cl_ray.data.writer import DatasetMetadata, RawImage, write_splits
from cl_ray.errors import UserError

OUT = Path(__file__).parents[1] / "cl_ray" / "data" / PACKAGED

# SHA-256 of the uncompressed idx files of http://yann.lecun.com/exdb/mnist.
FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

METADATA = DatasetMetadata(
    name="mnist",
    source="The MNIST database of handwritten digits, "
    "Yann LeCun, Corinna Cortes and Christopher J. C. Burges, http://yann.lecun.com/exdb/mnist",
    licence="CC BY-SA 3.0",
    classes=[str(digit) for digit in range(10)],
)

LICENCE = """\
# MNIST

The Parquet files in this folder hold the MNIST database of handwritten digits by Yann LeCun,
Corinna Cortes and Christopher J. C. Burges (http://yann.lecun.com/exdb/mnist), made from NIST's
Special Databases 1 and 3. The pixels and labels are unchanged; only the file format and the order
of the rows differ, and `id` gives each row's place in the original order. The original training
images are the splits train (55,000) and validation (5,000, drawn at random, of every class alike).

They hold the copyright and make it available under the terms of the Creative Commons
Attribution-Share Alike 3.0 licence (https://creativecommons.org/licenses/by-sa/3.0/), which applies
to these files too. The licence of the rest of the package does not extend to this folder.
"""


def read(path: Path) -> np.ndarray:
    """Return the array in an idx file of bytes, after checking the file's SHA-256."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != FILES[path.name]:
        raise UserError(f"{path} is not the original file: its SHA-256 differs.")
    dimensions = data[3]
    shape = np.frombuffer(data, ">i4", dimensions, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def raw_images(raw: Path, prefix: str) -> Iterator[RawImage]:
    """Yield the digits of one split, in the original order."""
    images = read(raw / f"{prefix}-images-idx3-ubyte")
    labels = read(raw / f"{prefix}-labels-idx1-ubyte")
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield RawImage(image[..., None], int(label), f"{prefix} {number}")


def main() -> None:
    """Write the package's shards and the licence beside them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="holds MNIST/raw")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    raw = args.root / "MNIST" / "raw"
    (args.out / "LICENCE.md").unlink(missing_ok=True)  # no part of a dataset, so in the way
    splits = {"train": raw_images(raw, "train"), "test": raw_images(raw, "t10k")}
    info = write_splits(
        splits, str(args.out), METADATA, validation_fraction=1 / 12, overwrite=True, level=22
    )
    (args.out / "LICENCE.md").write_text(LICENCE)
    total = sum(shard.bytes for split in info.splits.values() for shard in split.shards)
    print(f"{args.out}: {total:,} bytes")


if __name__ == "__main__":
    main()
