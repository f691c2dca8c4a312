"""Frozen products in int8 by oneDNN, which PyTorch brings along, on processors with VNNI: `Int8Product`, faster.

What oneDNN multiplies is unsigned on the left, so that codes there are 128 higher, its zero point. The scales of rows are
beyond it: they are multiplied in afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedloom.train.int8_products import Int8Product, by_rows

_ROWS = 512
"""Rows that are coded and multiplied at a time: their float32 numbers stay in a cache, and take no memory to speak of."""


def missing() -> str | None:
    """What this processor or build lacks; None if nothing."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise") or not torch._C._has_mkldnn:
        return "this build of PyTorch has no oneDNN"
    # Without VNNI oneDNN adds pairs of products up in 16 bits, which overflow.
    capable: Any = getattr(torch.cpu, "get_capabilities", dict)()
    return None if capable.get("avx512_vnni") or capable.get("avx_vnni") else "this processor has no VNNI instructions"


class Packed:
    """`Rounded`, as oneDNN reads it."""

    def __init__(self, weight: Tensor) -> None:
        codes, scale = by_rows(weight)
        # A packed tensor forgets the strides of what it is made of.
        self._codes = torch.ops.onednn.qlinear_prepack(codes.to(torch.int8).contiguous(), None)
        self._scale = scale.view(-1)
        self._zero = torch.zeros(len(scale), dtype=torch.int64)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = x.new_empty(len(rows), len(self._scale))
        for some, made in zip(torch.split(rows, _ROWS), torch.split(y, _ROWS), strict=True):
            codes, scale = _coded(some)
            part = torch.ops.onednn.qlinear_pointwise(
                codes, 1.0, 128, self._codes, self._scale, self._zero, None, 1.0, 0, torch.float32, "none", [], ""
            ).mul_(scale)
            made.copy_(part if bias is None else part.add_(bias))
        return y.view(*x.shape[:-1], len(self._scale))


class Int8Matmul(Int8Product):
    """`Int8Product`, faster."""

    factor = Packed


def _coded(x: Tensor) -> tuple[Tensor, Tensor]:
    """(n, d) -> codes (n, d) uint8, 128 higher than the integers that they stand for, and the scales (n, 1) float32."""
    if x.element_size() == 2:
        # Numbers without their sign are in the order of their bits, and integers are compared four times as fast.
        largest = (x.view(torch.int16) & 0x7FFF).amax(1, keepdim=True).view(x.dtype).float()
    else:
        largest = x.abs().amax(1, keepdim=True)
    scale = (largest / 127).clamp_min_(torch.finfo(torch.float32).tiny)
    whole = torch.mul(x, 1 / scale).round_().to(torch.int8)  # to uint8 at once takes five times as long
    return whole.view(torch.uint8).bitwise_xor_(0x80), scale
