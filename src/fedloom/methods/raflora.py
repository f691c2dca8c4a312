"""raFLoRA: FlexLoRA's sum with each rank weighted among the clients that hold it, so that high ranks do not fade.

Wu, Hu, Min, Wang, "Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity", arXiv 2602.13486:
D = sum over bands (l, h] of ranks, sum over clients with r_k >= h of (n_k / n_h) s_k B_k[:, l:h] A_k[l:h], n_h being the
examples of those clients; then FlexLoRA's SVD. Column i of client k so has weight p_k / pi_i, as in RB-LoRA (whose released
code never uses its weights). It rests on clients' ranks being in the order of the server's SVD, where they began.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from fedloom import lora
from fedloom.core import Each, Round
from fedloom.methods import products
from fedloom.methods.flexlora import Redistributed
from fedloom.state import State, only


@dataclass(frozen=True, kw_only=True)
class RaFLoRA(Redistributed):
    """Clients that learn nothing leave the server's model as it is; at equal ranks it is FlexLoRA."""

    name: ClassVar[str] = "raflora"
    paper: ClassVar[str] = "Wu et al., Preventing Rank Collapse in Federated Low-Rank Adaptation, arXiv 2602.13486"
    group: ClassVar[str] = "unequal ranks"

    async def server(self, state: State, round: Round) -> State:
        # The paper's bands are of all rank levels; those of the round's clients give the same weights.
        bands = list(pairwise(sorted({0, self.rank, *(client.rank for client in round.clients)})))
        sums = {(site, band): lora.Stack() for site in state["A"] for band in bands}
        weights, head = dict.fromkeys(bands, 0.0), lora.Mean()
        for upload in await Each(send=lambda client: self.serve(state, client)):
            weight = upload.weight * self.scale_of(upload.client)
            for low, high in (band for band in bands if band[1] <= upload.client.rank):
                weights[low, high] += upload.weight
                for site, A in upload.state["A"].items():
                    sums[site, (low, high)].add(upload.state["B"][site][:, low:high], A[low:high], weight)
            head.add(only(upload.state, "head"), upload.weight)
        whole: products.Stacks = {site: lora.Stack() for site in state["A"]}
        for (site, (low, high)), stack in sums.items():
            if weights[low, high]:
                whole[site].add(*stack.factors(), 1 / weights[low, high])
            else:
                # Nobody who answered holds these ranks: they stay as they are (the source is silent; dropping them would be
                # the collapse it is against).
                whole[site].add(state["B"][site][:, low:high], state["A"][site][low:high])
        kept, _ = products.cut(whole, self.leading)
        return state | products.adapter(kept, state["A"]) | head.value
