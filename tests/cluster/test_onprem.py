"""The shipped onprem.yaml on three machines: up, a run on storage that all mount, down."""

import json
import subprocess
from pathlib import Path

from helpers.cloud import Cloud, wait_for
from helpers.digits import put_digits
from helpers.laptop import ask, dashboard, left_over, make_token, run, shipped
from helpers.small_run import SMALL
from helpers.typed import TYPED, commands, typed

OWN = "Your own machines"
ADDRESSES = ("10.77.0.1", "10.77.0.2", "10.77.0.3")


def test_three_machines_from_up_to_down(cloud: Cloud, scratch: Path) -> None:
    key = scratch / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    for number, address in enumerate(ADDRESSES):
        public = key.with_suffix(".pub").read_text().strip()
        cloud.machines.boot(f"own{number}", public, "ubuntu", address)
    changes = {
        "192.0.2.1": ADDRESSES[0],
        "192.0.2.2, 192.0.2.3": f"{ADDRESSES[1]}, {ADDRESSES[2]}",
        "~/.ssh/id_ed25519": str(key),
    }
    file = shipped("onprem.yaml", scratch / "onprem.yaml", **changes)
    put_digits(cloud.machines.shared / "digits")
    make_token(cloud)
    *shell, first = typed(OWN, "export RAY_UP")
    *_, up = typed(OWN, "ray up", {"cluster/onprem.yaml": str(file)})
    run(cloud, *shell, f"{first}; {up}")
    with dashboard(cloud, file, OWN):

        def joined() -> bool:
            nodes = ask(cloud, "/nodes?view=summary")["data"]["summary"]
            alive = {n["ip"] for n in nodes if n["raylet"].get("state") == "ALIVE"}
            return alive == set(ADDRESSES)

        wait_for(joined, 150, "both workers")
        doctor = {
            "s3://YOUR-BUCKET/runs": "/mnt/runs",
            "--gpus-per-worker 1": "--cpus-per-worker 2",
            "-- python": "-- env COLUMNS=250 python",
        }
        job = "ray job submit --address http://localhost:8265 --working-dir ."
        said = run(cloud, *typed("Watching", f"{job} -- python -m cl_ray doctor", doctor))
        rows = [line for line in said.splitlines() if "  ok  " in line or "  failure  " in line]
        checks = [row.split()[0] for row in rows]
        assert {check: checks.count(check) for check in set(checks)} == {
            "token": 1, "versions": 3, "GPUs": 3, "clock": 3, "storage": 3, "all-reduce": 1,
            "dashboard": 1,
        }, said  # fmt: skip
        assert "2 nodes over gloo" in said
        assert "asks for the token" in said
        assert "failure" not in said
        assert not list(cloud.machines.shared.glob(".doctor*"))

        small = f" --data /mnt/runs/digits --evaluation.every 0 --epochs 1 {' '.join(SMALL)}"
        fits = {"--gpus-per-worker 1": "--cpus-per-worker 2 --threads 1"}  # one to a machine
        *shell, train = typed(OWN, "ray job submit", fits)
        run(cloud, *shell, train + small)
    summary = json.loads((cloud.machines.shared / "first/summary.json").read_text())
    assert (summary["epochs"], summary["workers"]) == (1, 2)

    *shell, down = typed(OWN, "ray down", {"cluster/onprem.yaml": str(file)})
    run(cloud, *shell, f"{first}; {down}")
    # The head's end is at once; workers give up on it after a minute, which is not waited for here.
    head = cloud.machines.processes("own0")
    assert not [line for line in head if "/raylet" in line or "gcs_server" in line]
    assert left_over(cloud) == []
    assert set(commands(OWN)) <= TYPED
