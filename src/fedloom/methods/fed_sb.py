"""Fed-SB: only an (r, r) core R between two frozen bases is trained and sent.

Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated LoRA
Fine-Tuning", TMLR 2026, arXiv 2502.15436; its start is LoRA-SB's, Ponkshe et al., arXiv 2411.19557.
W0 + s B R A: the average sum_k p_k R_k is exact. Start: with G the gradient of the loss in the whole weight, the first step
of full fine-tuning by sign, -length sign(G) ~ U S V^T, gives B = U, R = S and A = V^T (s multiplies it too, as in the code).

The official code takes G from samples pooled from all clients. Here round 1 begins with one more exchange: clients send G,
which is dense, once. `start = "seed"` saves that: random bases that travel as a seed, and R = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from fedloom import lora
from fedloom.core import Averaged, Client, Factors, Mean, Round, Send, Visit, Work
from fedloom.methods import frozen
from fedloom.methods.base import LoRA
from fedloom.rng import generator
from fedloom.spec import Leaf, Spec, like
from fedloom.state import Group, Sites, State, only


@dataclass(frozen=True, kw_only=True)
class FedSB(LoRA):
    """R <- sum_k p_k R_k. Up goes R alone; down, besides, a seed, or B and A after a start by gradient: clients keep nothing.

    Ranks are larger than LoRA's: the paper takes 64 to 200.
    """

    start: Literal["gradient", "seed"] = "gradient"
    """`gradient`: the paper's, at the price of one dense upload. `seed`: random bases, for comparison or where that is too
    much."""
    length: Annotated[float, Gt(0)] = 1e-3
    """Of the first step, by sign. The official code: the learning rate / (share of warm-up x number of steps)."""
    batches: Annotated[int, Ge(1)] = 4
    """How many of its batches a client takes the gradient over. The official code: 50 to 170 samples in all."""

    name: ClassVar[str] = "fed_sb"
    paper: ClassVar[str] = "Singhal et al., Fed-SB: A Silver Bullet for Federated LoRA Fine-Tuning, arXiv 2502.15436"
    group: ClassVar[str] = "small cores"

    def init(self, sites: Sites, rng: torch.Generator) -> State:
        frozen.check_sides(self.name, self.rank, sites)
        seed = torch.randint(2**62, (1,), generator=rng)
        return {"R": {site: torch.zeros(self.rank, self.rank) for site in sites}, "frozen": {"seed": seed}}

    async def server(self, state: State, round: Round) -> State:
        begun = dict(state)
        if self.start == "gradient" and "A" not in state:
            gradient = await Mean(send=lambda client: self.serve(state, client), expects=_dense(round.sites))
            begun |= self._first_step(gradient, int(state["frozen"]["seed"]))
            mean = await Mean(
                send=lambda client: only(begun, "A", "B", "R"),
                expects=lambda client, sent: like(sent, "R") | like(state, "head"),
            )
        else:
            mean = await Mean(
                send=lambda client: self.serve(state, client), expects=lambda client, sent: like(sent, "R", "head")
            )
        return begun | mean.state

    def _first_step(self, gradient: Averaged, seed: int) -> State:
        A: Group = {}
        B: Group = {}
        R: Group = {}
        for site, G in gradient.state["G"].items():
            U, S, Vh = leading(-self.length * G.sign(), self.rank, generator(seed, "svd", site))
            A[site], B[site], R[site] = Vh, U, S.diag()
        return {"A": A, "B": B, "R": R}

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        if self.start == "gradient" and "A" not in received:
            received = only(received, "head") | await Send({"G": await self._gradient(received, visit)})
        done = await self.model(received, own, visit)
        return done.state, {}

    async def _gradient(self, received: State, visit: Visit) -> Group:
        """Mean gradient of the loss in the whole weights, (out, in) per site, by one step of SGD from no change at all."""
        dtype = next(iter(received["R"].values())).dtype
        mean, blank = lora.Mean(), {site: torch.zeros(shape, dtype=dtype) for site, shape in visit.sites.items()}
        for _ in range(self.batches):
            done = await Work(
                train={"G": blank}, fixed=only(received, "head"), steps=1, optimizer="sgd", adapter=_whole_weight
            )
            # A learning rate of zero moves nothing; its gradient counts as zero.
            mean.add({"G": {site: -x / (done.lr_sum or 1.0) for site, x in done.state["G"].items()}}, 1.0)
        return mean.value["G"]

    def serve(self, state: State, client: Client) -> State:
        return only(state, "R", "head", *(("A", "B") if "A" in state else ("frozen",)))

    def model(self, received: State, own: State, visit: Visit) -> Work:
        fixed = only(received, "A", "B")
        if not fixed:
            seed, dtype = int(received["frozen"]["seed"]), next(iter(received["R"].values())).dtype
            fixed = {
                "A": frozen.rows(seed, visit.sites, self.rank, dtype),
                "B": frozen.columns(seed, visit.sites, self.rank, dtype),
            }
        return Work(train=only(received, "R", "head"), fixed=fixed, scale=self.scale, adapter=_core)


def _core(train: State, fixed: State) -> Factors:
    return Factors({site: R @ fixed["A"][site] for site, R in train["R"].items()}, fixed["B"])


def _whole_weight(train: State, fixed: State) -> Factors:
    eye = {site: torch.eye(G.shape[1], dtype=G.dtype, device=G.device) for site, G in train["G"].items()}
    return Factors(eye, train["G"])


def _dense(sites: Sites) -> Callable[[Client, State], Spec]:
    def expects(client: Client, sent: State) -> Spec:
        dtype = next(iter(sent["R"].values())).dtype
        return {"G": {site: Leaf(shape, dtype) for site, shape in sites.items()}}

    return expects


def leading(X: Tensor, rank: int, rng: torch.Generator, iterations: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` singular triplets (U, S, Vh) of X (out, in), by randomised subspace iteration.

    As the official code does, whose `svd_lowrank` draws from the global generator. (Halko, Martinsson, Tropp, arXiv 0909.4061,
    algorithm 4.4.)
    """
    width = min(rank + 8, *X.shape)
    Q = torch.linalg.qr(X @ torch.randn(X.shape[1], width, generator=rng).to(X.dtype))[0]
    for _ in range(iterations):
        Q = torch.linalg.qr(X @ torch.linalg.qr(X.T @ Q)[0])[0]
    U, S, Vh = lora.svd(Q, Q.T @ X)
    return U[:, :rank].contiguous(), S[:rank], Vh[:rank].contiguous()
