"""A pool of real actors on Ray Data: resumed, killed, on a full disk and on damaged data."""

import os
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
from cl_ray.inference import actor_pool
from cl_ray.inference.actor_pool import ActorPool, allocate_actors, prepare_inference, run_inference
from cl_ray.inference.tasks import EmbedTask, GenerateTask
from cl_ray.model import TrainedModel
from cl_ray.training.ray_compat import CONNECTION_LOST

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("two_cpus")]

TWO, ONE = ActorPool(num_actors=2, cpus=1, gpus=0), ActorPool(num_actors=1, cpus=2, gpus=0)
COUNT = 5 * 4096


def modification_times(out: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in out.glob("*.parquet")}


def images_of(out: Path) -> np.ndarray:
    return pq.read_table(out)["image"].combine_chunks().to_numpy_ndarray()


def test_only_missing_parts_are_computed(trained: Path, tmp_path: Path) -> None:
    out, total = tmp_path / "out.parquet", COUNT - 100
    task = GenerateTask(total, seed=3)
    progress = list(run_inference(prepare_inference(str(trained), task, str(out)), TWO))
    assert len(progress) == 5
    assert progress[-1].rows == total
    assert pq.read_table(out)["id"].to_pylist() == list(range(total))
    images = images_of(out)
    expected = cl_ray.load(trained).generate(total, seed=3)
    assert np.abs(images.astype(int) - expected).max() <= 1

    # Pretend that it was killed after its last part.
    manifest = out / "_manifest.json"
    complete = manifest.read_text()
    unfinished = complete.replace('"complete": true', '"complete": false')
    manifest.write_text(unfinished)
    assert prepare_inference(str(trained), task, str(out)).missing == []
    assert manifest.read_text() == complete != unfinished

    # Pretend that two parts were not written yet. The second pool has another number of actors and
    # needs all CPUs that the first one had.
    manifest.write_text(unfinished)
    parts = [out / f"part-00000{part}.parquet" for part in (2, 4)]
    for part in parts:
        part.unlink()
    times = modification_times(out)
    job = prepare_inference(str(trained), task, str(out))
    assert job.missing == [2, 4]
    assert job.rows_written == 3 * 4096
    assert [p.rows for p in run_inference(job, ONE)] in ([4096, 8092], [3996, 8092])
    assert modification_times(out).items() >= times.items()
    assert np.abs(images.astype(int) - images_of(out)).max() <= 1  # threads change the rounding
    assert prepare_inference(str(trained), task, str(out)).missing == []


def actor_processes() -> list[psutil.Process]:
    """The processes of this session's pools."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "MapWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_killed_actor_is_restarted(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    job = prepare_inference(str(trained), GenerateTask(COUNT, seed=3), str(out))
    progress = run_inference(job, ONE)  # another actor could do its parts as well
    next(progress)
    for actor in actor_processes():
        actor.kill()
    assert list(progress)[-1].rows == COUNT
    assert pq.read_table(out)["id"].to_pylist() == list(range(COUNT))


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import this file


class CrashInCompute(GenerateTask):
    """A task that kills the process that computes it."""

    def compute(self, model: TrainedModel, start: int, stop: int) -> pa.Table:
        os._exit(137)


def _crash_in_an_actor() -> GenerateTask:
    if ray.get_runtime_context().get_actor_id():
        os._exit(137)
    return GenerateTask(COUNT, seed=3)


class CrashOnArrival(GenerateTask):
    """A task that kills the actor that unpickles it."""

    def __reduce__(self) -> Any:
        return _crash_in_an_actor, ()


@pytest.mark.parametrize(
    ("kind", "retries"), [(CrashInCompute, actor_pool.MAX_RETRIES), (CrashOnArrival, 1)]
)
def test_actors_that_keep_dying_end_it(
    trained: Path,
    tmp_path: Path,
    kind: type[GenerateTask],
    retries: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(actor_pool, "MAX_RETRIES", retries)
    job = prepare_inference(str(trained), kind(COUNT, seed=3), str(tmp_path / "out.parquet"))
    with pytest.raises(UserError) as error:
        list(run_inference(job, ONE))
    message = str(error.value)
    assert message.startswith(f"An actor died after {retries} restarts: ")
    assert CONNECTION_LOST in message
    assert message.endswith(f"; 0 of {COUNT:,} images are written, and the same command resumes.")


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mount a disk of that size, where that is allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_keeps_whole_parts(trained: Path, tmp_path: Path) -> None:
    disk, task = tmp_path / "disk", GenerateTask(COUNT, seed=3)
    with small_disk(disk, "11m"):  # three parts of 3.24 MB fit, so the first two at once do
        out = disk / "out.parquet"
        job = prepare_inference(str(trained), task, str(out))
        with pytest.raises(UserError, match="No space left on device") as error:
            list(run_inference(job, TWO))
        _, alive = psutil.wait_procs(actor_processes(), timeout=300)
        assert not alive  # they were stopped, in the middle of a part or not
        written = sorted(out.glob("*.parquet"))
        assert 2 <= len(written) <= 3
        assert [len(pq.read_table(part)) for part in written] == [4096] * len(written)
        job = prepare_inference(str(trained), task, str(out))
        assert list((out / "_parts").iterdir()) == []
        assert len(job.missing) == 5 - len(written)
        told = str(error.value).partition(f" of {COUNT:,} images are written")[0].split()[-1]
        said = int(told.replace(",", ""))
        assert said <= 4096 * len(written)  # an actor may have written one while it was stopped
        assert str(error.value).endswith("are written, and the same command resumes.")

        times = modification_times(out)
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        list(run_inference(job, TWO))
        assert modification_times(out).items() >= times.items()
        assert pq.read_table(out)["id"].to_pylist() == list(range(COUNT))


def test_damaged_data_is_named(trained: Path, make_digits: Any, tmp_path: Path) -> None:
    digits = make_digits(300)
    task = EmbedTask(Dataset.open(digits), "train")
    job = prepare_inference(str(trained), task, str(tmp_path / "out.parquet"))
    (shard,) = Path(digits).glob("*.parquet")
    blob = bytearray(shard.read_bytes())
    blob[len(blob) // 3 : len(blob) // 2] = bytes(len(blob) // 2 - len(blob) // 3)
    shard.write_bytes(blob)
    expected = rf"{shard.name} is damaged.*0 of 300 embeddings are written"
    with pytest.raises(UserError, match=expected):
        list(run_inference(job))


def test_allocation_fits_the_machine() -> None:
    for wanted, cpus, parts, expected in (
        (None, None, 9, ActorPool(2, 1, 0)),
        (None, 2, 9, ActorPool(1, 2, 0)),
        (5, None, 9, ActorPool(2, 1, 0)),
        (None, 0.5, 3, ActorPool(3, 0.5, 0)),
    ):
        assert allocate_actors(wanted, cpus, None, local=True, num_parts=parts) == expected
    with pytest.raises(UserError, match=r"An actor of 3 CPU fits no node .* has 2 CPU"):
        allocate_actors(None, 3, None, local=True, num_parts=9)
    with pytest.raises(UserError, match=r"1 CPU and 1 GPU fits no node"):
        allocate_actors(None, None, 1, local=True, num_parts=9)
