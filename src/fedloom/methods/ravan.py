"""RAVAN: several heads with frozen bases; a client trains the heads it can afford, and each is averaged over who trained it.

Raje et al., "Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning", NeurIPS 2025, arXiv 2506.05568.
W0 + s sum_h c_h B_h H_h A_h with frozen B_h, A_h. H_h (starts at 0) and the scalars c_h (1) are trained; a client sends
c_h H_h for its heads, and every round starts from c_h = 1: the mean is exact, and N numbers a layer reach rank sqrt(N heads).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from fedloom.core import Client, Factors, Mean, Round, Visit, Work
from fedloom.errors import ConfigError
from fedloom.methods import frozen
from fedloom.methods.base import LoRA
from fedloom.rng import generator
from fedloom.spec import Leaf, Spec, like
from fedloom.state import Group, Sites, State, only


@dataclass(frozen=True, kw_only=True)
class Ravan(LoRA):
    """The rank is that of all heads together; a client of a smaller rank trains that share of the heads, in every layer.

    All heads go down, as a client's model has them all. Up go the heads it trained and which these are, whole numbers: there
    is no secure sum of them.
    """

    heads: Annotated[int, Ge(1)] = 4
    """Number of heads, each of rank `rank / heads`."""
    choose: Literal["random", "weight", "gradient"] = "weight"
    """Which heads a client trains: drawn anew every round, those of the largest ||H_h||, or those of the largest gradient (one
    more batch)."""
    bases: Literal["orthogonal", "normal"] = "orthogonal"
    """Heads with orthogonal spaces (the paper's Gram-Schmidt, which it found best), or independent normal ones."""

    name: ClassVar[str] = "ravan"
    paper: ClassVar[str] = "Raje et al., Ravan: Multi-Head Low-Rank Adaptation, arXiv 2506.05568"
    group: ClassVar[str] = "small cores"
    budgets: ClassVar[frozenset[str]] = frozenset({"rank"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank % self.heads:
            raise ConfigError(
                f"ravan: heads is {self.heads}, expected a divisor of rank {self.rank}: change heads or [lora] rank"
            )

    def init(self, sites: Sites, rng: torch.Generator) -> State:
        frozen.check_sides(self.name, self.rank, sites)
        r = self.rank // self.heads
        seed = torch.randint(2**62, (1,), generator=rng)
        return {"H": {site: torch.zeros(self.heads, r, r) for site in sites}, "frozen": {"seed": seed}}

    def trains(self, client: Client) -> int:
        """How many heads a client trains in every layer."""
        # A budget between two counts is rounded down; everybody trains one.
        return max(1, client.rank * self.heads // self.rank)

    async def server(self, state: State, round: Round) -> State:
        mean = await Mean(
            send=lambda client: self.serve(state, client),
            expects=self._expects,
            lift=lambda client, upload: self._scatter(upload),
        )
        H: Group = {}
        for site, seen in mean.state["seen"].items():
            # A head that nobody trained stays.
            H[site] = torch.where(seen > 0, mean.state["H"][site] / seen.clamp_min(1e-30), state["H"][site])
        return state | only(mean.state, "head") | {"H": H}

    def _expects(self, client: Client, sent: State) -> Spec:
        n = self.trains(client)
        return like(sent, "head") | {
            "H": {site: Leaf((n, *x.shape[1:]), x.dtype) for site, x in sent["H"].items()},
            "which": {site: Leaf((n,), torch.int64) for site in sent["H"]},
        }

    def _scatter(self, upload: State) -> State:
        """All heads, zero where the client trained none, and `seen` (heads, 1, 1), 1 where it did."""
        H: Group = {}
        seen: Group = {}
        for site, x in upload["H"].items():
            # One-hot rather than indexed: a number out of range is no head, and cannot end the round.
            at = (upload["which"][site][:, None] == torch.arange(self.heads)).to(x.dtype)
            H[site] = torch.einsum("ih,ijk->hjk", at, x)
            seen[site] = at.amax(0)[:, None, None]
        return only(upload, "head") | {"H": H, "seen": seen}

    def spread(self, upload: State, received: State, visit: Visit) -> State:
        return self._scatter(upload)

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        which = await self._which(received, visit)
        done = await self._work(received, visit, which)
        sent = {site: done.state["c"][site][:, None, None] * x for site, x in done.state["H"].items()}
        return only(done.state, "head") | {"H": sent, "which": which}, {}

    async def _which(self, received: State, visit: Visit) -> Group:
        """The heads to train, sorted, per site."""
        score = {site: torch.zeros(self.heads) for site in visit.sites}
        if self.choose == "weight":
            score = {site: x.square().sum((1, 2)) for site, x in received["H"].items()}
        elif self.choose == "gradient" and self.trains(visit.client) < self.heads:
            every = {site: torch.arange(self.heads) for site in visit.sites}
            step = self._work(received, visit, every)
            moved = await Work(
                train=only(step.train, "H"),
                fixed=step.fixed | only(step.train, "c", "head"),
                scale=self.scale,
                steps=1,
                optimizer="sgd",
                adapter=_heads,
            )
            score = {site: (x - received["H"][site]).square().sum((1, 2)) for site, x in moved.state["H"].items()}
        chosen: Group = {}
        for site, x in score.items():
            # Equal scores, as all are at first, are decided by lot (the paper does not say).
            lot = torch.randperm(self.heads, generator=generator("heads", visit.t, visit.client.id, site))
            best = x[lot].sort(descending=True, stable=True).indices[: self.trains(visit.client)]
            chosen[site] = lot[best].sort().values
        return chosen

    def _work(self, received: State, visit: Visit, which: Group) -> Work:
        """Trains the heads of `which`; the others stand, in the same model."""
        seed, dtype = int(received["frozen"]["seed"]), next(iter(received["H"].values())).dtype
        A, B = frozen.rows(seed, visit.sites, self.rank, dtype), frozen.columns(seed, visit.sites, self.rank, dtype)
        if self.bases == "normal":
            A = {site: _normal(x.T, seed, "A", site).T for site, x in A.items()}
            B = {site: _normal(x, seed, "B", site) for site, x in B.items()}
        H: Group = {}
        stands: Group = {}
        for site, x in received["H"].items():
            others = torch.tensor([h for h in range(self.heads) if h not in which[site].tolist()], dtype=torch.int64)
            order = torch.cat([which[site], others])
            # Bases in the order: trained, then standing.
            A[site] = A[site].reshape(self.heads, -1, A[site].shape[1])[order]
            B[site] = B[site].reshape(len(B[site]), self.heads, -1)[:, order].reshape(len(B[site]), -1)
            H[site], stands[site] = x[which[site]], x[others]
        ones = {site: torch.ones(len(x), dtype=dtype) for site, x in H.items()}
        return Work(
            train=only(received, "head") | {"H": H, "c": ones},
            fixed={"A": A, "B": B, "stands": stands},
            scale=self.scale,
            adapter=_heads,
        )

    def serve(self, state: State, client: Client) -> State:
        return only(state, "H", "head", "frozen")

    def model(self, received: State, own: State, visit: Visit) -> Work:
        return self._work(received, visit, {site: torch.arange(self.heads) for site in visit.sites})


def _heads(train: State, fixed: State) -> Factors:
    c = train.get("c") or fixed["c"]
    A: Group = {}
    for site, H in train["H"].items():
        cores = torch.cat([c[site][:, None, None] * H, fixed["stands"][site]])
        A[site] = (cores @ fixed["A"][site]).flatten(0, 1)
    return Factors(A, fixed["B"])


def _normal(x: Tensor, seed: int, factor: str, site: str) -> Tensor:
    """Independent normal columns of the same mean length, 1."""
    drawn = torch.randn(x.shape, generator=generator(seed, "normal", factor, site)).to(x.dtype)
    return drawn.div(x.shape[0] ** 0.5)
