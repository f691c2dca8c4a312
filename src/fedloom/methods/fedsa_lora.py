"""FedSA-LoRA: A is shared, B and the task head stay with the client.

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025, arXiv 2410.01463.
Every client ends with a model of its own, (A, B_k, head_k): scores are means over the clients' models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedloom import lora
from fedloom.core import Client, Mean, Round, Visit, Work
from fedloom.methods.base import LoRA
from fedloom.state import State, only, without


@dataclass(frozen=True, kw_only=True)
class FedSALoRA(LoRA):
    """A <- sum_k p_k A_k; B_k and head_k stay with client k."""

    name: ClassVar[str] = "fedsa_lora"
    paper: ClassVar[str] = (
        "Guo et al., Selective Aggregation for Low-Rank Adaptation in Federated Learning, arXiv 2410.01463"
    )
    group: ClassVar[str] = "personal"
    personal_models = True

    async def server(self, state: State, round: Round) -> State:
        mean = await Mean(send=lambda client: only(state, "A"))
        return state | mean.state

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        done = await self.model(received, own, visit)
        return only(done.state, "A"), without(done.state, "A")

    def serve(self, state: State, client: Client) -> State:
        return only(state, "A")

    def model(self, received: State, own: State, visit: Visit) -> Work:
        # A client's first visit starts from B = 0 and the common head, whatever the round is.
        return Work(train=received | {"B": lora.init_B(visit.sites, self.rank)} | own, scale=self.scale)
