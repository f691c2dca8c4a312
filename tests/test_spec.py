from __future__ import annotations

import gc

import pytest
import torch

from fedloom import spec
from fedloom.spec import Dim, Leaf, Spec, like
from fedloom.state import State

NAN, INF = float("nan"), float("inf")


def sent() -> State:
    return {
        "A": {"s": torch.ones(3, 4), "t": torch.ones(3, 2)},
        "B": {"s": torch.ones(5, 3), "t": torch.ones(6, 3)},
        "mask": {"seed": torch.tensor([7])},
    }


def asked() -> State:
    """What comes back: all but the seed."""
    return {"A": sent()["A"], "B": sent()["B"]}


def reason(upload: State, max_norm: float | None = None) -> str | None:
    return spec.reject_reason(like(sent()), upload, max_norm)


def changed(role: str, site: str, x: torch.Tensor) -> State:
    return asked() | {role: asked()[role] | {site: x}}


def test_what_was_asked_for_passes() -> None:
    assert reason(asked()) is None
    assert reason(changed("A", "s", torch.full((3, 4), -1e30))) is None


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("role, site", [("A", "t"), ("B", "s")])
def test_one_number_that_is_not_finite(bad: float, role: str, site: str) -> None:
    x = asked()[role][site].clone()
    x[-1, -1] = bad
    assert reason(changed(role, site, x)) == f"{role}/{site} has a NaN or an infinite number"


def test_infinities_that_cancel_are_seen() -> None:
    assert "infinite" in str(reason(changed("A", "s", torch.tensor([[INF, -INF, 0, 0]]).repeat(3, 1))))


def test_large_numbers_whose_sum_overflows_are_finite() -> None:
    assert reason(changed("A", "s", torch.full((3, 4), 3e38))) is None


def test_shape_dtype_and_what_is_missing_or_too_much() -> None:
    assert reason(changed("A", "s", torch.ones(4, 3))) == "A/s has shape (4, 3), expected (3, 4)"
    assert reason(changed("A", "s", torch.ones(12))) == "A/s has shape (12,), expected (3, 4)"
    assert "float64" in str(reason(changed("A", "s", torch.ones(3, 4).double())))
    assert "int64" in str(reason(changed("B", "s", torch.ones(5, 3).long())))
    assert reason(asked() | {"A": {"s": torch.ones(3, 4)}}) == "missing tensor A/t (1 missing)"
    assert reason(changed("A", "u", torch.ones(1))) == "unexpected tensor A/u"
    assert reason({k: v for k, v in asked().items() if k != "B"}) == "missing role B"
    assert reason(asked() | {"head": {}}) == "unexpected role head"
    assert reason({}) == "missing role A, B"


def test_seeds_and_indices_do_not_come_back_unless_they_are_named() -> None:
    assert set(like(sent())) == {"A", "B"} and set(like(sent(), "mask", "A")) == {"A", "mask"}
    assert reason(sent()) == "unexpected role mask"
    named = like(sent(), "A", "B", "mask")
    assert spec.reject_reason(named, sent()) is None
    wrong = sent() | {"mask": {"seed": torch.tensor([7, 7])}}
    assert "shape" in str(spec.reject_reason(named, wrong))
    assert "dtype" in str(spec.reject_reason(named, sent() | {"mask": {"seed": torch.tensor([7.0])}}))


def test_norm_is_over_all_that_floats() -> None:
    """12 + 6 + 15 + 18 ones: the norm is sqrt(51), and a seed does not count."""
    named = like(sent(), "A", "B", "mask")
    assert spec.reject_reason(named, sent(), 51**0.5 + 1e-6) is None
    assert spec.reject_reason(named, sent(), 51**0.5 - 1e-6) == "norm 7.141 is above max_norm 7.141"
    # Squares that overflow float32 do not hide a norm.
    assert "above" in str(reason(changed("A", "s", torch.full((3, 4), 1e30)), 1e10))


def ranked(low: int = 1) -> Spec:
    """A and B at a rank of the client's choice, up to 3."""
    rank = Dim("rank", 3, low)
    return {
        "A": {"s": Leaf((rank, 4)), "t": Leaf((rank, 2))},
        "B": {"s": Leaf((5, rank)), "t": Leaf((6, rank))},
    }


def cut(a: int, b: int) -> State:
    state = asked()
    return {
        "A": {site: x[:a] for site, x in state["A"].items()},
        "B": {site: x[:, :b] for site, x in state["B"].items()},
    }


def test_sizes_that_the_client_chooses_agree_and_have_bounds() -> None:
    assert reason(cut(2, 2)) == "A/s has shape (2, 4), expected (3, 4)"
    assert [spec.reject_reason(ranked(), cut(r, r)) for r in (1, 2, 3)] == [None] * 3
    mixed = str(spec.reject_reason(ranked(), cut(2, 3)))
    assert mixed == "B/s has rank 3, other tensors of this upload have rank 2"
    assert spec.reject_reason(ranked(), cut(0, 0)) == "A/s has shape (0, 4), expected (rank 1 to 3, 4)"
    assert spec.reject_reason(ranked(low=0), cut(0, 0)) is None
    assert "expected (rank 2 to 3, 4)" in str(spec.reject_reason(ranked(low=2), cut(1, 1)))
    grown = changed("A", "s", torch.ones(4, 4))
    assert spec.reject_reason(ranked(), grown) == "A/s has shape (4, 4), expected (rank 1 to 3, 4)"
    narrow = changed("A", "s", torch.ones(3, 3))
    assert "(3, 3)" in str(spec.reject_reason(ranked(), narrow)), "the inputs may not shrink"


def test_two_names_are_two_sizes() -> None:
    free: Spec = {"A": {"s": Leaf((Dim("r", 3), Dim("n", 4)))}, "B": {"s": Leaf((5, Dim("r", 3)))}}
    assert spec.reject_reason(free, {"A": {"s": torch.ones(2, 3)}, "B": {"s": torch.ones(5, 2)}}) is None
    assert "has r 3" in str(spec.reject_reason(free, {"A": {"s": torch.ones(2, 3)}, "B": {"s": torch.ones(5, 3)}}))


def test_zeros_are_the_smallest_upload_that_passes() -> None:
    for want in (like(sent()), ranked(), ranked(low=0), like({"A": {"s": torch.ones(2).double()}})):
        zero = spec.zeros(want)
        assert spec.reject_reason(want, zero) is None
        assert all((x == 0).all() for group in zero.values() for x in group.values())
    assert spec.zeros(ranked())["B"]["t"].shape == (6, 1)


def test_what_stands_against_a_secret_sum() -> None:
    assert spec.secret_sum_obstacle(like(sent())) is None
    assert spec.secret_sum_obstacle(ranked()) == "A/s has a size that the client chooses"
    assert spec.secret_sum_obstacle(like(sent(), "A", "mask")) == "mask/seed holds integers"


def test_a_specification_holds_no_tensor() -> None:
    import weakref

    state = asked()
    gone = [weakref.ref(x) for group in state.values() for x in group.values()]
    want = like(state)
    del state
    gc.collect()
    assert all(x() is None for x in gone) and want["A"]["s"] == Leaf((3, 4), torch.float32)
