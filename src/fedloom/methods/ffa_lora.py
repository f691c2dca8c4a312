"""FFA-LoRA: A is frozen at a random start that all share, B is trained and averaged.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, arXiv 2403.12313.
The average is exact, sum_k p_k B_k A = (sum_k p_k B_k) A. A travels as a seed: 8 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.functional import pad

from fedloom import lora
from fedloom.core import Client, Mean, Round, Visit, Work
from fedloom.methods.base import LoRA
from fedloom.rng import generator
from fedloom.state import Group, Sites, State, only, without


@dataclass(frozen=True, kw_only=True)
class FFALoRA(LoRA):
    """B <- sum_k p_k B_k, A never changes.

    A client of smaller rank uses the first rows of A and trains the first columns of B; padding B with zeros is then
    the exact average.
    """

    a_init: Literal["kaiming", "orthonormal"] = "kaiming"
    """`kaiming`: uniform, as PEFT does; `orthonormal`: orthonormal rows, about 1.7 times as long, which acts on B like
    a three times larger learning rate."""

    name: ClassVar[str] = "ffa_lora"
    paper: ClassVar[str] = "Sun et al., Improving LoRA in Privacy-preserving Federated Learning, arXiv 2403.12313"
    budgets: ClassVar[frozenset[str]] = frozenset({"rank"})

    def _A(self, frozen: Group, sites: Sites) -> Group:
        # A generator for each site: a client may name its layers in another order.
        A: Group = {}
        for site, shape in sites.items():
            A |= lora.init_A({site: shape}, self.rank, generator(int(frozen["seed"]), site))
        if self.a_init == "orthonormal":
            A = {site: torch.linalg.qr(x.T)[0].T.contiguous() for site, x in A.items()}
        return A

    def _widen(self, upload: State) -> State:
        return upload | {"B": {site: pad(x, (0, self.rank - x.shape[1])) for site, x in upload["B"].items()}}

    def init(self, sites: Sites, rng: torch.Generator) -> State:
        frozen = {"seed": torch.randint(2**62, (1,), generator=rng)}
        return {"A": self._A(frozen, sites), "B": lora.init_B(sites, self.rank), "frozen": frozen}

    async def server(self, state: State, round: Round) -> State:
        mean = await Mean(
            send=lambda client: self.serve(state, client), lift=lambda client, upload: self._widen(upload)
        )
        return state | mean.state

    def spread(self, upload: State, received: State, visit: Visit) -> State:
        return self._widen(upload)

    def serve(self, state: State, client: Client) -> State:
        first = {site: x[:, : client.rank].contiguous() for site, x in state["B"].items()}
        return only(state, "frozen", "head") | {"B": first}

    def model(self, received: State, own: State, visit: Visit) -> Work:
        A = {site: x[: visit.client.rank] for site, x in self._A(received["frozen"], visit.sites).items()}
        # One scale for all ranks (reading): the model of a client is the leading part of the global one.
        return Work(train=without(received, "frozen"), fixed={"A": A}, scale=self.scale)
