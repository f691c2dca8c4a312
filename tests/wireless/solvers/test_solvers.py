"""Solver x problem: bound <= optimum <= value, against looking at every assignment."""

from dataclasses import replace

import numpy as np
import pytest

from fedloom.wireless import diagnosis
from fedloom.wireless.allocate import solve
from fedloom.wireless.solvers import lagrangian, local_search, mccormick
from fedloom.wireless.solvers.branch_and_bound import Status, branch_and_bound
from fedloom.wireless.system.empirical_error import Empirical
from fedloom.wireless.system.generalisation_bound import Gap
from fedloom.wireless.system.problem import Problem

from ..exhaustive import exhaustive
from ..problems import FORMS, GAPS, small


def feasible(problem: Problem, share: np.ndarray) -> None:
    """The original (33), (34), the band and the range of rates."""
    keep = problem.best(problem.caps(share))
    late, over = problem.excess(share, keep)
    assert late.max() <= 1e-6 and over.max() <= 1e-6
    assert keep.min() >= problem.keep_min and keep.max() <= 1.0
    assert set(np.unique(share)) <= {0.0, 1.0} and share.sum(axis=0).max() <= 1.0


@pytest.mark.parametrize("empirical", FORMS)
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("seed", range(6))
def test_bnb_is_exhaustive_search(empirical: Empirical, gap: Gap, seed: int) -> None:
    problem = small(seed, empirical, gap)
    truth, found = exhaustive(problem), solve(problem)
    assert found.status is truth.status
    if truth.point is None:
        assert found.point is None
        return
    assert found.point is not None
    assert abs(found.value - truth.value) <= 1e-9
    assert found.lower <= found.value
    feasible(problem, found.point)
    assert float(problem.value_of_caps(problem.caps(found.point))) == pytest.approx(found.value, abs=1e-12)


@pytest.mark.parametrize("empirical", FORMS)
def test_bnb_is_exhaustive_search_on_six_subcarriers(empirical: Empirical) -> None:
    problem = small(2, empirical, subcarriers=6)
    assert abs(solve(problem).value - exhaustive(problem).value) <= 1e-9


@pytest.mark.parametrize("empirical", FORMS)
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("seed", [1, 2])
def test_every_root_bound_is_below_the_optimum(empirical: Empirical, gap: Gap, seed: int) -> None:
    problem = small(seed, empirical, gap)
    optimum = exhaustive(problem).value
    assert np.isfinite(optimum)
    fast = float(problem.value_of_caps(mccormick.single_device_caps(problem, mccormick.root(problem))))
    convex = mccormick.McCormickBound(problem)(mccormick.root(problem), np.inf).lower
    lagrange = lagrangian.LagrangianBound(problem)._dual(lagrangian.root(problem), optimum).lower
    for lower in (fast, convex, lagrange):
        assert lower <= optimum + 1e-9
    assert convex >= fast, "the relaxation is never below the single-device bound, which it includes"


@pytest.mark.parametrize("empirical", FORMS)
@pytest.mark.parametrize("seed", [1, 2])
def test_branching_on_the_relaxation_gives_the_same_optimum(empirical: Empirical, seed: int) -> None:
    """The search used above the size of the tables, at a size where the truth is known."""
    problem = small(seed, empirical)
    bound = mccormick.McCormickBound(problem)
    found = branch_and_bound(mccormick.root(problem), bound, tolerance=bound.tolerance)
    assert found.status is Status.OPTIMAL and found.nodes > 1
    assert found.lower <= exhaustive(problem).value + 1e-9
    assert abs(found.value - exhaustive(problem).value) <= bound.tolerance


def test_lower_bounds_never_fall_and_never_pass_the_value() -> None:
    problem = small(2, "linear", devices=4, subcarriers=7)
    bound = mccormick.McCormickBound(problem)
    found = branch_and_bound(mccormick.root(problem), bound, tolerance=bound.tolerance)
    lowers = [p.lower for p in found.trace]
    assert len(lowers) > 2 and lowers == sorted(lowers)
    assert all(p.lower <= p.value for p in found.trace)
    values = [p.value for p in found.trace]
    assert values == sorted(values, reverse=True)


def test_branching_on_columns_closes_what_the_root_leaves() -> None:
    """With few subgradient steps and no enumeration the search has to branch, and still ends at the optimum."""
    problem = small(2, "linear", subcarriers=6)
    bound = lagrangian.LagrangianBound(problem, steps=3)
    bound._enumerate = lambda left, dual, goal: (  # type: ignore[method-assign]
        None if max(map(len, left.sets)) > 1 else lagrangian.LagrangianBound._enumerate(bound, left, dual, goal)
    )
    found = branch_and_bound(lagrangian.root(problem), bound)
    assert found.nodes > 3
    assert abs(found.value - exhaustive(problem).value) <= 1e-9


def test_time_limit_returns_the_incumbent_with_its_gap() -> None:
    problem = small(2, "linear", devices=5, subcarriers=20)
    found = solve(problem, time_limit_s=0.05)
    assert found.status is Status.TIME_LIMIT and found.point is not None
    assert found.lower < found.value and np.isfinite(found.optimality_gap)
    feasible(problem, found.point)


def test_infeasible_together_is_proven() -> None:
    """Each device could be served alone, all of them not: no shortcut helps, the search has to prove it."""
    proven = 0
    for seed in range(6):
        for keep_min in (0.2, 0.3, 0.4, 0.5, 0.6):
            problem = replace(small(seed), keep_min=keep_min)
            if diagnosis.infeasible_alone(problem):
                continue
            truth = exhaustive(problem)
            found = branch_and_bound(lagrangian.root(problem), lagrangian.LagrangianBound(problem))
            assert found.status is truth.status
            proven += truth.status is Status.INFEASIBLE
    assert proven >= 3


def test_local_search_never_worsens_and_greedy_is_feasible_where_slack() -> None:
    problem = small(5)
    first = local_search.greedy(problem)
    better = local_search.improve(problem, first)
    assert np.isfinite(local_search.value_of(problem, first))
    assert local_search.value_of(problem, better) <= local_search.value_of(problem, first)


def test_larger_searches_are_certified() -> None:
    problem = small(2, "linear", devices=4, subcarriers=12)
    found = solve(problem, time_limit_s=30.0)
    assert found.status is Status.OPTIMAL and found.value - found.lower <= 1e-8
