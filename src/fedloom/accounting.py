"""Bytes that crossed, per role, counted from the states themselves. No method reports its own cost."""

from __future__ import annotations

from collections import Counter

from fedloom.core import State


class Bytes:
    """A running count of payload bytes by role."""

    def __init__(self) -> None:
        self.by_role: Counter[str] = Counter()

    def count(self, state: State) -> int:
        """Add one state that crossed; its bytes over all roles are returned."""
        total = 0
        for role, group in state.items():
            n = sum(x.numel() * x.element_size() for x in group.values())
            self.by_role[role] += n
            total += n
        return total

    def as_dict(self) -> dict[str, int]:
        """Role -> bytes, roles in alphabetical order."""
        return dict(sorted(self.by_role.items()))
