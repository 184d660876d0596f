"""What machines can do, as constants with units and sources, for forecasts of time. Loads neither torch nor Ray."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field

from shearing.config import Config
from shearing.models.flops import PEAK_BFLOAT16
from shearing.training.config import EngineConfig

GpuName = Literal["A100", "H100", "H200"]

CPU_CORE_FLOPS_PER_S = 4.8e10
"""Reached by one core in float32, everything included: the quickstart's source model, 4,096 tokens in 335 ms on two
workers of one core each (DIARY.md, "What Ray costs beside training"), times its 7.9 MFLOPs a token."""


@dataclass(frozen=True)
class Hardware:
    """One kind of worker, its network and what all workers share. Bandwidths are of one direction.

    `peak_flops_per_s` is dense, `achieved_share` what training reaches of it. `link_bytes_per_s` is between two devices
    of a node, `node_bytes_per_s` between two nodes, all adapters of a node together; collectives reach `wire_share` of
    either. `storage_bytes_per_s` and `feeder_tokens_per_s` are of the whole cluster; a message, of losses or asking for
    sequences, occupies the one actor that answers it for `*_message_s`. None: not known.
    """

    name: str
    peak_flops_per_s: float
    achieved_share: float
    memory_bytes: float | None
    devices_a_node: int
    link_bytes_per_s: float
    node_bytes_per_s: float
    wire_share: float = 0.8
    link_latency_s: float = 5e-6
    node_latency_s: float = 15e-6
    storage_bytes_per_s: float = 2e9
    feeder_tokens_per_s: float = 1.8e7
    feeder_message_s: float = 1.5e-3
    actor_round_trip_s: float = 5e-3
    actor_message_s: float = 1.2e-3

    @property
    def flops_per_s(self) -> float:
        """What training reaches on one device."""
        return self.peak_flops_per_s * self.achieved_share

    def wire_bytes_per_s(self, workers: int) -> float:
        """What each device sends in a ring over all workers: a node's traffic leaves through its adapters once."""
        slowest = self.link_bytes_per_s
        if workers > self.devices_a_node:
            slowest = min(slowest, self.node_bytes_per_s)
        return slowest * self.wire_share

    def ring_latency_s(self, workers: int) -> float:
        """Of one collective: a ring has a hop less than it has workers."""
        between = math.ceil(workers / self.devices_a_node) - 1
        return (workers - 1 - between) * self.link_latency_s + between * self.node_latency_s


GPUS: dict[GpuName, Hardware] = {
    "A100": Hardware("A100", PEAK_BFLOAT16[r"A100"], 0.40, 80e9, 8, link_bytes_per_s=300e9, node_bytes_per_s=200e9),
    "H100": Hardware("H100", PEAK_BFLOAT16[r"H100"], 0.40, 80e9, 8, link_bytes_per_s=450e9, node_bytes_per_s=400e9),
    "H200": Hardware("H200", PEAK_BFLOAT16[r"H200|GH200"], 0.40, 141e9, 8, 450e9, node_bytes_per_s=400e9),
}
"""SXM cards in nodes of eight. Peaks, memory and NVLink from the maker's data sheets (both ways, A100: 600 GB/s, H100
and H200: 900), nodes with one InfiniBand adapter a card (HDR 200 Gbit/s; NDR 400)."""

ETHERNET_NODE_BYTES_PER_S = 12.5e9
"""100 Gbit/s, one adapter a node."""

CPU_CORE = Hardware(
    "CPU core", CPU_CORE_FLOPS_PER_S, 1.0, None, 1, math.inf, math.inf, link_latency_s=0.0, node_latency_s=0.0,
    storage_bytes_per_s=2e8, actor_round_trip_s=5e-3,
)  # fmt: skip
"""Communication between workers of one machine is inside the measured rate; between machines it is not known."""

SOURCES = {
    "achieved_share": "assumption; published runs: 38 to 46 % (arXiv 2204.02311, table 3; 2407.21783, section 3.3)",
    "wire_share": "assumption, usual for NCCL's large messages",
    "link_latency_s": "assumption",
    "node_latency_s": "assumption",
    "storage_bytes_per_s": "assumption, a mid-sized shared file system; of a CPU machine one disk",
    "feeder_tokens_per_s": "measured on two CPU cores and a local disk: python benchmarks/streams.py --rates 0",
    "feeder_message_s": "measured on two CPU cores: python benchmarks/scaling.py actor",
    "actor_round_trip_s": "assumption, of an idle network",
    "actor_message_s": "measured on two CPU cores: python benchmarks/scaling.py actor",
}
"""Where constants come from that no data sheet gives."""


class HardwareConfig(Config):
    """What `--plan` reckons with in place of its own constants. A run does not depend on it."""

    device: GpuName | None = Field(None, description="Default: each that is known, or a measured CPU core")
    achieved_share: float | None = Field(None, gt=0, le=1, description="Of the device's peak, in training")
    memory_bytes: float | None = Field(None, gt=0, description="Of one device")
    devices_a_node: int | None = Field(None, ge=1)
    link_bytes_per_s: float | None = Field(None, gt=0, description="Between devices of a node, one direction")
    node_bytes_per_s: float | None = Field(None, gt=0, description="Between nodes, one direction")
    storage_bytes_per_s: float | None = Field(None, gt=0, description="Of the workspace, all writers together")
    feeder_tokens_per_s: float | None = Field(None, gt=0, description="Of all streams together")
    feeder_message_s: float | None = Field(None, gt=0, description="Of the feeder, for one worker's request")
    actor_message_s: float | None = Field(None, gt=0, description="Of the domain-weight actor, for one worker's losses")


def hardware_for(engine: EngineConfig, config: HardwareConfig | None) -> list[Hardware]:
    """The kinds of worker to reckon with: one where it is known, else each GPU of the table.

    None where no constant is known: float32 on GPUs, bfloat16 on CPUs.
    """
    on_gpu = engine.gpus_per_worker > 0
    if on_gpu != (engine.dtype == "bfloat16"):
        return []
    given = config.model_dump(exclude_none=True) if config is not None else {}
    device: GpuName | None = given.pop("device", None)
    if on_gpu:
        return [replace(gpu, **given) for gpu in ([GPUS[device]] if device else GPUS.values())]
    threads = max(1, int(engine.cpus_per_worker))
    worker = replace(CPU_CORE, name=f"{threads} CPU cores" if threads > 1 else "CPU core")
    return [replace(worker, peak_flops_per_s=threads * CPU_CORE_FLOPS_PER_S, **given)]
