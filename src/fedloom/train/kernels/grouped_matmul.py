"""The adapters of K clients as grouped products: each client's tokens by its own factors in one kernel, without padding.

            x (N, in), the tokens of client 0, then those of client 1, ...; client k's end at ends[k]
            ├──────────── W, bias (frozen, read once for all clients) ──────────────────► + ──► y (N, out)
            └── A (K, r, in) ──► h (N, r) ──► scale * B (K, out, r) ────────────────────► +

`fedloom.train.kernels.lora_matmul` computes the same from tokens that are spread to (K, T). Here nothing is spread or
collected, whatever the numbers of tokens. Hu et al., "LoRA", arXiv 2106.09685; torch.nn.functional.grouped_mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedloom.data.placing import sent
from fedloom.train.kernels.lora_matmul import Frozen
from fedloom.train.lora_linear import Adapter

ALIGN = 8
"""What ranks are padded to, with zeros: a row of any operand must begin at a multiple of 16 bytes, 8 numbers of bfloat16."""


@dataclass(frozen=True)
class Groups:
    """Where the tokens of each of K clients end, among N tokens that have no padding."""

    ends: Tensor
    """(K,) int32, rising; the last is N, padding tokens included: those count as the last client's, with no gradient."""

    def to(self, device: torch.device) -> Groups:
        """The same places on a device."""
        return Groups(sent(self.ends, device))


def suits(device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether grouped products are one kernel here.

    It is for bfloat16 on compute capabilities 9.0 and 10.0. Elsewhere torch multiplies group after group: a GPU would wait for
    the host, and a CPU compile a product for every client's number of tokens. There the product is the faster one of a wide
    layer and still a step of 16 clients on MiniLM's shape the slower, 1.4 times in bfloat16 (`benchmarks/adapters.py`).
    """
    if device.type != "cuda" or dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    return torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))


class _GroupedMatmul(torch.autograd.Function):
    """W x + scale * B A x of each layer, each client on its tokens; A and B for those in `places` alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, frozen: Frozen, ends: Tensor, places: Sequence[int], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        ranks = [A.shape[1] for A in factors[: len(places)]]
        As = [_padded(A, 1) for A in factors[: len(places)]]
        # The scale goes into B: over (K, out, r), not over all tokens.
        Bs = [_padded(B * scale, 2) for B in factors[len(places) :]]
        A = torch.cat(As, 1) if len(As) > 1 else As[0]
        ys, rows = frozen(x), x.reshape(-1, x.shape[-1])
        h = F.grouped_mm(rows, A.transpose(1, 2), offs=ends)  # (N, R), R the ranks of all layers
        for i, low, B in zip(places, _split(h, Bs), Bs, strict=True):
            ys[i] = ys[i] + F.grouped_mm(low, B.transpose(1, 2), offs=ends).view(ys[i].shape)
        ctx.save_for_backward(rows, A, h, *Bs)
        ctx.scale, ctx.frozen, ctx.ends, ctx.places, ctx.ranks = scale, frozen, ends, places, ranks
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(*(y for i, y in enumerate(ys) if i not in places))
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, A, h, *Bs = ctx.saved_tensors
        ends, ranks, layers = ctx.ends, ctx.ranks, len(ctx.places)
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        need_A, need_B = any(needs[:layers]), any(needs[layers:])
        dAs: Sequence[Tensor | None] = [None] * layers
        dBs: list[Tensor | None] = [] if need_B else [None] * layers
        dhs: list[Tensor] = []
        for i, low, B, r in zip(ctx.places, _split(h, Bs), Bs, ranks, strict=True):
            g = grads[i].reshape(-1, B.shape[1]).contiguous()
            if need_B:
                dBs.append(F.grouped_mm(g.T, low, offs=ends)[:, :, :r] * ctx.scale)
            if need_x or need_A:
                dhs.append(F.grouped_mm(g, B, offs=ends))  # (N, r)
        dx = None
        if need_x or need_A:
            dh = torch.cat(dhs, 1) if len(dhs) > 1 else dhs[0]
        if need_A:
            each = torch.split_with_sizes(F.grouped_mm(dh.T, rows, offs=ends), [B.shape[2] for B in Bs], 1)
            dAs = [dA[:, :r] for dA, r in zip(each, ranks, strict=True)]
        if need_x:
            dx = ctx.frozen.back(grads)
            dx += F.grouped_mm(dh, A, offs=ends).view(dx.shape)
        return dx, None, None, None, None, *dAs, *dBs


def _padded(x: Tensor, axis: int) -> Tensor:
    """Zeros after the ranks of A (K, r, in) or B (K, out, r), and no copy where there is nothing to add."""
    gap = -x.shape[axis] % ALIGN
    if not gap:
        return x.contiguous()
    return F.pad(x, (0, 0, 0, gap) if axis == 1 else (0, gap))


def _split(h: Tensor, Bs: Sequence[Tensor]) -> Sequence[Tensor]:
    """h (N, R) -> what of it is each layer's."""
    return torch.split_with_sizes(h, [B.shape[2] for B in Bs], 1) if len(Bs) > 1 else [h]


_matmul: Any = _GroupedMatmul.apply  # torch leaves `apply` untyped


def grouped_matmul(x: Tensor, frozen: Frozen, adapters: Sequence[Adapter | None], groups: Groups) -> Sequence[Tensor]:
    """x (1, N, in) -> (1, N, out) of each layer, with at least one adapter. in and out are multiples of `ALIGN`."""
    places = [i for i, adapter in enumerate(adapters) if adapter is not None]
    there = [adapter for adapter in adapters if adapter is not None]
    factors = [adapter.A for adapter in there] + [adapter.B for adapter in there]
    made: Sequence[Tensor] = _matmul(x, there[0].scale, frozen, groups.ends, places, *factors)
    return made
