"""Sums of fixed-point numbers: exact, whatever the order, and as near to the real sum as the grid is fine."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.privacy.fixed_point import FixedPoint, Layout

Bits = Literal[32, 64]
both = pytest.mark.parametrize("bits", [32, 64])


@both
@pytest.mark.parametrize("count", [2, 3, 10, 50, 1000])
@pytest.mark.parametrize("limit", [0.3, 1.0, 65536.0])
def test_a_sum_of_the_largest_numbers_does_not_wrap_and_one_bit_more_would(
    count: int, limit: float, bits: Bits
) -> None:
    grid = FixedPoint(count, limit, bits)
    for sign in (1.0, -1.0):
        words = grid.encode(torch.full((1,), sign * limit, dtype=torch.float64))
        exact = int(words) * count
        assert -(2 ** (bits - 1)) <= exact < 2 ** (bits - 1)
        assert int(sum(words for _ in range(count))) == exact
    assert count * limit * 2.0 ** (grid.fraction + 1) + count >= 2.0 ** (bits - 1) * (1 - 2.0**-20)


def test_fractions_by_hand() -> None:
    assert [FixedPoint(n, 1.0, 32).fraction for n in (10, 100, 1000)] == [27, 24, 21]
    assert FixedPoint(4, 65536.0).fraction == 63 - 2 - 16 - 1  # one less: not all of 2^63 is used


@both
@given(data=st.data(), count=st.integers(2, 50))
def test_the_sum_is_exact_and_within_half_a_step_a_number(bits: Bits, data: st.DataObject, count: int) -> None:
    grid = FixedPoint(count, 1.0, bits)
    floats = st.lists(st.floats(-1, 1, width=64), min_size=count, max_size=count)
    numbers = data.draw(floats)
    words = [grid.encode(torch.tensor([x], dtype=torch.float64)) for x in numbers]
    total = sum(words[1:], start=words[0])
    assert int(total) == sum(int(w) for w in words)  # Python's integers never wrap
    real = sum((Fraction(x) for x in numbers), start=Fraction(0))
    assert abs(Fraction(int(total)) / 2**grid.fraction - real) <= Fraction(count, 2 ** (grid.fraction + 1))
    order = data.draw(st.permutations(words))
    assert int(sum(order[1:], start=order[0])) == int(total)


@both
@pytest.mark.parametrize(
    "x, why", [(float("nan"), "not finite"), (float("inf"), "not finite"), (1.5, "size 1.5 is beyond the limit 1 ")]
)
def test_numbers_that_do_not_fit_are_refused(x: float, why: str, bits: Bits) -> None:
    with pytest.raises(ValueError, match=why):
        FixedPoint(3, 1.0, bits).encode(torch.tensor([0.0, x]))


def test_a_layout_goes_there_and_back_and_refuses_other_tensors() -> None:
    state = {
        "head": {"w": torch.arange(3.0)},
        "A": {"y": torch.ones(2, 3, dtype=torch.float64), "x": torch.zeros(0, 4)},
    }
    layout = Layout.of(state)
    vector = layout.vector(state)
    assert vector.tolist() == [1.0] * 6 + [0.0, 1.0, 2.0]
    back = layout.state(vector)
    for role, group in state.items():
        for site, x in group.items():
            assert torch.equal(back[role][site], x) and back[role][site].dtype == x.dtype
    with pytest.raises(ValueError, match="other tensors"):
        layout.vector({"A": state["A"]})
