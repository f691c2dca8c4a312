"""Attention of packed rows: gathered into padded buckets, each with the faster of two kernels, and back; or in one kernel that
needs no padding (`varlen_attention`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from fedloom.train.attention import choose
from fedloom.train.kernels.packing import Packing
from fedloom.train.kernels.scored_attention import scored
from fedloom.train.kernels.varlen_attention import attend_rows

PACKED = "fedloom_packed"
"""The name under which transformers finds `attend`."""


class _Spread(torch.autograd.Function):
    """Gather queries (1, heads, N, d), keys and values (1, heads / shared, N, d) into padded buckets: (M + 2 M', d), of each
    the vectors of every bucket's (R, heads, L'), end to end. Keys and values have as many heads there as queries if
    they are to be `repeated`, else their own.

    Padding holds some vector of its row, so its gradient must be zero. With `_Collect`, each the other's gradient and both
    plain gathers: no scatter, so that results do not depend on threads.
    """

    @staticmethod
    def forward(ctx: Any, packing: Packing, repeated: bool, *each: Tensor) -> Tensor:
        heads, own, d = each[0].shape[1], each[1].shape[1], each[0].shape[3]
        ctx.packing, ctx.heads, ctx.own = packing, heads, own
        ctx.laid = heads if repeated else own
        vectors = torch.cat([x.transpose(1, 2).reshape(-1, d) for x in each])
        return vectors.index_select(0, packing.spread_index(heads, own, repeated))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        packing: Packing = ctx.packing
        heads, laid, d = ctx.heads, ctx.laid, grads[0].shape[1]
        back = grads[0].index_select(0, packing.back_index(heads, laid))
        N = packing.input_ids.shape[1]
        parts = torch.split_with_sizes(back, [N * heads, N * laid, N * laid])
        found = []
        for x, n in zip(parts, (heads, laid, laid), strict=True):
            x = x.view(1, N, n, d)
            if packing.idle:
                x[:, -packing.idle :].zero_()
            found.append(x.transpose(1, 2))
        q, k, v = found
        if laid > ctx.own:
            k, v = (x.reshape(1, ctx.own, -1, N, d).sum(2) for x in (k, v))
        return None, None, q, k, v


class _Collect(torch.autograd.Function):
    """The buckets' vectors (M, d) -> (1, N, heads, d)."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, packing: Packing, heads: int) -> Tensor:
        ctx.packing, ctx.heads = packing, heads
        return vectors.index_select(0, packing.collect_index(heads)).view(1, -1, heads, vectors.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        vectors = grads[0].reshape(-1, grads[0].shape[-1]).index_select(0, ctx.packing.row_index(ctx.heads, 1))
        return vectors.index_fill_(0, ctx.packing.padding_index(ctx.heads), 0.0), None, None


class _Plain(torch.autograd.Function):
    """softmax(scale * Q K^T + mask) V = P V in the mask's dtype, written out: autograd takes twice as many steps for the same.

    Q, K and V are one (3, R * heads * L', d); the result is (R * heads * L', d) and has no meaning at padding; the mask is
    (R * heads, 1, L'), or (L', L') if causal.

    With g the result's gradient and D the sum over d of g * (P V), that of V is P^T g and that of the scores
    P * (g V^T - D): Dao et al., "FlashAttention", arXiv 2205.14135, appendix B.2.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, mask: Tensor, scale: float) -> Tensor:
        dtype, L, d = mask.dtype, mask.shape[-1], qkv.shape[2]
        each = qkv.view(3, -1, L, d).to(dtype)
        q, k, v = each.unbind(0)
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale)
        # A softmax adds up in float32 whatever its dtype; of rows that fill no vector of bfloat16 (32 numbers) it is slow.
        wide = torch.float32 if dtype == torch.bfloat16 and L % 32 else dtype
        p = scores.softmax(-1, dtype=wide).to(dtype)
        made = torch.bmm(p, v)
        ctx.save_for_backward(each, p, made)
        ctx.scale = scale
        return made.view(-1, d).to(qkv.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        each, p, made = ctx.saved_tensors
        q, k, v = each.unbind(0)
        g = grads[0].reshape(v.shape).to(v.dtype)
        D = (g * made).sum(-1, keepdim=True)
        ds = torch.baddbmm(D, g, v.transpose(1, 2), beta=-ctx.scale, alpha=ctx.scale).mul_(p)
        found = torch.empty_like(each)
        torch.bmm(ds, k, out=found[0])
        torch.bmm(ds.transpose(1, 2), q, out=found[1])
        torch.bmm(p.transpose(1, 2), g, out=found[2])
        return found.view(3, -1, v.shape[2]).to(grads[0].dtype), None, None


_spread: Any = _Spread.apply  # torch leaves `apply` untyped
_collect: Any = _Collect.apply
plain: Any = _Plain.apply


def attend(
    module: nn.Module,
    query: Tensor,  # (1, heads, N, d)
    key: Tensor,  # (1, heads / shared, N, d)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # (heads,)
    **ignored: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface, each row of a packing on its own; the result is (1, N, heads, d)."""
    assert packing is not None, "this attention is for packed batches"
    _, heads, _, d = query.shape
    scale = d**-0.5 if scaling is None else scaling
    changed = softcap is not None or s_aux is not None
    if packing.rows is not None and not changed:
        return attend_rows(query, key, value, packing.rows, packing.causal, scale, sliding_window), None
    lengths, sizes = zip(*((x.spread.shape[1], x.spread.numel()) for x in packing.buckets), strict=True)
    fused = [not changed and choose(query.device, query.dtype, L) == "sdpa" for L in lengths]
    # The fused kernel shares heads of keys and values itself.
    laid = key.shape[1] if all(fused) else heads
    parts = _parts(_spread(packing, laid == heads, query, key, value), sizes, heads, laid)
    made = []
    for i, (part, L) in enumerate(zip(parts, lengths, strict=True)):
        window = sliding_window if sliding_window is not None and sliding_window < L else None
        if fused[i]:
            q, k, v = (x.view(-1, n, L, d) for x, n in zip(part, (heads, laid, laid), strict=True))
            whole = packing.causal and window is None
            mask = None if whole else packing.seen(i, window)
            rows = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=whole, scale=scale, enable_gqa=laid < heads
            ).reshape(-1, d)
        elif changed:
            q, k, v = (x.view(-1, heads, L, d) for x in part)
            mask = packing.mask(i, heads, torch.float32, window)
            rows = scored(q, k, v, mask, scale, softcap, s_aux).reshape(-1, d)
        else:
            assert isinstance(part, Tensor)
            dtype = torch.float32 if _few(query.dtype, sizes[i] * heads * L) else query.dtype
            rows = plain(part, packing.mask(i, heads, dtype, window), scale)
        made.append(rows)
    return _collect(made[0] if len(made) == 1 else torch.cat(made), packing, heads), None


def _parts(spread: Tensor, sizes: Sequence[int], heads: int, laid: int) -> Sequence[Tensor | tuple[Tensor, ...]]:
    """What `_Spread` made -> queries, keys and values of each bucket; (3, ...) in one where all have as many heads."""
    M = sum(sizes)
    if laid == heads:
        each = spread.view(3, M * heads, -1)
        return torch.split_with_sizes(each, [n * heads for n in sizes], 1) if len(sizes) > 1 else [each]
    three = torch.split_with_sizes(spread, [M * heads, M * laid, M * laid])
    split = [torch.split_with_sizes(x, [m * n for m in sizes]) for x, n in zip(three, (heads, laid, laid), strict=True)]
    return list(zip(*split, strict=True))


def _few(dtype: torch.dtype, scores: int) -> bool:
    """Whether a CPU's bfloat16 products cost more than those in float32: each call does, each number costs half.

    Forward and backward on two cores, 12 heads of 32, 16 tokens a row: 8 rows in 470 to 520 us in bfloat16, 340 to 480 in
    float32; 64 rows in 1,450 and 3,400 to 4,900.
    """
    return dtype == torch.bfloat16 and scores <= 1 << 16


@cache
def register() -> None:
    """Let transformers find `attend`: once per process, in its global table, when a model first trains on packed rows."""
    AttentionInterface.register(PACKED, attend)  # needs no mask function: the packing holds what is masked
