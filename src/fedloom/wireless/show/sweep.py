"""The curves E3-E9: the bound's shape, what limits and band cost for every strategy, and how the solvers behave.

Each sweep is a table (a CSV next to its PNG): (x, curve, value, lower end, upper end). Means over seeds, with the 10th to 90th
percentile between the ends where there is more than one seed. Experiments of the project's specification, 9.3; trends, not
the paper's numbers, which were not available.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedloom.wireless.allocate import solve
from fedloom.wireless.solvers.baselines import BASELINES, baseline
from fedloom.wireless.solvers.registry import SOLVERS
from fedloom.wireless.system.fleet import Fleet, random_fleet
from fedloom.wireless.system.generalisation_bound import Bound
from fedloom.wireless.system.problem import Problem
from fedloom.wireless.system.radio import Array

LABELS = {
    "bnb": "optimum (branch and bound)",
    "psca": "P-SCA",
    "uniform": "uniform rate",
    "equal": "equal subcarriers",
    "greedy": "greedy",
    "random": "random rates",
    "no_dropout": "no dropout",
}
_STRATEGIES = (*SOLVERS, *BASELINES)


class Row(NamedTuple):
    """One point of one curve."""

    x: float
    curve: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Sweep:
    """A figure's data."""

    name: str
    title: str
    x_label: str
    y_label: str
    rows: tuple[Row, ...]
    log_y: bool = False
    upper_panel: tuple[str, ...] = ()
    """Curves of another unit, drawn above the others."""
    upper_label: str = ""
    x_ticks: tuple[float, ...] | None = None
    """Where x is a count."""


def bound_shape(bound: Bound | None = None, samples: Sequence[int] = (500, 1000, 2000, 4000)) -> Sweep:
    """E3: Phi over one common dropout rate for several n, each curve's minimum marked, with the two parts for one n."""
    bound = bound or Bound()
    rows = []
    rates = np.linspace(0.0, 0.95, 96)
    for n in samples:
        size = np.array([float(n)])
        values = bound.value((1.0 - rates)[:, None], size)
        rows += [
            Row(float(g), f"bound, n = {n}", float(v), float(v), float(v)) for g, v in zip(rates, values, strict=True)
        ]
    middle = np.array([float(samples[len(samples) // 2])])
    for label, part in (("empirical part", bound.empirical_term), (f"gap part, n = {middle[0]:.0f}", bound.gap_term)):
        values = part((1.0 - rates)[:, None], middle)
        rows += [Row(float(g), label, float(v), float(v), float(v)) for g, v in zip(rates, values, strict=True)]
    for n in samples:
        best = bound.best(np.ones(1), np.array([float(n)]), 0.05)
        value = float(bound.value(best, np.array([float(n)])))
        rows.append(Row(1.0 - float(best[0]), "minimum", value, value, value))
    title = f"The bound over the dropout rate ({bound.empirical} empirical part)"
    return Sweep("E3_bound_shape", title, "dropout rate of every device", "bound", tuple(rows))


def strategies(
    name: str,
    title: str,
    x_label: str,
    points: Iterable[tuple[float, Callable[[int], Problem]]],
    *,
    seeds: int,
    time_limit_s: float = 10.0,
    counts: bool = False,
) -> Sweep:
    """Phi of every strategy at each x, over the problems that `make(seed)` gives.

    Points of x where the optimum itself serves fewer than half of the seeds are left out. Means are over the same seeds
    everywhere: those that the optimum serves at every x that is left; a strategy has a point where it serves them all.
    """
    xs, tables = [], []
    for x, make in points:
        problems = [make(seed) for seed in range(seeds)]
        table = {c: [_value(p, c, seed, time_limit_s) for seed, p in enumerate(problems)] for c in _STRATEGIES}
        if 2 * np.isfinite(table["bnb"]).sum() >= seeds:
            xs.append(x)
            tables.append(table)
    if not tables:
        return Sweep(name, f"{title} (no limit that was tried serves the fleets)", x_label, "bound", ())
    common = np.isfinite([table["bnb"] for table in tables]).all(axis=0)
    rows = []
    for x, table in zip(xs, tables, strict=True):
        for curve, values in table.items():
            of_common = np.array(values)[common]
            if len(of_common) and np.isfinite(of_common).all():
                low, high = np.percentile(of_common, [10, 90])
                rows.append(Row(x, LABELS[curve], float(of_common.mean()), float(low), float(high)))
    never = [label for label in LABELS.values() if label not in {row.curve for row in rows}]
    title += f" (breaks a limit on some fleet: {', '.join(never)})" if never else ""
    return Sweep(name, title, x_label, "bound", tuple(rows), x_ticks=tuple(xs) if counts else None)


def _value(problem: Problem, curve: str, seed: int, time_limit_s: float) -> float:
    if curve in SOLVERS:
        return solve(problem, curve, time_limit_s, seed).value
    return baseline(problem, curve, seed)[0].value


def latency_sweep(base: Callable[[int], Problem], seeds: int, factors: Sequence[float]) -> Sweep:
    """E4: Phi against the latency limit."""
    limit = base(0).latency_limit_s
    points = [(f * limit, _scaled(base, f, 1.0, limit)) for f in factors]
    return strategies(
        "E4_latency", "What a tighter latency limit costs", "latency limit of a round (s)", points, seeds=seeds
    )


def _scaled(base: Callable[[int], Problem], slower: float, richer: float, limit_s: float) -> Callable[[int], Problem]:
    def make(seed: int) -> Problem:
        return replace(base(seed).with_limits(energy_factor=richer), latency_limit_s=slower * limit_s)

    return make


def energy_sweep(base: Callable[[int], Problem], seeds: int, factors: Sequence[float]) -> Sweep:
    """E5: Phi against the energy left for sending: the limit above what computing and the rest need anyway, times a factor."""
    first = base(0)

    def radio_j(problem: Problem) -> Array:
        fixed = problem.compute.joules(np.ones(len(problem.ids))) + problem.compute.overhead_j
        return np.asarray(np.maximum(problem.energy_limit_j - fixed, 1e-3 * problem.energy_limit_j))

    def at(factor: float) -> Callable[[int], Problem]:
        def make(seed: int) -> Problem:
            problem = base(seed)
            left = radio_j(problem)
            return replace(problem, energy_limit_j=problem.energy_limit_j + (factor - 1.0) * left)

        return make

    unit = float(np.median(radio_j(first)))
    points = [(1e3 * f * unit, at(f)) for f in factors]
    label = "energy of a round left for sending (mJ, median device)"
    return strategies("E5_energy", "What a tighter energy limit costs", label, points, seeds=seeds)


def band_sweep(make: Callable[[int, int], Problem], seeds: int, counts: Sequence[int]) -> Sweep:
    """E6: Phi against the number of subcarriers; `make(subcarriers, seed)`."""
    points = [(float(m), _second(make, m)) for m in counts]
    return strategies("E6_band", "What more band buys", "subcarriers of 1 MHz", points, seeds=seeds, counts=True)


def devices_sweep(make: Callable[[int, int], Problem], seeds: int, counts: Sequence[int]) -> Sweep:
    """E7: Phi against the number of devices on the same band; `make(devices, seed)`."""
    points = [(float(k), _second(make, k)) for k in counts]
    return strategies(
        "E7_devices", "More devices on the same band and data", "devices", points, seeds=seeds, counts=True
    )


def _second(make: Callable[[int, int], Problem], count: int) -> Callable[[int], Problem]:
    return lambda seed: make(count, seed)


def convergence(problem: Problem, zetas: Sequence[float] = (0.0, 0.1, 1.0), iterations: int = 10) -> Sweep:
    """E8: P-SCA's penalised objective, phase by phase of fixed zeta, and how binary the shares are."""
    from fedloom.wireless.solvers.psca import Surrogate, iterate
    from fedloom.wireless.solvers.reciprocal import Reciprocal

    rng = np.random.default_rng([0, 8])
    scaled = Reciprocal.of(problem)
    start = rng.dirichlet(np.full(len(problem.ids), 2.0), size=scaled.up.shape[1]).T
    path = iterate(problem, Surrogate(scaled), start, rng, zetas=[z for z in zetas for _ in range(iterations)])
    fractional = "largest rho - rho^2"
    rows = []
    for step, point in enumerate(path, start=1):
        rows.append(Row(step, f"objective, zeta = {point.zeta:g}", point.objective, point.objective, point.objective))
        fraction = point.fraction
        rows.append(Row(step, fractional, fraction, fraction, fraction))
    title = "P-SCA: the penalised objective falls for fixed zeta, shares turn binary"
    return Sweep(
        "E8_convergence",
        title,
        "iteration",
        "penalised objective",
        tuple(rows),
        upper_panel=(fractional,),
        upper_label="0 = binary",
    )


def run_time(
    make: Callable[[int, int], Problem], seeds: int, counts: Sequence[int], time_limit_s: float = 60.0
) -> tuple[Sweep, Sweep]:
    """E9: seconds of both solvers over the number of subcarriers, and P-SCA's distance from the optimum."""
    rows, gaps = [], []
    for m in counts:
        taken: dict[str, list[float]] = {"bnb": [], "psca": []}
        distance = []
        for seed in range(seeds):
            problem = make(m, seed)
            values = {}
            for solver in ("bnb", "psca"):
                began = time.perf_counter()
                values[solver] = _value(problem, solver, seed, time_limit_s)
                taken[solver].append(time.perf_counter() - began)
            if np.isfinite(values["bnb"]):
                distance.append(100.0 * (values["psca"] / values["bnb"] - 1.0))
        for solver, seconds in taken.items():
            low, high = np.percentile(seconds, [10, 90])
            rows.append(Row(m, LABELS[solver], float(np.median(seconds)), float(low), float(high)))
        if distance:
            for label, share in (("median", 50), ("95th percentile", 95)):
                value = float(np.percentile(distance, share))
                gaps.append(Row(m, label, value, value, value))
    ticks = tuple(float(m) for m in counts)
    times = Sweep(
        "E9_run_time", "Run time, 4 devices", "subcarriers", "seconds (median)", tuple(rows), log_y=True, x_ticks=ticks
    )
    distances = Sweep(
        "E9_gap", "P-SCA above the optimum, 4 devices", "subcarriers", "gap (%)", tuple(gaps), x_ticks=ticks
    )
    return times, distances


def all_sweeps(fleet: Fleet | None = None, seed: int | None = None, *, quick: bool = False) -> Iterable[Sweep]:
    """E3-E9, one after the other. With a fleet, E3-E5 and E8 are of that fleet; the others need fleets of many sizes."""
    seeds = 2 if quick else 10

    def drawn(devices: int, subcarriers: int, number: int) -> Problem:
        return random_fleet(devices, subcarriers, number, latency_load=0.25, energy_load=1.0).problem()

    def fixed(devices: int, subcarriers: int, number: int) -> Problem:
        """Limits, data in all and computing time (1 s) do not depend on the size, so that only the band is shared by more."""
        free = random_fleet(devices, subcarriers, number)
        each = round(1600 / devices)
        share = {"energy_j": None, "samples": each, "compute_flop_per_s": each * free.model.base_flop_per_sample}
        listed = [d.model_copy(update=share) for d in free.devices()]
        limits = free.limits.model_copy(update={"latency_s": 1.9, "energy_j": 20.0})
        return free.model_copy(update={"device": listed, "limits": limits}).problem()

    def base(number: int) -> Problem:
        return drawn(4, 10, number) if fleet is None else fleet.problem(seed)

    single = seeds if fleet is None else 1
    yield bound_shape(None if fleet is None else base(0).bound)
    factors = (0.8, 1.0, 1.5, 3.0) if quick else (0.65, 0.7, 0.75, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0)
    yield latency_sweep(base, single, factors)
    yield energy_sweep(base, single, (0.5, 1.0, 2.0) if quick else (0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.0))
    yield band_sweep(lambda m, s: fixed(4, m, s), seeds, (6, 10) if quick else (4, 5, 6, 7, 8, 10, 12, 14, 16))
    yield devices_sweep(lambda k, s: fixed(k, 12, s), seeds, (2, 4) if quick else (2, 3, 4, 5, 6, 7, 8))
    if base(0).link.mode == "subcarrier":
        yield convergence(base(0))
    yield from run_time(lambda m, s: drawn(4, m, s), seeds, (4, 6) if quick else (4, 5, 6, 7, 8, 10, 12, 14, 16))


def draw_all(out: Path, fleet: Fleet | None = None, seed: int | None = None, *, quick: bool = False) -> list[Path]:
    """Every sweep as PNG and CSV in the folder `out`; the pictures' paths."""
    out.mkdir(parents=True, exist_ok=True)
    return [write(sweep, out) for sweep in all_sweeps(fleet, seed, quick=quick)]


def write(sweep: Sweep, out: Path) -> Path:
    """`NAME.csv` and `NAME.png` in `out`; the picture's path."""
    with (out / f"{sweep.name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(sweep.rows)
    from fedloom.wireless.show.figures import draw

    return draw(sweep, out / f"{sweep.name}.png")
