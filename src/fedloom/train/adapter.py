"""LoRA and head layers that hold K clients at once over one frozen layer, and putting them into a model and taking them out."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedloom.errors import ModelError, nearest
from fedloom.state import Sites
from fedloom.train.product import Delta, Frozen, Offset, Segments, product

Dropout = Callable[[str, Tensor], Tensor]
"""(site, x) -> what multiplies the adapter's input x: 0 where it is dropped."""

_SIBLINGS = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that a model calls on one and the same input, in this order."""


@dataclass
class Step:
    """What holds for every layer while one batch goes through."""

    dropout: Dropout | None = None
    segments: Segments | None = None
    """For inputs without padding, of shape (1, N, in); None where clients have equally many tokens."""


class LoRALinear(nn.Module):
    """One frozen layer and the adapters of K clients beside it: base(x) + offset(x) + scale B A x, each client on its rows."""

    def __init__(self, site: str, base: nn.Module, step: Step | None = None) -> None:
        super().__init__()
        self.site = site
        self.base = base
        self.out_features, self.in_features = shape_of(base)
        self.offset: Offset | None = None
        self.delta: Delta | None = None
        self.step = Step() if step is None else step
        self.siblings: Siblings | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen weight: some models look at its dtype."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias (out,)."""
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """x (K * b, ..., in) -> (K * b, ..., out), or (1, N, in) -> (1, N, out) with the step's segments."""
        if self.siblings is not None and self.step.dropout is None:
            return self.siblings(self, x)
        weight = self.weight.T if isinstance(self.base, Conv1D) else self.weight
        frozen = Frozen(weight, self.bias, [self.out_features], [self.offset])
        dropout = self.step.dropout if self.delta is not None else None
        kept = None if dropout is None else dropout(self.site, x)
        return product(x, frozen, [self.delta], kept, self.step.segments)[0]


class Siblings:
    """Layers with the same input, such as query, key and value: computed together when the model calls the first of them.

    With dropout each computes alone, as each drops entries of its own.
    """

    def __init__(self, layers: Sequence[LoRALinear]) -> None:
        self._layers = layers
        self._outs = [layer.out_features for layer in layers]
        self._x: weakref.ref[Tensor] | None = None
        # Each result leaves with the layer that is asked for it: kept, it would hold on to its step's graph.
        self._made: dict[LoRALinear, Tensor] = {}
        for layer in layers:
            layer.siblings = self
        self.join()

    def join(self) -> None:
        """Make one weight of theirs, of which their own become views: to be called again when these were replaced."""
        self._weight = torch.cat([layer.weight.data for layer in self._layers])
        biases = [layer.bias.data for layer in self._layers if layer.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        for layer, weight in zip(self._layers, torch.split_with_sizes(self._weight, self._outs), strict=True):
            layer.weight.data = weight

    def part(self) -> None:
        """Give each layer a weight of its own again."""
        self._made.clear()
        for layer in self._layers:
            layer.siblings = None
            layer.weight.data = layer.weight.data.clone()

    def __call__(self, layer: LoRALinear, x: Tensor) -> Tensor:
        """The layer's result."""
        if layer not in self._made or self._x is None or self._x() is not x:
            frozen = Frozen(self._weight, self._bias, self._outs, [other.offset for other in self._layers])
            made = product(x, frozen, [other.delta for other in self._layers], None, layer.step.segments)
            self._made = dict(zip(self._layers, made, strict=True))
            self._x = weakref.ref(x)
        return self._made.pop(layer)


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
    beside: dict[str, LoRALinear]
    """Layers without an adapter that are computed together with one that has."""
    heads: dict[str, HeadLinear]
    siblings: Sequence[Siblings]
    step: Step

    def join(self) -> None:
        """To be called when frozen weights were replaced."""
        for siblings in self.siblings:
            siblings.join()

    def clear(self) -> None:
        """Take off every adapter, offset and head: the model is the original function again."""
        self.step.dropout = self.step.segments = None
        for site in self.sites.values():
            site.delta = site.offset = None
        for head in self.heads.values():
            head.full = None

    def eject(self) -> None:
        """Put the original modules back."""
        for siblings in self.siblings:
            siblings.part()
        for layers in (self.sites, self.beside, self.heads):
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
    step = Step()
    together = _together(modules, [name for name, _ in found])
    layers = {name: LoRALinear(name, base, step) for name, base in found}
    beside = {name: LoRALinear(name, modules[name], step) for names in together for name in names if name not in layers}
    every = layers | beside
    siblings = [Siblings([every[name] for name in names]) for names in together]
    adapted = Adapted(model, layers, beside, {name: HeadLinear(name, base) for name, base in tops}, siblings, step)
    for group in (layers, beside, adapted.heads):
        for name, layer in group.items():
            _replace(model, name, layer.base, layer)
    return adapted


def _together(modules: Mapping[str, nn.Module], sites: Sequence[str]) -> list[list[str]]:
    """Names of layers with the same input of which one at least is among the sites."""
    found = []
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in sites):
        for names in _SIBLINGS:
            paths = [f"{parent}.{name}".lstrip(".") for name in names]
            layers = [modules.get(path) for path in paths]
            linear = [layer for layer in layers if type(layer) is nn.Linear]  # others may not be W x + b
            alike = {(layer.in_features, layer.bias is None, layer.weight.dtype) for layer in linear}
            if len(linear) == len(names) and len(alike) == 1 and any(path in sites for path in paths):
                found.append(paths)
    return found


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
