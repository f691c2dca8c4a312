"""Messages that wait for their answers: each is numbered, goes to one node, and is matched with the one that answers it."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedloom.engine import Job
from fedloom.flower import codec
from fedloom.flower.message import WireError, pack, printable, unpack
from fedloom.flower.transport import Reply, Transport

COUNTED = ("exchange", "unmask")
"""What is asked in a round: its bytes are."""


@dataclass(frozen=True)
class Say:
    """What a message says besides, to every node alike."""

    header: Mapping[str, Any] = field(default_factory=dict)
    parts: Sequence[bytes] = ()
    """After those of the clients."""


NOTHING = Say()


@dataclass(eq=False)
class Asked:
    """One message to one node."""

    node: int
    do: str
    """`hello`, `keys`, `exchange`, `unmask`, `personal`, `evaluate` or `export`."""
    t: int = 0
    exchange: int = 1
    """Of the round, from 1."""
    jobs: Sequence[Job] = ()
    say: Say = NOTHING
    number: int = 0
    """Given when it is sent: grows within a session."""
    with_setup: bool = False
    """Whether it says what the run is."""

    def __str__(self) -> str:
        return ", ".join(client.id for client, _ in self.jobs) or f"node {self.node}"

    def forget(self) -> None:
        """Let go of the tensors: nobody will use the answer."""
        self.jobs, self.say = [(client, {}) for client, _ in self.jobs], Say()


@dataclass(frozen=True)
class Answered:
    """An answer that belongs to what was asked. What it says is still a node's word."""

    asked: Asked
    header: dict[str, Any]
    parts: list[memoryview]


@dataclass(frozen=True)
class Refused:
    """No answer to use, and why."""

    asked: Asked
    reason: str
    unknown: bool = False
    """The node does not know this run: it was started again."""


class Pending:
    """Sends messages over a transport and opens their answers.

    `setup` is what a node must know of the run. It goes with a message only if the node may not know it yet.
    """

    def __init__(self, transport: Transport, setup: dict[str, Any], form: codec.Form) -> None:
        self.transport, self.form = transport, form
        self.wire = {"down": 0, "up": 0}
        """Bytes of the messages of exchanges that crossed."""
        self._setup = setup | {"form": form}
        self._session = secrets.token_hex(16)
        self._numbers = itertools.count(1)
        self._waiting: dict[str, Asked] = {}
        self._set_up: set[int] = set()

    def send(self, asked: Asked, ttl_s: float) -> bool:
        """Send a message, or send it again; whether Flower took it."""
        asked.number = next(self._numbers)
        asked.with_setup = asked.do == "hello" or asked.node not in self._set_up
        data = self._packed(asked)
        if (id := self.transport.push(asked.node, data, ttl_s)) is None:
            return False
        self._waiting[id] = asked
        self.wire["down"] += len(data) if asked.do in COUNTED else 0
        return True

    def receive(self) -> list[Answered | Refused]:
        """The answers that are there. Never waits, and never raises because of what an answer says."""
        if not self._waiting:
            return []
        replies = self.transport.pull(list(self._waiting))
        return [self._opened(asked, reply) for reply in replies if (asked := self._waiting.pop(reply.id, None))]

    def owed(self) -> dict[int, Asked]:
        """Node -> a message that it has not answered."""
        return {asked.node: asked for asked in self._waiting.values()}

    def _packed(self, asked: Asked) -> bytes:
        form: codec.Form = "raw" if self.form == "int8" else self.form  # int8 is for differences
        header = dict(asked.say.header) | {
            "do": asked.do,
            "session": self._session,
            "number": asked.number,
            "t": asked.t,
            "exchange": asked.exchange,
            "clients": [client.id for client, _ in asked.jobs],
        }
        if asked.with_setup:
            header["setup"] = self._setup
        return pack(header, [*(codec.encode(state, form) for _, state in asked.jobs), *asked.say.parts])

    def _opened(self, asked: Asked, reply: Reply) -> Answered | Refused:
        try:
            return self._checked(asked, reply)
        except Exception as error:  # whatever bytes a node sends: they are its own failure and nobody else's
            return Refused(asked, f"answer refused: {printable(error)}")

    def _checked(self, asked: Asked, reply: Reply) -> Answered | Refused:
        if reply.data is None:
            return Refused(asked, printable(reply.fault or "no answer"))
        self.wire["up"] += len(reply.data) if asked.do in COUNTED else 0
        header, parts = unpack(reply.data)
        want = {"session": self._session, "number": asked.number, "do": asked.do, "t": asked.t}
        got = {key: header.get(key) for key in want}
        # A message that the node could not read has no session to answer for.
        if got != want and not ("refused" in header and got["session"] is None):
            raise WireError(
                f"it belongs to message {printable(repr(got['number']), 20)} of round {printable(repr(got['t']), 20)}, "
                f"expected message {asked.number} of round {asked.t}"
            )
        if "refused" in header:
            unknown = header.get("unknown") is True
            if unknown:
                self._set_up.discard(asked.node)
            return Refused(asked, f"refused: {printable(header['refused'])}", unknown)
        self._set_up.add(asked.node)
        return Answered(asked, header, parts)
