"""The process group of the workers, on the network by which Ray knows their nodes."""

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig

_TorchBackend: Any = TorchConfig().backend_cls


class NodeTorchConfig(TorchConfig):
    """Ray Train's set-up of torch.distributed, once each worker knows which network it is to use."""

    @property
    def backend_cls(self) -> Any:
        """What Ray Train calls on the workers."""
        return _NodeBackend


class _NodeBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


def choose_interface() -> None:
    """Have Gloo use the interface of the address by which Ray knows this node, unless GLOO_SOCKET_IFNAME is set.

    Gloo goes by the address of the host's own name otherwise, which many systems give as a loopback address: on one
    machine that works, and workers of different machines wait for each other until their time is up.
    """
    address = ray.util.get_node_ip_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
