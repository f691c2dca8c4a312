"""FedSVD: clients train B; after every round the server turns A to the right singular vectors of the product.

Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", NeurIPS 2025, arXiv 2505.12805.
With B the mean of the clients' and B A = U S V^T, A <- V^T and B <- U S: the product stays, and the rows of A are orthonormal.

A never leaves the row space of its start, A = T Q with Q (r, in) orthonormal and T (r, r). So Q travels as a seed and T as a
matrix, and U S V^T comes from the SVD of B T: O(out r^2), where the official code decomposes the dense product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from fedloom import lora
from fedloom.core import Client, Mean, Round, Visit, Work
from fedloom.methods import frozen
from fedloom.methods.base import LoRA
from fedloom.rng import generator
from fedloom.spec import like
from fedloom.state import Group, Sites, State, only


@dataclass(frozen=True, kw_only=True)
class FedSVD(LoRA):
    """Server state: B, the turn T, and the seed of Q.

    With plain SGD it is FFA-LoRA at the basis that the first SVD gives (its gradient turns along); it differs with optimisers
    that rescale coordinates, as Adam.
    """

    every: Annotated[int, Ge(1)] = 1
    """Rounds from one SVD to the next."""
    a_init: Literal["kaiming", "orthonormal"] = "kaiming"
    """A until the first SVD: as LoRA draws it (the official code), or orthonormal as it is from then on."""

    name: ClassVar[str] = "fedsvd"
    paper: ClassVar[str] = (
        "Lee et al., FedSVD: Adaptive Orthogonalization for Private Federated Learning, arXiv 2505.12805"
    )

    def init(self, sites: Sites, rng: torch.Generator) -> State:
        frozen.check_sides(self.name, self.rank, sites)
        seed = torch.randint(2**62, (1,), generator=rng)
        turn = {site: T for site, (T, _) in self._start(seed, sites).items()}
        if self.a_init == "orthonormal":
            turn = {site: torch.eye(self.rank) for site in sites}
        return {"B": lora.init_B(sites, self.rank), "turn": turn, "frozen": {"seed": seed}}

    def _start(self, seed: Tensor, sites: Sites) -> dict[str, tuple[Tensor, Tensor]]:
        """T (r, r) and Q (r, in) with T Q the A that LoRA starts from."""
        made = {}
        for site, shape in sites.items():
            A = lora.init_A({site: shape}, self.rank, generator(int(seed), site))[site]
            Q, R = torch.linalg.qr(A.T)
            made[site] = R.T.contiguous(), Q.T
        return made

    async def server(self, state: State, round: Round) -> State:
        mean = await Mean(
            send=lambda client: self.serve(state, client), expects=lambda client, sent: like(sent, "B", "head")
        )
        after = state | mean.state
        if round.t % self.every:
            return after
        B: Group = {}
        turn: Group = {}
        for site, x in after["B"].items():
            U, S, turn[site] = lora.svd(x, after["turn"][site])
            B[site] = U * S
        return after | {"B": B, "turn": turn}

    def serve(self, state: State, client: Client) -> State:
        return only(state, "B", "turn", "frozen", "head")

    def model(self, received: State, own: State, visit: Visit) -> Work:
        start = self._start(received["frozen"]["seed"], visit.sites)
        A = {site: T @ start[site][1].to(T.dtype) for site, T in received["turn"].items()}
        return Work(train=only(received, "B", "head"), fixed={"A": A}, scale=self.scale)
