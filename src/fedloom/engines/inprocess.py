"""The simulator: all clients in this process, many of them in one pass over one frozen base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol

from fedloom.checkpoint import Kept
from fedloom.core import Client, Failure, Job, Method, Sites, State, Upload, Work
from fedloom.data.text import Encoded


class Fits(Protocol):
    """What the engine asks of a trainer."""

    def fit(
        self, method: Method, works: Sequence[tuple[Client, Work]], data: Sequence[Encoded], t: int
    ) -> list[tuple[State, dict[str, float]]]:
        """Train many clients' works together: the trained states and metrics, in their order."""
        ...


class InProcess:
    """Clients in cohorts of `cohort`, in the order they are given.

    `data` gives a client's rows; `fresh` is what a client that never took part keeps (the common head).
    """

    def __init__(
        self,
        trainer: Fits,
        sites: Sites,
        data: Callable[[str], Encoded],
        *,
        kept: Kept | None = None,
        fresh: State | None = None,
        cohort: int = 16,
    ) -> None:
        self.trainer = trainer
        self.sites = sites
        self.data = data
        self.kept = kept or Kept()
        self.fresh = fresh or {}
        self.cohort = cohort

    def own(self, client: str) -> State:
        """What the client keeps: what it stored last, or the fresh state."""
        stored = self.kept.get(client)
        return self.fresh if stored is None else stored

    def run(self, method: Method, jobs: Iterable[Job], t: int) -> Iterator[Upload | Failure]:
        """Train each job's client for round t."""

        def work(client: Client, received: State) -> Work:
            return method.prepare(received, self.own(client.id), self.sites, client, t)

        return self._train(method, jobs, work, t)

    def personalise(self, method: Method, jobs: Iterable[Job], t: int) -> Iterator[Upload | Failure]:
        """Train each job's client for itself, after the last round; uploads have no tensors."""

        def work(client: Client, received: State) -> Work | None:
            return method.personalise(received, self.own(client.id), self.sites, client)

        return self._train(method, jobs, work, t)

    def _train(
        self, method: Method, jobs: Iterable[Job], work: Callable[[Client, State], Work | None], t: int
    ) -> Iterator[Upload | Failure]:
        stream = iter(jobs)
        while group := list(islice(stream, self.cohort)):
            asked = [(client, received, work(client, received)) for client, received in group]
            given = [(client, received, todo) for client, received, todo in asked if todo is not None]
            if not given:
                continue
            results = self.trainer.fit(
                method,
                [(client, todo) for client, _, todo in given],
                [self.data(client.id) for client, _, _ in given],
                t,
            )
            for (client, received, todo), (trained, metrics) in zip(given, results, strict=True):
                sent, keeps = method.finish(todo, trained, received)
                if not all(x.isfinite().all() for group in keeps.values() for x in group.values()):
                    # What a client keeps is its own for ever: a NaN would never leave it.
                    yield Failure(client, "training diverged: what the client would keep is not finite")
                    continue
                self.kept.put(client.id, keeps, t)
                yield Upload(client, sent, t, metrics)
