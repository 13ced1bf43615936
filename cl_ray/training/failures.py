"""Why a worker died, as far as Ray knows, and the line that says so when it is started again."""

import re
from typing import Any

import ray
import ray.actor
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.train import UserCallback

SILENT = "was killed, ran out of memory or crashed (Ray knows no exit code)"
"""What Ray means by a connection that ended; its own words take half a page."""


def failure_reason(error: BaseException) -> str:
    """Why a process was lost, or what was raised in it, in one line."""
    error = getattr(error, "health_check_failure", error)
    if isinstance(error, RayTaskError):
        return " ".join(str(error.cause).split())
    if not isinstance(error, RayActorError):
        return (str(error).strip().splitlines() or [type(error).__name__])[-1]
    if isinstance(error, ActorUnavailableError):
        return f"its process {SILENT}"
    text = str(error)
    found = (re.search(rf"\t{field}: (\S+)", text) for field in ("pid", "ip"))
    pid, address = (match.group(1) if match else "?" for match in found)
    said = re.search(r"The actor (is dead|died because).*", text, re.S)
    why = " ".join((said.group() if said else text).split())
    if "Worker unexpectedly exits with a connection error" in why:
        why = SILENT
    return f"process {pid} on {address}: {why[:300]}"


class WorkerFailureCallback(UserCallback):
    """Says on the board why workers are started again; lives in Ray Train's controller.

    Args:
        board: The run's.
    """

    def __init__(self, board: "ray.actor.ActorHandle[Any]"):
        self.board = board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Workers have died, or raised something; where one dies, others only miss it."""
        found = {
            rank: getattr(error, "health_check_failure", error)
            for rank, error in worker_exceptions.items()
        }
        dead = {r: e for r, e in found.items() if isinstance(e, RayActorError)} or found
        for rank, error in dead.items():
            self.board.lost.remote(f"worker {rank} is lost: {failure_reason(error)}")
