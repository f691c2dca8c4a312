"""Screening: one client cannot ruin a run. Uploads are held against each other, the aggregate against recent ones.

An upload moves the model by its distance from what the client was sent. Clients of a round are alike up to their data and
budgets, so one that moves many times further than their median is refused, however finite its numbers are; and a step of the
server that is not finite, or many times longer than recent ones, is not committed. Medians are not moved by a minority:
Yin et al., "Byzantine-Robust Distributed Learning", arXiv 1803.01498, have the argument for means.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fedloom.client import Client
from fedloom.state import State

WINDOW = 8
"""Uploads that are held until their median is known; those after them meet the median of all that were used."""
LEAST = 3
"""Clients of which one can tell who is unlike the others."""
RECENT = 5
"""Steps of the server that a further one is held against."""
SUSPICIOUS = 0.3
"""Share of the bound from which an upload is named in the record."""

T = TypeVar("T")


@dataclass(frozen=True)
class Moved(Generic[T]):
    """A result with how far it moves the model."""

    client: Client
    norm: float
    result: T


@dataclass
class Screen(Generic[T]):
    """One exchange's uploads, held against each other. `ratio` is how many medians one may move; None for no bound."""

    ratio: float | None
    refuse: Callable[[Client, str], None]
    """Told who is refused, and why."""
    suspicious: dict[str, float] = field(default_factory=dict)
    """Client id -> its movement over the median, where that is large but allowed."""
    _recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=256))
    """(norm, examples) of uploads that were used."""

    def usable(self, results: Iterable[Moved[T]]) -> Iterator[T]:
        """What may be used, in its order. The first `WINDOW` results are held back until their median is known."""
        window: list[Moved[T]] = []
        for item in results:
            window.append(item)
            del item
            if self.ratio is None or self._recent or len(window) >= WINDOW:
                yield from self._judged(window)
        yield from self._judged(window)

    def _judged(self, window: list[Moved[T]]) -> Iterator[T]:
        known = [*self._recent, *((item.norm, item.client.examples) for item in window)]
        tell = self.ratio is not None and len(known) >= LEAST
        middle = statistics.median(norm for norm, _ in known) if tell else 0.0
        size = max(1.0, statistics.median(n for _, n in known)) if tell else 1.0
        while window:
            item = window.pop(0)
            # A client with more rows takes more steps, and may go as much further.
            times = item.norm / (middle * max(1.0, item.client.examples / size)) if middle > 0 else 0.0
            if self.ratio is not None and times > self.ratio:
                self.refuse(
                    item.client,
                    f"its update moves the model {times:.3g} times as far as the median client's, "
                    f"{self.ratio:g} are allowed (clients.max_ratio)",
                )
                continue
            if self.ratio is not None and times > SUSPICIOUS * self.ratio:
                self.suspicious[item.client.id] = round(times, 3)
            self._recent.append((item.norm, item.client.examples))
            result = item.result
            del item
            yield result
            del result


def movement(upload: State, sent: State) -> float:
    """Norm of what an upload changes: its distance from what was sent, where that has such a tensor; else its own norm."""
    square = 0.0
    for role, group in upload.items():
        before = sent.get(role, {})
        for site, x in group.items():
            if not x.is_floating_point():
                continue
            start = before.get(site)
            if start is None or start.ndim != x.ndim:
                square += float(x.double().square().sum())
                continue
            # Where a client sends fewer ranks than it was sent, those that both have are compared.
            both = tuple(slice(0, min(m, n)) for m, n in zip(x.shape, start.shape, strict=True))
            square += float((x[both].double() - start[both].double()).square().sum())
    return math.sqrt(square)


def step_fault(step: float, recent: Sequence[float], ratio: float | None) -> str | None:
    """Why the server's step must not be committed, or None. `recent` are the norms of the last steps."""
    if not math.isfinite(step):
        return "the aggregate has a NaN or an infinite number"
    middle = statistics.median(recent) if len(recent) >= LEAST else 0.0
    if ratio is not None and middle > 0 and step > ratio**2 * middle:
        return f"the aggregate moves the model {step / middle:.3g} times as far as recent rounds did"
    return None
