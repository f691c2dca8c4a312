"""The product of a frozen layer with its input, and with its gradient. Of W nothing is learnt, so autograd keeps nothing.

`DenseProduct` is the layer itself; `fedloom.train.int8_products` rounds both factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Product(Protocol):
    """x W^T + b, and what goes back through it."""

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        ...

    def back(self, grad: Tensor) -> Tensor:
        """The gradient (..., out) of the result -> that of x (..., in)."""
        ...


@dataclass(frozen=True)
class DenseProduct:
    """The product with a dense weight, in the dtype of what comes in."""

    weight: Callable[[torch.dtype], Tensor]
    """The weight (out, in) in a dtype: asked in forward and again in backward, and used before anything else is asked."""
    bias: Tensor | None
    """(out,)."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(x.dtype), self.bias)

    def back(self, grad: Tensor) -> Tensor:
        return grad @ self.weight(grad.dtype)


def through(product: Product, x: Tensor) -> Tensor:
    """x (..., in) -> (..., out) by a product that autograd takes for a linear layer."""
    y: Tensor = _Through.apply(x, product)  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
    return y


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Product) -> Tensor:
        ctx.product = product
        return product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.product.back(grad), None
