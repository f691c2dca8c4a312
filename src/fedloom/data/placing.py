"""Tensors made on the host, onto the device that reads them."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device | str) -> Tensor:
    """x on the device. A GPU is not waited for: the copy is from pinned memory, in line with what it computes."""
    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x.to(device)
