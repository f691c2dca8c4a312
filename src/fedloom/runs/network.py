"""What a round would have cost on a planned wireless network: clients stand for devices, in their order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedloom.errors import ConfigError
from fedloom.loop import Record
from fedloom.runs.assemble import Parts


class PlannedNetwork:
    """A fleet with an allocation, addressed by client."""

    def __init__(self, network: Any, device_of: Mapping[str, str]) -> None:
        self.network = network
        self.device_of = device_of

    def round(self, record: Record) -> dict[str, Any]:
        """Simulated seconds and joules by client, beside what the plan predicted: see fedloom.wireless.replay."""
        device = self.device_of
        cost = self.network.round(
            bytes_up={device[k]: up for k, (_, up) in record.per_client.items()},
            bytes_down={device[k]: down for k, (down, _) in record.per_client.items()},
            samples={device[k]: int(m["samples"]) for k, m in record.metrics.items()},
        )
        client = {name: k for k, name in device.items()}
        for table in ("devices", "predicted"):
            cost[table] = {client[name]: row for name, row in cost[table].items()}
        return dict(cost)


def plan(parts: Parts) -> PlannedNetwork:
    """The network of a run's [network] section. Raises ConfigError if its devices are not as many as the clients."""
    try:
        from fedloom.wireless.allocate import Allocation, allocate
        from fedloom.wireless.replay import Network
        from fedloom.wireless.system.fleet import read_fleet
    except ImportError as error:
        raise ConfigError(f"[network] needs the planner ({error}): pip install 'fedloom[wireless]'") from None
    section = parts.config.network
    assert section is not None
    problem = read_fleet(Path(section.fleet)).problem()
    if len(problem.ids) != len(parts.clients):
        raise ConfigError(
            f"network.fleet has {len(problem.ids)} devices, expected one for each of the {len(parts.clients)} clients"
        )
    keep = parts.config.clients.keep
    source = section.allocation or (keep if isinstance(keep, str) else None)
    allocation = allocate(problem, "psca") if source is None else Allocation.from_json(Path(source))
    devices = dict(zip((client.id for client in parts.clients), problem.ids, strict=True))
    return PlannedNetwork(Network.of(problem, allocation), devices)
