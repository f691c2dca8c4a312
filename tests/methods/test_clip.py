from __future__ import annotations

import pytest
import torch

from fedloom.core import Client, Trained, Visit, Work
from fedloom.errors import ConfigError
from fedloom.loop import federate
from fedloom.methods import build
from fedloom.state import State

from .cases import EXAMPLES, RANK, engine, flat, start, state, visited

FIRST = state([[1.0, 2.0]], [[1.0], [0.0], [2.0]])


def moved(work: Work) -> State:
    """A by (3, 0), B by (0, 4, 0): a change of norm 5."""
    A, B = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0], [4.0], [0.0]])
    return {"A": {"s": work.train["A"]["s"] + A}, "B": {"s": work.train["B"]["s"] + B}}


@pytest.mark.parametrize("norm, A, B", [(2.5, 2.5, 2.0), (1.0, 1.6, 0.8), (5.0, 4.0, 4.0), (9.0, 4.0, 4.0)])
def test_clip_by_hand(norm: float, A: float, B: float) -> None:
    method = build({"name": "clip_updates", "norm": norm}, {"rank": 1})
    sent, kept = visited(method, FIRST, Client("a", 1, 1), moved)
    torch.testing.assert_close(sent["A"]["s"], torch.tensor([[A, 2.0]]), rtol=1e-6, atol=0)
    torch.testing.assert_close(sent["B"]["s"], torch.tensor([[1.0], [B], [2.0]]), rtol=1e-6, atol=0)
    assert kept == {}


def test_what_stays_with_the_client_is_not_clipped() -> None:
    method = build({"name": "clip_updates", "norm": 0.1, "over": {"name": "fedsa_lora"}}, {"rank": 1})
    A, B = ({site: torch.ones(shape) for site, shape in sizes.items()} for sizes in ({"s": (1, 2)}, {"s": (3, 1)}))
    flow = method.client({"A": A}, {"B": B}, Visit(1, Client("a", 1, 1), {"s": (3, 2)}))
    work = flow.send(None)
    assert isinstance(work, Work)
    with pytest.raises(StopIteration) as stop:
        flow.send(Trained(moved(work), 1, 1.0, 0.0))
    sent, kept = stop.value.value
    torch.testing.assert_close(sent["A"]["s"], torch.tensor([[1.1, 1.0]]), rtol=1e-6, atol=0)
    assert kept["B"]["s"].tolist() == [[1.0], [5.0], [1.0]]


def test_a_norm_that_nobody_reaches_changes_no_byte_and_a_small_one_bounds_the_round() -> None:
    clients = [Client(k, n, RANK) for k, n in EXAMPLES.items()]
    plain = build({"name": "fedit"}, {"rank": RANK})
    first = start(plain)
    want = federate(plain, engine(), first, clients, 2)
    for norm in (1e3, 0.05):
        method = build({"name": "clip_updates", "norm": norm}, {"rank": RANK})
        got = federate(method, engine(), first, clients, 2)
        if norm == 1e3:
            assert flat(got) == flat(want)
            continue
        squares = [(x - first[r][s]).square().sum() for r, group in got.items() for s, x in group.items()]
        assert 0 < float(torch.stack(squares).sum().sqrt()) <= 2 * norm * (1 + 1e-5)


@pytest.mark.parametrize(
    "over, why",
    [
        ("scaffold", "put scaffold over clip"),
        ("hetlora", "has a size that the client chooses"),
        ("fedlora_optimizer", "turn"),
    ],
)
def test_methods_it_cannot_go_over_are_refused(over: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        build({"name": "clip_updates", "over": {"name": over}}, {"rank": 4})
