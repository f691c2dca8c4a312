"""Statistics against SciPy's own tests, tables of the t distribution and sums done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fedloom.studies import statistics as s


def test_interval_by_hand() -> None:
    # 5 values: mean 3, sd sqrt(2.5); t(0.975, 4) = 2.776445 from a table.
    found = s.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3 - half, 3 + half), abs=1e-6)
    assert math.isnan(s.interval([1.0]).low) and s.interval([1.0]).mean == 1.0


def test_paired_difference_is_scipys() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.5, 0.1, 7), rng.normal(0.45, 0.1, 7)
    found = s.difference(("x", x), ("y", y))
    test = stats.ttest_rel(x, y)
    bounds = test.confidence_interval(0.95)
    assert (found.p, found.gain.low, found.gain.high) == pytest.approx((test.pvalue, bounds.low, bounds.high))
    u = stats.mannwhitneyu(x, y).statistic
    assert found.improvement == pytest.approx(u / 49)
    assert found.wins == int((x > y).sum())


def test_a_smaller_loss_is_a_gain() -> None:
    found = s.difference(("x", [1.0, 1.1, 1.3]), ("y", [2.0, 2.0, 2.0]), higher_is_better=False)
    assert found.gain.mean == pytest.approx(2 - 3.4 / 3) and found.wins == 3 and found.improvement == 1.0


def test_equal_scores_are_no_difference_and_a_constant_gap_is_one() -> None:
    same = s.difference(("x", [0.5, 0.6]), ("y", [0.5, 0.6]))
    assert (same.p, same.improvement, same.draws_needed, same.wins) == (1.0, 0.5, None, 0)
    gap = s.difference(("x", [1.0, 2.0]), ("y", [0.5, 1.5]))
    assert gap.p == 0.0 and gap.draws_needed == 2


def test_draws_needed_by_hand() -> None:
    # (1.959964 + 0.841621)^2 = 7.848879; sd 0.0133, gap 0.02: 3.47 draws.
    assert s.draws_needed(s.Interval(0.02, 0, 0, 5, 0.0133)) == 4
    assert s.draws_needed(s.Interval(-0.001, 0, 0, 5, 0.0133)) == math.ceil(7.848879 * 13.3**2)


def test_draws_needed_give_the_power_that_they_promise() -> None:
    n = s.draws_needed(s.Interval(0.1, 0, 0, 5, 0.3))
    assert n is not None
    # Noncentral t: the exact power of the paired test with n draws is near 0.8 (the normal rule is a little optimistic).
    nc, critical = 0.1 / 0.3 * math.sqrt(n), stats.t.ppf(0.975, n - 1)
    power = stats.nct.sf(critical, n - 1, nc) + stats.nct.cdf(-critical, n - 1, nc)
    assert power == pytest.approx(0.8, abs=0.02)


def test_holm_against_the_definition() -> None:
    assert s.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert s.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and s.holm([]) == []


def test_binomial_error_is_the_standard_deviation_of_the_law() -> None:
    assert s.binomial_error(0.8, 4000) == pytest.approx(stats.binom(4000, 0.8).std() / 4000, rel=1e-3)
    # Ten of ten: 12 of 14, sqrt(12 * 2 / 14^3).
    assert s.binomial_error(1.0, 10) == pytest.approx(math.sqrt(24 / 14**3))


def test_variance_split_by_hand() -> None:
    # Two methods, three draws, two seeds; cell means a: 1, 2, 3 and b: 3, 6, 3; seeds +-0.5 around them.
    # Centred: a -1, 0, 1; b -1, 2, -1; draws' means -1, 1, 0: MS_draw = 4 * 2 / 2 = 4.
    # Rest: a 0, -1, 1; b 0, 1, -1: MS_interaction = 2 * 4 / 2 = 4. Within: 6 cells * 0.5 / 6 = 0.5.
    scores = {
        "a": [[0.5, 1.5], [1.5, 2.5], [2.5, 3.5]],
        "b": [[2.5, 3.5], [5.5, 6.5], [2.5, 3.5]],
    }
    found = s.variance_split({name: np.array(x) for name, x in scores.items()})
    assert found is not None
    assert (found.partition, found.interaction, found.seed) == pytest.approx((0.0, (4 - 0.5) / 2, 0.5))


def test_variance_split_finds_the_components_that_made_the_scores() -> None:
    rng = np.random.default_rng(1)
    m, d, n = 4, 4000, 3
    table = (
        rng.normal(0, 5, (m, 1, 1))  # levels of methods: no variance
        + rng.normal(0, 2.0, (1, d, 1))
        + rng.normal(0, 1.0, (m, d, 1))
        + rng.normal(0, 0.5, (m, d, n))
    )
    found = s.variance_split({str(i): x for i, x in enumerate(table)})
    assert found is not None and found.seed is not None
    assert (found.partition, found.interaction, found.seed) == pytest.approx((4.0, 1.0, 0.25), rel=0.1)
    assert found.total == pytest.approx(5.25, rel=0.1)


def test_variance_split_needs_draws_and_methods_and_joins_the_seed_without_seeds() -> None:
    assert s.variance_split({"a": np.ones((5, 1))}) is None
    assert s.variance_split({"a": np.ones((2, 1)), "b": np.ones((2, 1))}) is None
    found = s.variance_split({"a": np.array([[1.0], [2.0], [3.0]]), "b": np.array([[2.0], [2.0], [2.0]])})
    assert found is not None and found.seed is None and found.interaction > 0
