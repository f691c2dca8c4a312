"""The next step's batch, made in another thread while the device works on this one's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def in_turn(make: Callable[[int], T], n: int, device: torch.device, ahead: bool) -> Iterator[Iterator[T]]:
    """make(0), ..., make(n - 1), each when it is asked for, or `ahead`: made by a thread while the one before it is used.

    The thread ends with the context, whatever ends that, after what it is at. What `make` raises is raised where its result is
    asked for.
    """
    if not ahead:
        yield map(make, range(n))
        return
    # A thread begins on the first GPU, whichever its parent is on.
    gpu = (device.index if device.index is not None else torch.cuda.current_device()) if device.type == "cuda" else None
    begin = None if gpu is None else partial(torch.cuda.set_device, gpu)
    with ThreadPoolExecutor(1, "fedloom-batches", begin) as pool:
        try:
            yield _one_ahead(pool, make, n)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _one_ahead(pool: ThreadPoolExecutor, make: Callable[[int], T], n: int) -> Iterator[T]:
    coming = pool.submit(make, 0) if n else None
    for i in range(1, n + 1):
        assert coming is not None
        made = coming.result()
        coming = pool.submit(make, i) if i < n else None
        yield made
