"""The server's half: an engine that sends states to nodes, waits no longer than the deadline, and takes what came."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedloom.checkpoint import ClientStates
from fedloom.client import Client, Failure
from fedloom.core import Method, Round
from fedloom.engine import Answer, Engine, Job
from fedloom.errors import RoundError
from fedloom.flower import answers, codec
from fedloom.flower.message import printable
from fedloom.flower.nodes import Directory, Registry, Roster
from fedloom.flower.pending import NOTHING, Answered, Asked, Pending, Refused, Say
from fedloom.flower.remote_visits import RemoteVisits
from fedloom.flower.transport import Transport
from fedloom.state import Sites

if TYPE_CHECKING:
    from fedloom.flower.remote_sums import RemoteSums

POLL_S = 0.1
"""Between looks for answers. The SuperLink is on this machine: a look costs a millisecond."""
HELLO_S = 600.0
"""How long a node may take to load its model and say who it is."""
_MOST_NOTES = 50


@dataclass(frozen=True)
class RoundPolicy:
    """How long a round waits, for how many, and in what form numbers cross."""

    deadline_s: float = 600.0
    """Of an exchange: who has not answered by then is left out of the round."""
    enough: int | None = None
    """Answers after which an exchange waits for no more (where more clients were asked than needed)."""
    form: codec.Form = "raw"


class Coordinator:
    """An engine whose clients are on the nodes of a transport. `setup` is what every node is told of the run.

    `local` trains the server's own work. With a `roster` any node can serve any client, and they are dealt out over those
    that are connected; without one, nodes say which clients they are, and `check` raises for one that the method cannot serve.
    `metrics` are the names of the scores that a client's own model gets. With `sums`, uploads come as secure sums.
    """

    def __init__(
        self,
        transport: Transport,
        setup: dict[str, Any],
        policy: RoundPolicy,
        local: Engine,
        *,
        roster: Sequence[Client] | None = None,
        check: Callable[[Client], None] = lambda client: None,
        metrics: Collection[str] = ("loss",),
        sums: RemoteSums | None = None,
        on_status: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.transport, self.policy, self.local, self.on_status = transport, policy, local, on_status
        self.client_states = ClientStates()
        """Empty for ever: what clients keep stays on their nodes."""
        self.registry = Registry()
        self.directory: Directory = self.registry if roster is None else Roster(roster)
        self.pending = Pending(transport, setup, policy.form)
        self.epsilons: dict[str, float] = {}
        """Client id -> what its rows have spent, as its node says."""
        self.train_s = 0.0
        """Of the node that trained longest, summed over exchanges."""
        self.sums = sums
        self._check, self._metrics = check, frozenset(metrics)
        self._notes: list[str] = []

    @property
    def sites(self) -> Sites:
        """The adapted layers."""
        return self.local.sites

    # who is there

    def wait_for_clients(self, count: int, patience_s: float) -> list[Client]:
        """Wait until `count` clients have announced themselves. Raises RoundError with what is known if they do not."""
        self._wait(lambda: len(self.directory.announced), count, "clients", patience_s)
        return sorted(self.directory.announced.values(), key=lambda client: client.id)

    def wait_for_nodes(self, count: int, patience_s: float) -> None:
        """Wait until `count` nodes are connected. Raises RoundError if they are not."""
        self._wait(lambda: len(self.transport.nodes()), count, "nodes", patience_s)

    def _wait(self, there: Callable[[], int], count: int, what: str, patience_s: float) -> None:
        until = time.monotonic() + patience_s
        while (now := there()) < count:
            if time.monotonic() > until:
                why = "".join(f"; a node refused: {reason}" for _, reason in self.directory.refused.values())
                raise RoundError(
                    f"{now} of {count} {what} were there within {patience_s:.0f} s "
                    f"({', '.join(sorted(self.directory.announced)) or 'no client'}){why}. Start the others, then resume"
                )
            why = "".join(f"; a node refused: {reason}" for _, reason in self.directory.refused.values())
            self.on_status(f"waiting for {what}: {now} of {count} are there{why}")
            self.discover()
            time.sleep(POLL_S)

    def discover(self) -> set[int]:
        """Ask nodes that are new who they are, and hear those that were asked; the ids of all connected. Does not wait."""
        for one in self.pending.receive():
            self._stray(one)
        online = set(self.transport.nodes())
        for node in self.directory.newcomers(online):
            if node not in self.pending.owed():
                self.pending.send(Asked(node, "hello"), HELLO_S)
        return online

    def _register(self, one: Answered | Refused) -> None:
        node = one.asked.node
        try:
            why = one.reason if isinstance(one, Refused) else self._announced(node, one.header)
        except Exception as error:  # whatever a node says of itself: it is refused, and the others are not
            why = printable(error)
        if why is not None:
            self.note(f"node {node} takes no part: {why}")
            self.registry.refuse(node, why)

    def _announced(self, node: int, header: dict[str, Any]) -> str | None:
        clients = answers.clients(header)
        if self.sums is not None:
            self.sums.announce(clients, header.get("keys"))
        return self.registry.register(node, clients, self.transport.nodes(), self._check)

    def wait_for_places(self, clients: Collection[str], count: int) -> None:
        """Wait a deadline long, at most, until `count` of these clients have a node that is connected."""
        until = time.monotonic() + self.policy.deadline_s
        while time.monotonic() < until:
            online = self.discover()
            # Where any node serves any client, one is enough.
            there = clients if self.directory is not self.registry and online else self._placed(clients, online)
            if len(there) >= min(count, len(clients)):
                return
            time.sleep(POLL_S)

    def _placed(self, clients: Collection[str], online: set[int]) -> list[str]:
        return [key for key in clients if self.directory.places.get(key) in online]

    # asking

    def ask(
        self,
        do: str,
        jobs: Sequence[Job],
        t: int,
        exchange: int = 1,
        done: Callable[[], bool] = lambda: False,
        say: Say = NOTHING,
    ) -> Iterator[Answered | Failure]:
        """Ask every job's node until the deadline, or until `done()`. Whoever gave no answer to use comes as a Failure.

        The later exchanges of a round go to the nodes of its first one, where the visits are.
        """
        if not jobs:
            return
        ttl_s = self.policy.deadline_s + max(60.0, self.policy.deadline_s)
        online = self._free()
        until = time.monotonic() + self.policy.deadline_s
        owed = self.pending.owed()
        first = exchange == 1 or not self.directory.places
        ready = self.directory.place(online, owed) if first else online
        waiting: set[Asked] = set()
        groups: dict[int, list[Job]] = {}
        for job in jobs:
            node = self.directory.places.get(job[0].id)
            if node in owed:
                yield Failure(job[0], f"its node has not answered what it was asked in round {owed[node].t} yet")
            elif node is None or node not in ready:
                yield Failure(job[0], "its node is not connected")
            else:
                groups.setdefault(node, []).append(job)
        for node, group in groups.items():
            asked = Asked(node, do, t, exchange, group, say)
            if self.pending.send(asked, ttl_s):
                waiting.add(asked)
            else:
                yield from _failures(asked, "Flower did not accept its message")
        yield from self._until(until, done, waiting, ttl_s)
        what = "late: the round had enough" if done() else f"late: no answer within {self.policy.deadline_s:g} s"
        for asked in waiting:
            asked.forget()
            yield from _failures(asked, what)

    def _free(self) -> set[int]:
        """The nodes that are connected; waited for, a deadline long, if all of them still owe an answer."""
        until = time.monotonic() + self.policy.deadline_s
        while (online := self.discover()) and online <= self.pending.owed().keys() and time.monotonic() < until:
            time.sleep(POLL_S)
        return online

    def _until(
        self, until: float, done: Callable[[], bool], waiting: set[Asked], ttl_s: float
    ) -> Iterator[Answered | Failure]:
        """Answers as they come; `waiting` is left with what was not answered."""
        while waiting and not done() and time.monotonic() < until:
            got = self.pending.receive()
            for one in got:
                if one.asked not in waiting:
                    self._stray(one)
                elif isinstance(one, Answered):
                    waiting.remove(one.asked)
                    yield one
                elif not (one.unknown and not one.asked.with_setup and self.pending.send(one.asked, ttl_s)):
                    waiting.remove(one.asked)
                    yield from _failures(one.asked, one.reason)
            if not got:
                time.sleep(POLL_S)

    def _stray(self, one: Answered | Refused) -> None:
        """An answer that no round waits for."""
        if one.asked.do == "hello":
            return self._register(one)
        what = f"never came: {one.reason}" if isinstance(one, Refused) else "came late and was not used"
        return self.note(f"the answer of {printable(one.asked, 80)} to round {one.asked.t} {what}")

    # what an engine does

    def visits(self, method: Method, round: Round) -> RemoteVisits:
        if self.sums is None:
            return RemoteVisits(self, method, round)
        from fedloom.flower.secure_remote_visits import SecureRemoteVisits  # its ciphers are of an extra

        return SecureRemoteVisits(self, method, round, self.sums)

    def personal(self, method: Method, jobs: Iterable[Job], t: int) -> Iterator[Answer | Failure]:
        seconds = 0.0
        for one in self.ask("personal", list(jobs), t):
            if isinstance(one, Failure):
                yield one
                continue
            seconds = max(seconds, answers.seconds(one.header))
            yield from (result for result, _ in answers.results(one, None))
        self.train_s += seconds

    def scores(self, method: Method, jobs: Iterable[Job], t: int, common: bool = False) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for one in self.ask("evaluate common" if common else "evaluate", list(jobs), t):
            try:
                if isinstance(one, Failure):
                    self.note(f"{one.client.id} was not evaluated: {one.reason}")
                else:
                    found |= answers.scores(one, self._metrics)
            except Exception as error:
                self.note(f"{printable(getattr(one, 'asked', one), 80)} not evaluated: {printable(error)}")
        return dict(sorted(found.items()))

    def export(self, method: Method, jobs: Iterable[Job], t: int) -> None:
        for one in self.ask("export", list(jobs), t):
            if isinstance(one, Failure):
                self.note(f"{one.client.id} wrote no model of its own: {one.reason}")

    def stats(self) -> dict[str, Any]:
        """What happened since the last call: `wire`, bytes of messages; `train_s` of the slowest nodes; `notes`."""
        left = len(self._notes) - _MOST_NOTES
        said = {
            "train_s": round(self.train_s + float(self.local.stats().get("train_s", 0.0)), 4),
            "wire": dict(self.pending.wire),
            "notes": self._notes[:_MOST_NOTES] + ([f"and {left} more"] if left > 0 else []),
        }
        self.pending.wire, self.train_s, self._notes = {"down": 0, "up": 0}, 0.0, []
        return said

    def note(self, what: str) -> None:
        """For the record of the round."""
        self._notes.append(what)


def _failures(asked: Asked, reason: str) -> Iterator[Failure]:
    return (Failure(client, reason) for client, _ in asked.jobs)
