"""Token rows, schedules of batches, and batches of many clients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.data.batches import Encoded, collate, schedule, spans, targets


def rows_of(encoded: Encoded) -> list[list[int]]:
    return [x.tolist() for x in np.split(encoded.tokens, encoded.offsets[1:-1])]


def random_rows(n: int, kind: Any = "classification", seed: int = 0) -> Encoded:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 30, n)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    causal = kind == "causal-lm"
    return Encoded(
        tokens=rng.integers(2, 50, offsets[-1]).astype(np.int32),
        offsets=offsets,
        pad_id=1,
        kind=kind,
        targets=None if causal else rng.integers(0, 3, n),
        starts=rng.integers(1, lengths) if causal else None,
    )


def test_select_takes_rows_in_the_order_given() -> None:
    encoded = random_rows(20, "causal-lm")
    rows = [7, 3, 3, 19]
    picked = encoded.select(rows)
    assert rows_of(picked) == [rows_of(encoded)[i] for i in rows]
    assert picked.starts is not None and encoded.starts is not None
    assert picked.starts.tolist() == encoded.starts[rows].tolist()
    assert len(encoded.select([])) == 0


# schedule


@pytest.mark.parametrize("n", [1, 5, 16, 37])
def test_an_epoch_visits_every_row_once(n: int) -> None:
    lengths = random_rows(n).lengths
    batches = schedule(lengths, 8, (0, 1, "client-0"), epochs=3)
    per_epoch = -(-n // 8)
    assert len(batches) == 3 * per_epoch
    for epoch in range(3):
        seen = np.concatenate(batches[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert sorted(seen.tolist()) == list(range(n))


def test_steps_run_over_as_many_epochs_as_they_need() -> None:
    lengths = random_rows(10).lengths
    batches = schedule(lengths, 4, (0, 1, "c"), steps=7)
    assert [len(x) for x in batches].count(2) in (2, 3) and len(batches) == 7
    whole = schedule(lengths, 4, (0, 1, "c"), epochs=3)
    assert all(np.array_equal(a, b) for a, b in zip(batches, whole, strict=False))
    assert schedule(lengths, 4, (0, 1, "c"), steps=0) == []


def test_batches_follow_the_key_alone() -> None:
    lengths = random_rows(64).lengths

    def flat(key: tuple[int, int, str]) -> list[int]:
        rows: list[int] = np.concatenate(schedule(lengths, 8, key, epochs=1)).tolist()
        return rows

    assert flat((0, 1, "a")) == flat((0, 1, "a"))
    assert len({tuple(flat(key)) for key in [(0, 1, "a"), (1, 1, "a"), (0, 2, "a"), (0, 1, "b")]}) == 4


def test_a_second_work_takes_batches_in_another_order() -> None:
    lengths = np.arange(1, 65)  # no two rows of one length: the batches themselves are the same
    first, second = (schedule(lengths, 8, (0, 1, "a", *part), epochs=1) for part in ((), (1,)))
    assert [x.tolist() for x in first] != [x.tolist() for x in second]
    assert sorted(x.tolist() for x in first) == sorted(x.tolist() for x in second)
    other = schedule(lengths, 8, (0, 1, "b", 1), epochs=1)
    assert [x.tolist() for x in second] == [x.tolist() for x in other], "clients keep in step in every work"


def test_sorting_saves_padding_and_clients_keep_in_step() -> None:
    one, two = random_rows(128, seed=1).lengths, random_rows(128, seed=2).lengths
    a, b = schedule(one, 16, (0, 1, "a"), epochs=1), schedule(two, 16, (0, 1, "b"), epochs=1)
    together = sum(max(one[i].max(), two[j].max()) for i, j in zip(a, b, strict=True)) * 32
    assert together < 1.15 * (one.sum() + two.sum())  # in random order it is about 1.9 times


def test_schedule_refuses_what_it_cannot_do() -> None:
    lengths = np.array([3, 4])
    for arguments in ({}, {"steps": 1, "epochs": 1}, {"steps": -1}):
        with pytest.raises(ValueError):
            schedule(lengths, 2, (0, 1, "a"), **arguments)
    with pytest.raises(ValueError):
        schedule(np.array([], np.int64), 2, (0, 1, "a"), steps=1)


# batches


def test_a_batch_and_its_targets_equal_a_plain_loop() -> None:
    one, two = random_rows(9, "causal-lm", 1), random_rows(9, "causal-lm", 2)
    rows = [np.array([4, 0, 8]), np.array([2])]
    parts = [(one, rows[0]), (two, rows[1])]
    batch, wanted = collate(parts), targets(parts)
    L = max(len(rows_of(data)[i]) for data, mine in parts for i in mine)
    assert batch.input_ids.shape == batch.attention_mask.shape == (6, L)
    answers = []
    for k, (data, mine) in enumerate(parts):
        for i, row in enumerate(mine):
            tokens, at = rows_of(data)[row], 3 * k + i
            n = len(tokens)
            assert batch.input_ids[at, :n].tolist() == tokens and set(batch.input_ids[at, n:].tolist()) <= {1}
            assert batch.attention_mask[at].tolist() == [1] * n + [0] * (L - n)
            assert data.starts is not None
            answers += [(k, at, p - 1, tokens[p]) for p in range(int(data.starts[row]), n)]
    assert batch.attention_mask[4:].sum(1).tolist() == [1, 1]
    found = zip(*(x.tolist() for x in (wanted.owner, wanted.row, wanted.position, wanted.labels)), strict=True)
    assert list(found) == answers and wanted.K == 2
    assert wanted.labels.dtype == wanted.to("cpu").row.dtype == torch.int64


def test_the_first_token_of_a_row_is_never_predicted() -> None:
    data = replace(random_rows(3, "causal-lm"), starts=np.array([0, 1, 0]))
    wanted = targets([(data, np.arange(3))])
    assert wanted.labels.tolist() == [x for row in rows_of(data) for x in row[1:]]
    assert wanted.position.tolist() == [i for n in data.lengths for i in range(n - 1)]


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_the_label_of_a_row_is_read_from_its_first_token(kind: Any) -> None:
    data = random_rows(5, kind)
    assert data.targets is not None
    wanted = targets([(data, np.array([3, 1])), (data, np.array([4])), (data, np.array([], np.int64))])
    assert wanted.labels.tolist() == data.targets[[3, 1, 4]].tolist()
    assert (wanted.row.tolist(), wanted.owner.tolist(), wanted.position.tolist()) == ([0, 1, 2], [0, 0, 1], [0, 0, 0])


def test_a_client_without_rows_still_attends_to_a_token() -> None:
    data = random_rows(4)
    batch = collate([(data, np.array([0, 1])), (data, np.array([], np.int64))])
    assert len(batch.attention_mask) == 4 and (batch.attention_mask.sum(1) > 0).all()
    with pytest.raises(ValueError, match="at least one client"):
        collate([])


def test_spans_lie_end_to_end() -> None:
    assert spans(np.array([5, 0, 7]), np.array([2, 0, 3])).tolist() == [5, 6, 7, 8, 9]
    assert spans(np.array([], np.int64), np.array([], np.int64)).tolist() == []
