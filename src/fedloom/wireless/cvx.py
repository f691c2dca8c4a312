"""The one place where cvxpy, which is not fully typed, meets typed code; and the choice of its solver.

Measured on the P-SCA surrogate on one core of a shared machine, seconds a solve after the compilation (cvxpy 1.9 with DPP
parameters, compiled once). Both models need second-order cones, which OSQP (quadratic) and HiGHS (linear) do not have.

                     4 devices x 12    50 devices x 128
    Clarabel 0.11        0.003              0.25
    SCS 3.3              0.012-0.028        not tried: at 4 x 12 its values were already off in the third digit

so Clarabel it is. The exact search does not use a convex solver at all up to 18 subcarriers: its Lagrangian over tabulated
sets (`columns`) gives a bound 10 to 1000 times nearer to the optimum than the relaxation, in about the same time.
"""

from __future__ import annotations

import warnings
from typing import Any

import cvxpy
import numpy as np

from fedloom.wireless.channel import Array

cp: Any = cvxpy  # its functions are not visible to a type checker
Expression = Any
Constraint = Any

SOLVER = "CLARABEL"


def solved(problem: Any, solver: str = SOLVER) -> bool:
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
