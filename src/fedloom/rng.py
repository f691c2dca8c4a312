"""Random generators made from keys: any party, in any order, draws the same numbers. No global generator is ever used."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from a key such as (seed, t, client, purpose).

    >>> seed_of(0, 3, "client-1") == seed_of(0, 3, "client-1") != seed_of(0, 4, "client-1")
    True
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator made from a key: see `seed_of`."""
    import torch

    return torch.Generator(device).manual_seed(seed_of(*key))
