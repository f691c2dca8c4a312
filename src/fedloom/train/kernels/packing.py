"""Token packing: everything but attention computes on tokens without padding.

    rows of K clients ──► tokens (1, N): the rows end to end, those of client 0 first
                                  │ embeddings, projections, feed-forward: all on (1, N)
                                  ├ adapters: tokens ──► (K, T), T the most tokens of a client ──► tokens
                                  └ attention: tokens ──► buckets of rows of about one length (R, L') ──► tokens

Kernels of a GPU need neither of the two: they are told where clients (`Groups`) and rows (`Rows`) end.

Tokens of a row meet only in attention, so nothing else needs them padded. Attention pads its rows to a multiple of 16:
a softmax over a shorter remainder runs one number at a time (twelve times slower on a CPU with AVX-512).

What is made anew for every shape (oneDNN's kernels for bfloat16 on a CPU) would hardly see one twice. There, sizes
are rounded up to a few, by padding tokens after all others and padding rows in a bucket: no client's result depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.data.batches import ClientRows, spans
from fedloom.data.placing import sent
from fedloom.train.kernels.grouped_matmul import Groups
from fedloom.train.kernels.lora_matmul import Segments
from fedloom.train.kernels.varlen_attention import Rows, rows_of

P = ParamSpec("P")

_ALIGN = 16

_TOKENS = 4
"""What the number of packed tokens is rounded up to at least: a padding token costs what a real one does."""

_TILE = 64
"""The same where attention is one kernel, on a GPU: its products go by tiles, and a tile in part costs a whole one."""

_BUCKET = 4096
"""Padded scores per head that a bucket of its own must save: it costs some twenty calls in every layer."""


@dataclass(frozen=True)
class Bucket:
    """Rows of data that attention pads to one length."""

    spread: Tensor
    """(R, L') int64: token index into N; padding repeats the row's first."""
    valid: Tensor
    """(R, L') bool: which of those a row attends to. A padding row is a copy of another."""
    real: NDArray[np.bool_]
    """(R, L') `valid` without padding rows, so that each token is there once. It stays on the host: what is counted there need
    not be waited for."""


def _once(make: Callable[Concatenate[Packing, P], Tensor]) -> Callable[Concatenate[Packing, P], Tensor]:
    """Make an index when the first layer asks for it, and keep it for the others."""

    @wraps(make)
    def kept(packing: Packing, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        key = (make.__name__, *args, *kwargs.items())
        if key not in packing._made:
            packing._made[key] = make(packing, *args, **kwargs)
        return packing._made[key]

    return kept


@dataclass(frozen=True)
class Packing:
    """Where each token of a batch of K clients is. N counts padding tokens, if any, which come last."""

    input_ids: Tensor
    """(1, N) int64."""
    position_ids: Tensor
    """(1, N) int64, from 0 in each row."""
    token_type_ids: Tensor | None
    """(1, N) int64."""
    first: Tensor
    """(K * b,) int64: index into N of the first token of each row; of a row that a client lacks, its client's first."""
    segments: Segments | Groups | None
    """Where the clients' tokens are; None if all of N are, equally many of each."""
    buckets: Sequence[Bucket]
    """None where `rows` say where rows are."""
    causal: bool
    idle: int = 0
    """How many padding tokens there are."""
    rows: Rows | None = None
    _made: dict[object, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Packing:
        """The same packing on a device."""
        if device == self.first.device:
            return self
        segments, rows = self.segments, self.rows
        return replace(
            self,
            input_ids=sent(self.input_ids, device),
            position_ids=sent(self.position_ids, device),
            token_type_ids=None if self.token_type_ids is None else sent(self.token_type_ids, device),
            first=sent(self.first, device),
            segments=None if segments is None else segments.to(device),
            buckets=[Bucket(sent(x.spread, device), sent(x.valid, device), x.real) for x in self.buckets],
            rows=None if rows is None else Rows(sent(rows.starts, device), rows.most),
            _made={},
        )

    @_once
    def row_index(self, heads: int, shared: int) -> Tensor:
        """(M,) index into (N * heads / shared) vectors that lays out, end to end, each bucket's (R, heads, L').

        `shared` heads of queries read one of keys.
        """
        head = (torch.arange(heads, device=self.first.device) // shared).view(1, -1, 1)
        return torch.cat([(x.spread.unsqueeze(1) * (heads // shared) + head).flatten() for x in self.buckets])

    @_once
    def spread_index(self, heads: int, own: int, repeated: bool) -> Tensor:
        """(M + 2 M',): the same for N * heads vectors of queries, N * own of keys and as many of values, end to end. Keys and
        values are `repeated` for every head of queries, or not."""
        queries = self.row_index(heads, 1)
        keys = self.row_index(heads, heads // own) if repeated else self.row_index(own, 1)
        N = self.input_ids.shape[1]
        return torch.cat([queries, keys + N * heads, keys + N * (heads + own)])

    @_once
    def collect_index(self, heads: int) -> Tensor:
        """(N * heads,): the way back from `row_index`, index into the buckets' M vectors."""
        source = self.row_index(heads, 1)
        there = sent(torch.from_numpy(np.flatnonzero(self._real(heads))), source.device)
        # A padding token reads the first vector.
        back = torch.zeros(self.input_ids.shape[1] * heads, dtype=torch.int64, device=source.device)
        return back.index_copy_(0, source[there], there)

    @_once
    def back_index(self, heads: int, laid: int) -> Tensor:
        """(N * (heads + 2 laid),): the way back from `spread_index` of so many heads of queries, and of keys and values."""
        queries, keys = self.collect_index(heads), self.collect_index(laid)
        M, own = len(self.row_index(heads, 1)), len(self.row_index(laid, 1))
        return torch.cat([queries, keys + M, keys + M + own])

    @_once
    def padding_index(self, heads: int) -> Tensor:
        """(P,): those of the buckets' vectors that are padding."""
        return sent(torch.from_numpy(np.flatnonzero(~self._real(heads))), self.first.device)

    @_once
    def mask(self, i: int, heads: int, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """What is added to the scores of bucket i: 0 or -inf, (R * heads, 1, L'), or (L', L') if causal."""
        allowed = self.seen(i, window)
        allowed = allowed if self.causal else allowed.flatten(0, 1).repeat_interleave(heads, 0)
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)

    @_once
    def seen(self, i: int, window: int | None = None) -> Tensor:
        """Whether a token of bucket i sees another, (R, 1, 1, L'), or (L', L') if causal: then `window` tokens at most, itself
        the last of them."""
        valid = self.buckets[i].valid
        if not self.causal:
            return valid[:, None, None, :]
        before = valid.new_ones(valid.shape[1], valid.shape[1]).tril()
        return before if window is None else before.triu(1 - window)

    def _real(self, heads: int) -> NDArray[np.bool_]:
        """(M,): which of the buckets' vectors are tokens."""
        return np.concatenate([np.repeat(x.real[:, None], heads, 1).ravel() for x in self.buckets])


def pack_rows(
    parts: Sequence[ClientRows], causal: bool, few_shapes: bool = False, grouped: bool = False, varlen: bool = False
) -> Packing:
    """The packing of some rows of each client, on the CPU, straight from where they are stored.

    With `few_shapes`, sizes are rounded up to at most sixteen between a power of two and the next. `grouped` and `varlen` say
    where clients and rows end, for kernels that need no more. NumPy makes it: these are some fifty calls on very few numbers.
    """
    K, b = len(parts), max(len(rows) for _, rows in parts)
    by_client = np.zeros((K, b), np.int64)
    for k, (data, rows) in enumerate(parts):
        by_client[k, : len(rows)] = data.lengths_of(rows)
    counts, lengths = by_client.sum(1), by_client.ravel()
    # A row that a client lacks reads its client's first token, for nothing: one of another client could bring in its NaN.
    first = np.where(lengths > 0, lengths.cumsum() - lengths, (counts.cumsum() - counts).repeat(b))
    N = int(counts.sum())
    idle = _rounded(N, _TILE if varlen else _TOKENS) - N if few_shapes else 0
    where = [spans(data.offsets[rows], data.lengths_of(rows)) for data, rows in parts]

    def tokens(each: Sequence[NDArray[Any]]) -> Tensor:
        flat = np.zeros((1, N + idle), np.int64)
        np.concatenate(each, out=flat[0, :N], casting="same_kind")
        return torch.from_numpy(flat)

    types = None
    if any(data.token_types is not None for data, _ in parts):
        types = tokens(
            [
                np.zeros(len(w), np.int8) if d.token_types is None else d.token_types[w]
                for (d, _), w in zip(parts, where, strict=True)
            ]
        )
    return Packing(
        input_ids=tokens([data.tokens[w] for (data, _), w in zip(parts, where, strict=True)]),
        position_ids=tokens([spans(np.zeros_like(lengths), lengths)]),
        token_type_ids=types,
        first=torch.from_numpy(first),
        segments=segments_of(counts, idle, few_shapes, grouped),
        buckets=[] if varlen else [_bucket(rows, L, first, lengths, few_shapes) for rows, L in _by_length(lengths)],
        causal=causal,
        idle=idle,
        rows=rows_of(lengths, idle, few_shapes) if varlen else None,
    )


def _rounded(n: int, least: int = 1) -> int:
    """n rounded up to a multiple of `least` and of a thirty-second of the next power of two."""
    step = max(least, 1 << max(0, n.bit_length() - 5))
    return -(-n // step) * step


def _by_length(lengths: NDArray[np.int64]) -> list[tuple[list[int], int]]:
    """Rows of data in groups of about one length: indices, and the length to pad to."""
    aligned = (-(-lengths // _ALIGN) * _ALIGN).tolist()
    groups: dict[int, list[int]] = {}
    for row, L in enumerate(aligned):
        if L:  # groups by powers of two
            groups.setdefault(1 << (L - 1).bit_length(), []).append(row)
    found: list[tuple[list[int], int]] = []
    carried: list[int] = []
    bounds = sorted(groups)
    for i, bound in enumerate(bounds):
        rows = sorted(carried + groups[bound])
        L = max(aligned[row] for row in groups[bound])
        last = i == len(bounds) - 1
        larger = L if last else max(aligned[row] for row in groups[bounds[i + 1]])
        carried = rows
        if last or len(rows) * (larger**2 - L**2) > _BUCKET:
            found.append((rows, L))
            carried = []
    return found


def _bucket(rows: list[int], L: int, first: NDArray[np.int64], lengths: NDArray[np.int64], few_shapes: bool) -> Bucket:
    R = _rounded(len(rows)) if few_shapes else len(rows)
    chosen = np.array(rows + rows[:1] * (R - len(rows)))
    valid = np.arange(L) < lengths[chosen, None]  # (R, L)
    spread = first[chosen, None] + np.where(valid, np.arange(L), 0)
    real = valid.copy()
    real[len(rows) :] = False
    return Bucket(torch.from_numpy(spread), torch.from_numpy(valid), real)


def segments_of(counts: NDArray[np.int64], idle: int, few_shapes: bool, grouped: bool) -> Segments | Groups | None:
    """From the numbers of tokens (K,) of each client, and of padding tokens after them all."""
    if len(counts) == 1:
        return None  # padding tokens may as well be the only client's: their gradient is zero
    T = int(counts.max())
    if grouped and (idle or T * len(counts) > counts.sum()):
        ends = counts.cumsum()
        ends[-1] += idle
        return Groups(torch.from_numpy(ends.astype(np.int32)))
    if few_shapes:
        T = _rounded(T, _ALIGN)
    there = np.arange(T) < counts[:, None]  # (K, T)
    if not idle and there.all():
        return None
    first = (counts.cumsum() - counts)[:, None]
    spread = np.where(there, first + np.arange(T), first).ravel()
    collect = np.zeros(int(counts.sum()) + idle, np.int64)
    collect[: len(collect) - idle] = np.flatnonzero(there)
    return Segments(torch.from_numpy(spread), torch.from_numpy(np.flatnonzero(~there)), torch.from_numpy(collect))


def rounds(device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether sizes are rounded up to a few.

    torch's bfloat16 on a CPU is oneDNN's, which compiles a product for every shape. With a new number of tokens in every step,
    a step of one client of MiniLM took three times as long, and a run over 1,000 clients grew by 480 MiB of compiled code. On
    CUDA memory is kept by size, and whatever captures or compiles a step finds its shapes again: not measured.
    """
    return device.type == "cuda" or (device.type == "cpu" and dtype == torch.bfloat16)
