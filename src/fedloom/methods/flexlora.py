"""FlexLoRA: the clients' products are summed, decomposed, and redistributed at each client's own rank.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources", NeurIPS 2024,
arXiv 2402.11505. D = sum_k p_k s_k B_k A_k; a client of rank r gets B = U[:, :r] S[:r] / s_r and A = Vh[:r].
The official code forms D densely; here its SVD comes from the stacked factors through QR, which is exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedloom import lora, slices
from fedloom.core import Client, Method, Sites, State, Upload, Work


@dataclass(frozen=True, kw_only=True)
class FlexLoRA(Method):
    """Server state: A = Vh and B = U S at the largest rank, at scale 1."""

    name: ClassVar[str] = "flexlora"
    paper: ClassVar[str] = (
        "Bai et al., Federated Fine-tuning under Heterogeneous Tasks and Client Resources, arXiv 2402.11505"
    )
    budgets: ClassVar[frozenset[str]] = frozenset({"rank"})
    sliceable: ClassVar[bool] = True

    def broadcast(self, state: State, client: Client, t: int) -> State:
        sent = slices.take(lora.only(state, "A", "B", "head"), slices.prefix(state, client.rank))
        scale = lora.scale(self.alpha, client.rank, self.rslora)
        return sent | {"B": {site: x / scale for site, x in sent["B"].items()}}

    def prepare(self, received: State, kept: State, sites: Sites, client: Client, t: int) -> Work:
        # The client's own scale (as the official code, which fixes alpha at 16): the server divided by it.
        return Work(train=received, scale=lora.scale(self.alpha, client.rank, self.rslora))

    def aggregate(self, state: State, uploads: Iterable[Upload]) -> State:
        stacks = {site: lora.Stack() for site in state["A"]}
        head, total = lora.Mean(), 0.0
        for upload in uploads:
            n = upload.client.examples
            s = lora.scale(self.alpha, upload.client.rank, self.rslora)
            total += n
            for site, stack in stacks.items():
                stack.add(upload.state["B"][site], upload.state["A"][site], n * s)
            head.add(lora.only(upload.state, "head"), n)
        A, B = {}, {}
        for site, stack in stacks.items():
            U, S, Vh = lora.svd(*stack.factors())
            q = min(self.rank, S.numel())
            # Ranks that this round's clients could not fill change nothing (B = 0) but keep a direction to learn in.
            A[site] = torch.cat([Vh[:q], state["A"][site][q:]])
            B[site] = torch.nn.functional.pad(U[:, :q] * (S[:q] / total), (0, self.rank - q))
        return state | {"A": A, "B": B} | head.value
