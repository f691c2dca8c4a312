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
from typing import ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike
from pydantic import ConfigDict, with_config

from fedloom.errors import ConfigError
from fedloom.wireless.system.empirical_error import FORMS, Empirical, EmpiricalError
from fedloom.wireless.system.radio import ALL, Array, Pick

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
        for name, known in (("empirical", tuple(FORMS)), ("gap", tuple(GAPS))):
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

    @property
    def empirical_error(self) -> EmpiricalError:
        """The form of e."""
        return FORMS[self.empirical]

    @property
    def generalisation_gap(self) -> GeneralisationGap:
        """The form of the gap."""
        return GAPS[self.gap]

    # one device

    def stability(self, keep: ArrayLike, samples: ArrayLike) -> Array:
        """(14): pointwise hypothesis stability 2 eta^2 / ((Lambda_min + 2 lambda (1 - x^2)) n)."""
        x = np.asarray(keep, dtype=float)
        return np.asarray(2.0 * self.lipschitz**2 / (self._curvature(x * x) * np.asarray(samples, dtype=float)))

    def penalty(self, keep: ArrayLike) -> Array:
        """e(x): the empirical error's growth with dropout, in units of A1. 0 at x = 1."""
        return self.empirical_error.value(np.asarray(keep, dtype=float))

    def penalty_slope(self, keep: ArrayLike) -> Array:
        """de/dx, negative."""
        return self.empirical_error.slope(np.asarray(keep, dtype=float))

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

    def common_slope(self, rate: Array, q: Array, samples: ArrayLike) -> Array:
        """Slope of Phi along a common rate, over the weight of the devices not at their caps."""
        return np.asarray(self.dropout_penalty * self.penalty_slope(rate) + 2.0 * rate * self.gap_slope(q, samples))

    # all devices

    def empirical_term(self, keep: Array, samples: Array) -> Array:
        """A0 + A1 sum_k w_k e(x_k), (...,)."""
        return np.asarray(self.base_error + self.dropout_penalty * self.penalty(keep) @ weights(samples))

    def gap_term(self, keep: Array, samples: Array) -> Array:
        """The generalisation gap, (18) or (18'), (...,)."""
        return self.generalisation_gap.term(self, keep, samples)

    def value(self, keep: Array, samples: Array) -> Array:
        """(26): Phi, (...,)."""
        return self.empirical_term(keep, samples) + self.gap_term(keep, samples)

    def best(self, caps: Array, samples: Array, keep_min: float) -> Array:
        """(27): the rates in [keep_min, caps] of least Phi, caps (..., K), O(K) each. A cap below keep_min counts as that."""
        return self.generalisation_gap.best(self, caps, samples, keep_min)

    def free_rates(self, samples: Array, keep_min: float) -> Array:
        """x*: the best rates (K,) without any cap; all equal for the `pooled` gap."""
        return self.generalisation_gap.free_rates(self, samples, keep_min)


class GeneralisationGap(Protocol):
    """How the gap of several devices follows from G, and what the solvers have to know of it."""

    couples_devices: ClassVar[bool]
    """Is it a function of all rates together, or a sum over devices?"""

    def term(self, bound: Bound, keep: Array, samples: Array) -> Array:
        """The gap, (...,) of (..., K)."""

    def best(self, bound: Bound, caps: Array, samples: Array, keep_min: float) -> Array:
        """(27), see `Bound.best`."""

    def free_rates(self, bound: Bound, samples: Array, keep_min: float) -> Array:
        """x*, see `Bound.free_rates`."""

    def uncapped_rates(self, bound: Bound, keep: Array, samples: Array, keep_min: float) -> Array:
        """(K,) what each device would take without its own cap if the others stayed at their best rates `keep`."""

    def parts(self, bound: Bound, keep: Array, weight: Array, samples: Array) -> tuple[Array, Array]:
        """The gap that adds up over devices, and each device's part w x^2 of q; one of the two is 0."""

    def of_parts(self, bound: Bound, q: Array, samples: Array) -> Array | float:
        """The gap that does not add up over devices, from the sum of their parts of q."""

    def separated(self, bound: Bound, q: float, samples: Array) -> SeparatedGap:
        """The gap as a sum over devices, or its tangent at q, which lies below it, since G is convex."""

    def tangents(self, bound: Bound, q: Array, samples: Array) -> tuple[Array, Array]:
        """Slopes and intercepts of the tangents of G at q (J,): (J,), or (J, K) for a sum over devices."""


class SeparatedGap(Protocol):
    """A lower bound of the gap that is constant + sum_k w_k g_k(x_k^2)."""

    @property
    def constant(self) -> float: ...

    def at(self, keep: Array, device: Pick = ALL) -> Array:
        """g_k(x^2)."""

    def slope(self, keep: Array, device: Pick = ALL) -> Array:
        """g_k'(x^2), by x^2."""

    def free_rates(self, keep_min: float) -> Array:
        """(K,) argmin of A1 e(x) + g_k(x^2) without caps."""


class Pooled:
    """(18): one gap G(q) of all samples, q = sum_k w_k x_k^2."""

    couples_devices: ClassVar[bool] = True

    def term(self, bound: Bound, keep: Array, samples: Array) -> Array:
        return bound.gap_at((keep * keep) @ weights(samples), samples.sum())

    def best(self, bound: Bound, caps: Array, samples: Array, keep_min: float) -> Array:
        # All devices share one rate, cut at their caps: along that line Phi is unimodal, so its slope is bisected.
        caps = np.clip(caps, keep_min, 1.0)
        w, n = weights(samples), samples.sum()
        low = np.full(caps.shape[:-1], keep_min)
        high = np.ones(caps.shape[:-1])
        for _ in range(_BISECTIONS):
            rate = 0.5 * (low + high)
            cut = np.minimum(caps, rate[..., None])
            rising = bound.common_slope(rate, (cut * cut) @ w, n) > 0.0
            high = np.where(rising, rate, high)
            low = np.where(rising, low, rate)
        # The ends are kept exactly, so that "no dropout" is 1 and not 1 - 1e-15.
        return np.minimum(caps, np.where(high >= 1.0, 1.0, low)[..., None])

    def free_rates(self, bound: Bound, samples: Array, keep_min: float) -> Array:
        return self.best(bound, np.ones_like(samples), samples, keep_min)

    def uncapped_rates(self, bound: Bound, keep: Array, samples: Array, keep_min: float) -> Array:
        return np.broadcast_to(keep.max(), keep.shape)

    def parts(self, bound: Bound, keep: Array, weight: Array, samples: Array) -> tuple[Array, Array]:
        square = weight * keep * keep
        return np.zeros_like(square), square

    def of_parts(self, bound: Bound, q: Array, samples: Array) -> Array | float:
        return bound.gap_at(np.clip(q, 0.0, 1.0), samples.sum())

    def separated(self, bound: Bound, q: float, samples: Array) -> SeparatedGap:
        n = float(samples.sum())
        slope = float(bound.gap_slope(q, n))
        return TangentGap(bound, len(samples), slope, float(bound.gap_at(q, n)) - slope * q)

    def tangents(self, bound: Bound, q: Array, samples: Array) -> tuple[Array, Array]:
        slope = bound.gap_slope(q, samples.sum())
        return slope, bound.gap_at(q, samples.sum()) - slope * q


class PerDevice:
    """(18'): the mean of every device's own G(x_k^2), weighted by samples."""

    couples_devices: ClassVar[bool] = False

    def term(self, bound: Bound, keep: Array, samples: Array) -> Array:
        return np.asarray(bound.gap_at(keep * keep, samples) @ weights(samples))

    def best(self, bound: Bound, caps: Array, samples: Array, keep_min: float) -> Array:
        return np.clip(np.minimum(caps, self.free_rates(bound, samples, keep_min)), keep_min, 1.0)

    def free_rates(self, bound: Bound, samples: Array, keep_min: float) -> Array:
        low, high = np.full_like(samples, keep_min), np.ones_like(samples)
        for _ in range(_BISECTIONS):
            rate = 0.5 * (low + high)
            rising = bound.common_slope(rate, rate * rate, samples) > 0.0
            high, low = np.where(rising, rate, high), np.where(rising, low, rate)
        return np.where(high >= 1.0, 1.0, low)

    def uncapped_rates(self, bound: Bound, keep: Array, samples: Array, keep_min: float) -> Array:
        return self.free_rates(bound, samples, keep_min)

    def parts(self, bound: Bound, keep: Array, weight: Array, samples: Array) -> tuple[Array, Array]:
        own = weight * bound.gap_at(keep * keep, samples)
        return own, np.zeros_like(own)

    def of_parts(self, bound: Bound, q: Array, samples: Array) -> Array | float:
        return 0.0

    def separated(self, bound: Bound, q: float, samples: Array) -> SeparatedGap:
        return OwnGap(bound, samples)

    def tangents(self, bound: Bound, q: Array, samples: Array) -> tuple[Array, Array]:
        q = np.repeat(q[:, None], len(samples), axis=1)
        slope = bound.gap_slope(q, samples)
        return slope, bound.gap_at(q, samples) - slope * q


@dataclass(frozen=True)
class TangentGap:
    """The tangent of the pooled gap: g_k(x^2) = G'(q0) x^2."""

    bound: Bound
    devices: int
    slope_q: float
    constant: float

    def at(self, keep: Array, device: Pick = ALL) -> Array:
        return self.slope_q * keep * keep

    def slope(self, keep: Array, device: Pick = ALL) -> Array:
        return np.full_like(keep, self.slope_q)

    def free_rates(self, keep_min: float) -> Array:
        ratio = self.bound.dropout_penalty / self.slope_q
        return np.full(self.devices, np.clip(self.bound.empirical_error.best_against_square(ratio), keep_min, 1.0))


@dataclass(frozen=True)
class OwnGap:
    """The gap of every device, exactly: g_k = G for n_k."""

    bound: Bound
    samples: Array
    constant: float = 0.0

    def at(self, keep: Array, device: Pick = ALL) -> Array:
        return self.bound.gap_at(keep * keep, self.samples[device])

    def slope(self, keep: Array, device: Pick = ALL) -> Array:
        return self.bound.gap_slope(keep * keep, self.samples[device])

    def free_rates(self, keep_min: float) -> Array:
        return self.bound.free_rates(self.samples, keep_min)


GAPS: dict[Gap, GeneralisationGap] = {"pooled": Pooled(), "per_device": PerDevice()}


def weights(samples: Array) -> Array:
    """w_k = n_k / n."""
    return np.asarray(samples / samples.sum())
