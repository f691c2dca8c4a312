"""Where a packing puts the tokens of many clients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedloom.data.batches import Encoded, collate
from fedloom.train.kernels.packing import pack_rows


def of_lengths(lengths: list[int], kind: Any, seed: int = 0) -> Encoded:
    """Token rows of given lengths."""
    rng = np.random.default_rng(seed)
    n = len(lengths)
    return Encoded(
        tokens=rng.integers(3, 40, sum(lengths)).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        pad_id=0,
        kind=kind,
        targets=None
        if kind == "causal-lm"
        else rng.integers(0, 2, n).astype(np.float32 if kind == "regression" else np.int64),
        starts=np.asarray([max(1, x // 2) for x in lengths]) if kind == "causal-lm" else None,
    )


def test_every_token_has_one_slot() -> None:
    data = [of_lengths(lengths, "classification", k) for k, lengths in enumerate([[3, 9, 16, 2], [16], [16, 16, 1]])]
    parts = [(d, np.arange(len(d))) for d in data]
    packing = pack_rows(parts, causal=False)
    assert packing.input_ids[0].tolist() == [int(x) for d in data for x in d.tokens]
    assert packing.position_ids[0].tolist() == [i for d in data for x in d.lengths for i in range(x)]
    (bucket,) = packing.buckets
    assert bucket.spread.shape == (8, 16)  # rows of data alone: fillers have no attention
    there = packing.input_ids.flatten()[bucket.spread]
    rows = collate([(d, np.arange(len(d))) for d in data]).input_ids
    rows = torch.cat([rows[4 * k : 4 * k + len(d)] for k, d in enumerate(data)])
    assert torch.equal(there[bucket.valid], rows[bucket.valid])
    for heads in (1, 3):
        spread, collect = packing.row_index(heads, 1), packing.collect_index(heads)
        assert torch.equal(spread[collect], torch.arange(79 * heads))
        assert sorted([*collect.tolist(), *packing.padding_index(heads).tolist()]) == list(range(8 * 16 * heads))
    assert packing.segments is not None
    tokens = torch.arange(1.0, 80.0).view(1, 79, 1)
    by_client = packing.segments.rows(tokens, 3)[..., 0]
    assert by_client.shape == (3, 33)
    assert [int((x != 0).sum()) for x in by_client] == [30, 16, 33]
    assert by_client[1, :16].tolist() == list(range(31, 47))
    assert torch.equal(packing.segments.tokens(by_client.reshape(1, -1, 1)), tokens)


def test_sizes_are_few_where_every_one_is_compiled() -> None:
    rng = np.random.default_rng(0)
    sizes, rounded = set(), set()
    for _ in range(60):
        data = [of_lengths(rng.integers(5, 20, 8).tolist(), "classification") for _ in range(8)]
        parts = [(d, np.arange(len(d))) for d in data]
        exact, few = pack_rows(parts, causal=False), pack_rows(parts, causal=False, few_shapes=True)
        assert exact.segments is not None and few.segments is not None
        N = exact.input_ids.shape[1]
        assert few.input_ids.shape[1] == N + few.idle <= 1.07 * N
        assert torch.equal(few.input_ids[:, :N], exact.input_ids)
        assert few.segments.collect.shape == (N + few.idle,)
        for heads in (1, 3):
            spread, collect = few.row_index(heads, 1), few.collect_index(heads)
            assert torch.equal(spread[collect][: N * heads], torch.arange(N * heads))
            padding = len(spread) - N * heads  # every place but those of the tokens
            assert len(few.padding_index(heads)) == padding
        sizes.add((N, len(exact.segments.spread)))
        rounded.add((N + few.idle, len(few.segments.spread)))
    assert len(sizes) > 50 and len(rounded) < 20


def test_rows_of_unlike_length_get_buckets_of_their_own() -> None:
    data = [of_lengths([5, 120, 9, 40, 3, 30], "causal-lm"), of_lengths([14], "causal-lm")]
    packing = pack_rows([(d, np.arange(len(d))) for d in data], causal=True)
    assert [tuple(x.spread.shape) for x in packing.buckets] == [(5, 32), (1, 48), (1, 128)]
    assert [x.valid.sum(1).tolist() for x in packing.buckets] == [[5, 9, 3, 30, 14], [40], [120]]


def test_padding_reads_from_its_own_client() -> None:
    data = [of_lengths(lengths, "causal-lm", k) for k, lengths in enumerate([[3, 5], [2], [9, 1]])]
    packing = pack_rows([(d, np.arange(len(d))) for d in data], causal=True)
    owner = torch.tensor([0] * 8 + [1] * 2 + [2] * 10)
    assert packing.segments is not None
    assert torch.equal(owner[packing.first], torch.tensor([0, 0, 1, 1, 2, 2]))
    (bucket,) = packing.buckets
    assert torch.equal(owner[bucket.spread].unique(dim=1).flatten(), torch.tensor([0, 0, 1, 2, 2]))
    assert torch.equal(owner[packing.segments.spread].view(3, -1).unique(dim=1).flatten(), torch.tensor([0, 1, 2]))
    even = pack_rows([(d, np.arange(1)) for d in (data[1], data[1])], causal=True)
    assert even.segments is None


def test_rows_are_packed_in_the_order_asked_for() -> None:
    one, two = of_lengths([3, 9, 17, 2], "classification"), of_lengths([5, 4], "classification", 1)
    pairs = replace(two, token_types=np.array([0, 0, 1, 1, 1, 0, 1, 1, 0], np.int8))
    packing = pack_rows([(one, np.array([3, 1])), (pairs, np.array([1]))], causal=False)
    assert packing.token_type_ids is not None
    assert packing.input_ids[0].tolist() == [*one.tokens[29:31], *one.tokens[3:12], *two.tokens[5:]]
    assert packing.token_type_ids[0].tolist() == [0] * 11 + [0, 1, 1, 0]
    assert packing.first.tolist() == [0, 2, 11, 11]
