"""FedSA-LoRA: A is shared, B and the task head stay with the client.

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025, arXiv 2410.01463.
Every client ends with a model of its own, (A, B_k, head_k): scores are means over the clients' models.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedloom import lora
from fedloom.core import Client, Method, Sites, State, Upload, Work


@dataclass(frozen=True, kw_only=True)
class FedSALoRA(Method):
    """A <- sum_k p_k A_k; B_k and head_k are kept."""

    name: ClassVar[str] = "fedsa_lora"
    paper: ClassVar[str] = (
        "Guo et al., Selective Aggregation for Low-Rank Adaptation in Federated Learning, arXiv 2410.01463"
    )
    personal: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def broadcast(self, state: State, client: Client, t: int) -> State:
        return lora.only(state, "A")

    def prepare(self, received: State, kept: State, sites: Sites, client: Client, t: int) -> Work:
        # A client's first round starts from B = 0 and the common head, whatever the round is.
        own = {"B": lora.init_B(sites, self.rank)} | kept
        return Work(train=received | own, scale=lora.scale(self.alpha, self.rank, self.rslora))

    def finish(self, work: Work, trained: State, received: State) -> tuple[State, State]:
        return lora.only(trained, "A"), lora.without(trained, "A")

    def aggregate(self, state: State, uploads: Iterable[Upload]) -> State:
        return state | lora.mean(uploads, "A")
