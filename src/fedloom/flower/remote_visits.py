"""The visits of one round on other machines: every exchange is one message to each node."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from fedloom.client import Failure
from fedloom.core import Exchange, Method, Round, Trained, Work
from fedloom.engine import Answer, Job, Total, asked_too_often, ended_too_soon
from fedloom.flower import answers
from fedloom.flower.pending import NOTHING, Say

if TYPE_CHECKING:
    from fedloom.flower.coordinator import Coordinator


class RemoteVisits:
    """Visits that nodes hold in their memory between exchanges.

    Whether a visit waits for a further exchange is its node's word. Only if those of all the round's clients say what the
    method's server contradicts is it the method's mistake; otherwise it is theirs who say so.
    """

    def __init__(self, coordinator: Coordinator, method: Method, round: Round) -> None:
        self._coordinator, self._method, self._round = coordinator, method, round
        self._exchanges = 0
        self._waiting: set[str] = set()

    def exchange(self, jobs: Iterable[Job], x: Exchange[Any]) -> Iterator[Answer | Failure | Total]:
        self._exchanges += 1
        asked = list(jobs)
        if self._exchanges > 1:
            for client, _ in self._ended(asked):
                yield Failure(client, "its visit has ended, the others' go on")
            asked = [job for job in asked if job[0].id in self._waiting]
        yield from self._results(asked, x)

    def _results(self, jobs: list[Job], x: Exchange[Any]) -> Iterator[Answer | Failure | Total]:
        """What comes of the clients that are asked."""
        return self._answers(jobs)

    def serve(self, work: Work) -> Trained:
        return self._coordinator.local.visits(self._method, self._round).serve(work)

    def close(self, live: Collection[str]) -> None:
        waiting = [key for key in live if key in self._waiting]
        if waiting and len(waiting) == len(self._round.clients):
            raise ended_too_soon(self._round.t, ", ".join(waiting))
        if waiting:
            self._coordinator.note(f"the visits of {', '.join(waiting)} had not ended when those of the others had")

    def _ended(self, jobs: list[Job]) -> list[Job]:
        """Who cannot be asked again. Raises MethodError if nobody in the round can."""
        ended = [job for job in jobs if job[0].id not in self._waiting]
        if jobs and len(ended) == len(self._round.clients):
            raise asked_too_often(self._round.t, jobs[0][0])
        return ended

    def _answers(self, jobs: list[Job], say: Say = NOTHING) -> Iterator[Answer | Failure]:
        at, came, seconds = self._coordinator, 0, 0.0
        enough = at.policy.enough

        def done() -> bool:
            return enough is not None and came >= enough

        self._waiting.clear()
        for one in at.ask("exchange", jobs, self._round.t, self._exchanges, done, say):
            if isinstance(one, Failure):
                yield one
                continue
            seconds = max(seconds, answers.seconds(one.header))
            at.epsilons |= answers.epsilons(one)
            for result, waits in answers.results(one, at.policy.form):
                if isinstance(result, Answer):
                    came += 1
                    if waits:
                        self._waiting.add(result.client.id)
                yield result
        at.train_s += seconds
