"""Nodes and coordinators on the toy model of the methods' tests, and methods of several exchanges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from fedloom.client import Client
from fedloom.core import Failure, Mean, Method, Round, Send, Visit, Work
from fedloom.engine import Answer, Job
from fedloom.flower.codec import Form
from fedloom.flower.coordinator import Coordinator, RoundPolicy
from fedloom.flower.node_visits import NodeRun
from fedloom.flower.transport import Transport
from fedloom.flower.worker import Worker
from fedloom.privacy.secure_visits import SecureSimulation, SecureVisits
from fedloom.spec import like
from fedloom.state import Sites, State, only

from ..methods.cases import EXAMPLES, ToyTrainer, engine, update


class ToyNode:
    """What a worker works with: any client of the toy, or one of them alone."""

    def __init__(self, method: Method, clients: Sequence[Client], folder: Path, secret: int | None = 0) -> None:
        self.loads = 1
        self.run = NodeRun(
            clients,
            method,
            engine(
                ToyTrainer(),
                cohort=1,
                secret=secret,
                score=lambda works: [
                    {"loss": float(sum(x.norm() for x in update(work).values()))} for _, work in works
                ],
                write=lambda client, work: self.written.append(client),
            ),
            folder,
        )
        self.written: list[str] = []

    def setup(self, setup: dict[str, Any]) -> NodeRun:
        return self.run


def nodes(method: Method, clients: Sequence[Client], folder: Path, count: int = 2) -> list[Worker]:
    """Workers of one machine, any of which serves any client."""
    return [Worker(ToyNode(method, clients, folder)) for _ in range(count)]


def sites(method: Method, clients: Sequence[Client], folder: Path) -> list[Worker]:
    """A worker for each client, with a folder of its own."""
    return [Worker(ToyNode(method, [client], folder / client.id)) for client in clients]


def coordinator(transport: Transport, roster: Sequence[Client] | None = None, **options: Any) -> Coordinator:
    """Over a transport that answers at once; without a roster, once all four clients have announced themselves."""
    form: Form = options.pop("form", "raw")
    policy = RoundPolicy(options.pop("deadline_s", 5.0), options.pop("enough", None), form)
    made = Coordinator(transport, {"run": "toy"}, policy, engine(), roster=roster, **options)
    if roster is None:
        made.wait_for_clients(len(EXAMPLES), 5.0)
    return made


class TwoSteps(Method):
    """B is trained from the mean of A that was trained first, in one visit of two exchanges. The client keeps its last B."""

    name: ClassVar[str] = "two_steps"
    paper: ClassVar[str] = "none"
    exchanges = 2
    """Of the server."""
    rank = 4

    def init(self, sites: Sites, rng: torch.Generator) -> State:
        A = {site: torch.randn(self.rank, n, generator=rng) for site, (_, n) in sites.items()}
        return {"A": A, "B": {site: torch.zeros(m, self.rank) for site, (m, _) in sites.items()}}

    async def server(self, state: State, round: Round) -> State:
        first = await Mean(lambda c: only(state, "A", "B", "head"), lambda c, sent: like(sent, "A"))
        A, B = first.state["A"], state["B"]
        for _ in range(self.exchanges - 1):
            second = await Mean(lambda c: {"A": A}, lambda c, sent: like({"B": state["B"]}))
            B = second.state["B"]
        return state | {"A": A, "B": B}

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        shift = own.get("shift", {site: torch.zeros_like(x) for site, x in received["B"].items()})
        done = await Work(only(received, "A"), received)
        again = await Send(done.state)
        done = await Work(only(received, "B"), received | again)
        B = {site: x + 0.1 * shift[site] for site, x in done.state["B"].items()}
        for _ in range(self.more(visit)):
            await Send({"B": B})
        return {"B": B}, {"shift": B, "head": received["head"]}

    def more(self, visit: Visit) -> int:
        """How often a client awaits Send once more."""
        return 0

    def model(self, received: State, own: State, visit: Visit) -> Work:
        return Work(only(received, "A", "B", "head"))


class TooShort(TwoSteps):
    """The server asks once more than clients answer."""

    exchanges = 3


class TooLong(TwoSteps):
    """Clients wait for one exchange more than there is."""

    def more(self, visit: Visit) -> int:
        return 1


class Uneven(TwoSteps):
    """Client a alone waits for one exchange more."""

    def more(self, visit: Visit) -> int:
        return int(visit.client.id == "a")


class Absent(SecureSimulation[Any]):
    """Secure sums in this process, where some clients are lost before their upload in some rounds."""

    gone: dict[int, set[str]]

    def visits(self, method: Method, round: Round) -> SecureVisits[Any]:
        return _AbsentVisits(self, method, round, self.sums)


class _AbsentVisits(SecureVisits[Any]):
    def run(self, jobs: Iterable[Job]) -> Iterator[Answer | Failure]:
        assert isinstance(self.engine, Absent)
        gone, every = self.engine.gone.get(self.round.t, set()), list(jobs)
        yield from (Failure(client, "lost") for client, _ in every if client.id in gone)
        yield from super().run([job for job in every if job[0].id not in gone])
