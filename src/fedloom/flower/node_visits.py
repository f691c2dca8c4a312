"""One round's visits on a node: held in memory between exchanges, and what their clients keep on disk by round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.checkpoint import ClientStates
from fedloom.client import Client, Failure
from fedloom.core import Method, Round
from fedloom.engine import Answer, Job
from fedloom.simulation import LocalVisits, Simulation
from fedloom.state import State

if TYPE_CHECKING:
    from fedloom.flower.node_sums import NodeSums


@dataclass(frozen=True)
class NodeRun:
    """A run as a node takes part in it."""

    clients: Sequence[Client]
    """Who lives here."""
    method: Method
    simulation: Simulation[Any]
    folder: Path
    """Where what clients keep is, for this run."""
    sums: NodeSums | None = None
    """Uploads leave in secure sums alone."""
    epsilon: Callable[[str], float] | None = None
    """(client) -> what its rows have spent, where each row is private."""

    def before(self, t: int, forget: Sequence[Job] = ()) -> Simulation[Any]:
        """The simulation with what clients kept before round t: a server that was killed may ask for a round again.

        Of clients in `forget`, later files are removed.
        """
        self.simulation.client_states = ClientStates.before(self.folder / "kept", t)
        self.simulation.client_states.forget_others([client.id for client, _ in forget])
        return self.simulation


class NodeVisits:
    """The visits of round t, begun in its first exchange. They live in this process and end with it."""

    def __init__(self, run: NodeRun, t: int, jobs: Sequence[Job]) -> None:
        self.t = t
        self._method = run.method
        self._simulation = run.before(t, jobs)
        round = Round(t, tuple(client for client, _ in jobs), 0, self._simulation.sites)
        self._local = LocalVisits(self._simulation, run.method, round, self._client)
        self._waiting = {client.id for client, _ in jobs}

    def run(self, jobs: Sequence[Job]) -> list[tuple[Answer | Failure, bool]]:
        """Go on with each visit until it sends something; beside each answer, whether its visit waits for a further exchange.

        A client whose visit is not here comes as a Failure.
        """
        here = [job for job in jobs if job[0].id in self._waiting]
        lost: list[Answer | Failure] = [lost_visit(client) for client, _ in jobs if client.id not in self._waiting]
        try:
            results = [*self._local.run(here), *lost]
        except Exception:
            # A visit that raised took the others with it.
            self._waiting -= {client.id for client, _ in here}
            raise
        return [(result, result.client.id in self._waiting) for result in results]

    def close(self) -> None:
        """Let go of visits that wait still: their round is over."""
        self._local.close(())

    async def _client(self, client: Client, received: State) -> tuple[State, State]:
        visit = self._simulation.visit(client, self.t)
        returned = await self._method.client(received, self._simulation.own(client.id), visit)
        self._waiting.discard(client.id)
        return returned


def lost_visit(client: Client) -> Failure:
    """A later exchange of a visit that this process does not hold."""
    return Failure(client, "its visit was lost: the node was started again, or failed, within the round")
