"""How long a study will still take, by the fastest and the slowest cell of each method so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Clock:
    """How long cells took, and what that says of those to come."""

    jobs: int
    took: dict[str, list[float]] = field(default_factory=dict)
    """Label -> seconds of its cells."""

    def add(self, label: str, seconds: float) -> None:
        self.took.setdefault(label, []).append(seconds)

    def left(self, labels: Sequence[str]) -> tuple[float, float] | None:
        """Seconds that cells of these labels will take, by the fastest and by the slowest seen; None before one was seen.

        >>> Clock(2, {"fedit": [10.0, 20.0]}).left(["fedit", "fslora"])
        (10.0, 20.0)
        """
        seen = [x for each in self.took.values() for x in each]
        if not seen:
            return None
        spread = [(min(x), max(x)) for x in (self.took.get(label) or seen for label in labels)]
        return sum(low for low, _ in spread) / self.jobs, sum(high for _, high in spread) / self.jobs

    def words(self, labels: Sequence[str]) -> str:
        """The time left, as far as it is known."""
        found = self.left(labels)
        cells = "1 cell" if len(labels) == 1 else f"{len(labels)} cells"
        if found is None:
            return f"{cells} to go, no estimate before the first has ended"
        low, high = (duration(x) for x in found)
        return f"{cells} to go, about " + (low if low == high else f"{low} to {high}")


def duration(seconds: float) -> str:
    """
    >>> duration(40), duration(200), duration(7300)
    ('40 s', '3 min', '2.0 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
