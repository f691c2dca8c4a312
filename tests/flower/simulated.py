"""A federation in one process and virtual time: the coordinator and the workers are real, the network between them is drawn.

Everything that happens is decided by one seed: how long a message travels, whether it is lost, comes twice or is answered by
somebody hostile, when a node is started again and what it forgets. Nobody sleeps: who waits moves the clock.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedloom import disk
from fedloom.flower import codec, coordinator, nodes, pending, worker
from fedloom.flower.message import WireError, pack, unpack
from fedloom.flower.transport import Reply
from fedloom.flower.worker import Worker
from fedloom.state import State


@dataclass(frozen=True)
class Weather:
    """How likely what is, for each message or answer; delays in virtual seconds."""

    delay_s: float = 2.0
    slow: float = 0.0
    """Of a message that takes longer than the deadline."""
    lost: float = 0.0
    doubled: float = 0.0
    refused: float = 0.0
    """By the grid, when it is sent."""
    hostile: float = 0.0
    """Of an answer, by the nodes that are hostile."""
    restarts: float = 0.0
    """Of a node, when a message arrives: it forgets what it holds in memory."""
    away_s: float = 0.0
    """How long it is gone then, at most."""
    in_order: bool = False
    """Whether answers to one message come in the order in which they were given."""


ROUGH = Weather(delay_s=5.0, doubled=0.2, in_order=True)
"""What must cost nothing: delays, messages that overtake each other or come twice."""
STORM = Weather(delay_s=5.0, slow=0.08, lost=0.08, doubled=0.15, refused=0.04, restarts=0.08, away_s=40.0)
SIEGE = replace(STORM, hostile=0.6)
DEADLINE_S = 30.0


class Clock:
    """Virtual time, and what is to happen in it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        """Until something happens, or as long as nobody minds; at least so long."""
        until = self.now + seconds
        if self._events:
            until = max(until, min(self._events[0][0], self.now + DEADLINE_S / 3))
        while self._events and self._events[0][0] <= until:
            when, _, what = heapq.heappop(self._events)
            self.now = max(self.now, when)
            what()
        self.now = max(self.now, until)


@contextmanager
def virtual(clock: Clock, rng: random.Random) -> Iterator[None]:
    """The coordinator's and the workers' clock is this one, sessions are drawn, and nothing waits for a disk."""
    time = SimpleNamespace(monotonic=clock.monotonic, perf_counter=clock.monotonic, sleep=clock.sleep)
    with pytest.MonkeyPatch.context() as patch:
        for module in (coordinator, nodes, worker):
            patch.setattr(module, "time", time)
        patch.setattr(pending, "secrets", SimpleNamespace(token_hex=lambda n: rng.randbytes(n).hex()))
        patch.setattr(disk, "os", SimpleNamespace(**vars(os) | {"fsync": lambda handle: None}))
        patch.setattr(worker.log, "disabled", True)
        yield


class Network:
    """A Transport over which `weather` passes. `hostile` nodes answer what they like; a node's number changes if it restarts.

    `make` gives the worker of the k-th node, with an empty memory.
    """

    def __init__(
        self,
        make: Callable[[int], Worker],
        count: int,
        clock: Clock,
        weather: Weather,
        rng: random.Random,
        hostile: frozenset[int] = frozenset(),
        renumber: bool = False,
    ) -> None:
        self.weather, self.clock = weather, clock
        self._make, self._rng, self._hostile, self._renumber = make, rng, hostile, renumber
        self._workers = {k: make(k) for k in range(count)}
        self._ids = {k: k for k in range(count)}
        """Number of a node that is connected -> which one it is."""
        self._numbers, self._messages = itertools.count(count), itertools.count()
        self._ready: list[Reply] = []
        self._open: set[str] = set()
        self._last: dict[str, float] = {}
        """Message -> when the last answer to it comes."""
        self.done: set[tuple[int, int, str]] = set()
        """(round, exchange, client) of what was trained, wherever its answer went."""
        self.overtaken: set[str] = set()
        """Clients that one node trained for a round after another had for a later one."""
        self._heard: list[bytes] = []

    # what a coordinator sees

    def nodes(self) -> list[int]:
        return sorted(self._ids)

    def push(self, node: int, data: bytes, ttl_s: float) -> str | None:
        if node not in self._ids or self._chance(self.weather.refused):
            return None
        id = f"m{next(self._messages)}"
        self._open.add(id)
        which = self._ids[node]
        self._travels(lambda: self._arrives(id, node, which, data))
        self.clock.at(self.clock.now + ttl_s, lambda: self._replies(id, None, "expired"))
        return id

    def pull(self, ids: list[str]) -> list[Reply]:
        got = [reply for reply in self._ready if reply.id in ids]
        self._ready = [reply for reply in self._ready if reply.id not in ids]
        return got

    def close(self) -> None:
        pass

    # what happens

    def _chance(self, share: float) -> bool:
        return share > 0 and self._rng.random() < share

    def _travels(self, arrival: Callable[[], None], after: float = 0.0) -> float:
        """When it arrives, if it does: not before `after`."""
        if self._chance(self.weather.lost):
            return after
        when = self.clock.now + self._rng.uniform(0, self.weather.delay_s)
        if self._chance(self.weather.slow):
            when += self._rng.uniform(DEADLINE_S, 4 * DEADLINE_S)
        when = max(when, after)
        self.clock.at(when, arrival)
        if self._chance(self.weather.doubled):
            self.clock.at(when + self._rng.uniform(0, self.weather.delay_s), arrival)
        return when

    def _arrives(self, id: str, node: int, which: int, data: bytes) -> None:
        if self._ids.get(node) != which:
            return  # it was away, or has another number now
        if self._chance(self.weather.restarts):
            self.restart(node)
            if self._ids.get(node) != which:
                return
        answer = self._workers[which].answer(data)
        now = trained(data, answer)
        self.overtaken |= {client for t, _, client in now if any(c == client and s > t for s, _, c in self.done)}
        self.done |= now
        self._heard.append(answer)
        if which in self._hostile and self._chance(self.weather.hostile):
            answer = hostile(answer, data, self._heard, self._rng)
        after = self._last.get(id, 0.0) if self.weather.in_order else 0.0
        self._last[id] = self._travels(lambda: self._replies(id, answer), after)

    def _replies(self, id: str, data: bytes | None, fault: str | None = None) -> None:
        # As Flower does: a message has one reply, the first that came.
        if id in self._open:
            self._open.remove(id)
            self._ready.append(Reply(id, data, fault))

    def restart(self, node: int) -> None:
        """End a node's process and start another: what is on its disk stays."""
        which = self._ids[node]
        self._workers[which] = self._make(which)
        away = self._rng.uniform(0, self.weather.away_s) if self._chance(0.5) else 0.0
        if away or self._renumber:
            del self._ids[node]
            back = next(self._numbers) if self._renumber else node
            self.clock.at(self.clock.now + away, lambda: self._ids.update({back: which}))


def trained(asked: bytes, answer: bytes) -> set[tuple[int, int, str]]:
    """(round, exchange, client) of those that an answer has tensors of."""
    header, said = unpack(asked)[0], unpack(answer)[0]
    if header["do"] != "exchange":
        return set()
    return {(header["t"], header["exchange"], one["client"]) for one in said.get("results", []) if "failure" not in one}


class Missing:
    """A Transport to a worker for each client, calm but for the clients that are missing from an exchange.

    `missing` are (round, exchange, client); of those in `done` the answer is lost, of others the message.
    """

    def __init__(
        self, workers: list[Worker], missing: set[tuple[int, int, str]], done: set[tuple[int, int, str]]
    ) -> None:
        self._workers, self._missing, self._done = workers, missing, done
        self._ready: dict[str, Reply] = {}
        self._count = itertools.count()

    def nodes(self) -> list[int]:
        return list(range(len(self._workers)))

    def push(self, node: int, data: bytes, ttl_s: float) -> str | None:
        header, _ = unpack(data)
        id = str(next(self._count))
        keys = {(header["t"], header["exchange"], client) for client in header["clients"]}
        gone = header["do"] == "exchange" and keys <= self._missing
        answer = None if gone and not keys <= self._done else self._workers[node].answer(data)
        self._ready[id] = Reply(id, None, "missing") if gone else Reply(id, answer)
        return id

    def pull(self, ids: list[str]) -> list[Reply]:
        return [self._ready.pop(id) for id in ids if id in self._ready]

    def close(self) -> None:
        pass


def hostile(answer: bytes, asked: bytes, heard: list[bytes], rng: random.Random) -> bytes:
    """What a node may send that wants no good: noise, damage, what others said, lies of any JSON, tensors of any kind."""
    match rng.randrange(6):
        case 0:
            return rng.randbytes(rng.choice([0, 1, 40, 400]))
        case 1:
            at = rng.randrange(len(answer))
            return answer[:at] + bytes([answer[at] ^ 1 << rng.randrange(8)]) + answer[at + 1 :]
        case 2:
            return answer[: rng.randrange(len(answer))]
        case 3:
            return rng.choice([*heard[-20:], asked])
        case 4:
            header, parts = unpack(answer)
            return _packed(_lie(header, rng), [bytes(part) for part in parts], answer)
        case _:
            header, parts = unpack(answer)
            return _packed(header, [_tensors(bytes(part), rng) for part in parts], answer)


def _packed(header: Any, parts: list[bytes], instead: bytes) -> bytes:
    try:
        return pack(header, parts)
    except ValueError:  # a number that no JSON holds
        return instead[:-1]


_JSON: list[Any] = [
    None,
    True,
    -1,
    10**400,
    1e300,
    float("nan"),
    "",
    "[/red]\x1b[2J",
    "\ud800",
    "x" * 10**5,
    [],
    {},
    [[]],
]
_DEEP: Any = "x"
for _ in range(40):
    _DEEP = [_DEEP]
_JSON.append(_DEEP)


def _lie(value: Any, rng: random.Random) -> Any:
    """One place of a JSON value replaced by something else. Whether a visit waits is left as it is."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice([key for key in sorted(value) if key != "waits"])
        return value | {key: _lie(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        return [*value[:at], _lie(value[at], rng), *value[at + 1 :]]
    return rng.choice(_JSON)


def _tensors(part: bytes, rng: random.Random) -> bytes:
    """Tensors that no server may use."""
    try:
        state: State = codec.decode(part)
    except WireError:
        return part
    places = [(role, site) for role, group in state.items() for site, x in group.items() if x.is_floating_point()]
    if not places:
        return codec.encode(state | {"more": {"s": torch.ones(1)}})
    role, site = rng.choice(places)
    x = state[role][site]
    bad = [
        torch.full_like(x, torch.nan),
        torch.full_like(x, -torch.inf),
        x.reshape(1, *x.shape),
        x.to(torch.int32),
        x[:0],
    ]
    group = state[role] | {site: rng.choice(bad)}
    return codec.encode(state | {role: group} if rng.random() < 0.8 else {k: v for k, v in state.items() if k != role})
