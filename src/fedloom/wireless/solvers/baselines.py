"""What a joint optimum is measured against: uniform rate, equal shares, random rates, greedy, no dropout.

Every baseline that keeps some freedom uses it well: `uniform` shares the band so that the one rate is as large as it is
worth being; `equal` takes the best rates for its equal shares. All derived; the paper's own baselines are not known to us.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from fedloom.errors import ConfigError
from fedloom.wireless.solvers import bandwidth_dual, local_search
from fedloom.wireless.solvers.branch_and_bound import Solution, Status
from fedloom.wireless.system.problem import Problem
from fedloom.wireless.system.radio import Array, Subcarriers

Baseline = Literal["uniform", "equal", "random", "greedy", "no_dropout"]


def baseline(problem: Problem, name: Baseline, seed: int = 0) -> tuple[Solution[Array], Array | None]:
    """A share, as `Solution`, and the keep rates (K,) that go with it (None if no feasible point was found).

    `uniform` one rate for all, the band shared to serve it; `equal` equal shares, best rates under them; `random` equal
    shares, a rate drawn between keep_min and each cap; `greedy` subcarriers one by one to whom they help most (equal
    steps of bandwidth); `no_dropout` every rate 1.
    """
    if name not in get_args(Baseline):
        raise ConfigError(f"the baseline {name!r} is unknown, expected one of {', '.join(get_args(Baseline))}")
    began = time.perf_counter()
    if name in ("uniform", "no_dropout"):
        share, keep = _uniform(problem, only=1.0 if name == "no_dropout" else None)
    else:
        share = _greedy(problem) if name == "greedy" else equal_share(problem)
        caps = problem.caps(share)
        keep = problem.best(caps)
        if name == "random":
            draw = np.random.default_rng([seed, 5]).uniform(size=len(caps))
            keep = problem.keep_min + draw * (np.clip(caps, problem.keep_min, 1.0) - problem.keep_min)
        keep = keep if (caps >= problem.keep_min).all() else None
    seconds = time.perf_counter() - began
    if keep is None or share is None:
        return Solution(None, np.inf, -np.inf, Status.NOT_FOUND, 0, seconds), None
    value = float(problem.value(keep))
    return Solution(share, value, -np.inf, Status.FEASIBLE, 0, seconds), keep


def equal_share(problem: Problem) -> Array:
    """Whole subcarriers dealt round (the devices with the worst average channel first), or equal parts of the band."""
    devices = len(problem.ids)
    if not isinstance(problem.link, Subcarriers):
        return np.full(devices, problem.link.total_hz / devices)
    order = np.argsort(problem.link.up.mean(axis=1), kind="stable")
    return local_search.share_of(order[np.arange(problem.link.count) % devices], devices)


def _greedy(problem: Problem) -> Array:
    if isinstance(problem.link, Subcarriers):
        return local_search.share_of(local_search.greedy(problem), len(problem.ids))
    devices, steps = len(problem.ids), 8 * len(problem.ids)
    step = problem.link.total_hz / steps
    share = np.zeros(devices)
    for _ in range(steps):
        offers = share + step * np.eye(devices)
        caps = problem.caps(offers)
        share = offers[int(np.argmin([local_search.merit(problem, row) for row in caps]))]
    return share


def _uniform(problem: Problem, only: float | None) -> tuple[Array | None, Array | None]:
    """The best common rate that some share serves, by bisection (it is served or not, monotonically)."""
    devices = len(problem.ids)
    rates = np.linspace(problem.keep_min, 1.0, 2001)
    values = problem.value(np.repeat(rates[:, None], devices, axis=1))
    want = only if only is not None else float(rates[int(np.argmin(values))])
    share = serving(problem, want)
    if share is not None or only is not None:
        return share, np.full(devices, want) if share is not None else None
    low, high, found = problem.keep_min, want, serving(problem, problem.keep_min)
    if found is None:
        return None, None
    for _ in range(12):
        middle = 0.5 * (low + high)
        share = serving(problem, middle)
        low, high = (middle, high) if share is not None else (low, middle)
        found = share if share is not None else found
    return found, np.full(devices, low)


def serving(problem: Problem, rate: float) -> Array | None:
    """A share under which every device reaches `rate`, None if the search finds none (exact in `bandwidth` mode)."""
    rate = min(rate, 1.0)
    if isinstance(problem.link, Subcarriers):
        asked = replace(problem, keep_min=rate)
        owners = local_search.improve(asked, local_search.greedy(asked))
        share = local_search.share_of(owners, len(problem.ids))
        return share if (problem.caps(share) >= rate).all() else None
    hz = bandwidth_dual.least_hz(problem, np.full(len(problem.ids), rate))
    return hz * (problem.link.total_hz / hz.sum()) if hz.sum() <= problem.link.total_hz else None
