"""FLoRA: every client trains a fresh adapter of its own rank; their stack is merged into the frozen weights.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations", NeurIPS 2024,
arXiv 2409.05976. W <- W + [B_1 ... B_K] [p_1 s_1 A_1; ...; p_K s_K A_K] = W + sum_k p_k s_k B_k A_k, without an error, and
the next round starts from A random, B = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedloom import lora
from fedloom.core import Client, Each, Round, Visit, Work
from fedloom.methods import products
from fedloom.methods.base import LoRA
from fedloom.rng import generator
from fedloom.spec import Leaf, Spec, like
from fedloom.state import Sites, State, only


@dataclass(frozen=True, kw_only=True)
class FLoRA(LoRA):
    """The server's model is an offset (roles `left`, `right`) to the original weights, which goes whole to every client, so
    that one which missed rounds is right; it travels as factors while they are smaller than the dense form."""

    name: ClassVar[str] = "flora"
    paper: ClassVar[str] = "Wang et al., FLoRA: Heterogeneous Low-Rank Adaptations, arXiv 2409.05976"
    group: ClassVar[str] = "sums of products"
    budgets: ClassVar[frozenset[str]] = frozenset({"rank"})

    def init(self, sites: Sites, rng: torch.Generator) -> State:
        return {"fresh": {"seed": torch.randint(2**62, (1,), generator=rng)}}

    async def server(self, state: State, round: Round) -> State:
        asked = Each(send=lambda client: self.serve(state, client), expects=own_rank(round.sites))
        # Each client's own scale: the official code applies one to the whole stack, which is right only if all clients are
        # there and their ranks have the mean that it assumes.
        total = await products.summed(asked, self.scale_of)
        return state | products.merged(state, total.stacks) | total.head

    def serve(self, state: State, client: Client) -> State:
        return only(state, "head", "left", "right", "fresh")

    def model(self, received: State, own: State, visit: Visit) -> Work:
        # Another A for every client and round, as each draws its own: B = 0, so that after training it does not matter.
        seed, rank = int(received["fresh"]["seed"]), visit.client.rank
        fresh: State = {"A": {}, "B": lora.init_B(visit.sites, rank)}
        for site, shape in visit.sites.items():
            fresh["A"] |= lora.init_A({site: shape}, rank, generator(seed, visit.t, visit.client.id, site))
        fresh = {role: {site: x.to(_dtype(received)) for site, x in group.items()} for role, group in fresh.items()}
        return Work(
            train=only(received, "head") | fresh,
            base=only(received, "left", "right"),
            scale=self.scale_of(visit.client),
        )


def own_rank(sites: Sites) -> Callable[[Client, State], Spec]:
    """A and B at the client's rank, which it was not sent, and the head."""

    def expects(client: Client, sent: State) -> Spec:
        factors = {
            "A": {site: Leaf((client.rank, n), _dtype(sent)) for site, (_, n) in sites.items()},
            "B": {site: Leaf((m, client.rank), _dtype(sent)) for site, (m, _) in sites.items()},
        }
        return like(only(sent, "head")) | factors

    return expects


def _dtype(state: State) -> torch.dtype:
    """That of what the server sends, float32 before it sends any numbers."""
    found = (x.dtype for group in state.values() for x in group.values() if x.is_floating_point())
    return next(found, torch.float32)
