"""From a fleet to an allocation: solve, spell out every device's rates, costs and what binds, or say why there is none."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedloom.errors import ConfigError, nearest
from fedloom.wireless import diagnosis
from fedloom.wireless.solvers.branch_and_bound import Solution, Status
from fedloom.wireless.solvers.registry import SOLVERS
from fedloom.wireless.system.fleet import Fleet
from fedloom.wireless.system.problem import Problem
from fedloom.wireless.system.radio import Array, Mode

VERSION = 1
_BINDING = 1e-6  # relative slack below which a limit counts as binding


@dataclass(frozen=True)
class Device:
    """One device's part of an allocation."""

    id: str
    keep: float
    """1 - dropout rate."""
    subcarriers: tuple[int, ...] | None
    """`subcarrier` mode: indices of those lent to the device."""
    bandwidth_hz: float
    rate_up_bit_s: float
    rate_down_bit_s: float
    power_w: float
    """Transmit power while uploading."""
    payload_bits: float
    """In one direction."""
    down_s: float
    compute_s: float
    up_s: float
    latency_s: float
    transmit_j: float
    compute_j: float
    overhead_j: float
    energy_j: float
    energy_limit_j: float
    binds: tuple[str, ...]
    """Binding constraints: `latency`, `energy`, `keep = 1`, `keep_min`; none where the rate is the best without limits."""


@dataclass(frozen=True)
class Allocation:
    """Per-device dropout rates and bandwidth allocation; what they cost; how good they are known to be."""

    devices: tuple[Device, ...]
    mode: Mode
    solver: str
    latency_limit_s: float
    objective: float
    """Phi = empirical + gap."""
    empirical: float
    gap: float
    """The generalisation gap."""
    lower: float
    """No feasible point is worth less (-inf: not known)."""
    upper: float
    """The objective, again, as the other end of the bracket."""
    status: Status
    nodes: int
    """Of the search tree, or convex problems solved."""
    seconds: float

    @property
    def keep(self) -> dict[str, float]:
        """Keep rate by device id, in the fleet's order."""
        return {device.id: device.keep for device in self.devices}

    @property
    def optimality_gap(self) -> float:
        """(upper - lower) / |upper|."""
        return (self.upper - self.lower) / max(abs(self.upper), 1e-300)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what `allocation.json` holds."""
        out: dict[str, Any] = {"version": VERSION, "keep": self.keep}
        out |= asdict(self)
        out["status"] = self.status.name
        out["lower"] = self.lower if np.isfinite(self.lower) else None
        return out

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> Allocation:
        """Back from plain data. Raises ConfigError for another version or missing parts."""
        if not isinstance(raw, dict) or raw.get("version") != VERSION:
            got = raw.get("version") if isinstance(raw, dict) else type(raw).__name__
            raise ConfigError(
                f"an allocation of version {got!r}, expected {VERSION}: make it anew with fedloom allocate"
            )
        try:
            fields = {name: raw[name] for name in Allocation.__dataclass_fields__}
            devices = tuple(
                Device(**(d | {"binds": tuple(d["binds"]), "subcarriers": _tuple(d["subcarriers"])}))
                for d in raw["devices"]
            )
            lower = -np.inf if raw["lower"] is None else float(raw["lower"])
            return Allocation(**(fields | {"devices": devices, "status": Status[raw["status"]], "lower": lower}))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not an allocation ({error!r}): make it anew with fedloom allocate") from None

    def to_json(self, path: Path | str | None = None) -> str:
        """The JSON text; written to `path` as well if there is one."""
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        if path is not None:
            Path(path).write_text(text)
        return text

    @staticmethod
    def from_json(path: Path | str) -> Allocation:
        """Read `allocation.json`. Raises ConfigError if it is missing or not one."""
        try:
            return Allocation.from_dict(json.loads(Path(path).read_text()))
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist, expected an allocation: make it with fedloom allocate") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path} is not JSON ({error}), expected an allocation: make it with fedloom allocate"
            ) from None


def _tuple(values: list[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)


def allocate(
    fleet: Problem | Fleet,
    solver: str = "bnb",
    time_limit_s: float = 60.0,
    seed: int | None = None,
) -> Allocation:
    """The best keep rates and shares of the band: `bnb` proves the optimum, `psca` is fast and proves nothing.

    `seed` draws fading, random devices and starts (default: the fleet's). After the time limit `bnb` returns its best point
    and its optimality gap. Raises ConfigError where no point is feasible: which device, which limit, how far it has to move.
    """
    problem = fleet if isinstance(fleet, Problem) else fleet.problem(seed)
    solution = solve(problem, solver, time_limit_s, 0 if seed is None else seed)
    if solution.point is None:
        raise ConfigError(diagnosis.explain(problem, proven=solution.status is Status.INFEASIBLE))
    return describe(problem, solution, solver)


def solve(problem: Problem, solver: str = "bnb", time_limit_s: float = 60.0, seed: int = 0) -> Solution[Array]:
    """The search alone: a share, its value and a lower bound. An infeasible problem is a status here, no error."""
    if solver not in SOLVERS:
        known = " or ".join(SOLVERS)
        raise ConfigError(f"the solver {solver!r} is unknown, expected {known}{nearest(solver, SOLVERS)}")
    if not (time_limit_s > 0.0):
        raise ConfigError(f"the time limit is {time_limit_s} s, expected more than 0")
    if diagnosis.infeasible_alone(problem):
        return Solution(None, np.inf, np.inf, Status.INFEASIBLE, 0, 0.0)
    return SOLVERS[solver].by_mode[problem.link.mode](problem, time_limit_s, seed)


def describe(problem: Problem, solution: Solution[Array], solver: str, keep: Array | None = None) -> Allocation:
    """A share spelled out, with the best rates under it or with those given (K,)."""
    share = solution.point
    if share is None:
        raise ConfigError("there is no point to describe: the problem is infeasible")
    if keep is None:
        keep = problem.best(problem.caps(share))
    rates, holdings = problem.link.rates(share), problem.link.holdings(share)
    latency, energy = problem.latency(share, keep), problem.energy(share, keep)
    binding = _binding(problem, share, keep)
    bits = problem.payload_bits(keep)
    devices = tuple(
        Device(
            id=name,
            keep=float(keep[k]),
            subcarriers=holdings[k].subcarriers,
            bandwidth_hz=holdings[k].bandwidth_hz,
            rate_up_bit_s=float(rates.up[k]),
            rate_down_bit_s=float(rates.down[k]),
            power_w=float(rates.transmit_w[k]),
            payload_bits=float(bits[k]),
            down_s=float(latency.down_s[k]),
            compute_s=float(latency.compute_s[k]),
            up_s=float(latency.up_s[k]),
            latency_s=float(latency.total_s[k]),
            transmit_j=float(energy.transmit_j[k]),
            compute_j=float(energy.compute_j[k]),
            overhead_j=float(energy.overhead_j[k]),
            energy_j=float(energy.total_j[k]),
            energy_limit_j=float(problem.energy_limit_j[k]),
            binds=binding[k],
        )
        for k, name in enumerate(problem.ids)
    )
    value = float(problem.value(keep))
    return Allocation(
        devices=devices,
        mode=problem.link.mode,
        solver=solver,
        latency_limit_s=problem.latency_limit_s,
        objective=value,
        empirical=float(problem.bound.empirical_term(keep, problem.samples)),
        gap=float(problem.bound.gap_term(keep, problem.samples)),
        lower=min(float(solution.lower), value),
        upper=value,
        status=solution.status,
        nodes=solution.nodes,
        seconds=solution.seconds,
    )


def _binding(problem: Problem, share: Array, keep: Array) -> list[tuple[str, ...]]:
    """The constraints that are tight for each device."""
    late, over = problem.excess(share, keep)
    tight = {
        "latency": late > -_BINDING,
        "energy": over > -_BINDING,
        "keep = 1": keep >= 1.0,
        "keep_min": keep <= problem.keep_min * (1.0 + 1e-9),
    }
    return [tuple(name for name, at in tight.items() if at[k]) for k in range(len(problem.ids))]
