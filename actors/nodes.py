"""Ray's own account of the nodes, by which Ray Train decides how many workers a group has.

An actor of Ray's, one for the whole cluster, adds up what all who train or read ask for, passes it on to the
autoscaler, and says who may have which nodes. It looks for nodes every 20 s only, and lives and dies with the node of
whoever was the first to ask.
"""

from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

COUNTED_WITHIN_S = 60.0
HELD_WITHIN_S = 4.0
LEAVING = "leaving"
"""The event that tells of workers who will leave after their next checkpoint, for a larger group or for good."""


def count_nodes() -> None:
    """Have Ray's account count the nodes of this moment.

    To be called by the driver before any stream is opened: one on a node that is lost later would have taken the actor
    along, and Ray Train's controller asks a dead actor for ever. And before each group, which could come back as small
    as it left.
    """
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator

    account: Any = coordinator.get_or_create_autoscaling_coordinator()
    ray.get(account.get_reserved_resources.remote("shear", recompute=True), timeout=COUNTED_WITHIN_S)


class HeldNodes:
    """Keeps nodes from being taken away as idle between a group of workers that left and the larger one after it.

    Ray Train withdraws what it asked the autoscaler for when a group ends, and asks again when the next begins. A node
    that came while the group trained has been idle ever since, longer than an autoscaler allows: it would go at the
    moment for which it came. One byte of memory in use on every node makes none of them idle, and takes nothing from
    anybody.
    """

    def __init__(self) -> None:
        self._held: PlacementGroup | None = None

    def follow(self, report: dict[str, Any]) -> None:
        """Hold where a report tells of workers who leave, and let go where it tells of a start."""
        if report.get("event") == LEAVING and self._held is None:
            nodes = sum(bool(node["Alive"]) for node in ray.nodes())
            self._held = placement_group([{"memory": 1}] * nodes, strategy="STRICT_SPREAD")
        elif report["kind"] == "start":
            self.close()

    def close(self) -> None:
        """Hold nothing."""
        if self._held is not None:
            remove_placement_group(self._held)
            self._held = None
