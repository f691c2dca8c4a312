"""Normal numbers from a secret key: nobody without it can draw them again, and a repeated round draws the same ones."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fedloom.privacy.masks import stream
from fedloom.privacy.secret import derive, joined
from fedloom.state import State

STEP = 2.0**-30
"""Of the grid that is noised, about, in standard deviations of the noise."""
SLACK = 1.001
"""What roundings in float32, and those to the grid, may add to a sensitivity: noise is made for so much more."""


def uniforms(key: bytes, count: int, *context: str | int | bytes) -> Tensor:
    """(count,) float64 in (0, 1), multiples of 2^-53 from ChaCha20 under a key for this context."""
    words = torch.frombuffer(stream(derive(key, *context), 8 * count), dtype=torch.int64) if count else torch.zeros(0)
    # 52 bits and a half: exact in float64, and never 0 or 1.
    return ((words.long() >> 12) & (2**52 - 1)).double().add_(0.5).mul_(2.0**-52)


def normals(key: bytes, count: int, *context: str | int | bytes) -> Tensor:
    """(count,) float64 standard normals."""
    made: Tensor = torch.special.ndtri(uniforms(key, count, *context))
    return made


def noised(x: Tensor, std: float, key: bytes, *context: str | int | bytes) -> Tensor:
    """x (n,) float64 plus noise of this standard deviation, both on a grid of integers.

    For an integer k, k + round(g) = round(k + g): what is given away is a function of the ideal Gaussian mechanism's output,
    and no last bit of a floating-point sum tells of x (Mironov, "On significance of the least significant bits", 2012).
    """
    if std == 0.0:
        return x.clone()
    step = 2.0 ** torch.tensor(std * STEP, dtype=torch.float64).log2().floor()
    return ((x / step).round() + (normals(key, len(x), *context) * (std / step)).round()) * step


def digest(state: State) -> bytes:
    """sha256 of a state: noise is drawn anew for whatever differs, or the difference of two releases would be bare."""
    total = hashlib.sha256()
    for role, group in sorted(state.items()):
        for site, x in sorted(group.items()):
            data = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            total.update(joined(role, site, str(x.dtype), str(tuple(x.shape)), data))
    return total.digest()
