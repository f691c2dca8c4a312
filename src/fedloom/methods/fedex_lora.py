"""FedEx-LoRA: averaged factors, and the exact residual of the average added to the frozen weights.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models", ACL 2025,
arXiv 2410.09432. W0 <- W0 + s (sum_k p_k B_k A_k - mean(B) mean(A)).
By the covariance identity the residual is s sum_{k<K} p_k (B_k - mean B)(A_k - A_K): rank (K - 1) r, never formed
densely. (The official code adds it transposed, unnoticed where weights are square.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedloom import lora
from fedloom.core import Client, Method, Sites, State, Upload, Work


@dataclass(frozen=True, kw_only=True)
class FedExLoRA(Method):
    """FedIT's averages, plus an offset (roles `left`, `right`) to the original weights that makes them exact.

    The offset is since the original model and goes whole to every client, so one that missed rounds is right; it
    travels as factors while they are smaller than the dense form. `aggregate` holds all uploads: the means come first.
    """

    name: ClassVar[str] = "fedex_lora"
    paper: ClassVar[str] = "Singhal et al., FedEx-LoRA: Exact Aggregation, arXiv 2410.09432"
    needs_all: ClassVar[bool] = True
    sliceable: ClassVar[bool] = True

    def broadcast(self, state: State, client: Client, t: int) -> State:
        return lora.only(state, "A", "B", "head", "left", "right")

    def expected(self, received: State, t: int) -> State:
        return lora.without(received, "left", "right")

    def prepare(self, received: State, kept: State, sites: Sites, client: Client, t: int) -> Work:
        return Work(
            train=lora.without(received, "left", "right"),
            base=lora.only(received, "left", "right"),
            scale=lora.scale(self.alpha, self.rank, self.rslora),
        )

    def aggregate(self, state: State, uploads: Iterable[Upload]) -> State:
        all_uploads = list(uploads)
        mean = lora.mean(all_uploads, "A", "B", "head")
        if len(all_uploads) == 1:
            return state | mean
        total = sum(upload.client.examples for upload in all_uploads)
        scale = lora.scale(self.alpha, self.rank, self.rslora)
        weights = torch.tensor(
            [scale * upload.client.examples / total for upload in all_uploads[:-1]], dtype=torch.float64
        )
        left, right = dict(state.get("left", {})), dict(state.get("right", {}))
        last = all_uploads[-1].state["A"]
        for site, B in mean["B"].items():
            # One allocation for each side, filled in place: the aggregation is bound by memory.
            L = torch.cat([upload.state["B"][site] for upload in all_uploads[:-1]], dim=1)
            L.view(len(B), -1, self.rank).sub_(B.unsqueeze(1)).mul_(weights.to(B.dtype).view(1, -1, 1))
            R = torch.cat([upload.state["A"][site] for upload in all_uploads[:-1]])
            R.view(-1, self.rank, R.shape[1]).sub_(last[site])
            residual = lora.Stack()
            residual.add(L, R)
            left[site], dense_or_factor = lora.offset(left.get(site), right.pop(site, None), residual)
            if dense_or_factor is not None:
                right[site] = dense_or_factor
        return state | mean | {"left": left, "right": right}
