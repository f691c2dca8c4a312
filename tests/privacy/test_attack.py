"""Statistics of attacks against published values and counts by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fedloom.privacy.attack import attack, canary_guesses, epsilon_bound, interval


@pytest.mark.parametrize(
    "m, r, v, want",
    [
        (100, 100, 100, 3.4902),
        (100, 50, 50, 2.7819),
        (200, 200, 160, 1.0863),
        (1000, 200, 200, 4.1665),
        (1000, 200, 140, 0.5836),
        (1000, 1000, 1000, 5.7823),
    ],
)
def test_bounds_of_one_run(m: int, r: int, v: int, want: float) -> None:
    assert epsilon_bound(m, r, v, 1e-5) == pytest.approx(want, abs=1e-4)


def test_guesses_like_a_coin_bound_nothing() -> None:
    assert epsilon_bound(100, 100, 50, 1e-5) == 0.0 and epsilon_bound(100, 10, 0, 1e-5) == 0.0


def test_an_attack_by_hand() -> None:
    found = attack(np.array([3.0, 2.0, 1.0]), np.array([0.0, 2.0]))
    assert found.auc == pytest.approx((2 + 1.5 + 1) / 6) and found.tpr == pytest.approx(1 / 3)
    assert found.auc_low < found.auc < found.auc_high
    rng = np.random.default_rng(0)
    none = attack(rng.normal(size=400), rng.normal(size=400))
    assert none.auc_low < 0.5 < none.auc_high and none.tpr_low <= 0.01 <= none.tpr_high + 0.01
    sure = attack(np.ones(50), np.zeros(50))
    assert sure.auc == 1.0 and sure.tpr == 1.0 and sure.tpr_low == pytest.approx(0.9289, abs=1e-4)


def test_intervals() -> None:
    assert interval(0, 10) == (0.0, pytest.approx(0.3085, abs=1e-4))
    assert interval(5, 10) == (pytest.approx(0.1871, abs=1e-4), pytest.approx(0.8129, abs=1e-4))


def test_guesses_are_the_ends_of_the_scores() -> None:
    scores = np.arange(20.0)
    coins = scores >= 18
    assert canary_guesses(scores, coins) == (4, 4) and canary_guesses(-scores, coins) == (4, 0)
