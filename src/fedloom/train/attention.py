"""Which attention kernel to use, by device, dtype and length: from measurements, not from a library's default."""

from __future__ import annotations

from typing import Literal

import torch

AttentionName = Literal["eager", "sdpa"]


def choose(device: torch.device, dtype: torch.dtype, length: int) -> AttentionName:
    """The faster attention for rows of about `length` tokens."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        return "eager"
    return "sdpa"
