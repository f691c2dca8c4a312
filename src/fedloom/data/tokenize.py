"""Text to token rows: prompt templates and tokenisation, in blocks of rows."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedloom.data import templates
from fedloom.data.batches import Encoded as Encoded
from fedloom.data.batches import Kind
from fedloom.data.labels import classes, values
from fedloom.data.labels import labels_of as labels_of
from fedloom.data.templates import CHAT, TEMPLATES, Template
from fedloom.errors import DataError, ModelError
from fedloom.text import shortened

if TYPE_CHECKING:
    from datasets import Dataset

Tokenizer = Any  # transformers' tokenizer classes share no typed interface: this alias marks where they come in.

_TEMPLATE_S = 30.0  # for one block of prompts in a chat template: a hundred times what it takes
_BLOCK = 1024  # rows tokenised at once: bounds the memory of the Python lists that a tokenizer returns


def encode_labelled(
    ds: Dataset,
    tokenizer: Tokenizer,
    text: Sequence[str],
    label: str,
    labels: Sequence[str] | None,
    max_length: int,
    kind: Kind = "classification",
) -> Encoded:
    """Tokenise one text column, or two as a sentence pair, and number the labels (`labels_of(ds, label)` by default).

    Rows are cut to `max_length` tokens. Raises DataError for a label outside `labels` or, in a regression, a target
    that is no number.
    """
    if not 1 <= len(text) <= 2:
        raise DataError(f"got {len(text)} text columns ({', '.join(text)}), expected one, or two for sentence pairs")
    if kind == "classification":
        targets: NDArray[Any] = classes(ds, label, labels_of(ds, label) if labels is None else labels)
    elif kind == "regression":
        targets = values(ds, label)
    else:
        raise DataError(f"labelled rows are for classification and regression, got kind {kind!r}")
    pad_id = _pad_id(tokenizer)
    tokens: list[NDArray[np.int32]] = []
    types: list[NDArray[np.int8]] = []
    lengths: list[int] = []
    for first in range(0, len(ds), _BLOCK):
        block = ds[first : first + _BLOCK]
        columns = [[str(x) for x in block[name]] for name in text]
        coded = tokenizer(*columns, truncation=True, max_length=max_length, verbose=False)
        # A text of no tokens (an empty one, with a tokenizer that adds none) still needs one position to read from.
        rows = [row or [pad_id] for row in coded["input_ids"]]
        lengths.extend(map(len, rows))
        tokens.append(_flat(rows, np.int32))
        if len(text) == 2 and "token_type_ids" in coded:
            types.append(_flat([row or [0] for row in coded["token_type_ids"]], np.int8))
    return Encoded(
        tokens=_join(tokens, np.int32),
        offsets=_offsets(lengths),
        pad_id=pad_id,
        kind=kind,
        targets=targets,
        token_types=_join(types, np.int8) if types else None,
    )


def encode_causal(
    ds: Dataset,
    tokenizer: Tokenizer,
    prompt: str,
    response: str,
    template: str | None,
    max_length: int,
    end: bool = True,
) -> Encoded:
    """Tokenise instruction data: the loss counts the answer, in column `response`, and its end token if there is one.

    `template` is a name in `TEMPLATES`, `"chat"`, or a string with `{prompt}` or other columns' names in it; None means
    `"plain"`. With `{response}` in it, row and answer are tokenised as one text, and only `{end}` behind it adds the end
    token; without `end` no row has one. A row longer than `max_length` loses the end of its answer; a prompt that leaves no
    room for one is cut from its left, keeping a start token. Raises DataError for a template without a column, `"chat"` where
    the tokenizer has none, or a `max_length` below 2.
    """
    if max_length < 2:
        raise DataError(
            f"got max_length {max_length}, expected at least 2: one token of the prompt and one of the answer"
        )
    form = None if template == CHAT else templates.read(template)
    closing = end and (form is None or form.end) and tokenizer.eos_token_id is not None
    tokens: list[NDArray[np.int32]] = []
    lengths: list[int] = []
    starts: list[int] = []
    for first in range(0, len(ds), _BLOCK):
        block = ds[first : first + _BLOCK]
        rows = []
        for i, (p, a) in enumerate(_halves(block, tokenizer, prompt, response, form)):
            a = [*a, tokenizer.eos_token_id] if closing else a
            if not a:
                raise DataError(
                    f"row {first + i + 1} has an empty answer in column {response!r}: remove the row or fill it"
                )
            p = fit_prompt(p, max_length - 1, tokenizer)
            rows.append((p + a)[:max_length])
            starts.append(len(p))
        lengths.extend(map(len, rows))
        tokens.append(_flat(rows, np.int32))
    return Encoded(
        tokens=_join(tokens, np.int32),
        offsets=_offsets(lengths),
        pad_id=_pad_id(tokenizer),
        kind="causal-lm",
        starts=np.asarray(starts, np.int64),
    )


def _halves(
    block: Mapping[str, Sequence[Any]], tokenizer: Tokenizer, prompt: str, response: str, form: Template | None
) -> Iterator[tuple[list[int], list[int]]]:
    """(tokens of the prompt, tokens of the answer) of every row."""
    answers = [str(x) for x in block[response]]
    if form is None or form.after is None:
        texts = [str(x) for x in block[prompt]] if form is None else form.fill(block, prompt)
        prompts = encode_prompts(texts, tokenizer, CHAT) if form is None else _encode_texts(texts, tokenizer)
        yield from zip(prompts, tokenizer(answers, add_special_tokens=False, verbose=False)["input_ids"], strict=True)
        return
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "a template with {response} needs a fast tokenizer, which tells where a token begins: end it before"
        )
    texts = form.fill(block, prompt)
    whole = [text + answer + form.after for text, answer in zip(texts, answers, strict=True)]
    coded = tokenizer(whole, return_offsets_mapping=True, verbose=False)
    for text, row, spans in zip(texts, coded["input_ids"], coded["offset_mapping"], strict=True):
        # The answer's first token may hold the space before it.
        length = len(text.rstrip())
        ends = [end for _, end in spans]
        row = row[:-1] if len(row) > 1 and row[-1] == tokenizer.eos_token_id and ends[-1] == 0 else row
        start = next((i for i, end in enumerate(ends[: len(row)]) if end > length), len(row))
        yield row[:start] or [first_token(tokenizer)], row[start:]


def encode_prompts(prompts: Sequence[str], tokenizer: Tokenizer, template: str | None) -> list[list[int]]:
    """Token ids of the prompts inside their template, at least one token each: what an answer is generated from."""
    if template == CHAT:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"template 'chat' needs a tokenizer with a chat template, and this one has none: use one of "
                f"{', '.join(TEMPLATES)}, or a string with {{prompt}} in it"
            )
        texts = in_chat_template([([{"role": "user", "content": x}], True) for x in prompts], tokenizer)
        # A chat template writes its special tokens itself.
        rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [row or [first_token(tokenizer)] for row in rows]
    return _encode_texts(templates.read(template).fill({"prompt": prompts}, "prompt"), tokenizer)


def _encode_texts(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    rows: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    # The answer's first token is predicted from the one before it, so a prompt has at least one token, and none that
    # closes the text.
    rows = [row[:-1] if len(row) > 1 and row[-1] == end else row for row in rows]
    return [row or [first_token(tokenizer)] for row in rows]


def first_token(tokenizer: Tokenizer) -> int:
    """What an answer without any prompt is predicted from."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return _pad_id(tokenizer)


def in_chat_template(conversations: Sequence[tuple[list[dict[str, str]], bool]], tokenizer: Tokenizer) -> list[str]:
    """(turns, whether an answer follows) -> text.

    A template is a program of the model's author: it may fail, or never end.
    """
    try:
        with _time_limit(_TEMPLATE_S):
            return [
                tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer)
                for turns, answer in conversations
            ]
    except Exception as error:  # whatever a template raises, or what its sandbox does
        raise ModelError(
            f"the model's chat template fails ({type(error).__name__}: {shortened(str(error), 200)}), expected one that "
            f"renders a user's turn: mend it, or set task.template to one of {', '.join(TEMPLATES)}"
        ) from error


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block once so much time has passed, where signals reach it: in the main thread."""
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fit_prompt(row: list[int], room: int, tokenizer: Tokenizer) -> list[int]:
    """The prompt in at most `room` (>= 1) tokens, cut from its left; a start-of-text token stays."""
    if len(row) <= room:
        return row
    begin = row[:1] if room > 1 and row[0] == tokenizer.bos_token_id else []
    return begin + row[len(row) - room + len(begin) :]


def _pad_id(tokenizer: Tokenizer) -> int:
    """The padding token; where a model family has none (GPT-2, Llama), the end-of-sequence token: padding is masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _flat(rows: Iterable[list[int]], dtype: type[Any]) -> NDArray[Any]:
    return np.fromiter(chain.from_iterable(rows), dtype)


def _join(blocks: list[NDArray[Any]], dtype: type[Any]) -> NDArray[Any]:
    return np.concatenate(blocks) if blocks else np.empty(0, dtype)


def _offsets(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(np.asarray(lengths, np.int64))))
