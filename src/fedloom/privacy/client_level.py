"""Differential privacy of clients: clipped changes, uniform weights, and Gaussian noise on their sum.

McMahan et al., "Learning differentially private recurrent language models", ICLR 2018, arXiv 1710.06963: the change of all
tensors together is D min(1, C / ||D||). Neighbouring federations differ in one client, whose change is zero: the sum of n
changes has sensitivity C, gets noise of standard deviation z C on each number, and is divided by n, which is public.
The server adds the noise, and is trusted; whoever sees the models afterwards need not be.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt

from fedloom.core import Averaged, Client, Mean, Round, Visit
from fedloom.errors import ConfigError
from fedloom.flows import Over, need_mean, need_trained, rehearse, relay, relay_sends
from fedloom.privacy.cover import covered
from fedloom.privacy.noise import SLACK, digest, noised
from fedloom.state import State


@dataclass(frozen=True, kw_only=True)
class ClientLevel(Over):
    """A method whose clients clip what they change and whose server adds noise to every mean."""

    clip: Annotated[float, Gt(0)]
    """C, the longest change of one client in the shared space, all tensors together."""
    noise_multiplier: Annotated[float, Ge(0)]
    """z, the standard deviation of the noise on the sum over C."""
    key: bytes | None = field(default=None, repr=False)
    """Of the noise; the server's alone. None draws from the operating system, and no round can be repeated."""

    name: ClassVar[str] = "client_level_privacy"
    paper: ClassVar[str] = "McMahan et al., Differentially Private Recurrent Language Models, arXiv 1710.06963"

    def __post_init__(self) -> None:
        super().__post_init__()
        need_mean(self)
        need_trained(self, "a clipped change")
        # Records call it what it is over: it is no method of its own.
        object.__setattr__(self, "name", self.over.name)
        object.__setattr__(self, "paper", self.over.paper)

    def check(self, client: Client) -> None:
        super().check(client)
        for t in (1, 2):
            seen = rehearse(self.over, client, t)
            if seen and (other := _reshaped(seen.received, seen.sent)):
                raise ConfigError(
                    f"{self.over.name} sends another {other} than it receives for a client like {client.id!r}: what one client "
                    "changes cannot be clipped: give clients whole budgets, or choose another method"
                )

    async def server(self, state: State, round: Round) -> State:
        async def with_noise(asked: Any) -> Any:
            if not isinstance(asked, Mean):
                return await asked
            alike = replace(asked, weight=lambda client: 1.0)
            return self._noised(await alike, alike, round)

        return await relay(self.over.server(state, round), with_noise)

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        def clipped(received: State, sent: State) -> State:
            return self._clipped(received, sent, visit)

        return await relay_sends(self.over.client(received, own, visit), received, clipped)

    def _clipped(self, received: State, sent: State, visit: Visit) -> State:
        """Measured in the shared space, where the sum is: a method may stretch what it lifts."""
        change = {r: {s: x - received[r][s] for s, x in group.items()} for r, group in sent.items()}
        wide = self.over.spread(change, received, visit)
        squares = [x.double().square().sum() for group in wide.values() for x in group.values()]
        norm = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
        if norm <= self.clip:
            return sent
        if not math.isfinite(norm):
            # As if it had not trained: who leaves the round because of its rows would tell of them.
            return {r: {s: received[r][s] for s in group} for r, group in sent.items()}
        share = self.clip / norm
        return {r: {s: x - (1 - share) * change[r][s] for s, x in group.items()} for r, group in sent.items()}

    def _noised(self, answer: Averaged, x: Mean, round: Round) -> Averaged:
        """Noise where any client of the round has a part; the rest is the server's own."""
        n = len(answer.clients)
        std = self.noise_multiplier * self.clip * SLACK / n
        round.report["noise_std"] = std
        key = self.key or os.urandom(32)
        seen = digest(answer.state)
        state = {role: dict(group) for role, group in answer.state.items()}
        covers = [covered(self.over, x, client, round.t, round.sites) for client in answer.clients]
        for role in covers[0]:
            for site in covers[0][role]:
                there = torch.stack([cover[role][site] for cover in covers]).amax(0) > 0
                mean = state[role][site]
                made = noised(mean.double().flatten(), std, key, "server", round.t, role, site, seen)
                state[role][site] = torch.where(there, made.view(mean.shape).to(mean.dtype), mean)
        return replace(answer, state=state)


def _reshaped(received: State, sent: State) -> str | None:
    """A role that is sent in another shape than it was received, or None."""
    for role, group in sent.items():
        if any(received[role][site].shape != x.shape for site, x in group.items()):
            return role
    return None
