"""The doctor's checks, one by one, on this machine, and on a cluster of two nodes."""

import dataclasses
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import cl_ray
from helpers.local_ray import cluster_head

from cl_ray import doctor
from cl_ray.commands.doctor import command
from cl_ray.doctor import MachineInfo, check_clock, check_gpus, check_versions, read_constraints
from cl_ray.errors import UserError
from cl_ray.training.machine import MIN_MEMORY

ROOT = Path(__file__).parent.parent
TESTED = {"ray": "2.60.0", "torch": "2.14.1"}
GOOD = MachineInfo("m", "3.11.7", {"ray": "2.60.0", "torch": "2.14.1+cu129"}, 2, 2)


@pytest.mark.parametrize(
    ("packages", "tested", "state", "found", "advice"),
    [
        (GOOD.packages, TESTED, "ok", "as tested", ""),
        (GOOD.packages, {}, "ok", "no constraints.txt", ""),
        (
            {"ray": "2.59.0", "torch": "2.14.1"},
            TESTED,
            "failure",
            "ray 2.59.0, tested 2.60.0",
            "pip install -c constraints.txt ray",
        ),
        ({"ray": "2.60.0", "torch": "2.9"}, TESTED, "warning", "torch 2.9, tested 2.14.1", "torch"),
        ({"torch": "missing"}, {}, "failure", "torch missing, tested -", "pip install torch"),
    ],
)
def test_versions(
    packages: dict[str, str], tested: dict[str, str], state: str, found: str, advice: str
) -> None:
    finding = check_versions(dataclasses.replace(GOOD, packages=packages), tested)
    assert finding.state == state
    assert finding.found.endswith(found) or found in finding.found
    assert finding.advice.endswith(advice)
    assert bool(finding.advice) == bool(advice)


def test_constraints_of_the_repository() -> None:
    assert set(doctor.PACKAGES) <= set(read_constraints(ROOT / "constraints.txt"))
    assert read_constraints(Path("nowhere.txt")) == {}


@pytest.mark.parametrize(
    ("devices", "usable", "ray_gpus", "state", "advice"),
    [
        (0, 0, None, "ok", ""),
        (0, 0, 0.0, "ok", ""),
        (2, 2, 2.0, "ok", ""),
        (2, "torch is built for CPUs", 2.0, "failure", "torch for CUDA"),
        (2, "no libcudart", None, "failure", "error that torch reports"),
        (2, 0, 2.0, "failure", "driver is too old"),
        (0, 0, 1.0, "failure", "image without driver"),
        (2, 2, 1.0, "warning", "no run can use"),
    ],
)
def test_gpus(devices: int, usable: Any, ray_gpus: float | None, state: str, advice: str) -> None:
    found = check_gpus(dataclasses.replace(GOOD, devices=devices, usable=usable), ray_gpus)
    assert found.state == state
    assert advice in found.advice
    assert bool(found.advice) == bool(advice)


def test_clock() -> None:
    assert check_clock("m", 1000.0, 999.0, 1001.0).state == "ok"
    assert check_clock("m", 1000.0, 1010.0, 1011.0).found == "10.0 s off"
    assert check_clock("m", 1000.0, 980.0, 981.0).found == "19.0 s off"


def test_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert "--generate" in doctor.check_token().advice
    assert doctor.check_token(cluster=False).found.endswith("; a run here makes one")
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    assert doctor.check_token().advice == f"chmod 700 {token.parent}; chmod 600 {token}"
    token.chmod(0o600)
    assert doctor.check_token().state == "ok"
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert doctor.check_token().advice == "export RAY_AUTH_MODE=token"
    assert doctor.check_token(cluster=False).state == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert doctor.check_token(cluster=False).state == "failure"


def test_storage_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for storage, state, words in (("runs", "ok", "writes"), ("file", "failure", "file")):
        findings = doctor.check_machine(f"{tmp_path}/{storage}", ROOT / "constraints.txt")
        (found,) = [finding for finding in findings if finding.check == "storage"]
        assert found.state == state
        assert words in found.found
    assert list((tmp_path / "runs").iterdir()) == []
    assert doctor.check_storage("m", None, False, "runs").advice.startswith("not shared")


def test_command_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(ROOT)
    # Another test's Ray may hold what this machine has.
    monkeypatch.setattr("cl_ray.training.machine.available_memory", lambda: MIN_MEMORY)
    command([])
    printed = capsys.readouterr().out
    assert "failed" not in printed
    rows = {line.split(socket.gethostname())[0].strip(): line for line in printed.splitlines()[1:]}
    assert {"token", "temp folder", "shared memory", "memory"} <= set(rows)
    assert "; a run here makes one" in rows["token"]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    with pytest.raises(SystemExit) as ended:
        command([])
    assert ended.value.code == 1
    failed = capsys.readouterr().out
    assert "2 of 6 checks failed." in failed
    assert "set RAY_TMPDIR to a folder of yours" in failed
    versions = next(line for line in printed.splitlines() if line.startswith("versions"))
    assert " ok " in versions
    assert socket.gethostname() in versions


def test_workers_need_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for flag in ("--workers=2", "--cpus-per-worker=2", "--gpus-per-worker=1"):
        with pytest.raises(UserError, match="address"):
            command([flag])


def test_workers_are_checked_before_the_cluster_is_joined() -> None:
    with pytest.raises(UserError, match=r"^In the flags: .*gpus_per_worker 1\.5 is more than 1"):
        command(["--address=127.0.0.1:1", "--workers=2", "--gpus-per-worker=1.5"])


@pytest.mark.ray
def test_every_node_of_a_cluster(tmp_path: Path) -> None:
    """Two nodes on this machine, of which one has a GPU that does not exist."""
    environment = {"RAY_AUTH_MODE": "disabled", "COLUMNS": "220"}
    with cluster_head(2, **environment) as address:
        flags = [f"--address={address}", f"--storage={tmp_path}/runs", "--workers=3"]
        done = cl_ray("doctor", *flags, cwd=ROOT, **environment)
    assert done.returncode == 1, done.stderr
    assert "checks failed" in done.stdout, done.stderr
    states: dict[str, list[str]] = {}
    for row in map(str.split, done.stdout.splitlines()):
        state = next((word for word in row if word in ("ok", "warning", "failure")), "")
        states.setdefault(row[0] if row else "", []).append(state)
    assert states["versions"] == ["ok", "ok"]
    assert states["clock"] == ["ok", "ok"]
    assert states["storage"] == ["ok", "ok"]
    assert sorted(states["GPUs"]) == ["failure", "ok"]
    assert states["all-reduce"] == ["ok"]
    assert "2 nodes over gloo" in done.stdout
    assert list((tmp_path / "runs").iterdir()) == []
