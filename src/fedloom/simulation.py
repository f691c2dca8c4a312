"""The simulator: all clients in this process, many of them in one pass over one frozen base, their visits in lock step.

A cohort is a generator: it says what to train, a `Fit`, and is sent what became of it. Who trains is a choice of its own: the
trainer of this process, one cohort after the other, or workers elsewhere, a cohort each.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

from fedloom.checkpoint import ClientStates
from fedloom.client import Client, Failure
from fedloom.core import Exchange, Method, Round, Send, Trained, Visit, Work
from fedloom.engine import Answer, Job, Total, asked_too_often, ended_too_soon
from fedloom.errors import ConfigError, MethodError, RoundError
from fedloom.exhaustion import exhausted
from fedloom.rng import generator
from fedloom.state import Sites, State, finite

Rows = TypeVar("Rows")
"""What a trainer trains on: a client's encoded rows."""
Taken = TypeVar("Taken", contravariant=True)

T = TypeVar("T")

Flow = Coroutine[Any, Any, tuple[State, State]]


class LocalTrainer(Protocol[Taken]):
    """What the simulator asks of a trainer."""

    def fit(self, works: Sequence[tuple[Client, Work]], data: Sequence[Taken], t: int, part: int = 0) -> list[Trained]:
        """Train many clients' works together, in their order. `part` counts the works of a visit, and keys their batches."""
        ...


@dataclass(frozen=True)
class Fit:
    """Works to train together: the arguments of `LocalTrainer.fit`."""

    works: Sequence[tuple[Client, Work]]
    data: Sequence[Any]
    t: int
    part: int


@dataclass(frozen=True)
class Fitted:
    """What became of a `Fit`."""

    trained: list[Trained]
    seconds: float
    halves: tuple[int, ...] = ()
    """Clients of a half, each time that memory did not hold them all."""
    worker: int = 0
    """Who trained."""


class Drive(Protocol):
    """Has trained what cohorts ask for, until each returns its result; results come in the order of the cohorts."""

    def __call__(self, cohorts: Iterable[Generator[Fit, Fitted, T]]) -> Iterator[T]: ...


def fit(trainer: LocalTrainer[Any], asked: Fit) -> Fitted:
    """Train in one pass; where the device has no memory for it, in two halves, and so on."""
    start = time.perf_counter()
    trained, halves = _fit(trainer, asked.works, asked.data, asked.t, asked.part)
    return Fitted(trained, time.perf_counter() - start, halves)


def _fit(
    trainer: LocalTrainer[Any], works: Sequence[tuple[Client, Work]], data: Sequence[Any], t: int, part: int
) -> tuple[list[Trained], tuple[int, ...]]:
    try:
        return trainer.fit(works, data, t, part), ()
    except (MemoryError, RuntimeError) as error:
        if not exhausted(error):
            raise
        if len(works) < 2:
            raise RoundError(
                f"there is no memory to train even one client at a time (round {t}): lower train.batch_size or "
                "task.max_length, set model.checkpointing = true, or choose a smaller model.dtype or model"
            ) from error
    # Outside the handler, whose error holds on to what was computed.
    half = (len(works) + 1) // 2
    first, more = _fit(trainer, works[:half], data[:half], t, part)
    second, others = _fit(trainer, works[half:], data[half:], t, part)
    return first + second, (half, *more, *others)


def one_by_one(trainer: LocalTrainer[Any]) -> Drive:
    """Train cohorts on one trainer, one after the other."""

    def drive(cohorts: Iterable[Generator[Fit, Fitted, T]]) -> Iterator[T]:
        for cohort in cohorts:
            yield until_done(partial(fit, trainer), cohort)
            del cohort  # or this frame would keep it while the next one is trained

    return drive


def until_done(train: Callable[[Fit], Fitted], cohort: Generator[Fit, Fitted, T]) -> T:
    """Train what one cohort asks for until it returns."""
    try:
        asked = next(cohort)
        while True:
            asked = cohort.send(train(asked))
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        cohort.close()


class Simulation(Generic[Rows]):
    """An engine whose clients are here, in cohorts of `cohort` that train together.

    `data` gives a client's rows; `fresh` is what a client that never took part keeps (the common head); `proxy` is the server
    as a client with rows of its own; `secret` keys the clients' secret generators, None draws them from the operating system;
    `score` evaluates models of clients, (client id, work), and `write` exports one. `drive` has cohorts trained and `each` maps
    over groups of clients that are scored: by default one after the other, on `trainer`. What is put into `notes` goes into
    the record.
    """

    def __init__(
        self,
        trainer: LocalTrainer[Rows],
        sites: Sites,
        data: Callable[[str], Rows],
        *,
        client_states: ClientStates | None = None,
        fresh: State | None = None,
        cohort: int = 16,
        proxy: Client | None = None,
        secret: int | None = None,
        score: Callable[[Sequence[tuple[str, Work]]], list[dict[str, float]]] = lambda works: [{} for _ in works],
        write: Callable[[str, Work], None] = lambda client, work: None,
        progress: Callable[[int], None] = lambda count: None,
        drive: Drive | None = None,
        each: Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]] = map,
        notes: list[str] | None = None,
    ) -> None:
        self.sites, self.data = sites, data
        self.drive: Drive = drive or one_by_one(trainer)
        self.each, self.notes = each, [] if notes is None else notes
        self.client_states = client_states or ClientStates()
        self.fresh = fresh or {}
        self.cohort, self.proxy, self.secret = cohort, proxy, secret
        self.score, self.write, self.progress = score, write, progress
        self._noting = threading.Lock()
        self._train_s: dict[int, float] = {}
        self._halved = 0

    def own(self, client: str) -> State:
        """What the client keeps: what it stored last, or the fresh state."""
        stored = self.client_states.get(client)
        return self.fresh if stored is None else stored

    def visit(self, client: Client, t: int) -> Visit:
        """A client's part in round t."""
        if self.secret is None:
            return Visit(t, client, self.sites)
        return Visit(t, client, self.sites, generator(self.secret, t, client.id, "secret"))

    def model(self, method: Method, job: Job, t: int) -> Work:
        """The client's own model as it stands after round t."""
        client, received = job
        return method.model(received, self.own(client.id), self.visit(client, t))

    def visits(self, method: Method, round: Round) -> LocalVisits[Rows]:
        return LocalVisits(self, method, round)

    def personal(self, method: Method, jobs: Iterable[Job], t: int) -> Iterator[Answer | Failure]:
        async def alone(client: Client, received: State) -> tuple[State, State]:
            return {}, await method.personal(received, self.own(client.id), self.visit(client, t))

        visits = LocalVisits(self, method, Round(t, (), 0, self.sites), alone)
        yield from visits.run(jobs)
        visits.close(())

    def scores(self, method: Method, jobs: Iterable[Job], t: int, common: bool = False) -> dict[str, dict[str, float]]:
        def asking(client: Client) -> Client:
            return Client(client.id, client.examples, method.rank) if common else client

        def scored(some: Sequence[Job]) -> list[tuple[str, dict[str, float]]]:
            works = [(client.id, self.model(method, (asking(client), sent), t)) for client, sent in some]
            return [(client, found) for (client, _), found in zip(works, self.score(works), strict=True)]

        stream = iter(jobs)
        cohorts = iter(lambda: list(islice(stream, self.cohort)), [])
        return dict(one for cohort in self.each(scored, cohorts) for one in cohort)

    def export(self, method: Method, jobs: Iterable[Job], t: int) -> None:
        keeping = set(self.client_states.clients())
        for job in jobs:
            if job[0].id in keeping or method.serves_personal_models:
                self.write(job[0].id, self.model(method, job, t))

    def stats(self) -> dict[str, Any]:
        """`train_s` is that of the worker that trained longest."""
        said: dict[str, Any] = {"train_s": round(max(self._train_s.values(), default=0.0), 4)}
        if self._halved:
            said |= {"out_of_memory": self._halved, "cohort": self.cohort}
        if self.notes:
            said["notes"] = self.notes.copy()
        self._train_s, self._halved = {}, 0
        self.notes.clear()
        return said

    def note(self, fitted: Fitted) -> None:
        """Take down what a training took. Where memory did not hold a cohort, none is as large from then on."""
        with self._noting:
            self._train_s[fitted.worker] = self._train_s.get(fitted.worker, 0.0) + fitted.seconds
            self._halved += len(fitted.halves)
            self.cohort = min(self.cohort, *fitted.halves, self.cohort)
        self.progress(len(fitted.trained))


@dataclass
class _Open:
    """A visit that goes on."""

    client: Client
    flow: Flow
    value: Any = None
    """What it is sent next."""
    parts: int = 0
    """Works that it has had trained."""
    metrics: dict[str, float] = field(default_factory=dict)


class LocalVisits(Generic[Rows]):
    """The visits of one round, in lock step: a cohort's first works are trained together, then its second ones."""

    def __init__(
        self,
        engine: Simulation[Rows],
        method: Method,
        round: Round,
        start: Callable[[Client, State], Flow] | None = None,
    ) -> None:
        self.engine, self.method, self.round = engine, method, round
        self._start = start or self._client
        self._waiting: dict[str, _Open] = {}
        self._ended: set[str] = set()
        engine.client_states.discard()

    def exchange(self, jobs: Iterable[Job], x: Exchange[Any]) -> Iterator[Answer | Failure | Total]:
        return iter(self.run(jobs))

    def run(self, jobs: Iterable[Job]) -> Iterator[Answer | Failure]:
        """Begin or go on with each job's visit until it sends something."""
        for answers in self.engine.drive(self._cohorts(jobs)):
            while answers:
                yield answers.pop(0)

    def _cohorts(self, jobs: Iterable[Job]) -> Iterator[Generator[Fit, Fitted, list[Answer | Failure]]]:
        stream = iter(jobs)
        while group := list(islice(stream, self.engine.cohort)):
            cohort = self._cohort(group)
            del group
            yield cohort
            del cohort  # or this frame would keep it while it is trained

    def _cohort(self, group: list[Job]) -> Generator[Fit, Fitted, list[Answer | Failure]]:
        # Visits begin here: a cohort that is dropped before it is trained has none that was never awaited.
        live = [self._opened(client, received) for client, received in group]
        del group
        done: dict[str, Answer | Failure] = {}
        order = [one.client.id for one in live]
        try:
            yield from self._lock_step(live, done)
        except BaseException:
            for one in live:
                one.flow.close()
            raise
        return [done[key] for key in order]

    def _trained(self, works: Sequence[tuple[Client, Work]], part: int) -> Generator[Fit, Fitted, list[Trained]]:
        fitted = yield Fit(works, [self.engine.data(client.id) for client, _ in works], self.round.t, part)
        self.engine.note(fitted)
        return fitted.trained

    def serve(self, work: Work) -> Trained:
        if (server := self.engine.proxy) is None:
            raise ConfigError(
                f"{self.method.name} trains on the server's own data in round {self.round.t}, but there is none: "
                "name its rows, task.proxy_data"
            )
        [[done]] = self.engine.drive([self._trained([(server, work)], 0)])
        return done

    def close(self, live: Collection[str]) -> None:
        waiting = ", ".join(key for key in self._waiting if key in live)
        for one in self._waiting.values():
            one.flow.close()
        self._waiting = {}
        if waiting:
            raise ended_too_soon(self.round.t, waiting)
        self.engine.client_states.commit()

    def _client(self, client: Client, received: State) -> Flow:
        return self.method.client(received, self.engine.own(client.id), self.engine.visit(client, self.round.t))

    def _opened(self, client: Client, received: State) -> _Open:
        if (one := self._waiting.pop(client.id, None)) is not None:
            one.value = received
            return one
        if client.id in self._ended:
            raise asked_too_often(self.round.t, client)
        flow = self._start(client, received)
        if not inspect.iscoroutine(flow):
            raise MethodError(f"{self.method.name}.client is no coroutine function: write `async def client`")
        return _Open(client, flow)

    def _lock_step(self, live: list[_Open], done: dict[str, Answer | Failure]) -> Generator[Fit, Fitted, None]:
        while live:
            asked = [(one, work) for one in live if (work := self._advance(one, done)) is not None]
            live = [one for one, _ in asked]
            for part in sorted({one.parts for one in live}):
                now = [(one, work) for one, work in asked if one.parts == part]
                trained = yield from self._trained([(one.client, work) for one, work in now], part)
                for (one, _), result in zip(now, trained, strict=True):
                    one.value, one.parts = result, part + 1
                    # The first work's are the client's: what follows it trains something of its own.
                    one.metrics = one.metrics or result.metrics | {"loss": result.loss}
            del asked

    def _advance(self, one: _Open, done: dict[str, Answer | Failure]) -> Work | None:
        """The work that the visit awaits next, or None if it answered."""
        value, one.value = one.value, None
        try:
            asked = one.flow.send(value)
        except StopIteration as stop:
            self._ended.add(one.client.id)
            done[one.client.id] = self._returned(one, stop.value)
            return None
        except Exception as error:
            error.add_note(f"in the visit of client {one.client.id!r}, round {self.round.t}, after {one.parts} works")
            raise
        if isinstance(asked, Work):
            return asked
        if isinstance(asked, Send):
            self._waiting[one.client.id] = one
            done[one.client.id] = Answer(one.client, asked.state, one.metrics)
            return None
        one.flow.close()
        raise MethodError(f"{self.method.name}.client awaited {type(asked).__name__}, expected Work or Send")

    def _returned(self, one: _Open, value: object) -> Answer | Failure:
        if not (isinstance(value, tuple) and len(value) == 2 and all(isinstance(x, dict) for x in value)):
            raise MethodError(f"{self.method.name}.client returned {type(value).__name__}, expected (sent, kept)")
        sent, keeps = value
        if not finite(keeps):
            # What a client keeps is its own for ever: a NaN would never leave it.
            return Failure(one.client, "training diverged: what the client would keep is not finite")
        self.engine.client_states.stage(one.client.id, keeps, self.round.t)
        return Answer(one.client, sent, one.metrics)
