from types import SimpleNamespace

import pytest
import torch

from actors import wishes
from actors.wishes import Wishes, room_for
from shearing.training.config import EngineConfig
from shearing.training.loop import Wish
from shearing.training.phase import Place


@pytest.fixture
def cluster(monkeypatch):
    """What Ray would say of the cluster; a test changes it."""
    state = SimpleNamespace(going=set(), free=[])
    monkeypatch.setattr(wishes, "preempted_nodes", lambda: state.going)
    monkeypatch.setattr(wishes, "free_resources", lambda: state.free)
    return state


def some_wishes(rank=0, world=2, workers=None, asked=False, look_every_s=0.0):
    engine = EngineConfig(workers=workers or {"min": 1, "max": 4}, cpus_per_worker=2)
    return Wishes(engine, Place(rank, world, torch.device("cpu")), lambda: asked, look_every_s)


def test_room_is_counted_in_whole_workers_on_one_node():
    """Catches CPUs of several nodes added up to a worker that no node can hold, and a resource that a node lacks."""
    worker = {"CPU": 2.0, "GPU": 1.0}
    assert room_for(worker, [{"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}]) == 0
    assert room_for(worker, [{"CPU": 5.0, "GPU": 8.0}, {"CPU": 16.0, "GPU": 1.0}, {"CPU": 64.0}]) == 3


def test_a_node_that_goes_is_told_once(cluster):
    """Catches a checkpoint at every step from the notice to the node's end."""
    asking = some_wishes()
    assert asking.now() == Wish()
    cluster.going = {"a"}
    assert [asking.now() for _ in range(3)] == [Wish(save=True), Wish(), Wish()]
    cluster.going = {"a", "b"}
    assert asking.now() == Wish(save=True)


def test_room_for_more_ends_the_group_after_its_next_checkpoint(cluster):
    """Catches a group that grows beyond its limit, and ranks that all ask the cluster."""
    cluster.free = [{"CPU": 3.0}]
    assert some_wishes().now() == Wish(leave=True)
    assert some_wishes(rank=1).now() == Wish()
    assert some_wishes(world=4).now() == Wish()
    assert some_wishes(workers=2).now() == Wish()
    assert some_wishes(look_every_s=3600.0).now() == Wish()
    cluster.free = [{"CPU": 1.5}]
    assert some_wishes().now() == Wish()


def test_a_driver_that_stops_is_given_a_checkpoint_at_once(cluster):
    assert some_wishes(asked=True).now() == Wish(save=True, leave=True)
