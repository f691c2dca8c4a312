"""FLoRIST: FLoRA with the stack cut, layer by layer, to the directions that hold most of its energy.

Ramesh and Dass, "FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large Language
Models", MLSys 2026, arXiv 2506.09199, algorithm 1: with D = sum_k p_k s_k B_k A_k = U S V', keep the smallest p with
sum_{i<=p} S_i^2 >= energy sum_i S_i^2; every client merges U_p S_p V_p' and starts afresh. The paper's
two thin SVDs are two QRs here: same result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt, Le

from fedloom import lora
from fedloom.core import Client, Each, Round, Visit, Work
from fedloom.methods import products
from fedloom.methods.flexlora import FlexLoRA
from fedloom.methods.flora import FLoRA, own_rank
from fedloom.state import Sites, State


@dataclass(frozen=True, kw_only=True)
class FLoRIST(FLoRA):
    """`round.report` gives the mean rank that was kept."""

    start: Literal["fresh", "continue"] = "fresh"
    """Where a round starts. `fresh`: from A random, B = 0 on the merged weights, as in the paper; `continue`: from the cut sum
    itself, as in the official code, which merges nothing: a client of smaller rank gets its leading directions."""
    energy: Annotated[float, Gt(0), Le(1)] = 0.9
    """Share of the energy that is kept: the paper takes 0.8 to 0.99. 1 with `fresh` is FLoRA, with `continue` FlexLoRA."""

    name: ClassVar[str] = "florist"
    paper: ClassVar[str] = "Ramesh and Dass, FLoRIST: Singular Value Thresholding, arXiv 2506.09199"
    group: ClassVar[str] = "exact sums"

    def init(self, sites: Sites, rng: torch.Generator) -> State:
        return super().init(sites, rng) if self.start == "fresh" else lora.init(sites, self.rank, rng)

    async def server(self, state: State, round: Round) -> State:
        asked = Each(send=lambda client: self.serve(state, client), expects=own_rank(round.sites))
        total = await products.summed(asked, self.scale_of)
        most = None if self.start == "fresh" else self.rank
        kept, _ = products.cut(total.stacks, lambda S: min(most or len(S), products.energy_rank(S, self.energy)))
        round.report["kept_rank"] = sum(len(S) for _, S, _ in kept.values()) / len(kept)
        if self.start == "fresh":
            return state | products.merged(state, products.stacked(kept)) | total.head
        # The official code fills up with A = 0, B = 0, a rank that never gets a gradient: here A keeps a direction.
        return state | products.adapter(kept, state["A"]) | total.head

    def serve(self, state: State, client: Client) -> State:
        return super().serve(state, client) if self.start == "fresh" else self._continued.serve(state, client)

    def model(self, received: State, own: State, visit: Visit) -> Work:
        if self.start == "fresh":
            return super().model(received, own, visit)
        return self._continued.model(received, own, visit)

    @property
    def _continued(self) -> FlexLoRA:
        return FlexLoRA(rank=self.rank, alpha=self.alpha, rslora=self.rslora)
