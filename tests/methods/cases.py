"""Every method and composition once, with clients of the budgets it follows, and a trainer small enough to check by eye.

The toy model is two frozen layers of different shapes with a tanh between them and a head that is trained whole:
y = head tanh(W2 tanh(W1 x)). It is trained by plain autograd over what the method says, one client after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom import lora
from fedloom.core import (
    Averaged,
    Client,
    Each,
    Exchange,
    Failure,
    Group,
    Mean,
    Method,
    Round,
    State,
    Trained,
    Upload,
    Visit,
    Work,
)
from fedloom.engine import Answer, Job, Total
from fedloom.methods import build, names
from fedloom.rng import generator, seed_of
from fedloom.simulation import LocalVisits, Simulation

Rows = tuple[NDArray[np.float64], NDArray[np.float64]]

SITES = {"layers.0.in": (7, 6), "layers.1.out": (5, 7)}
"""Adapted layers, none square: a transposed product cannot go unseen."""
OUTPUTS = 3
EXAMPLES = {"a": 12, "b": 20, "c": 8, "d": 16}
RANK = 4


HEAD_BYTES = 4 * (3 * 5 + 3)
OUTS, INS = sum(m for m, _ in SITES.values()), sum(n for _, n in SITES.values())

Payload = Callable[[Client, int, State], tuple[int, int]]
"""(client, t, what it received) -> bytes (down, up) without the head, 4 a number and 8 a seed."""


def factors(client: Client, t: int, received: State) -> tuple[int, int]:
    """Both factors at the client's rank, both ways."""
    n = 4 * client.rank * (OUTS + INS)
    return n, n


def one_factor(size: int, seed: int = 0) -> Payload:
    """One factor at the client's rank, and a seed down."""
    return lambda client, t, received: (4 * client.rank * size + seed, 4 * client.rank * size)


def plus_down(inner: Payload, more: int) -> Payload:
    """A seed or two, down alone."""
    return lambda client, t, received: (inner(client, t, received)[0] + more, inner(client, t, received)[1])


def importance(client: Client, t: int, received: State) -> tuple[int, int]:
    """Both factors; indices and weights of the sketch down, or a seed at full rank."""
    down, up = factors(client, t, received)
    return down + (len(SITES) * client.rank * 8 if client.rank < RANK else 8), up


def kept_part(more: int) -> Payload:
    """Kept columns of A and rows of B, both ways, and seeds down."""

    def payload(client: Client, t: int, received: State) -> tuple[int, int]:
        kept = sum(x.shape[1] for x in received["A"].values()) + sum(x.shape[0] for x in received["B"].values())
        return 4 * client.rank * kept + more, 4 * client.rank * kept

    return payload


def with_offset(inner: Payload, rank: int = RANK) -> Payload:
    """FedEx-LoRA's offset down, as factors or dense, whichever is smaller."""

    def payload(client: Client, t: int, received: State) -> tuple[int, int]:
        q = (t - 1) * (len(EXAMPLES) - 1) * rank
        down, up = inner(client, t, received)
        return down + sum(4 * min(q * (m + n), m * n) for m, n in SITES.values()), up

    return payload


def turns(client: Client, t: int, received: State) -> tuple[int, int]:
    """Both factors; in even rounds the turn of A alone comes back."""
    return factors(client, t, received)[0], 4 * client.rank * (OUTS + INS if t % 2 else INS)


def pruned(client: Client, t: int, received: State) -> tuple[int, int]:
    """Both factors at the rank that the client was sent; up at most that (see the test)."""
    return factors(replace(client, rank=next(iter(received["A"].values())).shape[0]), t, received)


def controlled(client: Client, t: int, received: State) -> tuple[int, int]:
    """The factors, and control variates for them and the head."""
    down, up = factors(client, t, received)
    return 2 * down + HEAD_BYTES, 2 * up + HEAD_BYTES


def alternating(client: Client, t: int, received: State) -> tuple[int, int]:
    """Both factors down; up B in odd rounds and A in even ones."""
    return factors(client, t, received)[0], 4 * client.rank * (OUTS if t % 2 else INS)


def turned(client: Client, t: int, received: State) -> tuple[int, int]:
    """B both ways; down the (r, r) turn of A and the seed of its basis."""
    up = 4 * client.rank * OUTS
    return up + len(SITES) * 4 * client.rank**2 + 8, up


def seeded_cores(client: Client, t: int, received: State) -> tuple[int, int]:
    """The (r, r) cores both ways, and the seed of their bases down."""
    n = len(SITES) * 4 * client.rank**2
    return n + 8, n


def cores(client: Client, t: int, received: State) -> tuple[int, int]:
    """The cores both ways and their bases down; in round 1 a start from a seed, and the dense gradient up, besides."""
    n = len(SITES) * 4 * client.rank**2
    bases = factors(client, t, received)[0]
    return (n + bases, n) if t > 1 else (2 * n + bases + 8, n + sum(4 * m * n for m, n in SITES.values()))


def heads(count: int) -> Payload:
    """All heads and a seed down; those that the client's rank pays for up, and which they are."""

    def payload(client: Client, t: int, received: State) -> tuple[int, int]:
        one, mine = 4 * (RANK // count) ** 2, max(1, client.rank * count // RANK)
        return len(SITES) * count * one + 8, len(SITES) * mine * (one + 8)

    return payload


def sketched(more: int) -> Payload:
    """Factors, a seed and Q down, Y and Z up."""

    def payload(client: Client, t: int, received: State) -> tuple[int, int]:
        width = {site: min(client.rank + more, *shape) for site, shape in SITES.items()}
        Y, Z = (sum(4 * SITES[site][side] * q for site, q in width.items()) for side in (0, 1))
        return factors(client, t, received)[0] + 8 + Y, Y + Z

    return payload


def summed(client: Client, t: int, received: State) -> tuple[int, int]:
    """Sums of factors down and changes up, each with a count of clients; a seed down."""
    n = factors(client, t, received)[0] + 4
    return n + 8, n


def placed(client: Client, t: int, received: State) -> tuple[int, int]:
    """Both factors; down how often to train, if the client is new."""
    down, up = factors(client, t, received)
    return down + 8 * ("new" in received), up


@dataclass(frozen=True)
class Case:
    """A method's table, the clients' budgets where they are not full, and what tests must know of it."""

    label: str
    table: Mapping[str, Any]
    ranks: dict[str, int] = field(default_factory=dict)
    keeps: dict[str, float] = field(default_factory=dict)
    payload: Payload = factors
    rank: int = RANK
    rslora: bool = False
    head: bool = True
    """The head is shared."""
    client_chooses: bool = False
    """Uploads have sizes that the client chooses: the payload is a bound of what comes up."""
    one_phase: bool = True
    """A visit trains what it sends, in one work."""
    learns: bool = True
    """Six rounds of the toy lower its loss."""
    each: bool = False
    """The server reads every upload, in some round: no sum will do."""
    start_error: float = 0.0
    """How far from the original model a start may be: rounding, where weights are taken apart."""
    at_most: bool = False
    """The payload is a bound of what comes up: the client chooses what it sends, and nobody remembers it."""
    replaces: bool = True
    """What one client trained is the next state; a server optimiser moves towards it instead."""
    exchanges: int = 1
    """Of the first round."""
    adds: bool = False
    """The server adds up what clients change: three uploads count for more than one."""
    integers: bool = False
    """Uploads hold indices: no sum will do."""

    def lora(self) -> dict[str, Any]:
        """[lora]. Alpha is not the rank, so that a forgotten scale shows."""
        return {"rank": self.rank, "alpha": 6.0, "rslora": self.rslora}

    def method(self, **more: Any) -> Method:
        """The method of the table, with fields changed."""
        return build({**self.table, **more}, self.lora())

    def clients(self) -> list[Client]:
        """Clients of different sizes."""
        return [Client(k, n, self.ranks.get(k, self.rank), self.keeps.get(k, 1.0)) for k, n in EXAMPLES.items()]


MIXED = {"a": 1, "b": 2, "c": 3}
KEEPS = {"a": 0.5, "b": 0.7, "c": 0.6}


def _of(name: str, over: str | dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A [method] table, with one under it."""
    below = {} if over is None else {"over": {"name": over} if isinstance(over, str) else over}
    return {"name": name, **fields, **below}


_SEED = plus_down(factors, 8)
_OPTIMIZER = {"global_phase": "server_proxy", "renorm_direction": False, "lambda_local": 0.1, "nonneg_magnitude": True}

CASES = [
    Case("fedit", _of("fedit")),
    Case("fedit, rslora", _of("fedit"), rslora=True),
    Case("ffa_lora", _of("ffa_lora"), MIXED, payload=one_factor(OUTS, 8)),
    Case("ffa_lora, orthonormal", _of("ffa_lora", a_init="orthonormal"), payload=one_factor(OUTS, 8)),
    Case("fedsa_lora", _of("fedsa_lora"), payload=one_factor(INS), head=False),
    Case("hetlora", _of("hetlora", gamma=0.7, tail_weight=0.1), MIXED, payload=pruned, client_chooses=True, each=True),
    Case("hetlora, no pruning", _of("hetlora", prune=False), MIXED, payload=pruned, each=True),
    Case("flexlora", _of("flexlora"), MIXED, each=True),
    Case("flexlora, rslora", _of("flexlora"), MIXED, rslora=True, each=True),
    Case("fedex_lora", _of("fedex_lora"), payload=with_offset(factors), each=True),
    Case("fedex_lora, rank 1", _of("fedex_lora"), payload=with_offset(factors, 1), rank=1, each=True),
    Case("fslora", _of("fslora"), MIXED, payload=_SEED),
    Case("fslora, rslora, by examples", _of("fslora", weights="examples"), MIXED, payload=_SEED, rslora=True),
    Case("fslora, balanced", _of("fslora", sketch="balanced"), MIXED, payload=plus_down(factors, 16)),
    Case("fslora, importance", _of("fslora", sketch="importance"), MIXED, payload=importance),
    Case("fslora over fedex_lora", _of("fslora", "fedex_lora"), MIXED, payload=with_offset(_SEED), each=True),
    Case(
        "fslora, importance over fedex_lora",
        _of("fslora", "fedex_lora", sketch="importance"),
        MIXED,
        payload=with_offset(importance),
        each=True,
    ),
    Case("fedlodrop", _of("fedlodrop"), keeps=KEEPS, payload=kept_part(8)),
    Case(
        "fedlodrop, exact, uniform",
        _of("fedlodrop", law="exact", weights="uniform"),
        keeps=KEEPS,
        payload=kept_part(8),
    ),
    Case("fedlodrop, zeros", _of("fedlodrop", aggregation="zeros"), keeps=KEEPS, payload=kept_part(8)),
    Case("fedlodrop, count", _of("fedlodrop", aggregation="count"), keeps=KEEPS, payload=kept_part(8)),
    Case("fedlodrop, official code", _of("fedlodrop", mode="official_code"), keeps=KEEPS),
    Case("fedlodrop over fslora", _of("fedlodrop", "fslora"), MIXED, KEEPS, kept_part(16)),
    Case("fedlodrop over flexlora", _of("fedlodrop", "flexlora"), MIXED, KEEPS, kept_part(8), each=True),
    Case("fedlodrop over fedex_lora", _of("fedlodrop", "fedex_lora"), {}, KEEPS, with_offset(kept_part(8)), each=True),
    Case(
        "fedlodrop, count over fedex_lora",
        _of("fedlodrop", "fedex_lora", aggregation="count"),
        {},
        KEEPS,
        with_offset(kept_part(8)),
        each=True,
    ),
    Case("fedlodrop, official code over fslora", _of("fedlodrop", "fslora", mode="official_code"), MIXED, KEEPS, _SEED),
    Case("fslora over fedlodrop", _of("fslora", _of("fedlodrop", law="exact")), MIXED, KEEPS, kept_part(16)),
    Case("fslora over fedadam", _of("fslora", _of("fedadam", lr=0.02)), MIXED, payload=_SEED, replaces=False),
    Case("fedlora_optimizer", _of("fedlora_optimizer"), payload=turns, each=True),
    Case(
        "fedlora_optimizer, factors, row",
        _of("fedlora_optimizer", average="factors", convention="row"),
        payload=turns,
        each=True,
    ),
    Case(
        "fedlora_optimizer, rank",
        _of("fedlora_optimizer", convention="rank", lambda_global=0.1),
        payload=turns,
        each=True,
    ),
    Case(
        "fedlora_optimizer, feature, no turns",
        _of("fedlora_optimizer", convention="feature", global_phase="none", renorm_after_average=False),
        each=True,
    ),
    Case("fedlora_optimizer, proxy data", _of("fedlora_optimizer", **_OPTIMIZER), payload=turns, each=True),
    Case("feddpa", _of("feddpa", mix=0.3), one_phase=False),
    Case("fedprox", _of("fedprox", mu=0.5)),
    Case("fedprox over fslora", _of("fedprox", "fslora", mu=0.5), MIXED, payload=_SEED),
    Case("scaffold", _of("scaffold"), payload=controlled),
    Case("scaffold over fedex_lora", _of("scaffold", "fedex_lora"), payload=with_offset(controlled), each=True),
    Case("fedavgm", _of("fedavgm", momentum=0.5), replaces=False),
    Case("fedadagrad", _of("fedadagrad", lr=0.05), replaces=False),
    Case("fedadam", _of("fedadam", lr=0.02), replaces=False),
    Case(
        "fedadam over ffa_lora", _of("fedadam", "ffa_lora", lr=0.02), MIXED, payload=one_factor(OUTS, 8), replaces=False
    ),
    Case("fedyogi", _of("fedyogi", lr=0.02), replaces=False),
    Case(
        "fedadam over fedprox over fedlodrop over fslora",
        _of("fedadam", _of("fedprox", _of("fedlodrop", "fslora"), mu=0.1), lr=0.02),
        MIXED,
        KEEPS,
        kept_part(16),
        replaces=False,
    ),
    # alternation and alignment
    Case("rolora", _of("rolora"), payload=alternating),
    Case("fedrot_lora", _of("fedrot_lora")),
    Case("fedrot_lora, hard", _of("fedrot_lora", rotation=1.0)),
    Case("fedrot_lora, A alone", _of("fedrot_lora", align="A")),
    Case("lora_fair", _of("lora_fair", weight=0.001), each=True),
    Case("fedsvd", _of("fedsvd"), payload=turned),
    Case("fedsvd, orthonormal, every second round", _of("fedsvd", a_init="orthonormal", every=2), payload=turned),
    # small cores
    Case("fed_sb", _of("fed_sb"), payload=cores, one_phase=False, exchanges=2),
    Case("fed_sb, seed", _of("fed_sb", start="seed"), payload=seeded_cores),
    Case("ravan", _of("ravan", heads=2), MIXED, payload=heads(2), integers=True),
    Case(
        "ravan, random", _of("ravan", choose="random", bases="normal", heads=2), MIXED, payload=heads(2), integers=True
    ),
    Case("ravan, gradient", _of("ravan", choose="gradient"), MIXED, payload=heads(4), one_phase=False, integers=True),
    Case("fedask", _of("fedask"), payload=sketched(0), exchanges=2),
    Case("fedask, B alone, oversampled", _of("fedask", train="B", oversample=1), payload=sketched(1), exchanges=2),
    # personal models
    Case("feddpa_f", _of("feddpa_f", mix=0.3)),
    Case("fedalt", _of("fedalt"), payload=summed, head=False, adds=True),
    Case("fedalt, fixed", _of("fedalt", mixer="fixed", mix=0.6), payload=summed, head=False, adds=True),
    Case(
        "pf2lora_first_order",
        _of("pf2lora_first_order", own_rank=1, own_lr=20.0),
        payload=plus_down(factors, 8),
        one_phase=False,
    ),
    Case(
        "fedlease_clusters",
        _of("fedlease_clusters", warmup=2, most=3),
        payload=placed,
        head=False,
        one_phase=False,
        each=True,
    ),
]
"""Every method, each of its options at least once, and the compositions."""


def merged(seed: int) -> Payload:
    """The offset that the client received and a seed down; both factors at its own rank up."""

    def payload(client: Client, t: int, received: State) -> tuple[int, int]:
        offset = sum(4 * x.numel() for role in ("left", "right") for x in received.get(role, {}).values())
        return offset + seed, factors(client, t, received)[1]

    return payload


def plus_offset(client: Client, t: int, received: State) -> tuple[int, int]:
    """Both factors; the offset that the client received down besides."""
    down, up = factors(client, t, received)
    return down + merged(0)(client, t, received)[0], up


# Sums of products: where the tail goes.
CASES += [
    Case("flora", _of("flora"), MIXED, payload=merged(8), each=True),
    Case("flora, rslora", _of("flora"), MIXED, payload=merged(8), rslora=True, each=True),
    Case("florist", _of("florist", energy=1.0), MIXED, payload=merged(8), each=True),
    Case("florist, continue", _of("florist", start="continue", energy=1.0), MIXED, each=True),
    Case("fedmomentum", _of("fedmomentum"), payload=plus_offset, each=True),
    Case("fedmomentum, less energy", _of("fedmomentum", energy=0.9), payload=plus_offset, each=True),
    Case("frlora", _of("frlora"), payload=plus_offset, start_error=1e-6),
    Case("eclora", _of("eclora"), MIXED, each=True),
    Case("flexlora, error", _of("flexlora", tail="error"), MIXED, each=True),
    Case("flexlora, server", _of("flexlora", tail="server"), MIXED, each=True),
]


def whole_down(client: Client, t: int, received: State) -> tuple[int, int]:
    """All ranks of both factors and a seed down, the client's own ranks up."""
    return 4 * RANK * (OUTS + INS) + 8, factors(client, t, received)[1]


def chosen_ranks(client: Client, t: int, received: State) -> tuple[int, int]:
    """Both factors whole down; up the client's number of ranks over all layers of one of them and their indices, at most."""
    largest = max(m if t % 2 else n for m, n in SITES.values())
    return 4 * RANK * (OUTS + INS), client.rank * len(SITES) * 4 * (largest + 1)


def with_magnitudes(client: Client, t: int, received: State) -> tuple[int, int]:
    """Both factors and a magnitude for each rank, both ways."""
    down, up = factors(client, t, received)
    return down + 4 * client.rank * len(SITES), up + 4 * client.rank * len(SITES)


# Unequal ranks.
CASES += [
    Case(
        "lora_a2",
        _of("lora_a2", probe_steps=2),
        MIXED,
        payload=chosen_ranks,
        one_phase=False,
        each=True,
        at_most=True,
    ),
    Case(
        "lora_a2, head",
        _of("lora_a2", train_head=True, lr_ratio=1.0),
        MIXED,
        payload=chosen_ranks,
        one_phase=False,
        each=True,
        at_most=True,
    ),
    Case("fedrora", _of("fedrora", lr_ratio=5.0), MIXED, payload=with_magnitudes, each=True),
    Case(
        "fedrora, head, signed",
        _of("fedrora", train_head=True, top="signed", lr_ratio=5.0),
        MIXED,
        payload=with_magnitudes,
        each=True,
    ),
    Case("zero_padding", _of("zero_padding"), MIXED),
    Case("replication_padding", _of("replication_padding"), MIXED),
    Case("raflora", _of("raflora"), MIXED, each=True),
    Case("raflora, rslora", _of("raflora"), MIXED, rslora=True, each=True),
    Case("fed_plora", _of("fed_plora"), MIXED, payload=whole_down),
]

RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {name: (_of(name), {}) for name in names()} | {
    "hetlora": (_of("hetlora"), {"ranks": [1, 2, 4]}),
    "flexlora": (_of("flexlora"), {"ranks": [1, 2, 4]}),
    "fslora": (_of("fslora"), {"ranks": [1, 2, 4]}),
    "ffa_lora": (_of("ffa_lora"), {"ranks": [1, 2, 4]}),
    "fedlodrop": (_of("fedlodrop"), {"keep": [0.5, 0.75, 1.0]}),
    "fslora-over-fedex": (_of("fslora", "fedex_lora"), {"ranks": [1, 2, 4]}),
    "fedlodrop-over-fslora": (_of("fedlodrop", "fslora"), {"ranks": [1, 2, 4], "keep": [0.5, 0.75, 1.0]}),
}
"""[method] and [clients] of the whole runs that every engine must do alike."""

RUNS |= {
    name: (_of(name), {"ranks": [1, 2, 4]})
    for name in ("flora", "zero_padding", "replication_padding", "raflora", "fed_plora", "lora_a2", "fedrora", "eclora")
}


def sections(case: str) -> dict[str, dict[str, Any]]:
    """The [method] and [clients] of one of RUNS, for three clients."""
    method, clients = RUNS[case]
    return {"method": method, "clients": {"count": 3, **clients}}


SERVER = Client("server", 16, RANK)


def start(method: Method, seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    """The server's first state with the head that all clients begin with."""
    state = method.init_from(SITES, generator(seed, "init"), lambda site: frozen()[site].float())
    return cast(state | {"head": first_head()}, dtype)


def first_head() -> Group:
    """Weight and bias of the toy's head."""
    rng = generator("head")
    return {"head.weight": torch.randn(OUTPUTS, 5, generator=rng) * 0.5, "head.bias": torch.zeros(OUTPUTS)}


def cast(state: State, dtype: torch.dtype) -> State:
    """Floating-point tensors in another type."""
    return {
        role: {site: x.to(dtype) if x.is_floating_point() else x for site, x in group.items()}
        for role, group in state.items()
    }


def rows(client: str) -> Rows:
    """A client's data: its own input law and a shared teacher, different for every client."""
    rng = np.random.default_rng(seed_of("rows", client))
    n = EXAMPLES.get(client, SERVER.examples)
    x = rng.normal(size=(n, 6)) + rng.normal(size=6)
    teacher = np.random.default_rng(7).normal(size=(OUTPUTS, 6))
    return x, np.tanh(x @ teacher.T + 0.3 * rng.normal(size=(n, OUTPUTS)))


def frozen() -> Group:
    """The frozen weights."""
    rng = generator("frozen")
    return {site: torch.randn(m, n, generator=rng, dtype=torch.float64) / n**0.5 for site, (m, n) in SITES.items()}


def update(work: Work, train: State | None = None) -> Group:
    """What a work adds to each frozen weight, dense: offset + scale * B @ A; where a gate is, at an input of zero."""
    made = work.adapter(work.train if train is None else train, work.fixed)
    if made.gate is not None:
        made = made._replace(B={site: B / len(made.gate[site]) for site, B in made.B.items()})
    dtype = max((x.dtype for x in (*made.A.values(), *made.B.values())), key=lambda kind: kind.itemsize)
    delta = {site: work.scale * (made.B[site].to(dtype) @ A.to(dtype)) for site, A in made.A.items()}
    for site, left in work.base.get("left", {}).items():
        right = work.base.get("right", {}).get(site)
        delta[site] = delta[site] + (left if right is None else left @ right)
    return delta


def gated(work: Work, train: State, site: str, x: Tensor) -> Tensor:
    """scale * B diag(softmax(gate x)) A x for rows x."""
    A, B, gate = work.adapter(train, work.fixed)
    assert gate is not None and not work.base
    weights = (x @ gate[site].T).softmax(-1).repeat_interleave(len(A[site]) // len(gate[site]), -1)
    return work.scale * (x @ A[site].T * weights) @ B[site].T


@dataclass
class ToyTrainer:
    """Trains one client after the other, as `LocalTrainer` asks."""

    optimizer: str = "adamw"
    lr: float = 0.02
    steps: int = 3
    batch: int = 6
    seed: int = 0
    seen: list[tuple[Client, Work, State]] = field(default_factory=list)
    """(client, its work, what it trained), if `record`."""
    record: bool = False
    passes: list[tuple[int, int, tuple[str, ...]]] = field(default_factory=list)
    """(t, part, ids of the clients trained together)."""

    def loss(self, work: Work, train: State, data: Rows) -> Tensor:
        """Mean squared error of the toy model that `work` describes with `train` in place of its own leaves."""
        delta = update(work, train)
        dtype, gate = next(iter(delta.values())).dtype, work.adapter(train, work.fixed).gate
        x, y = (torch.from_numpy(part).to(dtype) for part in data)
        for site, W in frozen().items():
            x = torch.tanh(x @ W.to(dtype).T + (x @ delta[site].T if gate is None else gated(work, train, site, x)))
        head = train.get("head") or work.fixed.get("head") or first_head()
        error: Tensor = (x @ head["head.weight"].to(dtype).T + head["head.bias"].to(dtype) - y).square().mean()
        return error

    def fit(self, works: Sequence[tuple[Client, Work]], data: Sequence[Rows], t: int, part: int = 0) -> list[Trained]:
        """Train each client's work on its data."""
        self.passes.append((t, part, tuple(client.id for client, _ in works)))
        return [self._one(client, work, rows, t, part) for (client, work), rows in zip(works, data, strict=True)]

    def _one(self, client: Client, work: Work, data: Rows, t: int, part: int) -> Trained:
        train = {
            role: {site: x.clone().requires_grad_() for site, x in group.items()} for role, group in work.train.items()
        }
        leaves = [x for group in train.values() for x in group.values()]
        lr = self.lr * work.lr
        step: torch.optim.Optimizer
        optimizer = work.optimizer or self.optimizer
        if optimizer == "adamw":
            step = torch.optim.AdamW(leaves, lr=lr, weight_decay=0.1)
        else:
            step = torch.optim.SGD(leaves, lr=lr, momentum=0.9 if optimizer == "momentum" else 0.0)
        key = (self.seed, t, client.id, "batches", *((part,) if part else ()))
        rng = np.random.default_rng(seed_of(*key))
        losses = []
        steps = self.steps if work.steps is None else work.steps
        for _ in range(steps):
            chosen = rng.choice(len(data[0]), size=min(self.batch, len(data[0])), replace=False)
            loss = self.loss(work, train, (data[0][chosen], data[1][chosen]))
            losses.append(loss.item())
            for penalty in work.penalties:
                loss = loss + penalty(train, work.fixed)
            step.zero_grad()
            loss.backward()
            step.step()
        trained = {role: {site: x.detach() for site, x in group.items()} for role, group in train.items()}
        if self.record:
            self.seen.append((client, work, trained))
        return Trained(trained, steps, steps * lr, sum(losses) / len(losses) if losses else 0.0)


class Shuffled(Simulation[Rows]):
    """An engine whose results come in another order at every round."""

    def visits(self, method: Method, round: Round) -> LocalVisits[Rows]:
        return _ShuffledVisits(self, method, round)


class _ShuffledVisits(LocalVisits[Rows]):
    def exchange(self, jobs: Iterable[Job], x: Exchange[Any]) -> Iterator[Answer | Failure | Total]:
        results = list(super().exchange(jobs, x))
        order = torch.randperm(len(results), generator=generator("shuffle", self.round.t)).tolist()
        yield from (results[i] for i in order)


def engine(
    trainer: ToyTrainer | None = None, kind: type[Simulation[Rows]] = Simulation, **options: Any
) -> Simulation[Rows]:
    """The simulator on the toy, in cohorts of 3, with the server's own data."""
    given = {"cohort": 3, "fresh": {"head": first_head()}, "proxy": SERVER, "secret": 0} | options
    return kind(trainer or ToyTrainer(), SITES, rows, **given)


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


Sent = tuple[Client, State]
"""A client and what it uploads."""


def uploads(*sent: tuple[int, State]) -> list[Sent]:
    """From (examples, state); the rank is that of the state."""
    return [
        (Client(f"c{i}", n, next(iter(x.get("A", x.get("B", {})).values())).shape[0]), x)
        for i, (n, x) in enumerate(sent)
    ]


def after(
    method: Method, state: State, sent: Sequence[Sent], t: int = 1, report: dict[str, float] | None = None
) -> State:
    """The server's next state, were these the uploads of round t: its coroutine driven by hand, without an engine."""
    sites = lora.sites_of(state) if {"A", "B"} <= state.keys() else SITES
    told = {} if report is None else report
    flow = method.server(state, Round(t, tuple(client for client, _ in sent), len(sent), sites, told))
    answer: Any = None
    while True:
        try:
            x = flow.send(answer)
        except StopIteration as stop:
            new: State = stop.value
            return new
        lifted = [Upload(c, x.lift(c, u), x.weight(c)) for c, u in sent]
        if isinstance(x, Each):
            answer = iter(lifted)
            continue
        assert isinstance(x, Mean)
        mean = lora.Mean()
        for upload in lifted:
            mean.add(upload.state, upload.weight)
        answer = Averaged(mean.value, tuple(u.client for u in lifted), mean.weight)


def received(method: Method, at: State, client: Client, t: int = 1) -> State:
    """What the method sends to a client in the first exchange of round t."""
    sites = lora.sites_of(at) if {"A", "B"} <= at.keys() else SITES
    flow = method.server(at, Round(t, (client,), 1, sites))
    x = flow.send(None)
    flow.close()
    assert isinstance(x, Exchange)
    return x.send(client)


def first_work(method: Method, state: State, client: Client, t: int = 1, own: State | None = None) -> Work:
    """The first work of a client's visit, given what it received; the coroutine is left there."""
    flow = method.client(state, own or {}, Visit(t, client, SITES))
    work = flow.send(None)
    flow.close()
    assert isinstance(work, Work)
    return work


def visited(
    method: Method, state: State, client: Client, trained: Callable[[Work], State], t: int = 1, own: State | None = None
) -> tuple[State, State]:
    """(sent, kept) of a visit whose works are trained by a function."""
    flow = method.client(state, own or {}, Visit(t, client, sites_of_run(state)))
    answer: Any = None
    while True:
        try:
            work = flow.send(answer)
        except StopIteration as stop:
            result: tuple[State, State] = stop.value
            return result
        assert isinstance(work, Work)
        answer = Trained(trained(work), steps=1, lr_sum=1.0, loss=0.0)


def sites_of_run(state: State) -> dict[str, tuple[int, int]]:
    """The toy's sites, or those of a state with other ones."""
    named = {site for role in ("A", "B") for site in state.get(role, {})}
    return SITES if named <= SITES.keys() else lora.sites_of(state)


ONE = state([[1.0, 2.0]], [[3.0], [5.0], [0.0]])
TWO = state([[5.0, 6.0]], [[7.0], [1.0], [4.0]])
ZERO = state([[0.0, 0.0]], [[0.0], [0.0], [0.0]])


def served(method: Method, at: State, client: Client, sites: dict[str, tuple[int, int]]) -> Group:
    """What a client's model adds to its frozen weights at evaluation."""
    return update(method.model(method.serve(at, client), {}, Visit(1, client, sites)))


def random_uploads(ranks: Sequence[int], sites: dict[str, tuple[int, int]] = SITES, key: int = 0) -> list[Sent]:
    """Clients of given ranks and different sizes, in float64."""
    made = []
    for i, r in enumerate(ranks):
        rng = generator(key, i)
        A = {s: torch.randn(r, n, generator=rng, dtype=torch.float64) for s, (_, n) in sites.items()}
        B = {s: torch.randn(m, r, generator=rng, dtype=torch.float64) for s, (m, _) in sites.items()}
        made.append((Client(f"c{i}", 2 * i + 3, r), {"A": A, "B": B}))
    return made


def ideal(sent: Sequence[Sent], scale: Callable[[Client], float]) -> Group:
    """sum_k p_k s_k B_k A_k, densely."""
    total = sum(client.examples for client, _ in sent)
    out: Group = {}
    for client, state in sent:
        for site, A in state["A"].items():
            term = client.examples / total * scale(client) * state["B"][site] @ A
            out[site] = out.get(site, torch.zeros(())) + term
    return out


# wrappers over any method


def with_tau(client: Client, t: int, received: State) -> tuple[int, int]:
    """The factors, and up the sum of the learning rates."""
    return plus_up(factors, 4)(client, t, received)


def plus_up(inner: Payload, more: int) -> Payload:
    """A number or two, up alone."""
    return lambda client, t, received: (inner(client, t, received)[0], inner(client, t, received)[1] + more)


def quantised(bits: int) -> Payload:
    """Down as ever; up `bits` a number and 4 bytes a tensor, of the head too."""

    def payload(client: Client, t: int, received: State) -> tuple[int, int]:
        down, _ = factors(client, t, received)
        sizes = [x.numel() for role in ("A", "B", "head") for x in received[role].values()]
        return down, sum((n * bits + 7) // 8 + 4 for n in sizes) - HEAD_BYTES

    return payload


CASES += [
    Case("fedprox, product", _of("fedprox", mu=0.5, of="product")),
    Case("fedprox, product over fslora", _of("fedprox", "fslora", mu=0.5, of="product"), MIXED, payload=_SEED),
    Case("fedprox, product over feddpa", _of("fedprox", "feddpa", mu=0.5, of="product"), one_phase=False),
    Case("fednova", _of("fednova"), payload=with_tau, replaces=False),
    Case("fednova over fslora", _of("fednova", "fslora"), MIXED, payload=plus_up(_SEED, 4), replaces=False),
    Case("fedadam over fednova", _of("fedadam", "fednova", lr=0.02), payload=with_tau, replaces=False),
    Case("clip_updates", _of("clip_updates", norm=0.3), replaces=False),
    Case(
        "clip_updates over ffa_lora",
        _of("clip_updates", "ffa_lora", norm=0.3),
        MIXED,
        payload=one_factor(OUTS, 8),
        replaces=False,
    ),
    Case("scaffold over clip_updates", _of("scaffold", "clip_updates"), payload=controlled),
    Case("quantise", _of("quantise"), payload=quantised(8), each=True, replaces=False),
    Case(
        "quantise, 4 bits, stochastic",
        _of("quantise", bits=4, rounding="stochastic"),
        payload=quantised(4),
        each=True,
        replaces=False,
    ),
    Case(
        "quantise over fedex_lora",
        _of("quantise", "fedex_lora"),
        payload=with_offset(quantised(8)),
        each=True,
        replaces=False,
    ),
    Case("median", _of("median"), each=True),
    Case("median over ffa_lora", _of("median", "ffa_lora"), MIXED, payload=one_factor(OUTS, 8), each=True),
    Case("trimmed_mean", _of("trimmed_mean", trim=0.3), each=True),
    Case("multi_krum", _of("multi_krum"), each=True),
    Case("norm_filter", _of("norm_filter"), each=True),
    Case("fedawa", _of("fedawa", steps=3, lr=0.1), each=True),
    Case("fedawa over fslora", _of("fedawa", "fslora"), MIXED, payload=_SEED, each=True),
    Case("scaffold over median", _of("scaffold", "median"), payload=controlled, each=True),
]


# sparse


def sparse(down: float, up: float) -> Payload:
    """The values, and a bit for every entry of the factors."""

    def payload(client: Client, t: int, received: State) -> tuple[int, int]:
        n = RANK * (OUTS + INS)
        kept_down, kept_up = (max(1, int(n * share)) for share in (down, up))
        return 4 * kept_down + (n + 7) // 8, 4 * kept_up + (n + 7) // 8

    return payload


CASES += [
    Case("flasc", _of("flasc", down=0.8, up=0.5), payload=sparse(0.8, 0.5), each=True, replaces=False),
    Case("flasc, dense", _of("flasc", down=1.0, up=1.0), payload=sparse(1, 1), each=True, replaces=False),
    Case(
        "fedadam over flasc",
        _of("fedadam", _of("flasc", down=0.8, up=0.5), lr=0.02),
        payload=sparse(0.8, 0.5),
        each=True,
        replaces=False,
    ),
]
