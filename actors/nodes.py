"""Ray's own account of the nodes, by which Ray Train decides how many workers a group has.

An actor of Ray's, one for the whole cluster, adds up what all who train or read ask for, passes it on to the
autoscaler, and says who may have which nodes. It looks for nodes every 20 s only, and lives and dies with the node of
whoever was the first to ask.
"""

from typing import Any

import ray

COUNTED_WITHIN_S = 60.0


def count_nodes() -> None:
    """Have Ray's account count the nodes of this moment.

    To be called by the driver before any stream is opened: one on a node that is lost later would have taken the actor
    along, and Ray Train's controller asks a dead actor for ever. And before each group, which could come back as small
    as it left.
    """
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator

    account: Any = coordinator.get_or_create_autoscaling_coordinator()
    ray.get(account.get_reserved_resources.remote("shear", recompute=True), timeout=COUNTED_WITHIN_S)
