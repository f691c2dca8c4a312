"""FedLoDrop: every client trains a random part of the columns of A and the rows of B, as large as its keep budget.

Xie, Wen, You, Chen, Bennis, Huang, "FedLoDrop: Federated LoRA with Dropout for Generalized LLM Fine-tuning", arXiv 2510.12078.
Equation numbers are those of our reconstruction: the paper's own text was not available in full. Masks (4), (5):
A diag(m_A), diag(m_B) B with independent Bernoulli(keep) entries per client, round and site; the rank is never dropped
and nothing is rescaled. A dropped entry gets no gradient, moment, decay or byte: the client trains the kept part alone.
(The official code zeroes entries once before training and lets them grow back; `mode = "official_code"` does the same.)
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
class FedLoDrop(Method):
    """Sub-adapters by dropout of rows and columns; their average, with what was dropped filled in."""

    law: str = "bernoulli"
    """`bernoulli`: independent entries; `exact`: n - floor((1 - keep) n) entries without replacement, as the official code."""
    aggregation: str = "keep"
    """What stands in for dropped entries in the average. The paper's rule was not seen. `keep` (10b): the
    server's own; `zeros` (10a): zero, which shrinks the adapter by about 1 - keep a round;
    `count` (10c): the mean of the clients that kept them."""
    mode: str = "sub_adapter"
    """`sub_adapter`: dropped entries stay dropped; `official_code`: they start at zero, then train and travel like others."""
    weights: str = "examples"
    """`examples`: n_k / n, as in the analysis; `uniform`: 1/K, as the official code."""
    over: str = "fedit"
    """The method whose aggregate the sub-adapters enter."""

    name: ClassVar[str] = "fedlodrop"
    paper: ClassVar[str] = "Xie et al., FedLoDrop: Federated LoRA with Dropout, arXiv 2510.12078"
    budgets: ClassVar[frozenset[str]] = frozenset({"keep", "rank"})
    sliceable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        choice(self.name, "law", self.law, "bernoulli", "exact")
        choice(self.name, "aggregation", self.aggregation, "keep", "zeros", "count")
        choice(self.name, "mode", self.mode, "sub_adapter", "official_code")
        choice(self.name, "weights", self.weights, "examples", "uniform")
        budgets = self._inner.budgets  # which also refuses an `over` that takes no slices
        if self.aggregation == "count" and "rank" in budgets:
            raise ConfigError(
                f"fedlodrop: aggregation 'count' needs clients that hold every rank, which {self.over!r} does not give: "
                "use aggregation = 'keep' or over = 'fedit'"
            )

    @cached_property
    def _inner(self) -> Method:
        return inner(self, self.over)

    def check(self, client: Client) -> None:
        Method.check(self, client)
        self._inner.check(replace(client, keep=1.0))

    def _cuts(self, seed: int, sites: Sites, keep: float) -> slices.Cuts:
        """Site -> kept rows of B and columns of A: the same on both sides of the wire."""
        cuts = {}
        for site, (m, n) in sites.items():
            rng = lora.generator(seed, site)
            if self.law == "exact":
                rows, cols = (torch.randperm(d, generator=rng)[: d - int((1 - keep) * d + 1e-9)] for d in (m, n))
                rows, cols = rows.sort().values, cols.sort().values
            else:
                rows, cols = ((torch.rand(d, generator=rng) < keep).nonzero().squeeze(1) for d in (m, n))
            cuts[site] = slices.Cut(rows=rows, cols=cols)
        return cuts

    # server

    def init(self, sites: Sites, rng: torch.Generator) -> State:
        seed = torch.randint(2**62, (1,), generator=rng)
        return self._inner.init(sites, rng) | {"mask": {"seed": seed}}

    def broadcast(self, state: State, client: Client, t: int) -> State:
        seed = lora.seed_of(int(state["mask"]["seed"]), t, client.id)
        whole = self._inner.broadcast(state, client, t)
        cuts = self._cuts(seed, lora.sites_of(whole), client.keep)
        sent = slices.take(whole, cuts)
        if self.mode == "official_code":
            return slices.put(_zeros(whole), sent, cuts)
        return sent | {"mask": {"seed": torch.tensor([seed])}}

    def expected(self, received: State, t: int) -> State:
        return self._inner.expected(received, t)

    def aggregate(self, state: State, uploads: Iterable[Upload]) -> State:
        if self.aggregation == "count" and self.mode == "sub_adapter":
            uploads = list(uploads)
            state_of_kept = self._mean_of_kept(state, uploads)

        def whole() -> Iterator[Upload]:
            for upload in uploads:
                full = upload.state
                if self.mode == "sub_adapter":
                    around = self._inner.broadcast(state, upload.client, upload.t)
                    if self.aggregation == "zeros":
                        around = _zeros(around)
                    elif self.aggregation == "count":
                        # An entry filled with the mean of those that kept it leaves that mean unchanged.
                        around = around | state_of_kept
                    cuts = self._cuts(int(full["mask"]["seed"]), lora.sites_of(around), upload.client.keep)
                    full = slices.put(around, lora.without(full, "mask"), cuts)
                client = replace(upload.client, examples=1) if self.weights == "uniform" else upload.client
                yield replace(upload, client=client, state=full)

        return self._inner.aggregate(state, whole())

    def _mean_of_kept(self, state: State, uploads: Iterable[Upload]) -> State:
        """sum_k w_k m_k x_k / sum_k w_k m_k per entry; the server's own where nobody kept it."""
        sites = lora.sites_of(state)
        blank = _zeros(lora.only(state, "A", "B"))
        total, count = _zeros(blank), _zeros(blank)
        for upload in uploads:
            w = 1.0 if self.weights == "uniform" else float(upload.client.examples)
            cuts = self._cuts(int(upload.state["mask"]["seed"]), sites, upload.client.keep)
            part = lora.only(upload.state, "A", "B")
            ones = {role: {site: torch.ones_like(x) for site, x in group.items()} for role, group in part.items()}
            full, mask = slices.put(blank, part, cuts), slices.put(blank, ones, cuts)
            for role in ("A", "B"):
                for site in sites:
                    total[role][site] += w * full[role][site]
                    count[role][site] += w * mask[role][site]
        return {
            role: {
                site: torch.where(n > 0, total[role][site] / n.clamp_min(1e-30), state[role][site])
                for site, n in count[role].items()
            }
            for role in ("A", "B")
        }

    # client

    def prepare(self, received: State, kept: State, sites: Sites, client: Client, t: int) -> Work:
        work = self._inner.prepare(lora.without(received, "mask"), kept, sites, client, t)
        if self.mode == "official_code" or client.keep == 1.0:
            return work
        cuts = self._cuts(int(received["mask"]["seed"]), sites, client.keep)
        rank = {site: x.shape[0] for site, x in received["A"].items()}
        return replace(
            work,
            fixed=work.fixed
            | {
                "cols": {site: cut.cols for site, cut in cuts.items() if cut.cols is not None},
                "rows": {site: cut.rows for site, cut in cuts.items() if cut.rows is not None},
                "blank_A": {site: x.new_zeros(rank[site], sites[site][1]) for site, x in received["A"].items()},
                "blank_B": {site: x.new_zeros(sites[site][0], rank[site]) for site, x in received["B"].items()},
            },
        )

    def adapter(self, train: State, fixed: State) -> tuple[Group, Group]:
        A, B = self._inner.adapter(train, fixed)
        if "cols" not in fixed:
            return A, B
        return (
            {site: fixed["blank_A"][site].index_copy(1, fixed["cols"][site], x) for site, x in A.items()},
            {site: fixed["blank_B"][site].index_copy(0, fixed["rows"][site], x) for site, x in B.items()},
        )

    def penalty(self, train: State, fixed: State) -> Tensor | None:
        return self._inner.penalty(train, fixed)

    def finish(self, work: Work, trained: State, received: State) -> tuple[State, State]:
        sent, kept = self._inner.finish(work, trained, lora.without(received, "mask"))
        return sent | lora.only(received, "mask"), kept


def _zeros(state: State) -> State:
    """The state with A and B zero."""
    return state | {role: {site: torch.zeros_like(x) for site, x in state[role].items()} for role in ("A", "B")}
