"""What a joint optimum is measured against: uniform rate, equal shares, random rates, greedy, no dropout.

Every baseline that keeps some freedom uses it well: `uniform` shares the band so that the one rate is as large as it is
worth being; `equal` takes the best rates for its equal shares. All derived; the paper's own baselines are not known to us.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from fedloom.errors import ConfigError
from fedloom.wireless.solvers.branch_and_bound import Solution, Status
from fedloom.wireless.solvers.heuristics import heuristics
from fedloom.wireless.system.problem import Problem
from fedloom.wireless.system.radio import Array

Choice = tuple[Array | None, Array | None]
"""A share and keep rates (K,); None where no feasible ones were found."""


def baseline(problem: Problem, name: str, seed: int = 0) -> tuple[Solution[Array], Array | None]:
    """A share, as `Solution`, and the keep rates (K,) that go with it (None if no feasible point was found).

    `uniform` one rate for all, the band shared to serve it; `equal` equal shares, best rates under them; `random` equal
    shares, a rate drawn between keep_min and each cap; `greedy` subcarriers one by one to whom they help most (equal
    steps of bandwidth); `no_dropout` every rate 1.
    """
    if name not in BASELINES:
        raise ConfigError(f"the baseline {name!r} is unknown, expected one of {', '.join(BASELINES)}")
    began = time.perf_counter()
    share, keep = BASELINES[name](problem, seed)
    seconds = time.perf_counter() - began
    if keep is None or share is None:
        return Solution(None, np.inf, -np.inf, Status.NOT_FOUND, 0, seconds), None
    value = float(problem.value(keep))
    return Solution(share, value, -np.inf, Status.FEASIBLE, 0, seconds), keep


def _equal(problem: Problem, seed: int) -> Choice:
    return _best_rates(problem, problem.link.dealt_evenly())


def _greedy(problem: Problem, seed: int) -> Choice:
    return _best_rates(problem, heuristics(problem).greedy(problem))


def _best_rates(problem: Problem, share: Array) -> Choice:
    caps = problem.caps(share)
    return share, problem.best(caps) if (caps >= problem.keep_min).all() else None


def _random(problem: Problem, seed: int) -> Choice:
    share = problem.link.dealt_evenly()
    caps = problem.caps(share)
    draw = np.random.default_rng([seed, 5]).uniform(size=len(caps))
    keep = problem.keep_min + draw * (np.clip(caps, problem.keep_min, 1.0) - problem.keep_min)
    return share, keep if (caps >= problem.keep_min).all() else None


def _no_dropout(problem: Problem, seed: int) -> Choice:
    share, served = heuristics(problem).share_for_rate(problem, 1.0)
    return (share, np.ones(len(problem.ids))) if served else (None, None)


def _uniform(problem: Problem, seed: int) -> Choice:
    """The best common rate that some share serves, by bisection (it is served or not, monotonically)."""
    devices, served = len(problem.ids), heuristics(problem).share_for_rate
    rates = np.linspace(problem.keep_min, 1.0, 2001)
    values = problem.value(np.repeat(rates[:, None], devices, axis=1))
    low, high = problem.keep_min, min(float(rates[int(np.argmin(values))]), 1.0)
    share, enough = served(problem, high)
    if enough:
        return share, np.full(devices, high)
    found, enough = served(problem, low)
    if not enough:
        return None, None
    for _ in range(12):
        middle = 0.5 * (low + high)
        share, enough = served(problem, middle)
        low, high = (middle, high) if enough else (low, middle)
        found = share if enough else found
    return found, np.full(devices, low)


BASELINES: dict[str, Callable[[Problem, int], Choice]] = {
    "uniform": _uniform,
    "equal": _equal,
    "random": _random,
    "greedy": _greedy,
    "no_dropout": _no_dropout,
}
