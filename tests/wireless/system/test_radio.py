"""The two ways to share a band, held against each other and against arithmetic by hand."""

import numpy as np
import pytest

from fedloom.errors import ConfigError
from fedloom.wireless.system.radio import Band, Holding, Link, Subcarriers

from ..problems import small

SUBCARRIERS = Subcarriers(
    up=np.array([[4.0, 2.0, 6.0], [3.0, 9.0, 3.0]]),
    down=np.array([[8.0, 8.0, 8.0], [5.0, 5.0, 5.0]]),
    power_per_subcarrier_w=np.array([0.1, 0.3]),
    spacing_hz=10.0,
)
BAND = Band(30.0, np.array([60.0, 90.0]), np.array([600.0, 900.0]), np.array([0.3, 0.9]))


def test_whole_power_is_that_of_every_subcarrier() -> None:
    np.testing.assert_allclose(SUBCARRIERS.power_w, [0.3, 0.9])
    one = SUBCARRIERS.rates(np.array([[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]))
    np.testing.assert_allclose(one.transmit_w, [0.1, 0.6])
    np.testing.assert_allclose(BAND.rates(np.array([10.0, 20.0])).transmit_w, [0.3, 0.9])


@pytest.mark.parametrize("link", [SUBCARRIERS, BAND], ids=["subcarriers", "band"])
def test_the_whole_band_is_the_best_there_is(link: Link) -> None:
    whole, even = link.whole_band(), link.rates(link.divided_evenly())
    assert (whole.up > even.up).all() and (whole.down > even.down).all()
    np.testing.assert_allclose(whole.transmit_w, link.power_w)


def test_the_cheapest_bit_goes_by_the_best_subcarrier_or_the_whole_band() -> None:
    np.testing.assert_allclose(SUBCARRIERS.least_j_per_bit(), [0.1 / 6.0, 0.3 / 9.0])
    np.testing.assert_allclose(BAND.least_j_per_bit(), BAND.power_w / BAND.whole_band().up)


def test_an_even_deal_begins_with_the_worst_channel() -> None:
    np.testing.assert_array_equal(SUBCARRIERS.dealt_evenly(), [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    np.testing.assert_array_equal(BAND.dealt_evenly(), [15.0, 15.0])


@pytest.mark.parametrize("mode", ["subcarrier", "bandwidth"])
def test_a_share_is_its_holdings(mode: str) -> None:
    link = small(1, mode=mode).link  # type: ignore[arg-type]
    share = link.dealt_evenly()
    holdings = link.holdings(share)
    assert (holdings[0].subcarriers is None) == (link.mode == "bandwidth") == (mode == "bandwidth")
    assert sum(holding.bandwidth_hz for holding in holdings) == pytest.approx(5e6)
    np.testing.assert_array_equal(link.share_of_holdings(holdings), share)


def test_a_subcarrier_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="uses subcarrier 3, the fleet has 3"):
        SUBCARRIERS.share_of_holdings([Holding((0, 3), 20.0), Holding((), 0.0)])


def test_a_solver_of_the_other_mode_says_so() -> None:
    with pytest.raises(TypeError, match="divides a bandwidth, got a problem in subcarrier mode"):
        _ = small(1).band
    with pytest.raises(TypeError, match="divides subcarriers, got a problem in bandwidth mode"):
        _ = small(1, mode="bandwidth").subcarriers
