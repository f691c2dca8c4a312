"""The whole vocabulary of fedloom: states, clients, work, uploads, the interface of a method and of an engine.

One decision carries the rest: **a method never trains. It says, as data, what one client is to train, and is handed the
result.** So a method runs anywhere (data crosses processes), many clients train in one pass (data stacks), and a
method is tested with random tensors.

    broadcast (server) ── State ──► prepare (client) ─► Work ─► trainer ─► finish (client) ── State ──► aggregate (server)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from fedloom.errors import ConfigError

Group = dict[str, Tensor]
"""Site -> tensor: all tensors of one role. A site is the name of an adapted layer."""

State = dict[str, Group]
"""Role -> group, such as `{"A": {...}, "B": {...}, "head": {...}}`. Roles are never searched for in names."""

Sites = dict[str, tuple[int, int]]
"""Adapted layer -> (out, in)."""


@dataclass(frozen=True)
class Client:
    """What the server knows of a client: identity, weight and budget."""

    id: str
    examples: int
    rank: int
    keep: float = 1.0
    """1 - dropout rate: the share of rows and columns that the client trains."""


@dataclass(frozen=True)
class Work:
    """What one client trains in one round."""

    train: State
    """Leaves that get gradients, as small as what was sent."""
    fixed: State = field(default_factory=dict)
    """What `adapter` and `penalty` need besides."""
    base: State = field(default_factory=dict)
    """Offset to the frozen weights since the original model, one role each of factors: `left` (out, q) and
    `right` (q, in); a site with `left` alone carries a dense (out, in) offset."""
    scale: float = 1.0
    """Multiplies B @ A."""
    lr: float = 1.0
    """Multiplies the run's learning rate."""


@dataclass(frozen=True)
class Upload:
    """What a client sends back. Self-describing: it carries the seed of the slice that it belongs to."""

    client: Client
    state: State
    t: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A client that sent nothing usable, and why."""

    client: Client
    reason: str


Job = tuple[Client, State]
"""A client and what the server sends it."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A federated LoRA method. Concrete methods are frozen dataclasses whose fields are scalars, and final.

    Two functions are abstract; the others have the defaults of plain federated averaging. Every function is pure:
    tensors that come in are never changed.
    """

    rank: int = 8
    """Rank of the server's adapter."""
    alpha: float = 16.0
    """LoRA scale: B @ A is multiplied by alpha / rank (alpha / sqrt(rank) with `rslora`)."""
    rslora: bool = False
    """Rank-stabilised scale (Kalajdzievski, arXiv 2312.03732)."""

    name: ClassVar[str]
    paper: ClassVar[str]
    """Authors, title, arXiv id."""
    budgets: ClassVar[frozenset[str]] = frozenset()
    """Which budgets of a client the method follows: `"rank"`, `"keep"`."""
    personal: ClassVar[bool] = False
    """Every client ends with a model of its own."""
    linear: ClassVar[bool] = False
    """`aggregate` needs no more than a weighted sum of uploads (what secure aggregation can give)."""
    needs_all: ClassVar[bool] = False
    """`aggregate` holds every upload at once rather than folding over them."""
    sliceable: ClassVar[bool] = False
    """Another method may put its slices over this one (field `over`)."""
    shrinks: ClassVar[bool] = False
    """A client may send a smaller rank than it was sent."""

    def check(self, client: Client) -> None:
        """Raise ConfigError if the client's budget is not one that this method can follow."""
        if not 1 <= client.rank <= self.rank:
            raise ConfigError(
                f"client {client.id!r} has rank {client.rank}, expected 1 to {self.rank} (lora.rank): "
                "change ranks in [clients] or rank in [lora]"
            )
        if client.rank != self.rank and "rank" not in self.budgets:
            raise ConfigError(
                f"{self.name} needs every client at rank {self.rank}, got {client.rank} for client {client.id!r}: remove "
                "ranks from [clients], or choose a method with rank budgets (fslora, hetlora, flexlora)"
            )
        if not 0.0 < client.keep <= 1.0:
            raise ConfigError(f"client {client.id!r} has keep {client.keep}, expected a number above 0 and at most 1")
        if client.keep != 1.0 and "keep" not in self.budgets:
            raise ConfigError(
                f"{self.name} follows no keep budget, got keep {client.keep} for client {client.id!r}: "
                "remove keep from [clients], or choose fedlodrop"
            )

    # server

    def init(self, sites: Sites, rng: torch.Generator) -> State:
        """The server's first state: A (rank, in) uniform, B (out, rank) zero."""
        from fedloom import lora

        return lora.init(sites, self.rank, rng)

    def broadcast(self, state: State, client: Client, t: int) -> State:
        """What the server sends to one client in round t; t = 0 asks for the model to evaluate. Default: A, B and the head."""
        return {role: state[role] for role in ("A", "B", "head") if role in state}

    @abstractmethod
    def aggregate(self, state: State, uploads: Iterable[Upload]) -> State:
        """The next server state. Uploads come once, in client-id order: fold, do not hoard (unless `needs_all`)."""

    def expected(self, received: State, t: int) -> State:
        """A state with the roles, sites and shapes that an upload must have. Default: those received."""
        return received

    def stage(self, t: int) -> Literal["clients", "server"]:
        """Who trains in round t: the sampled clients, or the server on its own proxy data. Default: the clients."""
        return "clients"

    # client

    @abstractmethod
    def prepare(self, received: State, kept: State, sites: Sites, client: Client, t: int) -> Work:
        """What the client trains in round t. With t = 0 nothing is trained: the work is the model to evaluate."""

    def personalise(self, received: State, kept: State, sites: Sites, client: Client) -> Work | None:
        """What the client trains for itself alone after the last round; None (the default) for nothing."""
        return None

    def adapter(self, train: State, fixed: State) -> tuple[Group, Group]:
        """The factors A (r, in) and B (out, r) per site, differentiable in `train`.

        Sees one client's own tensors: no client axis and no padding.
        """
        return train.get("A") or fixed["A"], train.get("B") or fixed["B"]

    def penalty(self, train: State, fixed: State) -> Tensor | None:
        """A term added to the client's loss (a 0-d tensor), or None. Sees one client's own tensors."""
        return None

    def finish(self, work: Work, trained: State, received: State) -> tuple[State, State]:
        """What the client sends and what it keeps for itself. Default: send all that was trained, keep nothing."""
        return trained, {}


class Engine(Protocol):
    """Runs clients, wherever they are. The test double is a loop."""

    def run(self, method: Method, jobs: Iterable[Job], t: int) -> Iterator[Upload | Failure]:
        """Train each job's client for round t; results may come in any order."""
        ...


Sampler = Callable[[list[Client], int], list[Client]]
"""(clients, round) -> the clients that take part."""
