"""Bytes that crossed, per role, counted from the states themselves. No method reports its own cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from fedloom.state import State


class ByteCount:
    """A running count of payload bytes by role."""

    def __init__(self) -> None:
        self.by_role: Counter[str] = Counter()

    def count(self, state: State) -> int:
        """Add one state that crossed; its bytes over all roles are returned."""
        return self.add({role: sum(x.numel() * x.element_size() for x in g.values()) for role, g in state.items()})

    def add(self, by_role: Mapping[str, int]) -> int:
        """Add bytes by role; their sum is returned."""
        self.by_role.update(by_role)
        return sum(by_role.values())

    def as_dict(self) -> dict[str, int]:
        """Role -> bytes, roles in alphabetical order."""
        return dict(sorted(self.by_role.items()))
