"""FedDPA-T: a global adapter for all clients, and beside it a local one for each, trained in turn.

Yang et al., "Dual-Personalizing Adapter for Federated Foundation Models", NeurIPS 2024, arXiv 2403.19211. In every visit the
global adapter is trained and sent, then, beside it and frozen, the local one, which stays with the client. The model is a mix
of both.
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
    """W0 + s ((1 - mix) B A + mix B_k A_k), with B A averaged as in FedIT and B_k A_k the client's own."""

    mix: Annotated[float, Ge(0), Le(1)] = 0.5
    """Weight of the local adapter. The paper's weight follows each input; this one is fixed (reading)."""

    name: ClassVar[str] = "feddpa"
    paper: ClassVar[str] = "Yang et al., Dual-Personalizing Adapter for Federated Foundation Models, arXiv 2403.19211"
    group: ClassVar[str] = "personal"
    personal_models = True

    async def server(self, state: State, round: Round) -> State:
        mean = await Mean(send=lambda client: only(state, "A", "B", "head"))
        return state | mean.state

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        shared = await Work(train=received, scale=self.scale)
        local = await self.model(shared.state, own, visit)
        return shared.state, local.state

    def model(self, received: State, own: State, visit: Visit) -> Work:
        # The local adapter starts as a copy of the global one of the client's first visit (reading).
        local = {"local_A": own.get("local_A", received["A"]), "local_B": own.get("local_B", received["B"])}
        return Work(train=local, fixed=received, scale=self.scale, adapter=self._both)

    def _both(self, train: State, fixed: State) -> Factors:
        return side_by_side((fixed["A"], fixed["B"], 1 - self.mix), (train["local_A"], train["local_B"], self.mix))


def side_by_side(*adapters: tuple[Group, Group, float]) -> Factors:
    """Several adapters (A, B, weight) as one whose rank is the sum of theirs: sum_i w_i B_i A_i."""
    first = adapters[0][0]
    return Factors(
        {site: torch.cat([A[site] for A, _, _ in adapters]) for site in first},
        {site: torch.cat([w * B[site] for _, B, w in adapters], dim=1) for site in first},
    )
