"""Branch and bound over single shares with a convex relaxation: `bnb` above the size that `lagrangian` can tabulate.

A node fixes some rho_{k,m} to 0 or 1. Two lower bounds, both derived: the single-device bound (each device alone with
every subcarrier not excluded; for energy the best reachable average rate), and the relaxation rho in [0, 1] with
McCormick variables v for y rho, (40), the chord of a concave e and tangents of G.

The relaxation is one cvxpy problem with parameters (DPP): compiled once, then re-solved; `cvx` says which solvers
were tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedloom.wireless.solvers.branch_and_bound import NodeBound
from fedloom.wireless.solvers.convex_terms import empirical_term, gap_epigraph
from fedloom.wireless.solvers.cvx import SOLVER, cp, try_solve, value
from fedloom.wireless.solvers.local_search import improve, rounded, share_of, value_of
from fedloom.wireless.solvers.reciprocal import Reciprocal
from fedloom.wireless.system.problem import Problem
from fedloom.wireless.system.radio import Array, Rates

Mask = NDArray[np.bool_]

_SAFETY = 1e-6  # relative; taken off a solver's value, which is only approximately a lower bound


@dataclass(frozen=True)
class Assignment:
    """A partial assignment, what is fixed: (K, M) each. A subcarrier given to one device is excluded for the others."""

    given: Mask
    allowed: Mask

    def fix(self, k: int, m: int, value: bool) -> Assignment:
        given, allowed = self.given.copy(), self.allowed.copy()
        if value:
            given[k, m] = True
            allowed[:, m] = False
            allowed[k, m] = True
        else:
            allowed[k, m] = False
        return Assignment(given, allowed)


def root(problem: Problem) -> Assignment:
    """Nothing fixed."""
    shape = problem.subcarriers.up.shape
    return Assignment(np.zeros(shape, dtype=bool), np.ones(shape, dtype=bool))


def single_device_caps(problem: Problem, node: Assignment) -> Array:
    """(K,) no assignment in the node gives a device a larger cap: it alone, C1 and C2 each at their best."""
    link = problem.subcarriers
    every = Rates(
        (link.up * node.allowed).sum(axis=1), (link.down * node.allowed).sum(axis=1), link.power_per_subcarrier_w
    )
    latency = problem.latency_caps(every)
    count = node.given.sum(axis=1).astype(float)
    rate = (link.up * node.given).sum(axis=1)
    order = np.argsort(-link.up, axis=1)
    free = node.allowed & ~node.given
    for column in order.T:
        rows = np.arange(len(count))
        offered = link.up[rows, column]
        # Energy per bit is p N / r: take what lifts the average rate.
        better = free[rows, column] & (offered * count > rate) | (free[rows, column] & (count == 0))
        rate, count = rate + better * offered, count + better
    energy = problem.energy_caps(Rates(rate, rate, link.power_per_subcarrier_w * count))
    return np.minimum(1.0, np.minimum(latency, energy))


class McCormickBound:
    """`lower_bound` for `branch_and_bound` over `Assignment`. Points are shares (K, M)."""

    def __init__(self, problem: Problem, *, tolerance: float = 1e-5, solver: str = SOLVER) -> None:
        self.problem = problem
        self.tolerance = tolerance
        self.solver = solver
        self.scaled = scaled = Reciprocal.of(problem)
        devices, count = scaled.up.shape
        shape = (devices, count)
        self.share, self._product = cp.Variable(shape, nonneg=True), cp.Variable(shape)
        y = cp.Variable(devices)
        self._given, self._allowed = cp.Parameter(shape, nonneg=True), cp.Parameter(shape, nonneg=True)
        self._low, self._high = cp.Parameter(devices, pos=True), cp.Parameter(devices, pos=True)
        self._slope, self._constant = cp.Parameter(devices), cp.Parameter()
        row = np.ones((1, count))
        low, high = (cp.reshape(p, (devices, 1), order="C") @ row for p in (self._low, self._high))
        spread = cp.reshape(y, (devices, 1), order="C") @ row
        up = cp.sum(cp.multiply(scaled.up, self.share), axis=1)
        down = cp.sum(cp.multiply(scaled.down, self.share), axis=1)
        load = cp.multiply(scaled.power_per_subcarrier_w, cp.sum(self.share, axis=1)) + cp.multiply(scaled.e1, up)
        gap, gap_constraints = gap_epigraph(scaled, y)
        penalty = empirical_term(scaled, y, self._slope @ y + self._constant)
        self._model = cp.Problem(
            cp.Minimize(scaled.bound.dropout_penalty * penalty + gap),
            [
                *gap_constraints,
                cp.multiply(1.0 / scaled.spare_s, cp.inv_pos(up) + cp.inv_pos(down) + scaled.t1) <= y,
                # Only v's upper envelopes matter: it stands on the larger side.
                cp.multiply(1.0 / scaled.spare_j, load) <= cp.sum(cp.multiply(scaled.up, self._product), axis=1),
                self._product <= cp.multiply(high, self.share),
                self._product <= cp.multiply(low, self.share) + spread - low,
                cp.sum(self.share, axis=0) <= 1.0,
                self.share >= self._given,
                self.share <= self._allowed,
                y >= self._low,
                y <= self._high,
            ],
        )

    def __call__(self, node: Assignment, cutoff: float) -> NodeBound[Assignment, Array]:
        caps = single_device_caps(self.problem, node)
        fast = float(self.problem.value_of_caps(caps))
        if fast >= cutoff - self.tolerance:
            return NodeBound(fast)
        if (node.given == node.allowed).all():
            share = node.given.astype(float)
            worth = float(self.problem.value_of_caps(self.problem.caps(share)))
            return NodeBound(worth, worth, share if np.isfinite(worth) else None)
        lower, share = self.relax(node, caps)
        lower = max(fast, lower)
        if lower >= cutoff - self.tolerance:
            return NodeBound(lower)
        owners = rounded(self.problem, share)
        if not np.isfinite(cutoff) or not node.given.any():
            owners = improve(self.problem, owners)
        worth = value_of(self.problem, owners)
        point = share_of(owners, len(caps)) if np.isfinite(worth) else None
        return NodeBound(lower, worth, point, lambda: self._split(node, share))

    def relax(self, node: Assignment, caps: Array) -> tuple[float, Array]:
        """Lower bound and relaxed share; (+inf, .) if the relaxation is infeasible, (-inf, .) if the solver failed."""
        scaled = self.scaled
        low = np.maximum(1.0, scaled.inverse(np.clip(caps, self.problem.keep_min, 1.0)))
        high = np.full_like(low, scaled.y_max)
        self._given.value, self._allowed.value = node.given.astype(float), node.allowed.astype(float)
        self._low.value, self._high.value = low, high
        slope, intercept = scaled.chord(low, high)
        self._slope.value = scaled.weights * slope
        self._constant.value = float(scaled.weights @ intercept)
        if not try_solve(self._model, self.solver):
            proven = self._model.status == cp.INFEASIBLE
            return (np.inf if proven else -np.inf), np.where(node.allowed, 0.5, 0.0)
        least = scaled.bound.base_error + float(self._model.value)
        exact = self._model.status == cp.OPTIMAL
        return least - _SAFETY * max(1.0, abs(least)) if exact else -np.inf, value(self.share, 0.0, 1.0)

    def _split(self, node: Assignment, share: Array) -> Sequence[Assignment]:
        """The most fractional free share, to 1 and to 0; among equals the largest rate."""
        free = node.allowed & ~node.given
        score = np.where(free, -np.abs(share - 0.5) + 1e-9 * self.scaled.up / self.scaled.up.max(), -np.inf)
        k, m = (int(index) for index in np.unravel_index(np.argmax(score), score.shape))
        return [node.fix(k, m, True), node.fix(k, m, False)]
