"""A run on S3: on two nodes, resumed, killed; and a folder that one node does not see."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from helpers.commands import cl_ray, run_flags
from helpers.local_ray import cluster_head
from helpers.node_start import PYTHONPATH
from helpers.processes import children
from helpers.small_run import SMALL_RUN
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cl_ray.cli import main
from cl_ray.config import Config

pytestmark = pytest.mark.ray
NODE = """
import sys
from ray._private.node import Node
from ray._private.parameter import RayParams
from helpers.node_start import start_again_if_slow
parameters = RayParams(gcs_address=sys.argv[1], num_cpus=1)
start_again_if_slow(lambda: Node(parameters, head=False, shutdown_at_exit=True))
print("up", flush=True)
sys.stdin.read()
"""
"""Like `ray start --address`, without a fixed port that another Ray may use."""


@dataclass(frozen=True)
class Nodes:
    """Two nodes with one CPU each, one with a GPU; the other sees an empty folder `unshared`."""

    address: str
    unshared: Path
    apart: bool


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, bucket: Any) -> Iterator[Nodes]:
    unshared = tmp_path_factory.mktemp("unshared")
    apart = subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
    hide = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs none {unshared} && exec "$@"', "sh"]
    with cluster_head(RAY_AUTH_MODE="disabled") as address:
        second = subprocess.Popen(
            [*(hide if apart else []), sys.executable, "-c", NODE, address],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": PYTHONPATH},
        )  # fmt: skip
        try:
            assert second.stdout is not None
            assert second.stdout.readline() == "up\n"
            yield Nodes(address, unshared, apart)
        finally:
            second.communicate()


def train(nodes: Nodes, *flags: str) -> subprocess.CompletedProcess[str]:
    return cl_ray("train", f"--address={nodes.address}", *flags, RAY_AUTH_MODE="disabled")


@pytest.fixture(scope="module")
def digits(make_digits: Any) -> str:
    return make_digits(200)


@pytest.fixture(scope="module")
def trained(nodes: Nodes, bucket: Any, digits: str) -> str:
    """The output of a run of two epochs on S3, with one or two workers; two fit."""
    done = train(
        nodes, "--name=demo", f"--storage={bucket.uri('runs')}",
        f"--data={digits}", "--workers", "1", "2", "--epochs=2",
        "--checkpoint.keep=1", *SMALL_RUN,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_folder_that_one_node_does_not_see_is_refused_before_anything_is_trained(
    nodes: Nodes, digits: str
) -> None:
    if not nodes.apart:
        pytest.skip("only root can give a node a mount namespace of its own")
    done = train(nodes, *run_flags(nodes.unshared / "demo", digits), "--workers=2")
    assert done.returncode == 1
    assert done.stderr == (
        f"cl-ray: storage '{nodes.unshared}' is not shared: {socket.gethostname()} cannot see it; "
        "give --storage s3://..., gs://... or a path that every machine mounts.\n"
    )
    assert [p.name for p in (nodes.unshared / "demo").iterdir()] == [".lock"]


def test_a_cluster_s_gpus_are_used_only_on_request(trained: str) -> None:
    assert re.search(r"worker 0 of 2: cpu, .* \(no GPU was asked for: --gpus-per-worker\)", trained)


def test_everything_reaches_the_bucket(trained: str, bucket: Any, tmp_path: Path) -> None:
    there = bucket.files("runs/demo/")
    # Ray Train knows the checkpoints too, without a copy of its own.
    known = json.loads(there["checkpoint_manager_snapshot.json"])
    assert known["latest_checkpoint_result"]["checkpoint_dir_name"] == "checkpoints/step-00000014"
    config = Config.from_yaml(there["config.yaml"].decode())
    assert config.workers == (1, 2)
    assert config.storage == bucket.uri("runs")

    epochs = [json.loads(line) for line in there["metrics.jsonl"].splitlines()]
    assert [(line["epoch"], line["step"]) for line in epochs] == [(1, 7), (2, 14)]
    summary = json.loads(there["summary.json"])
    assert (summary["status"], summary["epochs"], summary["workers"]) == ("finished", 2, 2)
    for picture in ("samples-0001", "samples-0002", "pairs-0001", "pairs-0002"):
        assert there[f"samples/{picture}.png"].startswith(b"\x89PNG")

    events = [name for name in there if name.startswith("tensorboard/")]
    (tmp_path / "events.out.tfevents.1").write_bytes(there[events[0]])
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in read.Scalars("g/adversarial")] == [5, 7, 12, 14]
    assert len(read.Images("samples")) == 2

    newest = "checkpoints/step-00000014"
    manifest = json.loads(there[f"{newest}/manifest.json"])
    for file, facts in manifest["files"].items():
        assert len(there[f"{newest}/{file}"]) == facts["bytes"]
    kept = {name.split("/")[1] for name in there if name.startswith("checkpoints/step-")}
    assert kept == {"step-00000014", there["checkpoints/best.txt"].decode().strip()}
    for network in ("generator", "discriminator"):
        assert safetensors.torch.load(there[f"{network}.safetensors"])
        assert there[f"{network}.safetensors"] == there[f"{newest}/{network}.safetensors"]
    for line in ("run folder", "samples", "networks", "checkpoints"):
        assert f"{line:<12}s3://bucket/runs/demo" in trained


def test_the_bucket_is_updated_at_every_epoch(trained: str, bucket: Any) -> None:
    """The bucket keeps old versions."""
    versions = bucket.files("runs/demo/metrics.jsonl", deleted=True).values()
    assert {blob.count(b"\n") for blob in versions} == {1, 2}
    written = bucket.versions("runs/demo/")
    events = {name: n for name, n in written.items() if name.startswith("tensorboard/")}
    assert sum(events.values()) >= 2
    assert len({name.split(".")[-2] for name in events}) == 1  # of one process: no worker died
    assert all(n == 1 for name, n in written.items() if name.startswith("samples/"))


SCRIPT = """
import json, signal, sys
from cl_ray import Config, LaunchOptions, train
config, address = sys.argv[1:]
before = signal.getsignal(signal.SIGINT)
trained = train(Config.model_validate_json(config), LaunchOptions(address=address))
given_back = signal.getsignal(signal.SIGINT) == before
print(json.dumps([trained.folder, trained.summary, given_back]))
"""


def test_it_is_resumed_from_there_and_in_python(
    trained: str, nodes: Nodes, bucket: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one worker now; then the run is finished."""
    storage = bucket.uri("runs")
    before = bucket.files("runs/demo/")
    config = Config.from_yaml(before["config.yaml"].decode())
    more = config.model_copy(update={"storage": storage, "epochs": 3, "workers": 1})
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, more.model_dump_json(), nodes.address],
        capture_output=True, text=True, timeout=900,
        env={**os.environ, "COLUMNS": "200", "RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "worker 0 of 1: " in done.stdout
    assert "resumes from step-00000014" in done.stdout
    after = bucket.files("runs/demo/")
    folder, summary, ctrl_c_given_back = json.loads(done.stdout.splitlines()[-1])
    assert ctrl_c_given_back
    assert folder == storage.replace("runs?", "runs/demo?")
    assert summary == json.loads(after["summary.json"])
    assert (summary["status"], summary["epochs"], summary["workers"]) == ("finished", 3, 1)

    epochs = [json.loads(line) for line in after["metrics.jsonl"].splitlines()]
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    assert after["metrics.jsonl"].startswith(before["metrics.jsonl"])
    assert "checkpoints/step-00000021/manifest.json" in after
    assert after["generator.safetensors"] != before["generator.safetensors"]
    events = {name for name in before if name.startswith("tensorboard/")}
    assert events < {name for name in after if name.startswith("tensorboard/")}
    assert all(after[name] == before[name] for name in events)

    main(["train", "--name=demo", f"--storage={storage}", f"--address={nodes.address}"])
    assert " ".join(capsys.readouterr().out.split()) == (
        "The run s3://bucket/runs/demo is finished (3 epochs); give more --epochs to resume it."
    )
    assert bucket.files("runs/demo/") == after


STEPS = -(-55_000 // 32)


def test_a_killed_run_has_the_curves_before_its_checkpoint(bucket: Any, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "cl_ray", "train", "--name=demo", f"--storage={bucket.uri('killed')}",
        "--data=mnist", "--epochs=1", "--checkpoint.every=20", "--evaluation.every=0", *SMALL_RUN,
    ]  # fmt: skip
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not (found := saved(bucket)):
            assert running.poll() is None
            time.sleep(0.1)
    finally:
        for pid in (*(pid for pid, _ in children(running.pid)), running.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        running.wait()
    found = saved(bucket)
    assert 0 < max(found) < STEPS  # in mid-epoch
    events = bucket.files("killed/demo/tensorboard/")
    for name, blob in events.items():
        (tmp_path / name).write_bytes(blob)
    read = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    steps = [event.step for event in read.Scalars("speed/images_per_second")]
    assert set(range(5, max(found) + 1, 5)) <= set(steps)


def saved(bucket: Any) -> list[int]:
    """The steps after which there are whole checkpoints."""
    found = bucket.client.list_objects_v2(Bucket="bucket", Prefix="killed/demo/checkpoints/")
    keys = [item["Key"] for item in found.get("Contents", [])]
    return [int(step[1]) for key in keys if (step := re.search(r"step-(\d+)/manifest.json", key))]
