"""FSLoRA: every client trains a random sketch of the rank components, as large as its budget.

Fang, Han, Yuan, Hosseinalipour, Brinton, "Federated Sketching LoRA", arXiv 2501.19389. Equation numbers are those of our
reconstruction: the paper's own text was not available in full. Client k trains W0 + s B S A with the diagonal sketch
S = (r/k) sum_{j in I} e_j e_j^T, E[S] = 1 (3); since B S A = (r/k) B_I A_I (4) it trains the slice alone, at scale s r/k.
(The official code compares full parameter names with "lora_A", which never match: its sketch is never applied.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from fedloom import lora, slices
from fedloom.core import Client, Group, Method, Sites, State, Upload, Work
from fedloom.errors import ConfigError
from fedloom.methods import choice, inner


@dataclass(frozen=True, kw_only=True)
class FSLoRA(Method):
    """One index set I per client, round and site, for the columns of B and the rows of A alike; a new one each round.

    Aggregation (16)-(17): B <- B + (1/M) sum_k scatter(dB_k), the same for A, over the M clients that reported.
    """

    sketch: str = "uniform"
    """`uniform`: a random k-subset; `balanced`: blocks of a random permutation, so that a client that takes part in every
    round visits each row once in ceil(r/k) of them; `importance`: unbiased, rows drawn with probability pi_j, scaled by
    1/pi_j."""
    importance_mix: float = 0.5
    """Share of the uniform law in pi: bounds the scale of a rarely drawn row by r / (k importance_mix)."""
    weights: str = "uniform"
    """`uniform`: 1/M as in (16)-(17); `examples`: n_k / n."""
    over: str = "fedit"
    """The method whose aggregate is sketched."""

    name: ClassVar[str] = "fslora"
    paper: ClassVar[str] = "Fang et al., Federated Sketching LoRA, arXiv 2501.19389"
    budgets: ClassVar[frozenset[str]] = frozenset({"rank"})
    sliceable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        choice(self.name, "sketch", self.sketch, "uniform", "balanced", "importance")
        choice(self.name, "weights", self.weights, "uniform", "examples")
        if not 0 < self.importance_mix <= 1:
            raise ConfigError(
                f"fslora: importance_mix is {self.importance_mix}, expected a number above 0 and at most 1"
            )
        if "rank" in self._inner.budgets:
            raise ConfigError(
                f"fslora draws the ranks of a client, as {self.over!r} does: choose over = 'fedit' or 'fedex_lora'"
            )

    @cached_property
    def _inner(self) -> Method:
        return inner(self, self.over)

    def _whole(self, client: Client) -> Client:
        return replace(client, rank=self.rank)

    # the sketch: role "sketch" holds a seed (and a block), or the indices themselves where they depend on the state

    def _draw(self, state: State, client: Client, t: int) -> State:
        seed = int(state["sketch"]["seed"])
        if self.sketch == "importance" and client.rank < self.rank:
            index, weight = {}, {}
            for site, A in state["A"].items():
                pi = inclusion(A.norm(dim=1) * state["B"][site].norm(dim=0), client.rank, self.importance_mix)
                chosen = systematic(pi, lora.generator(seed, t, client.id, site))
                index[site], weight[site] = chosen.to(torch.int32), (1 / pi[chosen]).to(A.dtype)
            return {"sketch": index, "sketch_weight": weight}
        if self.sketch == "balanced":
            blocks = -(-self.rank // client.rank)
            cycle, block = divmod(max(t, 1) - 1, blocks)
            draw = [lora.seed_of(seed, cycle, client.id), block]
        else:
            draw = [lora.seed_of(seed, t, client.id)]
        return {"sketch": {"seed": torch.tensor(draw)}}

    def _cuts(self, sketch: Group, sites: Iterable[str], rank: int) -> slices.Cuts:
        """Site -> the sorted index set, the same on both sides of the wire."""
        if "seed" not in sketch:
            return {site: slices.Cut(rank=sketch[site].long()) for site in sites}
        seed, *block = sketch["seed"].tolist()
        start = block[0] * rank if block else 0
        cuts = {}
        for site in sites:
            order = torch.randperm(self.rank, generator=lora.generator(seed, site))
            # The last block is topped up from the permutation's head: still a uniform random k-subset.
            index = torch.cat([order[start:], order])[:rank]
            cuts[site] = slices.Cut(rank=index.sort().values)
        return cuts

    # server

    def init(self, sites: Sites, rng: torch.Generator) -> State:
        seed = torch.randint(2**62, (1,), generator=rng)
        idle = {site: torch.zeros(2, self.rank, dtype=torch.int64) for site in sites}
        return self._inner.init(sites, rng) | {"sketch": {"seed": seed}, "idle": idle}

    def broadcast(self, state: State, client: Client, t: int) -> State:
        draw = self._draw(state, client, t)
        sent = self._inner.broadcast(state, self._whole(client), t)
        return slices.take(sent, self._cuts(draw["sketch"], sent["A"], client.rank)) | draw

    def expected(self, received: State, t: int) -> State:
        return lora.without(self._inner.expected(received, t), "sketch_weight")

    def aggregate(self, state: State, uploads: Iterable[Upload]) -> State:
        visited = {site: torch.zeros(self.rank, dtype=torch.bool) for site in state["A"]}

        def whole() -> Iterator[Upload]:
            for upload in uploads:
                client = self._whole(upload.client)
                cuts = self._cuts(upload.state["sketch"], state["A"], upload.client.rank)
                for site, cut in cuts.items():
                    visited[site][cut.rank] = True
                # Rows outside the sketch count as unchanged: dividing by M, not by a row's visits, is what makes
                # the step unbiased, since the forward pass was already scaled by r/k.
                full = slices.put(self._inner.broadcast(state, client, upload.t), upload.state, cuts)
                one = client if self.weights == "examples" else replace(client, examples=1)
                yield replace(upload, client=one, state=full)

        after = self._inner.aggregate(state, whole())
        idle = {}
        for site, gaps in state["idle"].items():
            now = torch.where(visited[site], 0, gaps[0] + 1)
            idle[site] = torch.stack([now, torch.maximum(gaps[1], now)])
        longest = torch.stack([gaps[1].max() for gaps in idle.values()]).max()
        return after | {"idle": idle, "report": {"longest_idle_rounds": longest}}

    # client

    def prepare(self, received: State, kept: State, sites: Sites, client: Client, t: int) -> Work:
        work = self._inner.prepare(
            lora.without(received, "sketch", "sketch_weight"), kept, sites, self._whole(client), t
        )
        if "sketch_weight" in received:
            return replace(work, fixed=work.fixed | {"sketch_weight": received["sketch_weight"]})
        # (alpha/r)(r/k) = alpha/k; rank-stabilised: (alpha/sqrt r)(r/k).
        return replace(work, scale=work.scale * (self.rank / client.rank))

    def adapter(self, train: State, fixed: State) -> tuple[Group, Group]:
        A, B = self._inner.adapter(train, fixed)
        weight = fixed.get("sketch_weight")
        return (A, B) if weight is None else (A, {site: x * weight[site] for site, x in B.items()})

    def penalty(self, train: State, fixed: State) -> Tensor | None:
        return self._inner.penalty(train, fixed)

    def finish(self, work: Work, trained: State, received: State) -> tuple[State, State]:
        sent, kept = self._inner.finish(work, trained, received)
        return sent | lora.only(received, "sketch"), kept


def inclusion(importance: Tensor, k: int, mix: float) -> Tensor:
    """Inclusion probabilities pi (r,) float64 with sum k and 0 < pi <= 1: proportional to the mixed importance, capped at 1.

    >>> inclusion(torch.tensor([0.0, 0.0, 0.0, 0.0]), 2, 0.5).tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    r = importance.numel()
    total = importance.double().sum()
    share = importance.double() / total if total > 0 else torch.full((r,), 1 / r, dtype=torch.float64)
    share = mix / r + (1 - mix) * share
    pi = torch.zeros(r, dtype=torch.float64)
    while True:  # each pass caps at least one more entry
        free = pi < 1
        pi = torch.where(free, share * (k - (~free).sum()) / share[free].sum(), pi) if free.any() else pi
        if not (pi > 1).any():
            return pi
        pi = pi.clamp(max=1)


def systematic(pi: Tensor, rng: torch.Generator) -> Tensor:
    """sum(pi) sorted indices in which j occurs with probability pi_j: systematic sampling in random order."""
    order = torch.randperm(pi.numel(), generator=rng)
    start = torch.rand(1, generator=rng, dtype=torch.float64)
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), pi[order].cumsum(0)])
    # The total is an integer up to rounding: pin it, so that rounding never loses or gains an index.
    edges[-1] = edges[-1].round()
    hits = torch.ceil(edges[1:] - start) - torch.ceil(edges[:-1] - start)
    return order[hits > 0].sort().values
