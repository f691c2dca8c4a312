"""A trainer whose work is done by the workers of a pool: it evaluates and generates; training goes through `Pool.drive`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedloom.core import Work
from fedloom.data.batches import Encoded
from fedloom.ray.pool import Pool
from fedloom.train.trainer import Evaluation


class RemoteTrainer:
    """What scores ask of a `Trainer`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def evaluate_together(self, works: Sequence[Work], data: Sequence[Encoded]) -> list[Evaluation]:
        """Loss and predictions of each work on its rows, row by row."""
        found: list[Evaluation] = self._pool.call("evaluate_together", works, data)[1]
        return found

    def log_likelihoods(self, work: Work, data: Encoded) -> NDArray[np.float64]:
        """(n,) of each row's answer."""
        made: NDArray[np.float64] = self._pool.call("log_likelihoods", work, data)[1]
        return made

    def generate(self, work: Work, data: Encoded, max_new_tokens: int = 64) -> list[list[int]]:
        """The greedy answer to each row's prompt."""
        made: list[list[int]] = self._pool.call("generate", work, data, max_new_tokens)[1]
        return made
