"""FedEx-LoRA: averaged factors, and the exact residual of the average added to the frozen weights.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models", ACL 2025,
arXiv 2410.09432. W0 <- W0 + s (sum_k p_k B_k A_k - mean(B) mean(A)).
By the covariance identity the residual is s sum_{k<K} p_k (B_k - mean B)(A_k - A_K): rank (K - 1) r, never formed
densely. (The official code adds it transposed, unnoticed where weights are square.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedloom import lora
from fedloom.core import Client, Each, Round, Upload, Visit, Work
from fedloom.methods.base import LoRA
from fedloom.spec import like
from fedloom.state import State, only, without


@dataclass(frozen=True, kw_only=True)
class FedExLoRA(LoRA):
    """FedIT's averages, plus an offset (roles `left`, `right`) to the original weights that makes them exact.

    The offset is since the original model and goes whole to every client, so one that missed rounds is right; it
    travels as factors while they are smaller than the dense form. All uploads are held: the means come first.
    """

    name: ClassVar[str] = "fedex_lora"
    paper: ClassVar[str] = "Singhal et al., FedEx-LoRA: Exact Aggregation, arXiv 2410.09432"
    group: ClassVar[str] = "exact sums"

    async def server(self, state: State, round: Round) -> State:
        uploads = list(
            await Each(
                send=lambda client: self.serve(state, client), expects=lambda client, sent: like(sent, "A", "B", "head")
            )
        )
        mean = lora.Mean()
        for upload in uploads:
            mean.add(upload.state, upload.weight)
        if len(uploads) == 1:
            return state | mean.value
        left, right = dict(state.get("left", {})), dict(state.get("right", {}))
        for site, B in mean.value["B"].items():
            residual = self._residual(uploads, site, B)
            left[site], dense_or_factor = lora.offset(left.get(site), right.pop(site, None), residual)
            if dense_or_factor is not None:
                right[site] = dense_or_factor
        return state | mean.value | {"left": left, "right": right}

    def _residual(self, uploads: Sequence[Upload], site: str, mean_B: Tensor) -> lora.Stack:
        """s sum_{k<K} p_k (B_k - mean B)(A_k - A_K). One allocation a side, filled in place: it is bound by memory."""
        *others, last = uploads
        total = sum(upload.weight for upload in uploads)
        p = torch.tensor([self.scale * upload.weight / total for upload in others], dtype=torch.float64)
        L = torch.cat([upload.state["B"][site] for upload in others], dim=1)
        L.view(len(L), -1, self.rank).sub_(mean_B.unsqueeze(1)).mul_(p.to(L.dtype).view(1, -1, 1))
        R = torch.cat([upload.state["A"][site] for upload in others])
        R.view(-1, self.rank, R.shape[1]).sub_(last.state["A"][site])
        residual = lora.Stack()
        residual.add(L, R)
        return residual

    def serve(self, state: State, client: Client) -> State:
        return only(state, "A", "B", "head", "left", "right")

    def model(self, received: State, own: State, visit: Visit) -> Work:
        return Work(train=without(received, "left", "right"), base=only(received, "left", "right"), scale=self.scale)
