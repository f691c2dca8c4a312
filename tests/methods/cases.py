"""Every method and composition once, with clients of the budgets it follows, and a trainer small enough to check by eye.

The toy model is two frozen layers of different shapes with a tanh between them and a head that is trained whole:
y = head tanh(W2 tanh(W1 x)). It is trained by plain autograd over what the method says, one client after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom import lora
from fedloom.core import Client, Failure, Group, Job, Method, State, Upload, Work
from fedloom.engines.inprocess import InProcess
from fedloom.methods import build, names

Rows = tuple[NDArray[np.float64], NDArray[np.float64]]

SITES = {"layers.0.in": (7, 6), "layers.1.out": (5, 7)}
"""Adapted layers, none square: a transposed product cannot go unseen."""
OUTPUTS = 3
EXAMPLES = {"a": 12, "b": 20, "c": 8, "d": 16}
RANK = 4


@dataclass(frozen=True)
class Case:
    """A method with its fields, and the clients' budgets where they are not full."""

    label: str
    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    keeps: dict[str, float] = field(default_factory=dict)

    def method(self, **more: Any) -> Method:
        """Alpha is not the rank, so that a forgotten scale shows."""
        return build(self.name, **({"rank": RANK, "alpha": 6.0} | self.fields | more))

    def clients(self) -> list[Client]:
        """Clients of different sizes."""
        return [
            Client(k, n, self.ranks.get(k, int(self.fields.get("rank", RANK))), self.keeps.get(k, 1.0))
            for k, n in EXAMPLES.items()
        ]


MIXED = {"a": 1, "b": 2, "c": 3}
KEEPS = {"a": 0.5, "b": 0.7, "c": 0.6}

CASES = [
    Case("fedit", "fedit"),
    Case("fedit, rslora", "fedit", {"rslora": True}),
    Case("ffa_lora", "ffa_lora", ranks=MIXED),
    Case("ffa_lora, orthonormal", "ffa_lora", {"a_init": "orthonormal"}),
    Case("fedsa_lora", "fedsa_lora"),
    Case("hetlora", "hetlora", {"gamma": 0.7, "tail_weight": 0.1}, ranks=MIXED),
    Case("hetlora, no pruning", "hetlora", {"prune": False}, ranks=MIXED),
    Case("flexlora", "flexlora", ranks=MIXED),
    Case("flexlora, rslora", "flexlora", {"rslora": True}, ranks=MIXED),
    Case("fedex_lora", "fedex_lora"),
    Case("fedex_lora, rank 1", "fedex_lora", {"rank": 1}),
    Case("fslora", "fslora", ranks=MIXED),
    Case("fslora, rslora, by examples", "fslora", {"rslora": True, "weights": "examples"}, ranks=MIXED),
    Case("fslora, balanced", "fslora", {"sketch": "balanced"}, ranks=MIXED),
    Case("fslora, importance", "fslora", {"sketch": "importance"}, ranks=MIXED),
    Case("fslora over fedex_lora", "fslora", {"over": "fedex_lora"}, ranks=MIXED),
    Case("fslora, importance over fedex_lora", "fslora", {"over": "fedex_lora", "sketch": "importance"}, ranks=MIXED),
    Case("fedlodrop", "fedlodrop", keeps=KEEPS),
    Case("fedlodrop, exact, uniform", "fedlodrop", {"law": "exact", "weights": "uniform"}, keeps=KEEPS),
    Case("fedlodrop, zeros", "fedlodrop", {"aggregation": "zeros"}, keeps=KEEPS),
    Case("fedlodrop, count", "fedlodrop", {"aggregation": "count"}, keeps=KEEPS),
    Case("fedlodrop, official code", "fedlodrop", {"mode": "official_code"}, keeps=KEEPS),
    Case("fedlodrop over fslora", "fedlodrop", {"over": "fslora"}, ranks=MIXED, keeps=KEEPS),
    Case("fedlodrop over flexlora", "fedlodrop", {"over": "flexlora"}, ranks=MIXED, keeps=KEEPS),
    Case("fedlodrop over fedex_lora", "fedlodrop", {"over": "fedex_lora"}, keeps=KEEPS),
    Case("fedlodrop, count over fedex_lora", "fedlodrop", {"over": "fedex_lora", "aggregation": "count"}, keeps=KEEPS),
    Case(
        "fedlodrop, official code over fslora", "fedlodrop", {"mode": "official_code", "over": "fslora"}, MIXED, KEEPS
    ),
    Case("fedlora_optimizer", "fedlora_optimizer"),
    Case("fedlora_optimizer, factors, row", "fedlora_optimizer", {"average": "factors", "convention": "row"}),
    Case("fedlora_optimizer, rank", "fedlora_optimizer", {"convention": "rank", "lambda_global": 0.1}),
    Case(
        "fedlora_optimizer, feature, no turns",
        "fedlora_optimizer",
        {"convention": "feature", "global_phase": "none", "renorm_after_average": False},
    ),
    Case(
        "fedlora_optimizer, proxy data",
        "fedlora_optimizer",
        {"global_phase": "server_proxy", "renorm_direction": False, "lambda_local": 0.1, "nonneg_magnitude": True},
    ),
]
"""Every method, each of its options at least once, and the compositions."""

BUDGETS: dict[str, dict[str, Any]] = {
    "hetlora": {"ranks": [1, 2, 4]},
    "flexlora": {"ranks": [1, 2, 4]},
    "fslora": {"ranks": [1, 2, 4]},
    "ffa_lora": {"ranks": [1, 2, 4]},
    "fedlodrop": {"keep": [0.5, 0.75, 1.0]},
}
"""What a run file says of its clients, by the method that follows it."""

RUNS = {name: (name, {}) for name in names()} | {
    "fslora-over-fedex": ("fslora", {"over": "fedex_lora"}),
    "fedlodrop-over-fslora": ("fedlodrop", {"over": "fslora"}),
}
"""Method and fields of the whole runs that every engine must do alike."""


def sections(case: str) -> dict[str, dict[str, Any]]:
    """The [method] and [clients] of one of RUNS, for three clients."""
    method, fields = RUNS[case]
    return {"method": {"name": method, **fields}, "clients": {"count": 3, **BUDGETS.get(method, {})}}


SERVER = Client("server", 16, RANK)


def start(method: Method, seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    """The server's first state with the head that all clients begin with."""
    state = method.init(SITES, lora.generator(seed, "init"))
    return cast(state | {"head": first_head()}, dtype)


def first_head() -> Group:
    """Weight and bias of the toy's head."""
    rng = lora.generator("head")
    return {"head.weight": torch.randn(OUTPUTS, 5, generator=rng) * 0.5, "head.bias": torch.zeros(OUTPUTS)}


def cast(state: State, dtype: torch.dtype) -> State:
    """Floating-point tensors in another type."""
    return {
        role: {site: x.to(dtype) if x.is_floating_point() else x for site, x in group.items()}
        for role, group in state.items()
    }


def rows(client: str) -> Rows:
    """A client's data: its own input law and a shared teacher, different for every client."""
    rng = np.random.default_rng(lora.seed_of("rows", client))
    n = EXAMPLES.get(client, SERVER.examples)
    x = rng.normal(size=(n, 6)) + rng.normal(size=6)
    teacher = np.random.default_rng(7).normal(size=(OUTPUTS, 6))
    return x, np.tanh(x @ teacher.T + 0.3 * rng.normal(size=(n, OUTPUTS)))


def frozen() -> Group:
    """The frozen weights."""
    rng = lora.generator("frozen")
    return {site: torch.randn(m, n, generator=rng, dtype=torch.float64) / n**0.5 for site, (m, n) in SITES.items()}


def update(method: Method, work: Work, train: State | None = None) -> Group:
    """What a work adds to each frozen weight, dense: offset + scale * B @ A."""
    A, B = method.adapter(work.train if train is None else train, work.fixed)
    delta = {site: work.scale * (B[site] @ A[site]) for site in A}
    for site, left in work.base.get("left", {}).items():
        right = work.base.get("right", {}).get(site)
        delta[site] = delta[site] + (left if right is None else left @ right)
    return delta


@dataclass
class ToyTrainer:
    """Trains one client after the other, as `Fits` asks."""

    optimizer: str = "adamw"
    lr: float = 0.02
    steps: int = 3
    batch: int = 6
    seed: int = 0
    seen: list[tuple[Client, Work, State]] = field(default_factory=list)
    """(client, its work, what it trained), if `record`."""
    record: bool = False

    def loss(self, method: Method, work: Work, train: State, data: Rows) -> Tensor:
        """Mean squared error of the toy model that `work` describes with `train` in place of its own leaves."""
        delta = update(method, work, train)
        dtype = next(iter(delta.values())).dtype
        x, y = (torch.from_numpy(part).to(dtype) for part in data)
        for site, W in frozen().items():
            x = torch.tanh(x @ (W.to(dtype) + delta[site]).T)
        head = train.get("head") or work.fixed.get("head") or first_head()
        error: Tensor = (x @ head["head.weight"].to(dtype).T + head["head.bias"].to(dtype) - y).square().mean()
        return error

    def fit(
        self, method: Method, works: Sequence[tuple[Client, Work]], data: Sequence[Rows], t: int
    ) -> list[tuple[State, dict[str, float]]]:
        """Train each client's work on its data."""
        return [self._one(method, client, work, part, t) for (client, work), part in zip(works, data, strict=True)]

    def _one(self, method: Method, client: Client, work: Work, data: Rows, t: int) -> tuple[State, dict[str, float]]:
        train = {
            role: {site: x.clone().requires_grad_() for site, x in group.items()} for role, group in work.train.items()
        }
        leaves = [x for group in train.values() for x in group.values()]
        lr = self.lr * work.lr
        step: torch.optim.Optimizer
        if self.optimizer == "adamw":
            step = torch.optim.AdamW(leaves, lr=lr, weight_decay=0.1)
        else:
            step = torch.optim.SGD(leaves, lr=lr, momentum=0.9 if self.optimizer == "momentum" else 0.0)
        rng = np.random.default_rng(lora.seed_of(self.seed, t, client.id, "batches"))
        losses = []
        for _ in range(self.steps):
            chosen = rng.choice(len(data[0]), size=min(self.batch, len(data[0])), replace=False)
            loss = self.loss(method, work, train, (data[0][chosen], data[1][chosen]))
            losses.append(loss.item())
            penalty = method.penalty(train, work.fixed)
            step.zero_grad()
            (loss if penalty is None else loss + penalty).backward()
            step.step()
        trained = {role: {site: x.detach() for site, x in group.items()} for role, group in train.items()}
        if self.record:
            self.seen.append((client, work, trained))
        return trained, {"loss": sum(losses) / len(losses) if losses else 0.0}


@dataclass
class Shuffled:
    """An engine whose results come in another order at every round."""

    inside: InProcess

    def run(self, method: Method, jobs: Iterable[Job], t: int) -> Iterator[Upload | Failure]:
        """The inside engine's results, permuted."""
        results = list(self.inside.run(method, jobs, t))
        order = torch.randperm(len(results), generator=lora.generator("shuffle", t)).tolist()
        yield from (results[i] for i in order)


def engine(trainer: ToyTrainer | None = None, **options: Any) -> InProcess:
    """The in-process engine on the toy, in cohorts of 3."""
    data: Callable[[str], Any] = rows
    return InProcess(trainer or ToyTrainer(), SITES, data, fresh={"head": first_head()}, **({"cohort": 3} | options))


def flat(state: State) -> dict[str, bytes]:
    """Every tensor as bytes, with its shape and type: equal if and only if the states are, bit for bit."""
    return {
        f"{role}/{site}": repr((x.dtype, tuple(x.shape))).encode() + x.contiguous().numpy().tobytes()
        for role, group in state.items()
        for site, x in group.items()
    }


def state(A: list[list[float]], B: list[list[float]]) -> State:
    """One site, named "s", from literal numbers."""
    return {"A": {"s": torch.tensor(A)}, "B": {"s": torch.tensor(B)}}


def uploads(*sent: tuple[int, State]) -> list[Upload]:
    """From (examples, state); the rank is that of the state."""
    return [
        Upload(Client(f"c{i}", n, next(iter(x.get("A", x.get("B", {})).values())).shape[0]), x, 1)
        for i, (n, x) in enumerate(sent)
    ]


ONE = state([[1.0, 2.0]], [[3.0], [5.0], [0.0]])
TWO = state([[5.0, 6.0]], [[7.0], [1.0], [4.0]])
ZERO = state([[0.0, 0.0]], [[0.0], [0.0], [0.0]])


def served(method: Method, at: State, client: Client, sites: dict[str, tuple[int, int]]) -> Group:
    """What a client's model adds to its frozen weights at evaluation."""
    return update(method, method.prepare(method.broadcast(at, client, 0), {}, sites, client, 0))


def random_uploads(ranks: Sequence[int], sites: dict[str, tuple[int, int]] = SITES, key: int = 0) -> list[Upload]:
    """Clients of given ranks and different sizes, in float64."""
    made = []
    for i, r in enumerate(ranks):
        rng = lora.generator(key, i)
        A = {s: torch.randn(r, n, generator=rng, dtype=torch.float64) for s, (_, n) in sites.items()}
        B = {s: torch.randn(m, r, generator=rng, dtype=torch.float64) for s, (m, _) in sites.items()}
        made.append(Upload(Client(f"c{i}", 2 * i + 3, r), {"A": A, "B": B}, 1))
    return made


def ideal(method: Method, sent: Sequence[Upload]) -> Group:
    """sum_k p_k s_k B_k A_k, densely."""
    total = sum(u.client.examples for u in sent)
    out: Group = {}
    for u in sent:
        own = u.client.rank if method.name == "flexlora" else method.rank
        s = lora.scale(method.alpha, own, method.rslora)
        for site, A in u.state["A"].items():
            out[site] = out.get(site, torch.zeros(())) + u.client.examples / total * s * u.state["B"][site] @ A
    return out
