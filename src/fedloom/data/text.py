"""Text to token rows, token rows to batches: templates, tokenisation, length-sorted schedules, many clients in a batch.

Token rows are kept end to end in flat arrays, so that a data set costs the memory of its tokens and not of Python
lists, and batches are put together without a loop over tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedloom.data.labels import classes, values
from fedloom.data.labels import labels_of as labels_of
from fedloom.errors import DataError, nearest
from fedloom.rng import generator

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["classification", "regression", "causal-lm"]
Tokenizer = Any  # transformers' tokenizer classes share no typed interface: this alias marks where they come in.

IGNORE = -100
"""A label that no loss counts."""

TEMPLATES = {
    "plain": "{prompt}\n",
    "question": "Question: {prompt}\nAnswer: ",
    "alpaca": "### Instruction:\n{prompt}\n\n### Response:\n",
}
"""What is put around a prompt; the answer follows. `chat` stands for the tokenizer's own chat template."""

_BLOCK = 1024  # rows tokenised at once: bounds the memory of the Python lists that a tokenizer returns


@dataclass(frozen=True)
class Encoded:
    """Token rows of one data set, kept flat."""

    tokens: NDArray[np.int32]
    """All rows end to end."""
    offsets: NDArray[np.int64]
    """(n + 1,): row i is tokens[offsets[i] : offsets[i + 1]]."""
    pad_id: int
    kind: Kind
    targets: NDArray[Any] | None = None
    """(n,) class index int64, or value float32; None for a causal LM."""
    starts: NDArray[np.int64] | None = None
    """(n,) for a causal LM: index within the row of the first answer token. The loss counts from there on."""
    token_types: NDArray[np.int8] | None = None
    """As `tokens`: 1 on the second text of a BERT sentence pair."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(n,) tokens in each row."""
        return np.diff(self.offsets)

    def lengths_of(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Tokens in the rows named, without a pass over the others."""
        lengths: NDArray[np.int64] = self.offsets[rows + 1] - self.offsets[rows]
        return lengths

    def select(self, rows: Sequence[int] | NDArray[np.integer[Any]]) -> Encoded:
        """The rows named, in that order, as a data set of their own."""
        index = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths_of(index)
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        where = np.arange(offsets[-1]) + np.repeat(self.offsets[index] - offsets[:-1], lengths)
        return replace(
            self,
            tokens=self.tokens[where],
            offsets=offsets,
            targets=None if self.targets is None else self.targets[index],
            starts=None if self.starts is None else self.starts[index],
            token_types=None if self.token_types is None else self.token_types[where],
        )


# tokenisation


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
    ds: Dataset, tokenizer: Tokenizer, prompt: str, response: str, template: str | None, max_length: int
) -> Encoded:
    """Tokenise instruction data (a prompt and a response column): the loss counts the answer and its end token.

    `template` is a name in `TEMPLATES`, a string with `{prompt}` in it, or `"chat"`; None means `"plain"`. A row longer
    than `max_length` loses the end of its answer; a prompt that leaves no room for one is cut from its left, keeping a
    start token. Raises DataError for a template without `{prompt}`, `"chat"` where the tokenizer has none, or a
    `max_length` below 2.
    """
    if max_length < 2:
        raise DataError(
            f"got max_length {max_length}, expected at least 2: one token of the prompt and one of the answer"
        )
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[NDArray[np.int32]] = []
    lengths: list[int] = []
    starts: list[int] = []
    for first in range(0, len(ds), _BLOCK):
        block = ds[first : first + _BLOCK]
        prompts = encode_prompts([str(x) for x in block[prompt]], tokenizer, template)
        answers = tokenizer([str(x) for x in block[response]], add_special_tokens=False, verbose=False)["input_ids"]
        rows = []
        for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
            a = a + end
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


def encode_prompts(prompts: Sequence[str], tokenizer: Tokenizer, template: str | None) -> list[list[int]]:
    """Token ids of the prompts inside their template, at least one token each: what an answer is generated from."""
    name = template or "plain"
    if name == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"template 'chat' needs a tokenizer with a chat template, and this one has none: use one of "
                f"{', '.join(TEMPLATES)}, or a string with {{prompt}} in it"
            )
        texts = [
            tokenizer.apply_chat_template([{"role": "user", "content": x}], tokenize=False, add_generation_prompt=True)
            for x in prompts
        ]
        special = False  # a chat template writes its special tokens itself
    else:
        form = TEMPLATES.get(name, name)
        if "{prompt}" not in form:
            raise DataError(
                f"got template {name!r}, expected {', '.join(TEMPLATES)}, chat, or a string with {{prompt}} in it"
                f"{nearest(name, [*TEMPLATES, 'chat'])}"
            )
        texts = [form.replace("{prompt}", x) for x in prompts]
        special = True
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    begin = end if begin is None else begin
    # The answer's first token is predicted from the one before it, so a prompt has at least one token, and none that
    # closes the text.
    rows = [row[:-1] if special and len(row) > 1 and row[-1] == end else row for row in rows]
    return [row or [_pad_id(tokenizer) if begin is None else begin] for row in rows]


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


# batches


def schedule(
    lengths: NDArray[np.integer[Any]],
    batch_size: int,
    key: tuple[int | str, ...],
    *,
    steps: int | None = None,
    epochs: int | None = None,
) -> list[NDArray[np.int64]]:
    """Batches of row indices for one client and one round: `steps` of them, or whole `epochs`.

    `key` is (seed, t, client id), and for a visit's further works their number. Each epoch shuffles the rows, sorts them by
    length, so that rows of a batch need little padding, and visits the batches in a random order. An epoch's longest rows may
    make a smaller batch.
    """
    if (steps is None) == (epochs is None):
        raise ValueError(f"expected either steps or epochs, got steps={steps} and epochs={epochs}")
    wanted = steps if steps is not None else epochs
    if len(lengths) == 0 or batch_size < 1 or wanted is None or wanted < 0:
        raise ValueError(
            f"cannot draw batches of {batch_size} from {len(lengths)} rows (steps={steps}, epochs={epochs})"
        )
    seed, t, client, *part = key
    batches: list[NDArray[np.int64]] = []
    epoch = 0
    while (len(batches) < steps) if steps is not None else (epoch < wanted):
        rows = torch.randperm(len(lengths), generator=generator(seed, t, client, *part, epoch, "rows")).numpy()
        rows = rows[np.argsort(lengths[rows], kind="stable")]  # stable: rows of one length stay shuffled
        cut = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        # Without the client in the key: clients with equal numbers of batches that train together in one pass are then
        # at the same quantile of length in every step, and none is padded to the longest row of another.
        order = torch.randperm(len(cut), generator=generator(seed, t, epoch, len(cut), "batches")).tolist()
        batches.extend(cut[i] for i in order)
        epoch += 1
    return batches if steps is None else batches[:steps]


@dataclass(frozen=True)
class Batch:
    """One batch of K clients: rows k * b to (k + 1) * b belong to client k."""

    input_ids: torch.Tensor
    """(K * b, L) int64."""
    attention_mask: torch.Tensor
    """(K * b, L) int64."""
    token_type_ids: torch.Tensor | None
    """(K * b, L) int64, for sentence pairs."""
    labels: torch.Tensor
    """(K * b,) class index or value; (K * b, L) for a causal LM, `IGNORE` outside the answer, not shifted."""
    weight: torch.Tensor
    """(K * b,) float32: 1 for a row of the data, 0 for a row added because a client's batch is smaller than b."""
    K: int
    b: int

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            token_type_ids=None if self.token_type_ids is None else self.token_type_ids.to(device),
            labels=self.labels.to(device),
            weight=self.weight.to(device),
        )


def collate(
    parts: Sequence[tuple[Encoded, NDArray[np.integer[Any]]]], pad_rows: bool = True, multiple: int = 1
) -> Batch:
    """Put the rows of K clients into one batch, padded on the right to the longest row (up to a `multiple` of tokens).

    A client with fewer rows than the largest gets rows of weight 0, which attend to one padding token: no softmax
    is empty. With `pad_rows` false, unequal numbers raise ValueError.
    """
    if not parts:
        raise ValueError("a batch needs at least one client, got none")
    first = parts[0][0]
    b = max(len(rows) for _, rows in parts)
    if not pad_rows and any(len(rows) != b for _, rows in parts):
        raise ValueError(
            f"clients have {[len(rows) for _, rows in parts]} rows, expected equal numbers with pad_rows=False"
        )
    longest = max((int(data.lengths_of(rows).max()) for data, rows in parts if len(rows)), default=1)
    L = -(-longest // multiple) * multiple
    K, position = len(parts), np.arange(L)
    ids = np.full((K, b, L), first.pad_id, np.int64)
    mask = np.zeros((K, b, L), np.int64)
    types = np.zeros((K, b, L), np.int64) if any(data.token_types is not None for data, _ in parts) else None
    weight = np.zeros((K, b), np.float32)
    causal = first.kind == "causal-lm"
    labels: NDArray[Any] = (
        np.full((K, b, L), IGNORE, np.int64)
        if causal
        else np.zeros((K, b), np.float32 if first.kind == "regression" else np.int64)
    )
    for k, (data, rows) in enumerate(parts):
        n = len(rows)
        real = position < data.lengths_of(rows)[:, None]  # (n, L)
        where = (data.offsets[rows][:, None] + position)[real]
        ids[k, :n][real] = data.tokens[where]
        mask[k, :n] = real
        mask[k, n:, 0] = 1
        weight[k, :n] = 1
        if types is not None and data.token_types is not None:
            types[k, :n][real] = data.token_types[where]
        if data.targets is not None:
            labels[k, :n] = data.targets[rows]
        elif data.starts is not None:
            answer = real & (position >= data.starts[rows][:, None])
            labels[k, :n][answer] = ids[k, :n][answer]
    return Batch(
        input_ids=torch.from_numpy(ids.reshape(K * b, L)),
        attention_mask=torch.from_numpy(mask.reshape(K * b, L)),
        token_type_ids=None if types is None else torch.from_numpy(types.reshape(K * b, L)),
        labels=torch.from_numpy(labels.reshape(K * b, *labels.shape[2:])),
        weight=torch.from_numpy(weight.reshape(K * b)),
        K=K,
        b=b,
    )
