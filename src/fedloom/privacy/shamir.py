"""Shamir's secret sharing over GF(256): any `threshold` shares give the secret, fewer say nothing about it.

Shamir, "How to share a secret", CACM 22(11), 1979; bytes are shared one by one, in the field of AES (x^8 + x^4 + x^3 + x + 1).
Tables are not constant-time: the shares are safe from those who receive them, not from who measures this process's cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor


@cache
def _tables() -> tuple[Tensor, list[int]]:
    """Products (256, 256) uint8, and the inverse of each number (0 for 0)."""
    powers = [1]
    for _ in range(254):
        x = powers[-1]
        x ^= x << 1  # times 3, which generates the field
        powers.append(x ^ 0x11B if x > 255 else x)
    logs = {x: i for i, x in enumerate(powers)}
    products = torch.zeros(256, 256, dtype=torch.uint8)
    exponents = torch.tensor([logs[x] for x in range(1, 256)])
    products[1:, 1:] = torch.tensor(powers, dtype=torch.uint8)[(exponents[:, None] + exponents[None, :]) % 255]
    inverses = [0] + [powers[-logs[x] % 255] for x in range(1, 256)]
    return products, inverses


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def split(secret: bytes, threshold: int, count: int, random: Callable[[int], bytes] = os.urandom) -> list[bytes]:
    """The shares at 1, 2, ..., `count` of a secret, each as long as it. Raises ValueError for more than 255."""
    if not 1 <= threshold <= count <= 255:
        raise ValueError(f"threshold {threshold} of {count} shares, expected 1 <= threshold <= count <= 255")
    products, _ = _tables()
    where = torch.arange(1, count + 1).unsqueeze(1)
    rows = [_bytes(random(len(secret))) for _ in range(threshold - 1)]
    y = torch.zeros(count, len(secret), dtype=torch.uint8)
    for row in (*rows, _bytes(secret)):  # Horner's rule, the secret is the constant term
        y = products[where, y.long()] ^ row
    return [bytes(share.tolist()) for share in y]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret from the shares at these places, as many as the threshold: Lagrange's polynomial at 0."""
    products, inverses = _tables()
    total = torch.zeros(len(next(iter(shares.values()))), dtype=torch.uint8)
    for i, share in shares.items():
        weight = 1
        for j in shares:
            if j != i:
                weight = int(products[weight, int(products[j, inverses[i ^ j]])])
        total ^= products[weight][_bytes(share).long()]
    return bytes(total.tolist())
