"""Attention of packed rows, and which kernel to use: from measurements, not from a library's default."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from fedloom.train.packing import Packing

PACKED = "fedloom_packed"
"""The name under which transformers finds `attend`."""

AttentionName = Literal["eager", "sdpa"]


def choose(device: torch.device, dtype: torch.dtype, length: int) -> AttentionName:
    """The faster attention, forward and backward, for rows of `length` tokens.

    Milliseconds for 2,048 tokens, 12 heads of 32, on one core of a Zen-5-class server processor (AVX-512 with bfloat16) with
    torch 2.13, plain (eager) against fused (sdpa), as `python benchmarks/attention.py` prints them:

    | tokens in a row | float32 eager | sdpa | bfloat16 eager | sdpa |
    |---:|---:|---:|---:|---:|
    | 16 | 6.0 | 12.2 | 3.7 | 92.1 |
    | 32 | 10.2 | 13.8 | 4.7 | 49.8 |
    | 64 | 15.7 | 19.6 | 7.1 | 53.7 |
    | 128 | 32.5 | 31.5 | 13.6 | 62.4 |
    | 256 | 52.5 | 43.8 | 29.3 | 59.8 |
    | 512 | 179.3 | 96.8 | 70.0 | 92.3 |

    That is with padding; causal, 512 tokens in bfloat16 take 104.2 and 91.8.
    On a GPU the fused kernel needs less memory and fewer launches at every length: not measured.
    """
    if device.type != "cpu":
        return "sdpa"
    return "eager" if length < (384 if dtype == torch.bfloat16 else 96) else "sdpa"


class _Spread(torch.autograd.Function):
    """(1, heads / shared, N, d) -> the vectors (M, d) of each bucket's (R, heads, L'), end to end.

    Padding holds some vector of its row, so its gradient must be zero. With `_Collect`, each the other's gradient and both
    plain gathers: no scatter, so that results do not depend on threads.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing, shared: int) -> Tensor:
        ctx.packing, ctx.shared, ctx.shape = packing, shared, x.shape
        vectors = x.transpose(1, 2).reshape(-1, x.shape[-1])
        return vectors.index_select(0, packing.spread_index(x.shape[1] * shared, shared))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,), (_, heads, N, d) = grads, ctx.shape
        back = grad.index_select(0, ctx.packing.collect_index(heads * ctx.shared))
        if ctx.shared > 1:
            back = back.view(N * heads, ctx.shared, d).sum(1)
        back = back.view(1, N, heads, d)
        if ctx.packing.idle:
            back[:, -ctx.packing.idle :].zero_()
        return back.transpose(1, 2), None, None


class _Collect(torch.autograd.Function):
    """The buckets' vectors (M, d) -> (1, N, heads, d)."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, packing: Packing, heads: int) -> Tensor:
        ctx.packing, ctx.heads = packing, heads
        return vectors.index_select(0, packing.collect_index(heads)).view(1, -1, heads, vectors.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        vectors = grads[0].reshape(-1, grads[0].shape[-1]).index_select(0, ctx.packing.spread_index(ctx.heads, 1))
        return vectors.index_fill_(0, ctx.packing.padding_index(ctx.heads), 0.0), None, None


_spread: Any = _Spread.apply  # torch leaves `apply` untyped
_collect: Any = _Collect.apply


def attend(
    module: nn.Module,
    query: Tensor,  # (1, heads, N, d)
    key: Tensor,  # (1, heads / shared, N, d)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    **ignored: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface, each row of a packing on its own; the result is (1, N, heads, d)."""
    assert packing is not None, "this attention is for packed batches"
    (_, heads, _, d), shared = query.shape, query.shape[1] // key.shape[1]
    scale = d**-0.5 if scaling is None else scaling
    sizes = [x.spread.numel() * heads for x in packing.buckets]
    parts = [torch.split(_spread(x, packing, n), sizes) for x, n in ((query, 1), (key, shared), (value, shared))]
    made = []
    for i, bucket in enumerate(packing.buckets):
        L = bucket.spread.shape[1]
        q, k, v = (x[i].view(-1, heads, L, d) for x in parts)
        if choose(q.device, q.dtype, L) == "sdpa":
            mask = None if packing.causal else bucket.valid[:, None, None, :]
            rows = F.scaled_dot_product_attention(q, k, v, mask, is_causal=packing.causal, scale=scale)
        else:
            rows = plain(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), packing.mask(i, heads, q.dtype), scale)
        made.append(rows.reshape(-1, d))
    return _collect(made[0] if len(made) == 1 else torch.cat(made), packing, heads), None


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """(R * heads, L', d) of each -> the same; what is made for padding has no meaning."""
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale)
    # A softmax adds up in float32 whatever its dtype; of rows that fill no vector of bfloat16 (32 numbers) it is slow.
    wide = torch.float32 if q.dtype == torch.bfloat16 and q.shape[1] % 32 else q.dtype
    return scores.softmax(-1, dtype=wide).to(q.dtype) @ v


AttentionInterface.register(PACKED, attend)  # needs no mask function: the packing holds what is masked
