"""The accountant against published check values and two other accountants; the ledger."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.errors import RunError
from fedloom.privacy.accountant import Release, epsilon, gaussian_delta, gaussian_epsilon, noise_multiplier
from fedloom.privacy.ledger import Entry, Ledger


@pytest.mark.parametrize(
    "z, T, delta, want",
    [(1, 1, 1e-5, 4.377178), (4, 20, 1e-3, 3.605055), (4, 20, 1e-5, 4.983306)],
    ids=["A", "B", "B2"],
)
def test_gaussian_releases_in_closed_form(z: float, T: int, delta: float, want: float) -> None:
    assert epsilon([Release(z, T)], delta) == pytest.approx(want, abs=1e-6)
    assert epsilon([Release(z)] * T, delta) == pytest.approx(want, abs=1e-6)


SAMPLED = [
    ([Release(1, 100, 0.1)], 1e-5, 7.046603),
    ([Release(0.8, 1000, 0.01)], 1e-6, 3.706190),
    ([Release(1, 860, 16 / 1363)], 1e-5, 2.022516),
    ([Release(0.7, 1000, 0.016)], 1e-5, 7.256120),
    ([Release(0.88793, 80, 0.1)], 1e-5, 7.999815),
    ([Release(2, 3), Release(1, 10, 0.2)], 1e-5, 6.274888),
]


@pytest.mark.parametrize("releases, delta, want", SAMPLED, ids=["C", "D", "E", "F", "G", "H"])
def test_sampled_releases(releases: list[Release], delta: float, want: float) -> None:
    pytest.importorskip("dp_accounting")
    assert epsilon(releases, delta) == pytest.approx(want, abs=1e-4)


def test_another_accountant_brackets_sampled_releases() -> None:
    """Gopi, Lee, Wutschitz, arXiv 2106.02848: an upper and a lower bound that its authors prove."""
    pytest.importorskip("dp_accounting")
    prv = pytest.importorskip("prv_accountant")
    for z, q, T in ((1.0, 0.1, 100),):
        mechanism = prv.PoissonSubsampledGaussianMechanism(noise_multiplier=z, sampling_probability=q)
        other = prv.PRVAccountant([mechanism], max_self_compositions=[T], eps_error=0.02, delta_error=1e-9)
        low, _, high = other.compute_epsilon(delta=1e-5, num_self_compositions=[T])
        assert low - 1e-3 <= epsilon([Release(z, T, q)], 1e-5) <= high + 1e-3


def test_the_closed_form_is_what_privacy_loss_distributions_give() -> None:
    pytest.importorskip("dp_accounting")
    from dp_accounting import GaussianDpEvent
    from dp_accounting.pld import PLDAccountant

    for z, T, delta in ((1.0, 1, 1e-5), (4.0, 20, 1e-3), (2.0, 7, 1e-6)):
        accountant = PLDAccountant()
        accountant.compose(GaussianDpEvent(z), T)
        assert epsilon([Release(z, T)], delta) == pytest.approx(accountant.get_epsilon(delta), abs=1e-4)


@pytest.mark.parametrize("target, delta, want", [(8, 1e-5, 2.684307), (2, 1e-5, 8.916601), (8, 1e-3, 2.146688)])
def test_calibrated_noise(target: float, delta: float, want: float) -> None:
    z = noise_multiplier(target, delta, 20)
    assert z == pytest.approx(want, abs=1e-4)
    assert epsilon([Release(z, 20)], delta) <= target < epsilon([Release(z * 0.9999, 20)], delta)


@pytest.mark.parametrize(
    "T, q, eps, want", [(860, 16 / 1363, 3, 0.844486), (80, 0.1, 8, 0.88793), (100, 0.1, 8, 0.935926)]
)
def test_calibrated_noise_of_sampled_releases(T: int, q: float, eps: float, want: float) -> None:
    pytest.importorskip("dp_accounting")
    z = noise_multiplier(eps, 1e-5, T, q)
    assert z == pytest.approx(want, abs=1e-4) and epsilon([Release(z, T, q)], 1e-5) <= eps


def test_nothing_released_costs_nothing_and_no_noise_everything() -> None:
    assert epsilon([], 1e-5) == 0.0 and epsilon([Release(1.0, 0)], 1e-5) == 0.0
    assert epsilon([Release(1.0), Release(0.0)], 1e-5) == math.inf


@given(mu=st.floats(0.05, 8), delta=st.floats(1e-9, 0.1))
def test_epsilon_inverts_delta_and_grows_with_the_signal(mu: float, delta: float) -> None:
    eps = gaussian_epsilon(mu, delta)
    assert eps == 0 or gaussian_delta(eps, mu) == pytest.approx(delta, rel=1e-6)
    assert gaussian_epsilon(mu * 1.1, delta) >= eps


def entry(t: int, whose: str = "", digest: str = "x", z: float = 4.0) -> Entry:
    return Entry(t, whose, Release(z), digest)


def test_a_ledger_is_read_back_and_counts_a_repeated_round_once(tmp_path: Path) -> None:
    path = tmp_path / "privacy.jsonl"
    ledger = Ledger(path)
    for t in (1, 2):
        ledger.add(entry(t))
    again = Ledger(path)
    again.add(entry(2))
    assert again.entries == ledger.entries and again.epsilon(1e-3) == pytest.approx(epsilon([Release(4.0, 2)], 1e-3))
    again.add(entry(2, digest="another"))  # the round was done again and came to something else: both count
    assert Ledger(path).epsilon(1e-3) == pytest.approx(epsilon([Release(4.0, 3)], 1e-3))
    assert Ledger(path).epsilon(1e-3, [Release(4.0, 17)]) == pytest.approx(3.605055, abs=1e-6)


def test_the_largest_epsilon_over_clients(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "privacy.jsonl")
    ledger.add(entry(1, "a"))
    ledger.add(entry(1, "b"))
    ledger.add(entry(2, "b"))
    assert ledger.known == ["a", "b"]
    assert ledger.epsilon(1e-3) == pytest.approx(epsilon([Release(4.0, 2)], 1e-3))


def test_a_torn_last_line_is_dropped_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "privacy.jsonl"
    ledger = Ledger(path)
    ledger.add(entry(1))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    torn = Ledger(path)
    assert torn.entries == [entry(1)]
    torn.add(entry(2))
    assert Ledger(path).entries == [entry(1), entry(2)]
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(RunError, match="damaged in line 1: nobody knows what was spent"):
        Ledger(path)
