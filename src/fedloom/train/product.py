"""Frozen layers and the adapters of K clients beside them, in one product. Hu et al., "LoRA", arXiv 2106.09685.

            x (K * b, L, in), the rows of client 0, then those of client 1, ...
            │                                       or all their tokens, (1, N, in)
            ├──────────── W, bias (frozen, read once for all clients) ───────────► + ──► y (K * b, L, out)
            ├──────────── right (q, in) ──► left (out, q)   (shared offset) ─────► +
            └─ dropout ── A (K, r, in) ──► * scale (K, 1, 1) ──► B (K, out, r) ──► +

One client is K = 1: there is no other path. Layers with the same input, such as query, key and value, are one W, their rows
end to end, and one A: on a CPU a small product costs more for the call than for its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Offset = tuple[Tensor, Tensor | None]
"""left (out, q) and right (q, in), or a dense (out, in) and None: what is added to a frozen weight."""


@dataclass(frozen=True)
class Segments:
    """Where the tokens of each of K clients are among N tokens that have no padding: T is the most tokens of a client."""

    spread: Tensor
    """(K * T,) int64: index into the N tokens, any where a client has fewer than T."""
    padding: Tensor
    """(P,) int64: index into K * T of those places."""
    collect: Tensor
    """(N,) int64: index into K * T of each token, any of an idle one."""

    def to(self, device: torch.device) -> Segments:
        """The same places on a device."""
        return Segments(self.spread.to(device), self.padding.to(device), self.collect.to(device))

    def rows(self, x: Tensor, K: int) -> Tensor:
        """(1, N, d) -> (K, T, d) with zeros for padding."""
        return self.any_rows(x).index_fill_(-2, self.padding, 0.0).view(K, -1, x.shape[-1])

    def any_rows(self, x: Tensor) -> Tensor:
        """(..., N, d) -> (..., K * T, d) with anything for padding."""
        return x.index_select(-2, self.spread)

    def tokens(self, rows: Tensor) -> Tensor:
        """(..., K * T, d) -> (..., N, d)."""
        return rows.index_select(-2, self.collect)


class Delta(NamedTuple):
    """What K clients add to one frozen layer."""

    A: Tensor  # (K, r, in)
    B: Tensor  # (K, out, r)
    scale: Tensor  # (K, 1, 1)


class Frozen(NamedTuple):
    """What no client trains of layers with the same input."""

    weight: Tensor  # (out, in), the rows of the first layer, then those of the second, ...
    bias: Tensor | None  # (out,)
    outs: list[int]
    """How many of those rows are each layer's."""
    offsets: Sequence[Offset | None]
    """Of each layer."""

    def __call__(self, x: Tensor) -> list[Tensor]:
        """(..., in) -> (..., out) of each layer, views of one tensor."""
        y = F.linear(x, self.weight, self.bias)
        ys = list(torch.split_with_sizes(y, self.outs, -1)) if len(self.outs) > 1 else [y]
        for i, offset in enumerate(self.offsets):
            if offset is not None:
                left, right = offset
                ys[i] = ys[i] + (x if right is None else x @ right.T) @ left.T
        return ys

    def back(self, grads: Sequence[Tensor]) -> Tensor:
        """The gradients (..., out) of each layer's result -> that of x (..., in)."""
        dx = (torch.cat(list(grads), -1) if len(grads) > 1 else grads[0]) @ self.weight
        for grad, offset in zip(grads, self.offsets, strict=True):
            if offset is not None:
                left, right = offset
                dx += grad @ left if right is None else (grad @ left) @ right
        return dx


class _Product(torch.autograd.Function):
    """W x + scale * B A x of each layer, each client on its rows; A and B for those in `places` alone.

    Written out rather than left to autograd, whose gradient of a gather is a scatter; so that the small products are laid out
    as (r, rows), on a CPU up to four times as fast as (rows, r); so that n neighbours whose B have one shape are one batch of
    n * K products, a layer's K beside each other; and so that gradients of x are added up in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        frozen: Frozen,
        kept: Tensor | None,
        segments: Segments | None,
        places: Sequence[int],
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        As, Bs = factors[: len(places)], factors[len(places) :]
        K, lots = len(scale), _lots(Bs, places)
        A = torch.cat(As, 1) if len(As) > 1 else As[0]  # (K, r, in) has the ranks of all layers
        ys = frozen(x)
        z = x if kept is None else x * kept
        rows = segments.rows(z, K) if segments is not None else z.reshape(K, -1, z.shape[-1])
        h = torch.bmm(A, rows.transpose(1, 2)).mul_(scale)  # (K, r, T)
        saved = [rows, A]
        for lot, own in zip(lots, _ranks(h, lots), strict=True):
            n, _, out, r = lot.shape
            B = torch.cat(Bs[lot.first : lot.first + n]) if n > 1 else Bs[lot.first]
            own = own.view(K, n, r, -1).transpose(0, 1).reshape(n * K, r, -1)
            y = torch.stack([ys[i] for i in lot.places]) if n > 1 else ys[lot.places[0]].contiguous()
            if segments is None:
                y.view(n * K, -1, out).baddbmm_(own.transpose(1, 2), B.transpose(1, 2))
            else:
                y += segments.tokens(torch.bmm(own.transpose(1, 2), B.transpose(1, 2)).view(n, -1, out)).view(y.shape)
            for i, made in zip(lot.places, y.unbind(0) if n > 1 else [y], strict=True):
                ys[i] = made
            saved += [B, own]
        ctx.save_for_backward(kept, *saved)
        ctx.scale, ctx.frozen, ctx.segments, ctx.lots, ctx.shape = scale, frozen, segments, lots, x.shape
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(*(y for i, y in enumerate(ys) if i not in places))
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, rows, A, *saved = ctx.saved_tensors
        segments: Segments | None = ctx.segments
        lots: Sequence[_Lot] = ctx.lots
        K, layers = len(A), sum(lot.shape[0] for lot in lots)
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        need_A, need_B = any(needs[:layers]), any(needs[layers:])
        dAs: Sequence[Tensor | None] = [None] * layers
        dBs: list[Tensor | None] = [] if need_B else [None] * layers
        dhs: list[Tensor] = []
        for lot, B, own in zip(lots, saved[0::2], saved[1::2], strict=True):
            n, _, out, r = lot.shape
            # Padding has h = 0 and rows = 0, so whatever gradient is gathered there goes nowhere.
            g = torch.stack([grads[i] for i in lot.places]) if n > 1 else grads[lot.places[0]]
            g = (g if segments is None else segments.any_rows(g)).reshape(n * K, -1, out)
            if need_B:
                dBs += torch.split_with_sizes(torch.bmm(own, g).transpose(1, 2), [K] * n)
            if need_x or need_A:
                dh = torch.bmm(B.transpose(1, 2), g.transpose(1, 2))  # (n * K, r, T)
                dhs.append(dh.view(n, K, r, -1).transpose(0, 1).reshape(K, n * r, -1))
        dx = None
        if need_x or need_A:
            dh = (torch.cat(dhs, 1) if len(dhs) > 1 else dhs[0]).mul_(ctx.scale)  # (K, r, T)
        if need_A:
            dAs = torch.bmm(dh, rows).split_with_sizes([lot.shape[3] for lot in lots for _ in lot.places], 1)
        if need_x:
            dx = ctx.frozen.back(grads)
            if segments is None and kept is None:
                dx.view(K, -1, A.shape[2]).baddbmm_(dh.transpose(1, 2), A)
            else:
                dz = torch.bmm(dh.transpose(1, 2), A)
                dz = dz.view(ctx.shape) if segments is None else segments.tokens(dz.view(1, -1, A.shape[2]))
                dx += dz if kept is None else dz * kept
        return dx, None, None, None, None, None, *dAs, *dBs


class _Lot(NamedTuple):
    """Layers beside each other whose B have one shape."""

    first: int
    """Index of the first of them among those with adapters."""
    places: Sequence[int]
    """Their indices among all layers."""
    shape: tuple[int, int, int, int]
    """n layers, K clients, out, r."""


def _lots(Bs: Sequence[Tensor], places: Sequence[int]) -> list[_Lot]:
    bounds = [i for i, B in enumerate(Bs) if i == 0 or B.shape != Bs[i - 1].shape] + [len(Bs)]
    return [_Lot(i, places[i:j], (j - i, *Bs[i].shape)) for i, j in pairwise(bounds)]


def _ranks(h: Tensor, lots: Sequence[_Lot]) -> Sequence[Tensor]:
    """h (K, r, T) -> what of it is each lot's."""
    return torch.split_with_sizes(h, [n * r for _, _, (n, _, _, r) in lots], 1) if len(lots) > 1 else [h]


_product: Any = _Product.apply  # torch leaves `apply` untyped


def product(
    x: Tensor, frozen: Frozen, deltas: Sequence[Delta | None], kept: Tensor | None, segments: Segments | None
) -> Sequence[Tensor]:
    """x (K * b, ..., in) -> (K * b, ..., out) of each layer, or (1, N, in) -> (1, N, out) with `segments`.

    `kept` is what multiplies the adapters' input, as x.
    """
    places = [i for i, delta in enumerate(deltas) if delta is not None]
    there = [delta for delta in deltas if delta is not None]
    if not there:
        return frozen(x)
    # Inputs of K blocks or more have equally many rows per client; only all tokens in one block may not.
    segments = segments if x.shape[0] < len(there[0].A) else None
    factors = [delta.A for delta in there] + [delta.B for delta in there]
    made: Sequence[Tensor] = _product(x, there[0].scale, frozen, kept, segments, places, *factors)
    return made
