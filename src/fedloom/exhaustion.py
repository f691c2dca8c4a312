"""Out of memory: which errors say so, and going on with half as many rows at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from fedloom.errors import RoundError

T = TypeVar("T")


def exhausted(error: BaseException) -> bool:
    """Whether a device had no memory left. On a CPU PyTorch raises a plain RuntimeError, in its own words or in oneDNN's."""
    said = ("DefaultCPUAllocator", "could not create a primitive", "could not create a memory", "std::bad_alloc")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in said)


class RowsAtOnce:
    """How many rows are scored in one pass: half as many from every time on that memory did not hold them."""

    def __init__(self) -> None:
        self.most: int | None = None
        """None while memory has held what was wanted."""

    @property
    def shortfall(self) -> str | None:
        """What the user is told; None where memory held all."""
        if self.most is None:
            return None
        return f"memory did not hold all rows that were to be scored at once: {self.most} at a time were, from then on"

    def __call__(self, wanted: int, score: Callable[[int], T]) -> T:
        """What `score` makes of `wanted` rows at once, or of fewer. Raises RoundError where a single one is too many."""
        size = wanted if self.most is None else min(wanted, self.most)
        while True:
            try:
                return score(size)
            except (MemoryError, RuntimeError) as error:
                if not exhausted(error):
                    raise
                if size < 2:
                    raise RoundError(
                        "there is no memory to score even one row at a time: lower task.max_length or task.max_new_tokens, or "
                        "choose a smaller model.dtype or model"
                    ) from error
            # Outside the handler, whose error holds on to what was computed.
            size = self.most = size // 2
