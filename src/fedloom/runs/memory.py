"""What training takes of a device's memory, told beforehand, and how many clients therefore train in one pass.

Of a token, autograd keeps the input and output of about every linear layer, what norms in half precision make in float32,
and where logits are made, them and their gradient. That is rough: benchmarks/training_memory.py measured 0.6 to 1.3 times as
much of MiniLM, and 0.9 to 1.1 times of SmolLM2-135M. So no more than half of the free memory is given out, and a pass that
finds none is done again in halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedloom.models import quantised
from fedloom.runs.config import EngineSection
from fedloom.train.frozen_prefix import DEFAULT_BYTES
from fedloom.train.int8_products import wide
from fedloom.train.lora_linear import shape_of
from fedloom.train.loss import CHUNK

TOKENS_AT_ONCE = 4096
"""What one pass over the base holds at most: enough to fill a processor."""

MOST_CLIENTS = 32

ALONE_FROM = 300_000_000
"""Parameters from which one client's products fill a CPU, so that batching clients gains nothing."""

_NORM_BYTES = 3 * 4
"""Of a number that a written-out norm reads in half precision: in float32 it is kept before, squared and scaled."""

_CHUNK_BYTES = 3 * 4
"""Of a logit of one chunk of the loss: in float32, its log-softmax and its gradient."""

_SHARE = 0.5  # of the memory that is free: the estimate is rough, and others are at work


@dataclass(frozen=True)
class Memory:
    """Bytes that training takes."""

    base: int
    """The frozen weights."""
    client: int
    """What one client's largest step adds."""
    once: int = 0
    """What a pass adds, whoever is in it."""

    def total(self, cohort: int) -> int:
        """With so many clients in one pass."""
        return self.base + self.once + cohort * self.client


def memory(
    model: nn.Module,
    dtype: torch.dtype,
    *,
    tokens: int,
    answers: int,
    trained: int,
    checkpointing: bool = False,
    frozen: Sequence[str] = (),
    int8_products: bool = False,
) -> Memory:
    """Of steps of `tokens` tokens with padding, `answers` of them with logits, and `trained` parameters a client.

    `frozen` are blocks that no gradient goes into. `int8_products` has the wide layers coded by rows and by columns.
    """
    size = torch.empty(0, dtype=dtype).element_size()
    config = getattr(model, "config", None)
    embeddings = getattr(model, "get_output_embeddings", None)
    head = None if embeddings is None else embeddings()
    still = tuple(f"{name}." for name in frozen)
    moving = [m for name, m in model.named_modules() if m is not head and not name.startswith(still)]
    kept = size * sum(sum(shape_of(m)) for m in moving if isinstance(m, (nn.Linear, Conv1D)))
    if size < 4:
        kept += _NORM_BYTES * sum(_width(m) for m in moving)
    if checkpointing:  # the input of every block, and one block's inside
        blocks = max(1, int(getattr(config, "num_hidden_layers", 1)) - len(frozen))
        kept = kept // blocks + size * blocks * int(getattr(config, "hidden_size", 0))
    vocabulary = 0 if head is None else int(getattr(config, "vocab_size", 0))
    coded = [m for name, m in wide(model).items() if not name.startswith(still)] if int8_products else []
    adapter = 4 * 4 * trained  # float32: parameters, gradients and two moments
    return Memory(
        base=quantised.bytes_of(model, dtype),
        client=tokens * kept + answers * vocabulary * 2 * size + adapter,
        once=_CHUNK_BYTES * min(MOST_CLIENTS * answers * vocabulary, CHUNK)
        + 2 * sum(m.get_parameter("weight").numel() for m in coded),
    )


def _width(module: nn.Module) -> int:
    """Of a norm that is written out, as decoders' RMSNorms are, and computes in float32; 0 of any other module."""
    weight = getattr(module, "weight", None)
    written = type(module).__name__.endswith("Norm") and not isinstance(module, nn.LayerNorm)
    return weight.numel() if written and isinstance(weight, torch.Tensor) and weight.ndim == 1 else 0


def cohort(need: Memory, parameters: int, tokens: float, device: torch.device, free: int | None) -> int:
    """How many clients train in one pass; `tokens` of a client's usual step, `free` bytes beside the base (None: unknown)."""
    if device.type == "cpu" and parameters >= ALONE_FROM:
        return 1
    most = min(MOST_CLIENTS, int(TOKENS_AT_ONCE / max(1.0, tokens)))
    if free is not None:
        most = min(most, int((_SHARE * free - need.once) / max(1, need.client)))
    return max(1, most)


def states_bytes(model: nn.Module, dtype: torch.dtype, tokens: int) -> int:
    """What the states of so many tokens between two blocks take."""
    width = int(getattr(getattr(model, "config", None), "hidden_size", 0))
    return tokens * width * torch.empty(0, dtype=dtype).element_size()


def prefix_bytes(engine: EngineSection, device: torch.device) -> int:
    """What the states of a frozen prefix may take in each process that trains."""
    if engine.prefix_gib != "auto":
        return int(engine.prefix_gib * 2**30)
    here = free(device)
    if here is None:
        return DEFAULT_BYTES
    # Processes that share a processor share its memory.
    sharing = {"ray": engine.workers or 2, "flower": 1 if engine.superlink is not None else engine.nodes or 2}
    return here // 4 // (sharing.get(engine.name, 1) if device.type == "cpu" else 1)


def free(device: torch.device) -> int | None:
    """Bytes that a process may still take; None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable")))
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, StopIteration, ValueError):
        pass
    return max(0, min(found)) if found else None
