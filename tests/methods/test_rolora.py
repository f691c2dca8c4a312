from __future__ import annotations

import pytest
import torch

from fedloom.core import Client
from fedloom.methods import build

from .cases import ONE, SITES, TWO, ZERO, after, first_work, random_uploads, received, served, start, update, uploads


def test_rolora_by_hand() -> None:
    """Weights 3/4 and 1/4: B in odd rounds, A in even ones."""
    method = build({"name": "rolora"}, {"rank": 1})
    sent = uploads((3, ONE), (1, TWO))
    for t, role, want in ((1, "B", [[4.0], [4.0], [1.0]]), (2, "A", [[2.0, 3.0]])):
        got = after(method, ZERO, [(client, {role: x[role]}) for client, x in sent], t)
        assert got[role]["s"].tolist() == want
        other = "A" if role == "B" else "B"
        assert got[other] == ZERO[other]


@pytest.mark.parametrize("t", [1, 2])
def test_rolora_average_is_exact(t: int) -> None:
    """The next model is the mean of the clients' models."""
    method = build({"name": "rolora"}, {"rank": 4, "alpha": 6.0})
    (_, state), *sent = random_uploads([4, 4, 4, 4])
    role, total = ("B", "A")[t - 1], sum(client.examples for client, _ in sent)
    want = {site: torch.zeros(shape, dtype=torch.float64) for site, shape in SITES.items()}
    for client, x in sent:
        for site, delta in served(method, state | {role: x[role]}, client, SITES).items():
            want[site] += client.examples / total * delta
    got = served(method, after(method, state, [(client, {role: x[role]}) for client, x in sent], t), sent[0][0], SITES)
    for site in SITES:
        torch.testing.assert_close(got[site], want[site])


def test_rolora_trains_one_factor_and_the_head_in_the_model_of_both() -> None:
    method, client = build({"name": "rolora"}, {"rank": 4}), Client("a", 1, 4)
    state = start(method)
    for t, trained in ((1, "B"), (2, "A"), (3, "B")):
        sent = received(method, state, client, t)
        assert set(sent) == {"A", "B", "head"}, "it may have missed the round of the other factor"
        work = first_work(method, sent, client, t)
        assert set(work.train) == {trained, "head"}
        for site, delta in update(work).items():
            assert torch.equal(delta, served(method, state, client, SITES)[site])
