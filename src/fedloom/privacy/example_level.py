"""Differential privacy of rows: each row's gradient is clipped, and Gaussian noise is added to their sum, in every step.

Abadi et al., "Deep learning with differential privacy", CCS 2016, arXiv 1607.00133. Batches are Poisson samples: every row is
in each of them by a secret coin of its own, and the sum is divided by the expected size, so that no count is told. Shuffled
epochs must not be accounted so (Chua et al., "How private are DP-SGD implementations?", arXiv 2403.17673).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.privacy.accountant import Release
from fedloom.privacy.noise import SLACK, normals, uniforms

Spend = Callable[[str, int, int, Release, str], None]
"""(client, round, part of the visit, what its steps release, digest of where they start): called before the steps."""


@dataclass(frozen=True)
class Private:
    """How every step of every client is made private."""

    clip: float
    """C, the largest norm of a row's gradient."""
    noise_multiplier: float
    """z, the standard deviation of the noise on the sum over C."""
    key: bytes = field(repr=False)
    spend: Spend = lambda client, t, part, release, start: None

    def batches(self, rows: int, batch_size: int, steps: int, *context: str | int | bytes) -> list[NDArray[np.int64]]:
        """Poisson samples of the rows, of `batch_size` rows on average; some may be empty."""
        rate = sampling_rate(rows, batch_size)
        drawn = uniforms(self.key, rows * steps, "batches", *context).view(steps, rows) < rate
        return [np.flatnonzero(one.numpy()).astype(np.int64) for one in drawn]

    def noise(self, size: int, *context: str | int | bytes) -> Tensor:
        """(size,) float64 to add to a sum of clipped gradients."""
        if self.noise_multiplier == 0:
            return torch.zeros(size, dtype=torch.float64)
        return normals(self.key, size, "step", *context) * (self.noise_multiplier * self.clip * SLACK)


def sampling_rate(rows: int, batch_size: int) -> float:
    """Probability of a row to be in a batch."""
    return min(1.0, batch_size / rows)


def clipped_sum(grads: Tensor, owner: Tensor, count: int, limit: float) -> Tensor:
    """(count, P): the sum over each owner's rows of grads (R, P), each row scaled to a norm of at most `limit`.

    A row whose gradient is not finite adds nothing: what one row can do stays bounded.
    """
    norms = torch.linalg.vector_norm(grads, dim=1)
    share = torch.where(norms.isfinite(), (limit / norms.clamp_min(1e-30)).clamp_max(1.0), 0.0)
    grads = torch.where(norms.isfinite().unsqueeze(1), grads, 0.0) if not bool(norms.isfinite().all()) else grads
    # One product reads the gradients once more and writes nothing of their size.
    weights = grads.new_zeros(count, len(grads))
    weights[owner, torch.arange(len(grads), device=owner.device)] = share
    return weights @ grads
