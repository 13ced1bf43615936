"""Ctrl-C or SIGTERM while a run or a search waits for resources that others use."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from helpers.local_ray import local_ray
from helpers.terminal_process import TerminalProcess

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parent.parent.parent
SEARCH = [
    sys.executable, str(ROOT / "tuning" / "search.py"), "--trials=1", "--metric=reconstruction",
    "--set=evaluation.reference=none",
]  # fmt: skip
COMMANDS = {
    "train": [sys.executable, "-m", "cl_ray", "train"],
    "search": SEARCH,
    "wide search": [*SEARCH, "--workers=2"],
}
WAITS = {
    "train": "Waiting for resources that other jobs use.\n",
    "search": "1 trial at a time",
    "wide search": "trial 0 starts",
}


@pytest.fixture(scope="module")
def full_cluster() -> Iterator[str]:
    """The address of one whose only CPUs are reserved."""
    with local_ray(cpus=2) as context:
        ray.get(ray.util.placement_group([{"CPU": 2}]).ready())
        yield context.address_info["address"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_ends_the_waiting(
    full_cluster: str, digits: str, tmp_path: Path, command: str
) -> None:
    """SIGTERM is what `ray job stop`, Kubernetes and batch systems send."""
    flags = [f"--address={full_cluster}", "--name=w", f"--storage={tmp_path}", f"--data={digits}"]
    running = TerminalProcess([*COMMANDS[command], *flags], tmp_path / "log")
    try:
        running.wait_for(lambda: WAITS[command] in running.output(), "its waiting")
        if command == "search":
            running.press_ctrl_c()
        else:
            running.process.terminate()
        said = running.wait_interrupted()
    finally:
        running.process.kill()
    assert "stopped; " in said.splitlines()[-1]
    assert "Traceback" not in said
    assert "SIGTERM" not in said
    # What it asked the cluster for is given up: only the other's reservation is left.
    groups = ray.util.placement_group_table().values()
    assert [g["bundles"] for g in groups if g["state"] != "REMOVED"] == [{0: {"CPU": 2.0}}]
