from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from fedloom.data.batches import targets
from fedloom.data.chat import encode_chats, last_answer, require_chats
from fedloom.errors import DataError

TEMPLATE = (
    "{% for m in messages %}<s> {{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}<s> {% endif %}"
)


def turns(*texts: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_the_loss_counts_what_the_assistant_says(llama_tokenizer: Any) -> None:
    llama_tokenizer.chat_template = TEMPLATE
    chats = [turns("w1", "w2 w3", "w4", "w5"), turns("w6 w7", "w8")]
    encoded = encode_chats(Dataset.from_dict({"chat": chats}), llama_tokenizer, "chat", 50)
    words = llama_tokenizer.convert_ids_to_tokens(encoded.tokens.tolist())
    assert encoded.counted is not None
    assert [w for w, c in zip(words, encoded.counted, strict=True) if c] == [
        "w2",
        "w3",
        "</s>",
        "w5",
        "</s>",
        "w8",
        "</s>",
    ]
    assert " ".join(words[: encoded.lengths[0]]) == "<s> w1 </s> <s> w2 w3 </s> <s> w4 </s> <s> w5 </s>"
    assert encoded.starts is not None  # an answer is generated to all before the last turn
    assert words[encoded.starts[0]] == "w5" and words[encoded.offsets[1] + encoded.starts[1]] == "w8"

    wanted = targets([(encoded, np.array([0])), (encoded.select([1]), np.array([0]))])
    assert llama_tokenizer.convert_ids_to_tokens(wanted.labels.tolist()) == [
        "w2",
        "w3",
        "</s>",
        "w5",
        "</s>",
        "w8",
        "</s>",
    ]
    assert wanted.owner.tolist() == [0] * 5 + [1] * 2 and wanted.row.tolist() == [0] * 5 + [1] * 2
    first = encoded.tokens[wanted.position[:5].numpy() + 1]  # each is predicted from the token before
    assert first.tolist() == wanted.labels[:5].tolist()
    assert last_answer(chats[0]) == "w5"


def test_a_long_row_loses_its_end(llama_tokenizer: Any) -> None:
    llama_tokenizer.chat_template = TEMPLATE
    ds = Dataset.from_dict({"chat": [turns("w1", "w2", "w3", "w4")]})
    encoded = encode_chats(ds, llama_tokenizer, "chat", 8)
    assert encoded.lengths.tolist() == [8] and encoded.counted is not None and encoded.counted.sum() == 2
    with pytest.raises(DataError, match="row 1 has no turn of the assistant in its first 4 tokens"):
        encode_chats(ds, llama_tokenizer, "chat", 4)


def test_templates_that_cannot_be_followed(llama_tokenizer: Any, gpt2_tokenizer: Any) -> None:
    ds = Dataset.from_dict({"chat": [turns("w1", "w2", "w3", "w4")]})
    llama_tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
    with pytest.raises(DataError, match="renders the earlier turns of row 1 otherwise"):
        encode_chats(ds, llama_tokenizer, "chat", 20)
    with pytest.raises(DataError, match="this one has none"):
        encode_chats(ds, gpt2_tokenizer, "chat", 20)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["text"], "row 1 holds 'text' in column 'chat'"),
        ([turns("w1", "w2"), turns("w1")], "row 2 has no turn of an assistant"),
        ([[{"role": "user", "content": None}]], "row 1 has the turn"),
    ],
)
def test_rows_that_are_no_conversations(rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        require_chats(Dataset.from_dict({"chat": rows}), "chat")


def test_a_missing_column_is_told() -> None:
    with pytest.raises(DataError, match="no column 'chats', the data has: chat"):
        require_chats(Dataset.from_dict({"chat": [turns("w1", "w2")]}), "chats")
