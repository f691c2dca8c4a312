"""Which attention kernel to use, by device, dtype and length: from measurements, not from a library's default."""

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
    | 16 | 5.5 | 13.6 | 3.6 | 86.3 |
    | 32 | 9.0 | 13.3 | 4.7 | 50.5 |
    | 64 | 14.5 | 16.8 | 8.5 | 54.6 |
    | 128 | 29.2 | 25.3 | 17.2 | 64.1 |
    | 256 | 52.4 | 43.2 | 34.2 | 60.5 |
    | 512 | 140.0 | 87.6 | 124.7 | 95.2 |

    On a GPU the fused kernel needs less memory and fewer launches at every length: not measured.
    """
    if device.type != "cpu":
        return "sdpa"
    return "eager" if length < (384 if dtype == torch.bfloat16 else 96) else "sdpa"
