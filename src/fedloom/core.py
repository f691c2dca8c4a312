"""The vocabulary of fedloom: clients, work, exchanges, and the interface of a method.

A method is two short coroutines that read like the paper's pseudo-code. **It never trains and never communicates: it awaits
values that say what to train and what to exchange.** There is no event loop (nothing of asyncio): the loop and the engines
drive the coroutines by `.send`, in any process, many in lock step, or in a test without a trainer.

    server ── Mean | Each ──► loop ── received ──► client ── Work ──► trainer
           ◄─ Averaged | uploads ──  ◄─ (sent, kept) ──    ◄─ Trained ──
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Literal, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from fedloom.client import Client as Client
from fedloom.client import Failure as Failure
from fedloom.client import check_followed
from fedloom.spec import Spec, like
from fedloom.state import Group as Group
from fedloom.state import Sites as Sites
from fedloom.state import State as State
from fedloom.state import only

T = TypeVar("T")


# what is awaited


class Awaited(Generic[T]):
    """What a coroutine awaits and is answered with a T: driven by `.send`, without an event loop."""

    def __await__(self) -> Generator[Self, T, T]:
        return (yield self)


class Factors(NamedTuple):
    """What is added to each frozen weight: scale * B diag(gate(x)) A."""

    A: Group
    """Site -> (r, in)."""
    B: Group
    """Site -> (out, r)."""
    gate: Group | None = None
    """Site -> (parts, in): softmax(gate x) weighs equal parts of the ranks, for each input x. None: no weights."""


def plain(train: State, fixed: State) -> Factors:
    """A and B as they are, whichever of the two is trained."""
    return Factors(train.get("A") or fixed["A"], train.get("B") or fixed["B"])


@dataclass(frozen=True, eq=False)
class Work(Awaited["Trained"]):
    """A model and which of its tensors to train; the answer is `Trained`. Never crosses the wire, so it may hold functions.

    They see one client's own tensors and close over none: what they need goes into `fixed`, which the trainer moves and stacks.
    """

    train: State
    """Trainable parameters, as small as what was sent."""
    fixed: State = field(default_factory=dict)
    """What `adapter` and `penalties` need besides."""
    base: State = field(default_factory=dict)
    """Offset to the frozen weights since the original model, one role each of factors: `left` (out, q) and
    `right` (q, in); a site with `left` alone carries a dense (out, in) offset."""
    scale: float = 1.0
    """Multiplies B @ A."""
    lr: float = 1.0
    """Multiplies the run's learning rate."""
    steps: int | None = None
    """Local steps; None for the run's."""
    optimizer: Literal["adamw", "sgd"] | None = None
    """Local optimiser; None for the run's. With `sgd` and one step, what changed is lr times a gradient."""
    adapter: Callable[[State, State], Factors] = plain
    """(train, fixed) -> factors, differentiable in `train`."""
    penalties: tuple[Callable[[State, State], Tensor], ...] = ()
    """Terms of the loss, (train, fixed) -> 0-d tensor; reported apart from the task's loss."""


METRICS = ("loss_max", "grad_norm_max", "steps", "samples", "tokens")
"""What a trainer reports of a client besides its loss, in this order; a node's word on anything else is passed over."""


@dataclass(frozen=True)
class Trained:
    """What became of a Work."""

    state: State
    """`Work.train`, trained."""
    steps: int
    lr_sum: float
    """Sum of the learning rates of the steps: what SCAFFOLD and FedNova divide by."""
    loss: float
    """Mean over the steps of the task's loss, penalties apart."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the task as well: by the names in `METRICS`."""


@dataclass(frozen=True, eq=False)
class Send(Awaited[State]):
    """Send this now and go on with what the server sends next, in the same round. The answer is that state."""

    state: State


@dataclass(frozen=True, eq=False)
class Exchange(Awaited[T]):
    """Every client of the round is sent something, visits, and answers. All functions run on the server."""

    send: Callable[[Client], State]
    """What a client receives. Pure: it may be asked again."""
    expects: Callable[[Client, State], Spec] = lambda client, sent: like(sent)
    """(client, what it was sent) -> what its upload must look like. Default: the floating-point roles it was sent."""
    lift: Callable[[Client, State], State] = lambda client, upload: upload
    """(client, upload) -> the upload in the space that clients share. Affine in the upload."""
    weight: Callable[[Client], float] = lambda client: float(client.examples)


@dataclass(frozen=True, eq=False)
class Mean(Exchange["Averaged"]):
    """Asks for the weighted mean of lifted uploads and nothing else: a fold, and all that a secure sum can give."""


@dataclass(frozen=True, eq=False)
class Each(Exchange[Iterator["Upload"]]):
    """Asks for the uploads one by one, lifted, in client-id order: a stream, trained as it is read, once. While reading it, do
    not rebind a name that `send`, `expects`, `lift` or `weight` closes over."""


@dataclass(frozen=True)
class Averaged:
    """The answer to `Mean`."""

    state: State
    clients: tuple[Client, ...]
    """Whose uploads are in it."""
    weight: float
    """Their total weight: `state * weight` is the sum."""


@dataclass(frozen=True)
class Upload:
    """One client's answer, checked and lifted."""

    client: Client
    state: State
    weight: float
    metrics: dict[str, float] = field(default_factory=dict)


# what a coroutine is told


def _secret() -> torch.Generator:
    """A generator that the operating system seeds."""
    rng = torch.Generator()
    rng.seed()
    return rng


@dataclass(frozen=True)
class Round:
    """The server's round."""

    t: int
    """From 1."""
    clients: tuple[Client, ...]
    """Who takes part, by id."""
    federation: int
    """How many clients there are in all: SCAFFOLD's N."""
    sites: Sites
    report: dict[str, float] = field(default_factory=dict)
    """What the method wants recorded of the round: write to it."""


@dataclass(frozen=True)
class Visit:
    """One client's part in one round."""

    t: int
    client: Client
    sites: Sites
    rng: torch.Generator = field(default_factory=_secret)
    """Secret: nobody else can draw the same. For privacy noise alone; what the server must know too is drawn from a key."""


class Method(ABC):
    """A federated method: a frozen dataclass. Pure: tensors that come in are never changed, nothing is stored in `self`.

    `server` and `client` are the method; the others have defaults.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    """Authors, title, arXiv id."""
    group: ClassVar[str] = "averaging"
    """The heading under which `fedloom methods` lists it."""
    budgets: ClassVar[frozenset[str]] = frozenset()
    """Which budgets of a client the method itself follows: names of fields of `Client`."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """Rank of the server's adapter: a client's whole rank budget."""

    @property
    def personal_models(self) -> bool:
        """Every client ends with a model of its own: scores are means over clients."""
        return False

    @property
    def serves_personal_models(self) -> bool:
        """What makes a client's model its own comes from `serve`: a client that keeps nothing has one too."""
        return False

    @property
    def personal_phase(self) -> bool:
        """`personal` trains something after the last round."""
        return False

    @property
    def needs_proxy_data(self) -> bool:
        """The server awaits Work in some rounds: it must own rows (task.proxy_data)."""
        return False

    def check(self, client: Client) -> None:
        """Raise ConfigError if this client's budgets are not ones that the method can follow."""
        check_followed(self, client, self.budgets, self.name)

    @abstractmethod
    def init(self, sites: Sites, rng: torch.Generator) -> State:
        """The server's first state, without the head."""

    def init_from(self, sites: Sites, rng: torch.Generator, weight: Callable[[str], Tensor]) -> State:
        """What a run asks: `init`, of a method that begins from the frozen weights; weight(site) is (out, in), float32."""
        return self.init(sites, rng)

    @abstractmethod
    async def server(self, state: State, round: Round) -> State:
        """One round: awaits exchanges with the round's clients, or Work on the server's own data; returns the next state."""

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        """One visit: awaits Work; returns what is sent and what is kept as `own`. Default: train `model`, send it all."""
        done = await self.model(received, own, visit)
        return done.state, {}

    def spread(self, upload: State, received: State, visit: Visit) -> State:
        """The upload in the shared space, zero where this client holds nothing: the linear part of `lift`, for secure sums."""
        return upload

    # after training

    def serve(self, state: State, client: Client) -> State:
        """What a client receives to use the model: evaluation, export, the personal phase."""
        return only(state, "A", "B", "head")

    @abstractmethod
    def model(self, received: State, own: State, visit: Visit) -> Work:
        """The model that a client uses, from what `serve` gave; the global one if `own` is what a new client has."""

    async def personal(self, received: State, own: State, visit: Visit) -> State:
        """After the last round, for every client, if `personal_phase`: awaits Work; returns what is kept as `own`."""
        return own
