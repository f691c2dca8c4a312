"""Noise from the clients: each adds a share to its own words, and the sum of enough shares is the noise of the release.

Agarwal, Kairouz, Liu, "The Skellam mechanism for differentially private federated learning", NeurIPS 2021, arXiv 2110.04995.
Under a secure sum the server sees only the total, so it need not be trusted. Skellam shares add up exactly, in integers: n
clients of which `survivors` are sure to be in the sum and `colluding` may tell the server their own shares leave the noise of
survivors - colluding. Whoever else is there makes the noise larger than promised: the price of drop-outs.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedloom.errors import RoundError
from fedloom.privacy.exchange import Terms
from fedloom.privacy.graph import survivors_and_colluding
from fedloom.privacy.noise import SLACK
from fedloom.privacy.skellam import LEAST, skellam

GRID = 1024.0
"""Steps of the words' grid that the sensitivity has at least: below, integer noise costs visibly more than Gaussian."""
FINE = 2.0**22
"""Deviation of one share in steps, at most: words have room for it, and the sampler is exact there."""


@dataclass(frozen=True)
class NoiseShares:
    """What every client of one sum adds to its words."""

    variance: float
    """Of one share, in squared steps of the grid."""
    where: Tensor
    """(d,) bool: the numbers that are noised, those that any client trains."""

    def std(self, clients: int) -> float:
        """Deviation of the sum of so many shares, in steps."""
        return math.sqrt(clients * self.variance)

    def draw(self, words: Tensor, key: bytes, *context: str | int | bytes) -> Tensor:
        """A client's share, like `words` (n,). The same words get the same share again; others, one of their own."""
        seen = hashlib.sha256(words.numpy().tobytes()).digest()
        drawn = skellam(self.variance, key, len(words), *context, seen).to(words.dtype)
        return torch.where(self.where, drawn, 0)


def noisy_terms(terms: Terms, noise_multiplier: float, reach: float, where: Tensor) -> tuple[Terms, NoiseShares]:
    """Terms of a sum with room for the noise, and the shares of its clients.

    `reach` is the longest vector by which one client moves the sum, `where` (d,) bool which numbers of it. Rounding to the
    grid moves each by a step at most, which the noise allows for. No client helps to open a sum of fewer than `survivors`.
    Raises RoundError for a grid too coarse.
    """
    numbers = int(where.sum())
    survivors, colluding = survivors_and_colluding(len(terms.keys))
    least = max(terms.least, survivors)
    honest = least - colluding
    std = noise_multiplier * reach
    fixed = replace(
        terms.fixed,
        noise=std * math.sqrt(len(terms.keys) / honest),
        finest=math.floor(math.log2(FINE * math.sqrt(honest) / std)),
    )
    steps = reach * 2.0**fixed.fraction
    variance = (noise_multiplier * (steps * SLACK + math.sqrt(numbers))) ** 2 / honest
    if steps < GRID or math.sqrt(numbers) > steps / 10 or variance < 2 * LEAST:
        raise RoundError(
            f"round {terms.t}: a client's change has {steps:.3g} steps of the secure sum's grid, too few for noise in "
            "integers: set privacy.bits to 64, or a smaller privacy.limit"
        )
    return replace(terms, fixed=fixed, least=least), NoiseShares(variance, where)
