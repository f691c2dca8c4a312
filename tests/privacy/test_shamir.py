"""Shamir's scheme: every set of `threshold` shares gives the secret, and fewer are as random as none."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.privacy.shamir import combine, split


@settings(max_examples=20)
@given(secret=st.binary(min_size=1, max_size=40), count=st.integers(1, 7), data=st.data())
def test_every_set_of_threshold_shares_opens(secret: bytes, count: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, count))
    shares = dict(enumerate(split(secret, threshold, count), 1))
    for some in combinations(shares, threshold):
        assert combine({i: shares[i] for i in some}) == secret


def test_large_groups_and_a_share_too_few() -> None:
    secret = bytes(range(256))
    shares = dict(enumerate(split(secret, 67, 100), 1))
    chosen = random.Random(0).sample(sorted(shares), 67)
    assert combine({i: shares[i] for i in chosen}) == secret
    assert combine({i: shares[i] for i in chosen[1:]}) != secret
    assert combine(dict(list(enumerate(split(secret, 200, 255), 1))[-200:])) == secret


def test_fewer_shares_than_the_threshold_are_uniform() -> None:
    """Over all 256 polynomials of degree 1, a share of one secret byte takes every value once."""
    for secret in (0, 1, 200):
        for place in range(5):
            seen = {split(bytes([secret]), 2, 5, lambda n, c=c: bytes([c] * n))[place] for c in range(256)}
            assert len(seen) == 256


@pytest.mark.parametrize("threshold, count", [(0, 3), (4, 3), (2, 256)])
def test_impossible_splits_are_refused(threshold: int, count: int) -> None:
    with pytest.raises(ValueError, match="expected 1 <= threshold <= count <= 255"):
        split(b"x", threshold, count)


def test_another_implementation_opens_ours_and_ours_opens_its() -> None:
    pyshamir = pytest.importorskip("pyshamir")
    secret = bytes(range(48))
    ours = split(secret, 3, 5)
    theirs = pyshamir.split(secret, 5, 3)  # the last byte of each part is its place
    assert combine({part[-1]: bytes(part[:-1]) for part in theirs[1:4]}) == secret
    parts = [bytearray(share + bytes([i])) for i, share in enumerate(ours, 1)]
    assert bytes(pyshamir.combine(parts[2:])) == secret
