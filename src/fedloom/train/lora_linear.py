"""LoRA of K clients beside one frozen layer, as it is defined. Hu et al., "LoRA", arXiv 2106.09685.

    x (K * b, ..., in), the rows of client 0, then those of client 1, ...
    y = base(x) + offset x + scale * B (gate * (A x)),  each client's A, B and gate on its own rows

The base layer stays where it is and is only called, so it may be of any kind: nn.Linear, GPT-2's Conv1D, a quantised layer.
Everything here is plain tensor algebra that autograd differentiates. `fedloom.train.kernels` computes the same faster where
it can, and its tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from fedloom.errors import ModelError, nearest
from fedloom.models.quantised import coded_shape

Offset = tuple[Tensor, Tensor | None]
"""left (out, q) and right (q, in), or a dense (out, in) and None: what is added to a frozen weight."""

Dropout = Callable[[str, Tensor], Tensor]
"""(site, x) -> what multiplies the adapter's input x: 0 where it is dropped."""


class Adapter(NamedTuple):
    """The LoRA factors of K clients for one layer."""

    A: Tensor
    """(K, r, in)."""
    B: Tensor
    """(K, out, r)."""
    scale: Tensor
    """(K, 1, 1)."""
    gate: Tensor | None = None
    """(K, parts, in): softmax(gate x) weighs equal parts of the ranks."""


def lora(x: Tensor, adapter: Adapter, keep: Tensor | None = None) -> Tensor:
    """scale * B (gate * (A x)): x (K * b, ..., in) -> (K * b, ..., out). `keep` multiplies A's input, as x."""
    A, B, scale, gate = adapter
    K = len(A)
    rows = x.reshape(K, -1, x.shape[-1])
    h = torch.einsum("kri,kni->knr", A, rows if keep is None else rows * keep.reshape(rows.shape))
    if gate is not None:
        weights = torch.einsum("kpi,kni->knp", gate, rows).softmax(-1)
        h = h * weights.repeat_interleave(A.shape[1] // gate.shape[1], -1)
    return (scale * torch.einsum("kor,knr->kno", B, h)).view(*x.shape[:-1], B.shape[1])


def shared(x: Tensor, offset: Offset) -> Tensor:
    """What an offset to the frozen weight, common to all clients, adds: x (..., in) -> (..., out)."""
    left, right = offset
    return F.linear(x if right is None else F.linear(x, right), left)


def full(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A layer that each client has whole: x (K * b, ..., in), weight (K, out, in), bias (K, out) -> (K * b, ..., out)."""
    K, out, _ = weight.shape
    rows = x.reshape(K, -1, x.shape[-1])
    if bias is None:
        y = torch.bmm(rows, weight.transpose(1, 2))
    else:
        y = torch.baddbmm(bias.unsqueeze(1), rows, weight.transpose(1, 2))
    return y.view(*x.shape[:-1], out)


class Layers(Protocol):
    """The adapted layers of a model: what computes base(x) + offset x + scale * B (gate * (A x)) in their place."""

    def attach(self, offsets: Mapping[str, Offset]) -> None:
        """Begin to adapt the model: an offset for each site that has one, no adapter yet."""

    def put(self, adapters: Mapping[str, Adapter], dropout: Dropout | None) -> None:
        """The adapter of each site that has one, for the forward passes to come."""

    def detach(self) -> None:
        """Leave the model as it was."""


class HookedLayers:
    """The definition: a forward hook on each layer."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._offsets: Mapping[str, Offset] = {}
        self._adapters: Mapping[str, Adapter] = {}
        self._dropout: Dropout | None = None
        self._handles: list[RemovableHandle] = []

    def attach(self, offsets: Mapping[str, Offset]) -> None:
        self._offsets = offsets
        self._handles = [x.register_forward_hook(partial(self._add, site)) for site, x in self._layers.items()]

    def put(self, adapters: Mapping[str, Adapter], dropout: Dropout | None) -> None:
        self._adapters, self._dropout = adapters, dropout

    def detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._offsets, self._adapters, self._dropout = {}, {}, None

    def _add(self, site: str, layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x = inputs[0]
        # Moves nothing but where a model is spread over devices.
        if site in self._offsets:
            left, right = self._offsets[site]
            y = y + shared(x, (left.to(x.device), None if right is None else right.to(x.device)))
        if site in self._adapters:
            A, B, scale, gate = self._adapters[site]
            here = Adapter(
                A.to(x.device), B.to(x.device), scale.to(x.device), None if gate is None else gate.to(x.device)
            )
            y = y + lora(x, here, None if self._dropout is None else self._dropout(site, x))
        return y


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; GPT-2's Conv1D keeps its weight the other way round. Raises ModelError otherwise."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if (shape := coded_shape(layer)) is not None:
        return shape
    raise ModelError(
        f"a layer to adapt is a {type(layer).__name__}, expected nn.Linear or Conv1D: name linear layers in targets"
    )


def find_layers(model: nn.Module, sites: Iterable[str]) -> dict[str, nn.Module]:
    """The linear layers named. Raises ModelError for a name that is no layer, or one of another kind."""
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for name in sites:
        if name not in modules:
            raise ModelError(f"the model has no layer {name!r}{nearest(name, modules)}: see targets in [lora]")
        shape_of(modules[name])
        found[name] = modules[name]
    return found


def find_heads(model: nn.Module, heads: Iterable[str]) -> dict[str, nn.Module]:
    """The linear layers under the names: a head may be a block of several (RoBERTa's). Raises ModelError if there is none."""
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for name in heads:
        inside = {
            path: module
            for path, module in modules.items()
            if (path == name or path.startswith(f"{name}.")) and isinstance(module, nn.Linear)
        }
        if not inside:
            raise ModelError(f"the model has no linear head {name!r}{nearest(name, modules)}")
        found |= inside
    return found
