"""FedMomentum: the leading directions of the exact sum go on as the adapter, the others are merged into the frozen weights.

Yan et al., "FedMomentum: Preserving LoRA Training Momentum in Federated Fine-Tuning", arXiv 2603.08014.
D = sum_k p_k s B_k A_k = U S V'; B = U_r (S_r/s)^1/2, A = (S_r/s)^1/2 V_r', and the directions from r up to where `energy` of
D is held are added to W. The paper's text was not available in full: the rule is that of a
re-implementation and of reviews. That one merges without the scale s, and takes a randomised SVD where this one is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt, Le

from fedloom.core import Client, Each, Round, Visit, Work
from fedloom.methods import products
from fedloom.methods.base import LoRA
from fedloom.spec import like
from fedloom.state import State, only, without


@dataclass(frozen=True, kw_only=True)
class FedMomentum(LoRA):
    """Exact at energy 1, and the adapter holds the best rank-r part of the sum: it need not start anew, as in FLoRA.

    The offset is since the original model and goes whole to every client, so one that missed rounds is right.
    """

    energy: Annotated[float, Gt(0), Le(1)] = 0.9999
    """Share of the sum's energy that adapter and offset keep together. 0.99 makes the offset smaller; reviews name it."""

    name: ClassVar[str] = "fedmomentum"
    paper: ClassVar[str] = "Yan et al., FedMomentum: Preserving LoRA Training Momentum, arXiv 2603.08014"
    group: ClassVar[str] = "exact sums"

    async def server(self, state: State, round: Round) -> State:
        asked = Each(
            send=lambda client: self.serve(state, client), expects=lambda client, sent: like(sent, "A", "B", "head")
        )
        # Summed without the scale: B A is then the adapter's own product.
        total = await products.summed(asked, lambda client: 1.0)
        kept, tail = products.cut(total.stacks, lambda S: min(self.rank, len(S)))
        rest = {}
        for site, (U, S, Vh) in tail.items():
            # The adapter holds its r directions whatever the energy.
            q = max(0, products.energy_rank(torch.cat([kept[site][1], S]), self.energy) - self.rank)
            rest[site] = U[:, :q], S[:q] * self.scale, Vh[:q]
        # Merged every round (reading).
        offset = products.placed(rest, state, "base")
        return state | products.adapter(kept, state["A"], power=0.5) | offset | total.head

    def serve(self, state: State, client: Client) -> State:
        return only(state, "A", "B", "head", "left", "right")

    def model(self, received: State, own: State, visit: Visit) -> Work:
        return Work(train=without(received, "left", "right"), base=only(received, "left", "right"), scale=self.scale)
