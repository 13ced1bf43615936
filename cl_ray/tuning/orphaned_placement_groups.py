"""Gives back what a trial's trainer reserved on the cluster, when the trial's process has died.

Ray Train leaves that to an actor that asks the dashboard's state API whether the trainer is dead:
with no dashboard it never hears, and the trial's next attempt would wait for ever for the room
that the dead one holds.
"""

import time
from typing import Any

import ray
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData as Reservation
from ray.tune import Callback
from ray.util.placement_group import PlacementGroup, remove_placement_group

EVERY = 1.0
"""Seconds between two looks."""


class OrphanedPlacementGroups(Callback):
    """Looks for such reservations where Ray Tune asks its callbacks, ten times a second."""

    def __init__(self) -> None:
        self.looked = 0.0

    def on_step_begin(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Ray Tune is about to look after its trials."""
        if time.monotonic() - self.looked < EVERY:
            return
        self.looked = time.monotonic()
        for group in find_orphans():
            remove_placement_group(group)

    def __reduce__(self) -> Any:
        """Ray Tune pickles a search's callbacks for a restoring that is not used."""
        return Callback, ()


def find_orphans() -> list[PlacementGroup]:
    """Placement groups of this job whose maker, an actor, is dead.

    Ray's control store knows of whom a group is; `ray.util.placement_group_table` leaves it out.
    """
    job = ray.get_runtime_context().get_job_id()
    table = map(
        Reservation.FromString, state._connect_and_get_accessor().get_placement_group_table()
    )
    return [
        PlacementGroup(ray.PlacementGroupID(group.placement_group_id))
        for group in table
        if ray.JobID(group.creator_job_id).hex() == job
        and not ray.ActorID(group.creator_actor_id).is_nil()  # the driver's own
        and group.creator_actor_dead
        and not group.is_detached  # made to outlive its maker
        and group.state != Reservation.REMOVED
    ]
