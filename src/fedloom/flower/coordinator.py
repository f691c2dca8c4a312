"""Clients on other machines: the engine that sends states to nodes, waits no longer than the deadline, and takes what came.

This is the server's side of the wire: the one place where it encodes what goes and decodes what comes.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedloom.checkpoint import Kept
from fedloom.core import Client, Engine, Failure, Job, Method, State, Upload
from fedloom.engines import codec
from fedloom.engines.envelope import WireError, pack, unpack
from fedloom.engines.link import Link, Reply
from fedloom.errors import RoundError

POLL_S = 0.1
"""Between looks for answers. The SuperLink is on this machine: a look costs a millisecond."""
HELLO_S, RETRY_S = 600.0, 60.0
"""How long a node may take to load its model and say who it is; when one that refused is asked again."""
NEEDED = ("loss", "loss_max", "grad_norm_max")


@dataclass(frozen=True)
class Terms:
    """How long to wait, and for how many."""

    deadline_s: float = 600.0
    """A round's: who has not answered by then is left out of it."""
    enough: int | None = None
    """Answers after which a round waits for no more (where more clients were asked than needed)."""
    form: codec.Form = "raw"


@dataclass
class _Asked:
    """One message to one node that waits for its answer."""

    node: int
    number: int
    do: str
    t: int
    jobs: list[Job] = field(default_factory=list)


class Remote:
    """An engine on a Link. `setup` is what every node is told of the run; `local` trains the server's own rounds.

    With a `roster` any node can serve any client, and they are dealt out over those that are connected. Without one,
    nodes say which clients they are.
    """

    def __init__(
        self,
        link: Link,
        setup: dict[str, Any],
        terms: Terms,
        local: Engine,
        say: Callable[[str], None] = lambda what: None,
        roster: Sequence[Client] | None = None,
    ) -> None:
        self.link, self.terms, self.local, self.say = link, terms, local, say
        self.kept = Kept()
        """Empty for ever: what clients keep stays on their nodes."""
        self.places: dict[str, int] = {}
        """Client id -> its node."""
        self.announced: dict[str, Client] = {}
        self.refused: dict[int, tuple[float, str]] = {}
        """Node -> when and why it said that it takes no part. It is asked again later: its owner may mend it."""
        self.notes: list[str] = []
        """What happened besides: late answers, nodes that came or refused."""
        self.wire = {"down": 0, "up": 0}
        """Bytes of the messages of training that crossed."""
        self.train_s = 0.0
        """Of the node that trained longest."""
        self._roster = roster
        self._setup = setup | {"form": terms.form}
        self._session = secrets.token_hex(16)
        self._numbers = itertools.count(1)
        self._known: set[int] = set()
        self._late: dict[str, _Asked] = {}
        self._hellos: dict[str, _Asked] = {}

    # who is there

    def gather(self, count: int, patience_s: float) -> list[Client]:
        """Wait until `count` clients have announced themselves. Raises RoundError with what is known if they do not."""
        self._wait(lambda: len(self.announced), count, "clients", patience_s)
        return sorted(self.announced.values(), key=lambda client: client.id)

    def muster(self, count: int, patience_s: float) -> None:
        """Wait until `count` nodes are connected. Raises RoundError if they are not."""
        self._wait(lambda: len(self.link.nodes()), count, "nodes", patience_s)

    def _wait(self, there: Callable[[], int], count: int, what: str, patience_s: float) -> None:
        until = time.monotonic() + patience_s
        while there() < count:
            if time.monotonic() > until:
                why = "".join(f"; a node refused: {reason}" for _, reason in self.refused.values())
                raise RoundError(
                    f"{there()} of {count} {what} were there within {patience_s:.0f} s "
                    f"({', '.join(sorted(self.announced)) or 'no client'}){why}. Start the others, then resume"
                )
            self.say(f"waiting for {what}: {there()} of {count} are there")
            if self._roster is None:
                self._greet()
                self._listen()
            time.sleep(POLL_S)

    def _greet(self) -> set[int]:
        """Ask the nodes that are new who they are; the ids of those connected. Does not wait for their answers."""
        online = set(self.link.nodes())
        asked = {one.node for one in self._hellos.values()}
        now = time.monotonic()
        stubborn = {node for node, (when, _) in self.refused.items() if now < when + RETRY_S}
        for node in sorted(online - self._known - asked - stubborn):
            hello = _Asked(node, next(self._numbers), "hello", 0)
            if (id := self.link.push(node, self._message(hello), HELLO_S)) is not None:
                self._hellos[id] = hello
        return online

    def _listen(self) -> None:
        if ids := [*self._hellos, *self._late]:
            for reply in self.link.pull(ids):
                self._other(reply)

    def _welcome(self, asked: _Asked, header: dict[str, Any]) -> None:
        if "fault" in header:
            return self._refuse(asked.node, header["fault"])
        found: list[Client] = []
        for fields in header.get("clients", []):
            try:
                found.append(Client(str(fields[0]), int(fields[1]), int(fields[2]), float(fields[3])))
            except (TypeError, ValueError, IndexError):
                self.notes.append(
                    f"node {asked.node} announced {str(fields)[:60]}, expected id, examples, rank and keep"
                )
        online = set(self.link.nodes())
        for client in found:
            # A node that was started again may have a new id: a name is free again when the node that had it is gone.
            holder = self.places.get(client.id, asked.node)
            if holder != asked.node and holder in online:
                return self._refuse(
                    asked.node, f"it says that it is {client.id}, as node {holder} does: give one of them another --id"
                )
        for client in found:
            self.places[client.id] = asked.node
            self.announced.setdefault(client.id, client)
        self._known.add(asked.node)
        self.refused.pop(asked.node, None)
        return None

    def _refuse(self, node: int, why: str) -> None:
        self.notes.append(f"node {node} takes no part: {why}")
        self.refused[node] = time.monotonic(), why

    def _placed(self) -> set[int]:
        """Bring `places` up to date; the nodes that are connected."""
        self._listen()
        if self._roster is None:
            return self._greet() & self._known
        # A SuperNode does one thing at a time: to a node that owes an answer, or died with it, nothing new is sent.
        online = sorted(set(self.link.nodes()) - {late.node for late in self._late.values()})
        if online:
            self.places = {client.id: online[i % len(online)] for i, client in enumerate(self._roster)}
        return set(online)

    def told(self) -> dict[str, Any]:
        """What happened since the last call, for the record: bytes of messages, seconds of the slowest node, notes."""
        said = {"wire": dict(self.wire), "train_s": round(self.train_s, 4), "notes": self.notes}
        self.wire, self.train_s, self.notes = {"down": 0, "up": 0}, 0.0, []
        return said

    # a round

    def run(self, method: Method, jobs: Iterable[Job], t: int) -> Iterator[Upload | Failure]:
        """Train each job's client for round t."""
        every = list(jobs)
        own = [job for job in every if job[0].id == "server"]
        yield from self.local.run(method, own, t)
        far = [job for job in every if job[0].id != "server"]
        yield from self._train("train", far, t, self.terms.enough)

    def personalise(self, method: Method, jobs: Iterable[Job], t: int) -> Iterator[Upload | Failure]:
        """The personal phase on the nodes; clients whose method has none give no result."""
        if type(method).personalise is Method.personalise:
            return iter(())
        return self._train("personal", list(jobs), t, None)

    def scores(self, jobs: Iterable[Job], t: int) -> dict[str, dict[str, float]]:
        """Client id -> scores of its own model after round t, from the nodes that answer in time."""
        found: dict[str, dict[str, float]] = {}
        for asked, header, _ in self._round("evaluate", list(jobs), t):
            if isinstance(asked, Failure):
                self.notes.append(f"{asked.client.id} was not evaluated: {asked.reason}")
                continue
            given = header.get("scores", [])
            if "fault" in header or len(given) != len(asked.jobs) or not all(map(_numbers, given)):
                self.notes.append(f"{_names(asked)} not evaluated: {header.get('fault', 'scores are no numbers')}")
                continue
            found |= {client.id: values for (client, _), values in zip(asked.jobs, given, strict=True)}
        return dict(sorted(found.items()))

    def export(self, jobs: Iterable[Job], t: int) -> None:
        """Have every node write its clients' own models."""
        for asked, header, _ in self._round("export", list(jobs), t):
            if isinstance(asked, Failure):
                self.notes.append(f"{asked.client.id} wrote no model of its own: {asked.reason}")
            elif "fault" in header:
                self.notes.append(f"{_names(asked)} wrote no model of their own: {header['fault']}")

    def _train(self, do: str, jobs: list[Job], t: int, enough: int | None) -> Iterator[Upload | Failure]:
        came: list[str] = []
        for asked, header, parts in self._round(do, jobs, t, lambda: enough is not None and len(came) >= enough):
            for result in [asked] if isinstance(asked, Failure) else self._results(asked, header, parts):
                if isinstance(result, Upload):
                    came.append(result.client.id)
                yield result

    def _round(
        self, do: str, jobs: Sequence[Job], t: int, done: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[_Asked | Failure, dict[str, Any], list[memoryview]]]:
        """Ask every job's node; a client that was not reached, or was late, comes as a Failure."""
        if not jobs:
            return
        until = time.monotonic() + self.terms.deadline_s
        online = self._placed()
        groups: dict[int, list[Job]] = {}
        for client, state in jobs:
            node = self.places.get(client.id)
            if node is None or node not in online:
                yield Failure(client, "its node is not connected"), {}, []
            elif (owed := next((late.t for late in self._late.values() if late.node == node), None)) is not None:
                yield Failure(client, f"its node has not answered round {owed} yet"), {}, []
            else:
                groups.setdefault(node, []).append((client, state))
        pending: dict[str, _Asked] = {}
        for node, group in groups.items():
            asked = _Asked(node, next(self._numbers), do, t, group)
            id = self.link.push(node, self._message(asked), self.terms.deadline_s + max(60.0, self.terms.deadline_s))
            if id is None:
                for client, _ in group:
                    yield Failure(client, "Flower did not accept its message"), {}, []
            else:
                pending[id] = asked
        yield from self._answers(pending, until, done)
        what = "late: the round had enough" if done() else f"late: no answer within {self.terms.deadline_s:g} s"
        for id, asked in pending.items():
            self._late[id] = asked
            for client, _ in asked.jobs:
                yield Failure(client, what), {}, []

    def _message(self, asked: _Asked) -> bytes:
        form: codec.Form = "raw" if self.terms.form == "int8" else self.terms.form  # int8 is for differences
        parts = [codec.encode(state, form) for _, state in asked.jobs]
        data = pack(
            {
                "do": asked.do,
                "session": self._session,
                "number": asked.number,
                "t": asked.t,
                "clients": [client.id for client, _ in asked.jobs],
                "setup": self._setup,
            },
            parts,
        )
        self.wire["down"] += len(data) if asked.do == "train" else 0
        return data

    def _answers(
        self, pending: dict[str, _Asked], until: float, done: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[_Asked, dict[str, Any], list[memoryview]]]:
        """Answers as they come; `pending` is left with those that did not. A header with `fault` says what is wrong."""
        while pending and not done() and time.monotonic() < until:
            got = self.link.pull([*pending, *self._late, *self._hellos])
            for reply in got:
                if (asked := pending.pop(reply.id, None)) is not None:
                    yield asked, *self._opened(asked, reply)
                else:
                    self._other(reply)
            if not got:
                time.sleep(POLL_S)

    def _other(self, reply: Reply) -> None:
        """An answer that no round waits for."""
        if (hello := self._hellos.pop(reply.id, None)) is not None:
            self._welcome(hello, self._opened(hello, reply)[0])
        elif (late := self._late.pop(reply.id, None)) is not None:
            what = "came late and was not used" if reply.data is not None else f"never came: {reply.fault}"
            self.notes.append(f"the answer of {_names(late)} to round {late.t} {what}")
        else:
            self.notes.append("an answer to nothing that was asked was thrown away")

    def _opened(self, asked: _Asked, reply: Reply) -> tuple[dict[str, Any], list[memoryview]]:
        if reply.data is None:
            return {"fault": reply.fault or "no answer"}, []
        self.wire["up"] += len(reply.data) if asked.do == "train" else 0
        try:
            header, parts = unpack(reply.data)
        except WireError as error:
            return {"fault": f"answer refused: {error}"}, []
        want = {"session": self._session, "number": asked.number, "do": asked.do, "t": asked.t}
        got = {key: header.get(key) for key in want}
        if got != want and not ("refused" in header and got["session"] is None):
            return {
                "fault": f"answer refused: it belongs to message {got['number']!r} of round {got['t']!r}, "
                f"expected message {asked.number} of round {asked.t}"
            }, []
        if "refused" in header:
            return {"fault": f"refused: {str(header['refused'])[:500]}"}, []
        return header, parts

    def _results(self, asked: _Asked, header: dict[str, Any], parts: list[memoryview]) -> Iterator[Upload | Failure]:
        if "fault" in header:
            for client, _ in asked.jobs:
                yield Failure(client, header["fault"])
            return
        seconds = header.get("seconds")
        self.train_s = max(self.train_s, seconds) if isinstance(seconds, float) else self.train_s
        blobs = iter(parts)
        given = {x["client"]: x for x in header.get("results", []) if isinstance(x, dict) and "client" in x}
        found = {key: None if "failure" in x else next(blobs, None) for key, x in given.items()}
        for client, received in asked.jobs:
            answer = given.get(client.id)
            if answer is None:
                if asked.do == "train":
                    yield Failure(client, "its node answered without it")
            elif "failure" in answer:
                yield Failure(client, str(answer["failure"])[:500])
            else:
                yield self._upload(client, received, asked.t, answer, found[client.id])

    def _upload(
        self, client: Client, received: State, t: int, answer: dict[str, Any], blob: memoryview | None
    ) -> Upload | Failure:
        metrics: Any = answer.get("metrics")
        if blob is None or not _numbers(metrics) or any(name not in metrics for name in NEEDED):
            return Failure(client, "answer refused: no tensors, or metrics that are no numbers")
        try:
            state = codec.Feedback.download(blob, received) if self.terms.form == "int8" else codec.decode(blob)
        except WireError as error:
            return Failure(client, f"answer refused: {error}")
        return Upload(client, state, t, {str(name): float(x) for name, x in metrics.items()})


def _numbers(values: Any) -> bool:
    return isinstance(values, dict) and all(isinstance(x, int | float) for x in values.values())


def _names(asked: _Asked) -> str:
    return ", ".join(client.id for client, _ in asked.jobs) or f"node {asked.node}"
