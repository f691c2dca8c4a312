"""The arms of the study `turns`: FedIT with a personal round after the last one, and FedIT that trains one factor in turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedloom.core import Mean, Round, Visit, Work
from fedloom.methods.fedit import FedIT
from fedloom.spec import like
from fedloom.state import State, only, without


@dataclass(frozen=True, kw_only=True)
class ThenAll(FedIT):
    """After the last round every client trains all of A, B and the head on its own rows, for as long as a round."""

    name: ClassVar[str] = "fedit_then_all"
    personal_phase = True

    async def personal(self, received: State, own: State, visit: Visit) -> State:
        return (await Work(train=received, scale=self.scale)).state

    def model(self, received: State, own: State, visit: Visit) -> Work:
        return Work(train=received | own, scale=self.scale)


@dataclass(frozen=True, kw_only=True)
class OneFactor(FedIT):
    """Even rounds train A alone; after the last round every client trains B alone on its own rows."""

    name: ClassVar[str] = "fedit_one_factor"
    personal_phase = True

    async def server(self, state: State, round: Round) -> State:
        if round.t % 2:
            return await super().server(state, round)
        whole = only(state, "A", "B", "head")
        mean = await Mean(send=lambda client: whole, expects=lambda client, sent: like(only(sent, "A")))
        return state | mean.state

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        if visit.t % 2:
            return await super().client(received, own, visit)
        done = await Work(train=only(received, "A"), fixed=without(received, "A"), scale=self.scale)
        return done.state, {}

    async def personal(self, received: State, own: State, visit: Visit) -> State:
        return (await Work(train=only(received, "B"), fixed=without(received, "B"), scale=self.scale)).state

    def model(self, received: State, own: State, visit: Visit) -> Work:
        return Work(train=received | own, scale=self.scale)
