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
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedloom.data.text import Batch, Kind
from fedloom.train.adapter import Segments

_ALIGN = 16

_TOKENS = 8
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

    def spread_index(self, heads: int, shared: int) -> Tensor:
        """Index into (N * heads / shared) vectors that lays out, end to end, each bucket's (R, heads, L').

        `shared` heads of queries read one of keys.
        """
        key = (heads, shared)
        if key not in self._made:
            head = (torch.arange(heads, device=self.slots.device) // shared).view(1, -1, 1)
            parts = [(x.spread.unsqueeze(1) * (heads // shared) + head).flatten() for x in self.buckets]
            self._made[key] = torch.cat(parts)
        return self._made[key]

    def collect_index(self, heads: int) -> Tensor:
        """(N * heads,): the way back, index into the buckets' vectors."""
        key = (heads, "collect")
        if key not in self._made:
            source = self.spread_index(heads, 1)
            there = torch.nonzero(self._real(heads)).squeeze(1)
            # An idle token reads the first vector.
            back = torch.zeros(self.input_ids.shape[1] * heads, dtype=torch.int64, device=source.device)
            self._made[key] = back.index_copy_(0, source[there], there)
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

    With `few_shapes`, sizes are rounded up to at most sixteen between a power of two and the next.
    """
    K, b = batch.K, batch.b
    real = batch.attention_mask.bool() & (batch.weight > 0).unsqueeze(1)  # (K * b, L)
    lengths = real.sum(1)
    first = lengths.cumsum(0) - lengths
    counts = lengths.view(K, b).sum(1)
    # A row of weight 0 reads its client's first token, with gradient 0: one of another client could bring in its NaN.
    first = torch.where(lengths > 0, first, (counts.cumsum(0) - counts).repeat_interleave(b))
    position = torch.arange(real.shape[1], device=real.device)
    # Padding reads its own row's first token: even at weight 0, a NaN of another client would come through.
    slots = torch.where(real, first.unsqueeze(1) + position, first.unsqueeze(1))
    N = int(counts.sum())
    idle = _rounded(N, _TOKENS) - N if few_shapes else 0

    def tokens(x: Tensor) -> Tensor:
        return F.pad(x[real], (0, idle)).unsqueeze(0)

    return Packing(
        input_ids=tokens(batch.input_ids),
        position_ids=tokens(position.expand_as(real)),
        token_type_ids=None if batch.token_type_ids is None else tokens(batch.token_type_ids),
        slots=slots,
        segments=_segments(counts, idle, few_shapes),
        buckets=[_bucket(rows, L, real, slots, few_shapes) for rows, L in _by_length(lengths)],
        causal=causal,
        idle=idle,
    )


def _rounded(n: int, least: int = 1) -> int:
    """n rounded up to a multiple of `least` and of a thirty-second of the next power of two."""
    step = max(least, 1 << max(0, n.bit_length() - 5))
    return -(-n // step) * step


def _by_length(lengths: Tensor) -> list[tuple[Tensor, int]]:
    """Rows of data in groups of about one length: indices (R,), and the length to pad to."""
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
    return [(torch.tensor(rows, device=lengths.device), L) for rows, L in found]


def _bucket(rows: Tensor, L: int, real: Tensor, slots: Tensor, few_shapes: bool) -> Bucket:
    idle = _rounded(len(rows)) - len(rows) if few_shapes else 0
    every = torch.cat([rows, rows[:1].expand(idle)]) if idle else rows
    longest = min(L, real.shape[1])
    chosen = slots[every]
    spread = torch.cat([chosen[:, :longest], chosen[:, :1].expand(-1, L - longest)], dim=1)
    valid = F.pad(real[every, :longest], (0, L - longest))
    return Bucket(spread, valid, F.pad(valid[: len(rows)], (0, 0, 0, idle)))


def _segments(counts: Tensor, idle: int, few_shapes: bool) -> Segments | None:
    """From the numbers of tokens (K,) of each client, and of idle ones after them all."""
    if len(counts) == 1:
        return None  # idle tokens may as well be the only client's: their gradient is zero
    T = int(counts.max())
    if few_shapes:
        T = _rounded(T, _ALIGN)
    there = torch.arange(T, device=counts.device) < counts.unsqueeze(1)  # (K, T)
    if not idle and bool(there.all()):
        return None
    first = counts.cumsum(0) - counts
    spread = torch.where(there, first.unsqueeze(1) + torch.arange(T, device=counts.device), first.unsqueeze(1))
    flat = there.flatten()
    return Segments(spread.flatten(), torch.nonzero(~flat).squeeze(1), F.pad(torch.nonzero(flat).squeeze(1), (0, idle)))


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
