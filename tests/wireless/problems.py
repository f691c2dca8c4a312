"""Small allocation problems, by seed, with limits from slack to so tight that some have no solution."""

from typing import Literal

import numpy as np

from fedloom.wireless.system.empirical_error import Empirical
from fedloom.wireless.system.fleet import random_fleet
from fedloom.wireless.system.generalisation_bound import Gap
from fedloom.wireless.system.problem import Problem

FORMS: tuple[Empirical, ...] = ("linear", "sparsity", "rescaled")
GAPS: tuple[Gap, ...] = ("pooled", "per_device")
LOADS = ((0.3, 0.5), (0.2, 0.3), (0.12, 0.2), (0.15, 9.0), (0.08, 0.3), (0.5, 1.2))
"""(latency, energy): what binds is both, both, both, latency, both, little."""


def small(
    seed: int,
    empirical: Empirical = "linear",
    gap: Gap = "pooled",
    *,
    devices: int = 3,
    subcarriers: int = 5,
    mode: Literal["subcarrier", "bandwidth"] = "subcarrier",
) -> Problem:
    """Devices 3 on 5 subcarriers unless said otherwise; odd seeds without a head, even ones with one."""
    latency, energy = LOADS[seed % len(LOADS)]
    fleet = random_fleet(
        devices,
        subcarriers,
        seed,
        mode=mode,
        empirical=empirical,
        gap=gap,
        latency_load=latency,
        energy_load=energy,
        head_parameters=0 if seed % 2 else 20_000,
    )
    return fleet.problem()


def random_shares(problem: Problem, count: int, seed: int) -> np.ndarray:
    """(count, K, M) binary shares."""
    devices, subcarriers = problem.link.up.shape  # type: ignore[union-attr]
    owners = np.random.default_rng(seed).integers(-1, devices, size=(count, subcarriers))
    return np.asarray(np.arange(devices)[:, None] == owners[:, None, :], dtype=float)
