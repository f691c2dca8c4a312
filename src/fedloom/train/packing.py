"""Token packing: everything but attention computes on tokens without padding.

    rows (K * b, L), padded ──► tokens (1, N): the rows end to end, those of client 0 first
                                  │ embeddings, projections, feed-forward: all on (1, N)
                                  ├ adapters: tokens ──► (K, T), T the most tokens of a client ──► tokens
                                  └ attention: tokens ──► buckets of rows of about one length (R, L') ──► tokens

Rows meet only in attention, so nothing else needs them padded. Attention pads its rows to a multiple of 16, whatever the
batch was padded to: a softmax over a shorter remainder runs one number at a time (twelve times slower on a CPU with AVX-512).

A library that compiles a kernel for every new shape (oneDNN, for bfloat16 on a CPU) would hardly see one twice. For it, sizes
are rounded up to a few, by idle tokens after all others and idle rows in a bucket: no client's result depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedloom.data.text import Batch, Kind
from fedloom.train.product import Segments

_ALIGN = 16

_TOKENS = 4
"""What the number of packed tokens is rounded up to at least: each idle one costs what a real one does."""

_BUCKET = 4096
"""Padded scores per head that a bucket of its own must save: it costs some twenty calls in every layer."""

_ENCODERS = {"bert": "pooler", "roberta": "classifier", "xlm-roberta": "classifier"}
"""Architectures that read the first token of each row -> the module that does."""

_DECODERS = frozenset({"llama", "mistral", "qwen2", "qwen3", "gpt2", "smollm3"})
"""Architectures whose causal attention goes through transformers' attention interface with nothing but a scale."""


@dataclass(frozen=True)
class Bucket:
    """Rows of data that attention pads to one length."""

    spread: Tensor
    """(R, L') int64: index into N of the tokens of each row; that of its first for padding."""
    valid: Tensor
    """(R, L') bool: which of those a row attends to. An idle row is a copy of another."""
    real: Tensor
    """(R, L') bool: `valid` without idle rows, so that each token is there once."""


@dataclass
class Packing:
    """Where each token of a batch of K clients is. N counts idle tokens, if any, which come last."""

    input_ids: Tensor
    """(1, N) int64."""
    position_ids: Tensor
    """(1, N) int64, from 0 in each row."""
    token_type_ids: Tensor | None
    """(1, N) int64."""
    slots: Tensor
    """(K * b, L) int64: index into N of each token of the batch; that of its row's first for padding."""
    segments: Segments | None
    """Where the clients' tokens are; None if all of N are, equally many of each."""
    buckets: Sequence[Bucket]
    causal: bool
    idle: int = 0
    _made: dict[object, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Packing:
        """The same packing on a device."""
        if device == self.slots.device:
            return self
        segments = self.segments
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            token_type_ids=None if self.token_type_ids is None else self.token_type_ids.to(device),
            slots=self.slots.to(device),
            segments=None if segments is None else segments.to(device),
            buckets=[Bucket(x.spread.to(device), x.valid.to(device), x.real.to(device)) for x in self.buckets],
            _made={},
        )

    def row_index(self, heads: int, shared: int) -> Tensor:
        """(M,) index into (N * heads / shared) vectors that lays out, end to end, each bucket's (R, heads, L').

        `shared` heads of queries read one of keys.
        """
        key = (heads, shared)
        if key not in self._made:
            head = (torch.arange(heads, device=self.slots.device) // shared).view(1, -1, 1)
            parts = [(x.spread.unsqueeze(1) * (heads // shared) + head).flatten() for x in self.buckets]
            self._made[key] = torch.cat(parts)
        return self._made[key]

    def spread_index(self, heads: int, shared: int) -> Tensor:
        """(3 * M,): the same for N * heads vectors of queries, N * heads / shared of keys and as many of values, end to end."""
        key = (heads, shared, "spread")
        if key not in self._made:
            queries, keys, N = self.row_index(heads, 1), self.row_index(heads, shared), self.input_ids.shape[1]
            first = N * heads
            self._made[key] = torch.cat([queries, keys + first, keys + first + first // shared])
        return self._made[key]

    def collect_index(self, heads: int) -> Tensor:
        """(N * heads,): the way back from `row_index`, index into the buckets' M vectors."""
        key = (heads, "collect")
        if key not in self._made:
            source = self.row_index(heads, 1)
            there = torch.nonzero(self._real(heads)).squeeze(1)
            # An idle token reads the first vector.
            back = torch.zeros(self.input_ids.shape[1] * heads, dtype=torch.int64, device=source.device)
            self._made[key] = back.index_copy_(0, source[there], there)
        return self._made[key]

    def back_index(self, heads: int) -> Tensor:
        """(3 * N * heads,): the way back from `spread_index`, N * heads vectors each of queries, keys and values."""
        key = (heads, "back")
        if key not in self._made:
            collect, M = self.collect_index(heads), len(self.row_index(heads, 1))
            self._made[key] = torch.cat([collect, collect + M, collect + 2 * M])
        return self._made[key]

    def padding_index(self, heads: int) -> Tensor:
        """(P,): those of the buckets' vectors that are padding."""
        key = (heads, "padding")
        if key not in self._made:
            self._made[key] = torch.nonzero(~self._real(heads)).squeeze(1)
        return self._made[key]

    def mask(self, i: int, heads: int, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of bucket i: 0 or -inf, (R * heads, 1, L'), or (L', L') if causal."""
        key = ("mask", i, heads, dtype)
        if key not in self._made:
            valid = self.buckets[i].valid
            L = valid.shape[1]
            allowed = valid.new_ones(L, L).tril() if self.causal else valid.repeat_interleave(heads, 0).unsqueeze(1)
            self._made[key] = torch.zeros(allowed.shape, dtype=dtype, device=valid.device).masked_fill_(
                ~allowed, -torch.inf
            )
        return self._made[key]

    def _real(self, heads: int) -> Tensor:
        return torch.cat([x.real.unsqueeze(1).expand(-1, heads, -1).flatten() for x in self.buckets])


def pack_batch(batch: Batch, causal: bool, few_shapes: bool = False) -> Packing:
    """The packing of a batch that is padded on the right. Rows of weight 0 are left out of it.

    With `few_shapes`, sizes are rounded up to at most sixteen between a power of two and the next. The batch and its packing
    are on the CPU, and NumPy makes it: these are some fifty calls on very few numbers.
    """
    K, b = batch.K, batch.b
    real = (batch.attention_mask.numpy() != 0) & (batch.weight.numpy() > 0)[:, None]  # (K * b, L)
    lengths = real.sum(1)
    counts = lengths.reshape(K, b).sum(1)
    # A row of weight 0 reads its client's first token, with gradient 0: one of another client could bring in its NaN.
    first = np.where(lengths > 0, lengths.cumsum() - lengths, (counts.cumsum() - counts).repeat(b))
    position = np.arange(real.shape[1])
    # Padding reads its own row's first token: even at weight 0, a NaN of another client would come through.
    slots = np.where(real, first[:, None] + position, first[:, None])
    N = int(counts.sum())
    idle = _rounded(N, _TOKENS) - N if few_shapes else 0

    def tokens(x: NDArray[np.int64]) -> Tensor:
        flat = np.zeros((1, N + idle), np.int64)
        flat[0, :N] = x[real]
        return torch.from_numpy(flat)

    return Packing(
        input_ids=tokens(batch.input_ids.numpy()),
        position_ids=tokens(np.broadcast_to(position, real.shape)),
        token_type_ids=None if batch.token_type_ids is None else tokens(batch.token_type_ids.numpy()),
        slots=torch.from_numpy(slots),
        segments=_segments(counts, idle, few_shapes),
        buckets=[_bucket(rows, L, real, slots, few_shapes) for rows, L in _by_length(lengths)],
        causal=causal,
        idle=idle,
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


def _bucket(rows: list[int], L: int, real: NDArray[np.bool], slots: NDArray[np.int64], few_shapes: bool) -> Bucket:
    R = _rounded(len(rows)) if few_shapes else len(rows)
    every = rows + rows[:1] * (R - len(rows))
    longest = min(L, real.shape[1])
    spread = np.empty((R, L), np.int64)
    spread[:, :longest] = slots[every, :longest]
    spread[:, longest:] = slots[every, :1]
    valid = np.zeros((R, L), np.bool)
    valid[:, :longest] = real[every, :longest]
    there = valid.copy()
    there[len(rows) :] = False
    return Bucket(torch.from_numpy(spread), torch.from_numpy(valid), torch.from_numpy(there))


def _segments(counts: NDArray[np.int64], idle: int, few_shapes: bool) -> Segments | None:
    """From the numbers of tokens (K,) of each client, and of idle ones after them all."""
    if len(counts) == 1:
        return None  # idle tokens may as well be the only client's: their gradient is zero
    T = int(counts.max())
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


def readers(model: nn.Module, kind: Kind) -> list[str] | None:
    """The modules from which on only some tokens matter; None if the model's batches cannot be packed.

    A classifier reads each row's first token: after the attention of its last layer all others are idle. A causal LM reads
    every token up to its vocabulary head.
    """
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", "")
    if kind == "causal-lm":
        windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        return [] if family in _DECODERS and not windowed else None
    if family not in _ENCODERS:
        return None
    last = getattr(config, "num_hidden_layers", 0) - 1
    endings = (f".encoder.layer.{last}.attention.output", _ENCODERS[family])
    found = [
        path for path, _ in model.named_modules() if f".{path}".endswith(tuple(f".{e.lstrip('.')}" for e in endings))
    ]
    return found if len(found) == 2 else None


def compiles(device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether products are compiled anew for every shape.

    torch's bfloat16 on a CPU is oneDNN's. With a new number of tokens in every step, a step of one client of MiniLM took three
    times as long, and a run over 1,000 clients grew by 480 MiB of compiled code.
    """
    return device.type == "cpu" and dtype == torch.bfloat16


def first_position(model: nn.Module) -> int:
    """The position id of a row's first token: RoBERTa counts on from its padding token."""
    config = getattr(model, "config", None)
    return int(config.pad_token_id) + 1 if config is not None and "roberta" in config.model_type else 0
