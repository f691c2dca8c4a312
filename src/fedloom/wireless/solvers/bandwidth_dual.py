"""`bandwidth` mode: one band divided at will, by a Lagrangian on tables and, where a duality gap is left, boxes of keep rates.

Let b_k(x) be the least bandwidth with which device k meets (33), (34) at keep rate x. It is convex and increasing: the
harmonic sum of the two rates is concave in the bandwidth, the rate needed is convex in x, and likewise for energy. So (P1)
is  min Phi(x)  s.t. sum_k b_k(x_k) <= B,  convex for `linear` and `rescaled` (in x; in 1/payload, `linear` is not), and for
`sparsity` the minimisation of a concave function. With a price mu on bandwidth and, for the pooled gap, its tangent at q0, it
falls apart into one-dimensional problems, which are bounded from below segment by segment on a grid that is refined
around the minimiser: the bound is rigorous for every form. What duality gap remains (`sparsity`) is closed by splitting the
range of a device whose rate is undecided: far apart in the primal points on either side of the best price. Derived.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedloom.wireless.solvers.branch_and_bound import NodeBound, Progress, Solution, Status
from fedloom.wireless.system.empirical_error import EmpiricalError, Tangent
from fedloom.wireless.system.generalisation_bound import SeparatedGap
from fedloom.wireless.system.problem import Problem
from fedloom.wireless.system.radio import Array

_HALVINGS = 60  # of the band, for b_k(x)
_COARSE, _FINE = 48, 49  # grid points over the box and around each minimiser
_REACH = 4.0  # old spacings on either side that a finer grid covers: beyond them the coarse bound is no longer lower
_ZOOMS = 5  # grids
# In spacings of the grid. The tangent point q0 need not be known better than the rates that make up q. A coarse grid's
# rates, and so its q, are off by one or two spacings: the next bracket of q starts that much wider and a little more.
_Q_RESOLUTION, _Q_WIDENING = 0.2, 3.0
# In spacings, relative: an error in the price moves the dual value by its square alone.
_PRICE_PRECISION = 1e-2
# In precisions, relative: about how far the price moves from the last grid's, which is the first guess; a price stays above 0.
_PRICE_STEP, _LARGEST_STEP = 100.0, 0.5
# In one over the band, which is what Phi, of order 1, would pay for all of it. A price of 0 could not be multiplied up, and
# where the dearest is not enough the box does not fit in the band.
_LEAST_GUESS, _DEAREST = 1e-3, 1e15
_SMOOTH = 1e-9  # difference of keep rates, or relative one of Phi, that counts as none
_MARGIN = 0.05  # of a range: no split is nearer to its ends, or one child would hardly shrink
_CLOSED = 1e-7  # optimality gap that counts as proven


@dataclass(frozen=True)
class RateBox:
    """Ranges of the keep rates, (K,) each."""

    low: Array
    high: Array


@dataclass(frozen=True)
class _Price:
    """What one price of bandwidth gives: dual value without constants, minimisers (K,) and their bandwidth."""

    mu: float
    dual: float
    keep: Array
    hz: float


def least_hz(problem: Problem, keep: Array) -> Array:
    """b_k(x), (..., K): the least bandwidth for the keep rates, to 1e-15 of the band; +inf above the whole band."""
    total = problem.band.total_hz
    low, high = np.zeros_like(keep), np.full_like(keep, total)
    possible = problem.caps(high) >= keep
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        enough = problem.caps(middle) >= keep
        high, low = np.where(enough, middle, high), np.where(enough, low, middle)
    return np.where(possible, high, np.inf)


def value_of(problem: Problem, keep: Array) -> tuple[float, Array | None]:
    """Phi and a share for keep rates: what is left of the band is spread in proportion. (+inf, None) if they need too much."""
    hz = least_hz(problem, keep)
    total = problem.band.total_hz
    if not hz.sum() <= total * (1.0 + 1e-12):
        return np.inf, None
    share = hz * (total / hz.sum())
    value = float(problem.value_of_caps(problem.caps(share)))
    return (value, share) if np.isfinite(value) else (np.inf, None)


def root(problem: Problem) -> RateBox:
    """All rates that a device could have with the whole band."""
    devices = len(problem.ids)
    caps = problem.caps(np.full(devices, problem.band.total_hz))
    return RateBox(np.full(devices, problem.keep_min), np.minimum(1.0, caps))


@dataclass(frozen=True)
class Relaxation:
    """A Lagrangian lower bound of Phi over a box, and the primal points on either side of the price that gives it."""

    lower: float
    infeasible: Array
    """(K,) the minimisers at the price just too low: together they need more than the band."""
    feasible: Array
    """(K,) those at the price just high enough."""


class _Tables:
    """Segment-wise lower bounds of a device's cost plus bandwidth, on one grid. Arrays (J, K)."""

    def __init__(self, problem: Problem, box: RateBox, windows: list[Array], empirical: EmpiricalError) -> None:
        self.problem, self.empirical = problem, empirical
        grid = [box.low + np.linspace(0.0, 1.0, _COARSE)[:, None] * (box.high - box.low), *windows]
        # One point below the box gives the first segment its slope.
        below = np.maximum(0.5 * box.low, box.low - 1e-3)[None]
        every = np.concatenate([below, np.sort(np.concatenate(grid), axis=0)])
        hz = least_hz(problem, every)
        step = np.diff(every, axis=0)
        apart = step > _SMOOTH
        left = np.where(apart, np.diff(hz, axis=0) / np.where(apart, step, 1.0), 0.0)
        self.keep, self.hz = every[1:], hz[1:]
        # b is convex: any slope met on the left of a point bounds it from below on the right (points may coincide).
        self.slope = np.maximum.accumulate(left, axis=0)[:-1]
        self.width = step[1:]

    def costs(self, gap: SeparatedGap) -> tuple[Array, Array]:
        """A device's own cost at grid points and the slope of a line below it on the segment to the right."""
        price, w, x = self.problem.bound.dropout_penalty, self.problem.weights, self.keep
        own = price * self.empirical.value(x) + gap.at(x)
        line = self.empirical.slope_below(x[:-1], x[1:], price, gap.slope(x)[:-1])
        return w * own, w * line

    def price(self, mu: float, own: Array, line: Array) -> _Price:
        """Lower bound and minimisers at one price."""
        at = own + mu * self.hz
        right = at[:-1] + np.minimum(0.0, (line + mu * self.slope) * self.width)
        # Where the line falls, the segment's bound is at its right end, whose true cost is never below it.
        best = np.concatenate([np.minimum(at[:-1], right), at[-1:]])
        j = np.argmin(best, axis=0)
        k = np.arange(best.shape[1])
        falls = np.concatenate([right < at[:-1], np.zeros((1, best.shape[1]), dtype=bool)])[j, k]
        pick = j + falls
        return _Price(mu, float(best[j, k].sum()), self.keep[pick, k], float(self.hz[pick, k].sum()))


def _prices(
    tables: _Tables, gap: SeparatedGap, total_hz: float, guess: float, precision: float
) -> tuple[_Price, _Price]:
    """The price just too low for the band and the one just high enough, by bisection; equal if the band is slack."""
    own, line = tables.costs(gap)
    low = tables.price(0.0, own, line)
    if low.hz <= total_hz:
        return low, low
    step = min(_PRICE_STEP * precision, _LARGEST_STEP)
    high = tables.price(guess, own, line)
    if high.hz <= total_hz:
        near = tables.price(guess * (1.0 - step), own, line)
        low, high = (low, near) if near.hz <= total_hz else (near, high)
    factor = 1.0 + step
    while high.hz > total_hz and high.mu < _DEAREST / total_hz:
        low, high = high, tables.price(factor * high.mu, own, line)
        factor *= factor
    while high.mu - low.mu > precision * high.mu:
        middle = tables.price(0.5 * (low.mu + high.mu), own, line)
        low, high = (middle, high) if middle.hz > total_hz else (low, middle)
    return low, high


def relax(problem: Problem, box: RateBox, empirical: EmpiricalError | None = None, zooms: int = _ZOOMS) -> Relaxation:
    """Lower bound of Phi over the box by the Lagrangian dual.

    `empirical` replaces the bound's own form of e, by its `Tangent` (43) say: then the bound is of that surrogate. Each
    zoom makes the grid around the minimisers 6 times finer and the bound's error, quadratic in it, about 36 times smaller.
    """
    w = problem.weights
    empirical = problem.bound.empirical_error if empirical is None else empirical
    range_q = float(w @ box.low**2), float(w @ box.high**2)
    best = Relaxation(-np.inf, box.low, box.low)
    windows: list[Array] = []
    tables = _Tables(problem, box, windows, empirical)
    guess, spacing = 1.0 / problem.band.total_hz, 1.0 / (_COARSE - 1)
    for zoom in range(zooms):
        if zoom:
            ends = best.infeasible, best.feasible
            apart = np.abs(ends[0] - ends[1]).max() > spacing
            reach = _REACH * spacing * (box.high - box.low)
            spacing *= 2.0 * _REACH / (_FINE - 1)
            offsets = np.linspace(-1.0, 1.0, _FINE)[:, None] * reach
            windows += [np.clip(end + offsets, box.low, box.high) for end in (ends if apart else ends[1:])]
            tables = _Tables(problem, box, windows, empirical)
        found, range_q, guess = _maximise_dual(tables, range_q, guess, spacing)
        best = found if found.lower >= best.lower else best
        range_q = max(0.0, range_q[0] - _Q_WIDENING * spacing), min(1.0, range_q[1] + _Q_WIDENING * spacing)
    # Where no price was enough, only the box's low end is known to fit.
    fits = least_hz(problem, best.feasible).sum() <= problem.band.total_hz
    return best if fits else replace(best, feasible=box.low)


def _maximise_dual(
    tables: _Tables, range_q: tuple[float, float], guess: float, spacing: float
) -> tuple[Relaxation, tuple[float, float], float]:
    """The best bound on one grid, over the price and the tangent point q0, which is bisected until the rates reach it."""
    problem, (low_q, high_q) = tables.problem, range_q
    bound, total = problem.bound, problem.band.total_hz
    form = bound.generalisation_gap
    best = Relaxation(-np.inf, tables.keep[0], tables.keep[0])
    while True:
        q = 0.5 * (low_q + high_q)
        gap = form.separated(bound, q, problem.samples)
        constant = bound.base_error + gap.constant
        under, over = _prices(tables, gap, total, guess, _PRICE_PRECISION * spacing)
        guess = max(over.mu, _LEAST_GUESS / total)
        lower = max(constant + price.dual - price.mu * total for price in (under, over))
        if lower >= best.lower:
            best = Relaxation(lower, under.keep, over.keep)
        reached = float(problem.weights @ over.keep**2)
        low_q, high_q = (q, high_q) if reached > q else (low_q, q)
        if not form.couples_devices or high_q - low_q < _Q_RESOLUTION * spacing:
            return best, (low_q, high_q), guess


def last_feasible(problem: Problem, infeasible: Array, feasible: Array) -> Array:
    """Line search: the last rates that fit in the band on the way from feasible to infeasible ones (b is convex)."""
    total = problem.band.total_hz
    low, high = 0.0, 1.0
    if least_hz(problem, infeasible).sum() <= total:
        return infeasible
    for _ in range(50):
        middle = 0.5 * (low + high)
        fits = least_hz(problem, feasible + middle * (infeasible - feasible)).sum() <= total
        low, high = (middle, high) if fits else (low, middle)
    return feasible + low * (infeasible - feasible)


class DualBound:
    """`lower_bound` for `branch_and_bound` over `RateBox`. Points are shares (K,) in Hz."""

    def __init__(self, problem: Problem, *, tolerance: float = _CLOSED) -> None:
        self.problem = problem
        self.tolerance = tolerance

    def __call__(self, node: RateBox, cutoff: float) -> NodeBound[RateBox, Array]:
        least = least_hz(self.problem, node.low)
        if not least.sum() <= self.problem.band.total_hz or (node.high < node.low).any():
            return NodeBound(np.inf)
        fast = self._on_box(node)
        if fast >= cutoff - self.tolerance:
            return NodeBound(fast)
        found = relax(self.problem, node)
        lower = max(found.lower, fast)
        keep = last_feasible(self.problem, found.infeasible, found.feasible)
        value, share = value_of(self.problem, keep)
        convex = self.problem.bound.empirical_error.convex
        if not convex and not np.isfinite(cutoff) and lower < value - self.tolerance:
            better, other, _ = descend(self.problem, keep)
            value, share = (better, other) if better < value else (value, share)
        return NodeBound(lower, value, share, lambda: self._split(node, found))

    def _on_box(self, node: RateBox) -> float:
        """Least Phi on the box without the band: the closed form (27), then cut from below, where Phi still rises."""
        p = self.problem
        if (node.low > p.keep_min).any():
            # Each part of Phi at its best over the box: e at the high end, the gap at the low end.
            return float(p.bound.empirical_term(node.high, p.samples) + p.bound.gap_term(node.low, p.samples))
        return float(p.value(p.best(node.high)))

    def _split(self, node: RateBox, found: Relaxation) -> Sequence[RateBox]:
        """The range of the device whose rate is most undecided, between its two rates; else the widest, in the middle."""
        undecided = np.abs(found.infeasible - found.feasible) * self.problem.weights
        k = int(np.argmax(undecided))
        at = 0.5 * (found.infeasible[k] + found.feasible[k])
        if undecided[k] < _SMOOTH:
            k = int(np.argmax((node.high - node.low) * self.problem.weights))
            at = 0.5 * (node.low[k] + node.high[k])
        if node.high[k] - node.low[k] < _SMOOTH:
            return ()
        margin = _MARGIN * (node.high[k] - node.low[k])
        at = min(max(at, node.low[k] + margin), node.high[k] - margin)
        high, low = node.high.copy(), node.low.copy()
        high[k] = low[k] = at
        return [RateBox(node.low, high), RateBox(low, node.high)]


def descend(problem: Problem, keep: Array, iterations: int = 8) -> tuple[float, Array | None, int]:
    """Successive convex approximation from feasible rates: e by its tangent, until Phi stalls. Value, share, solves."""
    box = root(problem)
    best, point = value_of(problem, keep)
    for solves in range(1, iterations + 1):
        found = relax(problem, box, Tangent(problem.bound.empirical_error, keep), zooms=2)
        keep = last_feasible(problem, found.infeasible, found.feasible)
        value, share = value_of(problem, keep)
        if not value < best - _SMOOTH * max(1.0, abs(best)):
            return best, point, solves
        best, point = value, share
    return best, point, iterations


def sca(problem: Problem, *, starts: int = 2, seed: int = 0, time_limit_s: float = np.inf) -> Solution[Array]:
    """`psca` in this mode: no binaries, so no penalty; a Lagrangian point, then descents from it and from random rates.

    The lower bound is the Lagrangian's; `linear` and `rescaled` are convex, so their first point is optimal.
    """
    began = time.perf_counter()
    box = root(problem)
    first = DualBound(problem)(box, np.inf)
    best, point, solves = first.value, first.point, 1
    trace = [Progress(time.perf_counter() - began, 1, first.lower, best)]
    rng = np.random.default_rng([seed, 4])
    for _ in range(0 if problem.bound.empirical_error.convex or not np.isfinite(best) else starts):
        if time.perf_counter() - began > time_limit_s or best - first.lower <= _CLOSED * max(1.0, abs(best)):
            break
        keep = last_feasible(problem, rng.uniform(box.low, box.high), box.low)
        value, share, more = descend(problem, keep)
        solves += more
        best, point = (value, share) if value < best else (best, point)
        trace.append(Progress(time.perf_counter() - began, solves, first.lower, best))
    seconds = time.perf_counter() - began
    if point is None:
        status = Status.INFEASIBLE if first.lower == np.inf else Status.NOT_FOUND
        return Solution(None, np.inf, first.lower, status, solves, seconds, tuple(trace))
    status = Status.OPTIMAL if best - first.lower <= _CLOSED * max(1.0, abs(best)) else Status.FEASIBLE
    return Solution(point, best, min(first.lower, best), status, solves, seconds, tuple(trace))
