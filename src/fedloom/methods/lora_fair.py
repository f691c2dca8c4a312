"""LoRA-FAIR: FedIT's averages, with B corrected on the server so that the product points where the clients' mean does.

Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement", ICCV 2025, arXiv
2411.14961. With D = sum_k p_k B_k A_k and A, B the averages, B <- B + X for
X = argmin 1 - cos(D, (B + X) A) + lambda ||X||_F. (The paper prints the similarity where its negative is meant.)

Nothing of the size of D is formed: <D, Y A> = <G, Y> and ||Y A||^2 = <Y H, Y> with G = sum_k p_k B_k (A_k A^T) and H = A A^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from fedloom import lora
from fedloom.core import Each, Round, Upload
from fedloom.methods.base import LoRA
from fedloom.state import State


@dataclass(frozen=True, kw_only=True)
class LoRAFAIR(LoRA):
    """A <- sum_k p_k A_k, B <- sum_k p_k B_k + X. All uploads are held: the means come first."""

    weight: Annotated[float, Ge(0)] = 0.01
    """Lambda: how near B stays to the average. 0 fits the direction alone, which the paper found to hurt."""
    steps: Annotated[int, Ge(1)] = 100
    """Steps on the server, O(out r^2) each. The paper's number is not known to us."""
    lr: Annotated[float, Gt(0), Le(1)] = 1.0
    """Length of a step against the inverse of the curvature. The paper takes plain SGD, whose rate would have to follow the
    size of B (a reading: neither its rate nor its number of steps is known to us); these steps do not depend on it."""

    name: ClassVar[str] = "lora_fair"
    paper: ClassVar[str] = (
        "Bian et al., LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement, arXiv 2411.14961"
    )

    async def server(self, state: State, round: Round) -> State:
        uploads = list(await Each(send=lambda client: self.serve(state, client)))
        mean = lora.Mean()
        for upload in uploads:
            mean.add(upload.state, upload.weight)
        if len(uploads) == 1:
            return state | mean.value
        A = mean.value["A"]
        B = {site: self._corrected(uploads, site, x, A[site]) for site, x in mean.value["B"].items()}
        return state | mean.value | {"B": B}

    def _corrected(self, uploads: Sequence[Upload], site: str, B: Tensor, A: Tensor) -> Tensor:
        total = sum(upload.weight for upload in uploads)
        p = [upload.weight / total for upload in uploads]
        left = torch.cat([q * upload.state["B"][site] for q, upload in zip(p, uploads, strict=True)], dim=1)
        right = torch.cat([upload.state["A"][site] for upload in uploads])
        H = A @ A.T
        G, size = left @ (right @ A.T), lora.product_norm(left, right)
        return B + direction_fit(G, H, size, B, self.weight, self.steps, self.lr)


def direction_fit(G: Tensor, H: Tensor, size: Tensor, B: Tensor, weight: float, steps: int, lr: float) -> Tensor:
    """X (out, r) of the least 1 - <G, Y> / (size ||Y||_H) + weight ||X||_F with Y = B + X and ||Y||_H^2 = <Y H, Y>.

    Proximal gradient from X = 0; `size` is ||D||_F.
    """
    X = torch.zeros_like(B)
    square = ((B @ H) * B).sum()
    if not size > 0 or not square > 0:
        return X  # nothing was learnt: there is no direction
    step = lr * square / torch.linalg.matrix_norm(H, 2)
    for _ in range(steps):
        YH = (B + X) @ H
        norm = (YH * (B + X)).sum().sqrt()
        fit = (G * (B + X)).sum()
        X = X + step * (G / norm - fit * YH / norm**3) / size
        X = X * (1 - step * weight / X.norm().clamp_min(1e-30)).clamp_min(0)
    return X
