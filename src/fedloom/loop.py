"""The federated round, for every method and engine: drives the server's coroutine and answers what it awaits."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedloom import lora, spec
from fedloom.client import Client, Failure
from fedloom.communication import ByteCount
from fedloom.core import Averaged, Each, Exchange, Mean, Method, Round, Trained, Upload, Work
from fedloom.engine import Answer, Engine, Job, Total, Visits
from fedloom.errors import MethodError, RoundError
from fedloom.sampling import Sampler, all_clients
from fedloom.state import State


@dataclass
class Record:
    """What happened in one round."""

    t: int
    stage: str = "none"
    """Who trained: `clients`, `server` on its own data, `none`, or `personal` after the last round."""
    clients: list[str] = field(default_factory=list)
    """Who was asked."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Client id -> why its upload was not used."""
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """Client id -> what its training reported, of uploads that were used."""
    examples: dict[str, int] = field(default_factory=dict)
    up: ByteCount = field(default_factory=ByteCount)
    down: ByteCount = field(default_factory=ByteCount)
    per_client: dict[str, list[int]] = field(default_factory=dict)
    """Client id -> [bytes down, bytes up]."""
    report: dict[str, float] = field(default_factory=dict)
    """What the method wrote to `Round.report`."""
    seconds: float = 0.0

    @property
    def train_loss(self) -> float | None:
        """Mean of the clients' losses weighted by examples; None if no upload was used."""
        told = {k: m["loss"] for k, m in self.metrics.items() if "loss" in m}
        total = sum(self.examples[k] for k in told)
        return sum(self.examples[k] * loss for k, loss in told.items()) / total if total else None


def in_order(results: Iterable[Answer | Failure | Total], ids: Sequence[str]) -> Iterator[Answer | Failure | Total]:
    """Results by the order of ids, whatever the order they came in; ids without a result are passed over.

    The first result of a client stands, and one that nobody asked for is passed over.
    """
    waiting: dict[str, Answer | Failure] = {}
    expected, order = set(ids), iter(ids)
    want = next(order, None)
    for result in results:
        if isinstance(result, Total):
            yield result
            continue
        if result.client.id in expected:
            expected.remove(result.client.id)
            waiting[result.client.id] = result
        del result  # or this frame would keep it while the next one is trained
        while want is not None and want in waiting:
            yield waiting.pop(want)
            want = next(order, None)
    yield from (waiting.pop(key) for key in ids if key in waiting)


class _Once(Iterator[Upload]):
    """The uploads of an `Each`: a stream that says so when it is read a second time."""

    def __init__(self, inside: Iterator[Upload]) -> None:
        self._inside, self._ended = inside, False

    def __iter__(self) -> Iterator[Upload]:
        if self._ended:
            raise MethodError(
                "the uploads of Each were read twice: they are a stream, keep what you need or make a list of them"
            )
        return self

    def __next__(self) -> Upload:
        try:
            return next(self._inside)
        except StopIteration:
            self._ended = True
            raise

    def drain(self) -> None:
        """Read what was not read: every visit is part of the round."""
        for _ in self._inside:
            pass


class _Conversation:
    """One round's exchanges, with the clients that are still in it."""

    def __init__(self, visits: Visits, round: Round, record: Record, max_norm: float | None, quorum: int) -> None:
        self.visits, self.round, self.record = visits, round, record
        self.max_norm, self.least = max_norm, max(1, min(quorum, len(round.clients)))
        self.live = list(round.clients)

    def answer(self, asked: object) -> Averaged | Trained | Iterator[Upload]:
        """What the server's coroutine is sent for what it awaits."""
        if isinstance(asked, Work):
            return self.train(asked)
        if isinstance(asked, Mean):
            return self.mean(asked)
        if isinstance(asked, Each):
            return _Once(self.uploads(asked))
        raise MethodError(
            f"the server awaited {type(asked).__name__}, expected Mean, Each or Work (there is no event loop here)"
        )

    def train(self, work: Work) -> Trained:
        """Work on the server's own data."""
        done = self.visits.serve(work)
        if self.record.stage == "none":
            self.record.stage, self.record.clients = "server", ["server"]
            self.record.metrics["server"] = done.metrics | {"loss": done.loss}
            self.record.examples["server"] = 1
        return done

    def jobs(self, x: Exchange[Any], expected: dict[str, spec.Spec]) -> Iterator[Job]:
        """What every client still in the round is sent, its bytes counted."""
        if self.record.stage != "clients":
            self.record.stage, self.record.clients = "clients", [client.id for client in self.round.clients]
            self.record.metrics.pop("server", None)
        for client in self.live:
            received = x.send(client)
            self.record.per_client.setdefault(client.id, [0, 0])[0] += self.record.down.count(received)
            expected[client.id] = x.expects(client, received)
            yield client, received
            del received

    def results(self, x: Exchange[Any]) -> Iterator[Answer | Total]:
        """The usable results of an exchange in the order of ids; who failed is dropped from the round with the reason.

        Raises RoundError at the end if there were too few.
        """
        expected: dict[str, spec.Spec] = {}
        used: list[Client] = []
        asked = self.live
        for result in in_order(self.visits.exchange(self.jobs(x, expected), x), [client.id for client in asked]):
            if isinstance(result, Total):
                for key, by_role in result.bytes_up.items():
                    self.record.per_client[key][1] += self.record.up.add(by_role)
                used += result.clients
                yield result
            elif isinstance(result, Failure):
                self.record.dropped[result.client.id] = result.reason
            elif self._usable(result, expected.pop(result.client.id)):
                used.append(result.client)
                yield result
            del result
        self.live, there = used, {client.id for client in used}
        for client in asked:
            if client.id not in there:
                self.record.dropped.setdefault(client.id, "no answer")
        if len(used) < self.least:
            raise self._short(len(used))

    def _usable(self, result: Answer, want: spec.Spec) -> bool:
        key, record = result.client.id, self.record
        record.per_client[key][1] += record.up.count(result.state)
        if why := spec.reject_reason(want, result.state, self.max_norm):
            record.dropped[key] = why
            return False
        record.metrics[key] = result.metrics
        record.examples[key] = result.client.examples
        return True

    def _short(self, count: int) -> RoundError:
        t, dropped = self.round.t, self.record.dropped
        reasons = "; ".join(f"{k}: {why}" for k, why in list(dropped.items())[:5]) or "none answered"
        return RoundError(
            f"round {t}: {count} of {len(self.round.clients)} clients sent a usable update, expected at least {self.least} "
            f"({reasons}). The checkpoint of round {t - 1} stands: change what caused this (a smaller train.lr, nodes that "
            "are missing, a smaller engine.quorum?) and resume"
        )

    def uploads(self, x: Exchange[Any]) -> Iterator[Upload]:
        """The lifted uploads, one by one."""
        for result in self.results(x):
            if isinstance(result, Total):
                raise MethodError("the method awaits Each: it reads every upload, and this engine gives sums alone")
            yield Upload(result.client, x.lift(result.client, result.state), x.weight(result.client), result.metrics)
            del result

    def mean(self, x: Mean) -> Averaged:
        """The weighted mean of the lifted uploads, one of them held at a time."""
        mean, clients = lora.Mean(), []
        total: Total | None = None
        for result in self.results(x):  # to its end, where it is known who is dropped
            if isinstance(result, Total):
                total = result
            else:
                mean.add(x.lift(result.client, result.state), x.weight(result.client))
                clients.append(result.client)
            del result
        if total is not None:
            return _mean_of_total(x, total)
        return Averaged(mean.value, tuple(clients), mean.weight)


def _mean_of_total(x: Mean, total: Total) -> Averaged:
    """From a secure sum: lift is affine, clients summed its linear part, and what it adds of the server's own is lift(0)."""
    weight = sum(x.weight(client) for client in total.clients)
    own = lora.Mean()
    for client in total.clients:
        want = x.expects(client, x.send(client))
        if why := spec.secret_sum_obstacle(want):
            raise MethodError(
                f"{why}: a secure sum needs shapes that the server knows; let the client fill up with zeros"
            )
        own.add(x.lift(client, spec.zeros(want)), x.weight(client))
    # A role that clients do not sum is the server's own alone, such as the masks of what they hold.
    state = {
        role: {site: x + total.state[role][site] / weight if role in total.state else x for site, x in group.items()}
        for role, group in own.value.items()
    }
    return Averaged(state, total.clients, weight)


def one_round(
    method: Method,
    engine: Engine,
    state: State,
    clients: Sequence[Client],
    t: int,
    *,
    federation: int = 0,
    max_norm: float | None = None,
    quorum: int = 1,
) -> tuple[State, Record]:
    """Round t with the clients given. `state` is not changed. Nothing of a round that raises is kept: do it again.

    Raises RoundError if fewer uploads can be used than `quorum`, or than there are clients if those are fewer; MethodError if
    the method breaks the interface.
    """
    start = time.perf_counter()
    chosen = tuple(sorted(clients, key=lambda client: client.id))
    round = Round(t, chosen, federation or len(chosen), engine.sites)
    record = Record(t, report=round.report)
    visits = engine.visits(method, round)
    talk = _Conversation(visits, round, record, max_norm, quorum)
    flow = method.server(state, round)
    if not inspect.iscoroutine(flow):
        raise MethodError(f"{method.name}.server is no coroutine function: write `async def server`")
    answer: object = None
    try:
        while True:
            ended, asked = _step(flow, answer)
            if isinstance(answer, _Once):
                answer.drain()
            if ended:
                break
            answer = talk.answer(asked)
    finally:
        flow.close()
    if not isinstance(asked, dict):
        raise MethodError(f"{method.name}.server returned {type(asked).__name__}, expected the next state")
    visits.close([client.id for client in talk.live])
    after: State = asked
    record.seconds = time.perf_counter() - start
    return after, record


def _step(flow: Coroutine[Any, Any, State], answer: object) -> tuple[bool, object]:
    """(ended, what the coroutine returned or awaits)."""
    try:
        return False, flow.send(answer)
    except StopIteration as stop:
        return True, stop.value


def federate(
    method: Method,
    engine: Engine,
    state: State,
    clients: Sequence[Client],
    rounds: int,
    *,
    start: int = 1,
    sample: Sampler = all_clients,
    max_norm: float | None = None,
    quorum: int = 1,
    on_round: Callable[[State, Record], None] = lambda state, record: None,
) -> State:
    """Rounds `start` to `rounds`; `on_round` sees the state after each. Returns the last state."""
    everybody = sorted(clients, key=lambda client: client.id)
    for t in range(start, rounds + 1):
        chosen = sample(everybody, t)
        state, record = one_round(
            method, engine, state, chosen, t, federation=len(everybody), max_norm=max_norm, quorum=quorum
        )
        on_round(state, record)
    return state
