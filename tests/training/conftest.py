"""Ray in the process of a test of Ray Train."""

from collections.abc import Iterator

import pytest
from helpers.local_ray import local_ray


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    """Ray with two CPUs, whose controller asks its workers ten times a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
        with local_ray(cpus=2):
            yield
