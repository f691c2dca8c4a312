"""HetLoRA: clients of different rank train the leading ranks, weighted by the norm of what they learnt, and prune themselves.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024, arXiv 2401.06432.
The paper's text was not available in full and there is no official code: weights, penalty and pruning follow other
re-implementations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from fedloom import lora, slices
from fedloom.core import Client, Each, Round, Visit
from fedloom.methods.base import LoRA
from fedloom.spec import Dim, Leaf, Spec, like
from fedloom.state import Group, State, only, zeros_like


@dataclass(frozen=True, kw_only=True)
class HetLoRA(LoRA):
    """A <- sum_k p_k pad(A_k), B <- sum_k p_k pad(B_k), p_k = S_k / sum_j S_j, S_k = ||B_k A_k||_F over all sites."""

    gamma: Annotated[float, Gt(0), Le(1)] = 0.99
    """The tail that is penalised, and pruned, starts at rank floor(gamma r_k)."""
    tail_weight: Annotated[float, Ge(0)] = 1e-3
    """Weight of the tail's norm in the loss. The paper's value was not seen."""
    prune: bool = True
    """Clients send fewer ranks once the tail's norm fell."""

    name: ClassVar[str] = "hetlora"
    paper: ClassVar[str] = "Cho et al., Heterogeneous LoRA for Federated Fine-tuning, arXiv 2401.06432"
    group: ClassVar[str] = "unequal ranks"
    budgets: ClassVar[frozenset[str]] = frozenset({"rank"})

    async def server(self, state: State, round: Round) -> State:
        ranks = dict(state.get("ranks", {}))  # of clients that pruned themselves: client id -> rank

        def held(client: Client) -> int:
            return int(ranks.get(client.id, torch.tensor(client.rank)))

        def leading(client: Client) -> State:
            return slices.take(only(state, "A", "B", "head"), slices.prefix(state, held(client)))

        blank, pruned = zeros_like(only(state, "A", "B")), dict(ranks)
        most_sent = most_back = 0
        factors, head = lora.Mean(), lora.Mean()
        for upload in await Each(send=leading, expects=_at_most_that_rank):
            part, rank = only(upload.state, "A", "B"), _rank(upload.state)
            norms = torch.stack([lora.product_norm(part["B"][site], A) for site, A in part["A"].items()])
            # Nobody has learnt anything: all weights are tiny and equal rather than 0 / 0.
            weight = float(norms.square().sum().sqrt()) + 1e-12
            factors.add(slices.put(blank, part, slices.prefix(part, rank)), weight)
            # The head is no low-rank product: plain weights by examples (reading).
            head.add(only(upload.state, "head"), upload.weight)
            pruned[upload.client.id] = torch.tensor(rank)
            most_sent, most_back = max(most_sent, held(upload.client)), max(most_back, rank)
        # Padding both factors of a rank with zeros would end it for good, since each one's gradient is a product with the
        # other (a deviation): ranks that no client of the round was sent stay as they are, and those that all who were sent
        # them pruned count no more, B = 0, but keep a direction for others to learn in.
        kept = {"A": _tail_of(state["A"], factors.value["A"], most_back, 0)}
        kept["B"] = _tail_of(state["B"], factors.value["B"], most_sent, 1)
        return state | kept | head.value | {"ranks": pruned}

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        work = self.model(received, own, visit)
        # One scale for all ranks (reading): a client's model is the leading part of the global one.
        done = await replace(work, penalties=(self._penalty,) if self.tail_weight else ())
        if self.prune and self._tail_norm(done.state) < self._tail_norm(received):
            return slices.take(done.state, slices.prefix(done.state, self._tail(done.state))), {}
        return done.state, {}

    def _tail(self, state: State) -> int:
        # A client keeps at least one rank.
        return max(1, math.floor(self.gamma * _rank(state)))

    def _tail_norm(self, state: State) -> Tensor:
        """sum over sites of ||B[:, g:]||_F ||A[g:]||_F."""
        g = self._tail(state)
        return torch.stack(
            [torch.norm(state["B"][site][:, g:]) * torch.norm(A[g:]) for site, A in state["A"].items()]
        ).sum()

    def _penalty(self, train: State, fixed: State) -> Tensor:
        return self.tail_weight * self._tail_norm(train)


def _rank(state: State) -> int:
    return next(iter(state["A"].values())).shape[0]


def _tail_of(before: Group, after: Group, first: int, dim: int) -> Group:
    """`after`, with the ranks from `first` on as they were before."""
    return {
        site: torch.cat([x.narrow(dim, 0, first), before[site].narrow(dim, first, x.shape[dim] - first)], dim)
        for site, x in after.items()
    }


def _at_most_that_rank(client: Client, sent: State) -> Spec:
    """A and B at a rank of the client's choice, up to the one it was sent."""
    rank = Dim("rank", _rank(sent))
    return like(sent, "head") | {
        "A": {site: Leaf((rank, x.shape[1]), x.dtype) for site, x in sent["A"].items()},
        "B": {site: Leaf((x.shape[0], rank), x.dtype) for site, x in sent["B"].items()},
    }
