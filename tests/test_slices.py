from __future__ import annotations

import torch

from fedloom import slices
from fedloom.slices import Cut
from fedloom.state import State


def state() -> State:
    return {
        "A": {"s": torch.arange(12.0).reshape(3, 4), "t": torch.ones(3, 2)},
        "B": {"s": torch.arange(15.0).reshape(5, 3), "t": torch.ones(2, 3)},
        "head": {"w": torch.ones(2)},
    }


def index(*i: int) -> torch.Tensor:
    return torch.tensor(i, dtype=torch.int64)


def test_take_by_hand() -> None:
    got = slices.take(state(), {"s": Cut(rank=index(0, 2), rows=index(1, 4), cols=index(3))})
    assert got["A"]["s"].tolist() == [[3.0], [11.0]]
    assert got["B"]["s"].tolist() == [[3.0, 5.0], [12.0, 14.0]]
    assert torch.equal(got["A"]["t"], torch.ones(3, 2)), "a site without a cut passes"
    assert torch.equal(got["head"]["w"], torch.ones(2))


def test_put_by_hand() -> None:
    full = state()
    part: State = {"A": {"s": index(-1, -2).float()[:, None]}, "B": {"s": torch.full((2, 2), -9.0)}, "new": {}}
    got = slices.put(full, part, {"s": Cut(rank=index(0, 2), rows=index(1, 4), cols=index(3))})
    assert got["A"]["s"].tolist() == [[0, 1, 2, -1], [4, 5, 6, 7], [8, 9, 10, -2]]
    assert got["B"]["s"].tolist() == [[0, 1, 2], [-9, 4, -9], [6, 7, 8], [9, 10, 11], [-9, 13, -9]]
    assert got.keys() == {"A", "B", "new"}, "roles are the part's"
    assert torch.equal(full["A"]["s"], state()["A"]["s"]) and torch.equal(full["B"]["s"], state()["B"]["s"])


def test_take_undoes_put_and_put_undoes_take() -> None:
    rng = torch.Generator().manual_seed(0)
    full: State = {"A": {"s": torch.randn(6, 9, generator=rng)}, "B": {"s": torch.randn(7, 6, generator=rng)}}
    for rank in (None, index(1, 3, 4), index()):
        for rows in (None, index(0, 6), index()):
            for cols in (None, index(2, 3, 8), index()):
                cuts = {"s": Cut(rank, rows, cols)}
                part = slices.take(full, cuts)
                assert torch.equal(slices.put(full, part, cuts)["A"]["s"], full["A"]["s"])
                assert torch.equal(slices.put(full, part, cuts)["B"]["s"], full["B"]["s"])
                other = {role: {"s": torch.randn(x["s"].shape, generator=rng)} for role, x in part.items()}
                back = slices.take(slices.put(full, other, cuts), cuts)
                assert all(torch.equal(back[role]["s"], other[role]["s"]) for role in ("A", "B"))


def test_an_empty_cut_has_no_numbers() -> None:
    part = slices.take(state(), {"s": Cut(cols=index(), rows=index())})
    assert part["A"]["s"].shape == (3, 0) and part["B"]["s"].shape == (0, 3)


def test_prefix() -> None:
    part = slices.take(state(), slices.prefix(state(), 2))
    assert part["A"]["s"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert part["B"]["t"].shape == (2, 2)


def test_parts_do_not_alias_the_whole() -> None:
    full = state()
    part = slices.take(full, slices.prefix(full, 3))
    part["A"]["s"].zero_()
    assert torch.equal(full["A"]["s"], state()["A"]["s"])
