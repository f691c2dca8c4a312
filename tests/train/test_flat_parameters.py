"""Flattening clients of different shapes into one tensor, and factors made from it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedloom.core import Factors, State, plain
from fedloom.train.flat_parameters import AdapterStack, flatten, pad_stack

CPU = torch.device("cpu")


def states() -> list[State]:
    torch.manual_seed(0)
    return [
        {"A": {"x": torch.randn(r, 6), "y": torch.randn(r, 4)}, "B": {"x": torch.randn(3, r), "y": torch.randn(7, r)}}
        for r in (2, 5, 3)
    ]


def test_flatten_copies_and_pads_with_zeros() -> None:
    given = states()
    layout, flat = flatten(given, torch.float64, CPU)
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


def mixed(train: State, fixed: State) -> Factors:
    """A comes from `fixed` at one site and is scaled at the other; B is trained as it is; the gate is one of both."""
    assert train["A"]["x"].shape[0] == train["B"]["x"].shape[1], "padding must not be seen"
    gate = {"x": train["A"]["x"][:1] * 3.0, "y": fixed["gate"]["y"]}
    return Factors({"x": train["A"]["x"] * 2.0, "y": fixed["A"]["y"]}, train["B"], gate)


@pytest.mark.parametrize("adapter", [plain, mixed])
def test_shortcut_equals_the_slow_path_bit_for_bit(adapter: Callable[[State, State], Factors]) -> None:
    given = states()
    fixed: list[State] = [{"A": {"y": torch.full((r, 4), 0.5)}, "gate": {"y": torch.ones(2, 4)}} for r in (2, 5, 3)]
    layout, flat = flatten(given, torch.float32, CPU)
    probes = {"x": torch.randn(3, 3, 6), "y": torch.randn(3, 7, 4)}
    results: list[list[Tensor]] = []
    for shortcut in (True, False):
        stack = AdapterStack([adapter] * 3, layout, fixed, shortcut)
        found: list[Tensor] = []
        for K in (3, 2):
            leaf = flat[:K].detach().requires_grad_()
            (A, B, gate), _ = stack(leaf, torch.float32)
            total = torch.stack([(B[site] @ A[site] * probe[:K]).sum() for site, probe in probes.items()]).sum()
            if gate is not None:
                assert gate["x"].shape == (K, 1, 6) and torch.equal(gate["y"], torch.ones(K, 2, 4))
                total = total + gate["x"].square().sum()
            made = (*A.values(), *B.values(), *(gate or {}).values())
            found += [*(x.detach() for x in made), *torch.autograd.grad(total, leaf)]
        results.append(found)
    for fast, slow in zip(*results, strict=True):
        assert torch.equal(fast, slow)


def test_the_order_of_roles_and_sites_does_not_matter() -> None:
    first, second = states()[:2]
    shuffled: State = {role: dict(reversed(group.items())) for role, group in reversed(second.items())}
    layout, flat = flatten([first, shuffled], torch.float32, CPU)
    own = layout.states(layout.views(flat), 2)
    assert torch.equal(own[1]["B"]["y"], second["B"]["y"])
    assert list(own[1]) == list(first) and list(own[1]["A"]) == ["x", "y"]
