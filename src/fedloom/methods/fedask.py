"""FedASK: the mean product's leading triplets from two exchanges, in which the server sees no more than two sums.

Guo et al., "FedASK: Differentially Private Federated LoRA with Double Sketching", NeurIPS 2025, arXiv 2507.09990.
For D = sum_k p_k B_k A_k and a random Omega (in, l) that all share, clients send Y_k = B_k (A_k Omega); with Q an orthonormal
basis of their mean's range they send Z_k = A_k^T (B_k^T Q); Q (sum_k p_k Z_k)^T = U S V^T; B <- U S^{1/2}, A <- S^{1/2} V^T.
It is exact where l is at least the rank of D: K r in general, r if A is common.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from fedloom import lora
from fedloom.core import Mean, Round, Send, Visit, Work
from fedloom.methods.base import LoRA
from fedloom.rng import generator
from fedloom.spec import Leaf, Spec, like
from fedloom.state import Sites, State, only, without


@dataclass(frozen=True, kw_only=True)
class FedASK(LoRA):
    """Both exchanges are plain means: of all methods that decompose the product, the one that a secure sum serves."""

    oversample: Annotated[int, Ge(0)] = 0
    """Columns of Omega beyond the rank; 0 as in the official code, a few make the triplets better."""
    train: Literal["both", "B"] = "both"
    """`B`: A stands within a round, as in the paper's private mode; then nothing is lost."""

    name: ClassVar[str] = "fedask"
    paper: ClassVar[str] = "FedASK: Differentially Private Federated LoRA with Double Sketching, arXiv 2507.09990"
    group: ClassVar[str] = "exact sums"

    def init(self, sites: Sites, rng: torch.Generator) -> State:
        # Omega is drawn once (the official code) and travels as a seed.
        return lora.init(sites, self.rank, rng) | {"omega": {"seed": torch.randint(2**62, (1,), generator=rng)}}

    async def server(self, state: State, round: Round) -> State:
        dtype = next(iter(state["A"].values())).dtype
        sides: dict[str, Sites] = {
            "Y": {site: (m, self._width((m, n))) for site, (m, n) in round.sites.items()},
            "Z": {site: (n, self._width((m, n))) for site, (m, n) in round.sites.items()},
        }

        def sketch(role: str) -> Spec:
            return {role: {site: Leaf(shape, dtype) for site, shape in sides[role].items()}}

        first = await Mean(
            send=lambda client: only(state, "A", "B", "omega", "head"),
            expects=lambda client, sent: sketch("Y") | like(sent, "head"),
        )
        Q = {site: torch.linalg.qr(Y)[0] for site, Y in first.state["Y"].items()}
        second = await Mean(send=lambda client: {"Q": Q}, expects=lambda client, sent: sketch("Z"))
        A, B = {}, {}
        for site, Z in second.state["Z"].items():
            U, S, Vh = lora.svd(Q[site], Z.T)
            q, root = min(self.rank, S.numel()), S[: self.rank].sqrt()
            # Ranks that a small layer cannot fill stay as they are, with B = 0.
            A[site] = torch.cat([root[:, None] * Vh[:q], state["A"][site][q:]])
            B[site] = torch.cat([U[:, :q] * root, torch.zeros_like(state["B"][site][:, q:])], dim=1)
        return state | only(first.state, "head") | {"A": A, "B": B}

    def _width(self, shape: tuple[int, int]) -> int:
        return min(self.rank + self.oversample, *shape)

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        factors, seed = without(received, "omega"), int(received["omega"]["seed"])
        stands = () if self.train == "both" else ("A",)
        done = await Work(train=without(factors, *stands), fixed=only(factors, *stands), scale=self.scale)
        trained = factors | done.state
        A, B = trained["A"], trained["B"]
        Y = {site: B[site] @ (A[site] @ self._omega(seed, site, shape, A[site])) for site, shape in visit.sites.items()}
        Q = (await Send(only(trained, "head") | {"Y": Y}))["Q"]
        return {"Z": {site: A[site].T @ (B[site].T @ Q[site]) for site in visit.sites}}, {}

    def _omega(self, seed: int, site: str, shape: tuple[int, int], like: Tensor) -> Tensor:
        return torch.randn(shape[1], self._width(shape), generator=generator(seed, "omega", site)).to(like.dtype)
