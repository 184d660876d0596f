import ray
from ray.util import placement_group_table
from ray.util.placement_group import PlacementGroup

from actors.nodes import LEAVING, HeldNodes, count_nodes
from shearing.training.loop import event_report


def held_groups() -> list[dict]:
    return [
        group
        for group in placement_group_table().values()
        if group["state"] != "REMOVED" and list(group["bundles"].values()) == [{"memory": 1.0}]
    ]


def test_nodes_are_held_from_leaving_to_the_next_start(ray_session):
    """Catches a node that an autoscaler takes away as idle while a group of workers starts again for its sake, and one
    that is paid for long after."""
    held = HeldNodes()
    held.follow({"kind": "step", "step": 3})
    assert held_groups() == []
    held.follow(event_report(3, LEAVING, "the workers leave"))
    held.follow(event_report(3, LEAVING, "the workers leave"))
    (group,) = held_groups()
    identity = ray.PlacementGroupID(bytes.fromhex(group["placement_group_id"]))
    assert PlacementGroup(identity).wait(timeout_seconds=60), "one byte of a node's memory is more than it has"
    held.follow({"kind": "start", "step": 3})
    assert held_groups() == []
    held.close()


def test_the_account_of_nodes_stays_when_it_is_asked_again(ray_session):
    """Catches an actor made for each question, of which Ray Train asks only the first."""
    count_nodes()
    first = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
    count_nodes()
    assert ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator") == first
