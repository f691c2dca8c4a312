"""Fixed-point numbers as words modulo 2^bits: a sum of them is exact, whatever its order, and can be masked."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fedloom.state import State

WORDS = {32: torch.int32, 64: torch.int64}
"""Bits -> dtype. Two's complement: adding wraps around, which is addition modulo 2^bits."""


@dataclass(frozen=True)
class FixedPoint:
    """A grid of step 2^-fraction on which sums of `count` numbers, each at most `limit` in size, do not wrap around."""

    count: int
    limit: float
    bits: Literal[32, 64] = 64
    noise: float = 0.0
    """Standard deviation of what clients add to their sum as noise: nine of them do not wrap around either."""
    finest: int | None = None
    """Bits after the point, at most."""

    @property
    def fraction(self) -> int:
        """Bits after the point."""
        most = 2.0 ** (self.bits - 1) * (1 - 2.0**-20) - self.count  # rounding adds half a step a number
        found = math.floor(math.log2(most / (self.count * self.limit + 9 * self.noise)))
        return found if self.finest is None else min(found, self.finest)

    @property
    def dtype(self) -> torch.dtype:
        """Of the words."""
        return WORDS[self.bits]

    def encode(self, x: Tensor) -> Tensor:
        """Words of floating-point numbers, rounded to the nearest step, halves to even.

        Raises ValueError if a number is not finite or beyond `limit`.
        """
        wide = x.double()
        largest = float(wide.abs().max()) if wide.numel() else 0.0
        if not math.isfinite(largest):
            raise ValueError("training diverged: a number is not finite")
        if largest > self.limit:
            raise ValueError(f"a number of size {largest:.4g} is beyond the limit {self.limit:g} of the secure sum")
        return (wide * 2.0**self.fraction).round().to(self.dtype)

    def decode(self, words: Tensor) -> Tensor:
        """The float64 numbers that words, or sums of them, stand for."""
        return words.double() * 2.0**-self.fraction


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a state lies in one vector: roles and sites in the order of their names."""

    leaves: tuple[tuple[str, str, tuple[int, ...], torch.dtype], ...]
    """(role, site, shape, dtype)."""

    @staticmethod
    def of(state: State) -> Layout:
        """The layout of a state."""
        return Layout(
            tuple(
                (role, site, tuple(x.shape), x.dtype)
                for role, group in sorted(state.items())
                for site, x in sorted(group.items())
            )
        )

    @cached_property
    def digest(self) -> bytes:
        """16 bytes of sha256."""
        return hashlib.sha256(repr(self.leaves).encode()).digest()[:16]

    @property
    def size(self) -> int:
        """Numbers of the vector."""
        return sum(math.prod(shape) for _, _, shape, _ in self.leaves)

    def vector(self, state: State) -> Tensor:
        """The state as one float64 vector. Raises ValueError if it is of another layout."""
        if Layout.of(state) != self:
            raise ValueError("an upload has other tensors than the others of its sum")
        parts = [state[role][site].double().flatten() for role, site, _, _ in self.leaves]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def state(self, vector: Tensor) -> State:
        """Inverse of `vector`, in the layout's dtypes."""
        made: State = {}
        pieces = torch.split(vector, [math.prod(shape) for _, _, shape, _ in self.leaves])
        for (role, site, shape, dtype), piece in zip(self.leaves, pieces, strict=True):
            made.setdefault(role, {})[site] = piece.view(shape).to(dtype)
        return made
