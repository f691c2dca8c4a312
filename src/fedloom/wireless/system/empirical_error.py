"""Three forms of the empirical error's growth with dropout, e(x) of the keep rate x, in units of A1; 0 at x = 1.

    sparsity    1 - x^2     not convex; the expected share of products that dropout on both sides removes
    linear      1 - x       convex; the expected share of parameters dropped
    rescaled    1 / x - 1   convex; the variance of a mask divided by its keep rate

FedLoDrop (arXiv 2510.12078) has an empirical error that grows with dropout; which of the forms is the paper's is unknown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np

from fedloom.wireless.system.radio import Array

Empirical = Literal["sparsity", "linear", "rescaled"]


class EmpiricalError(Protocol):
    """e and what the solvers have to know of it. Arrays of any shape, which broadcast."""

    convex: ClassVar[bool]
    """In x; otherwise concave."""
    concave_in_reciprocal: ClassVar[bool]
    """As a function of y = 1 / payload, (38); otherwise convex."""

    def value(self, keep: Array) -> Array:
        """e(x)."""

    def slope(self, keep: Array) -> Array:
        """de/dx, negative."""

    def best_against_square(self, ratio: float) -> float:
        """argmin over x in [0, inf) of e(x) + x^2 / ratio; where e is concave, an end of [0, 1]."""

    def slope_below(self, left: Array, right: Array, price: float, square: Array) -> Array:
        """Slope of a line that meets price e(x) + square x^2 at `left` and lies below it up to `right`."""


class Sparsity:
    """1 - x^2."""

    convex: ClassVar[bool] = False
    concave_in_reciprocal: ClassVar[bool] = True

    def value(self, keep: Array) -> Array:
        return np.asarray(1.0 - keep * keep)

    def slope(self, keep: Array) -> Array:
        return np.asarray(-2.0 * keep)

    def best_against_square(self, ratio: float) -> float:
        return 1.0 if ratio > 1.0 else 0.0

    def slope_below(self, left: Array, right: Array, price: float, square: Array) -> Array:
        # One multiple of x^2: its chord where that is concave, else its tangent.
        curve = square - price
        return np.asarray(curve * np.where(curve < 0.0, left + right, 2.0 * left))


class Linear:
    """1 - x."""

    convex: ClassVar[bool] = True
    concave_in_reciprocal: ClassVar[bool] = True

    def value(self, keep: Array) -> Array:
        return np.asarray(1.0 - keep)

    def slope(self, keep: Array) -> Array:
        return -np.ones_like(keep)

    def best_against_square(self, ratio: float) -> float:
        return 0.5 * ratio

    def slope_below(self, left: Array, right: Array, price: float, square: Array) -> Array:
        return _tangent_slope(self, left, price, square)


class Rescaled:
    """1 / x - 1."""

    convex: ClassVar[bool] = True
    concave_in_reciprocal: ClassVar[bool] = False

    def value(self, keep: Array) -> Array:
        return np.asarray(1.0 / keep - 1.0)

    def slope(self, keep: Array) -> Array:
        return np.asarray(-1.0 / (keep * keep))

    def best_against_square(self, ratio: float) -> float:
        return float((0.5 * ratio) ** (1.0 / 3.0))

    def slope_below(self, left: Array, right: Array, price: float, square: Array) -> Array:
        return _tangent_slope(self, left, price, square)


@dataclass(frozen=True)
class Tangent:
    """Another form's tangent at a rate, (43): above it where that is concave."""

    form: EmpiricalError
    at: Array
    convex: ClassVar[bool] = True
    concave_in_reciprocal: ClassVar[bool] = True

    def value(self, keep: Array) -> Array:
        return self.form.value(self.at) + self.form.slope(self.at) * (keep - self.at)

    def slope(self, keep: Array) -> Array:
        return self.form.slope(self.at)

    def best_against_square(self, ratio: float) -> float:
        return float(-0.5 * ratio * self.form.slope(self.at))

    def slope_below(self, left: Array, right: Array, price: float, square: Array) -> Array:
        return _tangent_slope(self, left, price, square)


def _tangent_slope(form: EmpiricalError, left: Array, price: float, square: Array) -> Array:
    return np.asarray(price * form.slope(left) + 2.0 * left * square)


FORMS: dict[Empirical, EmpiricalError] = {"sparsity": Sparsity(), "linear": Linear(), "rescaled": Rescaled()}
