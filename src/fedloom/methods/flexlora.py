"""FlexLoRA: the clients' products are summed, decomposed, and redistributed at each client's own rank.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources", NeurIPS 2024,
arXiv 2402.11505. D = sum_k p_k s_k B_k A_k; a client of rank r gets B = U[:, :r] S[:r] / s_r and A = Vh[:r].
The official code forms D densely; here its SVD comes from the stacked factors through QR, which is exact.

ECLoRA: what the cut leaves over is fed back into the next sum, C = D + E, E <- C - C_r.
Ning et al., "Federated Fine-Tuning on Heterogeneous LoRAs With Error-Compensated Aggregation", IEEE TNNLS 2025, doi
10.1109/tnnls.2025.3586545. Its rule as intended: the released code computes C but decomposes D, so that the error grows without
bound and never enters the model. Its SVD is randomised, the one here exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge
from torch import Tensor

from fedloom import slices
from fedloom.core import Client, Each, Round, Visit, Work
from fedloom.methods import products
from fedloom.methods.base import LoRA
from fedloom.state import State, only


@dataclass(frozen=True, kw_only=True)
class Redistributed(LoRA):
    """Server state: A = Vh and B = U S at the largest rank, at scale 1; a client trains the leading ranks, at its own scale.

    So does FlexLoRA's official code, which fixes alpha at 16: the server divides by that scale.
    """

    group: ClassVar[str] = "unequal ranks"
    budgets: ClassVar[frozenset[str]] = frozenset({"rank"})

    def leading(self, S: Tensor) -> int:
        """How many of a sum's singular values the adapter holds."""
        return min(self.rank, len(S))

    def serve(self, state: State, client: Client) -> State:
        sent = slices.take(only(state, "A", "B", "head"), slices.prefix(state, client.rank))
        return sent | {"B": {site: x / self.scale_of(client) for site, x in sent["B"].items()}}

    def model(self, received: State, own: State, visit: Visit) -> Work:
        return Work(train=received, scale=self.scale_of(visit.client))


@dataclass(frozen=True, kw_only=True)
class FlexLoRA(Redistributed):
    """A, B <- the leading directions of D; `tail` says what becomes of the others."""

    tail: Literal["drop", "error", "server"] = "drop"
    """Where the sum goes beyond `rank`. `drop`: it is lost, as in the paper: directions that few clients hold fade, by their
    share of the weight in every round. `error`: it is added to the next sum. `server`: that, and what clients of smaller rank
    were not sent is added too, so that nothing fades; choose it where ranks differ much."""

    name: ClassVar[str] = "flexlora"
    paper: ClassVar[str] = (
        "Bai et al., Federated Fine-tuning under Heterogeneous Tasks and Client Resources, arXiv 2402.11505"
    )

    async def server(self, state: State, round: Round) -> State:
        total = await products.summed(Each(send=lambda client: self.serve(state, client)), self.scale_of)
        kept, tail = products.cut(products.with_rest(total, state, self.tail), self.leading)
        rest = products.placed(tail, state, self.tail)
        return state | products.adapter(kept, state["A"]) | rest | total.head


@dataclass(frozen=True, kw_only=True)
class ECLoRA(Redistributed):
    """FlexLoRA with error feedback: nothing of a sum is lost, it comes later.

    The official code trains at scale 1 whatever the rank (alpha_k = r_k): here the run's alpha decides.
    """

    error_rank: Annotated[int, Ge(1)] = 256
    """The server keeps that many leading directions of the error; the paper has no bound. It costs the server time and memory
    alone."""

    name: ClassVar[str] = "eclora"
    paper: ClassVar[str] = (
        "Ning et al., Federated Fine-Tuning on Heterogeneous LoRAs With Error-Compensated Aggregation, "
        "doi 10.1109/tnnls.2025.3586545"
    )

    async def server(self, state: State, round: Round) -> State:
        total = await products.summed(Each(send=lambda client: self.serve(state, client)), self.scale_of)
        kept, tail = products.cut(products.with_rest(total, state, "error"), self.leading)
        error = products.placed(tail, state, "error", most=self.error_rank)
        return state | products.adapter(kept, state["A"]) | error | total.head
