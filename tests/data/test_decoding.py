"""Damaged and hostile image files: one sentence, no other program, little memory."""

import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.hostile_images import POSTSCRIPT, fuzzed_images, oversized_images, png_header
from helpers.random_images import Refused, WriteSource, pixels, png, save

import cl_ray
from cl_ray.data.decoding import (
    FORMATS,
    ImageLimits,
    MemoryBudget,
    decode_image,
    decode_pixels,
    encode_pixels,
)
from cl_ray.errors import UserError
from cl_ray.report.images import epoch_strip
from cl_ray.storage import RunStorage

READ_EACH = """
import json, sys
from pathlib import Path
from cl_ray.data.source_config import SourceConfig
from cl_ray.data.sources import write_dataset
from cl_ray.environment import return_freed_memory
from cl_ray.errors import UserError

return_freed_memory()
status = lambda field: int(Path("/proc/self/status").read_text().split(field)[1].split()[0]) * 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS:")
started = []
starts = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
sys.addaudithook(lambda event, _: started.append(event) if event in starts else None)
source, out, flags = sys.argv[1:]
told = {}
for folder in sorted(Path(source).iterdir()):
    config = SourceConfig(source=str(folder), out=out, size=28, overwrite=True, **json.loads(flags))
    try:
        write_dataset(config)
    except UserError as error:
        told[folder.name] = str(error)
print(json.dumps({"told": told, "started": started, "peak": status("VmHWM:") - before}))
"""
"""Makes a dataset of every folder, in a process of its own whose memory is measured."""


def read_folders(source: Path, **flags: Any) -> tuple[dict[str, str], float]:
    """Read each folder in a folder; return the sentences by folder, and the bytes that it took.

    No program is started.
    """
    command = [sys.executable, "-c", READ_EACH, str(source), f"{source}-out", json.dumps(flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr  # Pillow's; libtiff's own lines cannot be turned off
    found = json.loads(done.stdout)
    assert found["started"] == []
    return found["told"], found["peak"]


def read_each(folder: Path, files: dict[str, bytes]) -> tuple[dict[str, str], float]:
    """Read each file alone, as `read_folders` does; a file that is refused is named."""
    for name, content in files.items():
        (folder / "in" / name).mkdir(parents=True)
        (folder / "in" / name / name).write_bytes(content)
    told, peak = read_folders(folder / "in", color="rgb")
    for name, sentence in told.items():
        assert f"{folder}/in/{name}/{name}" in sentence
        assert sentence.endswith(".")
        assert "\n" not in sentence
    return told, peak


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_damaged_files(tmp_path: Path, count: int) -> None:
    told, peak = read_each(tmp_path, dict(fuzzed_images(count)))
    assert 0.5 * count < len(told) < count
    assert peak < 5e8


def test_files_that_announce_billions_of_pixels(tmp_path: Path) -> None:
    files = oversized_images()
    told, peak = read_each(tmp_path, files)
    assert set(told) == set(files)
    assert all("--max-pixels 40,000,000" in sentence for sentence in told.values()), told
    assert peak < 2e8


def test_max_pixels_is_the_largest_that_is_read(
    tmp_path: Path, write_source: WriteSource, refused: Refused
) -> None:
    save(tmp_path / "in" / "0.png", pixels(1, 30, 40)[0])
    assert write_source(tmp_path / "in", size=28, max_pixels=1200)[1].image.shape[1] == 28
    message = refused(tmp_path / "in", size=28, max_pixels=1199)
    assert "0.png has 40 × 30 pixels, more than --max-pixels 1,199: raise that" in message
    (tmp_path / "in" / "0.png").write_bytes(bytes(2**20 + 4))
    message = refused(tmp_path / "in", size=28, max_pixels=1)
    assert "bytes, more than 3 for each of --max-pixels 1" in message


def test_cells_are_refused_by_their_shape_or_header(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "in").mkdir()
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((2, 100, 200), np.uint8))
    pq.write_table(pa.table({"image": column}), tmp_path / "in" / "0.parquet")
    message = refused(tmp_path / "in", size=28, max_pixels=19_999)
    assert "0.parquet, row 0, has 200 × 100 pixels, more than --max-pixels 19,999" in message
    message = refused(tmp_path / "in", size=28, max_pixels=6666)
    assert "0.parquet has 20,000 values an image, more than --max-pixels 6,666" in message
    bombs = [png_header(13_300, 13_300)] * 8
    pq.write_table(pa.table({"image": bombs}), tmp_path / "in" / "0.parquet")
    message = refused(tmp_path / "in", size=28)
    assert "0.parquet, row 0, has 176,890,000 pixels, more than --max-pixels" in message


@pytest.mark.parametrize("place", ["folder", "cell", "torchvision"])
def test_postscript_starts_no_program(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Pillow has Ghostscript, `gs` on the PATH, draw it, whatever the file is called."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    source, flags = str(tmp_path / "in"), {}
    if place == "cell":
        (tmp_path / "in").mkdir()
        pq.write_table(pa.table({"image": [POSTSCRIPT]}), tmp_path / "in" / "0.parquet")
    elif place == "folder":
        save(tmp_path / "in" / "0.png", pixels(1)[0]).tobytes()
        (tmp_path / "in" / "0.png").write_bytes(POSTSCRIPT)
    else:
        source, flags = "Imagenette", {"root": str(tmp_path / "root")}
        for name in ("train/n01440764", "val/n01440764"):
            save(tmp_path / "root" / "imagenette2" / name / "1.jpeg", pixels(1)[0])
            (tmp_path / "root" / "imagenette2" / name / "1.jpeg").write_bytes(POSTSCRIPT)
    message = refused(source, size=28, **flags)
    assert f"cannot be read as an image (it is none of {', '.join(FORMATS)})" in message
    assert not (tmp_path / "started").exists()


def test_threads_decode_no_more_pixels_than_one_image_may_have() -> None:
    budget, held, most = MemoryBudget(10), 0, 0
    lock, both = threading.Lock(), threading.Barrier(2)

    def work(amount: int) -> None:
        nonlocal held, most
        with budget.reserve(amount):
            with lock:
                held += min(amount, 10)
                most = max(most, held)
            if amount in (3, 4):  # which fit at the same time
                both.wait(60)
            time.sleep(0.01)
            with lock:
                held -= min(amount, 10)

    threads = [threading.Thread(target=work, args=(n,)) for n in (3, 4, 6, 10, 99, 1, 2, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most <= 10


def test_memory_does_not_grow_with_the_threads(tmp_path: Path) -> None:
    """Sixteen images of four million pixels, whose threads could hold 250 MB of pixels at once."""
    content, peaks = png(np.zeros((2000, 2000, 3), np.uint8)), []
    for count in (1, 16):
        folder = tmp_path / str(count) / "all"
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number}.png").write_bytes(content)
        told, peak = read_folders(folder.parent, max_pixels=4_000_000)
        assert told == {}
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 4e7


def test_images_are_opened_in_one_place() -> None:
    package = Path(cl_ray.__file__).parent
    opening = re.compile(r"\bImage\.open\b|\b(torchvision\.io|imageio|cv2|skimage)\b")
    found = [file.name for file in package.rglob("*.py") if opening.search(file.read_text())]
    assert found == ["decoding.py"]


def test_every_error_of_a_decoder_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (MemoryError, RecursionError, OverflowError, KeyError, AssertionError):

        def fails(*_: object, kind: type[Exception] = kind) -> None:
            raise kind

        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fails)
        with pytest.raises(UserError, match=r"^x\.png cannot be read as an image \(.+\): repair"):
            decode_image(png(pixels(1)[0]), "x.png", ImageLimits())


def test_a_grid_in_a_run_folder_may_be_any_image(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    grids = [png(pixels(1, *size)[0]) for size in ((1, 1), (3, 40), (40, 3), (17, 17))]
    for content in (*grids, POSTSCRIPT):
        (tmp_path / "samples" / "samples-0001.png").write_bytes(content)
        assert epoch_strip(RunStorage.from_uri(tmp_path), 12, 10) == []


@pytest.mark.parametrize("shape", [(16, 24, 3), (24, 16, 3), (16, 16, 1)])
def test_jpeg_of_another_shape_than_recorded_is_refused(shape: tuple[int, int, int]) -> None:
    data = encode_pixels(np.zeros((16, 16, 3), np.uint8), "jpeg", 90)
    assert decode_pixels(data, "jpeg", (16, 16, 3)).shape == (16, 16, 3)
    with pytest.raises(ValueError, match="it is 16 × 16, RGB, and not"):
        decode_pixels(data, "jpeg", shape)
