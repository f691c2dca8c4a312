"""The federated round, for every method and engine: drives the server's coroutine and answers what it awaits."""

from __future__ import annotations

import inspect
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fedloom import lora, spec
from fedloom.client import Client, Failure
from fedloom.communication import ByteCount
from fedloom.core import Averaged, Each, Exchange, Mean, Method, Round, Trained, Upload, Work
from fedloom.engine import Answer, Engine, Job, Total, Visits
from fedloom.errors import MethodError, RoundError, VoidRound
from fedloom.sampling import Sampler, all_clients
from fedloom.screening import RECENT, Moved, Screen, movement, step_fault
from fedloom.state import State, only


@dataclass(frozen=True)
class Limits:
    """What an upload and a round must keep to."""

    max_norm: float | None = None
    """Largest norm of an upload."""
    max_ratio: float | None = 10.0
    """How many times as far as the median client's an upload may move the model; None for no bound."""
    quorum: int = 1
    """Usable uploads that a round needs, or all of its clients' if those are fewer."""


DEFAULT = Limits()
MOST_VOID = 2
"""Void rounds in a row that end a run."""


@dataclass
class Record:
    """What happened in one round."""

    t: int
    stage: str = "none"
    """Who trained: `clients`, `server` on its own data, `none`, or `personal` after the last round; `void` if it failed and
    must not be done again."""
    clients: list[str] = field(default_factory=list)
    """Who was asked."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Client id -> why its upload was not used."""
    suspicious: dict[str, float] = field(default_factory=dict)
    """Client id -> how many times as far as the median one it moved the model, where that is much but allowed."""
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
        told = {k: m["loss"] for k, m in self.metrics.items() if "loss" in m and m.get("steps") != 0}
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

    def __init__(self, visits: Visits, round: Round, record: Record, limits: Limits) -> None:
        self.visits, self.round, self.record, self.limits = visits, round, record, limits
        self.least = max(1, min(limits.quorum, len(round.clients)))
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
        used: list[Client] = []
        asked = self.live
        screen: Screen[Answer | Total] = Screen(self.limits.max_ratio, self._refuse, self.record.suspicious)
        for result in screen.usable(self._checked(x)):
            used += result.clients if isinstance(result, Total) else [result.client]
            yield result
            del result
        self.live, there = used, {client.id for client in used}
        for client in asked:
            if client.id not in there:
                self.record.dropped.setdefault(client.id, "no answer")
        if len(used) < self.least:
            raise self._short(len(used))

    def _checked(self, x: Exchange[Any]) -> Iterator[Moved[Answer | Total]]:
        """The results that are what was expected, with how far they move the model."""
        expected: dict[str, spec.Spec] = {}
        for result in in_order(self.visits.exchange(self.jobs(x, expected), x), [client.id for client in self.live]):
            if isinstance(result, Total):
                for key, by_role in result.bytes_up.items():
                    self.record.per_client[key][1] += self.record.up.add(by_role)
                yield Moved(result.clients[0], 0.0, result)
                continue
            client, record = result.client, self.record
            if isinstance(result, Failure):
                record.dropped[client.id] = result.reason
                continue
            record.per_client[client.id][1] += record.up.count(result.state)
            if why := spec.reject_reason(expected.pop(client.id), result.state, self.limits.max_norm):
                record.dropped[client.id] = why
                continue
            record.metrics[client.id] = result.metrics
            record.examples[client.id] = client.examples
            known = self.limits.max_ratio is not None
            yield Moved(client, movement(result.state, x.send(client)) if known else 0.0, result)
            del result

    def _refuse(self, client: Client, why: str) -> None:
        """Drop a client whose upload looked as expected, but is unlike the others."""
        self.record.dropped[client.id] = why
        self.record.metrics.pop(client.id, None)
        self.record.examples.pop(client.id, None)

    def _short(self, count: int) -> RoundError:
        t, dropped = self.round.t, self.record.dropped
        reasons = "; ".join(f"{k}: {why}" for k, why in list(dropped.items())[:5]) or "none answered"
        return RoundError(
            f"round {t}: {count} of {len(self.round.clients)} clients sent a usable update, expected at least {self.least} "
            f"({reasons}). The checkpoint of round {t - 1} stands: change what caused this (a smaller train.lr, nodes that "
            "are missing or late, a smaller engine.quorum?) and resume"
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
    limits: Limits = DEFAULT,
    recent_steps: Sequence[float] = (),
) -> tuple[State, Record]:
    """Round t with the clients given. `state` is not changed. Nothing of a round that raises is kept: do it again.

    `recent_steps` are norms of the server's last steps (`report["step_norm"]`). Raises RoundError if fewer uploads can be used
    than the quorum, or the next state is not finite or unlike recent ones; MethodError if the method breaks the interface.
    """
    start = time.perf_counter()
    chosen = tuple(sorted(clients, key=lambda client: client.id))
    round = Round(t, chosen, federation or len(chosen), engine.sites)
    record = Record(t, report=round.report)
    visits = engine.visits(method, round)
    talk = _Conversation(visits, round, record, limits)
    flow = method.server(state, round)
    if not inspect.iscoroutine(flow):
        raise MethodError(f"{method.name}.server is no coroutine function: write `async def server`")
    answer: object = None
    try:
        while True:
            ended, asked = _step(flow, answer, t)
            if isinstance(answer, _Once):
                answer.drain()
            if ended:
                break
            answer = talk.answer(asked)
    finally:
        flow.close()
    if not isinstance(asked, dict):
        raise MethodError(f"{method.name}.server returned {type(asked).__name__}, expected the next state")
    after: State = asked
    record.report["step_norm"] = step = movement(only(after, *state), state)
    if why := step_fault(step, recent_steps, limits.max_ratio):
        raise RoundError(
            f"round {t}: {why}. {_stands(t)}: a smaller train.lr or clients.max_ratio may help; then resume"
        )
    visits.close([client.id for client in talk.live])
    record.seconds = time.perf_counter() - start
    return after, record


def _step(flow: Coroutine[Any, Any, State], answer: object, t: int) -> tuple[bool, object]:
    """(ended, what the coroutine returned or awaits)."""
    try:
        return False, flow.send(answer)
    except StopIteration as stop:
        return True, stop.value
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise RoundError(f"round {t}: the uploads could not be put together ({error}). {_stands(t)}; resume") from error


def _stands(t: int) -> str:
    return f"Nothing of round {t} is kept, the checkpoint of round {t - 1} stands"


def federate(
    method: Method,
    engine: Engine,
    state: State,
    clients: Sequence[Client],
    rounds: int,
    *,
    start: int = 1,
    sample: Sampler = all_clients,
    limits: Limits = DEFAULT,
    recent_steps: Sequence[float] = (),
    on_round: Callable[[State, Record], None] = lambda state, record: None,
) -> State:
    """Rounds `start` to `rounds`; `on_round` sees the state after each. Returns the last state.

    A round that is void leaves the state as it is, and the next one comes; the second in a row raises.
    """
    everybody = sorted(clients, key=lambda client: client.id)
    steps = deque(recent_steps, maxlen=RECENT)
    void = 0
    for t in range(start, rounds + 1):
        chosen = sample(everybody, t)
        try:
            state, record = one_round(
                method,
                engine,
                state,
                chosen,
                t,
                federation=len(everybody),
                limits=limits,
                recent_steps=list(steps),
            )
        except VoidRound as error:
            void += 1
            if void == MOST_VOID:
                raise
            record = _void(t, chosen, str(error))
        else:
            void = 0
            steps.append(record.report["step_norm"])
        on_round(state, record)
    return state


def _void(t: int, chosen: Sequence[Client], why: str) -> Record:
    ids = sorted(client.id for client in chosen)
    return Record(t, "void", ids, dict.fromkeys(ids, why))
