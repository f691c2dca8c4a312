"""Attention of packed rows in one kernel: it is told where each row ends, so that nothing is gathered, padded or repeated.

    query (N, heads, d), key and value (N, heads / shared, d), starts (S + 1,) ──► kernel ──► (N, heads, d)

Dao: "FlashAttention-2", arXiv 2307.08691, as torch.nn.attention.varlen. `packed_attention` computes the same in padded buckets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

try:
    from torch.nn.attention.varlen import varlen_attn as kernel
except ImportError:  # older than torch 2.10
    kernel: Callable[..., Tensor] | None = None  # type: ignore[no-redef]

_MOST = 64
"""What the longest row's length is rounded up to, where sizes should be few."""


@dataclass(frozen=True)
class Rows:
    """Where each of S rows begins among N tokens without padding. Padding tokens after all others are rows of their own."""

    starts: Tensor
    """(S + 1,) int32, from 0 to N. Rows at the end may be empty."""
    most: int
    """At least as many tokens as the longest row has; known on the host."""


def suits(device: torch.device, dtype: torch.dtype | None, head: int) -> bool:
    """Whether the kernel takes heads of so many numbers here: on CUDA from compute capability 8.0 on, in half precision.

    Larger heads have no backward pass on some cards.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or kernel is None:
        return False
    return 0 < head <= 192 and head % 8 == 0 and torch.cuda.get_device_capability(device) >= (8, 0)


def head_size(model: nn.Module) -> int:
    """How many numbers each of the model's heads has; 0 if its config does not say."""
    config = getattr(model, "config", None)
    own = getattr(config, "head_dim", None)
    return int(own or getattr(config, "hidden_size", 0) // max(1, getattr(config, "num_attention_heads", 1)))


def rows_of(lengths: NDArray[np.int64], idle: int, few_shapes: bool) -> Rows:
    """From the lengths of all rows, zeros among them, and the number of padding tokens after them.

    With `few_shapes` there are a multiple of sixteen of them.
    """
    there = lengths[lengths > 0]
    most = int(there.max())
    each = np.concatenate([there, np.diff([*range(0, idle, most), idle])]) if idle else there
    if few_shapes:
        most = -(-most // _MOST) * _MOST
        each = np.concatenate([each, np.zeros(-len(each) % 16, np.int64)])
    return Rows(torch.from_numpy(np.concatenate([[0], each.cumsum()]).astype(np.int32)), most)


def attend_rows(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, causal: bool, scale: float, window: int | None
) -> Tensor:
    """query (1, heads, N, d), key and value (1, heads / shared, N, d) -> (1, N, heads, d), each row on its own.

    Of a causal row a token sees itself and those before it, at most `window` in all.
    """
    assert kernel is not None, "suits() says where there is one"
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    before = -1 if window is None else window - 1
    made = kernel(
        q,
        k,
        v,
        rows.starts,
        rows.starts,
        rows.most,
        rows.most,
        scale=scale,
        window_size=(before, 0) if causal else (-1, -1),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(made, Tensor)
    return made.unsqueeze(0)
