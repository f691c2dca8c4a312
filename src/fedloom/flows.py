"""Wrapping coroutines: change what an inner method awaits, and what it is answered; a method over another one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fedloom import lora
from fedloom.client import BUDGETS, check_range, whole_budget
from fedloom.core import Averaged, Client, Each, Exchange, Mean, Method, Round, Send, Trained, Upload, Visit, Work
from fedloom.errors import ConfigError
from fedloom.fields import check_fields
from fedloom.rng import generator
from fedloom.spec import secret_sum_obstacle
from fedloom.state import Group, Sites, State, only

T = TypeVar("T")


async def relay(flow: Coroutine[Any, Any, T], change: Callable[[Any], Awaitable[Any]]) -> T:
    """Run an inner coroutine to its end, awaiting `change(x)` for every x that it awaits.

    `change` returns what is to be awaited instead; an async function may change the answer too.
    """
    step = partial(flow.send, None)
    try:
        while True:
            try:
                asked = step()
            except StopIteration as stop:
                result: T = stop.value
                return result
            try:
                answer = await change(asked)
            except Exception as error:  # thrown in by the engine: the inner coroutine's to handle
                step = partial(flow.throw, error)
            else:
                step = partial(flow.send, answer)
    finally:
        flow.close()


async def relay_works(flow: Coroutine[Any, Any, T], change: Callable[[Work], Work]) -> T:
    """`relay` for a client's coroutine: changes every Work, lets the rest pass."""
    return await relay(flow, lambda asked: change(asked) if isinstance(asked, Work) else asked)


async def relay_sends(
    flow: Coroutine[Any, Any, tuple[State, State]], received: State, change: Callable[[State, State], State]
) -> tuple[State, State]:
    """`relay` for a client's coroutine: what it sends becomes `change(what it was sent last, what it sends)`."""

    async def changed(asked: Any) -> Any:
        nonlocal received
        if isinstance(asked, Send):
            received = await Send(change(received, asked.state))
            return received
        return await asked

    sent, kept = await relay(flow, changed)
    return change(received, sent), kept


def title(method: Method) -> str:
    """The method's name with those under it, such as `fedlodrop over fslora`; plain averaging at the ground goes unsaid."""
    if not isinstance(method, Over):
        return method.name
    below = title(method.over)
    return method.name if below == "fedit" else f"{method.name} over {below}"


def at(visit: Visit, **budgets: Any) -> Visit:
    """The visit of a client with other budgets."""
    return replace(visit, client=replace(visit.client, **budgets))


@dataclass(frozen=True, kw_only=True)
class Over(Method):
    """A method over another one. Forwards everything: define what you change, and await `self.over...` inside it.

    Every role that a wrapper adds to a state begins with one of `adds`; `self.inner(state)` is the state without them.
    """

    over: Method
    """The method under this one."""

    group: ClassVar[str] = "wrappers"
    adds: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_fields(self, self.name)
        below: Method = self.over
        while isinstance(below, Over):
            if clash := set(self.adds) & set(below.adds):
                raise ConfigError(
                    f"{self.name} over {below.name}: both add roles that begin with {', '.join(sorted(clash))}: use one of them"
                )
            below = below.over

    def inner(self, state: State) -> State:
        """The state as the inner method knows it."""
        if not self.adds:
            return state
        return {role: group for role, group in state.items() if not role.startswith(self.adds)}

    def mine(self, state: State) -> State:
        """The roles that this wrapper added."""
        return {role: group for role, group in state.items() if role.startswith(self.adds)} if self.adds else {}

    def whole(self, client: Client) -> Client:
        """The client as the inner method sees it: with all of the budgets that this wrapper follows."""
        return replace(client, **{name: whole_budget(self, name) for name in self.budgets})

    @property
    def rank(self) -> int:
        """The inner method's."""
        return self.over.rank

    @property
    def personal_models(self) -> bool:
        return self.over.personal_models

    @property
    def serves_personal_models(self) -> bool:
        return self.over.serves_personal_models

    @property
    def personal_phase(self) -> bool:
        return self.over.personal_phase

    @property
    def needs_proxy_data(self) -> bool:
        return self.over.needs_proxy_data

    def check(self, client: Client) -> None:
        for name in self.budgets:
            check_range(self, client, name)
        self.over.check(self.whole(client))

    def init(self, sites: Sites, rng: torch.Generator) -> State:
        return self.over.init(sites, rng)

    def init_from(self, sites: Sites, rng: torch.Generator, weight: Callable[[str], Tensor]) -> State:
        # The inner method draws first, here as in `init`.
        again = rng.clone_state()
        return self.init(sites, rng) | self.over.init_from(sites, again, weight)

    async def server(self, state: State, round: Round) -> State:
        return self.mine(state) | await self.over.server(self.inner(state), round)

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        return await self.over.client(self.inner(received), self.inner(own), visit)

    def spread(self, upload: State, received: State, visit: Visit) -> State:
        return self.mine(upload) | self.over.spread(self.inner(upload), self.inner(received), visit)

    def serve(self, state: State, client: Client) -> State:
        return self.over.serve(self.inner(state), self.whole(client))

    def model(self, received: State, own: State, visit: Visit) -> Work:
        return self.over.model(received, self.inner(own), replace(visit, client=self.whole(visit.client)))

    async def personal(self, received: State, own: State, visit: Visit) -> State:
        visit = replace(visit, client=self.whole(visit.client))
        return self.mine(own) | await self.over.personal(received, self.inner(own), visit)


def followed_budgets(method: Method) -> frozenset[str]:
    """The budgets that a method or one under it follows."""
    return method.budgets | (followed_budgets(method.over) if isinstance(method, Over) else frozenset())


def weighting(name: str, x: Exchange[Any]) -> Callable[[Client], float]:
    """The weights of an exchange: `uniform`, `examples`, or `auto` for its own."""
    return {"uniform": lambda client: 1.0, "examples": lambda client: float(client.examples)}.get(name, x.weight)


def averaged(uploads: Iterable[Upload]) -> Averaged:
    """What `Mean` would have answered: for a wrapper that reads the uploads one by one before they are averaged."""
    mean, clients = lora.Mean(), []
    for upload in uploads:
        mean.add(upload.state, upload.weight)
        clients.append(upload.client)
    return Averaged(mean.value, tuple(clients), mean.weight)


def untrained(x: Exchange[Any], client: Client) -> State:
    """What a client would upload had it trained nothing: see `need_trained`."""
    sent = x.send(client)
    return only(sent, *x.expects(client, sent))


@dataclass(frozen=True)
class Rehearsal:
    """One client's part in one round of a method, on two small layers, with training that changes nothing."""

    exchange: Exchange[Any]
    received: State
    work: Work | None
    """The first work of the visit."""
    sent: State
    kept: State
    goes_on: bool = False
    """The visit sends again in the same round."""


_STAGE: Sites = {"first": (5, 7), "second": (6, 5)}


def rehearse(method: Method, client: Client, t: int, sites: Sites | None = None) -> Rehearsal | None:
    """What a method does with a client in round t, up to its first exchange; None if it has no exchange in that round.

    Wrappers ask so that a composition that cannot work is refused when it is named, whatever method it is over.
    """
    sites = sites or _STAGE
    state = method.init(sites, generator("rehearsal"))
    server = method.server(state, Round(t, (client,), 1, sites))
    try:
        exchange = server.send(None)
        if not isinstance(exchange, Exchange):
            return None
        received = exchange.send(client)
        flow = method.client(received, {}, Visit(t, client, sites, generator("rehearsal")))
        first: Work | None = None
        asked: Any = flow.send(None)
        while isinstance(asked, Work):
            first = first or asked
            asked = flow.send(Trained(asked.train, steps=1, lr_sum=1.0, loss=0.0))
        flow.close()
        return Rehearsal(exchange, received, first, asked.state, {}, goes_on=True)
    except StopIteration as stop:
        sent, kept = stop.value
        return Rehearsal(exchange, received, first, sent, kept)
    finally:
        server.close()


def need_fixed_sizes(wrapper: Over) -> None:
    """Raise ConfigError unless the server knows every size of what comes back to the method under a wrapper."""
    over = wrapper.over
    whole = Client("rehearsal", 1, over.rank)
    for t in (1, 2):
        seen = rehearse(over, whole, t)
        if seen and (why := secret_sum_obstacle(seen.exchange.expects(whole, seen.received))):
            raise ConfigError(
                f"{wrapper.name} cannot go over {over.name}: of what comes back {why}: choose another [method.over]"
            )


def need_factors(wrapper: Over, what: str) -> None:
    """Raise ConfigError unless the method under a wrapper sends A and B whole, both ways, and keeps nothing with clients.

    `what` says in a few words what the wrapper takes of the factors.
    """
    need_fixed_sizes(wrapper)
    over = wrapper.over
    whole = Client("rehearsal", 1, over.rank)
    factors = {
        "A": {site: (over.rank, n) for site, (_, n) in _STAGE.items()},
        "B": {site: (m, over.rank) for site, (m, _) in _STAGE.items()},
    }
    for t in (1, 2):
        seen = rehearse(over, whole, t)
        if seen is None:
            continue
        for where, state in (("sends to", seen.received), ("gets back from", seen.sent)):
            for role, shapes in factors.items():
                if {site: tuple(x.shape) for site, x in state.get(role, {}).items()} != shapes:
                    raise ConfigError(
                        f"{wrapper.name} cannot go over {over.name}: {what} needs both factors whole, and what {over.name} "
                        f"{where} clients in round {t} has {', '.join(state) or 'nothing'}: choose another [method.over]"
                    )
        if seen.kept:
            raise ConfigError(
                f"{wrapper.name} cannot go over {over.name}: it keeps {', '.join(seen.kept)} with the client, and {what} is "
                "another one every round: choose another [method.over]"
            )


def need_mean(wrapper: Over) -> None:
    """Raise ConfigError unless the method under a wrapper asks for means of uploads and never reads one by itself."""
    over = wrapper.over
    seen = [rehearse(over, Client("rehearsal", 1, over.rank), t) for t in (1, 2)]
    kinds = {type(x.exchange) for x in seen if x is not None}
    if Each in kinds or Mean not in kinds:
        raise ConfigError(
            f"{wrapper.name} cannot go over {over.name}: it answers in place of a mean of uploads, and {over.name} reads each "
            "upload itself: choose another [method.over], such as fedit or ffa_lora"
        )


def _same(group: Group, other: Group) -> bool:
    return group.keys() <= other.keys() and all(torch.equal(x, other[site]) for site, x in group.items())


def need_trained(wrapper: Over, what: str) -> None:
    """Raise ConfigError unless the clients of the method under a wrapper send, once, what they trained of what they received.

    `what` says in a few words what the wrapper takes of it.
    """
    need_fixed_sizes(wrapper)
    over = wrapper.over
    whole = Client("rehearsal", 1, over.rank)
    for t in (1, 2):
        seen = rehearse(over, whole, t)
        if seen is None:
            continue
        trained = seen.work.train if seen.work else {}
        for role, group in seen.sent.items():
            start = seen.received.get(role, {})
            if seen.goes_on or role not in trained or not _same(group, start):
                raise ConfigError(
                    f"{wrapper.name} cannot go over {over.name}: {what} needs clients that send what they trained of what they "
                    f"received, and {role} is something else in round {t}: choose another [method.over]"
                    + (f", or put {over.name} over {wrapper.name}" if isinstance(over, Over) else "")
                )


def need_whole(wrapper: Method, client: Client, advice: str = "") -> None:
    """Raise ConfigError unless a client has the whole of every budget: with less, it may train other tensors each round."""
    for name, budget in BUDGETS.items():
        if getattr(client, name) != whole_budget(wrapper, name):
            raise ConfigError(
                f"{wrapper.name} needs clients that train the same tensors in every round, got "
                f"{name} {getattr(client, name)} for client {client.id!r}: remove {budget.key} from [clients]{advice}"
            )
