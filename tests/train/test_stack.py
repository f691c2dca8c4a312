"""Packing clients of different shapes into one tensor, and factors made from it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fedloom.core import Client, Group, Method, Sites, State, Work
from fedloom.methods.fedit import FedIT
from fedloom.train.stack import Factors, pack, pad_stack

CPU = torch.device("cpu")


def states() -> list[State]:
    torch.manual_seed(0)
    return [
        {"A": {"x": torch.randn(r, 6), "y": torch.randn(r, 4)}, "B": {"x": torch.randn(3, r), "y": torch.randn(7, r)}}
        for r in (2, 5, 3)
    ]


def test_pack_copies_and_pads_with_zeros() -> None:
    given = states()
    layout, flat = pack(given, torch.float64, CPU)
    assert flat.shape == (3, 5 * (6 + 4 + 3 + 7))
    views = layout.views(flat)
    assert views["A", "x"].shape == (3, 5, 6)
    assert views["B", "y"].shape == (3, 7, 5)
    assert (views["A", "x"][0, 2:] == 0).all()
    assert (views["B", "y"][0, :, 2:] == 0).all()
    for state, own in zip(given, layout.states(views, 3), strict=True):
        for role, group in state.items():
            for site, x in group.items():
                assert torch.equal(own[role][site], x.double())
    before = given[1]["A"]["x"].clone()
    flat.fill_(7)
    assert torch.equal(given[1]["A"]["x"], before)


def test_pad_stack_pads_each_axis_at_its_end() -> None:
    made = pad_stack([torch.ones(2, 3), torch.ones(1, 4)])
    assert made.tolist() == [[[1, 1, 1, 0], [1, 1, 1, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]]]
    assert pad_stack([torch.tensor(1.0), torch.tensor(2.0)]).tolist() == [1, 2]


@dataclass(frozen=True, kw_only=True)
class Mixed(Method):
    """A comes from `fixed` at one site and is scaled at the other; B is trained as it is."""

    def prepare(self, received: State, kept: State, sites: Sites, client: Client, t: int) -> Work:
        return Work(train=received)

    def aggregate(self, state: State, uploads: object) -> State:
        return state

    def adapter(self, train: State, fixed: State) -> tuple[Group, Group]:
        assert train["A"]["x"].shape[0] == train["B"]["x"].shape[1], "padding must not be seen"
        return {"x": train["A"]["x"] * 2.0, "y": fixed["A"]["y"]}, train["B"]


@pytest.mark.parametrize("method", [FedIT(), Mixed()])
def test_shortcut_equals_the_slow_path_bit_for_bit(method: Method) -> None:
    given = states()
    fixed: list[State] = [{"A": {"y": torch.full((r, 4), 0.5)}} for r in (2, 5, 3)]
    layout, flat = pack(given, torch.float32, CPU)
    probes = {"x": torch.randn(3, 3, 6), "y": torch.randn(3, 7, 4)}
    results: list[list[Tensor]] = []
    for shortcut in (True, False):
        factors = Factors(method, layout, fixed, shortcut)
        found: list[Tensor] = []
        for K in (3, 2):
            leaf = flat[:K].detach().requires_grad_()
            A, B, _ = factors(leaf, torch.float32)
            total = torch.stack([(B[site] @ A[site] * probe[:K]).sum() for site, probe in probes.items()]).sum()
            found += [*(x.detach() for x in (*A.values(), *B.values())), *torch.autograd.grad(total, leaf)]
        results.append(found)
    for fast, slow in zip(*results, strict=True):
        assert torch.equal(fast, slow)


def test_the_order_of_roles_and_sites_does_not_matter() -> None:
    first, second = states()[:2]
    shuffled: State = {role: dict(reversed(group.items())) for role, group in reversed(second.items())}
    layout, flat = pack([first, shuffled], torch.float32, CPU)
    own = layout.states(layout.views(flat), 2)
    assert torch.equal(own[1]["B"]["y"], second["B"]["y"])
    assert list(own[1]) == list(first)
