"""Frozen layers and the adapters of K clients beside them, as one autograd function. Hu et al., "LoRA", arXiv 2106.09685.

            x (K * b, L, in), the rows of client 0, then those of client 1, ...
            │                                       or all their tokens, (1, N, in)
            ├──────────── W, bias (frozen, read once for all clients) ───────────► + ──► y (K * b, L, out)
            ├──────────── right (q, in) ──► left (out, q)   (shared offset) ─────► +
            └── A (K, r, in) ──► * scale (K, 1, 1) ──► B (K, out, r) ───────────────► +

`fedloom.train.lora_linear.lora` is the definition. Layers with the same input, such as query, key and value, are one W, their
rows end to end, and one A: on a CPU a small product costs more for the call than for its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedloom.data.placing import sent
from fedloom.train.frozen_product import Product
from fedloom.train.lora_linear import Adapter, Offset


@dataclass(frozen=True)
class Segments:
    """Where the tokens of each of K clients are among N tokens that have no padding: T is the most tokens of a client."""

    spread: Tensor
    """(K * T,) int64: index into the N tokens, arbitrary in padding."""
    padding: Tensor
    """(P,) int64: index into K * T of the padding of clients with fewer than T tokens."""
    collect: Tensor
    """(N,) int64: index into K * T of each token, arbitrary for a padding token."""

    def to(self, device: torch.device) -> Segments:
        """The same places on a device."""
        return Segments(sent(self.spread, device), sent(self.padding, device), sent(self.collect, device))

    def rows(self, x: Tensor, K: int) -> Tensor:
        """(1, N, d) -> (K, T, d) with zeros for padding."""
        return self.any_rows(x).index_fill_(-2, self.padding, 0.0).view(K, -1, x.shape[-1])

    def any_rows(self, x: Tensor) -> Tensor:
        """(..., N, d) -> (..., K * T, d) with anything for padding."""
        return x.index_select(-2, self.spread)

    def tokens(self, rows: Tensor) -> Tensor:
        """(..., K * T, d) -> (..., N, d)."""
        return rows.index_select(-2, self.collect)


class Frozen(NamedTuple):
    """The frozen layers of one input."""

    products: Sequence[Product]
    """One with all layers' rows end to end, or one of each layer."""
    outs: list[int]
    """How many rows are each layer's."""
    offsets: Sequence[Offset | None]
    """Of each layer."""

    def __call__(self, x: Tensor) -> list[Tensor]:
        """(..., in) -> (..., out) of each layer; views of one tensor where the weight is one."""
        ys = [product(x) for product in self.products]
        if len(ys) < len(self.outs):
            ys = list(torch.split_with_sizes(ys[0], self.outs, -1))
        for i, offset in enumerate(self.offsets):
            if offset is not None:
                left, right = offset
                ys[i] = ys[i] + (x if right is None else x @ right.T) @ left.T
        return ys

    def back(self, grads: Sequence[Tensor]) -> Tensor:
        """The gradients (..., out) of each layer's result -> that of x (..., in)."""
        joined = grads if len(self.products) == len(grads) else [torch.cat(list(grads), -1)]
        dx: Tensor | None = None
        for grad, product in zip(joined, self.products, strict=True):
            dx = product.back(grad) if dx is None else dx.add_(product.back(grad))
        assert dx is not None
        for grad, offset in zip(grads, self.offsets, strict=True):
            if offset is not None:
                left, right = offset
                dx += grad @ left if right is None else (grad @ left) @ right
        return dx


class _LoRAMatmul(torch.autograd.Function):
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
        segments: Segments | None,
        places: Sequence[int],
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        As, Bs = factors[: len(places)], factors[len(places) :]
        K, groups = len(scale), _groups(Bs, places)
        A = torch.cat(As, 1) if len(As) > 1 else As[0]  # (K, r, in) has the ranks of all layers
        ys = frozen(x)
        rows = segments.rows(x, K) if segments is not None else x.reshape(K, -1, x.shape[-1])
        T = rows.shape[1]
        h = torch.bmm(A, rows.transpose(1, 2)).mul_(scale)  # (K, r, T)
        saved = [rows, A]
        for group, own in zip(groups, _ranks(h, groups), strict=True):
            n, _, out, r = group.shape
            B = torch.cat(Bs[group.first : group.first + n]) if n > 1 else Bs[group.first]
            own = own.view(K, n, r, T).transpose(0, 1).reshape(n * K, r, T)
            y = torch.stack([ys[i] for i in group.places]) if n > 1 else ys[group.places[0]].contiguous()
            if segments is None:
                y.view(n * K, -1, out).baddbmm_(own.transpose(1, 2), B.transpose(1, 2))
            else:
                y += segments.tokens(torch.bmm(own.transpose(1, 2), B.transpose(1, 2)).view(n, -1, out)).view(y.shape)
            for i, made in zip(group.places, y.unbind(0) if n > 1 else [y], strict=True):
                ys[i] = made
            saved += [B, own]
        ctx.save_for_backward(*saved)
        ctx.scale, ctx.frozen, ctx.segments, ctx.groups = scale, frozen, segments, groups
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(*(y for i, y in enumerate(ys) if i not in places))
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, A, *saved = ctx.saved_tensors
        segments: Segments | None = ctx.segments
        groups: Sequence[_Group] = ctx.groups
        K, T, layers = len(A), rows.shape[1], sum(group.shape[0] for group in groups)
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        need_A, need_B = any(needs[:layers]), any(needs[layers:])
        dAs: Sequence[Tensor | None] = [None] * layers
        dBs: list[Tensor | None] = [] if need_B else [None] * layers
        dhs: list[Tensor] = []
        for group, B, own in zip(groups, saved[0::2], saved[1::2], strict=True):
            n, _, out, r = group.shape
            # Padding has h = 0 and rows = 0, so whatever gradient is gathered there goes nowhere.
            g = torch.stack([grads[i] for i in group.places]) if n > 1 else grads[group.places[0]]
            g = (g if segments is None else segments.any_rows(g)).reshape(n * K, -1, out)
            if need_B:
                dBs += torch.split_with_sizes(torch.bmm(own, g).transpose(1, 2), [K] * n)
            if need_x or need_A:
                dh = torch.bmm(B.transpose(1, 2), g.transpose(1, 2))  # (n * K, r, T)
                dhs.append(dh.view(n, K, r, T).transpose(0, 1).reshape(K, n * r, T))
        dx = None
        if need_x or need_A:
            dh = (torch.cat(dhs, 1) if len(dhs) > 1 else dhs[0]).mul_(ctx.scale)  # (K, r, T)
        if need_A:
            dAs = torch.bmm(dh, rows).split_with_sizes([group.shape[3] for group in groups for _ in group.places], 1)
        if need_x:
            dx = ctx.frozen.back(grads)
            if segments is None:
                dx.view(K, -1, A.shape[2]).baddbmm_(dh.transpose(1, 2), A)
            else:
                dx += segments.tokens(torch.bmm(dh.transpose(1, 2), A).view(1, -1, A.shape[2]))
        return dx, None, None, None, None, *dAs, *dBs


class _Group(NamedTuple):
    """Layers beside each other whose B have one shape."""

    first: int
    """Index of the first of them among those with adapters."""
    places: Sequence[int]
    """Their indices among all layers."""
    shape: tuple[int, int, int, int]
    """n layers, K clients, out, r."""


def _groups(Bs: Sequence[Tensor], places: Sequence[int]) -> list[_Group]:
    bounds = [i for i, B in enumerate(Bs) if i == 0 or B.shape != Bs[i - 1].shape] + [len(Bs)]
    return [_Group(i, places[i:j], (j - i, *Bs[i].shape)) for i, j in pairwise(bounds)]


def _ranks(h: Tensor, groups: Sequence[_Group]) -> Sequence[Tensor]:
    """h (K, r, T) -> what of it is each group's."""
    return torch.split_with_sizes(h, [n * r for _, _, (n, _, _, r) in groups], 1) if len(groups) > 1 else [h]


_matmul: Any = _LoRAMatmul.apply  # torch leaves `apply` untyped


def lora_matmul(
    x: Tensor, frozen: Frozen, adapters: Sequence[Adapter | None], segments: Segments | None
) -> Sequence[Tensor]:
    """x (K * b, ..., in) -> (K * b, ..., out) of each layer, or (1, N, in) -> (1, N, out) with `segments`."""
    places = [i for i, adapter in enumerate(adapters) if adapter is not None]
    there = [adapter for adapter in adapters if adapter is not None]
    if not there:
        return frozen(x)
    # Inputs of K blocks or more have equally many rows per client; only all tokens in one block may not.
    segments = segments if x.shape[0] < len(there[0].A) else None
    factors = [adapter.A for adapter in there] + [adapter.B for adapter in there]
    made: Sequence[Tensor] = _matmul(x, there[0].scale, frozen, segments, places, *factors)
    return made
