"""LoRA-A2: A and B in turns, and each client trains and sends the ranks that matter most on its data, over the whole model.

Koo, Jang, Ok, "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous Clients", ACL 2025, arXiv
2410.22815. Odd rounds train B, even ones A (algorithm 1 with rounds from 1; the text has them the other way round, with which
the first round would train nothing, as B = 0). A client trains the whole factor for a while, scores each rank i of each layer
by the norm of the change of its product, ||dB[:, i]|| ||A[i]|| or ||B[:, i]|| ||dA[i]||, and trains the best r_k N of all N
layers' ranks, from the global state again. The server adds sum_k p_k dB_k, zero where a client did not choose: what one client
of thirty chooses moves by a thirtieth of its change.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from fedloom import lora
from fedloom.core import Client, Each, Factors, Round, Visit, Work
from fedloom.methods.base import LoRA
from fedloom.spec import Dim, Leaf, Spec, like
from fedloom.state import Group, State, only

Role = Literal["A", "B"]
AXIS: dict[Role, int] = {"A": 0, "B": 1}
"""Where the ranks are in a factor."""


@dataclass(frozen=True, kw_only=True)
class LoRAA2(LoRA):
    """A client's rank is its mean rank over the layers: one may get none, another all of them."""

    lr_ratio: Annotated[float, Gt(0)] = 5.0
    """Rate of B over that of A, which is the run's. Compare with other methods at their own best rates: 5 alone lifts
    alternating training much."""
    probe_steps: Annotated[int, Ge(1)] = 5
    """Steps of training before the choice; the paper's are an epoch: examples / batch size. A client that may train all ranks
    skips them."""
    train_head: bool = False
    """The paper freezes the task head; train it to compare with methods that do."""

    name: ClassVar[str] = "lora_a2"
    paper: ClassVar[str] = "Koo et al., Towards Robust and Efficient Federated Low-Rank Adaptation, arXiv 2410.22815"
    group: ClassVar[str] = "alternation"
    budgets: ClassVar[frozenset[str]] = frozenset({"rank"})

    async def server(self, state: State, round: Round) -> State:
        role, mean = _turn(round.t), lora.Mean()
        asked = Each(send=lambda client: self.serve(state, client), expects=partial(self._expects, role))
        for upload in await asked:
            mean.add(_put(state[role], upload.state, role) | only(upload.state, "head"), upload.weight)
        return state | mean.value

    def _expects(self, role: Role, client: Client, sent: State) -> Spec:
        """The chosen ranks and which they are, as many as the client likes in each layer, and the head if it is trained."""
        part, index = {}, {}
        for site, x in sent[role].items():
            count = Dim(f"ranks of {site}", self.rank, low=0)
            part[site] = Leaf((count, x.shape[1]) if role == "A" else (x.shape[0], count), x.dtype)
            index[site] = Leaf((count,), torch.int32)
        return {role: part, "index": index} | like(only(sent, *self._head))

    @property
    def _head(self) -> tuple[str, ...]:
        return ("head",) if self.train_head else ()

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        role = _turn(visit.t)
        index = {site: torch.arange(self.rank) for site in received[role]}
        if visit.client.rank < self.rank:
            probed = await self._work(received, role, index, self.probe_steps)
            index = self._chosen(received, probed.state[role], role, visit.client.rank * len(index))
        done = await self._work(received, role, index)
        return done.state | {"index": {site: i.to(torch.int32) for site, i in index.items()}}, {}

    def _work(self, received: State, role: Role, index: Group, steps: int | None = None) -> Work:
        """The chosen ranks of one factor; the others, which stand still, come after them."""
        axis = AXIS[role]
        rest = {site: _others(i, self.rank) for site, i in index.items()}
        other: Role = "A" if role == "B" else "B"
        order = {site: torch.cat([i, rest[site]]) for site, i in index.items()}
        return Work(
            train={role: {site: x.index_select(axis, index[site]) for site, x in received[role].items()}}
            | only(received, *self._head),
            fixed={
                "rest": {site: x.index_select(axis, rest[site]) for site, x in received[role].items()},
                other: {site: x.index_select(AXIS[other], order[site]) for site, x in received[other].items()},
            }
            | ({} if self.train_head else only(received, "head")),
            scale=self.scale,
            lr=self.lr_ratio if role == "B" else 1.0,
            steps=steps,
            adapter=_assembled,
        )

    def _chosen(self, received: State, probed: Group, role: Role, budget: int) -> Group:
        """Site -> sorted ranks: the `budget` best of all layers."""
        scores = {}
        for site, x in probed.items():
            change = (x - received[role][site]).norm(dim=1 - AXIS[role])
            still = received["A"][site].norm(dim=1) if role == "B" else received["B"][site].norm(dim=0)
            scores[site] = change * still
        best = torch.zeros(len(scores), self.rank, dtype=torch.bool)
        best.view(-1)[torch.cat(list(scores.values())).topk(budget).indices] = True
        return {site: row.nonzero().flatten() for site, row in zip(scores, best, strict=True)}


def _turn(t: int) -> Role:
    return "B" if t % 2 else "A"


def _put(into: Group, upload: State, role: Role) -> State:
    """A factor with the ranks that the upload names replaced."""
    after = {}
    for site, x in into.items():
        # Indices come from outside: one that is out of range must not end the round.
        index = upload["index"][site].long().clamp(0, x.shape[AXIS[role]] - 1)
        after[site] = x.index_copy(AXIS[role], index, upload[role][site])
    return {role: after}


def _others(index: Tensor, ranks: int) -> Tensor:
    mark = torch.ones(ranks, dtype=torch.bool)
    mark[index] = False
    return mark.nonzero().flatten()


def _assembled(train: State, fixed: State) -> Factors:
    def whole(role: Role) -> Group:
        if role not in train:
            return fixed[role]
        return {site: torch.cat([x, fixed["rest"][site]], AXIS[role]) for site, x in train[role].items()}

    return Factors(whole("A"), whole("B"))
