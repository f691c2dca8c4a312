"""`bandwidth` mode against a grid over all divisions of the band, and its bounds."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from fedloom.wireless.allocate import solve
from fedloom.wireless.solvers import bandwidth_dual
from fedloom.wireless.solvers.branch_and_bound import Status
from fedloom.wireless.system.empirical_error import Empirical
from fedloom.wireless.system.fleet import random_fleet
from fedloom.wireless.system.generalisation_bound import Gap
from fedloom.wireless.system.problem import Problem

from ..problems import FORMS, GAPS, small


def best_on_grid(problem: Problem, steps: int) -> float:
    """The best of all divisions into multiples of 1 / steps of the band."""
    total = problem.band.total_hz
    parts = np.array([p for p in itertools.product(range(1, steps), repeat=2) if sum(p) < steps], dtype=float)
    shares = np.column_stack([parts, steps - parts.sum(axis=1)]) * (total / steps)
    return float(problem.value_of_caps(problem.caps(shares)).min())


@pytest.mark.parametrize("empirical", FORMS)
@pytest.mark.parametrize("gap", GAPS)
def test_optimum_is_below_every_division_on_a_grid_and_above_the_bound(empirical: Empirical, gap: Gap) -> None:
    problem = small(1, empirical, gap, mode="bandwidth")
    found = solve(problem, time_limit_s=1.5)
    grid = best_on_grid(problem, 120)
    assert np.isfinite(grid) and found.point is not None
    assert found.value <= grid + 1e-7
    assert found.value >= grid - 0.02 * grid, "the grid comes near the optimum"
    assert found.lower <= found.value and found.lower <= grid + 1e-9
    if empirical != "sparsity":
        assert found.status is Status.OPTIMAL and found.value - found.lower <= 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_points_satisfy_the_original_constraints(seed: int) -> None:
    problem = small(seed, "rescaled", mode="bandwidth")
    found = solve(problem, "psca")
    if found.point is None:
        assert bandwidth_dual.least_hz(problem, np.full(3, problem.keep_min)).sum() > problem.band.total_hz
        return
    keep = problem.best(problem.caps(found.point))
    late, over = problem.excess(found.point, keep)
    assert max(late.max(), over.max()) <= 1e-6
    assert found.point.sum() <= problem.band.total_hz * (1.0 + 1e-9)


def test_least_bandwidth_is_convex_increasing_and_the_inverse_of_the_caps() -> None:
    problem = small(3, mode="bandwidth")
    box = bandwidth_dual.root(problem)
    keep = box.low + np.linspace(0.0, 0.98, 60)[:, None] * (box.high - box.low)
    hz = bandwidth_dual.least_hz(problem, keep)
    assert (np.diff(hz, axis=0) > 0.0).all()
    assert (np.diff(hz, 2, axis=0) >= -1e-9 * hz.max()).all()
    np.testing.assert_allclose(problem.caps(hz), keep, rtol=1e-9)


def test_box_bounds_are_below_random_points_of_the_box() -> None:
    rng = np.random.default_rng(7)
    for empirical in FORMS:
        problem = small(1, empirical, mode="bandwidth")
        whole = bandwidth_dual.root(problem)
        box = bandwidth_dual.RateBox(
            whole.low + 0.1 * (whole.high - whole.low), whole.low + 0.6 * (whole.high - whole.low)
        )
        found = bandwidth_dual.DualBound(problem)(box, np.inf)
        keep = rng.uniform(box.low, box.high, size=(300, 3))
        fits = bandwidth_dual.least_hz(problem, keep).sum(axis=1) <= problem.band.total_hz
        assert fits.sum() > 20
        assert (found.lower <= problem.value(keep[fits]) + 1e-9).all()


def test_two_hundred_devices_are_certified() -> None:
    problem = random_fleet(200, 8, 1, mode="bandwidth", latency_load=2.0, energy_load=9.0).problem()
    found = solve(problem, "psca")
    assert found.status is Status.OPTIMAL and found.seconds < 30.0


def test_infeasible_band() -> None:
    problem = replace(small(3, mode="bandwidth"), keep_min=0.9)
    assert solve(problem).status is Status.INFEASIBLE
