"""The upper bound of the generalisation error as a function of the keep rates, and the rates that minimise it under caps.

Stability bound of LoRA Dropout (Lin et al., arXiv 2404.09610), (14)-(16); its federated form (17)-(20), the empirical
part (21)-(25) and the closed form (27) are derived, because the text of FedLoDrop (arXiv 2510.12078) was not available.
What is certain of that paper: more dropout means more sparsity and a smaller gap, but a larger empirical error.

    Phi(x) = A0 + A1 sum_k w_k e(x_k) + gap(x)                                                       (26)

    e(x) = 1 - x^2 (`sparsity`), 1 - x (`linear`), 1/x - 1 (`rescaled`)
    gap  = sqrt((C^2 + 24 C eta^2 / (Lambda_min + 2 lambda (1 - q))) / (2 n delta)), q = sum_k w_k x_k^2    (18) `pooled`
    gap  = sum_k w_k of the same with q = x_k^2 and n_k for n                                      (18') `per_device`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from pydantic import ConfigDict, with_config

from fedloom.errors import ConfigError
from fedloom.wireless.system.radio import Array

Empirical = Literal["sparsity", "linear", "rescaled"]
Gap = Literal["pooled", "per_device"]

_BISECTIONS = 50  # of [keep_min, 1]: the rate to 1e-15


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class Bound:
    """Constants and shape of the bound. A keep rate is x = 1 - dropout rate, arrays are (..., K).

    The defaults give an optimum inside (0, 1) for a few thousand samples; none is from the paper, which is unknown
    there. Estimate them from a run with `fedloom.wireless.system.constants`. Raises ConfigError for a constant out of range.
    """

    empirical: Empirical = "linear"
    gap: Gap = "pooled"
    base_error: float = 0.0
    """A0, the part of the empirical error that dropout does not touch."""
    dropout_penalty: float = 1.0
    """A1, the price of dropping everything (`linear`, `sparsity`)."""
    loss_range: float = 1.0
    """C."""
    lipschitz: float = 1.0
    """eta, of the loss in the adapter's parameters."""
    curvature_min: float = 0.01
    """Lambda_min, smallest eigenvalue of the Hessian; 0 would make the gap infinite without dropout."""
    regularisation: float = 0.1
    """lambda."""
    failure: float = 0.05
    """delta, the probability that the bound does not hold."""

    def __post_init__(self) -> None:
        for name, known in (("empirical", get_args(Empirical)), ("gap", get_args(Gap))):
            if getattr(self, name) not in known:
                raise ConfigError(f"bound.{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name in ("dropout_penalty", "loss_range", "lipschitz", "curvature_min", "regularisation"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0.0):
                raise ConfigError(f"bound.{name} is {value}, expected a finite number above 0; estimate it from a run")
        if not np.isfinite(self.base_error):
            raise ConfigError(f"bound.base_error is {self.base_error}, expected a finite number")
        if not 0.0 < self.failure < 1.0:
            raise ConfigError(f"bound.failure is {self.failure}, expected a probability between 0 and 1")

    # one device

    def stability(self, keep: ArrayLike, samples: ArrayLike) -> Array:
        """(14): pointwise hypothesis stability 2 eta^2 / ((Lambda_min + 2 lambda (1 - x^2)) n)."""
        x = np.asarray(keep, dtype=float)
        return np.asarray(2.0 * self.lipschitz**2 / (self._curvature(x * x) * np.asarray(samples, dtype=float)))

    def penalty(self, keep: ArrayLike) -> Array:
        """e(x): the empirical error's growth with dropout, in units of A1. 0 at x = 1."""
        x = np.asarray(keep, dtype=float)
        if self.empirical == "sparsity":
            return np.asarray(1.0 - x * x)
        return np.asarray(1.0 - x if self.empirical == "linear" else 1.0 / x - 1.0)

    def penalty_slope(self, keep: ArrayLike) -> Array:
        """de/dx, negative."""
        x = np.asarray(keep, dtype=float)
        if self.empirical == "sparsity":
            return np.asarray(-2.0 * x)
        return -np.ones_like(x) if self.empirical == "linear" else np.asarray(-1.0 / (x * x))

    def _curvature(self, q: Array) -> Array:
        return np.asarray(self.curvature_min + 2.0 * self.regularisation * (1.0 - q))

    def gap_at(self, q: ArrayLike, samples: ArrayLike) -> Array:
        """(18): G(q) for n = `samples`. Convex and increasing in q on [0, 1], (19), (20)."""
        q = np.asarray(q, dtype=float)
        top = self.loss_range**2 + 24.0 * self.loss_range * self.lipschitz**2 / self._curvature(q)
        return np.asarray(np.sqrt(top / (2.0 * np.asarray(samples, dtype=float) * self.failure)))

    def gap_slope(self, q: ArrayLike, samples: ArrayLike) -> Array:
        """(19): G'(q)."""
        a = self._curvature(np.asarray(q, dtype=float))
        inner = 24.0 * self.loss_range * self.lipschitz**2 * 2.0 * self.regularisation / (a * a)
        n = np.asarray(samples, dtype=float)
        return np.asarray(inner / (2.0 * n * self.failure) / (2.0 * self.gap_at(q, samples)))

    # all devices

    def empirical_term(self, keep: Array, samples: Array) -> Array:
        """A0 + A1 sum_k w_k e(x_k), (...,)."""
        return np.asarray(self.base_error + self.dropout_penalty * self.penalty(keep) @ weights(samples))

    def gap_term(self, keep: Array, samples: Array) -> Array:
        """(18) or (18'), (...,)."""
        w = weights(samples)
        if self.gap == "pooled":
            return self.gap_at((keep * keep) @ w, samples.sum())
        return np.asarray(self.gap_at(keep * keep, samples) @ w)

    def value(self, keep: Array, samples: Array) -> Array:
        """(26): Phi, (...,)."""
        return self.empirical_term(keep, samples) + self.gap_term(keep, samples)

    def best(self, caps: Array, samples: Array, keep_min: float) -> Array:
        """(27): the rates in [keep_min, caps] of least Phi, caps (..., K), O(K) each.

        `pooled`: all devices share one rate, cut at their caps; `per_device`: each its own. Either is found by bisection
        on the slope along that line, where Phi is unimodal. A cap below keep_min counts as keep_min.
        """
        if self.gap == "per_device":
            return np.clip(np.minimum(caps, self.free_rates(samples, keep_min)), keep_min, 1.0)
        caps = np.clip(caps, keep_min, 1.0)
        w, n = weights(samples), samples.sum()
        low = np.full(caps.shape[:-1], keep_min)
        high = np.ones(caps.shape[:-1])
        for _ in range(_BISECTIONS):
            rate = 0.5 * (low + high)
            cut = np.minimum(caps, rate[..., None])
            rising = self._slope(rate, (cut * cut) @ w, n) > 0.0
            high = np.where(rising, rate, high)
            low = np.where(rising, low, rate)
        # The ends are kept exactly, so that "no dropout" is 1 and not 1 - 1e-15.
        return np.minimum(caps, np.where(high >= 1.0, 1.0, low)[..., None])

    def free_rates(self, samples: Array, keep_min: float) -> Array:
        """x*: the best rates (K,) without any cap; all equal for the `pooled` gap."""
        if self.gap == "pooled":
            return self.best(np.ones_like(samples), samples, keep_min)
        low, high = np.full_like(samples, keep_min), np.ones_like(samples)
        for _ in range(_BISECTIONS):
            rate = 0.5 * (low + high)
            rising = self._slope(rate, rate * rate, samples) > 0.0
            high, low = np.where(rising, rate, high), np.where(rising, low, rate)
        return np.where(high >= 1.0, 1.0, low)

    def _slope(self, rate: Array, q: Array, samples: ArrayLike) -> Array:
        """Slope of Phi along the common rate, over the weight of the devices not at their caps."""
        return np.asarray(self.dropout_penalty * self.penalty_slope(rate) + 2.0 * rate * self.gap_slope(q, samples))


def weights(samples: Array) -> Array:
    """w_k = n_k / n."""
    return np.asarray(samples / samples.sum())
