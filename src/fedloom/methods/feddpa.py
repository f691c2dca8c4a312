"""FedDPA: a global adapter for all clients, and beside it a local one for each; the model is a mix of both.

Yang et al., "Dual-Personalizing Adapter for Federated Foundation Models", NeurIPS 2024, arXiv 2403.19211. FedDPA-T trains both
in every visit, FedDPA-F the local one after the last round, from the global one.

The paper's weight follows each input at test time: the cosine of its last hidden state to those of five of the client's own
rows, times a largest weight. The official code gives the larger weight to the other adapter than the text suggests, and the
weight is no function of a layer's input: here it is fixed, 0.5 as in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Le

from fedloom.core import Factors, Mean, Round, Visit, Work
from fedloom.methods.base import LoRA
from fedloom.state import Group, State, only


@dataclass(frozen=True, kw_only=True)
class FedDPA(LoRA):
    """FedDPA-T: W0 + s ((1 - mix) B A + mix B_k A_k), with B A averaged as in FedIT and B_k A_k the client's own.

    Weights by examples, where the official code counts clients alike.
    """

    mix: Annotated[float, Ge(0), Le(1)] = 0.5
    """Weight of the local adapter."""

    name: ClassVar[str] = "feddpa"
    paper: ClassVar[str] = "Yang et al., Dual-Personalizing Adapter for Federated Foundation Models, arXiv 2403.19211"
    group: ClassVar[str] = "personal"
    personal_models = True

    async def server(self, state: State, round: Round) -> State:
        mean = await Mean(send=lambda client: only(state, "A", "B", "head"))
        return state | mean.state

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        # The official code trains the local adapter first, beside the global one as it was sent; in this order it stands
        # beside the global one that the client has just trained.
        shared = await Work(train=received, scale=self.scale)
        local = await self.model(shared.state, own, visit)
        return shared.state, local.state

    def model(self, received: State, own: State, visit: Visit) -> Work:
        # The local adapter starts as a copy of the global one of the client's first visit, so that a client without one has
        # the global model. (The official code starts it anew, with B = 0.)
        local = {"local_A": own.get("local_A", received["A"]), "local_B": own.get("local_B", received["B"])}
        return Work(train=local, fixed=received, scale=self.scale, adapter=self._both)

    def _both(self, train: State, fixed: State) -> Factors:
        return side_by_side((fixed["A"], fixed["B"], 1 - self.mix), (train["local_A"], train["local_B"], self.mix))


@dataclass(frozen=True, kw_only=True)
class FedDPAF(FedDPA):
    """FedDPA-F: FedIT, then every client trains a copy of the global adapter alone and uses the mix of both."""

    name: ClassVar[str] = "feddpa_f"
    personal_phase = True

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        done = await Work(train=received, scale=self.scale)
        return done.state, {}

    async def personal(self, received: State, own: State, visit: Visit) -> State:
        copy = {"local_A": received["A"], "local_B": received["B"]}
        done = await Work(train=copy, fixed=only(received, "head"), scale=self.scale, adapter=_local)
        return done.state


def _local(train: State, fixed: State) -> Factors:
    return Factors(train["local_A"], train["local_B"])


def side_by_side(*adapters: tuple[Group, Group, float]) -> Factors:
    """Several adapters (A, B, weight) as one whose rank is the sum of theirs: sum_i w_i B_i A_i."""
    first = adapters[0][0]
    return Factors(
        {site: torch.cat([A[site] for A, _, _ in adapters]) for site in first},
        {site: torch.cat([w * B[site] for _, B, w in adapters], dim=1) for site in first},
    )
