"""FedLoDrop: every client trains a random part of the columns of A and the rows of B, as large as its keep budget.

Xie, Wen, You, Chen, Bennis, Huang, "FedLoDrop: Federated LoRA with Dropout for Generalized LLM Fine-tuning", arXiv 2510.12078.
Equation numbers are those of our reconstruction: the paper's own text was not available in full. Masks (4), (5):
A diag(m_A), diag(m_B) B with independent Bernoulli(keep) entries per client, round and site; the rank is never dropped
and nothing is rescaled. A dropped entry gets no gradient, moment, decay or byte: the client trains the kept part alone.
(The official code zeroes entries once before training and lets them grow back; `mode = "official_code"` does the same.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from fedloom import lora, slices
from fedloom.core import Averaged, Client, Exchange, Factors, Round, Visit, Work
from fedloom.errors import ConfigError
from fedloom.flows import Over, followed_budgets, need_factors, relay, relay_works, weighting
from fedloom.rng import generator, seed_of
from fedloom.state import Sites, State, only, without, zeros_like


@dataclass(frozen=True, kw_only=True)
class FedLoDrop(Over):
    """Sub-adapters by dropout of rows and columns; their average, with what was dropped filled in."""

    law: Literal["bernoulli", "exact"] = "bernoulli"
    """`bernoulli`: independent entries; `exact`: n - floor((1 - keep) n) entries without replacement, as the official code."""
    aggregation: Literal["keep", "zeros", "count"] = "keep"
    """What stands in for dropped entries in the average. The paper's rule was not seen. `keep` (10b): the
    server's own; `zeros` (10a): zero, which shrinks the adapter by about 1 - keep a round;
    `count` (10c): the mean of the clients that kept them."""
    mode: Literal["sub_adapter", "official_code"] = "sub_adapter"
    """`sub_adapter`: dropped entries stay dropped; `official_code`: they start at zero, then train and travel like others."""
    weights: Literal["auto", "examples", "uniform"] = "auto"
    """`auto`: the rule of the method under it (n_k / n over fedit, as in the analysis); `uniform`: 1/K, as official code."""

    name: ClassVar[str] = "fedlodrop"
    paper: ClassVar[str] = "Xie et al., FedLoDrop: Federated LoRA with Dropout, arXiv 2510.12078"
    group: ClassVar[str] = "sub-adapters"
    budgets: ClassVar[frozenset[str]] = frozenset({"keep"})
    adds: ClassVar[tuple[str, ...]] = ("mask",)

    def __post_init__(self) -> None:
        super().__post_init__()
        need_factors(self, "dropout of rows and columns")
        if self.aggregation == "count" and "rank" in followed_budgets(self.over):
            raise ConfigError(
                f"fedlodrop: aggregation 'count' needs clients that hold every rank, which {self.over.name} does not give: "
                "use aggregation = 'keep' or another [method.over]"
            )

    def init(self, sites: Sites, rng: torch.Generator) -> State:
        seed = torch.randint(2**62, (1,), generator=rng)
        return self.over.init(sites, rng) | {"mask": {"seed": seed}}

    async def server(self, state: State, round: Round) -> State:
        def mask(client: Client) -> State:
            seed = seed_of(int(state["mask"]["seed"]), round.t, client.id)
            return {"mask": {"seed": torch.tensor([seed])}}

        async def dropped(x: Exchange[Any]) -> Any:
            def around(client: Client) -> tuple[State, slices.Cuts]:
                whole = x.send(self.whole(client))
                return whole, self._cuts(mask(client), lora.sites_of(whole), client.keep)

            def send(client: Client) -> State:
                whole, cuts = around(client)
                sent = slices.take(whole, cuts)
                return slices.put(_blank(whole), sent, cuts) if self.mode == "official_code" else sent | mask(client)

            def lift(client: Client, upload: State) -> State:
                whole, cuts = around(client)
                full = slices.put(whole if self.aggregation == "keep" else _blank(whole), upload, cuts)
                return x.lift(client, full)

            x = replace(x, weight=weighting(self.weights, x))
            if self.mode == "official_code":
                return await replace(x, send=send)
            if self.aggregation == "count":
                return await _counted(replace(x, send=send), x.lift, around, state)
            return await replace(x, send=send, lift=lift)

        after = await relay(self.over.server(self.inner(state), round), dropped)
        return after | only(state, "mask")

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        inner = self.over.client(self.inner(received), self.inner(own), replace(visit, client=self.whole(visit.client)))
        if visit.client.keep == 1.0 or self.mode == "official_code":
            return await inner
        cuts = self._cuts(received, visit.sites, visit.client.keep)
        A, B = received["A"], received["B"]
        scatter: State = {
            "cols": {site: cut.cols for site, cut in cuts.items() if cut.cols is not None},
            "rows": {site: cut.rows for site, cut in cuts.items() if cut.rows is not None},
            "blank_A": {site: A[site].new_zeros(len(A[site]), n) for site, (_, n) in visit.sites.items()},
            "blank_B": {site: B[site].new_zeros(m, B[site].shape[1]) for site, (m, _) in visit.sites.items()},
        }

        def at_full_size(work: Work) -> Work:
            def adapter(train: State, fixed: State) -> Factors:
                made = work.adapter(train, fixed)
                return made._replace(
                    A={s: fixed["blank_A"][s].index_copy(1, fixed["cols"][s], x) for s, x in made.A.items()},
                    B={s: fixed["blank_B"][s].index_copy(0, fixed["rows"][s], x) for s, x in made.B.items()},
                )

            return replace(work, fixed=work.fixed | scatter, adapter=adapter)

        return await relay_works(inner, at_full_size)

    def spread(self, upload: State, received: State, visit: Visit) -> State:
        inner_visit = replace(visit, client=self.whole(visit.client))
        if self.mode == "official_code":
            return self.over.spread(upload, self.inner(received), inner_visit)
        # Spread at this wrapper's size first: the method under it knows whole rows and columns alone.
        cuts = self._cuts(received, visit.sites, visit.client.keep)
        wide = {
            "A": {s: x.new_zeros(len(x), visit.sites[s][1]) for s, x in upload["A"].items()},
            "B": {s: x.new_zeros(visit.sites[s][0], x.shape[1]) for s, x in upload["B"].items()},
        }
        return self.over.spread(slices.put(wide, upload, cuts), self.inner(received), inner_visit)

    def _cuts(self, draw: State, sites: Sites, keep: float) -> slices.Cuts:
        """Site -> kept rows of B and columns of A: the same on both sides of the wire."""
        cuts = {}
        for site, (m, n) in sites.items():
            rng = generator(int(draw["mask"]["seed"]), site)
            if self.law == "exact":
                rows, cols = (torch.randperm(d, generator=rng)[: d - int((1 - keep) * d + 1e-9)] for d in (m, n))
                rows, cols = rows.sort().values, cols.sort().values
            else:
                rows, cols = ((torch.rand(d, generator=rng) < keep).nonzero().squeeze(1) for d in (m, n))
            cuts[site] = slices.Cut(rows=rows, cols=cols)
        return cuts


def _blank(state: State) -> State:
    """The state with A and B zero."""
    return state | zeros_like(only(state, "A", "B"))


async def _counted(
    x: Exchange[Any],
    lift: Callable[[Client, State], State],
    around: Callable[[Client], tuple[State, slices.Cuts]],
    state: State,
) -> Any:
    """An exchange in which what a client dropped counts as the mean of the clients that kept it: that mean is unchanged."""

    def with_mask(client: Client, upload: State) -> State:
        whole, cuts = around(client)
        ones = {role: {site: torch.ones_like(v) for site, v in upload[role].items()} for role in ("A", "B")}
        held = slices.put(_blank(whole), ones, cuts)
        return slices.put(_blank(whole), upload, cuts) | {"held_A": held["A"], "held_B": held["B"]}

    answer = await replace(x, lift=with_mask)
    if isinstance(answer, Averaged):
        return replace(answer, state=_of_those_who_held(answer.state, state))
    uploads, mean = list(answer), lora.Mean()
    for upload in uploads:
        mean.add(only(upload.state, "A", "B", "held_A", "held_B"), upload.weight)
    kept = _of_those_who_held(mean.value, state)
    return iter([replace(u, state=lift(u.client, _filled(u.state, kept))) for u in uploads])


def _of_those_who_held(mean: State, before: State) -> State:
    """sum_k p_k m_k x_k / sum_k p_k m_k for each entry; the server's own where nobody held it."""
    return without(mean, "held_A", "held_B") | {
        role: {
            site: torch.where(n > 0, mean[role][site] / n.clamp_min(1e-30), before[role][site])
            for site, n in mean["held_" + role].items()
        }
        for role in ("A", "B")
    }


def _filled(upload: State, kept: State) -> State:
    """The upload, with `kept` where the client held nothing."""
    return without(upload, "held_A", "held_B") | {
        role: {
            site: torch.where(held > 0, upload[role][site], kept[role][site])
            for site, held in upload["held_" + role].items()
        }
        for role in ("A", "B")
    }
