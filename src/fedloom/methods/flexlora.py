"""FlexLoRA: the clients' products are summed, decomposed, and redistributed at each client's own rank.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources", NeurIPS 2024,
arXiv 2402.11505. D = sum_k p_k s_k B_k A_k; a client of rank r gets B = U[:, :r] S[:r] / s_r and A = Vh[:r].
The official code forms D densely; here its SVD comes from the stacked factors through QR, which is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import pad

from fedloom import lora, slices
from fedloom.core import Client, Each, Round, Visit, Work
from fedloom.methods.base import LoRA
from fedloom.state import State, only


@dataclass(frozen=True, kw_only=True)
class FlexLoRA(LoRA):
    """Server state: A = Vh and B = U S at the largest rank, at scale 1."""

    name: ClassVar[str] = "flexlora"
    paper: ClassVar[str] = (
        "Bai et al., Federated Fine-tuning under Heterogeneous Tasks and Client Resources, arXiv 2402.11505"
    )
    group: ClassVar[str] = "unequal ranks"
    budgets: ClassVar[frozenset[str]] = frozenset({"rank"})

    def _scale(self, rank: int) -> float:
        # The client's own scale (as the official code, which fixes alpha at 16): the server divides by it.
        return lora.scale(self.alpha, rank, self.rslora)

    async def server(self, state: State, round: Round) -> State:
        stacks, head, total = {site: lora.Stack() for site in state["A"]}, lora.Mean(), 0.0
        for upload in await Each(send=lambda client: self.serve(state, client)):
            total += upload.weight
            for site, stack in stacks.items():
                x = upload.state["A"][site]
                stack.add(upload.state["B"][site], x, upload.weight * self._scale(len(x)))
            head.add(only(upload.state, "head"), upload.weight)
        A, B = {}, {}
        for site, stack in stacks.items():
            U, S, Vh = lora.svd(*stack.factors())
            q = min(self.rank, S.numel())
            # Ranks that this round's clients could not fill change nothing (B = 0) but keep a direction to learn in.
            A[site] = torch.cat([Vh[:q], state["A"][site][q:]])
            B[site] = pad(U[:, :q] * (S[:q] / total), (0, self.rank - q))
        return state | {"A": A, "B": B} | head.value

    def serve(self, state: State, client: Client) -> State:
        sent = slices.take(only(state, "A", "B", "head"), slices.prefix(state, client.rank))
        return sent | {"B": {site: x / self._scale(client.rank) for site, x in sent["B"].items()}}

    def model(self, received: State, own: State, visit: Visit) -> Work:
        return Work(train=received, scale=self._scale(visit.client.rank))
