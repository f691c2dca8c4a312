"""PF2LoRA, first-order: a small adapter of each client's own on top of the common one, trained before it.

Hao et al., "Personalized Federated Fine-tuning for Heterogeneous Data: An Automatic Rank Learning Approach via Two-Level LoRA",
arXiv 2503.03920, equation 2: W0 + s (B A + D_k C_k). The rank of D_k C_k is a part of that of B A, so a client's whole rank is
anything between the difference and the sum of both. The paper trains it as a bilevel problem, C_k and D_k by SGD below, A and B
by AdamW above, whose gradient goes through the steps below.

This is the variant without that second-order term, and named so: the two levels take turns, once a visit (the paper's take
turns step by step).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt

from fedloom import lora
from fedloom.core import Client, Factors, Mean, Round, Visit, Work
from fedloom.methods.base import LoRA
from fedloom.methods.feddpa import side_by_side
from fedloom.rng import generator
from fedloom.spec import like
from fedloom.state import Sites, State, only


@dataclass(frozen=True, kw_only=True)
class PF2LoRAFirstOrder(LoRA):
    """A, B and the head are averaged as in FedIT; C_k (own_rank, in) and D_k (out, own_rank) stay with the client."""

    own_rank: Annotated[int, Ge(1)] = 2
    """Rank of the client's own adapter; the paper takes a half or a quarter of the common rank."""
    own_lr: Annotated[float, Gt(0)] = 1.0
    """Multiplies the run's learning rate at the lower level, which plain SGD trains: choose it well above 1 if the run's is
    meant for AdamW."""

    name: ClassVar[str] = "pf2lora_first_order"
    paper: ClassVar[str] = "Hao et al., Personalized Federated Fine-tuning via Two-Level LoRA, arXiv 2503.03920"
    group: ClassVar[str] = "personal"
    personal_models = True

    def init(self, sites: Sites, rng: torch.Generator) -> State:
        return super().init(sites, rng) | {"frozen": {"seed": torch.randint(2**62, (1,), generator=rng)}}

    async def server(self, state: State, round: Round) -> State:
        mean = await Mean(
            send=lambda client: self.serve(state, client), expects=lambda client, sent: like(sent, "A", "B", "head")
        )
        return state | mean.state

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        lower = await replace(self.model(received, own, visit), optimizer="sgd", lr=self.own_lr)
        common = only(received, "A", "B", "head")
        upper = await Work(train=common, fixed=lower.state, scale=self.scale, adapter=_sum)
        return upper.state, lower.state

    def serve(self, state: State, client: Client) -> State:
        return only(state, "A", "B", "head", "frozen")

    def model(self, received: State, own: State, visit: Visit) -> Work:
        mine = only(own, "C", "D")
        if not mine:
            dtype = next(iter(received["A"].values())).dtype
            rng = generator(int(received["frozen"]["seed"]), visit.client.id)
            mine = {
                "C": {site: x.to(dtype) for site, x in lora.init_A(visit.sites, self.own_rank, rng).items()},
                "D": {site: x.to(dtype) for site, x in lora.init_B(visit.sites, self.own_rank).items()},
            }
        return Work(train=mine, fixed=only(received, "A", "B", "head"), scale=self.scale, adapter=_sum)


def _sum(train: State, fixed: State) -> Factors:
    x = train | fixed
    return side_by_side((x["A"], x["B"], 1.0), (x["C"], x["D"], 1.0))
