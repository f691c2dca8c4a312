"""Masks: the known stream, and words that no test of ours tells from uniform ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from fedloom.privacy.exchange import Masked, Party, Terms
from fedloom.privacy.fixed_point import FixedPoint
from fedloom.privacy.keys import RunKey
from fedloom.privacy.masks import mask, stream
from fedloom.privacy.memory import Memory
from fedloom.privacy.secret import derive


def test_the_stream_is_chacha20_and_does_not_depend_on_how_much_is_asked() -> None:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    seed, count = b"0123456789abcdef", (1 << 21) + 7
    long = stream(seed, count)
    whole = Cipher(algorithms.ChaCha20(derive(seed, "mask"), bytes(16)), mode=None).encryptor().update(bytes(count))
    assert bytes(long) == whole and bytes(stream(seed, 99)) == whole[:99]
    assert bytes(stream(b"0123456789abcdeg", 99)) != whole[:99]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_mask_has_the_shape_and_goes_away(dtype: torch.dtype) -> None:
    words = torch.randint(-(2**31), 2**31, (5, 7), dtype=dtype)
    hidden = words + mask(b"s" * 16, words)
    assert not torch.equal(hidden, words) and torch.equal(hidden - mask(b"s" * 16, words), words)
    assert mask(b"s" * 16, torch.zeros(0, dtype=dtype)).numel() == 0


def masked(value: float, count: int) -> Masked:
    keys = {name: RunKey() for name in "abc"}
    terms = Terms("run", 1, {name: key.public for name, key in keys.items()}, FixedPoint(3, 1.0))
    return Party("a", keys["a"], terms, Memory()).mask(terms.fixed.encode(torch.full((count,), value)))


def test_masked_uploads_are_uniform() -> None:
    """3.2 MB of one client's masked words, all of which hide the same number: bytes, and neighbours of bytes."""
    hidden = masked(0.25, 400_000).words.numpy().view(np.uint8)
    assert hidden.nbytes == 3_200_000
    for place in range(8):
        counts = np.bincount(hidden[place::8], minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-6, place
    assert stats.chisquare(np.bincount(hidden, minlength=256)).pvalue > 1e-6
    lag = np.corrcoef(hidden[:-1].astype(float), hidden[1:].astype(float))[0, 1]
    assert abs(lag) < 5 / np.sqrt(len(hidden))
    words = hidden.view(np.uint64)
    assert len(np.unique(words)) == len(words)


def test_the_check_of_uniformity_can_fail() -> None:
    bare = FixedPoint(3, 1.0).encode(torch.full((1000,), 0.25)).numpy().view(np.uint8)
    assert stats.chisquare(np.bincount(bare, minlength=256)).pvalue < 1e-12


def test_two_uploads_cannot_be_told_apart() -> None:
    zeros, ones = (masked(x, 20_000).words.numpy().astype(float) for x in (0.0, 1.0))
    assert stats.ks_2samp(zeros, ones).pvalue > 1e-6


def test_a_seed_has_more_than_32_bits() -> None:
    """Two seeds whose 4-byte words have the same exclusive-or, and masks that use every value of a word."""
    a, b = bytes([1, 0, 0, 0, 2, 0, 0, 0] + [0] * 8), bytes([2, 0, 0, 0, 1, 0, 0, 0] + [0] * 8)
    like = torch.zeros(4096, dtype=torch.int32)
    assert not torch.equal(mask(a, like), mask(b, like))
    assert set((mask(a, like) & 3).tolist()) == {0, 1, 2, 3}
