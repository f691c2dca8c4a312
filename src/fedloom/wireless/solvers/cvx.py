"""The one place where cvxpy, which is not fully typed, meets typed code; and the choice of its solver.

Measured on the P-SCA surrogate on one core of a shared machine, seconds a solve after the compilation (cvxpy 1.9 with DPP
parameters, compiled once). Both models need second-order cones, which OSQP (quadratic) and HiGHS (linear) do not have.

                     4 devices x 12    50 devices x 128
    Clarabel 0.11        0.003              0.25              after 5.5 s of compilation at 50 x 128
    SCS 3.3              0.012-0.028        not tried         at 4 x 12 its objective is already 0.004 to 0.4 % off

so Clarabel it is. The exact search needs no convex solver at all up to 18 subcarriers: its Lagrangian over tabulated sets
(`lagrangian`) left an optimality gap at the root 20 to 4,000 times smaller than the relaxation's (3 devices x 5), in about the
same time.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from fedloom.errors import ConfigError
from fedloom.wireless.system.radio import Array

try:
    import cvxpy
except ImportError as error:  # pragma: no cover
    raise ConfigError(
        f"this solver needs cvxpy, which cannot be imported ({error}): pip install 'fedloom[wireless]', or use bnb, which "
        "needs it only above 18 subcarriers"
    ) from error

cp: Any = cvxpy  # its functions are not visible to a type checker
Expression = Any
Constraint = Any

SOLVER = "CLARABEL"


def try_solve(problem: Any, solver: str = SOLVER) -> bool:
    """Solve with the cached compilation; False where the solver failed or found the problem infeasible."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "solution may be inaccurate": judged by exact evaluation afterwards
        try:
            problem.solve(solver=solver, warm_start=True)
        except cp.error.SolverError:
            return False
    return problem.status in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE)


def value(variable: Any, low: float, high: float) -> Array:
    """A solved variable as an array, cut to its range."""
    return np.asarray(np.clip(variable.value, low, high), dtype=float)
