"""Ray's processes, started in a script on a machine that may be busy."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cl_ray.training.ray_session import START_ATTEMPTS, START_TIMEOUT

Started = TypeVar("Started")
TESTS = Path(__file__).parents[1]
PYTHONPATH = f"{TESTS}{os.pathsep}{TESTS.parent}"
"""Of a script that imports this."""


def start_again_if_slow(start: Callable[[], Started]) -> Started:
    """Start Ray's processes, again if they were not up within Ray's 30 s.

    Those of the failed start end with this process.
    """
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            return start()
        except Exception as error:
            if attempt == START_ATTEMPTS or not str(error).startswith(START_TIMEOUT):
                raise
    raise AssertionError("unreachable")
