from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features

from fedloom.data import tokenize
from fedloom.data.batches import Encoded, collate, targets
from fedloom.data.tokenize import encode_causal, encode_labelled, labels_of
from fedloom.errors import DataError, ModelError


def rows_of(encoded: Encoded) -> list[list[int]]:
    return [x.tolist() for x in np.split(encoded.tokens, encoded.offsets[1:-1])]


# labels


def test_labels_are_in_sorted_order() -> None:
    assert labels_of(Dataset.from_dict({"y": ["b", "a", "b"]}), "y") == ["a", "b"]


def test_numbers_sort_by_value_and_integral_floats_are_integers() -> None:
    assert labels_of(Dataset.from_dict({"y": ["10", "9", "2"]}), "y") == ["2", "9", "10"]
    assert labels_of(Dataset.from_dict({"y": [10.0, 9.0, 0.5]}), "y") == ["0.5", "9", "10"]


def test_a_class_label_keeps_its_declared_order() -> None:
    features = Features({"y": ClassLabel(names=["unacceptable", "acceptable"])})
    assert labels_of(Dataset.from_dict({"y": [1, 0]}, features=features), "y") == ["unacceptable", "acceptable"]


def test_a_label_that_reads_as_nan_leaves_the_order_alone() -> None:
    assert labels_of(Dataset.from_dict({"y": ["2", "nan", "10", "inf"]}), "y") == ["10", "2", "inf", "nan"]


def test_a_class_number_without_a_name_is_told() -> None:
    ds = Dataset.from_dict({"y": [0, 1, 7]})
    ds.info.features = Features({"y": ClassLabel(names=["a", "b"])})
    with pytest.raises(DataError, match=r"row 3 has no label in column 'y' \(got 7\)"):
        labels_of(ds, "y")


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
    parts = [(picked, np.array([0, 1]))]
    batch = collate(parts)
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    assert targets(parts).labels.tolist() == [2.0, 0.5]


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
    wanted = targets([(encoded, np.array([0]))])
    assert wanted.position.tolist() == [2, 3, 4] and wanted.labels.tolist() == [5, 6, 2]


@pytest.mark.parametrize("template", ["w9 {prompt}", "question", "alpaca"])
def test_templates(llama_tokenizer: Any, template: str) -> None:
    ds = Dataset.from_dict({"p": ["w0 {curly}"], "r": ["w2"]})
    encoded = encode_causal(ds, llama_tokenizer, "p", "r", template, 64)
    assert rows_of(encoded)[0][0] == 1 and rows_of(encoded)[0][-2:] == [5, 2]
    if template == "w9 {prompt}":
        assert rows_of(encoded)[0][:3] == [1, 12, 3]


def test_a_template_names_columns(llama_tokenizer: Any) -> None:
    ds = Dataset.from_dict({"p": ["w0 {q}"], "q": ["w1"], "r": ["w2"]})
    (row,) = rows_of(encode_causal(ds, llama_tokenizer, "p", "r", "w9 {q} w8 {prompt}", 64))
    assert row[:5] == [1, 12, 4, 11, 3] and 4 not in row[5:], "braces within a row are text"


@pytest.mark.parametrize(("behind", "end"), [("", []), ("{end}", [2]), (" w7{end}", [10, 2])])
def test_row_and_answer_are_one_text(llama_tokenizer: Any, behind: str, end: list[int]) -> None:
    ds = Dataset.from_dict({"p": ["w0", "w0 w1 w3"], "r": ["w2 w3", "w4"]})
    encoded = encode_causal(ds, llama_tokenizer, "p", "r", "w9 {prompt} w8 {response}" + behind, 64)
    assert rows_of(encoded) == [[1, 12, 3, 11, 5, 6, *end], [1, 12, 3, 4, 6, 11, 7, *end]]
    assert encoded.starts is not None and encoded.starts.tolist() == [4, 6]
    short = encode_causal(ds, llama_tokenizer, "p", "r", "w9 {prompt} w8 {response}" + behind, 3)
    assert [row[-1] for row in rows_of(short)] == [5, 7]


def test_the_chat_template_writes_its_own_special_tokens(llama_tokenizer: Any) -> None:
    ds = Dataset.from_dict({"p": ["w1"], "r": ["w2"]})
    assert rows_of(encode_causal(ds, llama_tokenizer, "p", "r", "chat", 64)) == [[1, 4, 2, 3, 5, 2]]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no user here') }}",
        "{{ messages[9].content }}",
        "{% if %}",
        "{{ ''.__class__.__mro__ }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    ],
    ids=["raises", "wrong", "no template", "sandbox", "endless"],
)
def test_a_chat_template_that_fails_is_one_error(
    llama_tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "_TEMPLATE_S", 0.5)
    llama_tokenizer.chat_template = template
    with pytest.raises(ModelError, match="chat template fails"):
        tokenize.encode_prompts(["w1"], llama_tokenizer, "chat")


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
