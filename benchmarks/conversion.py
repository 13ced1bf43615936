"""CPU seconds of `cl-ray data` beside a bare loop of Pillow over the same images.

    python benchmarks/conversion.py [--images 20000] [--size 64]

Writes a folder of classes with JPEGs of 128 pixels: random ones, smooth with some noise. Then, in
turns and each in a process of its own with one thread for arithmetic, decodes and scales them by
Pillow and makes a dataset of them. Prints both in seconds of CPU (user and system, with the start
of the process), their ratio and the size of the dataset.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

import numpy as np
import tyro
from PIL import Image

BARE_LOOP = """
import sys
from pathlib import Path
import numpy as np
from PIL import Image, ImageOps

size = int(sys.argv[2])
for file in sorted(Path(sys.argv[1]).rglob("*.jpg")):
    with Image.open(file) as image:
        np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS))
"""


def write_images(folder: Path, count: int) -> None:
    """Write the JPEGs, of ten classes."""
    random = np.random.default_rng(0)
    for k in range(10):
        (folder / f"class{k}").mkdir(parents=True)
    for number in range(count):
        coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((128, 128), Image.Resampling.BICUBIC))
        noisy = (smooth + random.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"class{number % 10}/{number:06}.jpg", quality=90)


def cpu_seconds(*arguments: str) -> float:
    """Run Python with these arguments; return its seconds of CPU, and of its children."""
    before = getrusage(RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL
    )
    after = getrusage(RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(images: int = 20_000, size: int = 64, rounds: int = 3) -> None:
    """Measure in turns and print.

    Args:
        images: How many.
        size: `cl-ray data --size`.
        rounds: Turns; the least of each is taken.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "images"), Path(folder, "set")
        write_images(source, images)
        convert = ["-m", "cl_ray", "data", "--source", str(source), f"--size={size}"]
        bare, ours = [], []
        for _ in range(rounds):
            bare.append(cpu_seconds("-c", BARE_LOOP, str(source), str(size)))
            ours.append(cpu_seconds(*convert, "--out", str(out), "--overwrite"))
        stored = sum(file.stat().st_size for file in out.iterdir())
    print(f"bare loop {min(bare):.2f} s, cl-ray data {min(ours):.2f} s of CPU, {images:,}")
    print(f"ratio {min(ours) / min(bare):.2f}; the dataset has {stored / 1e6:.1f} MB")


if __name__ == "__main__":
    tyro.cli(main)
