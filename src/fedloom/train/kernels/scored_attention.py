"""Attention whose scores are more than Q K^T: capped (Gemma 2, arXiv 2408.00118, section 2), or with a sink beside them that
takes a share and gives nothing (gpt-oss, arXiv 2508.10925, section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def scored(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float | None, sinks: Tensor | None
) -> Tensor:
    """P V, with P = softmax(cap * tanh(scale * Q K^T / cap) + mask) and each head's sink (heads,) one more score of its rows.

    q, k, v and the result are (R, heads, L, d); mask is (L, L).
    """
    scores = (q @ k.transpose(2, 3)) * scale
    if cap is not None:
        scores = (scores / cap).tanh() * cap
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) + mask
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    p = scores.softmax(-1)[..., : k.shape[2]]
    return p.to(v.dtype) @ v
