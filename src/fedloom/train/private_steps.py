"""Private steps: each row is a client of one row, so that the gradient of a stack of clients is a gradient for each row.

Rows of a batch meet nowhere but in their client's adapter. With every client's leaf repeated for each of its rows, (R, P), the
gradient of the summed losses holds row i's own gradient in its row i: for whatever a method makes of its parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.core import Client, Group, State, Trained, Work
from fedloom.privacy.accountant import Release
from fedloom.privacy.example_level import Private, clipped_sum, sampling_rate
from fedloom.privacy.noise import digest
from fedloom.train.adapted_model import AdaptedModel
from fedloom.train.flat_parameters import AdapterStack, Layout, flatten
from fedloom.train.loss import client_losses

if TYPE_CHECKING:
    from fedloom.train.local_steps import Member

AT_ONCE = 1 << 26
"""Numbers of per-row gradients that are held at once; the rows of a step come in chunks of so many."""


def plan(
    private: Private, client: Client, work: Work, rows: int, batch_size: int, steps: int, t: int, part: int
) -> list[NDArray[np.int64]]:
    """The batches of a client's steps, drawn in secret and paid for."""
    start = digest(work.train)
    rate = sampling_rate(rows, batch_size)
    if steps:
        private.spend(client.id, t, part, Release(private.noise_multiplier, steps, rate), start.hex())
    return private.batches(rows, batch_size, steps, client.id, t, part, start)


def untold(done: Trained) -> Trained:
    """Without what its rows said: loss, gradient norms, and how many there were in the batches."""
    return replace(done, loss=math.nan, metrics={"steps": float(done.steps)})


@dataclass
class RowGradients:
    """The private gradient of every client: rows' gradients clipped, added up, noised, and divided by the expected count."""

    model: AdaptedModel
    layout: Layout
    flat: Tensor
    """(K, P), all that the clients train."""
    factors: AdapterStack
    fixed_head: Mapping[str, Tensor]
    scale: Tensor
    """(K, 1, 1)."""
    compute: torch.dtype
    private: Private
    batch_size: int
    t: int
    part: int

    def __post_init__(self) -> None:
        self._starts: dict[str, bytes] = {}
        self._masks: dict[int, Tensor] = {}
        # It finds once, of the clients, what it would find of every row in every step.
        self.factors(self.flat.detach().requires_grad_(), self.compute)

    def __call__(self, active: Sequence[Member], step: int) -> Tensor:
        """(K', P) of the active clients."""
        K, P = len(active), self.flat.shape[1]
        grad = self.flat.new_zeros(K, P)
        owners = np.repeat(np.arange(K), [len(m.plan[step]) for m in active])
        rows = np.concatenate([m.plan[step] for m in active])
        size = max(1, AT_ONCE // max(1, P))
        for first in range(0, len(rows), size):
            owner, some = owners[first : first + size], rows[first : first + size]
            grads = self._of_rows(active, owner, some)
            grad += clipped_sum(grads, torch.from_numpy(owner).to(grad.device), K, self.private.clip)
        for k, m in enumerate(active):
            context = (m.client.id, self.t, self.part, step, self._start(m))
            noise = self.private.noise(P, *context).to(grad.device, grad.dtype)
            rate = sampling_rate(len(m.data), self.batch_size)
            # Padding of smaller clients is none of their numbers: it stays zero.
            grad[k] = (grad[k] + noise * self._own(k)) / (rate * len(m.data))
        return grad

    def _of_rows(self, active: Sequence[Member], owner: NDArray[np.int64], rows: NDArray[np.int64]) -> Tensor:
        """(R, P): the gradient of each row's loss."""
        at = torch.from_numpy(owner).to(self.flat.device)
        leaf = self.flat[at].detach().requires_grad_()
        factors, views = self.factors(leaf, self.compute, owner.tolist())
        head: Group = {name: x[at] for name, x in self.fixed_head.items()}
        head |= {site: x for (role, site), x in views.items() if role == "head"}
        self.model.put(factors, self.scale[at], head)
        parts = [(active[k].data, rows[i : i + 1]) for i, k in enumerate(owner)]
        feed = self.model.feed(parts)
        losses = client_losses(parts[0][0].kind, self.model.logits(feed), feed.targets)
        (grads,) = torch.autograd.grad(losses.sum(), leaf)
        return grads

    def _own(self, k: int) -> Tensor:
        """(P,): ones where client k has a number, zeros where it is padded to a larger one."""
        if k in self._masks:
            return self._masks[k]
        own = self.layout.own[k]
        ones: State = {}
        for (role, site), shape in own.items():
            ones.setdefault(role, {})[site] = torch.ones(shape)
        whole: State = {}
        for (role, site), shape in self.layout.shapes.items():
            whole.setdefault(role, {})[site] = torch.ones(shape)
        self._masks[k] = flatten([ones, whole], self.flat.dtype, self.flat.device)[1][0]
        return self._masks[k]

    def _start(self, m: Member) -> bytes:
        if m.client.id not in self._starts:
            self._starts[m.client.id] = digest(m.work.train)
        return self._starts[m.client.id]
