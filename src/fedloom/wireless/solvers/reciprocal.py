"""The problem in y = 1/payload, (36)-(39), in units of one full payload: what both convex models are written in.

    C1'  1/r_dl + 1/r_ul + t1 <= (T - t0) y        jointly convex in shares and y                     (36)
    C2'  p N + e1 r_ul <= (E - e0) y r_ul          bilinear on the right                              (37)
    x = (1/y - a)/b;  e(y) is concave for `linear` and `sparsity`, convex for `rescaled`              (38)

with a + b = 1, so y is 1 at keep = 1 and rates are full payloads per second. Derived.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedloom.wireless.system.generalisation_bound import Bound
from fedloom.wireless.system.problem import Problem
from fedloom.wireless.system.radio import Array

_TANGENTS = 60


@dataclass(frozen=True)
class Reciprocal:
    """Arrays (K,) unless said otherwise."""

    bound: Bound
    weights: Array
    samples: Array
    up: Array
    """(K, M) full payloads a second of one subcarrier."""
    down: Array
    power_per_subcarrier_w: Array
    a: float
    b: float
    spare_s: Array
    """T - t0."""
    t1: Array
    spare_j: Array
    """E - e0."""
    e1: Array
    y_max: float
    """1 / (a + b keep_min)."""

    @staticmethod
    def of(problem: Problem) -> Reciprocal:
        link, compute = problem.subcarriers, problem.compute
        full = problem.fixed_bits + problem.lora_bits
        a, b = problem.fixed_bits / full, problem.lora_bits / full
        t1, e1 = compute.lora_s / b, compute.lora_j / b
        return Reciprocal(
            bound=problem.bound,
            weights=problem.weights,
            samples=problem.samples,
            up=link.up / full,
            down=link.down / full,
            power_per_subcarrier_w=link.power_per_subcarrier_w,
            a=a,
            b=b,
            spare_s=problem.latency_limit_s - compute.base_s + a * t1,
            t1=t1,
            spare_j=problem.energy_limit_j - compute.base_j - compute.overhead_j + a * e1,
            e1=e1,
            y_max=1.0 / (a + b * problem.keep_min),
        )

    def keep(self, y: Array) -> Array:
        """x of y."""
        return (1.0 / y - self.a) / self.b

    def inverse(self, keep: Array) -> Array:
        """y of x."""
        return 1.0 / (self.a + self.b * keep)

    def penalty(self, y: Array) -> Array:
        """(38): e(y)."""
        return self.bound.penalty(self.keep(y))

    def penalty_slope(self, y: Array) -> Array:
        """e'(y)."""
        return -self.bound.penalty_slope(self.keep(y)) / (self.b * y * y)

    def tangent(self, at: Array) -> tuple[Array, Array]:
        """(43): slope and intercept of the tangent of e at y: above a concave e."""
        slope = self.penalty_slope(at)
        return slope, self.penalty(at) - slope * at

    def chord(self, low: Array, high: Array) -> tuple[Array, Array]:
        """Slope and intercept of the chord of e between two y: below a concave e there. The tangent where they meet."""
        wide = high - low > 1e-9
        width = np.where(wide, high - low, 1.0)
        slope = np.where(wide, (self.penalty(high) - self.penalty(low)) / width, self.penalty_slope(low))
        return slope, self.penalty(low) - slope * low

    def gap_tangents(self) -> tuple[Array, Array]:
        """Slopes and intercepts of lines below G that touch it, denser near q = 1: (J,) `pooled`, (J, K) `per_device`."""
        q = 1.0 - np.linspace(0.0, 1.0, _TANGENTS) ** 2
        return self.bound.generalisation_gap.tangents(self.bound, q, self.samples)


def binary_majorant(rho: Array, at: Array) -> Array:
    """(42): (1 - 2 rho_j) rho + rho_j^2 >= rho - rho^2, equal at rho_j."""
    return np.asarray(binary_slope(at) * rho + at * at)


def binary_slope(at: Array) -> Array:
    """Of (42), in rho."""
    return 1.0 - 2.0 * at


def product_minorant(eta: Any, nu: Any) -> Any:
    """(44): a concave lower bound of the product y r over its value at (y_j, r_j), in eta = y / y_j and nu = r / r_j.

    For arrays and cvxpy expressions. With u = r y_j / r_j and S = 2 y_j: y u = ((y + u)^2 - (y - u)^2) / 4 is at least
    (S (2 (y + u) - S) - (y - u)^2) / 4; divided by y_j^2, eta nu >= eta + nu - 1 - (eta - nu)^2 / 4, equal at (1, 1).
    """
    return eta + nu - 1.0 - 0.25 * (eta - nu) ** 2
