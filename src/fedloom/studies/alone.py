"""Training alone: every client fine-tunes for itself, and nothing is averaged. A control, not a federated method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedloom import lora
from fedloom.core import Client, Mean, Round, Visit, Work
from fedloom.methods.base import LoRA
from fedloom.state import State, only


@dataclass(frozen=True, kw_only=True)
class Alone(LoRA):
    """Every client trains (A_k, B_k, head_k) on its own rows, from the common start; it sends nothing."""

    name: ClassVar[str] = "alone"
    paper: ClassVar[str] = "a control: local training without federation"
    personal_models = True

    async def server(self, state: State, round: Round) -> State:
        await Mean(send=lambda client: only(state, "A"), expects=lambda client, sent: {})
        return state

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        done = await self.model(received, own, visit)
        return {}, done.state

    def serve(self, state: State, client: Client) -> State:
        return only(state, "A")

    def model(self, received: State, own: State, visit: Visit) -> Work:
        return Work(train=received | {"B": lora.init_B(visit.sites, self.rank)} | own, scale=self.scale)
