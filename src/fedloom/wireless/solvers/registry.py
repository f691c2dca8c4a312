"""The solvers by name, for both ways to share the band. A new one is its file and a line in `SOLVERS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fedloom.wireless.solvers import bandwidth_dual, lagrangian, local_search
from fedloom.wireless.solvers.branch_and_bound import Progress, Solution, Status, branch_and_bound
from fedloom.wireless.system.problem import Problem
from fedloom.wireless.system.radio import Array, Mode

Run = Callable[[Problem, float, int], Solution[Array]]
"""(problem, time limit in seconds, seed) to a share and its bracket."""


@dataclass(frozen=True)
class Solver:
    """A solver, for both modes of sharing the band."""

    by_mode: dict[Mode, Run]
    counts: str
    """What `Solution.nodes` counts, in words."""


def subcarrier_bnb(problem: Problem, time_limit_s: float, seed: int) -> Solution[Array]:
    """Branch and bound from a local optimum: over tabulated sets where they fit, else over single shares."""
    owners = local_search.improve(problem, local_search.greedy(problem))
    value = local_search.value_of(problem, owners)
    start = (value, local_search.share_of(owners, len(problem.ids))) if np.isfinite(value) else None
    if lagrangian.fits(problem):
        tight = lagrangian.LagrangianBound(problem)
        return branch_and_bound(lagrangian.root(problem), tight, start=start, time_limit_s=time_limit_s)
    from fedloom.wireless.solvers import mccormick  # cvxpy is needed from here on

    loose = mccormick.McCormickBound(problem)
    return branch_and_bound(
        mccormick.root(problem), loose, start=start, time_limit_s=time_limit_s, tolerance=loose.tolerance
    )


def subcarrier_psca(problem: Problem, time_limit_s: float, seed: int) -> Solution[Array]:
    """P-SCA, with the single-device bound below it."""
    from fedloom.wireless.solvers import mccormick
    from fedloom.wireless.solvers.psca import psca

    lower = float(problem.value_of_caps(mccormick.single_device_caps(problem, mccormick.root(problem))))
    return psca(problem, seed=seed, time_limit_s=time_limit_s, lower=lower)


def bandwidth_bnb(problem: Problem, time_limit_s: float, seed: int) -> Solution[Array]:
    """Successive convex approximation; where that proves nothing, branch and bound over keep rates from its point."""
    quick = bandwidth_psca(problem, time_limit_s, seed)
    if quick.point is None or quick.status is Status.OPTIMAL:
        return quick
    dual = bandwidth_dual.DualBound(problem)
    left = max(1e-3, time_limit_s - quick.seconds)
    start = (quick.value, quick.point)
    found = branch_and_bound(
        bandwidth_dual.root(problem), dual, start=start, tolerance=dual.tolerance, time_limit_s=left
    )
    trace = (*quick.trace, *(Progress(p.seconds + quick.seconds, p.nodes, p.lower, p.value) for p in found.trace))
    return replace(found, seconds=found.seconds + quick.seconds, trace=trace)


def bandwidth_psca(problem: Problem, time_limit_s: float, seed: int) -> Solution[Array]:
    """Successive convex approximation: there is nothing binary to penalise."""
    return bandwidth_dual.sca(problem, seed=seed, time_limit_s=time_limit_s)


SOLVERS: dict[str, Solver] = {
    "bnb": Solver({"subcarrier": subcarrier_bnb, "bandwidth": bandwidth_bnb}, counts="nodes"),
    "psca": Solver({"subcarrier": subcarrier_psca, "bandwidth": bandwidth_psca}, counts="convex solves"),
}
