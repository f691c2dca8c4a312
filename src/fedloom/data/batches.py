"""Token rows to batches: length-sorted schedules, the rows of K clients padded into one batch, and what they are to predict.

Token rows are kept end to end in flat arrays, so that a data set costs the memory of its tokens and not of Python
lists, and batches are put together without a loop over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.data.placing import sent
from fedloom.rng import generator

Kind = Literal["classification", "regression", "causal-lm"]


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
    counted: NDArray[np.bool_] | None = None
    """As `tokens`, for conversations: whether the loss counts the token; None where it counts all from `starts` on."""

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
        where = spans(self.offsets[index], lengths)
        return replace(
            self,
            tokens=self.tokens[where],
            offsets=np.concatenate(([0], np.cumsum(lengths))),
            targets=None if self.targets is None else self.targets[index],
            starts=None if self.starts is None else self.starts[index],
            token_types=None if self.token_types is None else self.token_types[where],
            counted=None if self.counted is None else self.counted[where],
        )


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
        order = torch.randperm(len(cut), generator=generator(seed, t, *part, epoch, len(cut), "batches")).tolist()
        batches.extend(cut[i] for i in order)
        epoch += 1
    return batches if steps is None else batches[:steps]


ClientRows = tuple[Encoded, NDArray[np.integer[Any]]]
"""A client's data set and which of its rows are in a batch."""


@dataclass(frozen=True)
class Targets:
    """What a batch of K clients is to predict: M rows, or M answer tokens of a causal LM, in the order of the rows."""

    labels: Tensor
    """(M,) class index int64 or value float32 of a row, or the answer token."""
    owner: Tensor
    """(M,) int64: index of the client."""
    row: Tensor
    """(M,) int64: which of the K * b rows, those of client k from k * b on."""
    position: Tensor
    """(M,) int64: the token of that row whose logits predict it; the first for a label of the row."""
    K: int

    def to(self, device: torch.device) -> Targets:
        """The same targets on a device."""
        labels, owner, row, position = (sent(x, device) for x in (self.labels, self.owner, self.row, self.position))
        return Targets(labels, owner, row, position, self.K)


def targets(parts: Sequence[ClientRows]) -> Targets:
    """The labels of each client's rows, or the tokens that a causal LM predicts: those `counted`, or all from `starts` on."""
    b = max(len(rows) for _, rows in parts)
    labels, owner, row, position = [], [], [], []
    for k, (data, rows) in enumerate(parts):
        if data.starts is None:
            assert data.targets is not None, "labelled rows have targets"
            counts, first = np.ones(len(rows), np.int64), np.zeros(len(rows), np.int64)
            labels.append(data.targets[rows])
        elif data.counted is not None:
            lengths = data.lengths_of(rows)
            within = spans(np.zeros_like(lengths), lengths)
            chosen = data.counted[spans(data.offsets[rows], lengths)] & (within > 0)
            labels.append(data.tokens[spans(data.offsets[rows], lengths)][chosen].astype(np.int64))
            row.append(np.repeat(k * b + np.arange(len(rows)), lengths)[chosen])
            position.append(within[chosen] - 1)
            owner.append(np.full(len(position[-1]), k))
            continue
        else:
            first = np.maximum(data.starts[rows], 1) - 1  # token i + 1 is predicted from token i
            counts = data.lengths_of(rows) - first - 1
            labels.append(data.tokens[spans(data.offsets[rows] + first + 1, counts)].astype(np.int64))
        row.append(np.repeat(k * b + np.arange(len(rows)), counts))
        position.append(spans(first, counts))
        owner.append(np.full(len(position[-1]), k))
    return Targets(
        labels=torch.from_numpy(np.concatenate(labels)),
        owner=torch.from_numpy(np.concatenate(owner)),
        row=torch.from_numpy(np.concatenate(row)),
        position=torch.from_numpy(np.concatenate(position)),
        K=len(parts),
    )


@dataclass(frozen=True)
class Batch:
    """Rows of K clients, padded on the right to one length: rows k * b to (k + 1) * b are those of client k."""

    input_ids: Tensor
    """(K * b, L) int64."""
    attention_mask: Tensor
    """(K * b, L) int64."""
    token_type_ids: Tensor | None
    """(K * b, L) int64, for sentence pairs."""


def collate(parts: Sequence[ClientRows]) -> Batch:
    """Put the rows of K clients into one batch, padded on the right to the longest of them.

    A client with fewer rows than the largest, b, gets rows that attend to one padding token, so that no softmax is empty.
    Raises ValueError without a client.
    """
    if not parts:
        raise ValueError("a batch needs at least one client, got none")
    b = max(len(rows) for _, rows in parts)
    L = max((int(data.lengths_of(rows).max()) for data, rows in parts if len(rows)), default=1)
    K, position = len(parts), np.arange(L)
    ids = np.full((K, b, L), parts[0][0].pad_id, np.int64)
    mask = np.zeros((K, b, L), np.int64)
    types = np.zeros((K, b, L), np.int64) if any(data.token_types is not None for data, _ in parts) else None
    for k, (data, rows) in enumerate(parts):
        n = len(rows)
        real = position < data.lengths_of(rows)[:, None]  # (n, L)
        where = (data.offsets[rows][:, None] + position)[real]
        ids[k, :n][real] = data.tokens[where]
        mask[k, :n] = real
        mask[k, n:, 0] = 1
        if types is not None and data.token_types is not None:
            types[k, :n][real] = data.token_types[where]
    return Batch(
        input_ids=torch.from_numpy(ids.reshape(K * b, L)),
        attention_mask=torch.from_numpy(mask.reshape(K * b, L)),
        token_type_ids=None if types is None else torch.from_numpy(types.reshape(K * b, L)),
    )


def spans(first: NDArray[np.integer[Any]], lengths: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """The indices first[i], ..., first[i] + lengths[i] - 1 of every i, end to end.

    >>> spans(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    within: NDArray[np.int64] = np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - ends + lengths, lengths)
    return within
