"""Frozen layers whose adapters are computed with them, layers of one input together: `HookedLayers`, faster.

Each layer's `forward` is replaced by one that multiplies its weight and the adapters of K clients in one autograd function.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedloom.models.families import Family, family_of
from fedloom.models.quantised import QuantisedLinear, is_plain
from fedloom.train.frozen_product import DenseProduct, Product
from fedloom.train.int8_products import Int8Products, suits
from fedloom.train.kernels.grouped_matmul import ALIGN, Groups, grouped_matmul
from fedloom.train.kernels.lora_matmul import Frozen, Segments, lora_matmul
from fedloom.train.lora_linear import Adapter, Dropout, Offset, shape_of

_MOST_JOINED = 1 << 23
"""Numbers in weights that are made one. Products of more are no faster together: at 4096 x 12288 they take 0.6 % longer."""


@dataclass
class Step:
    """What holds for every layer while one batch goes through."""

    segments: Segments | Groups | None = None
    """For inputs without padding, of shape (1, N, in); None where clients have equally many tokens."""


class LoRALinear:
    """One frozen layer and the adapters of K clients beside it: base(x) + offset x + scale * B A x, each client on its rows."""

    def __init__(self, base: nn.Module, step: Step) -> None:
        self.base = base
        self.out_features, self.in_features = shape_of(base)
        self.offset: Offset | None = None
        self.adapter: Adapter | None = None
        self.step = step
        self.siblings: Siblings | None = None
        self.int8: Int8Products | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen weight, (out, in); of Conv1D (in, out), of a quantised layer its codes."""
        return self.base.get_parameter("weight")

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The frozen weight (out, in); of a quantised layer made anew, and valid until the next one is."""
        if isinstance(self.base, QuantisedLinear):
            return self.base.dense(dtype)
        return self.weight.T if isinstance(self.base, Conv1D) else self.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias (out,)."""
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @property
    def product(self) -> Product:
        """The frozen layer's own."""
        if self.int8 is not None and is_plain(self.base) and suits(self.weight):
            return self.int8.of(self.dense(self.weight.dtype), self.bias)
        return DenseProduct(self.dense, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (K * b, ..., in) -> (K * b, ..., out), or (1, N, in) -> (1, N, out) with the step's segments."""
        if self.siblings is not None:
            return self.siblings(self, x)
        frozen = Frozen([self.product], [self.out_features], [self.offset])
        return _multiply(x, frozen, [self.adapter], self.step)[0]


class Siblings:
    """Layers with the same input, such as query, key and value: computed together when the model calls the first of them.

    Dense weights become one where they are small. Large ones stay apart, or they would be a copy of a file's pages, and so do
    those of quantised layers, which are made dense one after the other.
    """

    def __init__(self, layers: Sequence[LoRALinear]) -> None:
        self._layers = layers
        self._outs = [layer.out_features for layer in layers]
        coded = any(isinstance(layer.base, QuantisedLinear) for layer in layers)
        self._apart = coded or sum(layer.weight.numel() for layer in layers) > _MOST_JOINED
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._x: weakref.ref[Tensor] | None = None
        # Each result leaves with the layer that is asked for it: kept, it would hold on to its step's graph.
        self._made: dict[LoRALinear, Tensor] = {}
        for layer in layers:
            layer.siblings = self

    def join(self) -> None:
        """Fuse dense weights into one, of which the layers' own become views, unless they are."""
        if self._apart:
            return
        if self._weight is not None:
            ours = self._weight.untyped_storage().data_ptr()
            if all(layer.weight.untyped_storage().data_ptr() == ours for layer in self._layers):
                return
        self._weight = torch.cat([layer.weight.data for layer in self._layers])
        biases = [layer.bias.data for layer in self._layers if layer.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        for layer, weight in zip(self._layers, torch.split_with_sizes(self._weight, self._outs), strict=True):
            layer.weight.data = weight

    def part(self) -> None:
        """Give each layer a weight of its own again."""
        if self._weight is not None:
            for layer in self._layers:
                layer.weight.data = layer.weight.data.clone()
        self._weight = self._bias = None

    def forget(self) -> None:
        """Drop results that no layer was asked for."""
        self._made.clear()
        self._x = None

    def __call__(self, layer: LoRALinear, x: Tensor) -> Tensor:
        """The layer's result."""
        if layer not in self._made or self._x is None or self._x() is not x:
            frozen = Frozen(self._products(), self._outs, [other.offset for other in self._layers])
            made = _multiply(x, frozen, [other.adapter for other in self._layers], layer.step)
            self._made = dict(zip(self._layers, made, strict=True))
            self._x = weakref.ref(x)
        return self._made.pop(layer)

    def _products(self) -> Sequence[Product]:
        int8 = self._layers[0].int8
        if self._apart or (int8 is not None and not all(suits(layer.weight) for layer in self._layers)):
            return [layer.product for layer in self._layers]
        weight = self._weight
        assert weight is not None, "layers are joined when they are attached"
        if int8 is not None:
            return [int8.of(weight, self._bias, self._outs)]
        return [DenseProduct(lambda dtype: weight, self._bias)]


class FusedLayers:
    """The adapted layers of a model, and beside them those that share an input with one."""

    def __init__(self, adapted: Mapping[str, LoRALinear], siblings: Sequence[Siblings], every: Sequence[LoRALinear]):
        self.adapted = adapted
        self.step = every[0].step
        self._siblings = siblings
        self._every = every

    @classmethod
    def of(cls, model: nn.Module, layers: Mapping[str, nn.Module]) -> FusedLayers | None:
        """None for a family without a record, or where a layer may be more than W x + b."""
        family = family_of(model)
        if family is None or not layers or not all(_multiplies(layer) for layer in layers.values()):
            return None
        step, modules = Step(), dict(model.named_modules())
        every = {name: LoRALinear(layer, step) for name, layer in layers.items()}
        siblings = []
        for names in _with_one_input(modules, family, list(layers)):
            for name in names:
                every.setdefault(name, LoRALinear(modules[name], step))
            siblings.append(Siblings([every[name] for name in names]))
        return cls({name: every[name] for name in layers}, siblings, list(every.values()))

    @property
    def bases(self) -> list[nn.Module]:
        """The frozen layers that are computed here."""
        return [layer.base for layer in self._every]

    @property
    def aligned(self) -> bool:
        """Whether the sizes of all are such as grouped products take."""
        return all(x.in_features % ALIGN == 0 and x.out_features % ALIGN == 0 for x in self._every)

    def attach(self, offsets: Mapping[str, Offset]) -> None:
        for siblings in self._siblings:
            siblings.join()
        for site, offset in offsets.items():
            self.adapted[site].offset = offset
        for layer in self._every:
            layer.base.forward = layer.forward

    def multiply_in(self, int8: Int8Products | None) -> None:
        """How frozen products are made until `detach`: in int8, or as the weights are."""
        for layer in self._every:
            layer.int8 = int8

    def put(self, adapters: Mapping[str, Adapter], dropout: Dropout | None) -> None:
        assert dropout is None and all(x.gate is None for x in adapters.values()), "these kernels have neither"
        for site, layer in self.adapted.items():
            layer.adapter = adapters.get(site)

    def detach(self) -> None:
        self.step.segments = None
        self.multiply_in(None)
        for layer in self._every:
            layer.adapter = layer.offset = None
            layer.base.__dict__.pop("forward", None)
        for siblings in self._siblings:
            siblings.forget()

    def part(self) -> None:
        """Give every layer a weight of its own again."""
        for siblings in self._siblings:
            siblings.part()


def _multiply(x: Tensor, frozen: Frozen, adapters: Sequence[Adapter | None], step: Step) -> Sequence[Tensor]:
    """Of each layer, by the product that suits where the step's tokens are."""
    segments = step.segments
    if not isinstance(segments, Groups):
        return lora_matmul(x, frozen, adapters, segments)
    K = max((len(adapter.A) for adapter in adapters if adapter is not None), default=0)
    # Inputs of K blocks have equally many rows per client.
    return grouped_matmul(x, frozen, adapters, segments) if x.shape[0] < K else lora_matmul(x, frozen, adapters, None)


def _multiplies(layer: nn.Module) -> bool:
    """Whether a layer is W x + b and no more."""
    return is_plain(layer) or isinstance(layer, QuantisedLinear)


def _with_one_input(modules: Mapping[str, nn.Module], family: Family, sites: Sequence[str]) -> list[list[str]]:
    """Names of layers with the same input of which one at least is among the sites."""
    found = []
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in sites):
        for names in family.siblings:
            paths = [f"{parent}.{name}".lstrip(".") for name in names]
            layers = [modules.get(path) for path in paths]
            # Others may not be W x + b.
            linear = [x for x in layers if isinstance(x, nn.Linear) and _multiplies(x)]
            alike = {(type(x), x.in_features, x.bias is None, x.weight.dtype) for x in linear}
            if len(linear) == len(names) and len(alike) == 1 and any(path in sites for path in paths):
                found.append(paths)
    return found
