"""`cl-ray train` as a user types it: real Ray, real processes, real files.

What does not end the command itself runs in this process, on a Ray that the runs share.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from helpers.commands import read_metrics, run_flags, train_here
from helpers.limits import file_size_limit
from helpers.processes import children, is_alive, wait_for
from helpers.refusal import refused
from helpers.terminal_process import TerminalProcess
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cl_ray.cli import main
from cl_ray.config import MAX_NAME_BYTES, Config
from cl_ray.networks.build import build_discriminator, build_generator
from cl_ray.storage import RunStorage
from cl_ray.training.preflight import exclusive_lock
from cl_ray.training.ray_compat import CONNECTION_LOST

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("two_cpus")]
SHORT = ["--epochs=3", "--evaluation.every=0"]
"""For runs that no test stops between two steps: evaluations give it time to."""
LONG_NAME = "прогон-[red]🦋$" + "数" * 69


def weights(folder: Path) -> dict[str, bytes]:
    """Every weight's bytes; the files also say which run they are of."""
    files = [f"{name}.safetensors" for name in ("generator", "discriminator")]
    return {
        f"{file} {name}": weight.numpy().tobytes()
        for file in files
        for name, weight in safetensors.torch.load_file(folder / file).items()
    }


@pytest.fixture(scope="session")
def digits(make_digits: Any) -> str:
    return make_digits(700)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module", params=[1, 2])
def trained(
    request: pytest.FixtureRequest, storage: Path, digits: str, two_cpus: None
) -> tuple[int, Path, str]:
    """An uninterrupted run: workers, folder and what it printed."""
    workers, folder = request.param, storage / (LONG_NAME if request.param == 1 else "demo")
    return workers, folder, train_here(folder, digits, f"--workers={workers}", "--epochs=3")


def test_a_run_folder_holds_all_that_is_documented(trained: tuple[int, Path, str]) -> None:
    workers, folder, _ = trained
    config = Config.load(folder / "config.yaml")
    assert config.workers == workers
    assert config.epochs == 3

    epochs = read_metrics(folder)
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    assert [line["step"] for line in epochs] == [22, 44, 66]  # 700 / 32, the last one short
    assert all(line["images_per_second"] > 0 for line in epochs)

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["workers"] == workers
    assert summary["worker_peak_bytes"] > 5e7
    assert summary["driver_peak_bytes"] > 5e7

    shape = (28, 28, 1)
    generator = build_generator(shape, config.generator)
    generator.load_state_dict(safetensors.torch.load_file(folder / "generator.safetensors"))
    discriminator = build_discriminator(shape, config.discriminator)
    discriminator.load_state_dict(safetensors.torch.load_file(folder / "discriminator.safetensors"))

    for picture in ("samples", "pairs"):
        for epoch in (1, 2, 3):
            with Image.open(folder / "samples" / f"{picture}-{epoch:04d}.png") as image:
                assert image.size[0] > 400
                assert image.convert("L").getextrema() != (0, 0)

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    tags = events.Tags()
    assert {"d/adversarial", "d/contrastive", "g/reconstruction"} <= set(tags["scalars"])
    assert {"samples", "pairs"} <= set(tags["images"])
    assert [e.step for e in events.Scalars("g/adversarial")][:3] == [5, 10, 15]

    checkpoints = sorted(p.name for p in (folder / "checkpoints").glob("step-*"))
    assert checkpoints[-1] == "step-00000066"
    assert (folder / "checkpoints" / "best.txt").read_text().strip() in checkpoints


def test_device_progress_and_next_commands_are_printed(trained: tuple[int, Path, str]) -> None:
    workers, folder, printed = trained
    assert f"worker 0 of {workers}: cpu" in printed
    assert "stays on the device" in printed
    for epoch in (1, 2, 3):
        assert re.search(rf"epoch {epoch}/3  step {22 * epoch}  [\d,]+ images/s .*left", printed)
    lines = re.findall(r"epoch \d/3 .*", printed)
    assert len(set(lines)) == len(lines) >= 3
    assert f"tensorboard --logdir {folder.parent}" in printed
    assert "GB at the peak" in printed
    assert "3 epochs, 66 steps in " in printed
    assert f"({workers} worker{'s' if workers > 1 else ''}, cpu, " in printed
    assert f"run folder  {folder}\n" in printed
    quoted = shlex.quote(str(folder))
    assert f"cl-ray evaluate {quoted}; cl-ray report {quoted}" in printed


@pytest.mark.parametrize("trained", [1], indirect=True)
def test_a_name_beyond_ascii_as_long_as_may_be(
    trained: tuple[int, Path, str], storage: Path
) -> None:
    """Of the run that others train, finish and resume."""
    _, folder, _ = trained
    assert len(LONG_NAME.encode()) == MAX_NAME_BYTES
    assert [path.name for path in storage.iterdir() if "прогон" in path.name] == [LONG_NAME]
    main(["report", str(folder), "--no-projector"])
    assert f"<h1>{LONG_NAME}</h1>" in (folder / "report.html").read_text()


def test_a_finished_run_is_left_as_it_is(
    trained: tuple[int, Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder, _ = trained
    before = weights(folder)
    main(["train", f"--name={folder.name}", f"--storage={folder.parent}"])
    assert "is finished (3 epochs)" in " ".join(capsys.readouterr().out.split())
    assert weights(folder) == before


def start(folder: Path, data: str, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cl_ray", "train", *run_flags(folder, data), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@contextlib.contextmanager
def after_an_epoch(folder: Path, workers: int, act: Callable[[list[int]], None]) -> Iterator[None]:
    """Do something with a run's worker processes when its second epoch has begun."""
    failed: list[BaseException] = []

    def wait_and_act() -> None:
        try:
            first = folder / "checkpoints" / "step-00000022" / "manifest.json"
            wait_for(first.exists, "the first checkpoint", seconds=500)
            found = [p for p, title in children(os.getpid()) if "RayTrainWorker" in title]
            assert len(found) == workers
            act(found)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=wait_and_act, daemon=True)
    thread.start()
    yield
    thread.join()
    assert not failed, failed


@pytest.mark.parametrize("trained", [2], indirect=True)
def test_killed_worker_ends_with_the_same_weights(
    trained: tuple[int, Path, str], storage: Path, digits: str
) -> None:
    workers, whole, _ = trained
    folder, killed = storage / "killed", []

    def kill(pids: list[int]) -> None:
        killed.append(pids[-1])
        os.kill(pids[-1], signal.SIGKILL)

    with after_an_epoch(folder, workers, kill):
        output = train_here(folder, digits, f"--workers={workers}", "--epochs=3")
    assert "resumes from step-" in output
    # Of two, the other misses it too: who is gone is said, and how, in one line.
    lost = re.findall(r"^worker (\d) is lost: process (\d+) on [\d.]+: (.*)$", output, re.M)
    assert [(pid, why) for _, pid, why in lost] == [(str(killed[0]), CONNECTION_LOST)]
    assert weights(folder) == weights(whole)
    assert [line["epoch"] for line in read_metrics(folder)] == [1, 2, 3]
    same = ("d/adversarial", "g/reconstruction", "d/contrastive")
    for ours, theirs in zip(read_metrics(folder), read_metrics(whole), strict=True):
        assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}


@pytest.mark.parametrize("trained", [1], indirect=True)
def test_ctrl_c_leaves_a_resumable_run(
    trained: tuple[int, Path, str], storage: Path, digits: str
) -> None:
    _, whole, _ = trained
    folder = storage / "interrupted"
    process = start(folder, digits, "--checkpoint.every=7", "--epochs=3")
    try:
        saved = folder / "checkpoints"
        wait_for(
            lambda: any(int(p.parent.name[5:]) > 22 for p in saved.glob("step-*/manifest.json")),
            "a checkpoint in the second epoch",
        )
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "with the run's --name it resumes from the last checkpoint" in output
    assert "; to resume it: cl-ray train --name " in output
    # How often a run logs, saves and evaluates changes nothing that it computes.
    seldom = ["--checkpoint.every=0", "--checkpoint.keep=1", "--log-every=3"]
    again = train_here(folder, digits, *SHORT, *seldom)
    assert "resumes from step-" in again
    assert weights(folder) == weights(whole)
    assert len(list((folder / "checkpoints").glob("step-*"))) <= 2  # the newest and the best
    assert [line["epoch"] for line in read_metrics(folder)] == [1, 2, 3]
    # The metrics of the interrupted epoch count each step once.
    ours, theirs = read_metrics(folder)[1], read_metrics(whole)[1]
    assert ours["d/adversarial"] == pytest.approx(theirs["d/adversarial"], rel=1e-12)


def test_a_closed_terminal_is_a_ctrl_c(storage: Path, digits: str, tmp_path: Path) -> None:
    folder = storage / "closed"
    flags = [*run_flags(folder, digits), *SHORT, "--epochs=100", "--checkpoint.every=7"]
    command = [sys.executable, "-m", "cl_ray", "train", *flags]
    process = TerminalProcess(command, tmp_path / "log", terminal=True)
    try:
        checkpoints = folder / "checkpoints"
        process.wait_for(lambda: list(checkpoints.glob("*/manifest.json")), "a checkpoint")
        ours = [pid for pid, _ in children(process.process.pid)]
        process.close_terminal()
        process.wait_interrupted()
    finally:
        process.process.kill()
    wait_for(lambda: not any(map(is_alive, ours)), "the end of Ray")


def test_a_killed_driver_leaves_no_process_and_no_writer_and_no_lock(
    storage: Path, digits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = storage / "orphaned"
    flags = [*SHORT, "--epochs=100000", "--checkpoint.every=5", "--log-every=1"]
    process = start(folder, digits, *flags)
    try:
        wait_for(lambda: list(folder.glob("checkpoints/*/manifest.json")), "a checkpoint")
        ours = [pid for pid, _ in children(process.pid)]
        assert refused(capsys, "train", *run_flags(folder, digits), *flags) == (
            f"The run {folder} is in use by another process (process {process.pid} on "
            f"{socket.gethostname()}): wait for it or stop it, or use another --name."
        )
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    with exclusive_lock(RunStorage.from_uri(folder), "run"):  # Ray's processes do not hold it
        assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on")
    process.communicate()
    wait_for(lambda: not any(map(is_alive, ours)), "the end of Ray", seconds=300)
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    time.sleep(2)  # a writer that is not a child would log several steps
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == written


def test_a_controller_that_is_lost_ends_the_run_in_one_sentence(
    storage: Path, digits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def controllers() -> set[int]:
        return {pid for pid, title in children(os.getpid()) if "TrainController" in title}

    def kill() -> None:
        (victim,) = wait_for(lambda: controllers() - before, "Ray Train's controller")
        os.kill(victim, signal.SIGKILL)

    before, killer = controllers(), threading.Thread(target=kill)
    killer.start()
    message = refused(capsys, "train", *run_flags(storage / "lost", digits))
    killer.join()
    assert message.startswith("Ray Train's controller is lost: process ")
    assert f"{CONNECTION_LOST}; the same command with --name lost resumes the run. (" in message


def test_a_nan_or_inf_loss_ends_the_run(
    storage: Path, digits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = storage / "nan"
    flags = ["--epochs=2", "--workers=2", "--losses.adversarial=1e39", "--losses.contrastive=1e39"]
    with pytest.raises(SystemExit, match="1"):
        main(["train", *run_flags(folder, digits), *flags])
    printed = capsys.readouterr()
    assert re.search(r"\w/\w+ became (nan|inf|-inf) at step \d+ \(epoch 1\)", printed.err)
    assert "Traceback" not in printed.err
    assert "resumes" not in printed.out  # it was not tried again
    assert not list((folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("trained", [1], indirect=True)
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_taken(
    trained: tuple[int, Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder, _ = trained
    before, lines = weights(folder), read_metrics(folder)
    file = folder / "checkpoints" / "step-00000066" / "state.pt"
    file.write_bytes(b"rot" + file.read_bytes()[3:])
    main(["train", f"--name={folder.name}", f"--storage={folder.parent}"])
    printed = capsys.readouterr().out
    assert printed.startswith(
        f"{file} has changed (its digest differs). The checkpoint is put aside as "
        "damaged-step-00000066, and the run goes on from step-00000044.\n"
    )
    assert "resumes from step-00000044" in printed
    assert weights(folder) == before
    assert [line["d/pair"] for line in read_metrics(folder)] == [line["d/pair"] for line in lines]
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert len(events.Scalars("epoch/d/pair")) == 3


@pytest.mark.parametrize("trained", [2], indirect=True)
def test_a_full_disk_ends_the_run_in_one_sentence_and_with_room_it_goes_on(
    trained: tuple[int, Path, str], storage: Path, digits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    workers, whole, _ = trained
    folder = storage / "full"
    flags = [f"--workers={workers}", "--epochs=3"]
    with contextlib.ExitStack() as limits:

        def limit(pids: list[int]) -> None:
            for pid in pids:
                limits.enter_context(file_size_limit(20_000, pid))

        with after_an_epoch(folder, workers, limit), pytest.raises(SystemExit, match="1"):
            main(["train", *run_flags(folder, digits), *flags])
    output, error = capsys.readouterr()
    first = folder / "checkpoints" / "step-00000022"
    place = re.escape(str(folder))
    assert re.fullmatch(
        rf"cl-ray: {place}\S* cannot be written \(File too large\): raise the limit on the size of "
        rf"files \(`ulimit -f`\), then give the same command again\. \(.*: the last checkpoint is "
        r"step-00000022\.\)",
        error.splitlines()[-1],
    )
    assert "Traceback" not in output + error
    assert "is lost" not in output  # no worker was started again
    assert output.count("worker 0 of") == 1
    assert {path.name for path in first.parent.iterdir()} == {first.name, "best.txt"}
    assert not list(folder.rglob("*.new"))
    assert "resumes from step-00000022" in train_here(folder, digits, *flags)
    assert weights(folder) == weights(whole)
    assert [line["epoch"] for line in read_metrics(folder)] == [1, 2, 3]
