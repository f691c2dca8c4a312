from __future__ import annotations

import pytest
import torch

from fedloom.core import State
from fedloom.guard import Expected

NAN, INF = float("nan"), float("inf")


def sent() -> State:
    return {
        "A": {"s": torch.ones(3, 4), "t": torch.ones(3, 2)},
        "B": {"s": torch.ones(5, 3), "t": torch.ones(6, 3)},
        "mask": {"seed": torch.tensor([7])},
    }


def fault(upload: State, max_norm: float | None = None, shrinks: bool = False) -> str | None:
    return Expected.like(sent(), shrinks).fault(upload, max_norm)


def changed(role: str, site: str, x: torch.Tensor) -> State:
    return sent() | {role: sent()[role] | {site: x}}


def test_what_was_asked_for_passes() -> None:
    assert fault(sent()) is None
    assert fault(changed("A", "s", torch.full((3, 4), -1e30))) is None


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("role, site", [("A", "t"), ("B", "s")])
def test_one_number_that_is_not_finite(bad: float, role: str, site: str) -> None:
    x = sent()[role][site].clone()
    x[-1, -1] = bad
    assert fault(changed(role, site, x)) == f"{role}/{site} has a NaN or an infinite number"


def test_infinities_that_cancel_are_seen() -> None:
    assert "infinite" in str(fault(changed("A", "s", torch.tensor([[INF, -INF, 0, 0]]).repeat(3, 1))))


def test_large_numbers_whose_sum_overflows_are_finite() -> None:
    assert fault(changed("A", "s", torch.full((3, 4), 3e38))) is None


def test_shape_type_and_what_is_missing_or_too_much() -> None:
    assert fault(changed("A", "s", torch.ones(4, 3))) == "A/s has shape (4, 3), expected (3, 4)"
    assert fault(changed("A", "s", torch.ones(12))) == "A/s has shape (12,), expected (3, 4)"
    assert "float64" in str(fault(changed("A", "s", torch.ones(3, 4).double())))
    assert "int64" in str(fault(changed("B", "s", torch.ones(5, 3).long())))
    assert fault(sent() | {"A": {"s": torch.ones(3, 4)}}) == "missing tensor A/t (1 missing)"
    assert fault(changed("A", "u", torch.ones(1))) == "unexpected tensor A/u"
    assert fault({k: v for k, v in sent().items() if k != "B"}) == "missing role B"
    assert fault(sent() | {"head": {}}) == "unexpected role head"
    assert fault({}) == "missing role A, B, mask"


def test_a_seed_must_come_back_as_it_went() -> None:
    assert fault(changed("mask", "seed", torch.tensor([8]))) == "mask/seed is not what was sent"
    assert "shape" in str(fault(changed("mask", "seed", torch.tensor([7, 7]))))
    assert "dtype" in str(fault(changed("mask", "seed", torch.tensor([7.0]))))


def test_norm_is_over_all_that_floats() -> None:
    """12 + 6 + 15 + 18 ones: the norm is sqrt(51), and the seed does not count."""
    assert fault(sent(), 51**0.5 + 1e-6) is None
    assert fault(sent(), 51**0.5 - 1e-6) == "norm 7.141 is above max_norm 7.141"
    # Squares that overflow float32 do not hide a norm.
    assert "above" in str(fault(changed("A", "s", torch.full((3, 4), 1e30)), 1e10))


def test_ranks_may_shrink_where_the_method_says_so() -> None:
    def cut(a: int, b: int) -> State:
        groups = sent()
        groups["A"] = {site: x[:a] for site, x in groups["A"].items()}
        groups["B"] = {site: x[:, :b] for site, x in groups["B"].items()}
        return groups

    assert fault(cut(2, 2)) == "A/s has shape (2, 4), expected (3, 4)"
    assert fault(cut(2, 2), shrinks=True) is None and fault(sent(), shrinks=True) is None
    assert fault(cut(2, 3), shrinks=True) == "ranks differ between tensors: [2, 3]"
    assert "shape (0, 4)" in str(fault(cut(0, 0), shrinks=True))
    grown = changed("A", "s", torch.ones(4, 4))
    assert Expected.like(sent(), shrinks=True).fault(grown) == "A/s has shape (4, 4), expected (3, 4)"
    narrow = changed("A", "s", torch.ones(3, 3))
    assert "(3, 3)" in str(Expected.like(sent(), shrinks=True).fault(narrow)), "the inputs may not shrink"


def test_it_holds_no_float_tensor() -> None:
    assert [list(group) for group in Expected.like(sent()).exact.values()] == [[], [], ["seed"]]
