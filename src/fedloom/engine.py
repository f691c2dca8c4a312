"""What an engine is: it runs visits, wherever clients are. The simulator is one, Flower another."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedloom.checkpoint import ClientStates
from fedloom.client import Client, Failure
from fedloom.core import Exchange, Method, Round, Trained, Work
from fedloom.errors import MethodError
from fedloom.state import Sites, State

Job = tuple[Client, State]
"""A client and what the server sends it."""


@dataclass(frozen=True)
class Answer:
    """What one client sent in an exchange."""

    client: Client
    state: State
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Total:
    """A secure sum: sum of weight * spread(upload) over clients. Nothing is known of one of them but its bytes."""

    clients: tuple[Client, ...]
    state: State
    bytes_up: dict[str, dict[str, int]]
    """Client id -> role -> bytes that it sent."""


class Visits(Protocol):
    """The visits of one round: they outlive an exchange if a client awaits `Send`."""

    def exchange(self, jobs: Iterable[Job], x: Exchange[Any]) -> Iterator[Answer | Failure | Total]:
        """Send, train, and yield what comes back, in any order; or one Total. Jobs are pulled one cohort at a time."""
        ...

    def serve(self, work: Work) -> Trained:
        """Train on the server's own data."""
        ...

    def close(self, live: Collection[str]) -> None:
        """The round is done: what its clients keep counts from now on.

        Raises MethodError if the visit of a client in `live`, those still in the round, waits for a further exchange.
        """
        ...


class Engine(Protocol):
    """Runs visits, and what comes after the rounds on clients' own models."""

    @property
    def sites(self) -> Sites:
        """The adapted layers."""
        ...

    @property
    def client_states(self) -> ClientStates:
        """What clients keep here, for checkpoints; empty where it stays with them."""
        ...

    def visits(self, method: Method, round: Round) -> Visits:
        """Open a round."""
        ...

    def personal(self, method: Method, jobs: Iterable[Job], t: int) -> Iterator[Answer | Failure]:
        """The phase after the last round, of a method that has one; answers hold no tensors."""
        ...

    def scores(self, method: Method, jobs: Iterable[Job], t: int, common: bool = False) -> dict[str, dict[str, float]]:
        """Client id -> scores of its own model after round t, of those that can be asked.

        With `common`, of the model that the server would use of what they are sent, whatever their budgets.
        """
        ...

    def export(self, method: Method, jobs: Iterable[Job], t: int) -> None:
        """Write the model of every client that has one of its own: it keeps something, or is served it."""
        ...

    def stats(self) -> dict[str, Any]:
        """What happened since the last call, for the record: `train_s`, seconds of training, and an engine's own."""
        ...


def ended_too_soon(t: int, waiting: str) -> MethodError:
    """The server's coroutine returned while clients wait."""
    return MethodError(
        f"round {t} ended while clients {waiting} await an answer to Send: "
        "`server` must await one exchange more than `client` sends"
    )


def asked_too_often(t: int, client: Client) -> MethodError:
    """The server's coroutine awaits an exchange that a client's has no part in."""
    return MethodError(
        f"round {t} goes on, but the visit of client {client.id!r} has ended: "
        "`client` must await Send once for each exchange but the last"
    )
