"""What Ray's own API, which the dashboard's pages are made of, says of a trial."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from helpers.machine import machine
from ray.util.state import list_actors

from cl_ray.tuning.trial_label import start_trial_label

VALUES = "lr_g 0.0028  lr_d 0.0005  D depth 4"
TITLE = f"balance 0003: {VALUES}"
FILE = "trial-balance_0003_lr_g_0.0028_lr_d_0.0005_D_depth_4.log"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with machine(cpus=1, dashboard=True) as context:
        yield context


def found(cluster: Any, state: str) -> list[Any]:
    """Actors of the trial's name in that state; the API lags behind."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        actors = list_actors(
            f"http://{cluster.dashboard_url}",
            filters=[("class_name", "=", "Trial_balance_0003")],
            detail=True,
        )
        if any(actor.state == state for actor in actors):
            break
        time.sleep(0.2)
    return [actor for actor in actors if actor.state == state]


def test_a_trial_is_found_by_its_number_and_values_while_it_lasts(cluster: Any) -> None:
    sign = start_trial_label("balance", 3, VALUES)
    ray.get(sign.say.remote("cl_ray search balance, trial 3 starts"))
    (actor,) = found(cluster, "ALIVE")
    assert actor.repr_name == TITLE
    # The Logs page lists the files of this folder, and an actor's Log is its worker's.
    logs = Path(cluster.address_info["session_dir"], "logs")
    (own,) = logs.glob(f"worker-*-{actor.pid}.out")
    for file in (own, logs / FILE):
        assert "cl_ray search balance, trial 3 starts" in file.read_text()
    del sign
    (actor,) = found(cluster, "DEAD")
    assert actor.repr_name == TITLE
