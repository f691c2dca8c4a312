"""A planned network, driven by what a run really sends and really computes: simulated seconds and joules a round.

The channel and the allocation are fixed; bytes and samples are the run's own, so the result holds for any method, with or
without dropout. Equations (32)-(34), numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from fedloom.errors import ConfigError, nearest
from fedloom.wireless.allocate import Allocation
from fedloom.wireless.system import radio
from fedloom.wireless.system.fleet import Fleet
from fedloom.wireless.system.problem import Problem
from fedloom.wireless.system.radio import Array, Holding, Rates


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
    allocation: Allocation
    rates: Rates
    keep: Array

    @staticmethod
    def of(fleet: Fleet | Problem, allocation: Allocation, seed: int | None = None) -> Network:
        """From the fleet that was allocated for. Raises ConfigError if their devices or modes differ."""
        problem = fleet if isinstance(fleet, Problem) else fleet.problem(seed)
        ids = tuple(device.id for device in allocation.devices)
        if ids != problem.ids:
            raise ConfigError(
                f"the allocation is for the devices {', '.join(ids)}, expected those of the fleet, {', '.join(problem.ids)}: "
                "allocate again for this fleet"
            )
        if problem.link.mode != allocation.mode:
            raise ConfigError(
                f"the allocation is in {allocation.mode} mode, the fleet is not: allocate again for this fleet"
            )
        share = problem.link.share_of_holdings(
            [Holding(device.subcarriers, device.bandwidth_hz) for device in allocation.devices]
        )
        keep = np.array([device.keep for device in allocation.devices])
        return Network(problem, allocation, problem.link.rates(share), keep)

    def round(
        self, bytes_up: Mapping[str, int], bytes_down: Mapping[str, int], samples: Mapping[str, int]
    ) -> NetworkRound:
        """Cost of one round for the devices in `samples`.

        `samples` are those really trained on, counted once for every pass over them (local steps times batch size). Raises
        ConfigError for a device that the fleet does not have.
        """
        taking_part = list(samples)
        for name in {*samples, *bytes_up, *bytes_down}:
            if name not in self.problem.ids:
                known = ", ".join(self.problem.ids)
                raise ConfigError(
                    f"the fleet has no device {name!r}{nearest(name, self.problem.ids)}: give every client a device "
                    f"of its own id (the fleet has {known})"
                )
        count = len(self.problem.ids)
        up, down, work = np.zeros(count), np.zeros(count), np.zeros(count)
        for k, name in enumerate(self.problem.ids):
            up[k], down[k] = 8.0 * bytes_up.get(name, 0), 8.0 * bytes_down.get(name, 0)
            work[k] = samples.get(name, 0)
        passes = work / self.problem.planned_samples
        compute = self.problem.compute
        seconds = radio.latency(self.rates, down, up, passes * compute.seconds(self.keep))
        joules = radio.energy(self.rates, up, passes * compute.joules(self.keep), compute.overhead_j)
        devices = {}
        for name in taking_part:
            k = self.problem.ids.index(name)
            total_s, total_j = float(seconds.total_s[k]), float(joules.total_j[k])
            devices[name] = DeviceRound(
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
        planned = {device.id: device for device in self.allocation.devices}
        predicted = {
            name: Predicted(seconds=planned[name].latency_s, joules=planned[name].energy_j) for name in taking_part
        }
        return NetworkRound(
            seconds=max((device["seconds"] for device in devices.values()), default=0.0),
            joules=sum(device["joules"] for device in devices.values()),
            devices=devices,
            predicted_seconds=max((plan["seconds"] for plan in predicted.values()), default=0.0),
            predicted_joules=sum(plan["joules"] for plan in predicted.values()),
            predicted=predicted,
        )
