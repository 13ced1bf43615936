"""A pool of real actors on Ray Data: killed, out of room, and again and again in one session."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import cl_ray
from cl_ray.data.dataset import Dataset
from cl_ray.errors import UserError
from cl_ray.inference.pool import Pool, prepare, produce, share_out
from cl_ray.inference.work import Embed, FromNoise, Work
from cl_ray.model import TrainedModel
from cl_ray.training.failures import SILENT

pytestmark = pytest.mark.usefixtures("local_ray")

TWO, ONE = Pool(actors=2, cpus=1, gpus=0), Pool(actors=1, cpus=2, gpus=0)
COUNT = 5 * 4096


def make(run: Path, work: Work, out: Path, pool: Pool = TWO) -> list[int]:
    """Makes what is missing; how many results there were after each part."""
    return [made.images for made in produce(prepare(str(run), work, str(out)), pool)]


def test_what_is_missing_is_made_and_nothing_else(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "made.parquet"
    work = FromNoise(COUNT - 100, seed=3)
    done = make(trained, work, out)
    assert len(done) == 5
    assert done[-1] == COUNT - 100
    whole = pq.read_table(out)
    assert whole["id"].to_pylist() == list(range(COUNT - 100))
    images = whole["image"].combine_chunks().to_numpy_ndarray()
    expected = cl_ray.load(trained).generate(COUNT - 100, seed=3)
    assert np.abs(images.astype(int) - expected).max() <= 1

    # As it is when the last part and another one were not there yet; the pool is another one,
    # and takes all CPUs that the one before had.
    record = out / "_made.json"
    record.write_text(record.read_text().replace('"complete": true', '"complete": false'))
    for part in (2, 4):
        (out / f"part-00000{part}.parquet").unlink()
    times = {p: p.stat().st_mtime_ns for p in out.glob("*.parquet")}
    job = prepare(str(trained), work, str(out))
    assert job.missing == [2, 4]
    assert job.done == 3 * 4096
    assert [made.images for made in produce(job, ONE)] in ([4096, 8092], [3996, 8092])
    assert all(p.stat().st_mtime_ns == time for p, time in times.items())
    assert np.abs(images.astype(int) - pixels(out)).max() <= 1
    assert prepare(str(trained), work, str(out)).missing == []


def pixels(out: Path) -> np.ndarray:
    """All images of a folder of Parquet."""
    return pq.read_table(out)["image"].combine_chunks().to_numpy_ndarray()


def actors_alive() -> list[psutil.Process]:
    """The processes of this session's pools."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "MapWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_a_part_whose_actor_died_is_made_by_another(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "made.parquet"
    made = produce(prepare(str(trained), FromNoise(COUNT, seed=3), str(out)), TWO)
    next(made)
    os.kill(actors_alive()[0].pid, signal.SIGKILL)
    assert list(made)[-1].images == COUNT
    assert pq.read_table(out)["id"].to_pylist() == list(range(COUNT))


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no actor could import it


class Deadly(FromNoise):
    """Work that crashes the process of whoever makes a part of it."""

    def make(self, run: TrainedModel, start: int, stop: int) -> pa.Table:
        os._exit(137)


def die_in_an_actor() -> FromNoise:
    if ray.get_runtime_context().get_actor_id():
        os._exit(137)
    return FromNoise(COUNT, seed=3)


class DeadlyToLoad(FromNoise):
    """Work whose arrival crashes the process of an actor."""

    def __reduce__(self) -> Any:
        return die_in_an_actor, ()


@pytest.mark.parametrize("kind", [Deadly, DeadlyToLoad])
def test_actors_that_die_again_and_again_end_it(
    trained: Path, tmp_path: Path, kind: type[FromNoise]
) -> None:
    job = prepare(str(trained), kind(COUNT, seed=3), str(tmp_path / "made.parquet"))
    with pytest.raises(UserError) as died:
        list(produce(job, ONE))
    assert str(died.value).startswith("An actor was started again 3 times and died: ")
    assert SILENT in str(died.value)
    assert f"; 0 of {COUNT:,} images are there, and the same command goes on." in str(died.value)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A disk of its own at a folder, for who may have one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a disk that is soon full")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_keeps_what_is_there_and_says_what_is_needed(
    trained: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    work = FromNoise(COUNT, seed=3)
    with small_disk(disk, "4m"):
        out = disk / "made.parquet"
        with pytest.raises(UserError, match="No space left on device") as full:
            make(trained, work, out)
        _, alive = psutil.wait_procs(actors_alive(), timeout=60)
        assert not alive  # they were killed, in the midst of a part or not
        there = sorted(out.glob("*.parquet"))
        assert 1 <= len(there) < 5
        each = [pq.read_table(part) for part in there]  # every one of them is whole
        assert [len(part) for part in each] == [4096] * len(there)
        job = prepare(str(trained), work, str(out))
        assert list((out / "_parts").iterdir()) == []
        assert len(job.missing) == 5 - len(there)
        assert f" of {COUNT:,} images are there" in str(full.value)
        said = str(full.value).partition("takes about ")[2].split()
        need = float(said[0]) * {"kB": 1e3, "MB": 1e6}[said[1].rstrip(":")]
        assert need == pytest.approx(len(job.missing) * there[0].stat().st_size, rel=0.2)

        times = {p: p.stat().st_mtime_ns for p in there}
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        make(trained, work, out)
        assert all(p.stat().st_mtime_ns == time for p, time in times.items())
        assert pq.read_table(out)["id"].to_pylist() == list(range(COUNT))


def test_data_that_is_damaged_is_named(trained: Path, make_digits: object, tmp_path: Path) -> None:
    digits = make_digits(300)  # type: ignore[operator]
    job = prepare(str(trained), Embed(Dataset.open(digits), "train"), str(tmp_path / "e.parquet"))
    (shard,) = Path(digits).glob("*.parquet")
    blob = bytearray(shard.read_bytes())
    blob[len(blob) // 3 : len(blob) // 2] = bytes(len(blob) // 2 - len(blob) // 3)
    shard.write_bytes(blob)
    with pytest.raises(UserError, match=rf"{shard.name} is damaged.*0 of 300 images are there"):
        list(produce(job, TWO))


def test_the_pool_fits_the_machine() -> None:
    assert share_out(None, None, None, local=True, parts=9) == Pool(2, 1, 0)
    assert share_out(None, 2, None, local=True, parts=9) == Pool(1, 2, 0)
    assert share_out(5, None, None, local=True, parts=9) == Pool(2, 1, 0)
    assert share_out(None, 0.5, None, local=True, parts=3) == Pool(3, 0.5, 0)
    with pytest.raises(UserError, match=r"An actor of 3 CPU fits no machine .* has 2 CPU"):
        share_out(None, 3, None, local=True, parts=9)
    with pytest.raises(UserError, match=r"1 CPU and 1 GPU fits no machine"):
        share_out(None, None, 1, local=True, parts=9)
