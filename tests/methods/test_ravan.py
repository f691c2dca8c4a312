from __future__ import annotations

import pytest
import torch

from fedloom.core import Client, State, Visit, Work
from fedloom.errors import ConfigError
from fedloom.methods import build
from fedloom.methods.ravan import Ravan
from fedloom.rng import generator

from .cases import RANK, SITES, ToyTrainer, after, first_work, received, rows, served, start, update, visited


def ravan(**fields: object) -> Ravan:
    method = build({"name": "ravan", **fields}, {"rank": RANK, "alpha": 6.0})
    assert isinstance(method, Ravan)
    return method


def grown(method: Ravan) -> State:
    """A state whose heads are not zero, the third the largest, then the first."""
    size = torch.tensor([3.0, 1.0, 4.0, 2.0])[: method.heads, None, None]
    state = start(method)
    return state | {"H": {site: size * torch.ones_like(x) for site, x in state["H"].items()}}


def test_ravan_by_hand() -> None:
    """One site of two heads of rank 1. Head 0: (3 x 1 + 1 x 5) / 4; head 1 by the second client alone."""
    method = build({"name": "ravan", "heads": 2}, {"rank": 2})
    state = method.init({"s": (3, 4)}, generator(0))
    one = {"H": {"s": torch.tensor([[[1.0]]])}, "which": {"s": torch.tensor([0])}}
    two = {"H": {"s": torch.tensor([[[5.0]], [[7.0]]])}, "which": {"s": torch.tensor([0, 1])}}
    got = after(method, state, [(Client("a", 3, 1), one), (Client("b", 1, 2), two)])
    assert got["H"]["s"].flatten().tolist() == [2.0, 7.0]
    again = after(method, got, [(Client("a", 3, 1), one)], 2)
    assert again["H"]["s"].flatten().tolist() == [1.0, 7.0], "a head that nobody trained stays"


def test_ravan_ignores_a_head_that_there_is_not() -> None:
    method = build({"name": "ravan", "heads": 2}, {"rank": 2})
    state = method.init({"s": (3, 4)}, generator(0))
    odd = {"H": {"s": torch.tensor([[[1.0]], [[2.0]]])}, "which": {"s": torch.tensor([1, -7])}}
    assert after(method, state, [(Client("a", 3, 2), odd)])["H"]["s"].flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("rank", "count"), [(1, 1), (2, 2), (3, 3), (4, 4)])
def test_ravan_trains_the_largest_heads_in_the_model_of_all(rank: int, count: int) -> None:
    method = ravan()
    state, client = grown(method), Client("a", 1, rank)
    work = first_work(method, received(method, state, client), client)
    for site, delta in served(method, state, client, SITES).items():
        torch.testing.assert_close(update(work)[site], delta)
        assert work.train["H"][site].shape == (count, 1, 1) and work.train["c"][site].tolist() == [1.0] * count
        assert sorted(work.train["H"][site].flatten().tolist()) == sorted([4.0, 3.0, 2.0, 1.0][:count])


def test_ravan_sends_the_heads_with_their_scalars() -> None:
    """The upload, taken back as the next state, is the model that was trained."""
    method = ravan()
    state, client = grown(method), Client("a", 1, 2)
    sent: list[Work] = []

    def trained(work: Work) -> State:
        sent.append(work)
        c = {site: torch.tensor([2.0, -3.0]) for site in SITES}
        return work.train | {"c": c, "H": {site: x + 1 for site, x in work.train["H"].items()}}

    upload, kept = visited(method, received(method, state, client), client, trained)
    assert kept == {}
    for site in SITES:
        assert upload["which"][site].tolist() == [0, 2]
        assert upload["H"][site].flatten().tolist() == [2 * (3 + 1), -3 * (4 + 1)]
    new = served(method, after(method, state, [(client, upload)]), client, SITES)
    for site, delta in update(sent[0], trained(sent[0])).items():
        torch.testing.assert_close(new[site], delta)


def test_ravan_chooses_by_lot_or_by_gradient() -> None:
    client = Client("a", 12, 2)
    lots = set()
    for t in range(1, 9):
        method = ravan(choose="random")
        upload, _ = visited(method, received(method, grown(method), client, t), client, lambda work: work.train, t)
        lots |= {tuple(upload["which"][site].tolist()) for site in SITES}
    assert len(lots) > 3, "another lot every round"

    method, trainer = ravan(choose="gradient"), ToyTrainer(batch=10**6, lr=0.1)
    state = grown(method)
    got, _ = visited(
        method,
        received(method, state, client),
        client,
        lambda work: trainer.fit([(client, work)], [rows("a")], 1)[0].state,
    )
    work = method.model(method.serve(state, client), {}, _visit(client))
    H = {site: x.clone().requires_grad_() for site, x in work.train["H"].items()}
    trainer.loss(work, work.train | {"H": H}, rows("a")).backward()
    for site, x in H.items():
        assert x.grad is not None
        best = x.grad.square().sum((1, 2)).topk(2).indices.sort().values
        assert torch.equal(got["which"][site], best)


def _visit(client: Client) -> Visit:
    return Visit(1, client, SITES)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_ravan_heads_have_orthogonal_spaces(heads: int) -> None:
    method = ravan(heads=heads)
    work = method.model(start(method), {}, _visit(Client("a", 1, RANK)))
    for site in SITES:
        A, B = work.fixed["A"][site].flatten(0, 1), work.fixed["B"][site]
        torch.testing.assert_close(A @ A.T, torch.eye(RANK), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(B.T @ B, torch.eye(RANK), rtol=1e-5, atol=1e-6)


def test_ravan_with_one_head_is_fed_sb_but_for_its_scalar() -> None:
    """The same bases from the same seed, the same core, the same model."""
    one, core = ravan(heads=1), build({"name": "fed_sb", "start": "seed"}, {"rank": RANK, "alpha": 6.0})
    client, state = Client("a", 1, RANK), grown(one)
    other = start(core) | {"R": {site: x[0] for site, x in state["H"].items()}}
    for site, delta in served(one, state, client, SITES).items():
        torch.testing.assert_close(served(core, other, client, SITES)[site], delta)


def test_ravan_refuses_heads_that_do_not_share_the_rank() -> None:
    with pytest.raises(ConfigError, match="heads is 3, expected a divisor of rank 4"):
        ravan(heads=3)
