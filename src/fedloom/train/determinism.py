"""The same bytes at every run, on a GPU too: torch's deterministic algorithms, while a trainer computes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def prepare() -> None:
    """Give matrix products on a GPU a workspace that always is the same: counts if none was multiplied before.

    A setting of the environment's own stays; torch refuses one that does not do.
    """
    os.environ.setdefault(WORKSPACE, ":4096:8")


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """With torch's deterministic algorithms if `on`, and afterwards as before. An operation without one raises RuntimeError."""
    if not on:
        yield
        return
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # whose setting is unknown to its type
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Memory is written before it is read: to fill it costs a pass over it.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        memory.fill_uninitialized_memory = filled
