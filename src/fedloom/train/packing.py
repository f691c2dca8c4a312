"""Token packing: everything but attention computes on tokens without padding.

    rows (K * b, L), padded ──► tokens (1, N): the rows end to end, those of client 0 first
                                  │ embeddings, projections, feed-forward: all on (1, N)
                                  ├ adapters: tokens ──► (K, T), T the most tokens of a client ──► tokens
                                  └ attention: tokens ──spread──► rows (R, heads, L') ──softmax──► ──collect──► tokens

Rows meet only in attention, so nothing else needs them padded. Attention pads its rows to a multiple of 16, whatever the
batch was padded to: a softmax over a shorter remainder runs one number at a time (twelve times slower on a CPU with AVX-512).
Spread and collect are each other's gradient, both plain gathers: no scatter, so that results do not depend on threads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from fedloom.data.text import Batch, Kind
from fedloom.train.adapter import Segments
from fedloom.train.attention import choose

NAME = "fedloom_packed"
_ALIGN = 16

_ENCODERS = {"bert": "pooler", "roberta": "classifier", "xlm-roberta": "classifier"}
"""Architectures that read the first token of each row -> the module that does."""

_DECODERS = frozenset({"llama", "mistral", "qwen2", "qwen3", "gpt2", "smollm3"})
"""Architectures whose causal attention goes through transformers' attention interface with nothing but a scale."""


@dataclass
class Packing:
    """Where each token of a batch of K clients is. R rows of data have L' aligned positions each."""

    input_ids: Tensor
    """(1, N) int64."""
    position_ids: Tensor
    """(1, N) int64, from 0 in each row."""
    token_type_ids: Tensor | None
    """(1, N) int64."""
    slots: Tensor
    """(K * b, L) int64: index into N of each token of the batch; that of its row's first for padding."""
    segments: Segments | None
    """Where the clients' tokens are; None if each has equally many."""
    spread: Tensor
    """(R, L') int64: index into N of the tokens of each row of data; that of its first for padding."""
    valid: Tensor
    """(R, L') bool: which of those are tokens."""
    collect: Tensor
    """(N,) int64: index into the flattened (R, L') of each token."""
    causal: bool
    _indices: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def spread_index(self, heads: int, shared: int) -> Tensor:
        """(R * heads * L',) index into (N * heads / shared) vectors; `shared` heads of queries read one of keys."""
        key = (heads, shared)
        if key not in self._indices:
            head = torch.arange(heads, device=self.spread.device) // shared
            self._indices[key] = (self.spread.unsqueeze(1) * (heads // shared) + head.view(1, -1, 1)).flatten()
        return self._indices[key]

    def collect_index(self, heads: int) -> Tensor:
        """(N * heads,) index into (R * heads * L') vectors."""
        key = (heads, 0)
        if key not in self._indices:
            L = self.spread.shape[1]
            row, position = self.collect // L, self.collect % L
            head = torch.arange(heads, device=self.collect.device)
            self._indices[key] = ((row.unsqueeze(1) * heads + head) * L + position.unsqueeze(1)).flatten()
        return self._indices[key]


def pack_batch(batch: Batch, causal: bool) -> Packing:
    """The packing of a batch that is padded on the right. Rows of weight 0 are left out of it."""
    K, b = batch.K, batch.b
    real = batch.attention_mask.bool() & (batch.weight > 0).unsqueeze(1)  # (K * b, L)
    lengths = real.sum(1)
    first = lengths.cumsum(0) - lengths
    counts = lengths.view(K, b).sum(1)
    # A row of weight 0 reads its client's first token, with gradient 0: one of another client could bring in its NaN.
    first = torch.where(lengths > 0, first, (counts.cumsum(0) - counts).repeat_interleave(b))
    position = torch.arange(real.shape[1], device=real.device)
    slots = torch.where(real, first.unsqueeze(1) + position, first.unsqueeze(1))

    rows = lengths > 0
    gap = -real.shape[1] % _ALIGN
    valid = F.pad(real[rows], (0, gap))
    # Padding holds a token of its own row: even at weight 0, a NaN of another client would come through.
    spread = torch.cat([slots[rows], first[rows].unsqueeze(1).expand(-1, gap)], dim=1)
    types = None if batch.token_type_ids is None else batch.token_type_ids[real].unsqueeze(0)
    return Packing(
        input_ids=batch.input_ids[real].unsqueeze(0),
        position_ids=position.expand_as(real)[real].unsqueeze(0),
        token_type_ids=types,
        slots=slots,
        segments=_segments(counts),
        spread=spread,
        valid=valid,
        collect=torch.nonzero(valid.flatten()).squeeze(1),
        causal=causal,
    )


def _segments(counts: Tensor) -> Segments | None:
    """From the numbers of tokens (K,) of each client."""
    T = int(counts.max())
    there = torch.arange(T, device=counts.device) < counts.unsqueeze(1)  # (K, T)
    if bool(there.all()):
        return None
    first = counts.cumsum(0) - counts
    spread = torch.where(there, first.unsqueeze(1) + torch.arange(T, device=counts.device), first.unsqueeze(1))
    flat = there.flatten()
    return Segments(spread.flatten(), torch.nonzero(~flat).squeeze(1), torch.nonzero(flat).squeeze(1))


class _Spread(torch.autograd.Function):
    """(1, heads / shared, N, d) -> (R, heads, L', d); padding holds any token's vector, so its gradient must be zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing, shared: int) -> Tensor:
        heads = x.shape[1] * shared
        ctx.packing, ctx.shared, ctx.shape = packing, shared, x.shape
        vectors = x.transpose(1, 2).reshape(-1, x.shape[-1])
        return vectors.index_select(0, packing.spread_index(heads, shared)).view(
            len(packing.spread), heads, -1, x.shape[-1]
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,), (_, heads, N, d) = grads, ctx.shape
        if ctx.shared > 1:
            grad = grad.reshape(len(grad), heads, ctx.shared, -1, d).sum(2)
        vectors = grad.reshape(-1, d).index_select(0, ctx.packing.collect_index(heads))
        return vectors.view(1, N, heads, d).transpose(1, 2), None, None


class _Collect(torch.autograd.Function):
    """(R, heads, L', d) -> (1, N, heads, d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        heads, d = x.shape[1], x.shape[3]
        vectors = x.reshape(-1, d).index_select(0, packing.collect_index(heads))
        return vectors.view(1, -1, heads, d)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), packing = grads, ctx.packing
        heads, d = grad.shape[2:]
        vectors = grad.reshape(-1, d).index_select(0, packing.spread_index(heads, 1))
        return vectors.view(len(packing.spread), heads, -1, d).mul_(packing.valid[:, None, :, None]), None


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
    shared = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q = _spread(query, packing, 1)
    k, v = _spread(key, packing, shared), _spread(value, packing, shared)
    L = q.shape[2]
    if choose(q.device, q.dtype, L) == "sdpa":
        mask = None if packing.causal else packing.valid[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=packing.causal, scale=scale)
    else:
        allowed = (
            torch.ones(L, L, dtype=torch.bool, device=q.device).tril()
            if packing.causal
            else packing.valid[:, None, None, :]
        )
        wide = torch.promote_types(q.dtype, torch.float32)
        mask = torch.zeros(allowed.shape, dtype=wide, device=q.device).masked_fill_(~allowed, -torch.inf)
        scores = torch.add(mask, q @ k.transpose(-1, -2), alpha=scale)
        out = scores.softmax(-1).to(q.dtype) @ v
    return _collect(out, packing), None


def readers(model: nn.Module, kind: Kind) -> list[str] | None:
    """The modules from which on only some tokens matter; None if the model's batches cannot be packed.

    A classifier reads each row's first token: after the attention of its last layer all others are idle. A causal LM reads
    every token up to its vocabulary head.
    """
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", "")
    if kind == "causal-lm":
        windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        return [] if family in _DECODERS and not windowed else None
    if family not in _ENCODERS:
        return None
    last = getattr(config, "num_hidden_layers", 0) - 1
    endings = (f".encoder.layer.{last}.attention.output", _ENCODERS[family])
    found = [
        path for path, _ in model.named_modules() if f".{path}".endswith(tuple(f".{e.lstrip('.')}" for e in endings))
    ]
    return found if len(found) == 2 else None


def first_position(model: nn.Module) -> int:
    """The position id of a row's first token: RoBERTa counts on from its padding token."""
    config = getattr(model, "config", None)
    return int(config.pad_token_id) + 1 if config is not None and "roberta" in config.model_type else 0


AttentionInterface.register(NAME, attend)  # needs no mask function: the packing holds what is masked
