"""FedIT: federated averaging of both LoRA factors.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", arXiv 2305.05644.
Every client trains A and B from the common adapter; the server averages A and B separately, weighted by examples, so that
the product of the means is not the mean of the products: the error is sum_k p_k (B_k - mean B)(A_k - mean A).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedloom.core import Mean, Round, Visit, Work
from fedloom.methods.base import LoRA
from fedloom.state import State, only


@dataclass(frozen=True, kw_only=True)
class FedIT(LoRA):
    """A <- sum_k p_k A_k, B <- sum_k p_k B_k with p_k = n_k / n."""

    name: ClassVar[str] = "fedit"
    paper: ClassVar[str] = "Zhang et al., Towards Building the Federated GPT, arXiv 2305.05644"

    async def server(self, state: State, round: Round) -> State:
        mean = await Mean(send=lambda client: only(state, "A", "B", "head"))
        return state | mean.state

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        done = await Work(train=received, scale=self.scale)
        return done.state, {}
