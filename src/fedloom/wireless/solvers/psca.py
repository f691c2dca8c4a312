"""Penalised successive convex approximation (P-SCA), (41)-(45): shares relaxed to [0, 1], pulled to 0 or 1 by a penalty.

FedLoDrop (arXiv 2510.12078) names the method; surrogates and schedule here are derived. Each iteration solves

    min  A0 + A1 sum_k w_k e~(y_k) + gap + zeta sum_{k,m} [(1 - 2 rho_j) rho + rho_j^2]
    s.t. C1', C2~', sum_k rho_{k,m} <= 1, 0 <= rho <= 1, 1 <= y <= y_max

with the majorants of `reciprocal`, tight at the iterate, so for fixed zeta the penalised objective never rises. zeta starts
at 0, then doubles. Fractional shares that stall are nudged (the penalty's slope is 0 at 1/2, where two devices tie for ever).
The rounded end of every start is evaluated exactly by (35), (27) and repaired by local search on exact values.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from fedloom.wireless.solvers.branch_and_bound import Progress, Solution, Status
from fedloom.wireless.solvers.convex_terms import empirical_term, gap_epigraph
from fedloom.wireless.solvers.cvx import SOLVER, cp, try_solve, value
from fedloom.wireless.solvers.local_search import Owners, greedy, improve, rounded, share_of, value_of
from fedloom.wireless.solvers.reciprocal import Reciprocal, binary_majorant, binary_slope, product_minorant
from fedloom.wireless.system.problem import Problem
from fedloom.wireless.system.radio import Array

_FIRST_ZETA, _LAST_ZETA = 1e-3, 10.0
_PLAIN = 3  # iterations without penalty
_BINARY = 1e-3  # rho - rho^2 that counts as 0 or 1
_CLOSED = 1e-9  # distance from the lower bound that counts as proven
_SLACK = 1e3  # price of a broken limit, for starts that break one


@dataclass(frozen=True)
class Iterate:
    """A point of the relaxation: shares (K, M), y (K,), and what the surrogate that gave it was worth."""

    share: Array
    y: Array
    zeta: float
    objective: float
    """Phi + zeta sum (rho - rho^2) + price of broken limits, original functions."""
    fraction: float
    """max of rho - rho^2."""


class Surrogate:
    """The convex problem of one iteration, compiled once and re-solved with other parameters."""

    def __init__(self, scaled: Reciprocal, solver: str = SOLVER) -> None:
        self.scaled = scaled
        self.solver = solver
        devices, count = scaled.up.shape
        self.share = cp.Variable((devices, count), nonneg=True)
        self.y = cp.Variable(devices)
        self.late, self.over = cp.Variable(devices, nonneg=True), cp.Variable(devices, nonneg=True)
        self._pull = cp.Parameter((devices, count))
        self._slope = cp.Parameter(devices, nonneg=True)
        self._y_inv, self._rate_inv = cp.Parameter(devices, pos=True), cp.Parameter(devices, pos=True)
        self._unit = cp.Parameter(devices, pos=True)
        up = cp.sum(cp.multiply(scaled.up, self.share), axis=1)
        down = cp.sum(cp.multiply(scaled.down, self.share), axis=1)
        held = cp.sum(self.share, axis=1)
        product = product_minorant(cp.multiply(self._y_inv, self.y), cp.multiply(self._rate_inv, up))
        load = cp.multiply(
            self._unit,
            cp.multiply(scaled.power_per_subcarrier_w / scaled.spare_j, held)
            + cp.multiply(scaled.e1 / scaled.spare_j, up),
        )
        gap, gap_constraints = gap_epigraph(scaled, self.y)
        penalty = empirical_term(scaled, self.y, self._slope @ self.y)
        slack = _SLACK * cp.sum(self.late + self.over)
        objective = scaled.bound.dropout_penalty * penalty + gap + cp.sum(cp.multiply(self._pull, self.share)) + slack
        self.problem = cp.Problem(
            cp.Minimize(objective),
            [
                *gap_constraints,
                cp.multiply(1.0 / scaled.spare_s, cp.inv_pos(up) + cp.inv_pos(down) + scaled.t1) <= self.y + self.late,
                load <= product + self.over,
                cp.sum(self.share, axis=0) <= 1.0,
                self.y >= 1.0,
                self.y <= scaled.y_max,
            ],
        )

    def solve(self, share: Array, y: Array, zeta: float) -> tuple[Array, Array] | None:
        """The surrogate's minimiser around (share, y); None where the solver gives up."""
        rate = (self.scaled.up * share).sum(axis=1)
        self._pull.value = zeta * binary_slope(share)
        self._slope.value = self.scaled.weights * self.scaled.tangent(y)[0]
        self._y_inv.value, self._rate_inv.value, self._unit.value = 1.0 / y, 1.0 / rate, 1.0 / (rate * y)
        if not try_solve(self.problem, self.solver):
            return None
        return value(self.share, 0.0, 1.0), value(self.y, 1.0, self.scaled.y_max)

    def objective(self, share: Array, y: Array, zeta: float) -> float:
        """What the surrogate majorises: the penalised objective with the original functions."""
        s = self.scaled
        keep = s.keep(y)
        up, down = (s.up * share).sum(axis=1), (s.down * share).sum(axis=1)
        late = np.maximum(0.0, (1.0 / up + 1.0 / down + s.t1) / s.spare_s - y)
        used = (s.power_per_subcarrier_w * share.sum(axis=1) + s.e1 * up) / s.spare_j
        over = np.maximum(0.0, used / (up * y) - 1.0)
        phi = float(s.bound.value(keep, s.samples))
        return phi + zeta * float(binary_majorant(share, share).sum()) + _SLACK * float((late + over).sum())


def iterate(
    problem: Problem,
    surrogate: Surrogate,
    share: Array,
    rng: np.random.Generator,
    *,
    zetas: list[float] | None = None,
    max_iterations: int = 30,
    deadline: float = np.inf,
) -> list[Iterate]:
    """Successive solves from one start. `zetas` fixes the schedule (default: three without penalty, then doubling).

    y starts at the best rates that the start's caps allow, so the first iterate is feasible wherever the start is.
    """
    y = surrogate.scaled.inverse(problem.best(problem.caps(share)))
    path: list[Iterate] = []
    zeta = 0.0
    for step in range(len(zetas) if zetas is not None else max_iterations):
        zeta = zetas[step] if zetas is not None else _zeta(step)
        share = np.maximum(share, 1e-6)
        found = surrogate.solve(share, y, zeta)
        if found is None or time.perf_counter() > deadline:
            break
        moved = float(np.abs(found[0] - share).max())
        share, y = found
        fraction = float((share - share * share).max())
        path.append(Iterate(share, y, zeta, surrogate.objective(np.maximum(share, 1e-9), y, zeta), fraction))
        if zeta > 0.0 and zetas is None:
            if fraction < _BINARY:
                break
            if moved < 1e-2:
                undecided = share * (1.0 - share) > _BINARY
                share = np.clip(share + undecided * rng.normal(0.0, 0.15, share.shape), 0.0, 1.0)
                share = share / np.maximum(1.0, share.sum(axis=0))
    return path


def _zeta(step: int) -> float:
    return 0.0 if step < _PLAIN else min(_LAST_ZETA, _FIRST_ZETA * 2.0 ** (step - _PLAIN))


def psca(
    problem: Problem,
    *,
    starts: int | None = None,
    seed: int = 0,
    time_limit_s: float = np.inf,
    lower: float = -np.inf,
    solver: str = SOLVER,
) -> Solution[Array]:
    """A good point without proof: P-SCA from several starts, each rounded and repaired. Point: share (K, M).

    `starts` is 3 by default, 1 above 4,000 pairs of device and subcarrier. The local search that goes first may already meet
    `lower`, a bound known from elsewhere: then nothing is solved. One convex solve is O((K M)^3.5) at worst, in practice
    near linear in K M; the time limit is checked between solves.
    """
    began = time.perf_counter()
    deadline = began + time_limit_s
    rng = np.random.default_rng([seed, 3])
    scaled = Reciprocal.of(problem)
    devices, count = scaled.up.shape
    first = greedy(problem)
    best, owners = _better(problem, improve(problem, first), np.inf, first)
    starts = starts or (3 if devices * count <= 4000 else 1)
    solves, trace = 0, [Progress(time.perf_counter() - began, 0, lower, best)]
    surrogate = Surrogate(scaled, solver) if best - lower > _CLOSED else None
    for start in range(starts):
        if surrogate is None or time.perf_counter() > deadline or best - lower <= _CLOSED:
            break
        path = iterate(problem, surrogate, _start(start, first, devices, count, rng), rng, deadline=deadline)
        solves += len(path)
        for point in path[_PLAIN - 1 : _PLAIN] + path[-1:]:
            best, owners = _better(problem, improve(problem, rounded(problem, point.share)), best, owners)
        trace.append(Progress(time.perf_counter() - began, solves, lower, best))
    seconds = time.perf_counter() - began
    if not np.isfinite(best):
        return Solution(None, np.inf, lower, Status.NOT_FOUND, solves, seconds, tuple(trace))
    lower = min(lower, best)  # the same number may come out of two sums in another order
    status = Status.OPTIMAL if best - lower <= _CLOSED else Status.FEASIBLE
    return Solution(share_of(owners, devices), best, lower, status, solves, seconds, tuple(trace))


def _start(index: int, first: Owners, devices: int, count: int, rng: np.random.Generator) -> Array:
    """The greedy assignment, blurred; then random shares."""
    if index == 0:
        blurred = 0.6 * share_of(first, devices) + 0.4 / devices
        return np.asarray(blurred / np.maximum(1.0, blurred.sum(axis=0)))
    return np.asarray(rng.dirichlet(np.full(devices, 2.0), size=count).T)


def _better(problem: Problem, candidate: Owners, best: float, owners: Owners) -> tuple[float, Owners]:
    worth = value_of(problem, candidate)
    return (worth, candidate) if worth < best else (best, owners)
