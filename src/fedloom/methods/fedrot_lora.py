"""FedRot-LoRA: clients turn their factors towards the common ones before they are averaged.

Zhang et al., "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA", ICML 2026, arXiv 2602.23638.
(B R, R^T A) is the same model for every rotation R, but not the same average. With A, B the factors that were sent, in turn
R* = argmin ||R^T A_k - A||_F or argmin ||B_k R - B||_F (orthogonal Procrustes, restricted to rotations), and a client sends
B_k R, R^T A_k for R the rotation nearest to (1 - lambda) I + lambda R*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from fedloom.core import Mean, Round, Visit, Work
from fedloom.methods.base import LoRA
from fedloom.state import State


@dataclass(frozen=True, kw_only=True)
class FedRotLoRA(LoRA):
    """FedIT on turned factors. Turning is the client's part: the server needs no more than the mean."""

    rotation: Annotated[float, Ge(0), Le(1)] = 0.5
    """Lambda: 0 is FedIT, 1 the hard rotation R*, between them a soft one; the paper recommends 0.4 to 0.6. (The official
    configuration's 1.5 stands for the hard one, there without the sign below: half of them are then reflections.)"""
    align: Literal["alternate", "A", "B"] = "alternate"
    """Which factor is matched: A in even rounds and B in odd ones, or always the one named (the paper's ablation)."""

    name: ClassVar[str] = "fedrot_lora"
    paper: ClassVar[str] = "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA, arXiv 2602.23638"

    async def server(self, state: State, round: Round) -> State:
        mean = await Mean(send=lambda client: self.serve(state, client))
        return state | mean.state

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        done = await Work(train=received, scale=self.scale)
        # In the first round B is zero: there is nothing to match, and all clients started from the same A.
        return (done.state if visit.t == 1 else self._turned(done.state, received, visit.t)), {}

    def _turned(self, trained: State, received: State, t: int) -> State:
        on_A = self.align == "A" or (self.align == "alternate" and t % 2 == 0)
        A, B = {}, {}
        for site, own_A in trained["A"].items():
            own_B = trained["B"][site]
            match = own_A @ received["A"][site].T if on_A else own_B.T @ received["B"][site]
            R = rotation(match)
            R = rotation((1 - self.rotation) * torch.eye(len(R), dtype=R.dtype) + self.rotation * R)
            A[site], B[site] = R.T @ own_A, own_B @ R
        return trained | {"A": A, "B": B}


def rotation(M: Tensor) -> Tensor:
    """The rotation R (r, r) with the largest <R, M>, which is also the nearest to M: U diag(1, .., 1, det(U V^T)) V^T."""
    U, _, Vh = torch.linalg.svd(M)
    U[:, -1] *= torch.linalg.det(U @ Vh).sign()
    R: Tensor = U @ Vh
    return R
