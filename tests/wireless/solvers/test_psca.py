"""P-SCA: surrogates (42)-(44) tight and on the right side, monotone for fixed zeta, near the optimum."""

import numpy as np
import pytest

from fedloom.wireless.allocate import solve
from fedloom.wireless.solvers.branch_and_bound import Status, branch_and_bound
from fedloom.wireless.solvers.convex_terms import convex_penalty
from fedloom.wireless.solvers.cvx import cp
from fedloom.wireless.solvers.mccormick import Assignment, McCormickBound, root, single_device_caps
from fedloom.wireless.solvers.psca import Surrogate, iterate, psca
from fedloom.wireless.solvers.reciprocal import Reciprocal, binary_majorant, product_minorant
from fedloom.wireless.system.empirical_error import Empirical

from ..problems import FORMS, small
from .test_solvers import feasible


@pytest.mark.parametrize("empirical", FORMS)
def test_surrogates_are_tight_at_the_iterate_and_bound_elsewhere(empirical: Empirical) -> None:
    rng = np.random.default_rng(42)
    scaled = Reciprocal.of(small(0, empirical))
    at, rho = rng.random(500), rng.random(500)
    assert (binary_majorant(rho, at) >= rho - rho**2 - 1e-12).all()
    np.testing.assert_allclose(binary_majorant(at, at), at - at**2, atol=1e-12)

    y, y_at = rng.uniform(1.0, scaled.y_max, (2, 500))
    slope, intercept = scaled.tangent(y_at)
    np.testing.assert_allclose(slope * y_at + intercept, scaled.penalty(y_at), atol=1e-12)
    if scaled.bound.empirical_error.concave_in_reciprocal:
        assert (slope * y + intercept >= scaled.penalty(y) - 1e-12).all()
    else:  # enters the surrogate as it is
        assert (slope * y + intercept <= scaled.penalty(y) + 1e-12).all()
        np.testing.assert_allclose(convex_penalty(scaled, cp.Constant(y)).value, scaled.penalty(y), rtol=1e-12)

    rate, rate_at = rng.uniform(0.01, 3.0, (2, 500))
    eta, nu = y / y_at, rate / rate_at
    assert (product_minorant(eta, nu) <= eta * nu + 1e-9).all()
    assert product_minorant(1.0, 1.0) == 1.0


@pytest.mark.parametrize("empirical", ["linear", "sparsity"])
def test_chord_is_below_and_tangent_above_a_concave_penalty(empirical: Empirical) -> None:
    scaled = Reciprocal.of(small(0, empirical))
    low, high = np.array([1.0, 1.3]), np.array([2.0, 1.3])
    slope, constant = scaled.chord(low, high)
    for y in np.linspace(low, high, 50):
        assert (slope * y + constant <= scaled.penalty(y) + 1e-12).all()
    np.testing.assert_allclose(slope * high + constant, scaled.penalty(high), atol=1e-12)


def test_tangents_lie_below_the_gap_and_nearly_touch_it() -> None:
    scaled = Reciprocal.of(small(0))
    slopes, constants = scaled.gap_tangents()
    q = np.linspace(0.0, 1.0, 997)
    below = (slopes * q[:, None] + constants).max(axis=1)
    truth = scaled.bound.gap_at(q, scaled.samples.sum())
    assert (below <= truth + 1e-12).all()
    assert (truth - below).max() < 2e-3 * truth.max()


def test_mccormick_is_exact_at_binary_shares() -> None:
    """(40) at 0/1: v is forced below y rho and can reach it, so the energy constraint is the original one."""
    rng = np.random.default_rng(0)
    low, high = 1.2, 4.0
    for y in rng.uniform(low, high, 50):
        for rho in (0.0, 1.0):
            upper = min(high * rho, low * rho + y - low)
            lower = max(low * rho, high * rho + y - high)
            assert upper == pytest.approx(y * rho) and lower == pytest.approx(y * rho)


@pytest.mark.parametrize("empirical", FORMS)
def test_relaxation_at_a_fixed_assignment_is_the_value_there(empirical: Empirical) -> None:
    """Everything fixed, the relaxation still holds chords and tangents: below the value, and close for a convex form."""
    problem = small(5, empirical)
    point = solve(problem).point
    assert point is not None
    bound = McCormickBound(problem)
    node = Assignment(point > 0.5, point > 0.5)
    lower, _ = bound.relax(node, single_device_caps(problem, node))
    value = float(problem.value_of_caps(problem.caps(point)))
    assert lower <= value
    if empirical == "rescaled":
        assert value - lower < 5e-3 * value


@pytest.mark.parametrize("empirical", FORMS)
@pytest.mark.parametrize("zeta", [0.0, 0.05])
def test_penalised_objective_never_rises_for_fixed_zeta(empirical: Empirical, zeta: float) -> None:
    problem = small(5, empirical)
    rng = np.random.default_rng(1)
    start = rng.dirichlet(np.full(3, 2.0), size=5).T
    path = iterate(problem, Surrogate(Reciprocal.of(problem)), start, rng, zetas=[zeta] * 8)
    objectives = np.array([point.objective for point in path])
    assert len(path) == 8 and np.ptp(objectives) > 0.0
    # The gap enters by tangents from below, which may cost their own error.
    scaled = Reciprocal.of(problem)
    slopes, constants = scaled.gap_tangents()
    q = np.linspace(0.0, 1.0, 997)
    error = (scaled.bound.gap_at(q, scaled.samples.sum()) - (slopes * q[:, None] + constants).max(axis=1)).max()
    assert (np.diff(objectives) <= error + 1e-6).all()


def test_penalty_makes_shares_binary() -> None:
    problem = small(5)
    rng = np.random.default_rng(2)
    start = rng.dirichlet(np.full(3, 2.0), size=5).T
    path = iterate(problem, Surrogate(Reciprocal.of(problem)), start, rng, max_iterations=40)
    assert path[0].fraction > 0.05 and path[-1].fraction < 1e-2


def test_psca_is_feasible_and_near_the_optimum() -> None:
    gaps = []
    for seed in range(20):
        problem = small(seed, FORMS[seed % 3])
        best = solve(problem)
        found = psca(problem, seed=seed)
        if best.point is None:
            assert found.status is Status.NOT_FOUND
            continue
        assert found.point is not None, f"seed {seed} has an optimum but no P-SCA point"
        feasible(problem, found.point)
        assert found.value >= best.value - 1e-9
        gaps.append(found.value / best.value - 1.0)
    assert len(gaps) >= 15
    assert np.median(gaps) <= 0.01 and np.percentile(gaps, 90) <= 0.05


def test_psca_is_reproducible() -> None:
    problem = small(2)
    assert psca(problem, seed=3).value == psca(problem, seed=3).value


def test_work_of_psca_does_not_grow_like_branch_and_bound_on_the_same_relaxation() -> None:
    """Nodes multiply with every subcarrier; P-SCA's convex solves are bounded by starts times iterations."""
    nodes, solves = {}, {}
    for count in (3, 6):
        problems = [small(seed, subcarriers=count) for seed in (1, 2)]
        bounds = [McCormickBound(problem) for problem in problems]
        found = [branch_and_bound(root(p), b, tolerance=1e-5) for p, b in zip(problems, bounds, strict=True)]
        nodes[count] = sum(solution.nodes for solution in found)
        solves[count] = [psca(problem).nodes for problem in problems]
    assert nodes[6] > 4 * nodes[3]
    assert max(solves[3] + solves[6]) <= 3 * 30
