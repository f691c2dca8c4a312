"""Exact branch and bound over sets of subcarriers, priced by a Lagrangian: the `bnb` solver up to about 18 subcarriers.

A column is a set of subcarriers for one device; its cap is (35). The 2^M columns of a device are tabulated once, those
that another column with fewer subcarriers equals are dropped, and an assignment is one column a device, disjoint. With
prices mu >= 0 on subcarriers, and the pooled gap replaced by its tangent at q0 (G is convex, so a lower bound),

    L(mu, q0) = A0 + G(q0) - q0 G'(q0) - sum_m mu_m
                + sum_k min over columns S of [ w_k min_{x <= cap(S)} (A1 e(x) + G'(q0) x^2) + sum_{m in S} mu_m ]

is below every assignment's Phi. Maximised by subgradient steps (Held, Wolfe, Crowder, Math. Programming 6, 1974), it also
says of every column what choosing it would cost at least: columns that cannot beat the incumbent go. What is left is
enumerated if it is little, else a contested subcarrier is branched on. It is a third lower bound besides the two of the
project's specification (the single-device bound, which is the first thing tried here, and the convex relaxation in
`relaxation`), and the tightest: it convexifies each device's own trade-off exactly. Derived; not claimed to be the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedloom.wireless.solvers.branch_and_bound import NodeBound
from fedloom.wireless.solvers.local_search import improve, share_of, value_of
from fedloom.wireless.system.problem import Problem
from fedloom.wireless.system.radio import Array, Rates

Sets = NDArray[np.int64]
"""Bit m is set where subcarrier m is in the set."""

MOST_COLUMNS = 2_000_000  # K 2^M: 7 devices on 18 subcarriers, 30 on 16; about 100 bytes each
_ENUMERATE = 200_000  # partial assignments held at once
_PATIENCE = 12  # subgradient steps without progress before they are halved
_PROGRESS = 1e-3  # of the distance to the goal, which counts as progress
_SHORTEST = 0.02  # of the first step: halved below that, the dual has converged for the purpose of a bound
_Q_EVERY, _Q_DAMPING = (
    4,
    0.3,
)  # steps between moves of the tangent point, and how far it moves to the q of the chosen columns
_OLD, _NEW = 0.9, 0.1  # weights in the running mean of what the chosen columns hold, which is branched on


@dataclass(frozen=True)
class Columns:
    """A node: the columns left to each device, and where the parent's prices stood."""

    sets: tuple[Sets, ...]
    caps: tuple[Array, ...]
    prices: Array
    """(M,)."""
    q: float

    def only(self, picks: Sequence[NDArray[np.bool_]]) -> Columns:
        """The columns picked, device by device."""
        return replace(
            self,
            sets=tuple(sets[pick] for sets, pick in zip(self.sets, picks, strict=True)),
            caps=tuple(caps[pick] for caps, pick in zip(self.caps, picks, strict=True)),
        )


@dataclass(frozen=True)
class _Dual:
    """The best bound found in a node, with what proves it."""

    lower: float
    prices: Array
    q: float
    reduced: tuple[Array, ...]
    """Per device and column: how much more than the cheapest column it costs."""
    usage: Array
    """(K, M) how often each device's cheapest column held each subcarrier."""


def subset_sums(values: Array) -> Array:
    """(2^M,) sums of `values` (M,) over all subsets, in the order of their bit patterns."""
    out = np.zeros(1)
    for value in values:
        out = np.concatenate([out, out + value])
    return out


def fits(problem: Problem) -> bool:
    """Is the table small enough?"""
    return problem.subcarriers.count <= 20 and len(problem.ids) << problem.subcarriers.count <= MOST_COLUMNS


def root(problem: Problem) -> Columns:
    """All columns that could matter. O(K M 2^M)."""
    link = problem.subcarriers
    sets, caps = [], []
    every = np.arange(2**link.count, dtype=np.int64)
    size = subset_sums(np.ones(link.count))
    for k in range(len(problem.ids)):
        rates = Rates(subset_sums(link.up[k]), subset_sums(link.down[k]), link.power_per_subcarrier_w[k] * size)
        cap = problem.caps_of(rates, k)
        useful = cap >= problem.keep_min
        for m in range(link.count):
            # A column is useless if it does no better than the same one without subcarrier m.
            halves = cap.reshape(-1, 2, 2**m)
            useful.reshape(-1, 2, 2**m)[:, 1] &= halves[:, 1] > halves[:, 0]
        sets.append(every[useful])
        caps.append(cap[useful])
    return Columns(tuple(sets), tuple(caps), np.zeros(link.count), -1.0)


class LagrangianBound:
    """`lower_bound` for `branch_and_bound` over `Columns`. Points are shares (K, M)."""

    def __init__(self, problem: Problem, *, tolerance: float = 1e-9, steps: int = 250) -> None:
        self.problem = problem
        self.tolerance = tolerance
        self.steps = steps
        self.count = problem.subcarriers.count
        bound = problem.bound
        # No feasible point is worth more: the cutoff while none is known.
        self._ceiling = 1e-6 + float(
            bound.base_error + bound.dropout_penalty * bound.penalty(problem.keep_min)
            + bound.gap_term(np.ones(len(problem.ids)), problem.samples)
        )  # fmt: skip

    def __call__(self, node: Columns, cutoff: float) -> NodeBound[Columns, Array]:
        if min(map(len, node.sets)) == 0:
            return NodeBound(np.inf)
        fast = float(self.problem.value_of_caps(np.array([caps.max() for caps in node.caps])))
        goal = min(cutoff, self._ceiling)
        if fast >= goal - self.tolerance:
            return NodeBound(fast if np.isfinite(cutoff) else np.inf)
        dual = self._dual(node, goal)
        lower = max(fast, dual.lower)
        if lower >= goal - self.tolerance:
            return NodeBound(lower if np.isfinite(cutoff) else np.inf)
        left = self._without_losers(node, dual, goal)
        if min(map(len, left.sets)) == 0:
            return NodeBound(goal - self.tolerance if np.isfinite(cutoff) else np.inf)
        exact = self._enumerate(left, dual, goal)
        if exact is not None:
            return exact if np.isfinite(cutoff) or exact.point is not None else NodeBound(np.inf)
        value, share = self._repair(dual.usage)
        return NodeBound(lower, value, share, lambda: self._split(left, dual.usage))

    def _dual(self, node: Columns, goal: float) -> _Dual:
        """Maximise L by subgradient steps towards `goal`; stop when it is reached."""
        bound, w, devices = self.problem.bound, self.problem.weights, len(node.sets)
        prices, q = node.prices.copy(), node.q
        if q < 0.0:
            keep = self.problem.best(np.array([caps.max() for caps in node.caps]))
            q = float(w @ (keep * keep))
        ends = np.cumsum([0, *map(len, node.sets)])
        sets = np.concatenate(node.sets)
        owner = np.repeat(np.arange(devices), np.diff(ends))
        caps = np.concatenate(node.caps)
        cost, keep, constant = self._costs(caps, owner, q)
        best = _Dual(-np.inf, prices, q, (), np.zeros((devices, self.count)))
        best_full: Array = cost
        usage = np.zeros((devices, self.count))
        scale, since, bits = 1.0, 0, np.arange(self.count)
        for step in range(self.steps):
            full = cost + subset_sums(prices)[sets]
            chosen = np.array([a + np.argmin(full[a:b]) for a, b in pairwise(ends)])
            lower = constant + float(full[chosen].sum() - prices.sum())
            holds = (sets[chosen][:, None] >> bits & 1).astype(float)
            usage = _OLD * usage + _NEW * holds
            if lower > best.lower + _PROGRESS * max(0.0, goal - best.lower):
                since = 0
            else:
                since += 1
            if lower > best.lower:
                best, best_full = _Dual(lower, prices.copy(), q, (), usage), full
            if lower >= goal - self.tolerance:
                break
            if since >= _PATIENCE:
                scale, since = 0.5 * scale, 0
                if scale < _SHORTEST:
                    break
            slope = holds.sum(axis=0) - 1.0
            slope[(prices <= 0.0) & (slope < 0.0)] = 0.0
            norm = float(slope @ slope)
            if bound.generalisation_gap.couples_devices and step % _Q_EVERY == _Q_EVERY - 1:
                q = (1.0 - _Q_DAMPING) * q + _Q_DAMPING * float((w[owner[chosen]] * keep[chosen] ** 2).sum())
                cost, keep, constant = self._costs(caps, owner, q)
            elif norm == 0.0:
                break
            if norm > 0.0:
                prices = np.maximum(0.0, prices + scale * (goal - lower) / norm * slope)
        full = best_full
        reduced = tuple(full[a:b] - full[a:b].min() for a, b in pairwise(ends))
        return _Dual(best.lower, best.prices, best.q, reduced, usage)

    def _costs(self, caps: Array, owner: NDArray[np.intp], q: float) -> tuple[Array, Array, float]:
        """Cost and rate of each column, and the constant of L, with the gap separated at q."""
        bound = self.problem.bound
        gap = bound.generalisation_gap.separated(bound, q, self.problem.samples)
        keep = np.minimum(caps, gap.free_rates(self.problem.keep_min)[owner])
        own = bound.dropout_penalty * bound.penalty(keep) + gap.at(keep, owner)
        return self.problem.weights[owner] * own, keep, bound.base_error + gap.constant

    def _without_losers(self, node: Columns, dual: _Dual, goal: float) -> Columns:
        """Columns whose choice alone lifts the bound past the goal are dropped."""
        room = goal - self.tolerance - dual.lower
        picks = [reduced < room for reduced in dual.reduced]
        return replace(node.only(picks), prices=dual.prices, q=dual.q)

    def _enumerate(self, left: Columns, dual: _Dual, goal: float) -> NodeBound[Columns, Array] | None:
        """All disjoint choices that may beat the goal, if they are few: the node's optimum. None if they are too many."""
        room = goal - self.tolerance - dual.lower
        reduced = [extra[extra < room] for extra in dual.reduced]
        order = sorted(range(len(left.sets)), key=lambda k: len(left.sets[k]))
        taken, extra = np.zeros(1, dtype=np.int64), np.zeros(1)
        picks = np.zeros((1, 0), dtype=np.intp)
        for k in order:
            # Prices of subcarriers that nobody takes are lost, which only raises the true value: extra stays a bound.
            if len(taken) * len(left.sets[k]) > 20 * _ENUMERATE:
                return None
            fits = ((taken[:, None] & left.sets[k]) == 0) & (extra[:, None] + reduced[k] < room)
            row, column = np.nonzero(fits)
            if len(row) > _ENUMERATE:
                return None
            taken, extra = taken[row] | left.sets[k][column], extra[row] + reduced[k][column]
            picks = np.column_stack([picks[row], column])
        if not len(taken):
            return NodeBound(goal - self.tolerance)
        caps = np.empty((len(taken), len(order)))
        for position, k in enumerate(order):
            caps[:, k] = left.caps[k][picks[:, position]]
        values = self.problem.value_of_caps(caps)
        at = int(np.argmin(values))
        value = float(values[at])
        share = np.zeros((len(order), self.count))
        for position, k in enumerate(order):
            share[k] = left.sets[k][picks[at, position]] >> np.arange(self.count) & 1
        # Choices left out are worth at least goal - tolerance.
        return NodeBound(min(value, goal - self.tolerance), value, share)

    def _repair(self, usage: Array) -> tuple[float, Array]:
        owners = np.where(usage.max(axis=0) > 0.05, np.argmax(usage, axis=0), -1)
        owners = improve(self.problem, owners, max_moves=3 * self.count)
        return value_of(self.problem, owners), share_of(owners, len(self.problem.ids))

    def _split(self, left: Columns, usage: Array) -> Sequence[Columns]:
        """(k, m) nearest to one half: the nodes where device k holds subcarrier m, and where it does not."""
        open_pairs = np.zeros(usage.shape, dtype=bool)
        for k, sets in enumerate(left.sets):
            held = (sets[:, None] >> np.arange(self.count) & 1).astype(bool)
            open_pairs[k] = held.any(axis=0) & ~held.all(axis=0)
        if not open_pairs.any():
            return ()
        score = np.where(open_pairs, np.abs(usage - 0.5), np.inf)
        k, m = (int(index) for index in np.unravel_index(np.argmin(score), score.shape))
        holders = [_holds(sets, m) for sets in left.sets]
        given = [has if j == k else ~has for j, has in enumerate(holders)]
        denied = [~has if j == k else np.ones_like(has) for j, has in enumerate(holders)]
        return [left.only(given), left.only(denied)]


def _holds(sets: Sets, m: int) -> NDArray[np.bool_]:
    return (sets >> m & 1).astype(bool)
