"""Greedy assignment and local search over whole subcarriers: the start and the repair of both solvers.

Moves are: give a subcarrier to another device or to nobody, and exchange two subcarriers between their devices. A move
changes the caps of two devices, so all moves are priced at once, O(K M + M^2), with the common rate held where it is; the
chosen one is then evaluated exactly by (35) and (27), and kept if it is better. Shares that break a limit are ranked by how
far they break it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedloom.wireless.system.problem import Problem
from fedloom.wireless.system.radio import Array, Rates, Subcarriers

Owners = NDArray[np.intp]
"""(M,) the device that holds each subcarrier, -1 for none."""

_TRIES = 6  # priced moves evaluated exactly before a share counts as locally best


def share_of(owners: Owners, devices: int) -> Array:
    """(K, M) binary share; owners may be (..., M)."""
    return np.asarray(np.arange(devices)[:, None] == owners[..., None, :], dtype=float)


def value_of(problem: Problem, owners: Owners) -> float:
    """Phi at the best rates for the assignment, by (35) and (27); +inf if it breaks a limit."""
    return float(problem.value_of_caps(problem.caps(share_of(owners, len(problem.ids)))))


@dataclass(frozen=True)
class _Prices:
    """Phi plus a penalty for caps below keep_min, separable over devices at a held common rate."""

    problem: Problem
    rates: Array
    """(K,) the rate that each device would take without its cap."""
    own: Array
    """(K,) empirical part, penalty and (`per_device`) gap of each device now."""
    squares: Array
    """(K,) w x^2 now, for the pooled gap; 0 otherwise."""

    @staticmethod
    def at(problem: Problem, caps: Array) -> _Prices:
        keep = problem.best(caps)
        rates = problem.bound.generalisation_gap.uncapped_rates(problem.bound, keep, problem.samples, problem.keep_min)
        prices = _Prices(problem, rates, caps, caps)
        own, squares = prices.parts(caps, np.arange(len(caps)))
        return _Prices(problem, rates, own, squares)

    def parts(self, caps: Array, device: NDArray[np.intp]) -> tuple[Array, Array]:
        bound, low = self.problem.bound, self.problem.keep_min
        keep = np.clip(np.minimum(caps, self.rates[device]), low, 1.0)
        short = np.maximum(low - caps, 0.0)
        weight = self.problem.weights[device]
        broken = np.where(np.isinf(short), 1.0, short / (1.0 + np.where(np.isinf(short), 0.0, short)))
        own = weight * bound.dropout_penalty * bound.penalty(keep) + _worst(self.problem) * broken
        gap, square = bound.generalisation_gap.parts(bound, keep, weight, self.problem.samples[device])
        return own + gap, square

    def total(self, own: Array, squares: Array) -> Array:
        """Phi plus penalty from summed parts."""
        bound = self.problem.bound
        return own + bound.generalisation_gap.of_parts(bound, squares, self.problem.samples)

    def change(self, *changed: tuple[Array, NDArray[np.intp], NDArray[np.bool_] | bool]) -> Array:
        """Phi plus penalty if each (caps, device, applies) replaced what those devices have now. Shapes broadcast."""
        own: Array = np.asarray(self.own.sum())
        squares: Array = np.asarray(self.squares.sum())
        for caps, device, applies in changed:
            new_own, new_squares = self.parts(caps, device)
            own = own + np.where(applies, new_own - self.own[device], 0.0)
            squares = squares + np.where(applies, new_squares - self.squares[device], 0.0)
        return self.total(own, squares)


def _worst(problem: Problem) -> float:
    """More than Phi can differ between two points: the price of breaking a limit completely."""
    bound, low = problem.bound, problem.keep_min
    return 100.0 * float(bound.dropout_penalty * bound.penalty(low) + bound.gap_at(1.0, problem.samples).max())


def merit(problem: Problem, caps: Array) -> float:
    """Phi plus the penalty for broken limits, exact: what local search descends."""
    prices = _Prices.at(problem, caps)
    return float(problem.bound.base_error + prices.total(prices.own.sum(), prices.squares.sum()))


def improve(problem: Problem, owners: Owners, *, only_add: bool = False, max_moves: int = 10_000) -> Owners:
    """Local search from an assignment, to one that no single move or exchange betters.

    `only_add` hands out free subcarriers and takes none back.
    """
    link, devices = problem.subcarriers, len(problem.ids)
    owners = owners.copy()
    caps = problem.caps(share_of(owners, devices))
    now = merit(problem, caps)
    for _ in range(max_moves):
        for candidate in _candidates(problem, link, owners, caps, only_add, now):
            new_caps = problem.caps(share_of(candidate, devices))
            new = merit(problem, new_caps)
            if new < now - 1e-13 * max(1.0, abs(now)):
                owners, caps, now = candidate, new_caps, new
                break
        else:
            return owners
    return owners


def _candidates(
    problem: Problem, link: Subcarriers, owners: Owners, caps: Array, only_add: bool, now: float
) -> list[Owners]:
    """The most promising neighbours by held-rate price, best first."""
    devices, count = link.up.shape
    prices = _Prices.at(problem, caps)
    share = share_of(owners, devices)
    rates = link.rates(share)
    power = rates.transmit_w
    held = owners >= 0
    owner = np.where(held, owners, 0)
    m = np.arange(count)
    k = np.arange(devices)[:, None]

    gain = problem.caps_of(
        Rates(
            rates.up[:, None] + link.up,
            rates.down[:, None] + link.down,
            power[:, None] + link.power_per_subcarrier_w[:, None],
        ),
        k,
    )
    lone = share.sum(axis=1)[owner] <= 1
    up_left = np.where(lone, 0.0, rates.up[owner] - link.up[owner, m])
    down_left = np.where(lone, 0.0, rates.down[owner] - link.down[owner, m])
    lose = problem.caps_of(Rates(up_left, down_left, power[owner] - link.power_per_subcarrier_w[owner]), owner)

    give = prices.change((gain, k, True), (lose, owner, held))
    give[owner[held], m[held]] = np.inf
    if only_add:
        give[:, held] = np.inf
        return _apply(owners, give, None, None, now - problem.bound.base_error)
    drop = np.where(held, prices.change((lose, owner, held)), np.inf)

    a, n = owner[:, None], m[None, :]
    traded = problem.caps_of(
        Rates(up_left[:, None] + link.up[a, n], down_left[:, None] + link.down[a, n], power[owner][:, None]), a
    )
    partner = np.broadcast_to(owner[None, :], (count, count))
    trade = prices.change((traded, np.broadcast_to(a, (count, count)), True), (traded.T, partner, True))
    same = (owner[:, None] == owner[None, :]) | ~held[:, None] | ~held[None, :]
    trade[same | (m[:, None] >= m[None, :])] = np.inf
    return _apply(owners, give, drop, trade, now - problem.bound.base_error)


def _apply(owners: Owners, give: Array, drop: Array | None, trade: Array | None, now: float) -> list[Owners]:
    moves: list[tuple[float, Owners]] = []
    for kind, table in enumerate((give, drop, trade)):
        if table is None:
            continue
        flat = table.ravel()
        best = np.argpartition(flat, min(_TRIES, flat.size - 1))[:_TRIES]
        for index in best[flat[best] < now + 1e-9 * max(1.0, abs(now))]:
            new = owners.copy()
            where = np.unravel_index(index, table.shape)
            if kind == 0:
                new[where[1]] = where[0]
            elif kind == 1:
                new[where[0]] = -1
            else:
                new[where[0]], new[where[1]] = owners[where[1]], owners[where[0]]
            moves.append((float(flat[index]), new))
    moves.sort(key=lambda move: move[0])
    return [new for _, new in moves[:_TRIES]]


def greedy(problem: Problem) -> Owners:
    """Hand out subcarriers one by one, each time the one that lowers Phi (or mends a broken limit) the most."""
    return improve(problem, np.full(problem.subcarriers.count, -1), only_add=True)


def rounded(problem: Problem, share: Array) -> Owners:
    """An assignment from a relaxed share (K, M): each subcarrier to its largest share, none below 0.02."""
    owners = np.asarray(np.argmax(share, axis=0), dtype=np.intp)
    return np.where(share.max(axis=0) < 0.02, -1, owners)
