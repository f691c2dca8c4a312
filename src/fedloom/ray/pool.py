"""A pool of actors: a call goes to whoever is free, and if its actor is lost, to another."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from fedloom.errors import RoundError
from fedloom.ray import pickles
from fedloom.simulation import Fit, Fitted, until_done

S = TypeVar("S")
T = TypeVar("T")

TRIES = 3
"""Workers that a call may cost: one that takes all the memory there is would take it from the next, too."""


_AGAIN_S = 0.2


class Pool:
    """Calls to actors that all hold the same. `check` raises for an actor, started anew, that does not.

    A lost actor is started again by Ray, and takes part once it answers, within `patience_s`. `notes` says so of each.
    """

    def __init__(
        self,
        actors: Sequence[Any],
        patience_s: float,
        check: Callable[[Any], None] = lambda said: None,
    ) -> None:
        self.size, self.notes = len(actors), list[str]()
        self._actors, self._patience_s, self._check = actors, patience_s, check
        self._free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._alive, self._lock = len(actors), threading.Lock()
        for i in range(len(actors)):
            self._free.put(i)

    def call(self, name: str, *args: Any, who: str = "") -> Any:
        """The result of a method, from the next actor that is free; (worker, result). From any thread.

        `who` is named in the record if an actor is lost. Raises what the method raised; RoundError if nobody is left.
        """
        from ray.exceptions import RayActorError, RayTaskError

        import ray

        packed = pickles.dumps(args)
        for _ in range(TRIES):
            worker = self._take()
            try:
                result = ray.get(self._actors[worker].call.remote(name, packed))
            except RayTaskError as error:
                self._free.put(worker)
                raise error.cause from None
            except RayActorError as error:
                self._lost(worker, who, error)
                continue
            except BaseException:  # interrupted: nobody waits for the answer
                self._free.put(worker)
                raise
            self._free.put(worker)
            return worker, pickles.loads(result)
        raise RoundError(
            f"{who or name} lost {TRIES} workers, one after the other: a smaller engine.cohort may help if they had no memory. "
            "The last checkpoint stands: resume"
        )

    def drive(self, cohorts: Iterable[Generator[Fit, Fitted, T]]) -> Iterator[T]:
        """Have cohorts trained by whoever is free, and yield their results in the order of the cohorts."""
        return self.each(partial(until_done, self._fit), cohorts)

    def each(self, function: Callable[[S], T], values: Iterable[S]) -> Iterator[T]:
        """As `map`: the function, which calls the pool, on as many values at once as there are workers.

        Values are pulled in this thread, and not more than twice as many as there are workers ahead of what is read.
        """
        stream, threads = iter(values), ThreadPoolExecutor(self.size, "fedloom-pool")
        try:
            going = deque(threads.submit(function, x) for x in islice(stream, 2 * self.size))
            while going:
                yield going.popleft().result()
                going.extend(threads.submit(function, x) for x in islice(stream, 1))
        finally:  # of an error, or an interruption: calls that go on end with the actors
            threads.shutdown(wait=False, cancel_futures=True)

    def _fit(self, asked: Fit) -> Fitted:
        worker: int
        fitted: Fitted
        worker, fitted = self.call("fit", asked, who=", ".join(client.id for client, _ in asked.works))
        return replace(fitted, worker=worker)

    def _take(self) -> int:
        worker = self._free.get()
        if worker is None:
            self._free.put(None)  # for whoever else waits
            raise RoundError(
                f"all {self.size} workers are lost ({'; '.join(self.notes[-3:])}). The last checkpoint stands: resume"
            )
        return worker

    def _lost(self, worker: int, who: str, error: Exception) -> None:
        """Let an actor come back in its own time."""
        self.notes.append(f"worker {worker} was lost{f': {who} went to another' if who else ''}")
        threading.Thread(target=self._back, args=(worker,), daemon=True).start()

    def _back(self, worker: int) -> None:
        try:
            self._check(self._hello(self._actors[worker]))
        except Exception as error:  # whatever became of it: it takes no part
            self.notes.append(f"worker {worker} did not come back: {type(error).__name__}")
            with self._lock:
                self._alive -= 1
                if self._alive == 0:
                    self._free.put(None)
            return
        self._free.put(worker)

    def _hello(self, actor: Any) -> Any:
        """What an actor says once it is started again: until then, calls to it fail."""
        from ray.exceptions import ActorUnavailableError

        import ray

        until = time.monotonic() + self._patience_s
        while True:
            try:
                return ray.get(actor.hello.remote(), timeout=max(0.0, until - time.monotonic()))
            except ActorUnavailableError:
                if time.monotonic() > until:
                    raise
                time.sleep(_AGAIN_S)
