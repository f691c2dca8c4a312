"""From a fleet to an allocation: solve, spell out every device's rates, costs and what binds, or say why there is none."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from fedloom.errors import ConfigError, nearest
from fedloom.wireless import diagnosis
from fedloom.wireless.solvers import bandwidth_dual, lagrangian, local_search
from fedloom.wireless.solvers.branch_and_bound import Progress, Solution, Status, branch_and_bound
from fedloom.wireless.system.fleet import Fleet
from fedloom.wireless.system.problem import Problem
from fedloom.wireless.system.radio import Array, Subcarriers

Solver = Literal["bnb", "psca"]

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
    """`latency`, `energy`, `keep = 1`, `keep_min`; nothing where the rate is the best one without limits."""


@dataclass(frozen=True)
class Allocation:
    """Who drops how much, on what share of the band; what it costs; how good it is known to be."""

    devices: tuple[Device, ...]
    mode: Literal["subcarrier", "bandwidth"]
    solver: str
    latency_limit_s: float
    objective: float
    """Phi = empirical + gap."""
    empirical: float
    gap: float
    lower: float
    """No feasible point is worth less (-inf: not known)."""
    upper: float
    """The objective, again, as the other end of the bracket."""
    status: Status
    nodes: int
    """Nodes of the search, or convex problems solved."""
    seconds: float

    @property
    def keep(self) -> dict[str, float]:
        """Keep rate by device id, in the fleet's order."""
        return {device.id: device.keep for device in self.devices}

    @property
    def relative_gap(self) -> float:
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
    solver: Solver = "bnb",
    time_limit_s: float = 60.0,
    seed: int | None = None,
) -> Allocation:
    """The best keep rates and shares of the band: `bnb` proves the optimum, `psca` is fast and proves nothing.

    `seed` draws fading, random devices and starts (default: the fleet's). After the time limit `bnb` returns its best point
    and an honest gap. Raises ConfigError where no point is feasible: which device, which limit, how far it has to move.
    """
    problem = fleet if isinstance(fleet, Problem) else fleet.problem(seed)
    solution = solve(problem, solver, time_limit_s, 0 if seed is None else seed)
    if solution.point is None:
        raise ConfigError(diagnosis.explain(problem, proven=solution.status is Status.INFEASIBLE))
    return describe(problem, solution, solver)


def solve(problem: Problem, solver: Solver = "bnb", time_limit_s: float = 60.0, seed: int = 0) -> Solution[Array]:
    """The search alone: a share, its value and a lower bound. An infeasible problem is a status here, no error."""
    if solver not in get_args(Solver):
        raise ConfigError(f"the solver {solver!r} is unknown, expected bnb or psca{nearest(solver, get_args(Solver))}")
    if not (time_limit_s > 0.0):
        raise ConfigError(f"the time limit is {time_limit_s} s, expected more than 0")
    if diagnosis.alone(problem):
        return Solution(None, np.inf, np.inf, Status.INFEASIBLE, 0, 0.0)
    if not isinstance(problem.link, Subcarriers):
        return _divide_band(problem, solver, time_limit_s, seed)
    if solver == "psca":
        from fedloom.wireless.solvers.mccormick import lone_caps
        from fedloom.wireless.solvers.mccormick import root as nothing_fixed
        from fedloom.wireless.solvers.psca import psca

        lower = float(problem.value_of_caps(lone_caps(problem, nothing_fixed(problem))))
        return psca(problem, seed=seed, time_limit_s=time_limit_s, lower=lower)
    owners = local_search.improve(problem, local_search.greedy(problem))
    value = local_search.value_of(problem, owners)
    start = (value, local_search.share_of(owners, len(problem.ids))) if np.isfinite(value) else None
    if lagrangian.fits(problem):
        tight = lagrangian.ColumnBound(problem)
        return branch_and_bound(lagrangian.root(problem), tight, start=start, time_limit_s=time_limit_s)
    from fedloom.wireless.solvers import mccormick

    loose = mccormick.RelaxationBound(problem)
    return branch_and_bound(
        mccormick.root(problem), loose, start=start, time_limit_s=time_limit_s, tolerance=loose.tolerance
    )


def _divide_band(problem: Problem, solver: Solver, time_limit_s: float, seed: int) -> Solution[Array]:
    quick = bandwidth_dual.sca(problem, seed=seed, time_limit_s=time_limit_s)
    if solver == "psca" or quick.point is None or quick.status is Status.OPTIMAL:
        return quick
    bound = bandwidth_dual.BoxBound(problem)
    left = max(1e-3, time_limit_s - quick.seconds)
    found = branch_and_bound(
        bandwidth_dual.root(problem),
        bound,
        start=(quick.value, quick.point),
        tolerance=bound.tolerance,
        time_limit_s=left,
    )
    trace = (*quick.trace, *(Progress(p.seconds + quick.seconds, p.nodes, p.lower, p.value) for p in found.trace))
    return Solution(
        found.point, found.value, found.lower, found.status, found.nodes, found.seconds + quick.seconds, trace
    )


def describe(problem: Problem, solution: Solution[Array], solver: str, keep: Array | None = None) -> Allocation:
    """A share spelled out, with the best rates under it or with those given (K,)."""
    share = solution.point
    if share is None:
        raise ConfigError("there is no point to describe: the problem is infeasible")
    if keep is None:
        keep = problem.best(problem.caps(share))
    link, rates = problem.link, problem.link.rates(share)
    latency, energy = problem.latency(share, keep), problem.energy(share, keep)
    late, over = problem.excess(share, keep)
    bits = problem.payload_bits(keep)
    whole = isinstance(link, Subcarriers)
    hz = share.sum(axis=1) if whole else share
    devices = []
    for k, name in enumerate(problem.ids):
        held = tuple(int(m) for m in np.flatnonzero(share[k] > 0.5)) if whole else None
        binds = [
            limit
            for limit, tight in (
                ("latency", late[k] > -_BINDING),
                ("energy", over[k] > -_BINDING),
                ("keep = 1", keep[k] >= 1.0),
                ("keep_min", keep[k] <= problem.keep_min * (1.0 + 1e-9)),
            )
            if tight
        ]
        devices.append(
            Device(
                id=name,
                keep=float(keep[k]),
                subcarriers=held,
                bandwidth_hz=float(hz[k]) * (link.spacing_hz if isinstance(link, Subcarriers) else 1.0),
                rate_up_bit_s=float(rates.up[k]),
                rate_down_bit_s=float(rates.down[k]),
                power_w=float(rates.power_w[k]),
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
                binds=tuple(binds),
            )
        )
    value = float(problem.value(keep))
    return Allocation(
        devices=tuple(devices),
        mode="subcarrier" if whole else "bandwidth",
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
