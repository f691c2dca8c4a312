"""Paired comparison over draws: intervals, probability of improvement, draws needed, and a split of the variance.

The repeated unit is the draw (a partition and its hold-out), shared by all methods: differences are paired. With few draws
p-values say little and intervals say it better. Probability of improvement: Agarwal et al., "Deep Reinforcement Learning at
the Edge of the Statistical Precipice", NeurIPS 2021, arXiv 2108.13264. Step-down test: Holm, Scand. J. Statist. 6, 1979.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.05
"""Two-sided; intervals cover 1 - LEVEL."""
POWER = 0.8

Values = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean with its t interval; without a spread (one value) there is no interval."""

    mean: float
    low: float
    high: float
    n: int
    sd: float


@dataclass(frozen=True)
class Difference:
    """First minus second, paired by draw, in the direction in which more is better."""

    first: str
    second: str
    gain: Interval
    p: float
    """Two-sided, of the paired t test."""
    wins: int
    """Draws in which the first is better."""
    ties: int
    improvement: float
    """Probability that the first on one draw is better than the second on one draw, ties counted half."""
    draws_needed: int | None
    """Draws that would tell such a gap apart with power 0.8; None if there is no gap."""
    p_holm: float = 1.0
    """`p` with all pairs of the study taken together."""

    @property
    def separate(self) -> bool:
        """Whether the two can be told apart, all pairs taken together."""
        return self.p_holm < LEVEL


@dataclass(frozen=True)
class VarianceSplit:
    """Where the spread of scores comes from: variance components, which add up to one score's variance within a method."""

    partition: float
    """Draws move all methods together."""
    interaction: float
    """Draws move methods apart."""
    seed: float | None
    """Training seeds on one draw; None with one seed, when it is part of the interaction."""

    @property
    def total(self) -> float:
        """Variance of a score of one method."""
        return self.partition + self.interaction + (self.seed or 0.0)


def interval(values: Values) -> Interval:
    """Mean and t interval of independent values (n,).

    >>> x = interval([1.0, 2.0, 3.0])
    >>> round(x.low, 3), x.mean, round(x.high, 3)
    (-0.484, 2.0, 4.484)
    """
    x = np.asarray(values, np.float64)
    n = len(x)
    mean, sd = float(x.mean()), float(x.std(ddof=1)) if n > 1 else math.nan
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * sd / math.sqrt(n) if n > 1 else math.nan
    return Interval(mean, mean - half, mean + half, n, sd)


def difference(first: tuple[str, Values], second: tuple[str, Values], higher_is_better: bool = True) -> Difference:
    """The paired difference of two methods' scores, (draws,) each and in the same order of draws."""
    sign = 1.0 if higher_is_better else -1.0
    x, y = (sign * np.asarray(v, np.float64) for _, v in (first, second))
    d = x - y
    gain = interval(d)
    return Difference(
        first[0],
        second[0],
        gain,
        _p_value(gain),
        int((d > 0).sum()),
        int((d == 0).sum()),
        probability_of_improvement(x, y),
        draws_needed(gain),
    )


def _p_value(gain: Interval) -> float:
    if gain.n < 2:
        return 1.0
    if gain.sd == 0:
        return 1.0 if gain.mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(gain.mean) * math.sqrt(gain.n) / gain.sd, gain.n - 1))


def probability_of_improvement(x: Values, y: Values) -> float:
    """P(X > Y) + P(X = Y) / 2 over all pairs of a value of x and one of y.

    >>> probability_of_improvement([1.0, 3.0], [2.0, 3.0])
    0.375
    """
    a, b = np.asarray(x, np.float64)[:, None], np.asarray(y, np.float64)[None, :]
    return float(((a > b) + 0.5 * (a == b)).mean())


def draws_needed(gain: Interval) -> int | None:
    """Paired draws that tell a gap of this size and spread apart, two-sided 5 %, power 0.8 (normal approximation)."""
    if gain.n < 2 or gain.mean == 0:
        return None
    z = stats.norm.ppf(1 - LEVEL / 2) + stats.norm.ppf(POWER)
    return max(2, math.ceil(float(z**2 * gain.sd**2 / gain.mean**2)))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, worst = [0.0] * len(p), 0.0
    for k, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, (len(p) - k) * p[i]))
        adjusted[i] = worst
    return adjusted


def binomial_error(share: float, rows: int) -> float:
    """Standard error of a share of right answers on `rows` rows: what the size of the test set alone leaves open.

    With two right and two wrong answers added (Agresti and Coull, Am. Statist. 52, 1998), so that all right is not certain.
    """
    n = rows + 4
    p = (share * rows + 2) / n
    return math.sqrt(p * (1 - p) / n)


def variance_split(scores: Mapping[str, Values]) -> VarianceSplit | None:
    """Variance components of {method: (draws, seeds)}: random draws crossed with methods, seeds within.

    By the method of moments on a balanced table, negative estimates set to 0. None with fewer than 2 methods or 3 draws.
    """
    table = np.stack([np.asarray(x, np.float64) for x in scores.values()]) if scores else np.empty((0, 0, 0))
    methods, draws, seeds = table.shape
    if methods < 2 or draws < 3:
        return None
    cells = table.mean(axis=2)
    centred = cells - cells.mean(axis=1, keepdims=True)  # methods' own levels are no variance
    by_draw = centred.mean(axis=0)
    ms_draw = methods * seeds * float((by_draw**2).sum()) / (draws - 1)
    ms_both = seeds * float(((centred - by_draw) ** 2).sum()) / ((draws - 1) * (methods - 1))
    within = float(((table - cells[..., None]) ** 2).sum()) / (methods * draws * (seeds - 1)) if seeds > 1 else None
    return VarianceSplit(
        partition=max(0.0, (ms_draw - ms_both) / (methods * seeds)),
        interaction=max(0.0, (ms_both - (within or 0.0)) / seeds),
        seed=within,
    )
