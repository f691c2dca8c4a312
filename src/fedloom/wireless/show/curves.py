"""What tighter limits cost a fleet: the bound over the dropout rate, and every strategy's value over each limit.

A `Sweep` is a table (a CSV next to its PNG): (x, curve, value, lower end, upper end). Means over problems, with the 10th to
90th percentile between the ends where there is more than one. Derived; trends, not the paper's numbers, which were not
available.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fedloom.wireless.allocate import solve
from fedloom.wireless.solvers.baselines import baseline
from fedloom.wireless.solvers.registry import SOLVERS
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
"""The strategies that are compared, solvers and baselines, in words."""

LATENCY_FACTORS = (0.65, 0.7, 0.75, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0)
ENERGY_FACTORS = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.0)


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


def of_fleet(problem: Problem) -> Iterator[Sweep]:
    """The curves of one fleet: its bound, its latency limit, its energy limits."""
    yield bound_shape(problem.bound)
    yield latency_sweep([problem])
    yield energy_sweep([problem])


def bound_shape(bound: Bound, samples: Sequence[int] = (500, 1000, 2000, 4000)) -> Sweep:
    """Phi over one common dropout rate for several n, each curve's minimum marked, with the two parts for one n."""
    rows = []
    rates = np.linspace(0.0, 0.95, 96)
    keep = (1.0 - rates)[:, None]
    middle = np.array([float(samples[len(samples) // 2])])
    curves = {f"bound, n = {n}": bound.value(keep, np.array([float(n)])) for n in samples}
    curves["empirical part"] = bound.empirical_term(keep, middle)
    curves[f"gap part, n = {middle[0]:.0f}"] = bound.gap_term(keep, middle)
    for label, values in curves.items():
        rows += [Row(float(g), label, float(v), float(v), float(v)) for g, v in zip(rates, values, strict=True)]
    for n in samples:
        best = bound.best(np.ones(1), np.array([float(n)]), 0.05)
        value = float(bound.value(best, np.array([float(n)])))
        rows.append(Row(1.0 - float(best[0]), "minimum", value, value, value))
    title = f"The bound over the dropout rate ({bound.empirical} empirical part)"
    return Sweep("bound_shape", title, "dropout rate of every device", "bound", tuple(rows))


def latency_sweep(problems: Sequence[Problem], factors: Sequence[float] = LATENCY_FACTORS) -> Sweep:
    """Phi against the latency limit, in factors of the first problem's."""
    limits = [factor * problems[0].latency_limit_s for factor in factors]
    points = [(limit, [replace(problem, latency_limit_s=limit) for problem in problems]) for limit in limits]
    return strategies("latency", "What a tighter latency limit costs", "latency limit of a round (s)", points)


def energy_sweep(problems: Sequence[Problem], factors: Sequence[float] = ENERGY_FACTORS) -> Sweep:
    """Phi against the energy left for sending: the limit above what computing and the rest need anyway, times a factor."""
    unit = float(np.median(_radio_j(problems[0])))
    points = [(1e3 * factor * unit, [_with_radio_energy(p, factor) for p in problems]) for factor in factors]
    label = "energy of a round left for sending (mJ, median device)"
    return strategies("energy", "What a tighter energy limit costs", label, points)


def _radio_j(problem: Problem) -> Array:
    fixed = problem.compute.joules(np.ones(len(problem.ids))) + problem.compute.overhead_j
    return np.asarray(np.maximum(problem.energy_limit_j - fixed, 1e-3 * problem.energy_limit_j))


def _with_radio_energy(problem: Problem, factor: float) -> Problem:
    return replace(problem, energy_limit_j=problem.energy_limit_j + (factor - 1.0) * _radio_j(problem))


def strategies(
    name: str,
    title: str,
    x_label: str,
    points: Sequence[tuple[float, Sequence[Problem]]],
    *,
    time_limit_s: float = 10.0,
    counts: bool = False,
) -> Sweep:
    """Phi of every strategy at each x over problems, which are numbered by seed alike for every x.

    Points of x where the optimum itself serves fewer than half of the problems are left out. Means are over the same seeds
    everywhere: those that the optimum serves at every x that is left; a strategy has a point where it serves them all.
    """
    xs, tables = [], []
    for x, problems in points:
        table = {c: [value_of(c, p, seed, time_limit_s) for seed, p in enumerate(problems)] for c in LABELS}
        if 2 * np.isfinite(table["bnb"]).sum() >= len(problems):
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


def value_of(strategy: str, problem: Problem, seed: int, time_limit_s: float) -> float:
    """Phi of a solver or baseline, +inf where it serves the devices not."""
    if strategy in SOLVERS:
        return solve(problem, strategy, time_limit_s, seed).value
    return baseline(problem, strategy, seed)[0].value
