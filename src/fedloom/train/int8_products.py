"""Frozen products in int8: the rows of both factors are rounded to integers, multiplied exactly, and scaled back.

    q(x), s(x)      of each row: s = max|row| / 127, q = round(row / s), so that x is about s q
    y = s(x) (q(x) q(W)^T) s(W) + b             W (out, in) by its rows: one scale a result
    dx = s(g) (q(g) q(W^T)^T) s(W^T)            W by its columns

Vector-wise quantisation of both factors: Dettmers et al., "LLM.int8()", arXiv 2208.07339, section 3.1, with no columns left
out. The gradient is taken as if nothing had been rounded (Bengio et al., arXiv 1308.3432), and rounded in its turn. Scales are
a row's own: what a token becomes depends on no other token of the batch, nor on other clients'.

`fedloom.train.kernels.int8_matmul` computes the same in a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial, reduce
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedloom.models.quantised import is_plain
from fedloom.train.frozen_product import Product, through

LEAST = 128
"""Features, in and out, that a layer has at least: narrower ones lose more to the coding than they gain."""

MOST = 1 << 16
"""Features that 32 bits add up without an overflow."""


def by_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(n, d) -> integers of -127 to 127 as float32 (n, d), and the scales (n, 1) that they are multiplied by."""
    x = x.float()
    scale = (x.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (x * (1 / scale)).round(), scale


class Factor(Protocol):
    """A weight (out, in), coded by rows."""

    def __init__(self, weight: Tensor) -> None: ...

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in), its rows coded -> (..., out), the bias added."""
        ...


class Rounded:
    """The definition, for any dtype and processor: integers are multiplied as float64, which holds their sums exactly."""

    def __init__(self, weight: Tensor) -> None:
        self._codes, self._scale = by_rows(weight)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        q, s = by_rows(x.reshape(-1, x.shape[-1]))
        y = (q.double() @ self._codes.double().T) * self._scale.double().T * s.double()
        if bias is not None:
            y += bias
        return y.to(x.dtype).view(*x.shape[:-1], len(self._codes))


class Int8Product:
    """The product with a weight that is coded by rows for x, and by columns for the gradient."""

    factor: ClassVar[type[Factor]] = Rounded

    def __init__(self, weight: Tensor, bias: Tensor | None, parts: Sequence[int] | None = None) -> None:
        """`weight` (out, in), `bias` (out,). With `parts`, the rows are those of several layers end to end, so many of each:
        the gradient of each is coded by itself."""
        self._parts = list(parts) if parts is not None else [len(weight)]
        self._there = self.factor(weight)
        self._back = [self.factor(part.T) for part in weight.split_with_sizes(self._parts)]
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return self._there.multiply(x, self._bias)

    def back(self, grad: Tensor) -> Tensor:
        grads = grad.split_with_sizes(self._parts, -1)
        terms = (factor.multiply(part, None) for part, factor in zip(grads, self._back, strict=True))
        return reduce(Tensor.add_, terms)


Make = Callable[[Tensor, Tensor | None, Sequence[int] | None], Product]
"""What makes a product of a weight, a bias and parts."""


class Int8Products:
    """The products of a model's frozen layers, each weight coded once; two bytes a weight beside the weight itself."""

    def __init__(self, make: Make = Int8Product) -> None:
        self._make = make
        # By where the weight is. It is held on to, so that its place is nobody else's.
        self._made: dict[tuple[int, torch.Size, torch.dtype], tuple[Tensor, Product]] = {}
        self._layers: list[nn.Module] = []

    def of(self, weight: Tensor, bias: Tensor | None, parts: Sequence[int] | None = None) -> Product:
        """The product of a weight (out, in), the same again for the same weight."""
        key = weight.data_ptr(), weight.shape, weight.dtype  # of layers that are joined, the first begins where all do
        if key not in self._made:
            self._made[key] = weight, self._make(weight.detach(), bias, parts)
        return self._made[key][1]

    def attach(self, layers: Iterable[nn.Module]) -> None:
        """Have these layers multiply so until `detach`."""
        for layer in layers:
            weight, bias = layer.get_parameter("weight"), layer.bias
            assert bias is None or isinstance(bias, Tensor)
            product = self.of(weight.T if isinstance(layer, Conv1D) else weight, bias)
            layer.forward = partial(through, product)
            self._layers.append(layer)

    def detach(self) -> None:
        """Leave the layers as they were."""
        while self._layers:
            del self._layers.pop().forward

    def forget(self) -> None:
        """Drop all codes: the weights have been cast, or are given back."""
        self._made.clear()


def wide(model: nn.Module, besides: Collection[nn.Module] = ()) -> dict[str, nn.Module]:
    """The linear layers that int8 is for, by name: dense, wide enough, and not the vocabulary head or one of `besides`."""
    embeddings = getattr(model, "get_output_embeddings", None)
    head = None if embeddings is None else embeddings()
    return {
        name: layer
        for name, layer in model.named_modules()
        if is_plain(layer) and layer is not head and layer not in besides and suits(layer.get_parameter("weight"))
    }


def suits(weight: Tensor) -> bool:
    """Whether a weight's sizes are such as gain."""
    return min(weight.shape) >= LEAST and max(weight.shape) <= MOST
