"""Masks: words that look uniform to whoever lacks their seed, from the ChaCha20 stream (RFC 8439)."""

from __future__ import annotations

import torch
from torch import Tensor

from fedloom.privacy.secret import derive

SEED = 16
"""Bytes of a seed."""

_CHUNK = 1 << 20


def stream(seed: bytes, count: int) -> bytearray:
    """`count` bytes of ChaCha20 under a key derived from the seed. The nonce is zero: a seed is used once."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    encryptor = Cipher(algorithms.ChaCha20(derive(seed, "mask"), bytes(16)), mode=None).encryptor()
    made, zeros = bytearray(count), bytes(min(count, _CHUNK))
    view = memoryview(made)
    for first in range(0, count, _CHUNK):
        size = min(_CHUNK, count - first)
        view[first : first + size] = encryptor.update(zeros[:size])
    return made


def mask(seed: bytes, like: Tensor) -> Tensor:
    """Words of the shape and dtype of `like`, uniform over all that the dtype holds."""
    if not like.numel():
        return torch.zeros_like(like)
    return torch.frombuffer(stream(seed, like.numel() * like.element_size()), dtype=like.dtype).view(like.shape)
