"""Does wireless planning reach its targets? Random fleets by seed, every empirical form; prints measured numbers.

    python benchmarks/wireless.py            # 50 fleets a size and form, about an hour on one core
    python benchmarks/wireless.py --quick    # 6 fleets, a few minutes

Limits run from slack to so tight that some fleets have no solution; odd seeds send no task head, even ones a small one.
Timings are of this machine while it does whatever else it does.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np

from fedloom.wireless.allocate import solve
from fedloom.wireless.solvers.branch_and_bound import Solution
from fedloom.wireless.system.empirical_error import Empirical
from fedloom.wireless.system.fleet import random_fleet
from fedloom.wireless.system.generalisation_bound import Gap
from fedloom.wireless.system.problem import Problem
from fedloom.wireless.system.radio import Array, Mode

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "wireless"))
from exhaustive import exhaustive

LOADS = ((0.3, 0.5), (0.2, 0.3), (0.12, 0.2), (0.15, 9.0), (0.08, 0.3), (0.5, 1.2))
SEEN: list[float] = []
"""Largest excess over an original limit, of every point returned."""


def fleet(
    devices: int,
    subcarriers: int,
    seed: int,
    empirical: Empirical,
    mode: Mode = "subcarrier",
    loads: tuple[tuple[float, float], ...] = LOADS,
) -> Problem:
    """A problem by seed; a third of the seeds have the per-device gap."""
    latency, energy = loads[seed % len(loads)]
    gap: Gap = "per_device" if seed % 3 == 2 else "pooled"
    head = 0 if seed % 2 else 20_000
    return random_fleet(
        devices,
        subcarriers,
        seed,
        mode=mode,
        empirical=empirical,
        gap=gap,
        latency_load=latency,
        energy_load=energy,
        head_parameters=head,
    ).problem()


def checked(problem: Problem, solution: Solution[Array]) -> Solution[Array]:
    """The same; its excess over the original (33), (34) and the band is remembered, its bracket asserted."""
    assert not solution.lower > solution.value, "lower bound above the value"
    if solution.point is not None:
        keep = problem.best(problem.caps(solution.point))
        late, over = problem.excess(solution.point, keep)
        whole = problem.link.mode == "subcarrier"
        taken = solution.point.sum(axis=0).max() if whole else solution.point.sum() / problem.band.total_hz
        SEEN.append(float(max(late.max(), over.max(), taken - 1.0)))
    return solution


def line(name: str, *parts: str) -> None:
    """One result."""
    print(f"{name:34s} " + "  ".join(parts), flush=True)


def seconds(values: list[float]) -> str:
    """Median, 95th percentile and largest."""
    return f"seconds {np.median(values):.3f} median, {np.percentile(values, 95):.3f} p95, {max(values):.3f} max"


def against_exhaustion(count: int) -> None:
    """bnb = exhaustive search, K = 3, M = 5, 6."""
    for m in (5, 6):
        for empirical in get_args(Empirical):
            wrong, nodes, solved = 0.0, [], 0
            for seed in range(count):
                problem = fleet(3, m, seed, empirical)
                truth, found = exhaustive(problem), checked(problem, solve(problem))
                assert truth.status is found.status, (m, empirical, seed)
                nodes.append(found.nodes)
                if truth.point is not None:
                    solved += 1
                    wrong = max(wrong, abs(truth.value - found.value))
            line(
                f"exhaustion K=3 M={m} {empirical}",
                f"{solved} feasible, {count - solved} proven infeasible of {count}",
                f"largest difference {wrong:.1e}",
                f"nodes {np.median(nodes):.0f} median, {max(nodes)} max",
            )


def certificates(devices: int, m: int, count: int, time_limit_s: float) -> None:
    """bnb within its time limit."""
    for empirical in get_args(Empirical):
        taken, gaps, nodes, states = [], [], [], dict[str, int]()
        for seed in range(count):
            problem = fleet(devices, m, seed, empirical)
            began = time.perf_counter()
            found = checked(problem, solve(problem, time_limit_s=time_limit_s))
            taken.append(time.perf_counter() - began)
            states[found.status.name] = states.get(found.status.name, 0) + 1
            nodes.append(found.nodes)
            if found.point is not None:
                gaps.append(found.optimality_gap)
        line(
            f"bnb K={devices} M={m} {empirical}",
            str(states),
            seconds(taken),
            f"largest optimality gap {max(gaps, default=0.0):.1e}",
            f"nodes {max(nodes)} max",
        )


def psca_gaps(devices: int, m: int, count: int) -> None:
    """P-SCA against the certified optimum."""
    for empirical in get_args(Empirical):
        gaps, taken, missed = [], [], 0
        for seed in range(count):
            problem = fleet(devices, m, seed, empirical)
            best = solve(problem)
            if best.point is None:
                continue
            began = time.perf_counter()
            found = checked(problem, solve(problem, "psca", seed=seed))
            taken.append(time.perf_counter() - began)
            missed += found.point is None
            gaps.append(100.0 * (found.value / best.value - 1.0) if found.point is not None else np.inf)
        line(
            f"psca K={devices} M={m} {empirical}",
            f"{missed} of {len(gaps)} feasible fleets missed",
            f"optimality gap % {np.median(gaps):.4f} median, {np.percentile(gaps, 95):.3f} p95, {max(gaps):.3f} max",
            seconds(taken),
        )


def large(count: int) -> None:
    """P-SCA at K = 50, M = 128, and `bandwidth` mode at K = 200."""
    for empirical in get_args(Empirical):
        taken, gaps = [], []
        for seed in range(count):
            problem = fleet(50, 128, seed, empirical, loads=((0.5, 0.5), (0.2, 0.5), (0.3, 0.2)))
            began = time.perf_counter()
            found = checked(problem, solve(problem, "psca"))
            taken.append(time.perf_counter() - began)
            gaps.append(100.0 * found.optimality_gap)
        line(
            f"psca K=50 M=128 {empirical}",
            seconds(taken),
            f"optimality gap to the single-device bound % {max(gaps):.2f} max",
        )
    for empirical in get_args(Empirical):
        taken, gaps, states = [], [], dict[str, int]()
        for seed in range(count):
            problem = fleet(200, 8, seed, empirical, mode="bandwidth", loads=((3.0, 3.0), (2.0, 9.0), (4.0, 2.0)))
            began = time.perf_counter()
            found = checked(problem, solve(problem, "psca"))
            taken.append(time.perf_counter() - began)
            states[found.status.name] = states.get(found.status.name, 0) + 1
            if found.point is not None:
                gaps.append(found.optimality_gap)
        line(
            f"bandwidth K=200 {empirical}",
            str(states),
            seconds(taken),
            f"largest optimality gap {max(gaps, default=0.0):.1e}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="6 fleets a size and form instead of 50")
    count = 6 if parser.parse_args().quick else 50
    against_exhaustion(count)
    certificates(4, 12, count, 10.0)
    certificates(6, 16, count, 60.0)
    for devices, m in ((3, 6), (4, 12)):
        psca_gaps(devices, m, count)
    large(1 if count < 50 else count)
    line("original limits", f"largest relative excess {max(SEEN):.1e} over {len(SEEN)} points")


if __name__ == "__main__":
    main()
