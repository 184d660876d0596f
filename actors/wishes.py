"""What is asked of a worker group while it trains: a checkpoint before a node goes, an end where more would fit.

One rank that asks is enough: what ranks ask is added to the sums that they exchange at every step anyway.
"""

import time
from collections.abc import Callable
from typing import Any

from shearing.training.config import EngineConfig
from shearing.training.loop import Wish
from shearing.training.phase import Place


class Wishes:
    """Collects what this rank asks for; `now` is asked once a step.

    Args:
        engine: How many workers there may be, and what each takes.
        place: This rank.
        asked_to_leave: Whether the driver wants the workers gone.
        look_every_s: How often one rank looks whether there is room for more workers.
    """

    def __init__(
        self, engine: EngineConfig, place: Place, asked_to_leave: Callable[[], bool], look_every_s: float
    ) -> None:
        self.engine, self.place, self.asked_to_leave, self.look_every_s = engine, place, asked_to_leave, look_every_s
        self.told: set[str] = set()
        self.looked_s = time.monotonic()

    def now(self) -> Wish:
        """What this rank asks for at this step."""
        if self.asked_to_leave():
            return Wish(save=True, leave=True)
        return Wish(save=self._node_goes(), leave=self._room_for_more())

    def _node_goes(self) -> bool:
        """Whether a node was told, since the last step, that it will be taken away."""
        fresh = preempted_nodes() - self.told
        self.told |= fresh
        return bool(fresh)

    def _room_for_more(self) -> bool:
        """Whether the cluster would hold more workers than there are; looked up now and then, by one rank."""
        engine, now_s = self.engine, time.monotonic()
        if self.place.rank or self.place.world >= engine.most_workers or now_s - self.looked_s < self.look_every_s:
            return False
        self.looked_s = now_s
        return room_for(resources_per_worker(engine), free_resources()) > 0


def preempted_nodes() -> set[str]:
    """Nodes of which this rank was told that they will be taken away.

    Ray's public `get_preemption_info` says the same behind a barrier of all ranks in an actor: a wait at every step,
    and for ever where one rank has no need to ask.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    notice = get_train_context().preemption_context.preemption_info
    return set(notice.preempted_node_ids) if notice is not None else set()


def resources_per_worker(engine: EngineConfig) -> dict[str, float]:
    """What Ray sets aside for one worker."""
    return {"CPU": engine.cpus_per_worker} | ({"GPU": engine.gpus_per_worker} if engine.gpus_per_worker else {})


def free_resources() -> list[dict[str, Any]]:
    """What each node has free."""
    from ray._private.state import available_resources_per_node  # the public figure is of the cluster as a whole

    return list(available_resources_per_node().values())


def room_for(worker: dict[str, float], free: list[dict[str, Any]]) -> int:
    """How many workers more would fit, each whole on one node."""
    return sum(int(min(node.get(kind, 0.0) / amount for kind, amount in worker.items()) + 1e-9) for node in free)
