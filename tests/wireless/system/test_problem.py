"""Channel and problem: the closed form (35) against the original constraints (33), (34)."""

import numpy as np
import pytest

from fedloom.wireless.system.fleet import random_fleet
from fedloom.wireless.system.radio import Rates, from_db, from_dbm, path_gain, shannon, transfer_s

from ..problems import random_shares, small


def test_channel_by_hand() -> None:
    assert float(from_dbm(30.0)) == pytest.approx(1.0)
    assert float(path_gain(1000.0)) == pytest.approx(10 ** (-12.81))
    # SNR 15 on 1 MHz: log2(16) = 4.
    assert float(shannon(1e6, 15e6)) == pytest.approx(4e6)
    assert float(shannon(0.0, 15e6)) == 0.0
    assert float(from_db(-3.0)) == pytest.approx(0.501187, rel=1e-5)
    np.testing.assert_array_equal(transfer_s([8.0, 8.0, 0.0], [2.0, 0.0, 0.0]), [4.0, np.inf, 0.0])


def test_more_band_is_faster_but_with_less_and_less_return() -> None:
    rate = shannon(np.linspace(1e3, 1e7, 200), 1e7)
    assert (np.diff(rate) > 0.0).all() and (np.diff(rate, 2) < 0.0).all()


@pytest.mark.parametrize("seed", range(6))
def test_caps_are_where_the_original_constraints_are_tight(seed: int) -> None:
    problem = small(seed)
    checked = 0
    for share in random_shares(problem, 40, seed):
        caps = problem.caps(share)
        inside = np.where(np.isfinite(caps) & (caps > 0.0), caps, 0.5)
        late, over = problem.excess(share, inside)
        # At its cap a device breaks nothing, and just above it something, unless the cap is 1.
        served = np.isfinite(caps) & (caps > 0.0)
        assert (late[served] <= 1e-9).all() and (over[served] <= 1e-9).all()
        beyond_late, beyond_over = problem.excess(share, inside * (1.0 + 1e-6))
        capped = served & (caps < 1.0)
        assert (np.maximum(beyond_late, beyond_over)[capped] > 0.0).all()
        checked += int(capped.sum())
    assert checked > 10


def test_a_device_without_band_has_no_cap_and_no_value() -> None:
    problem = small(1)
    share = np.zeros((3, 5))
    assert (problem.caps(share) == -np.inf).all()
    assert problem.value_of_caps(problem.caps(share)) == np.inf


def test_a_bad_subcarrier_can_cost_energy() -> None:
    """(35): more subcarriers always help the latency; energy per bit is p N / r and can rise."""
    problem = small(1)
    good, bad = (
        Rates(np.array(8e6), np.array(8e6), np.array(0.04)),
        Rates(np.array(8.1e6), np.array(8.1e6), np.array(0.08)),
    )
    assert problem.latency_caps(bad, 0) > problem.latency_caps(good, 0)
    assert problem.energy_caps(bad, 0) < problem.energy_caps(good, 0)


def test_fleets_by_seed() -> None:
    one, same, other = (random_fleet(3, 5, seed).problem() for seed in (4, 4, 5))
    np.testing.assert_array_equal(one.link.up, same.link.up)  # type: ignore[union-attr]
    assert (one.link.up != other.link.up).all()  # type: ignore[union-attr]
    more = random_fleet(4, 5, 4)
    assert [d.distance_m for d in more.devices()][:3] == [d.distance_m for d in random_fleet(3, 5, 4).devices()]
