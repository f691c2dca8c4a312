"""AdamW and SGD on a (K, P) stack of clients: one row is one client, with its own step size and its own clipping.

Loshchilov, Hutter: "Decoupled weight decay regularization", arXiv 1711.05101. A row is updated from its own entries alone,
so clients in one stack do what they would do alone; a finished client is left out of the rows handed in and stands still.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fedloom.privacy.example_level import Private

ScheduleName = Literal["constant", "linear", "cosine"]
OptimizerName = Literal["adamw", "sgd"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How clients train. Fields are named as the keys of a run file."""

    optimizer: OptimizerName = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    clip: float | None = 1.0
    """Largest norm of one client's gradient; None for no limit."""
    momentum: float = 0.0
    """Of SGD."""
    lr_last: float | None = None
    """The learning rate falls to it by a cosine over the `rounds`; None for one that stays."""
    rounds: int = 5
    schedule: ScheduleName = "constant"
    warmup: float = 0.0
    """Share of a client's steps over which the learning rate rises."""
    batch_size: int = 16
    local_steps: int | None = None
    local_epochs: int | None = None
    """Either of the two; one epoch if neither is given."""
    seed: int = 0
    dropout: float = 0.0
    """On the adapters' inputs."""
    base_dropout: bool = False
    """Train with the base's own dropout on: slower, and a client's result then depends on who trains beside it."""
    checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    deterministic: bool = False
    """The same bytes at every run on a GPU too, by torch's deterministic algorithms; a processor needs none."""
    int8_products: bool = False
    """Frozen layers multiplied in int8, both factors rounded, in training alone: `fedloom.train.int8_products`."""
    private: Private | None = None
    """Rows are protected: batches are Poisson samples, gradients are clipped row by row and noised, and no loss is told."""

    def lr_of(self, t: int) -> float:
        """The learning rate of round t: lo + (lr - lo) (1 + cos(pi t / T)) / 2, `lo` itself in round T and after it.

        >>> [round(Settings(lr=1.0, lr_last=0.5, rounds=2).lr_of(t), 2) for t in (1, 2, 3)]
        [0.75, 0.5, 0.5]
        """
        if self.lr_last is None:
            return self.lr
        share = 0.5 * (1.0 + math.cos(math.pi * min(1.0, t / max(1, self.rounds))))
        return self.lr_last + (self.lr - self.lr_last) * share


def schedule_factor(name: ScheduleName, step: int, steps: int, warmup: float = 0.0) -> float:
    """What multiplies the learning rate at step 0 .. steps - 1 of one client's own `steps`.

    The first `warmup` share of the steps rises linearly; then the factor stays ("constant") or falls to zero after the last.

    >>> [schedule_factor("linear", s, 4) for s in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    >>> [round(schedule_factor("cosine", s, 4, warmup=0.5), 2) for s in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    rise = math.ceil(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    if name == "linear":
        return 1.0 - done
    if name == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0


def clip_(grad: Tensor, limit: float | None) -> Tensor:
    """Scale each row of grad (K, P) to a norm of at most `limit`, in place; returns the norms (K,) from before."""
    norms: Tensor = torch.linalg.vector_norm(grad, dim=1)
    if limit is not None:
        grad.mul_((limit / (norms + 1e-6)).clamp_max(1.0).unsqueeze(1))
    return norms


@dataclass
class AdamW:
    """Adam with decoupled weight decay, bias-corrected, as torch.optim.AdamW."""

    flat: Tensor  # (K, P), changed in place
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    _first: Tensor = field(init=False)
    _second: Tensor = field(init=False)
    _steps: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._first = torch.zeros_like(self.flat)
        self._second = torch.zeros_like(self.flat)

    def step(self, grad: Tensor, lr: Tensor) -> None:
        """One step of the first rows; grad (K', P), lr (K', 1), K' <= K. Rows only ever leave from the end."""
        K = grad.shape[0]
        beta1, beta2 = self.betas
        self._steps += 1
        flat, first, second = self.flat[:K], self._first[:K], self._second[:K]
        if self.weight_decay:
            flat.mul_(1.0 - lr * self.weight_decay)
        first.lerp_(grad, 1.0 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        denominator = second.sqrt().div_(math.sqrt(1.0 - beta2**self._steps)).add_(self.eps)
        flat.addcmul_(first / denominator, lr, value=-1.0 / (1.0 - beta1**self._steps))


@dataclass
class SGD:
    """Stochastic gradient descent with momentum and L2 decay, as torch.optim.SGD."""

    flat: Tensor  # (K, P), changed in place
    weight_decay: float = 0.0
    momentum: float = 0.0
    _velocity: Tensor | None = field(init=False, default=None)

    def step(self, grad: Tensor, lr: Tensor) -> None:
        """One step of the first rows; grad (K', P), lr (K', 1), K' <= K. Rows only ever leave from the end."""
        K = grad.shape[0]
        flat = self.flat[:K]
        if self.weight_decay:
            grad = grad.add(flat, alpha=self.weight_decay)
        if self.momentum:
            if self._velocity is None:
                self._velocity = torch.zeros_like(self.flat)
            grad = self._velocity[:K].mul_(self.momentum).add_(grad)
        flat.addcmul_(grad, lr, value=-1.0)
