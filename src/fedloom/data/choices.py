"""Multiple choice: which answer of a row is right, and which one a causal LM finds likeliest.

Each answer is scored by its log-likelihood behind the prompt. How answers of unequal length are put on one scale is a choice:
see `choice`, `choice_per_char`, `choice_per_token` and `choice_mutual` in `METRICS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedloom.data.batches import Encoded
from fedloom.errors import DataError
from fedloom.text import shown

if TYPE_CHECKING:
    from datasets import Dataset

Scores = NDArray[np.float64]
METRICS = {
    "choice": "the likeliest answer as it stands",
    "choice_per_char": "log-likelihood by its length in characters (acc_norm of lm-evaluation-harness)",
    "choice_per_token": "log-likelihood by its number of tokens",
    "choice_mutual": "log-likelihood behind the prompt less that behind nothing (pointwise mutual information)",
}
"""Shares of rows whose right answer has the highest score."""


@dataclass(frozen=True)
class Choices:
    """The answers of rows, end to end: n rows with m answers altogether."""

    answers: list[str]
    """(m,)"""
    row: NDArray[np.int64]
    """(m,): which row an answer is of, sorted."""
    right: NDArray[np.int64]
    """(n,): index of the right answer within its row's."""


def answers_of(rows: Dataset, choices: str | Sequence[str]) -> list[list[str]]:
    """The answers of every row: of a column of lists, or the same for all. Raises DataError for a row without two of them."""
    if not isinstance(choices, str):
        return [list(choices)] * len(rows)
    if choices not in rows.column_names:
        raise DataError(
            f"there is no column {choices!r} of choices, the data has: {', '.join(rows.column_names)}; for the same choices in "
            "every row write a list, task.choices = ['yes', 'no']"
        )
    found = []
    for i, value in enumerate(rows[choices][:]):
        # ARC and others keep them as {"text": [...], "label": [...]}.
        each = value.get("text", value) if isinstance(value, dict) else value
        if not isinstance(each, list) or len(each) < 2:
            raise DataError(
                f"row {i + 1} has {shown(each)} in column {choices!r}, expected a list of two choices or more"
            )
        found.append([str(x) for x in each])
    return found


def resolve(rows: Dataset, response: str, choices: str | Sequence[str]) -> tuple[list[list[str]], list[int]]:
    """(answers, index of the right one) of every row.

    The response column has the right answer's index from 0, its text, or its letter. Raises DataError for anything else.
    """
    answers = answers_of(rows, choices)
    return answers, [
        _index(value, each, i) for i, (value, each) in enumerate(zip(rows[response][:], answers, strict=True))
    ]


def with_answers(rows: Dataset, response: str, choices: str | Sequence[str]) -> Dataset:
    """The rows with the right answer's text as their response."""
    answers, right = resolve(rows, response, choices)
    texts = [each[i] for each, i in zip(answers, right, strict=True)]
    return _replaced(rows, range(len(rows)), response, texts)


def _replaced(rows: Dataset, chosen: Sequence[int], column: str, values: list[str]) -> Dataset:
    """The rows chosen, with other values in a column."""
    import pyarrow as pa  # type: ignore[import-untyped]  # ships no types
    from datasets import Dataset

    table = rows.with_format("arrow")[:].take(pa.array(chosen, pa.int64()))
    return Dataset(table.set_column(table.column_names.index(column), column, pa.array(values, pa.string())))


def _index(value: Any, answers: list[str], row: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(answers):
        return value
    if isinstance(value, str):
        if value in answers:
            return answers.index(value)
        letter = value.strip().upper()
        if len(letter) == 1 and 0 <= (i := ord(letter) - ord("A")) < len(answers):
            return i
    raise DataError(
        f"row {row + 1}: the right answer is {shown(value)}, expected one of its choices ({shown(answers)}), a "
        "letter from A on, or an index from 0"
    )


def flat(rows: Dataset, response: str, choices: str | Sequence[str]) -> Choices:
    """All answers of all rows."""
    answers, right = resolve(rows, response, choices)
    counts = [len(each) for each in answers]
    return Choices(
        [x for each in answers for x in each], np.repeat(np.arange(len(rows)), counts), np.asarray(right, np.int64)
    )


def expanded(rows: Dataset, response: str, found: Choices) -> Dataset:
    """A row for every answer, with it as the response."""
    return _replaced(rows, found.row.tolist(), response, found.answers)


def alone(encoded: Encoded, first: int) -> Encoded:
    """The answers' tokens behind the token `first` alone, without their prompts."""
    assert encoded.starts is not None, "answers of a causal LM have a start"
    kept = [
        np.concatenate(([first], encoded.tokens[a + s : b]))
        for a, b, s in zip(encoded.offsets[:-1], encoded.offsets[1:], encoded.starts, strict=True)
    ]
    return replace(
        encoded,
        tokens=np.concatenate(kept).astype(np.int32),
        offsets=np.concatenate(([0], np.cumsum([len(x) for x in kept]))),
        starts=np.ones(len(kept), np.int64),
    )


def share(found: Choices, scores: Scores) -> float:
    """Share of rows whose right answer scores highest, the first of equals.

    >>> found = Choices(["a", "b", "c", "d"], np.array([0, 0, 1, 1]), np.array([1, 1]))
    >>> share(found, np.array([0.0, 1.0, 3.0, 2.0]))
    0.5
    """
    edges = np.searchsorted(found.row, np.arange(len(found.right) + 1))
    best = [int(np.argmax(scores[a:b])) for a, b in pairwise(edges)]
    return float(np.mean(np.asarray(best) == found.right))


def score(name: str, found: Choices, likelihoods: Scores, tokens: Scores, unprompted: Scores | None) -> float:
    """A metric of `METRICS`, from the answers' log-likelihoods with and without their prompts, and numbers of tokens."""
    if name == "choice_per_char":
        return share(found, likelihoods / np.maximum(1, [len(x) for x in found.answers]))
    if name == "choice_per_token":
        return share(found, likelihoods / np.maximum(1, tokens))
    if name == "choice_mutual":
        assert unprompted is not None, "mutual information needs both likelihoods"
        return share(found, likelihoods - unprompted)
    return share(found, likelihoods)
