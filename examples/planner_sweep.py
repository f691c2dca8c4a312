"""How the planner behaves: limits, band, number of devices, convergence and run time, each as a PNG and a CSV.

python examples/planner_sweep.py DIR [--fleet FLEET.toml] [--quick]

With a fleet the limits and the convergence are that fleet's, as in `fedloom allocate --sweep`; what needs fleets of many
sizes is drawn by seed.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from fedloom.wireless import Fleet, Problem, random_fleet, read_fleet
from fedloom.wireless.show import curves
from fedloom.wireless.show.curves import LABELS, Row, Sweep
from fedloom.wireless.show.figures import write
from fedloom.wireless.solvers.psca import Surrogate, iterate
from fedloom.wireless.solvers.reciprocal import Reciprocal

Make = Callable[[int, int], Problem]
"""A problem of a size, by seed."""


def limited(devices: int, subcarriers: int, seed: int) -> Problem:
    """A fleet whose limits bind, whatever its size."""
    return random_fleet(devices, subcarriers, seed, latency_load=0.25, energy_load=1.0).problem()


def same_limits(devices: int, subcarriers: int, seed: int) -> Problem:
    """Limits, data in all and computing time (1 s) do not depend on the size, so that only the band is shared by more."""
    free = random_fleet(devices, subcarriers, seed)
    each = round(1600 / devices)
    share = {"energy_j": None, "samples": each, "compute_flop_per_s": each * free.model.base_flop_per_sample}
    listed = [d.model_copy(update=share) for d in free.devices()]
    limits = free.limits.model_copy(update={"latency_s": 1.9, "energy_j": 20.0})
    return free.model_copy(update={"device": listed, "limits": limits}).problem()


def sizes(make: Make, counts: Sequence[int], seeds: int) -> list[tuple[float, list[Problem]]]:
    """For each size, the problems of all seeds."""
    return [(float(count), [make(count, seed) for seed in range(seeds)]) for count in counts]


def band_sweep(make: Make, seeds: int, counts: Sequence[int]) -> Sweep:
    """Phi against the number of subcarriers."""
    points = sizes(make, counts, seeds)
    return curves.strategies("band", "What more band buys", "subcarriers of 1 MHz", points, counts=True)


def devices_sweep(make: Make, seeds: int, counts: Sequence[int]) -> Sweep:
    """Phi against the number of devices on the same band."""
    points = sizes(make, counts, seeds)
    return curves.strategies("devices", "More devices on the same band and data", "devices", points, counts=True)


def convergence(problem: Problem, zetas: Sequence[float] = (0.0, 0.1, 1.0), iterations: int = 10) -> Sweep:
    """P-SCA's penalised objective, phase by phase of fixed zeta, and how binary the shares are."""
    rng = np.random.default_rng([0, 8])
    scaled = Reciprocal.of(problem)
    start = rng.dirichlet(np.full(len(problem.ids), 2.0), size=scaled.up.shape[1]).T
    path = iterate(problem, Surrogate(scaled), start, rng, zetas=[z for z in zetas for _ in range(iterations)])
    fractional = "largest rho - rho^2"
    rows = []
    for step, point in enumerate(path, start=1):
        rows.append(Row(step, f"objective, zeta = {point.zeta:g}", point.objective, point.objective, point.objective))
        rows.append(Row(step, fractional, point.fraction, point.fraction, point.fraction))
    return Sweep(
        "convergence",
        "P-SCA: the penalised objective falls for fixed zeta, shares turn binary",
        "iteration",
        "penalised objective",
        tuple(rows),
        upper_panel=(fractional,),
        upper_label="0 = binary",
    )


def run_time(make: Make, seeds: int, counts: Sequence[int], time_limit_s: float = 60.0) -> tuple[Sweep, Sweep]:
    """Seconds of both solvers over the number of subcarriers, and P-SCA's distance from the optimum."""
    rows, gaps = [], []
    for m in counts:
        taken: dict[str, list[float]] = {"bnb": [], "psca": []}
        distance = []
        for seed in range(seeds):
            problem = make(m, seed)
            values = {}
            for solver in taken:
                began = time.perf_counter()
                values[solver] = curves.value_of(solver, problem, seed, time_limit_s)
                taken[solver].append(time.perf_counter() - began)
            if np.isfinite(values["bnb"]):
                distance.append(100.0 * (values["psca"] / values["bnb"] - 1.0))
        for solver, seconds in taken.items():
            low, high = np.percentile(seconds, [10, 90])
            rows.append(Row(m, LABELS[solver], float(np.median(seconds)), float(low), float(high)))
        if distance:
            for label, percent in (("median", 50), ("95th percentile", 95)):
                value = float(np.percentile(distance, percent))
                gaps.append(Row(m, label, value, value, value))
    ticks, x = tuple(float(m) for m in counts), "subcarriers"
    times = Sweep("run_time", "Run time, 4 devices", x, "seconds (median)", tuple(rows), log_y=True, x_ticks=ticks)
    title = "P-SCA above the optimum, 4 devices"
    return times, Sweep("optimality_gap", title, x, "optimality gap (%)", tuple(gaps), x_ticks=ticks)


def all_sweeps(fleet: Fleet | None = None, *, quick: bool = False) -> Iterator[Sweep]:
    """All of them, one after the other."""
    seeds = 2 if quick else 10
    problems = [limited(4, 10, seed) for seed in range(seeds)] if fleet is None else [fleet.problem()]
    yield curves.bound_shape(problems[0].bound)
    yield curves.latency_sweep(problems, (0.8, 1.0, 1.5, 3.0) if quick else curves.LATENCY_FACTORS)
    yield curves.energy_sweep(problems, (0.5, 1.0, 2.0) if quick else curves.ENERGY_FACTORS)
    counts = (4, 5, 6, 7, 8, 10, 12, 14, 16)
    yield band_sweep(lambda m, seed: same_limits(4, m, seed), seeds, (6, 10) if quick else counts)
    yield devices_sweep(lambda k, seed: same_limits(k, 12, seed), seeds, (2, 4) if quick else (2, 3, 4, 5, 6, 7, 8))
    if problems[0].link.mode == "subcarrier":
        yield convergence(problems[0])
    yield from run_time(lambda m, seed: limited(4, m, seed), seeds, (4, 6) if quick else counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument("--fleet", type=Path)
    parser.add_argument("--quick", action="store_true", help="two seeds and few points")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    for sweep in all_sweeps(None if asked.fleet is None else read_fleet(asked.fleet), quick=asked.quick):
        print(write(sweep, asked.out), flush=True)


if __name__ == "__main__":
    main()
