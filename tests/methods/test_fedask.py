from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fedloom.core import Client, State, Trained, Work
from fedloom.loop import one_round
from fedloom.methods import build

from .cases import SITES, Rows, Sent, ToyTrainer, engine, ideal, random_uploads, served, start


class Known(ToyTrainer):
    """Trains to what is known beforehand."""

    ends: dict[str, State]

    def fit(self, works: Sequence[tuple[Client, Work]], data: Sequence[Rows], t: int, part: int = 0) -> list[Trained]:
        return [
            Trained(
                {role: self.ends[client.id].get(role, group) for role, group in work.train.items()},
                steps=1,
                lr_sum=1.0,
                loss=0.0,
            )
            for client, work in works
        ]


def round_of(sent: Sequence[Sent], rank: int, **fields: object) -> State:
    """The next state where clients train to these factors."""
    method = build({"name": "fedask", **fields}, {"rank": rank, "alpha": 6.0})
    trainer = Known()
    trainer.ends = dict((client.id, x) for client, x in sent)
    first = start(method, dtype=torch.float64)
    return one_round(method, engine(trainer), first | {"A": sent[0][1]["A"]}, [client for client, _ in sent], 1)[0]


@pytest.mark.parametrize(("rank", "oversample", "clients"), [(1, 3, 4), (2, 2, 2), (4, 3, 5)])
def test_fedask_is_the_best_approximation_where_the_sketch_is_wide(rank: int, oversample: int, clients: int) -> None:
    """l = K r, or the whole of a layer: the leading triplets of the mean product, from two sums."""
    sent = random_uploads([rank] * clients)
    state = round_of(sent, rank, oversample=oversample)
    for site, D in ideal(sent, lambda client: 1.0).items():
        U, S, Vh = torch.linalg.svd(D, full_matrices=False)
        A, B = state["A"][site], state["B"][site]
        torch.testing.assert_close(B @ A, (U[:, :rank] * S[:rank]) @ Vh[:rank])
        torch.testing.assert_close(A @ A.T, S[:rank].diag(), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(B.T @ B, S[:rank].diag(), rtol=1e-7, atol=1e-9)


def test_fedask_without_oversampling_is_near_it_and_never_better() -> None:
    sent = random_uploads([2] * 4)
    state = round_of(sent, 2)
    for site, D in ideal(sent, lambda client: 1.0).items():
        least = torch.linalg.svdvals(D)[2:].square().sum().sqrt()
        error = (D - state["B"][site] @ state["A"][site]).norm()
        assert least < error < D.norm()


def test_fedask_with_a_common_A_is_exact() -> None:
    sent = random_uploads([3] * 4)
    common = sent[0][1]["A"]
    sent = [(client, {"A": common, "B": x["B"]}) for client, x in sent]
    state = round_of(sent, 3, train="B")
    method = build({"name": "fedask", "train": "B"}, {"rank": 3, "alpha": 6.0})
    for site, D in ideal(sent, lambda client: 2.0).items():
        torch.testing.assert_close(served(method, state, sent[0][0], SITES)[site], D)
        both = torch.cat([common[site], state["A"][site]])
        assert torch.linalg.matrix_rank(both) == 3, "A turns within its row space"
