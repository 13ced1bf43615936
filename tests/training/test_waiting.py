"""Ctrl-C while a run or a search waits for room on a cluster that is another's for now."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from running import Running

ROOT = Path(__file__).parent.parent.parent
SEARCH = [sys.executable, str(ROOT / "tuning" / "search.py"), "--trials=1"]
COMMANDS = {
    "train": [sys.executable, "-m", "cl_ray", "train"],
    "search": SEARCH,
    "wide search": [*SEARCH, "--workers=2"],
}
WAITS = {
    "train": "Waiting for what others use of the cluster.\n",
    "search": "1 trial at a time",
    "wide search": "trial 0 starts",
}


@pytest.fixture(scope="module")
def full_cluster() -> Iterator[str]:
    """The address of one whose only CPUs are reserved."""
    # Not in pytest's own folder: its path is too long for a socket's.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        context = ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
            logging_level="ERROR", _temp_dir=folder,
        )  # fmt: skip
        ray.get(ray.util.placement_group([{"CPU": 2}]).ready())
        yield context.address_info["address"]
        ray.shutdown()


@pytest.mark.parametrize("command", COMMANDS)
def test_it_ends(full_cluster: str, tmp_path: Path, command: str) -> None:
    flags = [f"--address={full_cluster}", "--name=w", f"--storage={tmp_path}"]
    running = Running([*COMMANDS[command], *flags], tmp_path / "log")
    try:
        running.wait_for(lambda: WAITS[command] in running.said(), "its waiting")
        running.press_ctrl_c()
        said = running.end()
    finally:
        running.process.kill()
    assert "stopped; " in said.splitlines()[-1]
    assert "Traceback" not in said
    # What it asked the cluster for is given up: only the other's reservation is left.
    groups = ray.util.placement_group_table().values()
    assert [g["bundles"] for g in groups if g["state"] != "REMOVED"] == [{0: {"CPU": 2.0}}]
