from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features

from fedloom.data.text import IGNORE, Encoded, collate, encode_causal, encode_labelled, labels_of, schedule
from fedloom.errors import DataError


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


# labels


def test_labels_are_in_sorted_order() -> None:
    assert labels_of(Dataset.from_dict({"y": ["b", "a", "b"]}), "y") == ["a", "b"]


def test_numbers_sort_by_value_and_integral_floats_are_integers() -> None:
    assert labels_of(Dataset.from_dict({"y": ["10", "9", "2"]}), "y") == ["2", "9", "10"]
    assert labels_of(Dataset.from_dict({"y": [10.0, 9.0, 0.5]}), "y") == ["0.5", "9", "10"]


def test_a_class_label_keeps_its_declared_order() -> None:
    features = Features({"y": ClassLabel(names=["unacceptable", "acceptable"])})
    assert labels_of(Dataset.from_dict({"y": [1, 0]}, features=features), "y") == ["unacceptable", "acceptable"]


def test_one_class_is_no_task() -> None:
    with pytest.raises(DataError, match="one class only"):
        labels_of(Dataset.from_dict({"y": ["a", "a"]}), "y")


@pytest.mark.parametrize("bad", [None, float("nan")])
def test_a_missing_label_is_told_with_its_row(bad: Any) -> None:
    with pytest.raises(DataError, match="row 3 has no label"):
        labels_of(Dataset.from_dict({"y": [1.0, 2.0, bad]}), "y")


def test_a_label_unseen_in_training_is_named(bert_tokenizer: Any) -> None:
    ds = Dataset.from_dict({"t": ["w1", "w2", "w3"], "y": ["a", "bb", "c"]})
    with pytest.raises(DataError, match=r"label 'bb' \(row 2, column 'y'\).*a, b; did you mean 'b'\?"):
        encode_labelled(ds, bert_tokenizer, ["t"], "y", ["a", "b"], 8)


# labelled rows


def test_labelled_rows(bert_tokenizer: Any) -> None:
    ds = Dataset.from_dict({"t": ["w0 w1", "", "w2 w3 w4 w5 w6"], "y": ["b", "a", "b"]})
    encoded = encode_labelled(ds, bert_tokenizer, ["t"], "y", None, 6)
    assert rows_of(encoded) == [[2, 4, 5, 3], [2, 3], [2, 6, 7, 8, 9, 3]]
    assert encoded.targets is not None and encoded.targets.tolist() == [1, 0, 1]
    assert encoded.token_types is None and encoded.pad_id == 1 and len(encoded) == 3
    assert encoded.lengths.tolist() == [4, 2, 6]


def test_sentence_pairs_have_token_types(bert_tokenizer: Any) -> None:
    ds = Dataset.from_dict({"p": ["w0 w1", "w2"], "q": ["w3", "w4 w5"], "y": [0.5, 2.0]})
    encoded = encode_labelled(ds, bert_tokenizer, ["p", "q"], "y", None, 16, "regression")
    assert rows_of(encoded)[0] == [2, 4, 5, 3, 7, 3]
    assert encoded.token_types is not None and encoded.token_types[:6].tolist() == [0, 0, 0, 0, 1, 1]
    assert encoded.targets is not None and encoded.targets.dtype == np.float32
    picked = encoded.select([1, 0])
    batch = collate([(picked, np.array([0, 1]))])
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    assert batch.labels.tolist() == [2.0, 0.5]


def test_regression_wants_numbers(bert_tokenizer: Any) -> None:
    ds = Dataset.from_dict({"t": ["w1", "w2"], "y": ["1.5", "high"]})
    with pytest.raises(DataError, match="row 2 has 'high'"):
        encode_labelled(ds, bert_tokenizer, ["t"], "y", None, 8, "regression")


def test_an_empty_text_keeps_one_position(gpt2_tokenizer: Any) -> None:
    ds = Dataset.from_dict({"t": ["", "w0"], "y": ["a", "b"]})
    assert rows_of(encode_labelled(ds, gpt2_tokenizer, ["t"], "y", None, 8)) == [[1], [2]]


def test_blocks_of_rows_join(bert_tokenizer: Any) -> None:
    n = 2500  # more than are tokenised at once
    ds = Dataset.from_dict({"t": [f"w{i % 50}" for i in range(n)], "y": [str(i % 2) for i in range(n)]})
    encoded = encode_labelled(ds, bert_tokenizer, ["t"], "y", None, 8)
    assert len(encoded) == n and rows_of(encoded)[2049] == [2, 4 + 2049 % 50, 3]


# instruction data


def test_the_loss_counts_answer_and_end(llama_tokenizer: Any) -> None:
    ds = Dataset.from_dict({"p": ["w0 w1"], "r": ["w2 w3"]})
    encoded = encode_causal(ds, llama_tokenizer, "p", "r", None, 16)
    assert rows_of(encoded) == [[1, 3, 4, 5, 6, 2]]
    batch = collate([(encoded, np.array([0]))])
    assert batch.labels.tolist() == [[IGNORE, IGNORE, IGNORE, 5, 6, 2]]


@pytest.mark.parametrize("template", ["w9 {prompt}", "question", "alpaca"])
def test_templates(llama_tokenizer: Any, template: str) -> None:
    ds = Dataset.from_dict({"p": ["w0 {curly}"], "r": ["w2"]})
    encoded = encode_causal(ds, llama_tokenizer, "p", "r", template, 64)
    assert rows_of(encoded)[0][0] == 1 and rows_of(encoded)[0][-2:] == [5, 2]
    if template == "w9 {prompt}":
        assert rows_of(encoded)[0][:3] == [1, 12, 3]


def test_the_chat_template_writes_its_own_special_tokens(llama_tokenizer: Any) -> None:
    ds = Dataset.from_dict({"p": ["w1"], "r": ["w2"]})
    assert rows_of(encode_causal(ds, llama_tokenizer, "p", "r", "chat", 64)) == [[1, 4, 2, 3, 5, 2]]


def test_wrong_templates(llama_tokenizer: Any, gpt2_tokenizer: Any) -> None:
    ds = Dataset.from_dict({"p": ["w1"], "r": ["w2"]})
    with pytest.raises(DataError, match="did you mean 'alpaca'"):
        encode_causal(ds, llama_tokenizer, "p", "r", "alpacca", 64)
    with pytest.raises(DataError, match="chat template"):
        encode_causal(ds, gpt2_tokenizer, "p", "r", "chat", 64)


@pytest.mark.parametrize("length", range(2, 12))
def test_a_long_row_keeps_an_answer_token(llama_tokenizer: Any, length: int) -> None:
    ds = Dataset.from_dict({"p": ["w0 w1 w2 w3 w4 w5"], "r": ["w6 w7"]})
    encoded = encode_causal(ds, llama_tokenizer, "p", "r", None, length)
    (row,) = rows_of(encoded)
    assert encoded.starts is not None
    start = int(encoded.starts[0])
    assert len(row) <= length and 1 <= start < len(row) and row[start] == 9
    assert length == 2 or row[0] == 1  # the start token outlives the cut
    assert row[start - 1] == 8 if start > 1 or length == 2 else True


def test_no_room_for_an_answer(llama_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="at least 2"):
        encode_causal(Dataset.from_dict({"p": ["w1"], "r": ["w2"]}), llama_tokenizer, "p", "r", None, 1)


def test_an_empty_prompt_has_a_token_to_predict_from(gpt2_tokenizer: Any) -> None:
    ds = Dataset.from_dict({"p": [""], "r": ["w2"]})
    encoded = encode_causal(ds, gpt2_tokenizer, "p", "r", None, 8)
    assert rows_of(encoded) == [[1, 4, 1]] and encoded.starts is not None and encoded.starts.tolist() == [1]


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


# collate


def test_collate_equals_a_plain_loop() -> None:
    one, two = random_rows(9, "causal-lm", 1), random_rows(9, "causal-lm", 2)
    rows = [np.array([4, 0, 8]), np.array([2])]
    batch = collate([(one, rows[0]), (two, rows[1])], multiple=8)
    assert (batch.K, batch.b) == (2, 3) and batch.input_ids.shape[1] % 8 == 0
    assert batch.weight.tolist() == [1, 1, 1, 1, 0, 0]
    for k, (data, mine) in enumerate(zip((one, two), rows, strict=True)):
        for i, row in enumerate(mine):
            tokens, at = rows_of(data)[row], 3 * k + i
            n = len(tokens)
            assert batch.input_ids[at, :n].tolist() == tokens and set(batch.input_ids[at, n:].tolist()) <= {1}
            assert batch.attention_mask[at].tolist() == [1] * n + [0] * (batch.input_ids.shape[1] - n)
            assert data.starts is not None
            start = int(data.starts[row])
            assert batch.labels[at].tolist() == [IGNORE] * start + tokens[start:] + [IGNORE] * (
                batch.input_ids.shape[1] - n
            )
    assert (batch.labels[4:] == IGNORE).all() and batch.attention_mask[4:].sum(1).tolist() == [1, 1]
    assert batch.to("cpu").K == 2


def test_collate_of_unequal_clients_without_padding_rows() -> None:
    data = random_rows(4)
    with pytest.raises(ValueError, match=r"\[2, 1\]"):
        collate([(data, np.array([0, 1])), (data, np.array([2]))], pad_rows=False)
    with pytest.raises(ValueError, match="at least one client"):
        collate([])


def test_a_client_that_has_finished_adds_rows_of_no_weight() -> None:
    data = random_rows(4)
    batch = collate([(data, np.array([0, 1])), (data, np.array([], np.int64))])
    assert batch.weight.tolist() == [1, 1, 0, 0] and (batch.attention_mask.sum(1) > 0).all()
