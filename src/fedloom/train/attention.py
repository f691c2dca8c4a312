"""Which attention to ask transformers for: from measurements, not from a library's default."""

from __future__ import annotations

from typing import Literal

import torch

AttentionName = Literal["eager", "sdpa"]


def choose(device: torch.device, dtype: torch.dtype, length: int) -> AttentionName:
    """The faster attention, forward and backward, for rows of `length` tokens.

    Milliseconds for 2,048 tokens, 12 heads of 32, on one core of a Zen-5-class server processor (AVX-512 with bfloat16) with
    torch 2.13, plain (eager) against fused (sdpa), as `python benchmarks/attention.py` prints them:

    | tokens in a row | float32 eager | sdpa | bfloat16 eager | sdpa |
    |---:|---:|---:|---:|---:|
    | 16 | 5.9 | 11.9 | 3.8 | 86.2 |
    | 32 | 10.4 | 12.9 | 4.8 | 47.8 |
    | 64 | 16.8 | 16.7 | 7.4 | 52.6 |
    | 128 | 28.6 | 26.3 | 14.3 | 63.6 |
    | 256 | 50.3 | 43.5 | 27.9 | 58.3 |
    | 512 | 158.9 | 91.1 | 50.2 | 93.0 |

    That is with padding; causal rows take as long. In bfloat16 plain attention would win beyond 384 too, but it keeps every
    score for the backward pass: of 8 rows of 512 tokens, 50 MB in each layer of 12 heads.
    On a GPU the fused kernel needs less memory and fewer launches at every length: not measured.
    """
    if device.type != "cpu":
        return "sdpa"
    return "eager" if length < (384 if dtype == torch.bfloat16 else 96) else "sdpa"
