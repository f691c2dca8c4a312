"""Every one of the (K + 1)^M assignments of subcarriers, for tests and tiny fleets."""

from __future__ import annotations

import time

import numpy as np

from fedloom.errors import ConfigError
from fedloom.wireless.solvers.branch_and_bound import Solution, Status
from fedloom.wireless.solvers.local_search import share_of
from fedloom.wireless.system.problem import Problem
from fedloom.wireless.system.radio import Array

_BLOCK = 8192
_MOST = 2_000_000


def exhaustive(problem: Problem) -> Solution[Array]:
    """The optimum by looking at all assignments; ConfigError above two million of them. Point: share (K, M)."""
    began = time.perf_counter()
    devices, count = problem.subcarriers.up.shape
    total = (devices + 1) ** count
    if total > _MOST:
        raise ConfigError(
            f"{devices} devices on {count} subcarriers have {total} assignments, expected at most {_MOST}: use bnb"
        )
    best, point = np.inf, None
    for start in range(0, total, _BLOCK):
        codes = np.arange(start, min(start + _BLOCK, total))
        owners = codes[:, None] // (devices + 1) ** np.arange(count) % (devices + 1) - 1
        share = share_of(owners, devices)
        values = problem.value_of_caps(problem.caps(share))
        at = int(np.argmin(values))
        if values[at] < best:
            best, point = float(values[at]), share[at]
    status = Status.OPTIMAL if point is not None else Status.INFEASIBLE
    return Solution(point, best, best, status, total, time.perf_counter() - began)
