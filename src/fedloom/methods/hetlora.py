"""HetLoRA: clients of different rank train the leading ranks, weighted by the norm of what they learnt, and prune themselves.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024, arXiv 2401.06432.
The paper's text was not available in full and there is no official code: weights, penalty and pruning follow other
re-implementations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedloom import lora, slices
from fedloom.core import Client, Method, Sites, State, Upload, Work
from fedloom.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class HetLoRA(Method):
    """A <- sum_k p_k pad(A_k), B <- sum_k p_k pad(B_k), p_k = S_k / sum_j S_j, S_k = ||B_k A_k||_F over all sites."""

    gamma: float = 0.99
    """The tail that is penalised, and pruned, starts at rank floor(gamma r_k)."""
    tail_weight: float = 1e-3
    """Weight of the tail's norm in the loss. The paper's value was not seen."""
    prune: bool = True

    name: ClassVar[str] = "hetlora"
    paper: ClassVar[str] = "Cho et al., Heterogeneous LoRA for Federated Fine-tuning, arXiv 2401.06432"
    budgets: ClassVar[frozenset[str]] = frozenset({"rank"})
    shrinks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1 or self.tail_weight < 0:
            raise ConfigError(
                f"hetlora: gamma is {self.gamma} and tail_weight {self.tail_weight}, expected gamma in (0, 1] and "
                "tail_weight of at least 0"
            )

    def _tail(self, rank: int) -> int:
        # A client keeps at least one rank.
        return max(1, math.floor(self.gamma * rank))

    def _tail_norm(self, state: State) -> Tensor:
        """sum over sites of ||B[:, g:]||_F ||A[g:]||_F."""
        g = self._tail(next(iter(state["A"].values())).shape[0])
        return torch.stack(
            [torch.norm(state["B"][site][:, g:]) * torch.norm(A[g:]) for site, A in state["A"].items()]
        ).sum()

    def broadcast(self, state: State, client: Client, t: int) -> State:
        pruned = state.get("ranks", {}).get(client.id)
        rank = client.rank if pruned is None else int(pruned)
        return slices.take(lora.only(state, "A", "B", "head"), slices.prefix(state, rank))

    def prepare(self, received: State, kept: State, sites: Sites, client: Client, t: int) -> Work:
        # One scale for all ranks (reading): a client's model is the leading part of the global one.
        return Work(
            train=received,
            fixed={"tail": {"start": self._tail_norm(received)}},
            scale=lora.scale(self.alpha, self.rank, self.rslora),
        )

    def penalty(self, train: State, fixed: State) -> Tensor | None:
        return self.tail_weight * self._tail_norm(train) if self.tail_weight else None

    def finish(self, work: Work, trained: State, received: State) -> tuple[State, State]:
        if self.prune and self._tail_norm(trained) < work.fixed["tail"]["start"]:
            g = self._tail(next(iter(trained["A"].values())).shape[0])
            return slices.take(trained, slices.prefix(trained, g)), {}
        return trained, {}

    def aggregate(self, state: State, uploads: Iterable[Upload]) -> State:
        factors, head, ranks = lora.Mean(), lora.Mean(), dict(state.get("ranks", {}))
        blank = {role: {site: torch.zeros_like(x) for site, x in state[role].items()} for role in ("A", "B")}
        for upload in uploads:
            part = lora.only(upload.state, "A", "B")
            rank = next(iter(part["A"].values())).shape[0]
            norms = torch.stack([lora.product_norm(part["B"][site], A) for site, A in part["A"].items()])
            # Nobody has learnt anything: all weights are tiny and equal rather than 0 / 0.
            weight = float(norms.square().sum().sqrt()) + 1e-12
            factors.add(slices.put(blank, part, slices.prefix(part, rank)), weight)
            # The head is no low-rank product: plain weights by examples (reading).
            head.add(lora.only(upload.state, "head"), upload.client.examples)
            ranks[upload.client.id] = torch.tensor(rank)
        return state | factors.value | head.value | {"ranks": ranks}
