"""Conversations of several turns: a model's chat template around them, and which of their tokens the loss counts.

A row is a list of {"role": ..., "content": ...}, as TRL and the hub's instruction sets have it. The loss counts what the
template puts into an assistant's turn, its end included: what the model is to write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedloom.data.batches import Encoded
from fedloom.errors import DataError
from fedloom.text import shown

if TYPE_CHECKING:
    from datasets import Dataset

Turn = dict[str, str]


def require_chats(ds: Dataset, column: str) -> None:
    """Raise DataError unless every row of the column is a conversation with an assistant's turn (rows count from 1)."""
    if column not in ds.column_names:
        raise DataError(f"there is no column {column!r}, the data has: {', '.join(ds.column_names)}")
    for number, turns in enumerate(ds[column][:], 1):
        expected = 'a list of {"role": ..., "content": ...} with an assistant\'s turn'
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise DataError(f"row {number} holds {shown(turns)} in column {column!r}, expected {expected}")
        for turn in turns:
            if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
                raise DataError(f"row {number} has the turn {shown(turn)} in column {column!r}, expected {expected}")
        if not any(turn["role"] == "assistant" for turn in turns):
            raise DataError(f"row {number} has no turn of an assistant in column {column!r}, expected {expected}")


def last_answer(turns: Sequence[Turn]) -> str:
    """What the assistant says last."""
    return next(turn["content"] for turn in reversed(turns) if turn["role"] == "assistant")


def encode_chats(ds: Dataset, tokenizer: Any, column: str, max_length: int) -> Encoded:
    """Tokenise conversations: a row longer than `max_length` loses its end.

    An answer is generated to what comes before the last of the assistant's turns that are left. Raises DataError where the
    tokenizer has no chat template, the template renders a turn otherwise when more follow, or no turn of the assistant is
    left of a row.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"column {column!r} holds conversations, which need a tokenizer with a chat template; this one has none: choose "
            "an instruction-tuned model, or set tokenizer.chat_template"
        )
    tokens: list[int] = []
    counted: list[bool] = []
    lengths, starts = [0], []
    for number, turns in enumerate(ds[column][:], 1):
        row: list[int] = []
        mask: list[bool] = []
        start = 0
        for answer, text in _pieces(turns, tokenizer, number):
            piece = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if answer and len(row) < max_length:
                start = len(row)
            row += piece
            mask += [answer] * len(piece)
        row, mask = row[:max_length], mask[:max_length]
        if not any(mask[1:]):
            raise DataError(
                f"row {number} has no turn of the assistant in its first {max_length} tokens: raise task.max_length"
            )
        tokens += row
        counted += mask
        lengths.append(len(row))
        starts.append(max(1, start))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Encoded(
        tokens=np.asarray(tokens, np.int32),
        offsets=np.cumsum(np.asarray(lengths, np.int64)),
        pad_id=int(pad or 0),
        kind="causal-lm",
        starts=np.asarray(starts, np.int64),
        counted=np.asarray(counted, np.bool_),
    )


def _pieces(turns: Sequence[Turn], tokenizer: Any, number: int) -> list[tuple[bool, str]]:
    """(whether an assistant says it, text) of a conversation, in order."""
    from fedloom.data.tokenize import in_chat_template

    ends = [i + 1 for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    wanted = [(list(turns[: end - 1]), True) for end in ends] + [(list(turns[:end]), False) for end in ends]
    texts = in_chat_template(wanted, tokenizer)
    pieces: list[tuple[bool, str]] = []
    done = ""
    for before, after in zip(texts[: len(ends)], texts[len(ends) :], strict=True):
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(
                f"the model's chat template renders the earlier turns of row {number} otherwise when more follow, so that what "
                "the assistant said cannot be found: keep one turn of the assistant a row, or change the template"
            )
        pieces += [(False, before[len(done) :]), (True, after[len(before) :])]
        done = after
    return [piece for piece in pieces if piece[1]]
