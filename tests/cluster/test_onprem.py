"""The shipped onprem.yaml on three fake machines: up, a run on shared storage, down."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import client
from helpers.cloud import Cloud
from helpers.small_run import SMALL_RUN

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]  # slow on a busy machine

TITLE = "Your own machines"
ADDRESSES = ("10.77.0.1", "10.77.0.2", "10.77.0.3")


def test_three_machines_from_up_to_down(
    cloud: Cloud, scratch: Path, copy_digits: Callable[[Path], None]
) -> None:
    key = scratch / "key"
    make_key = client.readme_command(TITLE, "ssh-keygen", {"~/.ssh/cl-ray": str(key)})
    subprocess.run(make_key, check=True)
    for number, address in enumerate(ADDRESSES):
        public = key.with_suffix(".pub").read_text().strip()
        cloud.machines.boot(f"own{number}", public, "ubuntu", address)
    changes = {
        "192.0.2.1": ADDRESSES[0],
        "192.0.2.2, 192.0.2.3": f"{ADDRESSES[1]}, {ADDRESSES[2]}",
        "~/.ssh/cl-ray": str(key),
    }
    file = client.shipped_yaml("onprem.yaml", scratch / "onprem.yaml", **changes)
    copy_digits(cloud.machines.shared / "digits")
    client.create_token(cloud)
    *shell, first = client.readme_command(TITLE, "export RAY_UP")
    *_, up = client.readme_command(TITLE, "ray up", {"cluster/onprem.yaml": str(file)})
    client.run(cloud, *shell, f"{first}; {up}")
    with client.dashboard(cloud, file, TITLE):
        client.wait_for_nodes(cloud, file, set(ADDRESSES))
        doctor = {
            "s3://YOUR-BUCKET/runs": "/mnt/runs",
            "--gpus-per-worker 1": "--cpus-per-worker 2",
            "-- python": "-- env COLUMNS=250 python",
        }
        job = "ray job submit --address http://localhost:8265 --working-dir ."
        printed = client.run_readme(cloud, "Watching", f"{job} -- python -m cl_ray doctor", doctor)
        rows = [line for line in printed.splitlines() if "  ok  " in line or "  failure  " in line]
        checks = [row.split()[0] for row in rows]
        assert {check: checks.count(check) for check in set(checks) - {"shared"}} == {
            "token": 1, "versions": 3, "GPUs": 3, "temp": 3, "memory": 3, "clock": 3, "storage": 3,
            "all-reduce": 1, "dashboard": 1,
        }, printed  # fmt: skip
        assert "2 nodes over gloo" in printed
        assert "asks for the token" in printed
        assert "failure" not in printed
        assert not list(cloud.machines.shared.glob(".doctor*"))
        refused = client.run(cloud, *f"{job} -- python -m cl_ray train".split(), ok=False)
        assert "would lie in Ray's copy of the job's working directory" in " ".join(refused.split())

        small = f" --data /mnt/runs/digits --evaluation.every 0 --epochs 1 {' '.join(SMALL_RUN)}"
        fits = {"--gpus-per-worker 1": "--cpus-per-worker 2"}  # one on each machine
        *shell, train = client.readme_command(TITLE, "ray job submit", fits)
        client.run(cloud, *shell, train + small)
    summary = json.loads((cloud.machines.shared / "first/summary.json").read_text())
    assert (summary["epochs"], summary["workers"]) == (1, 2)

    *shell, down = client.readme_command(TITLE, "ray down", {"cluster/onprem.yaml": str(file)})
    client.run(cloud, *shell, f"{first}; {down}")
    # The head ends at once. Workers end after a minute without it, which this test does not await.
    head = cloud.machines.processes("own0")
    assert not [line for line in head if "/raylet" in line or "gcs_server" in line]
    assert client.leftover_processes(cloud) == []
    assert set(client.readme_commands(TITLE)) <= client.USED_COMMANDS
