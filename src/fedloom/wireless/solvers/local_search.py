"""Greedy assignment and local search over whole subcarriers: the start and the repair of both solvers.

Moves are: give a subcarrier to another device or to nobody, and exchange two subcarriers between their devices. A move
changes the caps of two devices, so all moves are priced at once, O(K M + M^2), with the common rate held where it is; the
chosen one is then evaluated exactly by (35) and (27), and kept if it is better. Shares that break a limit are ranked by how
far they break it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedloom.wireless.system.problem import Problem
from fedloom.wireless.system.radio import Array, Rates

Owners = NDArray[np.intp]
"""(M,) the device that holds each subcarrier, -1 for none."""

_NEGLIGIBLE = 0.02  # a relaxed share that leaves a subcarrier to nobody
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
    devices = len(problem.ids)
    owners = owners.copy()
    caps = problem.caps(share_of(owners, devices))
    now = merit(problem, caps)
    for _ in range(max_moves):
        for candidate in _candidates(problem, owners, caps, only_add, now):
            new_caps = problem.caps(share_of(candidate, devices))
            new = merit(problem, new_caps)
            if new < now - 1e-13 * max(1.0, abs(now)):
                owners, caps, now = candidate, new_caps, new
                break
        else:
            return owners
    return owners


def _candidates(problem: Problem, owners: Owners, caps: Array, only_add: bool, now: float) -> list[Owners]:
    """The most promising neighbours by held-rate price, best first."""
    devices, count = problem.subcarriers.up.shape
    prices = _Prices.at(problem, caps)
    share = share_of(owners, devices)
    rates = problem.link.rates(share)
    held = owners >= 0
    owner = np.where(held, owners, 0)  # of a free subcarrier any will do: what it would lose is not counted
    k, m = np.arange(devices)[:, None], np.arange(count)

    gain = _caps_with_another(problem, rates)
    left = _rates_without_one(problem, rates, share, owner)
    lose = problem.caps_of(left, owner)
    give = prices.change((gain, k, True), (lose, owner, held))
    give[owner[held], m[held]] = np.inf
    below = now - problem.bound.base_error
    if only_add:
        give[:, held] = np.inf
        return _best_moves(owners, [(give, _give)], below)
    drop = np.where(held, prices.change((lose, owner, held)), np.inf)

    swapped = _caps_with_another_instead(problem, rates, left, owner)
    mine, partner = (np.broadcast_to(axis, (count, count)) for axis in (owner[:, None], owner[None, :]))
    trade = prices.change((swapped, mine, True), (swapped.T, partner, True))
    same = (mine == partner) | ~held[:, None] | ~held[None, :]
    trade[same | (m[:, None] >= m[None, :])] = np.inf
    return _best_moves(owners, [(give, _give), (drop, _drop), (trade, _trade)], below)


def _caps_with_another(problem: Problem, rates: Rates) -> Array:
    """(K, M) the cap of device k if it held subcarrier m besides."""
    link = problem.subcarriers
    power = rates.transmit_w[:, None] + link.power_per_subcarrier_w[:, None]
    more = Rates(rates.up[:, None] + link.up, rates.down[:, None] + link.down, power)
    return problem.caps_of(more, np.arange(len(link.up))[:, None])


def _rates_without_one(problem: Problem, rates: Rates, share: Array, owner: Owners) -> Rates:
    """(M,) what subcarrier m's owner is left with without it; 0 exactly where it is the only one."""
    link, m = problem.subcarriers, np.arange(len(owner))
    lone = share.sum(axis=1)[owner] <= 1
    up = np.where(lone, 0.0, rates.up[owner] - link.up[owner, m])
    down = np.where(lone, 0.0, rates.down[owner] - link.down[owner, m])
    return Rates(up, down, rates.transmit_w[owner] - link.power_per_subcarrier_w[owner])


def _caps_with_another_instead(problem: Problem, rates: Rates, left: Rates, owner: Owners) -> Array:
    """(M, M) the cap of subcarrier m's owner if it held n in place of m, which takes the same power."""
    link, k, n = problem.subcarriers, owner[:, None], np.arange(len(owner))[None, :]
    up, down = left.up[:, None] + link.up[k, n], left.down[:, None] + link.down[k, n]
    return problem.caps_of(Rates(up, down, rates.transmit_w[owner][:, None]), k)


Move = Callable[[Owners, int, int], None]
"""Changes an assignment in place; the two numbers are a place in the move's table of prices."""


def _give(owners: Owners, k: int, m: int) -> None:
    owners[m] = k


def _drop(owners: Owners, m: int, _: int) -> None:
    owners[m] = -1


def _trade(owners: Owners, m: int, n: int) -> None:
    owners[m], owners[n] = owners[n], owners[m]


def _best_moves(owners: Owners, priced: Sequence[tuple[Array, Move]], below: float) -> list[Owners]:
    """The cheapest moves of the tables, each applied to a copy, as far as they are priced below `below`."""
    found: list[tuple[float, Owners]] = []
    for table, move in priced:
        flat = table.ravel()
        best = np.argpartition(flat, min(_TRIES, flat.size - 1))[:_TRIES]
        for index in best[flat[best] < below + 1e-9 * max(1.0, abs(below))]:
            new = owners.copy()
            row, *column = np.unravel_index(index, table.shape)
            move(new, int(row), int(column[0]) if column else 0)
            found.append((float(flat[index]), new))
    found.sort(key=lambda priced_move: priced_move[0])
    return [new for _, new in found[:_TRIES]]


def greedy(problem: Problem) -> Owners:
    """Hand out subcarriers one by one, each time the one that lowers Phi (or mends a broken limit) the most."""
    return improve(problem, np.full(problem.subcarriers.count, -1), only_add=True)


def rounded(problem: Problem, share: Array) -> Owners:
    """An assignment from a relaxed share (K, M): each subcarrier to its largest share, none that is negligible."""
    owners = np.asarray(np.argmax(share, axis=0), dtype=np.intp)
    return np.where(share.max(axis=0) < _NEGLIGIBLE, -1, owners)
