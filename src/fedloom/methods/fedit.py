"""FedIT: federated averaging of both LoRA factors.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", arXiv 2305.05644.
Every client trains A and B from the common adapter; the server averages A and B separately, weighted by examples, so that
the product of the means is not the mean of the products: the error is sum_k p_k (B_k - mean B)(A_k - mean A).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedloom import lora
from fedloom.core import Client, Method, Sites, State, Upload, Work


@dataclass(frozen=True, kw_only=True)
class FedIT(Method):
    """A <- sum_k p_k A_k, B <- sum_k p_k B_k with p_k = n_k / n."""

    name: ClassVar[str] = "fedit"
    paper: ClassVar[str] = "Zhang et al., Towards Building the Federated GPT, arXiv 2305.05644"
    linear: ClassVar[bool] = True
    sliceable: ClassVar[bool] = True

    def prepare(self, received: State, kept: State, sites: Sites, client: Client, t: int) -> Work:
        return Work(train=received, scale=lora.scale(self.alpha, self.rank, self.rslora))

    def aggregate(self, state: State, uploads: Iterable[Upload]) -> State:
        return state | lora.mean(uploads, "A", "B", "head")
