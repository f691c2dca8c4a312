"""States: every tensor that a method keeps, sends or trains, by role and site."""

from __future__ import annotations

from torch import Tensor

Group = dict[str, Tensor]
"""Site -> tensor: all tensors of one role. A site is the name of an adapted layer."""

State = dict[str, Group]
"""Role -> group, such as `{"A": {...}, "B": {...}, "head": {...}}`. Roles are never searched for in names."""

Sites = dict[str, tuple[int, int]]
"""Adapted layer -> (out, in)."""


def only(state: State, *roles: str) -> State:
    """The roles named, where the state has them."""
    return {role: state[role] for role in roles if role in state}


def without(state: State, *roles: str) -> State:
    """All roles but those named."""
    return {role: group for role, group in state.items() if role not in roles}


def zeros_like(state: State) -> State:
    """A state of the same shapes, all zero."""
    return {role: {site: x.new_zeros(x.shape) for site, x in group.items()} for role, group in state.items()}


def finite(state: State) -> bool:
    """Whether no tensor holds a NaN or an infinite number."""
    return all(is_finite(x) for group in state.values() for x in group.values())


def is_finite(x: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinite number."""
    # A sum is finite only if all terms are, bar overflow: one pass without a boolean tensor, then the exact test.
    return not x.is_floating_point() or bool(x.sum().isfinite()) or bool(x.isfinite().all())
