"""How much privacy releases of Gaussian noise cost together: epsilon at a delta, and the noise that keeps to one.

Without sampling, releases are one Gaussian with mu^2 = sum 1/z^2, and epsilon has a closed form (Balle, Wang, "Improving the
Gaussian mechanism", ICML 2018, arXiv 1805.06530). With Poisson sampling, `dp-accounting`'s privacy-loss distributions
compose them. Noise in integers (Skellam) has a bound on its Renyi divergence, and epsilon follows from that: a tenth more
than the Gaussian's closed form. Neighbours differ in one unit whose part is replaced by zero; sensitivities are computed by
us, once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from fedloom.errors import ConfigError


@dataclass(frozen=True)
class Release:
    """Gaussian noise on a sum, or Skellam noise on one of integers."""

    noise_multiplier: float
    """Standard deviation over sensitivity."""
    count: int = 1
    sampling: float = 1.0
    """Probability of each unit to be in the sum, secretly and on its own; 1: it is."""
    grid: float = 0.0
    """Integers that the sensitivity is long, at least, of Skellam noise; 0: the noise is Gaussian."""


def epsilon(releases: Iterable[Release], delta: float) -> float:
    """Epsilon of all releases together; infinite if one of them has no noise."""
    counts: Counter[tuple[float, float]] = Counter()
    integers: list[Release] = []
    for one in releases:
        counts[one.noise_multiplier, one.sampling] += one.count
        integers += [one] if one.grid and one.count else []
    counts = +counts
    if not counts:
        return 0.0
    if any(z == 0 for z, _ in counts):
        return math.inf
    if integers:
        if any(q != 1 for _, q in counts):
            raise ConfigError("noise in integers of sampled units has no accountant here: set sampling to 'none'")
        return _renyi_epsilon(sum(n / z**2 for (z, _), n in counts.items()), integers, delta)
    if all(q == 1 for _, q in counts):
        return gaussian_epsilon(math.sqrt(sum(n / z**2 for (z, _), n in counts.items())), delta)
    return _composed(tuple(sorted(counts.items())), delta)


def gaussian_delta(eps: float, mu: float) -> float:
    """Smallest delta of a Gaussian mechanism whose sensitivity is mu standard deviations."""
    from scipy.special import log_ndtr, ndtr

    return float(ndtr(mu / 2 - eps / mu) - math.exp(eps + float(log_ndtr(-mu / 2 - eps / mu))))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Smallest epsilon at this delta."""
    from scipy.optimize import brentq

    if gaussian_delta(0.0, mu) <= delta:
        return 0.0
    top = 1.0
    while gaussian_delta(top, mu) > delta:
        top *= 2
    return float(brentq(lambda eps: gaussian_delta(eps, mu) - delta, 0.0, top, xtol=1e-12))


def _renyi_epsilon(mu_squared: float, integers: Iterable[Release], delta: float) -> float:
    """Smallest epsilon over Renyi orders a > 1: that of Gaussians, a mu^2 / 2, and what Skellam noise adds.

    With sensitivities D2 = grid and D1 <= D2^2 and variance (z D2)^2 (Agarwal, Kairouz, Liu, "The Skellam mechanism for
    differentially private federated learning", arXiv 2110.04995, theorem 3.1) for whole orders; between them (a - 1) times the
    divergence is convex in a, so no larger than its chord. Conversion of Canonne, Kamath, Steinke, arXiv 2004.00010, prop. 12.
    """
    import numpy as np

    whole = np.concatenate([np.arange(1, 200), np.unique(np.geomspace(200, 1e6, 400).round())])
    divergence = whole * mu_squared / 2
    for one in integers:
        z, D2 = one.noise_multiplier, one.grid
        divergence += one.count * np.minimum((2 * whole + 5) / (4 * z**4 * D2**2), 3 / (2 * z**2))
    a = 1 + np.geomspace(1e-4, 1e6 - 1, 8000)
    found = np.interp(a, whole, (whole - 1) * divergence) / (a - 1)
    found += np.log1p(-1 / a) - (math.log(delta) + np.log(a)) / (a - 1)
    return max(0.0, float(found.min()))


@lru_cache(maxsize=256)
def _composed(releases: tuple[tuple[tuple[float, float], int], ...], delta: float) -> float:
    try:
        from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
        from dp_accounting.pld import PLDAccountant
    except ImportError as error:
        raise ConfigError(f"sampled releases need dp-accounting ({error}): pip install 'fedloom[privacy]'") from None
    accountant = PLDAccountant()
    for (z, q), count in releases:
        event = GaussianDpEvent(z)
        accountant.compose(event if q == 1 else PoissonSampledDpEvent(q, event), count)
    return cast(float, accountant.get_epsilon(delta))


def noise_multiplier(target: float, delta: float, count: int, sampling: float = 1.0, grid: float = 0.0) -> float:
    """The smallest noise multiplier with which `count` releases cost at most `target`."""
    from scipy.optimize import brentq

    def excess(log_z: float) -> float:
        found = epsilon([Release(math.exp(log_z), count, sampling, grid)], delta)
        return math.log(max(found, 1e-9) / target)

    low, high = math.log(0.3), math.log(3.0)
    while excess(low) < 0:
        low -= 0.7
        if low < -7:
            return math.exp(low)
    while excess(high) > 0:
        high += 1.0
        if high > 20:
            raise ConfigError(f"no noise keeps {count} releases to epsilon {target:g} at delta {delta:g}")
    found = math.exp(float(brentq(excess, low, high, xtol=1e-7)))
    while epsilon([Release(found, count, sampling, grid)], delta) > target:
        found *= 1 + 1e-7
    return found
