"""A planned network, driven by what a run really sends and really computes: simulated seconds and joules a round.

The channel and the allocation are fixed; bytes and samples are the run's own, so the result holds for any method, with or
without dropout. Equations (32)-(34), numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from fedloom.errors import ConfigError, nearest
from fedloom.wireless.allocate import Allocation
from fedloom.wireless.system import radio
from fedloom.wireless.system.fleet import Fleet
from fedloom.wireless.system.problem import Problem
from fedloom.wireless.system.radio import Array, Energy, Holding, Latency, Rates


class DeviceRound(TypedDict):
    """One device in one round; seconds and joules."""

    seconds: float
    down_s: float
    compute_s: float
    up_s: float
    joules: float
    transmit_j: float
    compute_j: float
    overhead_j: float
    late: bool
    """Over the plan's latency limit."""
    over: bool
    """Over the device's energy limit."""


class Predicted(TypedDict):
    """What the plan says of a device's round."""

    seconds: float
    joules: float


class NetworkRound(TypedDict):
    """One round: the slowest device sets its seconds, joules add up."""

    seconds: float
    joules: float
    devices: dict[str, DeviceRound]
    predicted_seconds: float
    predicted_joules: float
    predicted: dict[str, Predicted]


@dataclass(frozen=True)
class Network:
    """Rates and costs of every device under one allocation. Build it with `Network.of`."""

    problem: Problem
    ids: tuple[str, ...]
    """What the devices are called in a round, in the fleet's order: their own ids, or those of the clients they stand for."""
    rates: Rates
    keep: Array
    predicted: tuple[Predicted, ...]

    @staticmethod
    def of(
        fleet: Fleet | Problem, allocation: Allocation, seed: int | None = None, *, ids: Sequence[str] | None = None
    ) -> Network:
        """From the fleet that was allocated for. Raises ConfigError if devices, modes or the number of `ids` differ."""
        problem = fleet if isinstance(fleet, Problem) else fleet.problem(seed)
        planned = tuple(device.id for device in allocation.devices)
        if planned != problem.ids:
            raise ConfigError(
                f"the allocation is for the devices {', '.join(planned)}, expected those of the fleet, "
                f"{', '.join(problem.ids)}: allocate again for this fleet"
            )
        if problem.link.mode != allocation.mode:
            raise ConfigError(
                f"the allocation is in {allocation.mode} mode, the fleet is not: allocate again for this fleet"
            )
        names = problem.ids if ids is None else tuple(ids)
        if len(names) != len(problem.ids):
            raise ConfigError(
                f"the fleet has {len(problem.ids)} devices, expected one for each of the {len(names)} clients: "
                "give another fleet, or as many clients"
            )
        share = problem.link.share_of_holdings(
            [Holding(device.subcarriers, device.bandwidth_hz) for device in allocation.devices]
        )
        keep = np.array([device.keep for device in allocation.devices])
        predicted = tuple(Predicted(seconds=d.latency_s, joules=d.energy_j) for d in allocation.devices)
        return Network(problem, names, problem.link.rates(share), keep, predicted)

    def round(
        self, bytes_up: Mapping[str, int], bytes_down: Mapping[str, int], samples: Mapping[str, int]
    ) -> NetworkRound:
        """Cost of one round for the devices that are in any of the three.

        `samples` are those really trained on, counted once for every pass over them (local steps times batch size). A device
        that is not in it, since its update was refused or never came, costs what crossed and its overhead; what it computed
        is not known and counts as nothing. Raises ConfigError for a device that the fleet does not have.
        """
        taking_part = list(dict.fromkeys([*bytes_down, *bytes_up, *samples]))
        for name in taking_part:
            if name not in self.ids:
                raise ConfigError(
                    f"the fleet has no device {name!r}{nearest(name, self.ids)}: give every client a device "
                    f"of its own id (the fleet has {', '.join(self.ids)})"
                )
        down = 8.0 * np.array([float(bytes_down.get(name, 0)) for name in self.ids])
        up = 8.0 * np.array([float(bytes_up.get(name, 0)) for name in self.ids])
        work = np.array([float(samples.get(name, 0)) for name in self.ids])
        passes, compute = work / self.problem.planned_samples, self.problem.compute
        seconds = radio.latency(self.rates, down, up, passes * compute.seconds(self.keep))
        joules = radio.energy(self.rates, up, passes * compute.joules(self.keep), compute.overhead_j)
        devices = {name: self._device(self.ids.index(name), seconds, joules) for name in taking_part}
        predicted = {name: self.predicted[self.ids.index(name)] for name in taking_part}
        return NetworkRound(
            seconds=max((device["seconds"] for device in devices.values()), default=0.0),
            joules=sum(device["joules"] for device in devices.values()),
            devices=devices,
            predicted_seconds=max((plan["seconds"] for plan in predicted.values()), default=0.0),
            predicted_joules=sum(plan["joules"] for plan in predicted.values()),
            predicted=predicted,
        )

    def _device(self, k: int, seconds: Latency, joules: Energy) -> DeviceRound:
        total_s, total_j = float(seconds.total_s[k]), float(joules.total_j[k])
        return DeviceRound(
            seconds=total_s,
            down_s=float(seconds.down_s[k]),
            compute_s=float(seconds.compute_s[k]),
            up_s=float(seconds.up_s[k]),
            joules=total_j,
            transmit_j=float(joules.transmit_j[k]),
            compute_j=float(joules.compute_j[k]),
            overhead_j=float(joules.overhead_j[k]),
            late=bool(total_s > self.problem.latency_limit_s * (1.0 + 1e-9)),
            over=bool(total_j > self.problem.energy_limit_j[k] * (1.0 + 1e-9)),
        )
