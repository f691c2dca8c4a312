"""FSLoRA: every client trains a random sketch of the rank components, as large as its budget.

Fang, Han, Yuan, Hosseinalipour, Brinton, "Federated Sketching LoRA", arXiv 2501.19389. Equation numbers are those of our
reconstruction: the paper's own text was not available in full. Client k trains W0 + s B S A with the diagonal sketch
S = (r/k) sum_{j in I} e_j e_j^T, E[S] = 1 (3); since B S A = (r/k) B_I A_I (4) it trains the slice alone, at scale s r/k.
(The official code compares full parameter names with "lora_A", which never match: its sketch is never applied.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor

from fedloom import slices
from fedloom.core import Client, Exchange, Factors, Round, Visit, Work
from fedloom.errors import ConfigError
from fedloom.flows import Over, at, followed_budgets, need_factors, relay, relay_works, weighting
from fedloom.rng import generator, seed_of
from fedloom.spec import Spec
from fedloom.state import Group, Sites, State, only


@dataclass(frozen=True, kw_only=True)
class FSLoRA(Over):
    """One index set I per client, round and site, for the columns of B and the rows of A alike; a new one each round.

    Aggregation (16)-(17): B <- B + (1/M) sum_k scatter(dB_k), the same for A, over the M clients that reported.

    What to choose (measured, docs/studies.md): the learning rate and alpha that suit FedIT, not larger ones, since a client of
    rank k trains at r/k times the server's scale; `weights = "examples"` where clients' sizes differ. A row moves only in
    rounds that draw it: plan two to three times FedIT's rounds, or take FlexLoRA where there are few.
    """

    sketch: Literal["uniform", "balanced", "importance"] = "uniform"
    """`uniform`: a random k-subset; `balanced`: blocks of a random permutation, so that a client that takes part in every
    round visits each row once in ceil(r/k) of them; `importance`: unbiased, rows drawn with probability pi_j, scaled by
    1/pi_j."""
    importance_mix: Annotated[float, Gt(0), Le(1)] = 0.5
    """Share of the uniform law in pi: bounds the scale of a rarely drawn row by r / (k importance_mix)."""
    weights: Literal["uniform", "examples", "auto"] = "uniform"
    """`uniform`: 1/M as in (16)-(17); `examples`: n_k / n; `auto`: the rule of the method under it."""

    name: ClassVar[str] = "fslora"
    paper: ClassVar[str] = "Fang et al., Federated Sketching LoRA, arXiv 2501.19389"
    group: ClassVar[str] = "sub-adapters"
    budgets: ClassVar[frozenset[str]] = frozenset({"rank"})
    adds: ClassVar[tuple[str, ...]] = ("sketch", "idle")

    def __post_init__(self) -> None:
        super().__post_init__()
        if "rank" in followed_budgets(self.over):
            raise ConfigError(
                f"fslora draws the ranks of a client, as {self.over.name} chooses them: choose another [method.over], "
                "such as fedit or fedex_lora"
            )
        need_factors(self, "a sketch")

    def init(self, sites: Sites, rng: torch.Generator) -> State:
        seed = torch.randint(2**62, (1,), generator=rng)
        idle = {site: torch.zeros(2, self.rank, dtype=torch.int64) for site in sites}
        return self.over.init(sites, rng) | {"sketch": {"seed": seed}, "idle": idle}

    async def server(self, state: State, round: Round) -> State:
        visited = {site: torch.zeros(self.rank, dtype=torch.bool) for site in state["A"]}

        async def sketched(x: Exchange[Any]) -> Any:
            @cache
            def draw(client: Client) -> State:
                return self._draw(state, client, round.t)

            def cuts(client: Client) -> slices.Cuts:
                return self._cuts(draw(client)["sketch"], state["A"], client.rank)

            def send(client: Client) -> State:
                return slices.take(x.send(self.whole(client)), cuts(client)) | draw(client)

            def expects(client: Client, sent: State) -> Spec:
                return x.expects(client, self.inner(sent))

            def lift(client: Client, upload: State) -> State:
                for site, cut in cuts(client).items():
                    visited[site][cut.rank] = True
                # Rows outside the sketch count as unchanged: dividing by M, not by a row's visits, is what makes
                # the step unbiased, since the forward pass was already scaled by r/k.
                return x.lift(client, slices.put(x.send(self.whole(client)), upload, cuts(client)))

            return await replace(x, send=send, expects=expects, lift=lift, weight=weighting(self.weights, x))

        after = await relay(self.over.server(self.inner(state), round), sketched)
        idle = _longer_idle(state["idle"], visited)
        round.report["longest_idle_rounds"] = float(max(gaps[1].max() for gaps in idle.values()))
        return after | only(state, "sketch") | {"idle": idle}

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        inner = self.over.client(self.inner(received), self.inner(own), at(visit, rank=self.rank))
        if "sketch_weight" not in received:
            ratio = self.rank / visit.client.rank  # (alpha/r)(r/k) = alpha/k; rank-stabilised: (alpha/sqrt r)(r/k)
            return await relay_works(inner, lambda work: replace(work, scale=work.scale * ratio))

        def weighted(work: Work) -> Work:
            def adapter(train: State, fixed: State) -> Factors:
                made = work.adapter(train, fixed)
                return made._replace(B={site: x * fixed["sketch_weight"][site] for site, x in made.B.items()})

            return replace(work, fixed=work.fixed | only(received, "sketch_weight"), adapter=adapter)

        return await relay_works(inner, weighted)

    def spread(self, upload: State, received: State, visit: Visit) -> State:
        # Spread at this wrapper's size first: the method under it knows whole ranks alone.
        wide = {
            "A": {site: x.new_zeros(self.rank, x.shape[1]) for site, x in upload["A"].items()},
            "B": {site: x.new_zeros(x.shape[0], self.rank) for site, x in upload["B"].items()},
        }
        full = slices.put(wide, upload, self._cuts(received["sketch"], upload["A"], visit.client.rank))
        return self.over.spread(full, self.inner(received), at(visit, rank=self.rank))

    # the sketch: role "sketch" holds a seed (and a block), or the indices themselves where they depend on the state

    def _draw(self, state: State, client: Client, t: int) -> State:
        seed = int(state["sketch"]["seed"])
        if self.sketch == "importance" and client.rank < self.rank:
            index, weight = {}, {}
            for site, A in state["A"].items():
                pi = inclusion(A.norm(dim=1) * state["B"][site].norm(dim=0), client.rank, self.importance_mix)
                chosen = systematic(pi, generator(seed, t, client.id, site))
                index[site], weight[site] = chosen.to(torch.int32), (1 / pi[chosen]).to(A.dtype)
            return {"sketch": index, "sketch_weight": weight}
        if self.sketch == "balanced":
            cycle, block = divmod(t - 1, -(-self.rank // client.rank))
            return {"sketch": {"seed": torch.tensor([seed_of(seed, cycle, client.id), block])}}
        return {"sketch": {"seed": torch.tensor([seed_of(seed, t, client.id)])}}

    def _cuts(self, sketch: Group, sites: Iterable[str], rank: int) -> slices.Cuts:
        """Site -> the sorted index set, the same on both sides of the wire."""
        if "seed" not in sketch:
            return {site: slices.Cut(rank=sketch[site].long()) for site in sites}
        seed, *block = sketch["seed"].tolist()
        start = block[0] * rank if block else 0
        cuts = {}
        for site in sites:
            order = torch.randperm(self.rank, generator=generator(seed, site))
            # The last block is topped up from the permutation's head: still a uniform random k-subset.
            cuts[site] = slices.Cut(rank=torch.cat([order[start:], order])[:rank].sort().values)
        return cuts


def _longer_idle(idle: Group, visited: Group) -> Group:
    """Site -> (2, r): rounds since each rank was last visited, and the longest such gap so far."""
    after = {}
    for site, gaps in idle.items():
        now = torch.where(visited[site], 0, gaps[0] + 1)
        after[site] = torch.stack([now, torch.maximum(gaps[1], now)])
    return after


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
