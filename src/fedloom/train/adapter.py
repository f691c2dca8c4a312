"""LoRA and head layers that hold K clients at once over one frozen layer. Hu et al., "LoRA", arXiv 2106.09685.

            x (K * b, L, in), the rows of client 0, then those of client 1, ...
            │                                       or all their tokens, (1, N, in)
            ├──────────── W, bias (frozen, read once for all clients) ───────────► + ──► y (K * b, L, out)
            ├──────────── right (q, in) ──► left (out, q)   (shared offset) ─────► +
            └─ dropout ── A (K, r, in) ──► * scale (K, 1, 1) ──► B (K, out, r) ──► +

One client is K = 1: there is no other path.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fedloom.core import Sites
from fedloom.errors import ModelError, nearest

Offset = tuple[Tensor, Tensor | None]
"""left (out, q) and right (q, in), or a dense (out, in) and None: what is added to a frozen weight."""

Dropout = Callable[[str, Tensor], Tensor]
"""(site, x) -> what multiplies the adapter's input x: 0 where it is dropped."""


@dataclass
class Segments:
    """Where the tokens of each of K clients are among N tokens that have no padding: T is the most tokens of a client."""

    spread: Tensor
    """(K * T,) int64: index into the N tokens, any where a client has fewer than T."""
    padding: Tensor
    """(P,) int64: index into K * T of those places."""
    collect: Tensor
    """(N,) int64: index into K * T of each token, any of an idle one."""
    _last: tuple[weakref.ref[Tensor], Tensor] | None = None
    """The last input and its rows. A strong reference would close a cycle through autograd's graph, which holds this
    object, and keep every step's graph for ever."""

    def to(self, device: torch.device) -> Segments:
        """The same places on a device."""
        return Segments(self.spread.to(device), self.padding.to(device), self.collect.to(device))

    def rows(self, x: Tensor, K: int) -> Tensor:
        """(1, N, d) -> (K, T, d) with zeros for padding. Layers with one input, such as query and value, share the copy."""
        if self._last is None or self._last[0]() is not x:
            rows = x.flatten(0, -2).index_select(0, self.spread).index_fill_(0, self.padding, 0.0)
            self._last = (weakref.ref(x), rows.view(K, -1, x.shape[-1]))
        return self._last[1]

    def any_rows(self, x: Tensor, K: int) -> Tensor:
        """(1, N, d) -> (K, T, d) with anything for padding."""
        return x.flatten(0, -2).index_select(0, self.spread).view(K, -1, x.shape[-1])

    def tokens(self, rows: Tensor) -> Tensor:
        """(K, T, d) -> (1, N, d)."""
        return rows.reshape(-1, rows.shape[-1]).index_select(0, self.collect).unsqueeze(0)


class Delta(NamedTuple):
    """What K clients add to one frozen layer."""

    A: Tensor  # (K, r, in)
    B: Tensor  # (K, out, r)
    scale: Tensor  # (K, 1, 1)


class Frozen(NamedTuple):
    """What no client trains of one layer."""

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)
    offset: Offset | None

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = F.linear(x, self.weight, self.bias)
        if self.offset is not None:
            left, right = self.offset
            y = y + (x if right is None else x @ right.T) @ left.T
        return y

    def back(self, grad: Tensor) -> Tensor:
        """The gradient (..., out) of the result -> that of x (..., in)."""
        dx = grad @ self.weight
        if self.offset is not None:
            left, right = self.offset
            dx += grad @ left if right is None else (grad @ left) @ right
        return dx


class _Adapted(torch.autograd.Function):
    """frozen(x) + scale * B A x, each client on its rows.

    Written out rather than left to autograd, whose gradient of a gather is a scatter; so that the small products are laid out
    as (r, rows), on a CPU up to four times as fast as (rows, r); and so that gradients of x are added up in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        scale: Tensor,
        frozen: Frozen,
        kept: Tensor | None,
        segments: Segments | None,
    ) -> Tensor:
        K, m = len(A), B.shape[1]
        y = frozen(x)
        z = x if kept is None else x * kept
        rows = segments.rows(z, K) if segments is not None else z.reshape(K, -1, z.shape[-1])
        h = torch.bmm(A, rows.transpose(1, 2)).mul_(scale)  # (K, r, T)
        ctx.save_for_backward(rows, A, B, h, kept)
        ctx.scale, ctx.frozen, ctx.segments, ctx.shape = scale, frozen, segments, x.shape
        if segments is not None:
            return y.add_(segments.tokens(torch.bmm(h.transpose(1, 2), B.transpose(1, 2))))
        y.view(K, -1, m).baddbmm_(h.transpose(1, 2), B.transpose(1, 2))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, A, B, h, kept = ctx.saved_tensors
        segments: Segments | None = ctx.segments
        (grad,), (need_x, need_A, need_B, *_), K = grads, ctx.needs_input_grad, len(A)
        # Padding has h = 0 and rows = 0, so whatever gradient is gathered there goes nowhere.
        g = grad.reshape(K, -1, B.shape[1]) if segments is None else segments.any_rows(grad, K)
        dx = dA = dB = None
        if need_B:
            dB = torch.bmm(h, g).transpose(1, 2)
        if need_x or need_A:
            dh = torch.bmm(B.transpose(1, 2), g.transpose(1, 2)).mul_(ctx.scale)  # (K, r, T)
            dA = torch.bmm(dh, rows) if need_A else None
        if need_x:
            dx = ctx.frozen.back(grad)
            if segments is None and kept is None:
                dx.view(K, -1, A.shape[2]).baddbmm_(dh.transpose(1, 2), A)
            else:
                dz = torch.bmm(dh.transpose(1, 2), A)
                dz = dz.view(ctx.shape) if segments is None else segments.tokens(dz)
                dx += dz if kept is None else dz * kept
        return dx, dA, dB, None, None, None, None


_adapted: Any = _Adapted.apply  # torch leaves `apply` untyped


class LoRALinear(nn.Module):
    """One frozen layer and the adapters of K clients beside it: base(x) + offset(x) + scale B A x, each client on its rows."""

    def __init__(self, site: str, base: nn.Module) -> None:
        super().__init__()
        self.site = site
        self.base = base
        self.out_features, self.in_features = shape_of(base)
        self.offset: Offset | None = None
        self.delta: Delta | None = None
        self.dropout: Dropout | None = None
        self.segments: Segments | None = None
        """For inputs without padding, of shape (1, N, in); None where clients have equally many tokens."""

    @property
    def weight(self) -> Tensor:
        """The frozen weight: some models look at its dtype."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x (K * b, ..., in) -> (K * b, ..., out), or (1, N, in) -> (1, N, out) with `segments`."""
        weight, bias = self.weight, self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        frozen = Frozen(weight.T if isinstance(self.base, Conv1D) else weight, bias, self.offset)
        if self.delta is None:
            return frozen(x)
        kept = None if self.dropout is None else self.dropout(self.site, x)
        # Inputs of K blocks or more have equally many rows per client; only all tokens in one block may not.
        segments = self.segments if x.shape[0] < len(self.delta.A) else None
        y: Tensor = _adapted(x, *self.delta, frozen, kept, segments)
        return y


class HeadLinear(nn.Module):
    """A layer of the task head, trained whole: weight (K, out, in) and bias (K, out) stand in for the model's own."""

    def __init__(self, site: str, base: nn.Linear) -> None:
        super().__init__()
        self.site = site
        self.base = base
        self.full: tuple[Tensor, Tensor | None] | None = None

    @property
    def weight(self) -> Tensor:
        """The model's own weight: some models look at its dtype."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """x (K * b, ..., in) -> (K * b, ..., out)."""
        if self.full is None:
            y: Tensor = self.base(x)
            return y
        weight, bias = self.full
        K, out, _ = weight.shape
        rows = x.reshape(K, -1, x.shape[-1])
        if bias is None:
            y = torch.bmm(rows, weight.transpose(1, 2))
        else:
            y = torch.baddbmm(bias.unsqueeze(1), rows, weight.transpose(1, 2))
        return y.view(*x.shape[:-1], out)


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; GPT-2's Conv1D keeps its weight the other way round. Raises ModelError otherwise."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    raise ModelError(
        f"a layer to adapt is a {type(layer).__name__}, expected nn.Linear or Conv1D: name linear layers in targets"
    )


@dataclass(frozen=True)
class Adapted:
    """A model whose layers were replaced in place; `eject` undoes it."""

    model: nn.Module
    sites: dict[str, LoRALinear]
    heads: dict[str, HeadLinear]

    def clear(self) -> None:
        """Take off every adapter, offset and head: the model is the original function again."""
        for site in self.sites.values():
            site.delta = site.offset = site.dropout = site.segments = None
        for head in self.heads.values():
            head.full = None

    def eject(self) -> None:
        """Put the original modules back."""
        for layers in (self.sites, self.heads):
            for name, layer in layers.items():
                _replace(self.model, name, layer, layer.base)


def inject(model: nn.Module, sites: Iterable[str], heads: Iterable[str] = ()) -> Adapted:
    """Replace the layers named by `sites` with `LoRALinear` and those under the names in `heads` with `HeadLinear`, in place.

    A head's name may be that of a block of several layers (RoBERTa's). Raises ModelError for a name that is no layer, or
    for a layer of another kind than nn.Linear and Conv1D.
    """
    modules = dict(model.named_modules())
    found: list[tuple[str, nn.Module]] = []
    for name in sites:
        if name not in modules:
            raise ModelError(f"the model has no layer {name!r}{nearest(name, modules)}: see targets in [lora]")
        shape_of(modules[name])
        found.append((name, modules[name]))
    tops: list[tuple[str, nn.Linear]] = []
    for name in heads:
        inside = [
            (path, module)
            for path, module in modules.items()
            if (path == name or path.startswith(f"{name}.")) and isinstance(module, nn.Linear)
        ]
        if not inside:
            raise ModelError(f"the model has no linear head {name!r}{nearest(name, modules)}")
        tops += inside
    adapted = Adapted(
        model,
        {name: LoRALinear(name, base) for name, base in found},
        {name: HeadLinear(name, base) for name, base in tops},
    )
    for name, layer in adapted.sites.items():
        _replace(model, name, layer.base, layer)
    for name, head in adapted.heads.items():
        _replace(model, name, head.base, head)
    return adapted


def sites_of(model: nn.Module, names: Iterable[str]) -> Sites:
    """The (out, in) of the layers named. Raises ModelError as `inject` does."""
    modules = dict(model.named_modules())
    return {name: shape_of(modules[name]) for name in names}


def _replace(model: nn.Module, name: str, old: nn.Module, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    holder = model.get_submodule(parent)
    if getattr(holder, child) is not old:
        raise ModelError(f"layer {name!r} was replaced by something else in the meantime")
    setattr(holder, child, new)
