"""The bound's two terms as cvxpy expressions in y = 1/payload: what P-SCA's surrogate and McCormick's relaxation share."""

from __future__ import annotations

import numpy as np

from fedloom.wireless.solvers.cvx import Constraint, Expression, cp
from fedloom.wireless.solvers.reciprocal import Reciprocal


def gap_epigraph(scaled: Reciprocal, y: Expression) -> tuple[Expression, list[Constraint]]:
    """The gap term from below by tangents, (39), and its constraints: x >= (1/y - a)/b, q >= sum w x^2."""
    devices = len(scaled.weights)
    keep = cp.Variable(devices, nonneg=True)
    slopes, intercepts = scaled.gap_tangents()
    constraints = [scaled.b * keep + scaled.a >= cp.inv_pos(y)]
    if scaled.bound.generalisation_gap.couples_devices:
        q, gap = cp.Variable(), cp.Variable()
        constraints += [q >= cp.sum_squares(cp.multiply(np.sqrt(scaled.weights), keep)), gap >= slopes * q + intercepts]
        return gap, constraints
    q, gap = cp.Variable(devices), cp.Variable(devices)
    constraints.append(q >= cp.square(keep))
    constraints += [gap >= cp.multiply(slopes[j], q) + intercepts[j] for j in range(len(slopes))]
    return scaled.weights @ gap, constraints


def empirical_term(scaled: Reciprocal, y: Expression, line: Expression) -> Expression:
    """sum_k w_k e(y_k): itself where it is convex, else `line`, which stands for the concave e (a chord or a tangent)."""
    return line if scaled.bound.empirical_error.concave_in_reciprocal else scaled.weights @ convex_penalty(scaled, y)


def convex_penalty(scaled: Reciprocal, y: Expression) -> Expression:
    """`rescaled` e(y) = b y / (1 - a y) - 1, convex."""
    if scaled.a == 0.0:
        return y - 1.0
    return (scaled.b / scaled.a) * (cp.inv_pos(1.0 - scaled.a * y) - 1.0) - 1.0
