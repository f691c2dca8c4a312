"""RoLoRA: B is trained in odd rounds and A in even ones, the other factor stands.

Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", NeurIPS 2025, arXiv 2502.01755
(workshop version 2409.02346). Every average is exact, since the factor that stands is common: sum_k p_k B_k A = (sum_k p_k
B_k) A. B comes first: with B = 0 the gradient of A is zero. The task head is trained in every round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedloom.core import Mean, Round, Visit, Work
from fedloom.methods.base import LoRA
from fedloom.spec import like
from fedloom.state import State, only, without


@dataclass(frozen=True, kw_only=True)
class RoLoRA(LoRA):
    """B <- sum_k p_k B_k in odd rounds, A <- sum_k p_k A_k in even ones.

    Both factors go down, as a client may have missed the round that trained the other one; the trained one comes up.
    """

    name: ClassVar[str] = "rolora"
    paper: ClassVar[str] = "Chen et al., Robust Federated Finetuning via Alternating Optimization, arXiv 2502.01755"
    group: ClassVar[str] = "alternation"

    async def server(self, state: State, round: Round) -> State:
        mean = await Mean(
            send=lambda client: self.serve(state, client),
            expects=lambda client, sent: like(sent, _trained(round.t), "head"),
        )
        return state | mean.state

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        stands = "A" if _trained(visit.t) == "B" else "B"
        done = await Work(train=without(received, stands), fixed=only(received, stands), scale=self.scale)
        return done.state, {}


def _trained(t: int) -> str:
    """The factor that round t trains."""
    return "B" if t % 2 else "A"
