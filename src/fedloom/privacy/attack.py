"""Statistics of attacks: how well scores tell members, with intervals, and what that says of epsilon."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.floating]
"""One number a row: larger means more likely a member."""


@dataclass(frozen=True)
class Attack:
    """A membership attack on n members and n' others."""

    auc: float
    """Probability that a member scores above another row; 0.5 is chance."""
    auc_low: float
    auc_high: float
    """95 % interval (Hanley and McNeil, Radiology 143, 1982)."""
    tpr: float
    """Share of members found where one in a hundred of the others is called a member."""
    tpr_low: float
    tpr_high: float
    """95 % interval (Clopper and Pearson, Biometrika 26, 1934)."""


def attack(members: Scores, others: Scores) -> Attack:
    """What the scores give away."""
    from scipy.stats import rankdata

    n, m = len(members), len(others)
    ranks = rankdata(np.concatenate([members, others]))
    auc = float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))
    first, second = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = (auc * (1 - auc) + (n - 1) * (first - auc**2) + (m - 1) * (second - auc**2)) / (n * m)
    half = 1.96 * math.sqrt(max(variance, 0.0))
    bar = np.sort(others)[::-1][min(m - 1, math.floor(0.01 * m))]
    found = int((members > bar).sum())
    low, high = interval(found, n)
    return Attack(auc, max(0.0, auc - half), min(1.0, auc + half), found / n, low, high)


def interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval of a probability."""
    from scipy.stats import beta

    tail = (1 - level) / 2
    low = float(beta.ppf(tail, successes, trials - successes + 1)) if successes else 0.0
    high = float(beta.ppf(1 - tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return low, high


def epsilon_bound(canaries: int, guesses: int, right: int, delta: float, level: float = 0.95) -> float:
    """The epsilon that a mechanism must have, with this confidence, if `right` of `guesses` about coins are right.

    Each of `canaries` was in the data by a fair coin of its own; the attacker abstains on the others. Steinke, Nasr and
    Jagielski, "Privacy auditing with one (1) training run", NeurIPS 2023, arXiv 2305.08846.
    """
    from scipy.optimize import brentq
    from scipy.stats import binom

    def p_value(eps: float) -> float:
        q = 1 / (1 + math.exp(-eps))
        beta = float(binom.sf(right - 1, guesses, q))
        steps = np.arange(1, right + 1)
        alpha = max(0.0, float(((binom.sf(right - 1 - steps, guesses, q) - beta) / steps).max())) if right else 0.0
        return min(1.0, beta + 2 * canaries * delta * alpha)

    wrong = 1 - level
    if right == 0 or p_value(0.0) >= wrong:
        return 0.0
    high = 1.0
    while p_value(high) < wrong and high < 50:
        high *= 2
    return float(brentq(lambda eps: p_value(eps) - wrong, 0.0, high, xtol=1e-6))


def canary_guesses(scores: Scores, coins: NDArray[np.bool_], share: float = 0.1) -> tuple[int, int]:
    """(guesses, right ones): the highest tenth of the scores is called in, the lowest out. The share is fixed beforehand."""
    k = max(1, int(share * len(scores)))
    order = np.argsort(scores, kind="stable")
    return 2 * k, int(coins[order[-k:]].sum() + (~coins[order[:k]]).sum())
