"""FRLoRA: every round starts from the principal part of the frozen weights; what was learnt is added to the rest of them.

Yan et al., "Federated Residual Low-Rank Adaption of Large Language Models", ICLR 2025. Once: W = U S V', B0 = U_r (S_r/s)^1/2,
A0 = (S_r/s)^1/2 V_r', and the frozen weights become W - s B0 A0. Every round clients train from (B0, A0), the server averages
A and B (eqs. 6-7), adds s (mean B mean A - B0 A0) to the weights, and all start from (B0, A0) again. The mean of products is
not the product of means: FRLoRA has FedIT's error, by design. The rule is that of a re-implementation that says it is exact,
and of the paper's reviews.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedloom import lora
from fedloom.core import Client, Mean, Round, Visit, Work
from fedloom.methods import products
from fedloom.methods.base import LoRA
from fedloom.rng import generator
from fedloom.spec import like
from fedloom.state import Sites, State, only, without


@dataclass(frozen=True, kw_only=True)
class FRLoRA(LoRA):
    """State: (A0, B0), which never change, and the offset to the original weights (roles `left`, `right`), -s B0 A0 at first.

    The offset goes whole to every client, so one that missed rounds is right.
    """

    name: ClassVar[str] = "frlora"
    paper: ClassVar[str] = "Yan et al., Federated Residual Low-Rank Adaption of Large Language Models, ICLR 2025"
    group: ClassVar[str] = "sums of products"

    def init_from(self, sites: Sites, rng: torch.Generator, weight: Callable[[str], Tensor]) -> State:
        seed = int(torch.randint(2**62, (1,), generator=rng))
        state: State = {"A": {}, "B": {}}
        for site in sites:
            # Approximate triplets do: the start is the original model whatever B0 and A0 are.
            U, S, Vh = lora.principal(weight(site), self.rank, generator(seed, site))
            root = (S / self.scale).sqrt()
            state["A"][site], state["B"][site] = root[:, None] * Vh, U * root
        base = products.merged({}, self._stacks(state, -1.0))
        # Cloned: a checkpoint has no tensors that share memory.
        return state | {role: {site: x.clone() for site, x in group.items()} for role, group in base.items()}

    def _stacks(self, factors: State, sign: float) -> products.Stacks:
        stacks: products.Stacks = {}
        for site, A in factors["A"].items():
            stacks[site] = lora.Stack()
            stacks[site].add(factors["B"][site], A, sign * self.scale)
        return stacks

    async def server(self, state: State, round: Round) -> State:
        mean = await Mean(
            send=lambda client: self.serve(state, client), expects=lambda client, sent: like(sent, "A", "B", "head")
        )
        learnt = self._stacks(mean.state, 1.0)
        for site, stack in learnt.items():
            stack.add(state["B"][site], state["A"][site], -self.scale)
        return state | products.merged(state, learnt) | only(mean.state, "head")

    def serve(self, state: State, client: Client) -> State:
        return only(state, "A", "B", "head", "left", "right")

    def model(self, received: State, own: State, visit: Visit) -> Work:
        return Work(train=without(received, "left", "right"), base=only(received, "left", "right"), scale=self.scale)
