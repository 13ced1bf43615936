"""Checkpoints whose writing or deletion is interrupted: a full disk, SIGKILL, a power cut."""

import io
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
from fsspec.implementations.local import LocalFileSystem
from helpers.ranks import SLOW
from helpers.saved_states import (
    FILES,
    States,
    assert_complete,
    checkpoint_name,
    newest_step,
    save_steps,
    steps_of,
)
from helpers.states import pack, states_equal, unpack
from helpers.synced_disk import cut_power, record

from cl_ray.checkpoint import CheckpointStore


@dataclass(frozen=True)
class Cut:
    """The moment when the disk fails or the process is killed.

    Args:
        file: Number of the file that is written then.
        fraction: Fraction of its bytes that are written.
        deletion: Or the number of files that are deleted before.
        kill: Whether the process is killed; else an OSError is raised.
    """

    file: int | None = None
    fraction: float = 0.0
    deletion: int | None = None
    kill: bool = False

    def now(self) -> None:
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("No space left on device")


class CutFile(io.FileIO):
    """A file that takes no more than a fraction of what is written."""

    cut: Cut

    def write(self, blob: Any) -> int:
        super().write(blob[: int(self.cut.fraction * len(blob))])
        self.cut.now()
        raise AssertionError


class Failing(LocalFileSystem):
    """The local disk until the cut."""

    cachable = False

    def __init__(self, cut: Cut):
        super().__init__()
        self.cut, self.written, self.deleted = cut, 0, 0

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if mode != "wb":
            return io.FileIO(path, mode)
        number, self.written = self.written, self.written + 1
        if number != self.cut.file:
            return io.FileIO(path, mode)
        file = CutFile(path, mode)
        file.cut = self.cut
        return file

    def rm_file(self, path: str) -> None:
        if self.deleted == self.cut.deletion:
            self.cut.now()
        self.deleted += 1
        super().rm_file(path)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        if Path(path).is_file():
            return self.rm_file(path)
        for file in sorted(Path(path).iterdir()):
            self.rm_file(str(file))
        Path(path).rmdir()


def failing(cut: Cut, folder: str, keep: int) -> CheckpointStore:
    return CheckpointStore(pafs.PyFileSystem(pafs.FSSpecHandler(Failing(cut))), folder, keep)


def interrupt(cut: Cut, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(cut, ...)`, in a process of its own if that is to be killed."""
    if not cut.kill:
        with pytest.raises(OSError, match="No space left"):
            function(cut, *arguments)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW)
    process = context.Process(target=function, args=(cut, *arguments))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def save_badly(cut: Cut, folder: str, keep: int, packed: bytes, step: int) -> None:
    save_steps(failing(cut, folder, keep), {step: unpack(packed)}, {step: 0.4})


def interrupt_save(cut: Cut, store: CheckpointStore, state: dict[str, Any], step: int) -> None:
    """Save a state as the checkpoint of a step, until the cut."""
    folder = store.folder.removesuffix("/checkpoints")
    interrupt(cut, save_badly, folder, store.keep, pack(state), step)


def rollback_badly(cut: Cut, folder: str, name: str) -> None:
    failing(cut, folder, keep=3).rollback_to(name)


@pytest.mark.parametrize(("kill", "fraction"), [(False, 0), (False, 0.5), (True, 0.5)])
@pytest.mark.parametrize("file", range(4), ids=[*FILES, "manifest.json"])
def test_an_interrupted_write_leaves_earlier_checkpoints_complete(
    file: int, fraction: float, kill: bool, local: CheckpointStore, states: States
) -> None:
    local.keep = 2
    save_steps(local, states, {1: 0.1, 2: 0.5})
    interrupt_save(Cut(file, fraction, kill=kill), local, states[3], 3)
    # It had begun; what a full disk does not take is deleted.
    assert (Path(local.folder) / checkpoint_name(3)).exists() is kill
    assert_complete(local, states, 1, 2)
    assert newest_step(local) == 2
    # The run resumes from there, reaches the same step, and nothing is left over.
    save_steps(local, states, {3: 0.4})
    assert_complete(local, states, 1, 2, 3)
    save_steps(local, states, {4: 0.3})
    assert_complete(local, states, 1, 3, 4)
    found = {path.name for path in Path(local.folder).iterdir()}
    assert found == {"best.txt", *map(checkpoint_name, (1, 3, 4))}


def test_an_incomplete_checkpoint_is_deleted_later(local: CheckpointStore, states: States) -> None:
    save_steps(local, states, {1: 0.1})
    interrupt_save(Cut(1, 0.5, kill=True), local, states[2], 2)
    save_steps(local, states, {3: 0.2})  # the run resumed at other steps, as with other workers
    assert_complete(local, states, 1, 3)
    assert not (Path(local.folder) / checkpoint_name(2)).exists()


@pytest.mark.parametrize("kill", [False, True], ids=["error", "kill"])
def test_interrupted_after_its_manifest_a_checkpoint_is_complete(
    kill: bool, local: CheckpointStore, states: States
) -> None:
    save_steps(local, states, {1: 0.5, 2: 0.5})
    interrupt_save(Cut(4, 0.5, kill=kill), local, states[3], 3)  # in best.txt
    assert_complete(local, states, 1, 2, 3)
    save_steps(local, states, {4: 0.6})
    assert_complete(local, states, 2, 3, 4)
    assert (Path(local.folder) / "best.txt").read_text() == f"{checkpoint_name(3)}\n"


@pytest.mark.parametrize("deletion", range(4))
def test_an_interrupted_deletion_leaves_the_others_complete(
    deletion: int, local: CheckpointStore, states: States
) -> None:
    local.keep = 1
    save_steps(local, states, {1: 0.1, 2: 0.5})
    interrupt_save(Cut(deletion=deletion), local, states[3], 3)  # deletes 2
    assert steps_of(local) == ([1, 2, 3] if deletion == 0 else [1, 3])
    for manifest in local.list():
        local.load(manifest.name)
    assert newest_step(local) == 3
    save_steps(local, states, {4: 0.5})
    assert_complete(local, states, 1, 4)


@pytest.mark.parametrize("deletion", range(8))
def test_an_interrupted_rollback_leaves_a_complete_checkpoint(
    deletion: int, local: CheckpointStore, states: States
) -> None:
    save_steps(local, states, {1: 0.1, 2: 0.5, 3: 0.4})
    folder = local.folder.removesuffix("/checkpoints")
    interrupt(Cut(deletion=deletion), rollback_badly, folder, checkpoint_name(1))
    for manifest in local.list():
        local.load(manifest.name)
    local.rollback_to(checkpoint_name(1))
    assert_complete(local, states, 1)


@pytest.mark.parametrize("file", range(4), ids=[*FILES, "manifest.json"])
def test_saved_again_and_interrupted_the_previous_one_is_the_newest(
    file: int, local: CheckpointStore, states: States
) -> None:
    """As in a notebook that saves in `on_log` at an epoch's last step, and at its end."""
    save_steps(local, states, {1: None, 2: None})
    interrupt_save(Cut(file, 0.5), local, states[3], 2)
    assert_complete(local, states, 1)
    save_steps(local, {2: states[3]}, {2: 0.1})
    assert states_equal(local.load(checkpoint_name(2)), states[3])


# Power cuts


def save_until_the_power_is_cut(root: str, log: str, packed: list[bytes], cut: int) -> None:
    """Save states until a call of fsync, and write down which were saved."""
    synced, fsync = 0, os.fsync

    def cut_after(fd: Any) -> None:
        nonlocal synced
        fsync(fd)
        if synced == cut:
            os.kill(os.getpid(), signal.SIGKILL)
        synced += 1

    os.fsync = cut_after
    record(Path(root), Path(log))
    store = CheckpointStore(pafs.LocalFileSystem(), f"{root}/run", keep=1)
    for step, state in enumerate(packed, 1):
        store.save(unpack(state), epoch=step, step=step)
        (Path(log) / "saved").write_text(str(step))


@pytest.mark.parametrize("cut", range(3, 36, 3))
def test_a_power_cut_leaves_the_last_checkpoint_that_was_saved(
    cut: int, states: States, tmp_path: Path
) -> None:
    """One is kept, so that each save deletes the one before."""
    root, log = tmp_path / "disk", tmp_path / "log"
    root.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW)
    packed = [pack(states[step]) for step in (1, 2, 3)]
    process = context.Process(
        target=save_until_the_power_is_cut, args=(str(root), str(log), packed, cut)
    )
    process.start()
    process.join()
    saved = int((log / "saved").read_text()) if (log / "saved").exists() else 0
    assert process.exitcode == (-signal.SIGKILL if saved < 3 else 0)
    for seed in range(20):
        out = tmp_path / f"after-{seed}"
        cut_power(root, log, out, seed)
        store = CheckpointStore(pafs.LocalFileSystem(), f"{out}/run")
        assert store.set_aside_damaged() == ()
        newest = newest_step(store) or 0
        assert saved <= newest <= saved + 1
        if newest:
            assert states_equal(store.load(checkpoint_name(newest)), states[newest])
