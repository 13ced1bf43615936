import os
import signal
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import torch
from helpers.bucket import bucket  # noqa: F401
from helpers.datasets import mnist
from helpers.five_steps import global_batch
from helpers.local_ray import local_ray
from helpers.saved_states import METADATA, States, small_gan
from helpers.states import pack, unpack
from threadpoolctl import threadpool_limits

from cl_ray import uri
from cl_ray.checkpoint import CheckpointStore
from cl_ray.data.writer import DatasetMetadata, RawImage, write_splits

MakeDigits = Callable[[int], str]


def pytest_configure() -> None:
    """Restore SIGINT and SIGHUP where a shell or `nohup` started pytest with one of them ignored.

    Children inherit an ignored signal, and tests of Ctrl-C and of a closed terminal would wait for
    ever.
    """
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """Fail a skipped test where CI installed all that the tests need; only a GPU may be missing."""
    outcome = yield
    report = outcome.get_result()
    needed = os.environ.get("CL_RAY_FAIL_ON_SKIP") and not item.get_closest_marker("gpu")
    if report.skipped and needed and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped where all tests must run: {report.longrepr}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start Ray or a cloud go first: the last one to end must be a short one."""
    slow = ("ray", "cluster", "browser")
    long = {item.path for item in items if any(map(item.get_closest_marker, slow))}
    items.sort(key=lambda item: item.path not in long)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file stays together, and so do fake clouds, which share a bridge and the laptop's ports."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "cluster" if "cluster" in file.split("/") else file

    config.option.loadscopereorder = False  # else files of many tests go first
    return ByFile(config, log)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small arrays on busy cores: two threads wait for each other longer than they work."""
    torch.set_num_threads(1)
    threadpool_limits(1)  # numpy's, scipy's and scikit-learn's


@pytest.fixture(autouse=True)
def _own_ctrl_c() -> Iterator[None]:
    """Restore the handler of SIGINT: Ray Train's `fit` leaves its own, which calls a dead actor."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _forget_secrets() -> None:
    """What a test gave as a password is masked in all later errors of the process."""
    uri._secrets.clear()


@pytest.fixture(scope="session")
def make_digits(tmp_path_factory: pytest.TempPathFactory) -> MakeDigits:
    """Writes datasets of the first packaged digits; returns their folders."""
    digits = list(zip(*mnist("train", 2048), strict=True))

    def make(count: int) -> str:
        assert count <= len(digits)
        folder: Path = tmp_path_factory.mktemp("digits") / f"digits{count}"
        images = [RawImage(image, int(label), "digit") for image, label in digits[:count]]
        write_splits({"train": images}, str(folder), DatasetMetadata("digits", "MNIST"))
        return str(folder)

    return make


@pytest.fixture(scope="session")
def digits(make_digits: MakeDigits) -> str:
    return make_digits(300)


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    """Ray with two CPUs, whatever else uses them."""
    with local_ray(cpus=2):
        yield


@pytest.fixture(scope="module")
def states() -> States:
    """The state of a run after each of its steps."""
    made, states = small_gan(), {}
    for step in (1, 2, 3, 4, 5):
        made.train_step(global_batch(0, "views"))
        sums = {"d/adversarial": 0.1 * step}
        around = {"epochs": step // 2, "position": step % 2, "sums": sums, "workers": 1, **METADATA}
        states[step] = unpack(pack({"gan": made.state_dict(), **around}))
    return states


@pytest.fixture
def disk_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The calls that make files durable, in order: `sync` of a path, `rename` to a path."""
    calls: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def record_sync(descriptor: int) -> None:
        calls.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def record(move: Callable[[Any, Any], None], old: Any, new: Any) -> None:
        calls.append(("rename", str(new)))
        move(old, new)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "rename", partial(record, rename))
    monkeypatch.setattr(os, "replace", partial(record, replace))
    return calls


@pytest.fixture
def local(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(pafs.LocalFileSystem(), f"{tmp_path}/run")
