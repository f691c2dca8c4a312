"""What a round would have cost on a planned wireless network: clients stand for devices, in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.errors import ConfigError
from fedloom.loop import Record
from fedloom.runs.config import RunConfig

if TYPE_CHECKING:  # the planner is optional
    from fedloom.wireless.replay import Network, NetworkRound


def plan(config: RunConfig, ids: Sequence[str]) -> Network:
    """The network of a run's [network] section, by client. Raises ConfigError if it has not a device for each client."""
    try:
        from fedloom.wireless import Allocation, Network, allocate, read_fleet
    except ImportError as error:
        raise ConfigError(f"[network] needs the planner ({error}): pip install 'fedloom[wireless]'") from None
    section, keep = config.network, config.clients.keep
    assert section is not None
    problem = read_fleet(Path(section.fleet)).problem()
    source = section.allocation or (keep if isinstance(keep, str) else None)
    allocation = allocate(problem, "psca") if source is None else Allocation.from_json(Path(source))
    return Network.of(problem, allocation, ids=ids)


def cost(network: Network, record: Record, wire: Mapping[str, int] | None = None) -> NetworkRound:
    """Simulated seconds and joules of a round by client, beside what the plan predicted.

    Bytes are those of every client that was asked, used or not; samples are known of used updates only. `wire` is what an
    engine's messages took in all, `down` and `up`: in bfloat16 or int8 that is less than the tensors are.
    """
    share = {"down": 1.0, "up": 1.0}
    for way, count in (("down", record.down), ("up", record.up)):
        tensors = sum(count.as_dict().values())
        if wire is not None and tensors:
            share[way] = wire[way] / tensors
    return network.round(
        bytes_up={k: round(up * share["up"]) for k, (_, up) in record.per_client.items()},
        bytes_down={k: round(down * share["down"]) for k, (down, _) in record.per_client.items()},
        samples={k: int(m["samples"]) for k, m in record.metrics.items() if k in record.per_client and "samples" in m},
    )
