"""`bandwidth` mode: one band divided at will, by a Lagrangian on tables and, where that leaves a gap, boxes of keep rates.

Let b_k(x) be the least bandwidth with which device k meets (33), (34) at keep rate x. It is convex and increasing: the
harmonic sum of the two rates is concave in the bandwidth, the rate needed is convex in x, and likewise for energy. So (P1)
is  min Phi(x)  s.t. sum_k b_k(x_k) <= B,  convex for `linear` and `rescaled` (in x; in 1/payload, `linear` is not), and for
`sparsity` the minimisation of a concave function. With a price mu on bandwidth and, for the pooled gap, its tangent at q0, it
falls apart into one-dimensional problems, which are bounded from below segment by segment on a grid that is refined
around the minimiser: the bound is rigorous for every form. What gap remains (`sparsity`) is closed by splitting the range of
a device that hovers between two rates. Derived.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedloom.wireless.solvers.branch_and_bound import Bounded, Progress, Solution, Status
from fedloom.wireless.system.problem import Problem
from fedloom.wireless.system.radio import Array

_HALVINGS = 60  # of the band, for b_k(x)
_COARSE, _FINE = 48, 49  # grid points over the box and around each minimiser
_REACH = 4.0  # old spacings on either side that a finer grid covers: beyond them the coarse bound is no longer lower
_ZOOMS = 5  # grids


@dataclass(frozen=True)
class Box:
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
    """Phi and a share for rates wished for: what is left of the band is spread in proportion. (+inf, None) if too much."""
    hz = least_hz(problem, keep)
    total = problem.band.total_hz
    if not hz.sum() <= total * (1.0 + 1e-12):
        return np.inf, None
    share = hz * (total / hz.sum())
    value = float(problem.value_of_caps(problem.caps(share)))
    return (value, share) if np.isfinite(value) else (np.inf, None)


def root(problem: Problem) -> Box:
    """All rates that a device could have with the whole band."""
    devices = len(problem.ids)
    caps = problem.caps(np.full(devices, problem.band.total_hz))
    return Box(np.full(devices, problem.keep_min), np.minimum(1.0, caps))


class _Tables:
    """Segment-wise lower bounds of a device's cost plus bandwidth, on one grid. Arrays (J, K)."""

    def __init__(self, problem: Problem, box: Box, windows: list[Array], tangent: Array | None) -> None:
        self.problem, self.tangent = problem, tangent
        grid = [box.low + np.linspace(0.0, 1.0, _COARSE)[:, None] * (box.high - box.low), *windows]
        # One point below the box gives the first segment its slope.
        below = np.maximum(0.5 * box.low, box.low - 1e-3)[None]
        every = np.concatenate([below, np.sort(np.concatenate(grid), axis=0)])
        hz = least_hz(problem, every)
        step = np.diff(every, axis=0)
        apart = step > 1e-9
        left = np.where(apart, np.diff(hz, axis=0) / np.where(apart, step, 1.0), 0.0)
        self.keep, self.hz = every[1:], hz[1:]
        # b is convex: any slope met on the left of a point bounds it from below on the right (points may coincide).
        self.slope = np.maximum.accumulate(left, axis=0)[:-1]
        self.width = step[1:]

    def costs(self, slope_q: float) -> tuple[Array, Array]:
        """A device's own cost at grid points and the slope of a line below it on the segment to the right."""
        p = self.problem
        bound, w, x = p.bound, p.weights, self.keep
        square = np.full_like(x, slope_q) if bound.gap == "pooled" else bound.gap_slope(x * x, p.samples)
        gap = slope_q * x * x if bound.gap == "pooled" else bound.gap_at(x * x, p.samples)
        left, right = x[:-1], x[1:]
        if self.tangent is not None:
            e_slope = bound.penalty_slope(self.tangent)
            e = bound.penalty(self.tangent) + e_slope * (x - self.tangent)
            line = bound.dropout_penalty * e_slope + 2.0 * left * square[:-1]
        elif bound.empirical == "sparsity":
            e = bound.penalty(x)
            curve = square[:-1] - bound.dropout_penalty
            line = curve * np.where(curve < 0.0, left + right, 2.0 * left)
        else:
            e = bound.penalty(x)
            line = bound.dropout_penalty * bound.penalty_slope(left) + 2.0 * left * square[:-1]
        return w * (bound.dropout_penalty * e + gap), w * line

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


def _prices(tables: _Tables, slope_q: float, total_hz: float, guess: float, precision: float) -> tuple[_Price, _Price]:
    """The price just too low for the band and the one just high enough, by bisection; equal if the band is slack."""
    own, line = tables.costs(slope_q)
    low = tables.price(0.0, own, line)
    if low.hz <= total_hz:
        return low, low
    high = tables.price(guess, own, line)
    if high.hz <= total_hz:
        near = tables.price(guess * (1.0 - 100.0 * min(precision, 5e-3)), own, line)
        low, high = (low, near) if near.hz <= total_hz else (near, high)
    factor = 1.0 + 100.0 * min(precision, 5e-3)
    while high.hz > total_hz and high.mu < 1e15 / total_hz:
        low, high = high, tables.price(factor * high.mu, own, line)
        factor *= factor
    while high.mu - low.mu > precision * high.mu:
        middle = tables.price(0.5 * (low.mu + high.mu), own, line)
        low, high = (middle, high) if middle.hz > total_hz else (low, middle)
    return low, high


def relaxed(
    problem: Problem, box: Box, tangent: Array | None = None, zooms: int = _ZOOMS
) -> tuple[float, Array, Array]:
    """Lower bound of Phi over the box, and the rates on either side of the price: too much band, and little enough.

    `tangent` (K,) replaces e by its tangent there, (43): then the bound is of that convex surrogate. Each zoom makes the
    grid around the minimisers 8 times finer and the bound's error about 60 times smaller.
    """
    bound, w, total = problem.bound, problem.weights, problem.band.total_hz
    n = float(problem.samples.sum())
    pooled = bound.gap == "pooled"
    low_q, high_q = float(w @ box.low**2), float(w @ box.high**2)
    best, ends = -np.inf, (box.low, box.low)
    windows: list[Array] = []
    tables = _Tables(problem, box, windows, tangent)
    guess, spacing = 1.0 / total, 1.0 / (_COARSE - 1)
    for zoom in range(zooms):
        if zoom:
            apart = np.abs(ends[0] - ends[1]).max() > spacing
            reach = _REACH * spacing * (box.high - box.low)
            spacing *= 2.0 * _REACH / (_FINE - 1)
            offsets = np.linspace(-1.0, 1.0, _FINE)[:, None] * reach
            windows += [np.clip(end + offsets, box.low, box.high) for end in (ends if apart else ends[1:])]
            tables = _Tables(problem, box, windows, tangent)
        q = 0.5 * (low_q + high_q)
        while True:
            slope_q = float(bound.gap_slope(q, n)) if pooled else 0.0
            constant = bound.base_error + (float(bound.gap_at(q, n)) - slope_q * q if pooled else 0.0)
            under, over = _prices(tables, slope_q, total, guess, 1e-2 * spacing)
            guess = max(over.mu, 1e-3 / total)
            top = max(constant + under.dual - under.mu * total, constant + over.dual - over.mu * total)
            if top >= best:
                best, ends = top, (under.keep, over.keep)
            reached = float(w @ over.keep**2)
            low_q, high_q = (q, high_q) if reached > q else (low_q, q)
            if not pooled or high_q - low_q < 0.2 * spacing:
                break
            q = 0.5 * (low_q + high_q)
        low_q, high_q = max(0.0, low_q - 3.0 * spacing), min(1.0, high_q + 3.0 * spacing)
    return best, ends[0], ends[1]


def feasible(problem: Problem, wish: Array, sure: Array) -> Array:
    """The point nearest to `wish` on the way from `sure`, which fits, that the band allows. b is convex: so is the way."""
    total = problem.band.total_hz
    low, high = 0.0, 1.0
    if least_hz(problem, wish).sum() <= total:
        return wish
    for _ in range(50):
        middle = 0.5 * (low + high)
        fits = least_hz(problem, sure + middle * (wish - sure)).sum() <= total
        low, high = (middle, high) if fits else (low, middle)
    return sure + low * (wish - sure)


class DualBound:
    """`bound` for `branch_and_bound` over `Box`. Points are shares (K,) in Hz."""

    def __init__(self, problem: Problem, *, tolerance: float = 1e-7) -> None:
        self.problem = problem
        self.tolerance = tolerance

    def __call__(self, node: Box, cutoff: float) -> Bounded[Box, Array]:
        least = least_hz(self.problem, node.low)
        if not least.sum() <= self.problem.band.total_hz or (node.high < node.low).any():
            return Bounded(np.inf)
        fast = self._on_box(node)
        if fast >= cutoff - self.tolerance:
            return Bounded(fast)
        lower, wish, sure = relaxed(self.problem, node)
        lower = max(lower, fast)
        if least_hz(self.problem, sure).sum() > self.problem.band.total_hz:
            sure = node.low
        keep = feasible(self.problem, wish, sure)
        value, share = value_of(self.problem, keep)
        if self.problem.bound.empirical == "sparsity" and not np.isfinite(cutoff) and lower < value - self.tolerance:
            better, other, _ = descend(self.problem, keep)
            value, share = (better, other) if better < value else (value, share)
        return Bounded(lower, value, share, lambda: self._split(node, wish, sure))

    def _on_box(self, node: Box) -> float:
        """Least Phi on the box without the band: the closed form (27), then cut from below, where Phi still rises."""
        p = self.problem
        if (node.low > p.keep_min).any():
            # Each part of Phi at its best over the box: e at the high end, the gap at the low end.
            return float(p.bound.empirical_term(node.high, p.samples) + p.bound.gap_term(node.low, p.samples))
        return float(p.value(p.best(node.high)))

    def _split(self, node: Box, wish: Array, sure: Array) -> Sequence[Box]:
        torn = np.abs(wish - sure) * self.problem.weights
        k = int(np.argmax(torn))
        at = 0.5 * (wish[k] + sure[k])
        if torn[k] < 1e-9:
            k = int(np.argmax((node.high - node.low) * self.problem.weights))
            at = 0.5 * (node.low[k] + node.high[k])
        if node.high[k] - node.low[k] < 1e-9:
            return ()
        margin = 0.05 * (node.high[k] - node.low[k])
        at = min(max(at, node.low[k] + margin), node.high[k] - margin)
        high, low = node.high.copy(), node.low.copy()
        high[k] = low[k] = at
        return [Box(node.low, high), Box(low, node.high)]


def descend(problem: Problem, keep: Array, iterations: int = 8) -> tuple[float, Array | None, int]:
    """Successive convex approximation from feasible rates: e by its tangent, until Phi stalls. Value, share, solves."""
    box = root(problem)
    best, point = value_of(problem, keep)
    for solves in range(1, iterations + 1):
        _, wish, sure = relaxed(problem, box, tangent=keep, zooms=2)
        if least_hz(problem, sure).sum() > problem.band.total_hz:
            sure = box.low
        keep = feasible(problem, wish, sure)
        value, share = value_of(problem, keep)
        if not value < best - 1e-9 * max(1.0, abs(best)):
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
    for _ in range(starts if problem.bound.empirical == "sparsity" and np.isfinite(best) else 0):
        if time.perf_counter() - began > time_limit_s or best - first.lower <= 1e-7 * max(1.0, abs(best)):
            break
        keep = feasible(problem, rng.uniform(box.low, box.high), box.low)
        value, share, more = descend(problem, keep)
        solves += more
        best, point = (value, share) if value < best else (best, point)
        trace.append(Progress(time.perf_counter() - began, solves, first.lower, best))
    seconds = time.perf_counter() - began
    if point is None:
        status = Status.INFEASIBLE if first.lower == np.inf else Status.NOT_FOUND
        return Solution(None, np.inf, first.lower, status, solves, seconds, tuple(trace))
    status = Status.OPTIMAL if best - first.lower <= 1e-7 * max(1.0, abs(best)) else Status.FEASIBLE
    return Solution(point, best, min(first.lower, best), status, solves, seconds, tuple(trace))
