from pathlib import Path

import pyarrow.fs as pafs
import pytest
from five_steps import global_batch
from saved import ABOUT, States, adversary
from states import pack, unpack

from cl_ray.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def states() -> States:
    """The state of a run after each of its steps."""
    made, states = adversary(), {}
    for step in (1, 2, 3, 4, 5):
        made.step(global_batch(0, "views"))
        sums = {"d/adversarial": 0.1 * step}
        around = {"epochs": step // 2, "position": step % 2, "sums": sums, "workers": 1, **ABOUT}
        states[step] = unpack(pack({"adversary": made.state_dict(), **around}))
    return states


@pytest.fixture
def local(tmp_path: Path) -> Checkpoints:
    return Checkpoints(pafs.LocalFileSystem(), f"{tmp_path}/run")
