"""Differential privacy of clients: clipped changes, uniform weights, and noise on their sum.

McMahan et al., "Learning differentially private recurrent language models", ICLR 2018, arXiv 1710.06963: the change of all
tensors together is D min(1, C / ||D||). Neighbouring federations differ in one client, whose change is zero: the sum of n
changes has sensitivity C, gets noise of standard deviation z C on each number, and is divided by n, which is public.
The server adds the noise, and is trusted; or clients do, under a secure sum (`client_noise`). Whoever sees the models
afterwards need not be trusted.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt

from fedloom.core import Averaged, Client, Mean, Round, Visit
from fedloom.errors import ConfigError, RoundError
from fedloom.flows import Over, need_mean, need_trained, rehearse, relay, relay_sends
from fedloom.privacy.clip_bound import Clipping, bit_weight, next_bound, reach
from fedloom.privacy.cover import covered
from fedloom.privacy.noise import SLACK, digest, noised
from fedloom.spec import like
from fedloom.state import Sites, State, only

ALL = "all"
"""The site of what is one number for all layers."""


@dataclass(frozen=True, kw_only=True)
class ClientLevel(Over):
    """A method whose clients clip what they change, and noise is added to every sum of it.

    Where the bound is not fixed, it is a role of the state, `clip_bound`, and goes down with what clients are sent. Where it
    adapts, `clip_within` goes down as the size of a client's bit, and comes back with its sign.
    """

    clip: Annotated[float, Gt(0)]
    """C, the longest change of one client in the shared space, all tensors together; of an adaptive bound, the first one."""
    noise_multiplier: Annotated[float, Ge(0)]
    """z, the standard deviation of the noise on the sum over C, bits included where the bound adapts."""
    clipping: Clipping = "fixed"
    """`auto`: C is the norm of what the server changes on rows of its own, before round 1; `adaptive`: the clients' median."""
    noise: Literal["server", "clients"] = "server"
    """Who adds it. `clients`: the engine of secure sums has each client add its share to its words."""
    key: bytes | None = field(default=None, repr=False)
    """Of the noise; the server's alone. None draws from the operating system, and no round can be repeated."""

    name: ClassVar[str] = "client_level_privacy"
    paper: ClassVar[str] = "McMahan et al., Differentially Private Recurrent Language Models, arXiv 1710.06963"
    adds: ClassVar[tuple[str, ...]] = ("clip_",)

    def __post_init__(self) -> None:
        super().__post_init__()
        need_mean(self)
        need_trained(self, "a clipped change")
        # Records call it what it is over: it is no method of its own.
        object.__setattr__(self, "name", self.over.name)
        object.__setattr__(self, "paper", self.over.paper)

    @property
    def needs_proxy_data(self) -> bool:
        return self.over.needs_proxy_data or self.clipping == "auto"

    def check(self, client: Client) -> None:
        super().check(client)
        for t in (1, 2):
            seen = rehearse(self.over, client, t)
            if seen and (other := _reshaped(seen.received, seen.sent)):
                raise ConfigError(
                    f"{self.over.name} sends another {other} than it receives for a client like {client.id!r}: what one client "
                    "changes cannot be clipped: give clients whole budgets, or choose another method"
                )

    def init(self, sites: Sites, rng: torch.Generator) -> State:
        return super().init(sites, rng) | self._kept(0.0 if self.clipping == "auto" else self.clip)

    def _kept(self, bound: float) -> State:
        """What the state remembers of the bound."""
        return {} if self.clipping == "fixed" else {"clip_bound": {ALL: torch.tensor(bound, dtype=torch.float64)}}

    def bound(self, state: State) -> float:
        """C as the server's state, or what a client was sent, has it."""
        return self.clip if self.clipping == "fixed" else float(state["clip_bound"][ALL])

    def reach(self, received: State) -> float:
        """Norm of the longest vector by which one client moves the sum, from what a client was sent."""
        bound, bit = self.bound(received), received.get("clip_within", {}).get(ALL)
        return bound if bit is None else reach(bound, float(bit) / bound)

    async def server(self, state: State, round: Round) -> State:
        bound = self.bound(state)

        async def with_noise(asked: Any) -> Any:
            nonlocal bound
            if not isinstance(asked, Mean):
                return await asked
            if bound == 0.0:
                bound = await self._own_rows(asked, only(state, "head"), round)
            alike = self._alike(asked, bound, len(round.clients))
            answer = self._noised(await alike, alike, round)
            bound = self._next_bound(bound, answer, alike, round)
            return replace(answer, state=self.inner(answer.state))

        after = await relay(self.over.server(self.inner(state), round), with_noise)
        return after | self._kept(bound)

    def _alike(self, x: Mean, bound: float, clients: int) -> Mean:
        """The exchange with equal weights, the bound on its way down, and bits on their way up."""
        told = self._kept(bound)
        if self.clipping == "adaptive":
            size = bound * bit_weight(self.noise_multiplier, clients)
            told["clip_within"] = {ALL: torch.tensor(size, dtype=torch.float64)}
        return replace(
            x,
            send=lambda client: x.send(client) | told,
            expects=lambda client, sent: (
                x.expects(client, self.inner(sent)) | (like(sent, "clip_within") if "clip_within" in told else {})
            ),
            lift=lambda client, upload: x.lift(client, self.inner(upload)) | self.mine(upload),
            weight=lambda client: 1.0,
        )

    async def _own_rows(self, x: Mean, own: State, round: Round) -> float:
        """The norm of what the server changes as a client of whole budgets, on rows that are its own and public."""
        me = Client("server", 1, self.over.rank)
        received, visit = x.send(me), Visit(round.t, me, round.sites)
        sent, _ = await self.over.client(received, own, visit)
        norm = self._norm(_change(received, sent), received, visit)
        if not 0 < norm < math.inf:
            raise RoundError(
                f"round {round.t}: privacy.clip = 'auto' found that the server's own training changes the model by {norm:g}: "
                "look at train.lr and task.proxy_data, or set clip to a number"
            )
        return norm

    def _next_bound(self, bound: float, answer: Averaged, x: Mean, round: Round) -> float:
        """The bound after a round, which reports the one that it had."""
        if self.clipping != "fixed":
            round.report["clip"] = bound
        if self.clipping != "adaptive":
            return bound
        size = float(x.send(round.clients[0])["clip_within"][ALL])
        within = float(answer.state["clip_within"][ALL]) / (2 * size) + 0.5
        round.report["clip_within"] = within
        return next_bound(bound, within)

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        bound, told, inside = self.bound(received), self.mine(received), self.inner(received)

        def clipped(received: State, sent: State) -> State:
            made, within = self._clipped(received, sent, visit, bound)
            bit = {site: x if within else -x for site, x in told.get("clip_within", {}).items()}
            return made | ({"clip_within": bit} if bit else {})

        return await relay_sends(self.over.client(inside, self.inner(own), visit), inside, clipped)

    def _norm(self, change: State, received: State, visit: Visit) -> float:
        """Measured in the shared space, where the sum is: a method may stretch what it lifts."""
        wide = self.over.spread(change, received, visit)
        squares = [x.double().square().sum() for group in wide.values() for x in group.values()]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0

    def _clipped(self, received: State, sent: State, visit: Visit, bound: float) -> tuple[State, bool]:
        """What is sent, and whether it was within the bound before."""
        change = _change(received, sent)
        norm = self._norm(change, received, visit)
        if norm <= bound:
            return sent, True
        if not math.isfinite(norm):
            # As if it had not trained: who leaves the round because of its rows would tell of them.
            return {r: {s: received[r][s] for s in group} for r, group in sent.items()}, False
        share = bound / norm
        return {r: {s: x - (1 - share) * change[r][s] for s, x in group.items()} for r, group in sent.items()}, False

    def _noised(self, answer: Averaged, x: Mean, round: Round) -> Averaged:
        """Noise where any client of the round has a part; the rest is the server's own."""
        if self.noise == "clients":  # it is in the sum
            return answer
        std = self.noise_multiplier * self.reach(x.send(answer.clients[0])) * SLACK / len(answer.clients)
        round.report["noise_std"] = std
        key = self.key or os.urandom(32)
        seen = digest(answer.state)
        state = {role: dict(group) for role, group in answer.state.items()}
        covers = [covered(self, x, client, round.t, round.sites) for client in answer.clients]
        for role in covers[0]:
            for site in covers[0][role]:
                there = torch.stack([cover[role][site] for cover in covers]).amax(0) > 0
                mean = state[role][site]
                made = noised(mean.double().flatten(), std, key, "server", round.t, role, site, seen)
                state[role][site] = torch.where(there, made.view(mean.shape).to(mean.dtype), mean)
        return replace(answer, state=state)


def _change(received: State, sent: State) -> State:
    return {r: {s: x - received[r][s] for s, x in group.items()} for r, group in sent.items()}


def _reshaped(received: State, sent: State) -> str | None:
    """A role that is sent in another shape than it was received, or None."""
    for role, group in sent.items():
        if any(received[role][site].shape != x.shape for site, x in group.items()):
            return role
    return None
