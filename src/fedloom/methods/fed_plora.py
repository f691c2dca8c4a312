"""Fed-PLoRA: every client trains some of the rank-1 components, drawn anew each round, and uses the others as they are.

Zhang, Hu, Xu, "Heterogeneous Federated Fine-Tuning with Parallel One-Rank Adaptation", ICLR 2026, arXiv 2602.16936.
Client k draws a set K_k of r_k of the R components, folds the others into its frozen weights, W_k = W0 + s sum_{j not in K_k}
B_j A_j, and trains those of K_k; the server averages each component over the clients that trained it. Unlike in FSLoRA a
client starts from the whole global model, and nothing is scaled by R / r_k; it receives all R components. The rule is that of
notes on the paper and its reviews: its code was not available.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedloom import slices
from fedloom.core import Client, Factors, Mean, Round, Visit, Work
from fedloom.methods.base import LoRA
from fedloom.methods.holders import mean_of_holders
from fedloom.rng import generator, seed_of
from fedloom.spec import Spec, like
from fedloom.state import Group, Sites, State, only


@dataclass(frozen=True, kw_only=True)
class FedPLoRA(LoRA):
    """At full rank it is FedIT. Components are drawn for each layer by itself (reading)."""

    name: ClassVar[str] = "fed_plora"
    paper: ClassVar[str] = (
        "Zhang et al., Heterogeneous Federated Fine-Tuning with Parallel One-Rank Adaptation, arXiv 2602.16936"
    )
    group: ClassVar[str] = "unequal ranks"
    budgets: ClassVar[frozenset[str]] = frozenset({"rank"})

    def init(self, sites: Sites, rng: torch.Generator) -> State:
        # Factors first: the start is then FedIT's.
        return super().init(sites, rng) | {"choice": {"seed": torch.randint(2**62, (1,), generator=rng)}}

    async def server(self, state: State, round: Round) -> State:
        seed = int(state["choice"]["seed"])

        def send(client: Client) -> State:
            return self.serve(state, client) | {"choice": {"seed": torch.tensor([seed_of(seed, round.t, client.id)])}}

        def expects(client: Client, sent: State) -> Spec:
            return like(self._chosen(sent, client.rank))

        def lift(client: Client, upload: State) -> State:
            return self._spread(upload, send(client)["choice"], client.rank, 1.0)

        mean = await Mean(send=send, expects=expects, lift=lift)
        return state | mean_of_holders(mean.state, state)

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        rest = {site: _others(cut, self.rank) for site, cut in self._cuts(received, visit.client.rank).items()}
        folded = slices.take(only(received, "A", "B"), rest)
        # Beside the trained components, not added to the frozen weights: the same model, and clients with different folds
        # share one frozen base.
        done = await Work(
            train=self._chosen(received, visit.client.rank),
            fixed={"A_rest": folded["A"], "B_rest": folded["B"]},
            scale=self.scale,
            adapter=_with_rest,
        )
        return done.state, {}

    def spread(self, upload: State, received: State, visit: Visit) -> State:
        return self._spread(upload, received["choice"], visit.client.rank, 0.0)

    def _spread(self, upload: State, choice: Group, rank: int, held: float) -> State:
        """The upload among zeros, and `held` for each rank that it holds."""
        wide = {
            "A": {site: x.new_zeros(self.rank, x.shape[1]) for site, x in upload["A"].items()},
            "B": {site: x.new_zeros(x.shape[0], self.rank) for site, x in upload["B"].items()},
        }
        cuts = _cuts(int(choice["seed"]), upload["A"], self.rank, rank)
        marks = {}
        for site, cut in cuts.items():
            marks[site] = upload["A"][site].new_zeros(self.rank)
            marks[site][cut.rank] = held
        return slices.put(wide, upload, cuts) | {"held": marks}

    def _cuts(self, received: State, rank: int) -> slices.Cuts:
        return _cuts(int(received["choice"]["seed"]), received["A"], self.rank, rank)

    def _chosen(self, received: State, rank: int) -> State:
        """The components to train, and the head."""
        return slices.take(only(received, "A", "B", "head"), self._cuts(received, rank))


def _cuts(seed: int, sites: Iterable[str], ranks: int, rank: int) -> slices.Cuts:
    """Site -> a uniform random subset of the ranks, the same on both sides of the wire."""
    return {
        site: slices.Cut(rank=torch.randperm(ranks, generator=generator(seed, site))[:rank].sort().values)
        for site in sites
    }


def _others(cut: slices.Cut, ranks: int) -> slices.Cut:
    mark = torch.ones(ranks, dtype=torch.bool)
    mark[cut.rank] = False
    return slices.Cut(rank=mark.nonzero().flatten())


def _with_rest(train: State, fixed: State) -> Factors:
    return Factors(
        {site: torch.cat([x, fixed["A_rest"][site]]) for site, x in train["A"].items()},
        {site: torch.cat([x, fixed["B_rest"][site]], dim=1) for site, x in train["B"].items()},
    )
