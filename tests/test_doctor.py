import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cl_ray import doctor
from cl_ray.commands.doctor import command
from cl_ray.doctor import Machine, check_clock, check_gpus, check_versions, pins
from cl_ray.errors import UserError

PINS = {"ray": "2.60.0", "torch": "2.14.1"}
SOUND = Machine("m", "3.11.7", {"ray": "2.60.0", "torch": "2.14.1+cu129"}, 2, 2)


def change(**fields: Any) -> Machine:
    return dataclasses.replace(SOUND, **fields)


def test_versions() -> None:
    assert check_versions(SOUND, PINS).state == "ok"
    old = check_versions(change(packages={"ray": "2.59.0", "torch": "2.14.1"}), PINS)
    assert (old.state, old.found) == ("failure", "ray 2.59.0, tested 2.60.0")
    assert old.advice == "pip install -c constraints.txt ray"
    assert (
        check_versions(change(packages={"ray": "2.60.0", "torch": "2.9"}), PINS).state == "warning"
    )
    assert check_versions(change(packages={"torch": "none"}), {}).state == "failure"


def test_the_pins_are_those_of_this_repository() -> None:
    found = pins(Path(__file__).parent.parent / "constraints.txt")
    assert set(doctor.PACKAGES) <= set(found)
    assert pins(Path("nowhere.txt")) == {}


@pytest.mark.parametrize(
    ("devices", "usable", "promised", "state", "advice"),
    [
        (0, 0, None, "ok", ""),
        (0, 0, 0.0, "ok", ""),
        (2, 2, 2.0, "ok", ""),
        (2, "torch is built for CPUs", 2.0, "failure", "torch for CUDA"),
        (2, "no libcudart", None, "failure", "complains"),
        (2, 0, 2.0, "failure", "driver is too old"),
        (0, 0, 1.0, "failure", "image without driver"),
        (2, 2, 1.0, "warning", "no run can use"),
    ],
)
def test_gpus(devices: int, usable: Any, promised: float | None, state: str, advice: str) -> None:
    found = check_gpus(change(devices=devices, usable=usable), promised)
    assert found.state == state
    assert advice in found.advice


def test_clocks() -> None:
    assert check_clock("m", 1000.0, 999.0, 1001.0).state == "ok"
    assert check_clock("m", 1000.0, 1010.0, 1011.0).found == "10.0 s off"
    assert check_clock("m", 1000.0, 980.0, 981.0).found == "19.0 s off"


def test_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert "--generate" in doctor.check_token(tmp_path).advice
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    assert doctor.check_token(tmp_path).advice == f"chmod 600 {token}"
    token.chmod(0o600)
    assert doctor.check_token(tmp_path).state == "ok"
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert doctor.check_token(tmp_path).advice == "export RAY_AUTH_MODE=token"


def test_storage(tmp_path: Path) -> None:
    assert doctor.write_to(str(tmp_path), "a", "x") is None
    assert (tmp_path / "a" / "x").read_bytes() == b"here"
    blocked = tmp_path / "file"
    blocked.write_text("")
    why = doctor.write_to(str(blocked), "a", "x")
    assert why
    assert "file" in why
    assert doctor.check_storage("m", None, False, "runs").advice.startswith("not shared")
    assert doctor.check_storage("m", None, True, "runs").state == "ok"


def test_this_machine_and_nothing_started(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "cl_ray", "doctor"], capture_output=True, text=True,
        env={**environment, "HOME": str(tmp_path), "COLUMNS": "200"}, timeout=120,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 1
    assert "1 of 3 checks failed." in done.stdout
    assert "(umask 077; ray get-auth-token --generate)" in done.stdout
    versions = next(line for line in done.stdout.splitlines() if line.startswith("versions"))
    assert " ok " in versions
    assert socket.gethostname() in versions


def test_storage_is_tried_without_a_cluster(tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    found = list(doctor.examine_here(str(storage), Path("constraints.txt")))
    assert [f.state for f in found if f.check == "storage"] == ["ok"]
    assert list(storage.iterdir()) == []
    (tmp_path / "file").write_text("")
    found = list(doctor.examine_here(f"{tmp_path}/file", Path("constraints.txt")))
    assert [f.state for f in found if f.check == "storage"] == ["failure"]


def test_workers_are_brought_up_on_a_cluster_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="address"):
        command(["--workers=2"])


HEAD = """
import sys, tempfile, time
from ray.cluster_utils import Cluster
folder = tempfile.mkdtemp(prefix="ray-")
node = {"num_cpus": 1, "num_gpus": 1, "include_dashboard": False, "temp_dir": folder}
cluster = Cluster(initialize_head=True, head_node_args=node)
cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def test_every_machine_of_a_cluster(tmp_path: Path) -> None:
    """Two nodes here, one of which promises a GPU that is not there."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "COLUMNS": "220"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    head = subprocess.Popen([sys.executable, "-c", HEAD], env=environment, **pipes)
    try:
        assert head.stdout is not None
        address = head.stdout.readline().strip()
        done = subprocess.run(
            [sys.executable, "-m", "cl_ray", "doctor", f"--address={address}",
             f"--storage={tmp_path}/runs", "--workers=2"],
            capture_output=True, text=True, env=environment, timeout=200,
            cwd=Path(__file__).parent.parent,
        )  # fmt: skip
    finally:
        head.communicate()
    assert done.returncode == 1, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    by_check: dict[str, list[str]] = {}
    for row in rows:
        state = next((word for word in row if word in ("ok", "warning", "failure")), "")
        by_check.setdefault(row[0] if row else "", []).append(state)
    assert by_check["versions"] == ["ok", "ok"]
    assert by_check["clock"] == ["ok", "ok"]
    assert by_check["storage"] == ["ok", "ok"]
    assert sorted(by_check["GPUs"]) == ["failure", "ok"]
    assert by_check["workers"] == ["ok"]
    assert "2 machines over gloo" in done.stdout
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_meeting_adds_up() -> None:
    assert doctor.meet(0, 1, f"127.0.0.1:{doctor.free_port()}", gpu=False) == 1.0
